"""What all data sets share: from an inventory to records on disk.

A builder lists its files (`inventory`) and this class does the rest: it stops
on the first problem, decodes every image and mask once to check them, and
writes them at their own size. tfds writes to a temporary folder and renames it
at the end, so an error leaves no half-prepared data set behind.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import os
import pathlib
import types
from typing import Any

import tensorflow_datasets as tfds

from kdseg.data import decode
from kdseg.data import masks
from kdseg.data.archives import DataError
from kdseg.data.pairs import Inventory
from kdseg.data.pairs import Pair

# tfrecord, the default of tfds, needs TensorFlow to be read.
FILE_FORMAT = "array_record"

# What `info.metadata` says of the files that the records were made from.
METADATA = ("official_count", "found_count", "excluded", "notes", "stamp")

Download = Callable[[Mapping[str, str]], Mapping[str, os.PathLike[str]]]


class PairBuilder(  # type: ignore[call-arg]  # tfds itself has no types
  tfds.core.GeneratorBasedBuilder, skip_registration=True
):
  """Builds a data set of images with one mask each.

  Features: `image` uint8 [h, w, 3] RGB, `mask` uint8 [h, w, 1] with 255 where
  there is lesion and 0 elsewhere, `id`, and what `extra_features` names.
  `info.metadata` says what was found of the official release.

  A subclass sets `name` and `test_name` and implements `inventory`.

  Attributes:
    name: what a config calls the data set.
    title: what a model card calls it, with its source.
    test_name: what `scores.csv` calls its test split.
    official: whether it is a published release with a test split of its own,
      so that scores may be held against published ones.
    official_counts: by split, the pairs of that release; empty if the
      files found are all there are.
    terms_of_use: what it may be used for, as a model card says it.
    how_split: what to tell a user who misses a split.
    homepage: where a release is published.
  """

  MANUAL_DOWNLOAD_INSTRUCTIONS = "Pass the folder of its files as manual_dir."
  VERSION = tfds.core.Version("1.0.0")
  RELEASE_NOTES = {"1.0.0": "First release."}  # noqa: RUF012  (tfds reads it)

  name: str
  title: str = "pictures of their maker's own"
  test_name: str
  official: bool = False
  official_counts: Mapping[str, int] = types.MappingProxyType({})
  terms_of_use: str = "under terms of their own"
  how_split: str = ""
  homepage: str = ""

  def __init__(
    self,
    *,
    config: str | tfds.core.BuilderConfig | None = None,
    grey_masks: str = "error",
    lesion: str = "white",
    **kwargs: Any,
  ):
    """Makes the builder; reads no data yet.

    Args:
      config: as in tfds; leave it out, it follows from the options.
      grey_masks: what to do with a mask that has values other than 0 and 255:
        `"error"`, or `"threshold"` to take it as lesion above 128.
      lesion: which values are lesion: `"white"`, `"black"`, `"any"` class above
        0, or the number of one class.
      **kwargs: `data_dir` and `version`, as in tfds.
    """
    self.mask_rule = masks.MaskRule(grey_masks, lesion, self.name)
    self.mask_rule.check()
    if config is None:
      config = self._options_config()
    super().__init__(config=config, **{"file_format": FILE_FORMAT, **kwargs})

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

  def require(self, manual_dir: pathlib.Path | None) -> pathlib.Path:
    """Returns `manual_dir`; raises `DataError` with instructions if None."""
    if manual_dir is None:
      raise DataError(f"{self.name}: {self.MANUAL_DOWNLOAD_INSTRUCTIONS}")
    return manual_dir

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

  def options(self) -> dict[str, str]:
    """Returns the options that change the records, if not at their defaults.

    They name the folder of the prepared data, so that data prepared with one
    option is never read under another.
    """
    grey, lesion, _ = self.mask_rule
    return {
      **({} if grey == "error" else {"grey": grey}),
      **({} if lesion == "white" else {"lesion": lesion}),
    }

  def extra_features(self) -> dict[str, Any]:
    """Returns the features beside image, mask and id."""
    return {}

  def extra_values(self, pair: Pair) -> dict[str, Any]:
    """Returns the values of `extra_features` for one example."""
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
    return tfds.core.DatasetInfo(
      builder=self,
      description=self.__doc__ or self.title,
      homepage=self.homepage,
      citation=self.title,
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
    try:
      manual_dir = pathlib.Path(dl_manager.manual_dir)
    except (AssertionError, ValueError):  # not there, empty, or not asked for
      manual_dir = None
    # Files missing from a folder that the user named are not downloaded.
    default = pathlib.Path(dl_manager.download_dir) / "manual"
    may_download = manual_dir in (None, default)
    inventory = self.inventory(
      manual_dir, dl_manager.download if may_download else None
    )
    inventory.check()
    if not inventory.splits:
      raise DataError(f"{self.name}: no pair of image and mask was found.")
    self.info.metadata.update(
      official_count=dict(self.official_counts or inventory.found),
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
      pair = pair.held()
      image, mask = masks.decode_pair(pair, self.mask_rule)
      yield (
        index,
        {
          "id": pair.id,
          "image": decode.keep_or_encode(pair.image.read(), image),
          "mask": decode.encode_png(mask.astype("uint8") * 255),
          **self.extra_values(pair),
        },
      )
