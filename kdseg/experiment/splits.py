"""The images of an experiment, by split."""

from collections.abc import Mapping
import dataclasses
import logging
from typing import Any

import ml_collections

from kdseg.data import archives
from kdseg.data import loading
from kdseg.experiment import config as config_lib
from kdseg.runtime import hosts

_LOG = logging.getLogger("kdseg")


@dataclasses.dataclass(frozen=True)
class Data:
  """The arrays of an experiment; test sets by their name in scores.csv."""

  train: loading.Arrays
  validation: loading.Arrays
  tests: Mapping[str, loading.Arrays]


def check_agreement(data: Data) -> None:
  """Refuses hosts that would train on different images.

  Raises:
    DataError: that names the split.
  """
  if not hosts.are_many():
    return
  splits = {"train": data.train, "validation": data.validation, **data.tests}
  found = hosts.gather(
    {name: loading.fingerprint(arrays) for name, arrays in splits.items()}
  )
  for name in splits:
    if len({host[name] for host in found}) > 1:
      raise archives.DataError(
        f"the hosts do not have the same {name} images; give each of them the "
        "same archives"
      )


def load(config: ml_collections.ConfigDict) -> Data:
  """Reads every split that the config names.

  Raises:
    ValueError: if a split is empty.
    DataError: see `data.loading.load`.
  """
  c = config.data

  def load(name: str, split: str) -> loading.Arrays:
    arrays = loading.load(
      name,
      split,
      size=c.size,
      data_dir=c.data_dir or None,
      manual_dir=c.manual_dir or None,
      **dict(c.options.get(name, {})),
    )
    if not len(arrays):
      raise ValueError(f"{name}: the {split} split holds no image")
    _LOG.info(
      "data: %s %s, %d images (%s)", name, split, len(arrays), arrays.coverage
    )
    return arrays

  validation = load(c.name, "validation")
  return Data(
    train=load(c.name, "train"),
    validation=validation,
    tests={
      config_lib.test_name(config, name): (
        validation if name == config_lib.VALIDATION else load(name, "test")
      )
      for name in c.tests
    },
  )


def describe(data: Data) -> dict[str, dict[str, Any]]:
  """Returns facts about each split, for environment.json."""
  every = {"train": data.train, "validation": data.validation, **data.tests}
  return {
    name: {
      "name": arrays.name,
      "images": len(arrays),
      "coverage": arrays.coverage,
      "excluded": list(arrays.excluded),
      "sha256": loading.fingerprint(arrays),
    }
    for name, arrays in every.items()
  }
