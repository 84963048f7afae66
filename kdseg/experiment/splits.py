"""The images of an experiment, by split."""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

from kdseg.data import alike
from kdseg.data import archives
from kdseg.data import loading
from kdseg.data import masks
from kdseg.data import pairs
from kdseg.experiment.records import VALIDATION
from kdseg.experiment.records import DataConfig
from kdseg.runtime import hosts
from kdseg.runtime import memory

_LOG = logging.getLogger("kdseg")


@dataclasses.dataclass(frozen=True)
class Data:
  """The arrays of an experiment.

  Attributes:
    train: the images to train on.
    validation: those that choose the weights to keep.
    tests: those to score on, by their name in scores.csv.
    notes: sentences that a reader of the scores should know.
  """

  train: loading.Arrays
  validation: loading.Arrays
  tests: Mapping[str, loading.Arrays]
  notes: tuple[str, ...] = ()

  def by_name(self) -> dict[str, loading.Arrays]:
    """Returns every split by the name that environment.json gives it."""
    return {"train": self.train, "validation": self.validation, **self.tests}

  def describe(self) -> dict[str, dict[str, Any]]:
    """Returns facts about each split, for environment.json."""
    return {
      name: {
        "name": arrays.name,
        "images": len(arrays),
        "coverage": arrays.coverage,
        "excluded": list(arrays.excluded),
        "sha256": loading.fingerprint(arrays),
      }
      for name, arrays in self.by_name().items()
    }


def load(config: DataConfig) -> Data:
  """Reads every split that the config names.

  Raises:
    DataError: if images are missing or damaged, or other on another host.
    OutOfMemoryError: if they do not fit into memory.
  """

  def read(name: str, split: str) -> loading.Arrays:
    try:
      arrays = loading.load(
        name,
        split,
        size=config.size,
        data_dir=config.data_dir or None,
        manual_dir=config.manual_dir or None,
        builders=config.builders,
        **config.options.get(name, {}),
      )
    except archives.DataError:
      raise
    except ValueError as error:
      # An option has a value that it cannot have.
      raise archives.DataError(f"data.options.{name}: {error}") from error
    _LOG.info(
      "data: %s %s, %d images (%s)", name, split, len(arrays), arrays.coverage
    )
    return arrays

  with memory.enough(
    f"data: images of {config.size} x {config.size}",
    "Free some, then the same command continues; or lower data.size, in "
    "another --workdir",
  ):
    validation = read(config.name, "validation")
    data = Data(
      train=read(config.name, "train"),
      validation=validation,
      tests={
        config.test_name(test): (
          validation if test == VALIDATION else read(test, "test")
        )
        for test in config.tests
      },
    )
  _check_agreement(data)
  notes = (
    *_check_alike(data, config.allow_alike),
    *(
      note
      for name, arrays in data.tests.items()
      for note in pairs.warn_of_few(name, len(arrays))
    ),
  )
  for note in (*notes, *_warn_of_inverted(data, config)):
    _LOG.warning("data: %s", note)
  return dataclasses.replace(data, notes=notes)


def _check_alike(data: Data, allowed: str) -> list[str]:
  """Refuses the same picture in two splits, or in training and a test set.

  Returns:
    A sentence for each two that are allowed.

  Raises:
    DataError: that names both, and the flag that allows them.
  """
  seen = {"validation": data.validation, "train": data.train}
  # The training images last: no two of them are held against each other.
  parts = {**data.tests, **seen}
  thumbs = {
    f"{name}/{id_}": alike.thumb(image)
    for name, arrays in parts.items()
    if name in seen or arrays is not data.validation
    for id_, image in zip(arrays.ids, arrays.image, strict=True)
  }
  found = [
    alike.Alike(pair.second, pair.first, pair.bits)
    for pair in alike.find_alike(thumbs, len(thumbs) - len(data.train))
    if pair.across
    and seen.keys() & {pair.first.split("/")[0], pair.second.split("/")[0]}
  ]
  if problems := alike.refuse(found, allowed):
    more = f" ({len(problems) - 1} more like this)" if problems[1:] else ""
    raise archives.DataError(problems[0] + more)
  return [f"allowed to look alike: {pair}" for pair in found]


def _warn_of_inverted(data: Data, config: DataConfig) -> list[str]:
  """Returns a line for each split of which nearly all masks touch the frame."""
  return [
    warning
    for arrays in data.by_name().values()
    for warning in masks.warn_of_inverted(
      [masks.frame_share(mask) for mask in arrays.mask],
      masks.MaskRule(
        lesion=config.options.get(arrays.name, {}).get("lesion", "white"),
        data_set=arrays.name,
      ),
    )
  ]


def _check_agreement(data: Data) -> None:
  """Refuses hosts that would train on different images.

  Raises:
    DataError: that names the split.
  """
  if not hosts.are_many():
    return
  found = hosts.gather(
    {name: loading.fingerprint(a) for name, a in data.by_name().items()}
  )
  for name in data.by_name():
    if len({host[name] for host in found}) > 1:
      raise archives.DataError(
        f"the hosts do not have the same {name} images; give each of them the "
        "same archives"
      )
