"""Export formats. To add one, write its module and one record below."""

from kdseg.deploy.formats import int8
from kdseg.deploy.formats import litert
from kdseg.deploy.formats import onnx
from kdseg.deploy.formats import stablehlo
from kdseg.deploy.formats.record import Format

FORMATS = (
  Format(
    "onnx", ".onnx", "export", onnx.write, onnx.open_file, int8.quantize_onnx
  ),
  Format(
    "litert",
    ".tflite",
    "litert",
    litert.write,
    litert.open_file,
    int8.quantize_litert,
  ),
  Format(
    "stablehlo", ".stablehlo", "export", stablehlo.write, stablehlo.open_file
  ),
)
