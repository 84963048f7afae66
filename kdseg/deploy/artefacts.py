"""Runs what `kdseg.deploy.export` wrote: ONNX, LiteRT and StableHLO files.

Each by its own runtime, which computes the file and nothing else of this
package: a score of an artefact is a score of what ships.
"""

from collections.abc import Callable
from collections.abc import Sequence
import dataclasses
import json
import os
import pathlib
from typing import Any

import numpy as np

from kdseg.deploy import segmenter
from kdseg.deploy import weights

INPUT, OUTPUT = "image", "probability"
SUFFIXES = (".onnx", ".tflite", ".stablehlo")

Run = Callable[[np.ndarray], np.ndarray]


@dataclasses.dataclass(frozen=True)
class Artefact(segmenter.Segmenter):
  """A network as a file of another runtime.

  Attributes:
    run: [B, S, S, 3] uint8 to [B, S, S] float32.
  """

  run: Run

  def probabilities(self, batch: np.ndarray) -> np.ndarray:
    """See the base class."""
    return self.run(batch)


def load(path: str | os.PathLike[str], *, threads: int = 0) -> Artefact:
  """Opens a file that `kdseg.deploy.export` wrote.

  Args:
    path: with one of `SUFFIXES`.
    threads: of the runtime; 0 for its own choice. StableHLO has no say in it.

  Raises:
    ImportError: if its runtime is not installed; names the extra.
    WeightsError: if it is no such file, or damaged.
  """
  path = pathlib.Path(path)
  if path.suffix not in SUFFIXES:
    raise weights.WeightsError(
      f"{path} is none of the forms {', '.join(SUFFIXES)}"
    )
  try:
    content = path.read_bytes()
    run, size, about = open_content(path.name, content, threads=threads)
    beside = path.with_name("preprocess.json")
    if not about and beside.exists():
      # StableHLO has no room for it.
      about = json.loads(beside.read_text(encoding="utf-8"))
  except ImportError:
    raise
  # Each runtime has errors of its own, some of them bare RuntimeErrors.
  except Exception as error:
    raise weights.WeightsError(
      f"{path} cannot be opened: {str(error).splitlines()[0]}"
    ) from error
  return Artefact(
    name=path.name,
    size=size,
    threshold=float(about.get("threshold", 0.5)),
    about=about,
    run=run,
  )


def open_content(
  name: str, content: bytes, *, threads: int = 0
) -> tuple[Run, int, dict[str, Any]]:
  """Returns how to run a file, its side, and what it says of itself.

  Args:
    name: of the file, with one of `SUFFIXES`.
    content: of the file.
    threads: see `load`.

  Raises:
    ImportError: if its runtime is not installed; names the extra.
  """
  make = {".onnx": run_onnx, ".tflite": run_litert, ".stablehlo": run_stablehlo}
  return make[pathlib.Path(name).suffix](content, threads)


def run_onnx(content: bytes, threads: int) -> tuple[Run, int, dict[str, Any]]:
  """Returns how to run an ONNX file, its side, and what it says of itself.

  Raises:
    ImportError: without ONNX Runtime.
  """
  session = open_onnx(content, threads)
  [given] = session.get_inputs()
  answers = [answer.name for answer in session.get_outputs()]
  _check_form(given.type == "tensor(uint8)", given.shape, OUTPUT in answers)
  about = session.get_modelmeta().custom_metadata_map
  return (
    lambda batch: session.run([OUTPUT], {given.name: batch})[0],
    int(given.shape[1]),
    dict(about),
  )


def open_onnx(content: bytes, threads: int) -> Any:
  """Returns a session of ONNX Runtime on the CPU.

  Args:
    content: of the file.
    threads: 0 for the runtime's own choice.

  Raises:
    ImportError: without ONNX Runtime.
  """
  try:
    import onnxruntime
  except ModuleNotFoundError as error:
    raise ImportError(
      "running ONNX needs the package onnxruntime: pip install 'kdseg[export]'"
    ) from error
  options = onnxruntime.SessionOptions()
  options.intra_op_num_threads = threads
  return onnxruntime.InferenceSession(
    content, options, providers=["CPUExecutionProvider"]
  )


def _check_form(is_uint8: bool, shape: Sequence[Any], answers: bool) -> None:
  square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
  if not (is_uint8 and square and answers):
    raise ValueError(
      "it is no file of kdseg.deploy.export, which takes uint8 [B, S, S, 3] "
      f'and gives "{OUTPUT}"'
    )


def run_litert(content: bytes, threads: int) -> tuple[Run, int, dict[str, Any]]:
  """Returns how to run a LiteRT file, its side, and what it says of itself.

  Raises:
    ImportError: without LiteRT.
  """
  try:
    from ai_edge_litert import interpreter as litert
    from ai_edge_litert import schema_py_generated as schema
  except ModuleNotFoundError as error:
    raise ImportError(
      "running LiteRT needs the package ai-edge-litert: pip install "
      "'kdseg[litert]'"
    ) from error
  description = schema.Model.GetRootAs(content).Description() or b"{}"
  runner = litert.Interpreter(
    model_content=content, num_threads=threads or os.cpu_count()
  )
  [given], [answer] = runner.get_input_details(), runner.get_output_details()
  _check_form(given["dtype"] is np.uint8, given["shape"], True)
  size = int(given["shape"][1])
  ready = 0

  def run(batch: np.ndarray) -> np.ndarray:
    nonlocal ready
    if len(batch) != ready:
      runner.resize_tensor_input(given["index"], batch.shape)
      runner.allocate_tensors()
      ready = len(batch)
    runner.set_tensor(given["index"], batch)
    runner.invoke()
    return runner.get_tensor(answer["index"])

  return run, size, json.loads(description)


def run_stablehlo(
  content: bytes, threads: int
) -> tuple[Run, int, dict[str, Any]]:
  """Returns how to run a StableHLO file, its side, and nothing more.

  Raises:
    ImportError: without flatbuffers.
  """
  del threads
  from jax import export as jax_export

  try:
    restored = jax_export.deserialize(bytearray(content))
  except ModuleNotFoundError as error:
    raise ImportError(
      "reading StableHLO needs the package flatbuffers: "
      "pip install 'kdseg[export]'"
    ) from error
  [given] = restored.in_avals
  return (
    lambda batch: np.asarray(restored.call(batch)),
    int(given.shape[1]),
    {},
  )
