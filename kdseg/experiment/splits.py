"""The images of an experiment, by split."""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

from kdseg.data import archives
from kdseg.data import loading
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
    ValueError: if a split is empty.
    DataError: if images are missing or damaged, or other on another host.
    OutOfMemoryError: if they do not fit into memory.
  """

  def read(name: str, split: str) -> loading.Arrays:
    arrays = loading.load(
      name,
      split,
      size=config.size,
      data_dir=config.data_dir or None,
      manual_dir=config.manual_dir or None,
      builders=config.builders,
      **config.options.get(name, {}),
    )
    if not len(arrays):
      raise ValueError(f"{name}: the {split} split holds no image")
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
  notes = [
    note
    for name, arrays in data.tests.items()
    for note in pairs.warn_of_few(name, len(arrays))
  ]
  for note in notes:
    _LOG.warning("data: %s", note)
  return dataclasses.replace(data, notes=tuple(notes))


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
