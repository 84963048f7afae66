"""Writes a trained network in the forms that run elsewhere, and checks them.

  kdseg export MODEL --out DIR [--forms onnx litert stablehlo]
      [--calibration IMAGES...]
  kdseg export WORKDIR --arm NAME [--seed 0] --out DIR

MODEL is a shipped model, a file of weights or the folder of an arm. Into DIR go

  weights.safetensors   this package
  model.onnx            ONNX Runtime, also in a browser; extra `export`
  model.tflite          LiteRT, for phones; extra `litert`
  model.int8.onnx, model.int8.tflite
                        the same with weights of 8 bits
  model.stablehlo       JAX on CPU, GPU and TPU; extra `export`
  preprocess.json       what to do to an image before and after
  golden.npz            inputs and the answers they must give
  PARITY.json           how far each form is from JAX
  README.md             its model card

Input is uint8 [batch, S, S, 3], RGB; output the probability of lesion, float32
[batch, S, S]. Normalisation is inside the graph. A form that strays by more
than 1e-4 is not written: the command stops and names it. int8 forms stray
more; how far, and whether they are smaller and faster here, is said.
`kdseg score DIR` tells what each form scores on a data set.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
import json
import pathlib
import sys
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kdseg import networks
from kdseg.data import archives
from kdseg.data import loading
from kdseg.data import sets
from kdseg.data.sets import synthetic
from kdseg.deploy import artefacts
from kdseg.deploy import models
from kdseg.deploy import pictures
from kdseg.deploy import weights
from kdseg.deploy.formats import int8 as int8_lib
from kdseg.deploy.formats import jaxpr
from kdseg.deploy.formats import litert
from kdseg.deploy.formats import onnx
from kdseg.runtime import checkpoint
from kdseg.runtime import commands
from kdseg.runtime import files
from kdseg.runtime import names as names_lib
from kdseg.training import step as step_lib

TOLERANCE = 1e-4
INPUT, OUTPUT = artefacts.INPUT, artefacts.OUTPUT
FORMS = ("onnx", "litert", "stablehlo")
# fp32 form of each int8 one.
INT8 = {
  "model.int8.onnx": "model.onnx",
  "model.int8.tflite": "model.tflite",
}
# What an earlier export, and the scores of its forms, may have left.
_REPLACED = (
  "PARITY.json", "SCORES.json", "SCORES.md", "scores.csv", "model.stablehlo",
  *INT8, *INT8.values(),
)  # fmt: skip
# What every export writes, and what tells one from other folders.
_WRITTEN = ("weights.safetensors", "golden.npz", "README.md")
_MARKS = ("PARITY.json", "preprocess.json")
_GOLDEN = 4
_RANDOM = 4
_TIMED = 30


class PlaceError(RuntimeError):
  """An export would take the place of somebody's files."""


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


def export(
  model: models.Model,
  out: str | pathlib.Path,
  *,
  forms: Sequence[str] = FORMS,
  calibration: np.ndarray | None = None,
  force: bool = False,
) -> dict[str, Any]:
  """Writes every form of a network and the proof that they agree.

  Args:
    model: from `models.load_weights`.
    out: folder; files of these names in it are replaced; those of forms that
      are left out, and scores of earlier ones, are deleted.
    forms: of `FORMS`.
    calibration: [N, S, S, 3] uint8, which the ranges of the int8 ONNX file
      are measured on; drawn lesions if None.
    force: also where these names are files of something else than an export.

  Returns:
    What PARITY.json says: by form its bytes, its largest distance from JAX
    over golden and random inputs, and its milliseconds for one image on one
    thread; for an int8 form also the share of pixels of the golden images that
    change sides.

  Raises:
    ImportError: if a converter is not installed; names the extra.
    ParityError: if a form is further than 1e-4 from JAX, and so not written.
    PlaceError: if files of something else are in the way.
    UnsupportedError: if the network has an operation that a form lacks.
    ValueError: on an unknown form.
    WriteError: if the disk is full or may not be written to; an earlier export
      stays as it is.
  """
  out = pathlib.Path(out)
  names_lib.check_known("form", forms, FORMS)
  if not force:
    _check_place(out)
  inputs = make_inputs(model.size)
  expected = {name: model.probabilities(x) for name, x in inputs.items()}
  contents = make_forms(
    model, forms, inputs["golden"] if calibration is None else calibration
  )
  parity: dict[str, Any] = {}
  for name, content in contents.items():
    parity[name] = _measure(name, content, inputs, expected, model.threshold)
    distance = max(parity[name]["largest_difference"].values())
    # Also when it is not a number.
    if name not in INT8 and not distance <= TOLERANCE:
      raise ParityError(
        f"{name} is {distance:.2g} away from JAX in probability, more than "
        f"{TOLERANCE:g}; nothing is written"
      )

  about = {k: v for k, v in model.about.items() if k != "format"}
  record = {
    "tolerance": TOLERANCE,
    "against": f"jax {jax.__version__}",
    "calibration": "drawn lesions" if calibration is None else "given images",
    **parity,
  }
  # All of it under other names first, and the proof last: nothing new may
  # stand beside something old.
  with files.writing(out), _scratch_in(out) as folder:
    for name, content in contents.items():
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
    for stale in _REPLACED:
      (out / stale).unlink(missing_ok=True)
    for path in sorted(folder.iterdir(), key=lambda p: p.name == "PARITY.json"):
      path.replace(out / path.name)
  return record


def _check_place(out: pathlib.Path) -> None:
  """Refuses a folder in which something else would be replaced or deleted."""
  if any((out / name).exists() for name in _MARKS):
    return
  names = (*_REPLACED, *_WRITTEN)
  taken = sorted(name for name in names if (out / name).exists())
  if taken:
    raise PlaceError(
      f"{out} holds {', '.join(taken)} and is no export; name another folder, "
      "or add --force to replace them"
    )


@contextlib.contextmanager
def _scratch_in(out: pathlib.Path) -> Iterator[pathlib.Path]:
  out.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=out) as scratch:
    yield pathlib.Path(scratch)


def make_forms(
  model: models.Model,
  forms: Sequence[str],
  calibration: np.ndarray,
  *,
  int8: bool = True,
) -> dict[str, bytes]:
  """Returns the files of the forms by name, not checked.

  Args:
    model: the network.
    forms: of `FORMS`.
    calibration: see `export`.
    int8: whether those with weights of 8 bits are among them.

  Raises:
    ImportError: if a converter is not installed; names the extra.
    UnsupportedError: if the network has an operation that a form lacks.
  """
  function = make_function(model)
  contents = {}
  if "onnx" in forms:
    content = _make_onnx(model, function)
    contents["model.onnx"] = content
    if int8:
      contents["model.int8.onnx"] = int8_lib.quantize_onnx(content, calibration)
  if "litert" in forms:
    content = litert.export(
      function,
      (model.size, model.size, 3),
      np.uint8,
      input_name=INPUT,
      output_name=OUTPUT,
      description=json.dumps(describe_input(model)),
    )
    contents["model.tflite"] = content
    if int8:
      contents["model.int8.tflite"] = int8_lib.quantize_litert(content)
  if "stablehlo" in forms:
    contents["model.stablehlo"] = _make_stablehlo(model, function)
  return contents


def _measure(
  name: str,
  content: bytes,
  inputs: Mapping[str, np.ndarray],
  expected: Mapping[str, np.ndarray],
  threshold: float,
) -> dict[str, Any]:
  """Returns the entry of a form in PARITY.json."""
  run, _, _ = artefacts.open_content(name, content, threads=1)
  answers = {kind: run(x) for kind, x in inputs.items()}
  entry: dict[str, Any] = {
    "bytes": len(content),
    "largest_difference": {
      kind: float(np.abs(answer - expected[kind]).max())
      for kind, answer in answers.items()
    },
  }
  if name in INT8:
    before, after = (x["golden"] > threshold for x in (expected, answers))
    changed = before != after
    entry["changed_pixels"] = float(np.mean(changed))
  one = inputs["golden"][:1]
  run(one)
  taken = []
  for _ in range(_TIMED):
    began = time.perf_counter()
    run(one)
    taken.append(time.perf_counter() - began)
  # Not the median: other work on the machine only ever adds.
  entry["milliseconds"] = 1e3 * min(taken)
  return entry


def _make_onnx(
  model: models.Model, function: Callable[[jax.Array], jax.Array]
) -> bytes:
  graph = onnx.export(
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
  return graph.SerializeToString()


def _make_stablehlo(
  model: models.Model, function: Callable[[jax.Array], jax.Array]
) -> bytes:
  from jax import export as jax_export

  [batch] = jax_export.symbolic_shape("batch")
  shape = jax.ShapeDtypeStruct((batch, model.size, model.size, 3), jnp.uint8)
  # Of the sources, what a network is made of, and not where they lie here.
  with _no_folders():
    exported = jax_export.export(
      jax.jit(function), platforms=("cpu", "cuda", "tpu")
    )(shape)
  try:
    return bytes(exported.serialize())
  except ModuleNotFoundError as error:
    raise ImportError(
      "writing StableHLO needs the package flatbuffers: "
      "pip install 'kdseg[export]'"
    ) from error


@contextlib.contextmanager
def _no_folders() -> Iterator[None]:
  """Leaves the folders of source files out of what is traced."""
  name = "jax_hlo_source_file_canonicalization_regex"
  before = getattr(jax.config, name)
  jax.config.update(name, ".*/")
  try:
    yield
  finally:
    jax.config.update(name, before)


def describe_int8(name: str, parity: Mapping[str, Any]) -> str:
  """Says in words what an int8 form gains and loses against its fp32 form."""
  entry, full = parity[name], parity[INT8[name]]
  size = entry["bytes"] / full["bytes"]
  pace = entry["milliseconds"] / full["milliseconds"]
  # Two runs of one file differ by a tenth.
  speed = "as fast as it"
  if pace < 0.9:
    speed = "faster"
  elif pace > 1.1:
    speed = "slower"
  return (
    f"{'smaller' if size < 1 else 'no smaller'} and {speed} here, with "
    f"{size:.0%} of the bytes of {INT8[name]} and {pace:.2f} times its "
    f"milliseconds; {entry['changed_pixels']:.2%} of the golden images' pixels "
    "change sides"
  )


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
    "person, may rest on it. Made for comparing methods and for building on.",
    "",
    "| | |",
    "|---|---|",
    f"| network | {about['network']} |",
    f"| parameters | {count:,} |",
    f"| multiply-accumulates | {macs / 1e6:.1f} M an image of {model.size} x "
    f"{model.size} |",
    f"| trained on | {_trained_on(about)} |",
    f"| seed | {about.get('seed', 'not stated')} |",
    f"| validation Dice | {_rounded(about.get('validation_dice'))} |",
    f"| threshold | {model.threshold} |",
  ]
  lines += [
    f"| {key} | {about[key]} |"
    for key in ("scores", "protocol")
    if about.get(key)
  ]
  if about.get("scores"):
    lines += [
      "",
      "Scores are means over images, in brackets their 95 % intervals "
      "(Student's t over images: of this one network, not of others trained "
      "alike).",
    ]
  lines += [
    "",
    "| file | bytes | largest difference from JAX | ms, one thread |",
    "|---|---:|---:|---:|",
  ]
  lines += [f"| {name} | {size:,} | | |" for name, size in sizes.items()]
  lines += [
    f"| {name} | {entry['bytes']:,} | "
    f"{max(entry['largest_difference'].values()):.1e} | "
    f"{entry['milliseconds']:.1f} |"
    for name, entry in parity.items()
  ]
  lines += [
    f"\n{name}: {describe_int8(name, parity)}."
    for name in INT8
    if name in parity
  ]
  lines += [
    "",
    "Milliseconds are the fastest of thirty runs for one image, on the machine "
    "that wrote this. "
    "`preprocess.json` says what to do to an image before and after; "
    "`golden.npz` holds inputs with the answers they must give.",
    "",
    "Limits: it knows images like those it was trained on, no others; those of "
    "ISIC-2016 are dermoscopic, of one lesion each, mostly on light skin. Its "
    "probabilities are not calibrated.",
    "",
  ]
  return "\n".join(lines)


def _trained_on(about: Mapping[str, Any]) -> str:
  name = about.get("trained_on")
  if name not in sets.BUILDERS:
    return name or "not stated"
  return f"{sets.BUILDERS[name].title}, {sets.BUILDERS[name].terms_of_use}"


def _rounded(value: Any) -> str:
  return f"{value:.4f}" if isinstance(value, float) else "not stated"


def main(arguments: Sequence[str] | None = None) -> int:
  """Runs the command line; returns its exit code."""
  parser = commands.Parser("export", __doc__)
  parser.add_argument("model", metavar="MODEL")
  parser.add_argument("--arm", help="of the workdir MODEL, as in scores.csv")
  parser.add_argument("--seed", type=int, default=0, help="of the arm")
  parser.add_argument("--out", required=True, help="folder for the files")
  parser.add_argument(
    "--forms", nargs="+", choices=FORMS, default=FORMS, help="all if unset"
  )
  parser.add_argument(
    "--calibration",
    nargs="+",
    metavar="IMAGES",
    help="what int8 ranges are measured on; drawn lesions if unset",
  )
  parser.add_argument(
    "--force", action="store_true", help="replace files of something else"
  )
  options = parser.parse_args(arguments)
  try:
    name = options.model
    if options.arm:
      name = weights.arm_folder(options.model, options.arm, options.seed)
      weights.check_finished(name)
    model = models.load_weights(name)
    images = None
    if options.calibration:
      images = np.stack(
        [
          loading.resize_image(pictures.read(path), model.size)
          for path in pictures.find(options.calibration)
        ]
      )
    parity = export(
      model,
      options.out,
      forms=options.forms,
      calibration=images,
      force=options.force,
    )
  except (
    ImportError,
    OSError,
    ParityError,
    PlaceError,
    archives.DataError,
    jaxpr.UnsupportedError,
    weights.WeightsError,
  ) as error:
    print(f"kdseg: {error}", file=sys.stderr)
    return 1
  for name, entry in parity.items():
    if isinstance(entry, dict):
      print(
        f"{name}: {entry['bytes']:,} bytes, at most "
        f"{max(entry['largest_difference'].values()):.1e} from JAX, "
        f"{entry['milliseconds']:.1f} ms"
      )
  for name in INT8:
    if name in parity:
      print(f"{name}: {describe_int8(name, parity)}")
  return 0


if __name__ == "__main__":
  sys.exit(main())
