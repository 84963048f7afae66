"""The README.md of an export: what the network is, and its limits."""

from collections.abc import Mapping
from typing import Any

from kdseg import networks
from kdseg.data import sets
from kdseg.deploy import models
from kdseg.deploy import parity as parity_lib

_HEAD = """\
# {title}

Marks the skin lesion on a dermoscopic image, pixel by pixel. **Research \
software, not a medical device**: no diagnosis, and no decision about a \
person, may rest on it. Made for comparing methods and for building on.

| | |
|---|---|
"""
_SCORES = """
Scores are means over images, in brackets their 95 % intervals (Student's t \
over images: of this one network, not of others trained alike).
"""
_FILES = """
| file | bytes | largest difference from JAX | ms, one thread |
|---|---:|---:|---:|
"""
_FOOT = """
Milliseconds are the fastest of thirty runs for one image, on the machine that \
wrote this. `preprocess.json` says what to do to an image before and after; \
`golden.npz` holds inputs and the outputs that they must give.

Limits: it knows images like those it was trained on, no others; those of \
ISIC-2016 are dermoscopic, of one lesion each, mostly on light skin. Its \
probabilities are not calibrated.
"""


def make_card(
  model: models.Model, weights_bytes: int, parity: Mapping[str, Any]
) -> str:
  """Returns the model card.

  Args:
    model: the network.
    weights_bytes: size of weights.safetensors.
    parity: what PARITY.json says, by file.
  """
  about = model.about
  count = networks.count_parameters(model.variables)
  macs = networks.count_macs(model.network, size=model.size)
  rows = {
    "network": about["network"],
    "parameters": f"{count:,}",
    "multiply-accumulates": f"{macs / 1e6:.1f} M an image of {model.size} x "
    f"{model.size}",
    "trained on": _trained_on(about),
    "seed": about.get("seed", "not stated"),
    "validation Dice": _rounded(about.get("validation_dice")),
    "threshold": model.threshold,
    **{key: about[key] for key in ("scores", "protocol") if about.get(key)},
  }
  files = [f"| weights.safetensors | {weights_bytes:,} | | |\n"]
  files += [
    f"| {name} | {entry['bytes']:,} | "
    f"{max(entry['largest_difference'].values()):.1e} | "
    f"{entry['milliseconds']:.1f} |\n"
    for name, entry in parity.items()
  ]
  int8 = [
    f"\n{name}: {parity_lib.describe_int8(name, parity)}.\n"
    for name, entry in parity.items()
    if parity_lib.is_int8(entry)
  ]
  return "".join(
    [
      _HEAD.format(title=about.get("arm", model.name)),
      *(f"| {key} | {value} |\n" for key, value in rows.items()),
      _SCORES if about.get("scores") else "",
      _FILES,
      *files,
      *int8,
      _FOOT,
    ]
  )


def _trained_on(about: Mapping[str, Any]) -> str:
  name = str(about.get("trained_on") or "not stated")
  if name not in sets.BUILDERS:
    return name
  return f"{sets.BUILDERS[name].title}, {sets.BUILDERS[name].terms_of_use}"


def _rounded(value: Any) -> str:
  return f"{value:.4f}" if isinstance(value, float) else "not stated"
