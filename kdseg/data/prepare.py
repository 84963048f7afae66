"""Makes a data set's builder, prepares it on disk, and reads its records."""

from collections.abc import Iterator
from collections.abc import Mapping
import inspect
import os
import pathlib
from typing import Any
from typing import NamedTuple

import tensorflow_datasets as tfds

from kdseg.data import archives
from kdseg.data import builder as builder_lib
from kdseg.data import sets
from kdseg.data.archives import DataError
from kdseg.runtime import files
from kdseg.runtime import names

Builders = Mapping[str, type[builder_lib.PairBuilder]]
Path = str | os.PathLike[str]


class Record(NamedTuple):
  """One example as it lies prepared, image and mask still encoded."""

  id: str
  image: bytes
  mask: bytes


def make_builder(
  name: str,
  *,
  data_dir: Path | None = None,
  builders: Builders = sets.BUILDERS,
  **options: Any,
) -> builder_lib.PairBuilder:
  """Returns the tfds builder of a data set, not prepared.

  Args:
    name: a key of `builders`.
    data_dir: where prepared data sets lie; the default of tfds if None.
    builders: the data sets by name.
    **options: of the builder, e.g. `duplicates="include"`.

  Raises:
    UnknownNameError: on an unknown name, or an option the data set lacks.
    DataError: if what lies prepared is damaged.
    ValueError: on a value that an option does not have.
  """
  names.check_known("data set", [name], builders)
  known = [
    parameter.name
    for owner in (builders[name], builder_lib.PairBuilder)
    for parameter in inspect.signature(owner.__init__).parameters.values()
    if parameter.kind is parameter.KEYWORD_ONLY and parameter.name != "config"
  ]
  names.check_known(f"option of {name}", options, dict.fromkeys(known))
  try:
    return builders[name](data_dir=data_dir, **options)
  except Exception as error:
    if isinstance(error, OSError | ValueError) and not isinstance(
      error, UnicodeDecodeError
    ):
      raise
    # tfds reads the dataset_info.json of an earlier run, which may be damaged,
    # and raises ParseError or AssertionError.
    raise _damaged(_data_root(data_dir) / name, error) from None


def prepare(
  name: str,
  *,
  data_dir: Path | None = None,
  manual_dir: Path | None = None,
  builders: Builders = sets.BUILDERS,
  **options: Any,
) -> builder_lib.PairBuilder:
  """Returns the builder of a prepared data set, preparing it if it is not.

  Args:
    name: see `make_builder`.
    data_dir: see `make_builder`.
    manual_dir: the official archives, or the folder of own pictures.
    builders: see `make_builder`.
    **options: see `make_builder`.

  Returns:
    The tfds builder, ready for `as_data_source`.

  Raises:
    DataError: if the data are not as they should be, or were prepared from
      other files than those in `manual_dir`.
    WriteError: if the disk is full or may not be written to.
  """
  if manual_dir is not None:
    manual_dir = pathlib.Path(manual_dir).expanduser()
    if not manual_dir.is_dir():
      raise DataError(
        f"manual_dir {manual_dir} is no folder; it should hold the files of"
        f" {name}."
      )
  if name in builders:
    options = {**builders[name].options_from(manual_dir), **options}
  builder = make_builder(name, data_dir=data_dir, builders=builders, **options)
  if is_prepared(builder):
    if manual_dir is not None:
      _check_same_files(builder, manual_dir)
    return builder
  config = tfds.download.DownloadConfig(
    manual_dir=None if manual_dir is None else str(manual_dir),
    try_download_gcs=False,
  )
  try:
    with files.writing(_data_root(data_dir)):
      builder.download_and_prepare(download_config=config)
  except DataError as error:
    # Drops the thirty frames of tfds from the traceback.
    raise DataError(str(error)) from None
  except files.WriteError:
    raise
  except OSError:
    # Another process may have prepared the same data set first.
    if not is_prepared(builder):
      raise
    builder = make_builder(
      name, data_dir=data_dir, builders=builders, **options
    )
  return builder


def is_prepared(builder: builder_lib.PairBuilder) -> bool:
  """Whether the records of a builder are on disk, whole."""
  return (pathlib.Path(builder.data_dir) / "dataset_info.json").exists()


def read_records(
  builder: builder_lib.PairBuilder, split: str
) -> Iterator[Record]:
  """Yields every example of a prepared split, in order.

  Raises:
    DataError: if the records are damaged; names their folder.
  """
  undecoded = tfds.decode.SkipDecoding()
  try:
    source = builder.as_data_source(
      split, decoders={"image": undecoded, "mask": undecoded}
    )
    for index in range(len(source)):
      record = source[index]
      yield Record(
        record["id"].decode(), bytes(record["image"]), bytes(record["mask"])
      )
  except Exception as error:
    # A damaged file gives RuntimeError or None in the place of bytes.
    raise _damaged(builder.data_dir, error) from None


def read_metadata(builder: builder_lib.PairBuilder) -> Mapping[str, Any]:
  """Returns what was found of the release when the data were prepared.

  Raises:
    DataError: if it is not there; names its folder.
  """
  metadata: Mapping[str, Any] = builder.info.metadata
  for key in builder_lib.METADATA:
    if key not in metadata:
      raise _damaged(builder.data_dir, f"metadata.json has no {key}")
  return metadata


def _damaged(folder: Path, error: object) -> DataError:
  return DataError(
    f"what lies prepared in {folder} is damaged ({archives.shown(error)})."
    " Delete that folder to prepare it anew."
  )


def _data_root(data_dir: Path | None) -> pathlib.Path:
  """Returns where prepared data sets lie."""
  return pathlib.Path(data_dir or tfds.core.constants.DATA_DIR).expanduser()


def _check_same_files(
  builder: builder_lib.PairBuilder, manual_dir: pathlib.Path
) -> None:
  """Raises if the prepared records come from other files than these."""
  stamp = builder.inventory(manual_dir).stamp
  if stamp != read_metadata(builder)["stamp"]:
    raise DataError(
      f"{builder.data_dir} was prepared from other files than those in"
      f" {manual_dir}. Delete it to prepare it anew, or name another data_dir."
    )
