"""Boundary distillation of skin-lesion segmentation networks."""

import pathlib
from typing import Any


def load(name_or_path: str | pathlib.Path) -> Any:
  """Returns a trained network; see `kdseg.deploy.models.load`.

  `kdseg.load("isic2016-student").predict(image)` maps an image (a path, a PIL
  picture or an array) to the probability of lesion, [h, w].
  """
  # Here, so that `import kdseg` alone stays light.
  from kdseg.deploy import models

  return models.load(name_or_path)


def run(*arguments: Any, **options: Any) -> bool:
  """Runs an experiment, or what is left of it; see `kdseg.experiment.run.run`.

  `kdseg.run(config, "runs/mine")` does what `python -m kdseg.main` does.
  """
  from kdseg.experiment import run as run_lib

  return run_lib.run(*arguments, **options)
