"""Writes a trained network in the forms that run elsewhere, and checks them.

  python -m kdseg.deploy.export MODEL --out DIR

MODEL is what `kdseg.predict` takes. Into DIR go weights.safetensors (this
package), model.onnx (ONNX Runtime, any batch), model.stablehlo (any batch, JAX
on CPU, GPU and TPU), preprocess.json (what to do to an image before and after),
golden.npz (inputs and the answers they must give), PARITY.json (how far each
form is from JAX) and README.md, its model card. Input is uint8
[batch, S, S, 3], RGB; output the probability of lesion, float32 [batch, S, S].
Normalisation is inside the graph. A form that strays by more than 1e-4 is not
written: the command stops and names it. Needs the extra `export`.
"""

import argparse
from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import json
import pathlib
import sys
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdseg import checkpoint
from kdseg import networks
from kdseg import step as step_lib
from kdseg.data import synthetic
from kdseg.deploy import models
from kdseg.deploy import onnx_graph
from kdseg.deploy import weights

TOLERANCE = 1e-4
INPUT, OUTPUT = "image", "probability"
_GOLDEN = 4
_RANDOM = 4


class ParityError(RuntimeError):
  """A form of a network that computes something else than the network."""


def make_function(model: models.Model) -> Callable[[jax.Array], jax.Array]:
  """Returns uint8 [B, S, S, 3] -> probability [B, S, S], weights inside."""
  predict = step_lib.make_predict(model.network)
  return lambda image: predict(model.variables, {"image": image})


def make_inputs(size: int) -> dict[str, np.ndarray]:
  """Returns drawn lesions ("golden") and noise ("random"), [N, S, S, 3]."""
  drawn = [
    synthetic.draw(np.random.default_rng(seed), size)[0]
    for seed in range(_GOLDEN)
  ]
  noise = np.random.default_rng(0).integers(
    0, 256, (_RANDOM, size, size, 3), np.uint8
  )
  return {"golden": np.stack(drawn), "random": noise}


def export(model: models.Model, out: str | pathlib.Path) -> dict[str, Any]:
  """Writes every form of a network and the proof that they agree.

  Args:
    model: from `models.load`.
    out: folder; files of these names in it are replaced.

  Returns:
    What PARITY.json says: by form, its bytes and its largest distance from
    JAX over golden and random inputs.

  Raises:
    ImportError: if a converter is not installed; names the extra.
    ParityError: if a form is further than 1e-4 from JAX, and so not written.
    UnsupportedError: if the network has an operation without an ONNX form.
  """
  out = pathlib.Path(out)
  function = make_function(model)
  inputs = make_inputs(model.size)
  expected = {
    name: np.asarray(jax.jit(function)(x)) for name, x in inputs.items()
  }

  onnx_bytes, run_onnx = _make_onnx(model, function)
  stablehlo_bytes, run_stablehlo = _make_stablehlo(model, function)
  forms = {
    "model.onnx": (onnx_bytes, run_onnx),
    "model.stablehlo": (stablehlo_bytes, run_stablehlo),
  }
  parity: dict[str, Any] = {}
  for name, (content, run) in forms.items():
    distance = {
      kind: float(np.abs(run(x) - expected[kind]).max())
      for kind, x in inputs.items()
    }
    if not max(distance.values()) <= TOLERANCE:
      raise ParityError(
        f"{name} is {max(distance.values()):.2g} away from JAX in probability, "
        f"more than {TOLERANCE:g}; it is not written"
      )
    parity[name] = {"bytes": len(content), "largest_difference": distance}

  about = {k: v for k, v in model.about.items() if k != "format"}
  record = {
    "tolerance": TOLERANCE,
    "against": f"jax {jax.__version__}",
    **parity,
  }
  out.mkdir(parents=True, exist_ok=True)
  # All of it under other names first, and the proof last: nothing new may
  # stand beside something old.
  with tempfile.TemporaryDirectory(dir=out) as scratch:
    folder = pathlib.Path(scratch)
    for name, (content, _) in forms.items():
      (folder / name).write_bytes(content)
    weights.save(folder / "weights.safetensors", model.variables, about)
    np.savez_compressed(
      folder / "golden.npz",
      **{f"{name}_input": x for name, x in inputs.items()},
      **{f"{name}_output": x for name, x in expected.items()},
    )
    checkpoint.write_json(folder / "preprocess.json", describe_input(model))
    size = (folder / "weights.safetensors").stat().st_size
    (folder / "README.md").write_text(
      make_card(model, {"weights.safetensors": size}, parity), encoding="utf-8"
    )
    checkpoint.write_json(folder / "PARITY.json", record)
    (out / "PARITY.json").unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda p: p.name == "PARITY.json"):
      path.replace(out / path.name)
  return record


def _make_onnx(
  model: models.Model, function: Callable[[jax.Array], jax.Array]
) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
  try:
    import onnxruntime
  except ModuleNotFoundError as error:
    raise ImportError(
      "checking ONNX needs the package onnxruntime: pip install 'kdseg[export]'"
    ) from error
  graph = onnx_graph.export(
    function,
    (model.size, model.size, 3),
    np.uint8,
    input_name=INPUT,
    output_name=OUTPUT,
    metadata={
      key: value if isinstance(value, str) else json.dumps(value)
      for key, value in describe_input(model).items()
    },
  )
  content = graph.SerializeToString()
  session = onnxruntime.InferenceSession(
    content, providers=["CPUExecutionProvider"]
  )
  return content, lambda x: session.run([OUTPUT], {INPUT: x})[0]


def _make_stablehlo(
  model: models.Model, function: Callable[[jax.Array], jax.Array]
) -> tuple[bytes, Callable[[np.ndarray], np.ndarray]]:
  from jax import export as jax_export

  [batch] = jax_export.symbolic_shape("batch")
  shape = jax.ShapeDtypeStruct((batch, model.size, model.size, 3), jnp.uint8)
  exported = jax_export.export(
    jax.jit(function), platforms=("cpu", "cuda", "tpu")
  )(shape)
  try:
    content = bytes(exported.serialize())
  except ModuleNotFoundError as error:
    raise ImportError(
      "writing StableHLO needs the package flatbuffers: "
      "pip install 'kdseg[export]'"
    ) from error
  restored = jax_export.deserialize(bytearray(content))
  return content, lambda x: np.asarray(restored.call(x))


def describe_input(model: models.Model) -> dict[str, Any]:
  """Returns what to do to an image before and after, for preprocess.json."""
  return {
    "input": INPUT,
    "input_layout": "uint8 [batch, height, width, 3], RGB",
    "size": model.size,
    "resize": "to a square, bilinear and antialiased, without cropping",
    "normalisation": "inside the graph",
    "output": OUTPUT,
    "output_layout": "float32 [batch, height, width], probability of lesion",
    "after": "resize the probability to the image's size, bilinear",
    "threshold": model.threshold,
  }


def make_card(
  model: models.Model,
  sizes: Mapping[str, int],
  parity: Mapping[str, Any],
) -> str:
  """Returns the model card: what it is, from what, how large, its limits."""
  about = model.about
  count = networks.count_parameters(model.variables)
  macs = networks.count_macs(model.network, size=model.size)
  lines = [
    f"# {about.get('arm', model.name)}",
    "",
    "Marks the skin lesion on a dermoscopic image, pixel by pixel. **Research "
    "software, not a medical device**: no diagnosis, and no decision about a "
    "person, may rest on it.",
    "",
    "| | |",
    "|---|---|",
    f"| network | {about['network']} |",
    f"| parameters | {count:,} |",
    f"| multiply-accumulates | {macs / 1e6:.1f} M an image of {model.size} x "
    f"{model.size} |",
    f"| trained on | {about.get('trained_on', 'not stated')} |",
    f"| seed | {about.get('seed', 'not stated')} |",
    f"| validation Dice | {_rounded(about.get('validation_dice'))} |",
    f"| threshold | {model.threshold} |",
  ]
  lines += [
    f"| {key} | {about[key]} |"
    for key in ("scores", "protocol")
    if about.get(key)
  ]
  lines += [
    "",
    "| file | bytes | largest difference from JAX |",
    "|---|---:|---:|",
  ]
  lines += [f"| {name} | {size:,} | |" for name, size in sizes.items()]
  lines += [
    f"| {name} | {entry['bytes']:,} | "
    f"{max(entry['largest_difference'].values()):.1e} |"
    for name, entry in parity.items()
  ]
  lines += [
    "",
    "Use: `preprocess.json` says what to do to an image before and after; "
    "`golden.npz` holds inputs with the answers they must give.",
    "",
    "Limits: it knows images like those it was trained on, no others; those of "
    "ISIC-2016 are dermoscopic, of one lesion each, mostly on light skin. Its "
    "probabilities are not calibrated.",
    "",
  ]
  return "\n".join(lines)


def _rounded(value: Any) -> str:
  return f"{value:.4f}" if isinstance(value, float) else "not stated"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = argparse.ArgumentParser(
    prog="python -m kdseg.deploy.export",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("model", metavar="MODEL")
  parser.add_argument("--out", required=True, help="folder for the files")
  options = parser.parse_args(arguments)
  try:
    record = export(models.load(options.model), options.out)
  except (
    ImportError,
    OSError,
    ParityError,
    onnx_graph.UnsupportedError,
    weights.WeightsError,
  ) as error:
    print(f"kdseg: {error}", file=sys.stderr)
    return 1
  for name, entry in record.items():
    if isinstance(entry, dict):
      print(
        f"{name}: {entry['bytes']:,} bytes, at most "
        f"{max(entry['largest_difference'].values()):.1e} from JAX"
      )
  return 0


if __name__ == "__main__":
  sys.exit(main())
