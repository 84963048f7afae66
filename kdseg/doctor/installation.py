"""Checks the installation: versions, packages, weights, models, archives."""

from collections.abc import Callable
from collections.abc import Iterable
from collections.abc import Iterator
from importlib import metadata
import pathlib
import platform
from typing import Any

from kdseg.doctor.findings import Finding
from kdseg.doctor.findings import installed
from kdseg.doctor.findings import ok
from kdseg.doctor.findings import one_line
from kdseg.doctor.findings import problem
from kdseg.doctor.findings import warning

# What is not of Python itself is imported inside the checks, as in `machine`.

PACKAGE = "kdseg"
AGAIN = f"install {PACKAGE} again: its files are damaged"


def check_versions() -> Iterator[Finding]:
  """Names the versions that a run would record."""
  yield ok(f"Python {platform.python_version()} on {platform.platform()}")
  from kdseg.experiment import workdir

  yield ok(
    ", ".join(f"{x} {installed(x) or 'missing'}" for x in workdir.PACKAGES)
  )
  if commit := workdir.commit():
    yield ok(f"commit {commit}")
  else:
    yield warning(
      "no commit is known: a run could not say what code it was made with",
      "run from a git checkout, or set KDSEG_COMMIT",
    )


def check_packages() -> Iterator[Finding]:
  """Compares the installed packages with what kdseg and its extras require."""
  from packaging import requirements

  try:
    about = metadata.metadata(PACKAGE)
  except metadata.PackageNotFoundError:
    yield problem(
      f"{PACKAGE} is not installed, so its requirements are unknown",
      "pip install -e . in the checkout",
    )
    return
  required = [
    requirements.Requirement(x) for x in metadata.requires(PACKAGE) or ()
  ]
  lacking = _lacking(x for x in required if x.marker is None)
  if lacking:
    yield problem(f"core: missing {lacking}", f"pip install {PACKAGE}")
  else:
    yield ok("core: installed")
  for extra in about.get_all("Provides-Extra") or ():
    lacking = _lacking(
      x for x in required if x.marker and x.marker.evaluate({"extra": extra})
    )
    if lacking:
      yield warning(
        f"extra {extra}: missing {lacking}", f"pip install '{PACKAGE}[{extra}]'"
      )
    else:
      yield ok(f"extra {extra}: installed")


def _lacking(required: Iterable[Any]) -> str:
  """Returns the requirements that are not met, with what is there instead."""
  lacking = []
  for requirement in required:
    version = installed(requirement.name)
    if not version:
      lacking.append(requirement.name)
    elif not requirement.specifier.contains(version, prereleases=True):
      wanted = f"{requirement.name}{requirement.specifier}"
      lacking.append(f"{wanted} (here: {version})")
  return ", ".join(lacking)


def check_weights() -> Iterator[Finding]:
  """Reads the published weights of the encoders, hashes included."""
  from kdseg.networks.encoders import pretrained
  from kdseg.networks.encoders import vit_weights

  readers: dict[str, Callable[[], Any]] = {
    "EfficientNet-Lite0": lambda: pretrained.load_efficientnet_lite("lite0"),
    "EfficientNet-Lite2": lambda: pretrained.load_efficientnet_lite("lite2"),
    "ViT-S/14": vit_weights.load_vit_small,
  }
  for name, read in readers.items():
    try:
      read()
    except ImportError as error:
      # The message ends with what to install.
      text, pip, rest = one_line(error).partition("pip install ")
      yield warning(text.rstrip(": "), pip + rest)
    except (OSError, ValueError) as error:
      yield problem(
        f"{name}: {one_line(error)}",
        "install the package that holds the file again",
      )
    else:
      yield ok(f"{name}: found, its hash is right")


def check_models() -> Iterator[Finding]:
  """Loads the models that come with the package."""
  from kdseg import networks
  from kdseg.deploy import models
  from kdseg.deploy import weights

  shipped = models.shipped()
  if not shipped:
    yield problem("no model came with the package", AGAIN)
  for name in shipped:
    try:
      count = networks.count_parameters(models.load_weights(name).variables)
    except weights.WeightsError as error:
      yield problem(one_line(error), AGAIN)
    else:
      yield ok(f"{name}: loads, {count:,} parameters")


def check_archives(folder: pathlib.Path) -> Iterator[Finding]:
  """Counts the pairs of the official archives in a folder; decodes no image.

  Args:
    folder: a data.manual_dir.
  """
  from kdseg.data import archives
  from kdseg.data import sets

  folder = folder.expanduser()
  if not folder.is_dir():
    yield problem(f"{folder} is no folder", "choose another --manual-dir")
    return
  for name, builder in sets.BUILDERS.items():
    if not builder.official:
      continue
    try:
      if not builder.find_sources(folder):
        yield warning(
          f"{name}: not in {folder}", builder.MANUAL_DOWNLOAD_INSTRUCTIONS
        )
        continue
      # A data_dir in which nothing is prepared, and nothing is read.
      inventory = builder(data_dir=str(folder)).inventory(folder)
    except archives.DataError as error:
      yield problem(f"{name}: {one_line(error)}")
      continue
    verify = f"kdseg data verify {name} --manual-dir '{folder}'"
    if problems := inventory.problems:
      more = f" (and {len(problems) - 1} more)" * (len(problems) > 1)
      yield problem(f"{name}: {problems[0]}{more}", f"{verify} lists all")
      continue
    # Validation is a part of the training pairs.
    found = {x: n for x, n in inventory.found.items() if x != "validation"}
    text = ", ".join(
      f"{split} {count} of {builder.official_counts[split]}"
      for split, count in found.items()
    )
    # A part of the training pairs is enough to train, not to compare scores.
    whole = all(
      builder.official_counts[split] == n for split, n in found.items()
    )
    yield (ok if whole else warning)(
      f"{name}: pairs: {text}", f"{verify} decodes every image"
    )
