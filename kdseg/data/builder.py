"""What the four tfds builders share: from an inventory to records on disk.

A builder lists its files (`inventory`) and this class does the rest: it stops
on the first problem, decodes every image and mask once to check them, and
writes them at their own size. tfds writes to a temporary folder and renames it
at the end, so an error leaves no half-prepared data set behind.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import dataclasses
import os
import pathlib
import types
from typing import Any

import tensorflow_datasets as tfds

from kdseg.data import pairs as pairs_lib
from kdseg.data.archives import DataError
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair

# tfrecord, the default of tfds, needs TensorFlow to be read.
FILE_FORMAT = "array_record"

# What `info.metadata` says of the files that the records were made from.
METADATA = ("official_count", "found_count", "excluded", "notes", "stamp")

Download = Callable[[Mapping[str, str]], Mapping[str, os.PathLike[str]]]


class PairBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
  """Builds a data set of images with one mask each.

  Features: `image` uint8 [h, w, 3] RGB, `mask` uint8 [h, w, 1] with 255 where
  there is lesion and 0 elsewhere, `id`, and what `extra_features` names.
  `info.metadata` says what was found of the official release.

  Attributes:
    name: what a config calls the data set.
    title: what a model card calls it, with its source.
    test_name: what `scores.csv` calls its test split.
    official: whether it is a published release with a test split of its own,
      so that scores may be held against published ones.
    official_counts: by split, the pairs of that release.
    terms_of_use: what it may be used for, as a model card says it.
    description: for tfds, as `homepage` and `citation`.
  """

  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012  (tfds reads it)

  name: str
  title: str = "own pictures"
  test_name: str = ""
  official: bool = False
  official_counts: Mapping[str, int] = types.MappingProxyType({})
  terms_of_use: str = "under terms of their own"
  description: str = ""
  homepage: str = ""
  citation: str = ""

  def __init__(
    self,
    *,
    config: str | tfds.core.BuilderConfig | None = None,
    grey_masks: str = "error",
    file_format: str | None = FILE_FORMAT,
    **kwargs: Any,
  ):
    """Makes the builder; reads no data yet.

    Args:
      config: as in tfds; leave it out, it follows from the options.
      grey_masks: what to do with a mask that has values other than 0 and 255:
        `"error"`, or `"threshold"` to take it as lesion above 128.
      file_format: how tfds stores the records.
      **kwargs: `data_dir` and `version`, as in tfds.
    """
    if grey_masks not in pairs_lib.GREY_MASKS:
      raise ValueError(
        f"grey_masks is {grey_masks!r}, not one of {pairs_lib.GREY_MASKS}."
      )
    self._grey_masks = grey_masks
    if config is None:
      config = self._options_config()
    super().__init__(config=config, file_format=file_format, **kwargs)

  def inventory(
    self, manual_dir: pathlib.Path | None, download: Download | None = None
  ) -> Inventory:
    """Lists the pairs of every split.

    Args:
      manual_dir: where the user has put the files; None if nowhere.
      download: fetches files, a dict of URLs to a dict of paths; None forbids
        to download.

    Raises:
      DataError: if there is nothing to list.
    """
    raise NotImplementedError

  @classmethod
  def options_from(cls, manual_dir: pathlib.Path | None) -> dict[str, Any]:
    """Returns options that follow from where the files lie."""
    del manual_dir
    return {}

  @classmethod
  def find_sources(cls, manual_dir: pathlib.Path) -> tuple[pathlib.Path, ...]:
    """Returns the archives or folders of this data set in a folder.

    Raises:
      DataError: if one is there that cannot be read, as a `.rar`.
    """
    del manual_dir
    return ()

  def describe_splits(self) -> str:
    """What to say to a reader who misses a split; "" for a release."""
    return ""

  def options(self) -> dict[str, str]:
    """Options that change the records, with the values that differ from usual.

    They name the folder of the prepared data, so that data prepared with one
    option is never read under another.
    """
    return {} if self._grey_masks == "error" else {"grey": self._grey_masks}

  def extra_features(self) -> dict[str, Any]:
    """Features beside image, mask and id."""
    return {}

  def extra_values(self, pair: Pair) -> dict[str, Any]:
    """The values of `extra_features` for one example."""
    del pair
    return {}

  def _options_config(self) -> tfds.core.BuilderConfig | None:
    options = self.options()
    if not options:
      return None
    name = "-".join(f"{key}_{value}" for key, value in options.items())
    described = ", ".join(f"{key} = {value}" for key, value in options.items())
    return tfds.core.BuilderConfig(
      name=name, version=self.VERSION, description=described
    )

  def _info(self) -> tfds.core.DatasetInfo:
    return self.dataset_info_from_configs(
      description=self.description,
      homepage=self.homepage,
      citation=self.citation,
      features=tfds.features.FeaturesDict(
        {
          "id": tfds.features.Text(),
          "image": tfds.features.Image(shape=(None, None, 3)),
          "mask": tfds.features.Image(
            shape=(None, None, 1), encoding_format="png"
          ),
          **self.extra_features(),
        }
      ),
      supervised_keys=("image", "mask"),
      disable_shuffling=True,
      metadata=tfds.core.MetadataDict(),
    )

  def _split_generators(
    self, dl_manager: tfds.download.DownloadManager
  ) -> dict[str, Iterator[tuple[int, dict[str, Any]]]]:
    manual_dir = _manual_dir(dl_manager)
    # A folder the user named is meant to be used, not to be made up for.
    named = manual_dir not in (None, _default_manual_dir(dl_manager))
    inventory = self.inventory(
      manual_dir, None if named else dl_manager.download
    )
    inventory.check()
    if not inventory.splits:
      raise DataError(f"{self.name}: no pair of image and mask was found.")
    self.info.metadata.update(
      official_count=dict(inventory.official),
      found_count=dict(inventory.found),
      excluded=list(inventory.excluded),
      notes=list(inventory.notes),
      stamp=inventory.stamp,
    )
    return {
      split: self._generate_examples(split_pairs)
      for split, split_pairs in inventory.splits.items()
    }

  def _generate_examples(
    self, split_pairs: tuple[Pair, ...]
  ) -> Iterator[tuple[int, dict[str, Any]]]:
    for index, pair in enumerate(split_pairs):
      pair = read_once(pair)
      image, mask = pairs_lib.decode_pair(pair, grey_masks=self._grey_masks)
      yield (
        index,
        {
          "id": pair.id,
          "image": pairs_lib.keep_or_encode(pair.image.read(), image),
          "mask": pairs_lib.encode_png(mask.astype("uint8") * 255),
          **self.extra_values(pair),
        },
      )


def read_once(pair: Pair) -> Pair:
  """The same pair with the contents of its files held in memory."""

  def hold(file):
    content = file.read()
    return dataclasses.replace(file, read=lambda: content)

  return dataclasses.replace(pair, image=hold(pair.image), mask=hold(pair.mask))


def _manual_dir(
  dl_manager: tfds.download.DownloadManager,
) -> pathlib.Path | None:
  try:
    return pathlib.Path(os.fspath(dl_manager.manual_dir))
  except (AssertionError, ValueError):  # not there, empty, or not asked for
    return None


def _default_manual_dir(
  dl_manager: tfds.download.DownloadManager,
) -> pathlib.Path:
  return pathlib.Path(os.fspath(dl_manager.download_dir)) / "manual"
