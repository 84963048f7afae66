"""What the tests of the writers of graphs draw, compute and run."""

import collections

from ai_edge_litert import interpreter
from ai_edge_litert import schema_py_generated as schema
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.deploy.formats import litert
from kdseg.deploy.formats import onnx
from kdseg.networks import layers


def draw(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def draw_network(network, side):
  """Draws a network's variables so that each norm changes something."""
  shapes = jax.eval_shape(
    network.init, jax.random.key(0), jnp.zeros((1, side, side, 3))
  )
  generator = np.random.default_rng(1)

  def fill(path, x):
    if path[-1].key == "kernel":
      size = np.sqrt(2.0 / np.prod(x.shape[:-1]))
      return (size * generator.normal(size=x.shape)).astype(np.float32)
    return generator.uniform(0.5, 1.5, x.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(fill, shapes)


def make_case(network, side, answer):
  """Returns (function of uint8, images, its outputs) of drawn weights."""
  variables = draw_network(network, side)

  def apply(variables, x):
    return answer(network.apply(variables, x.astype(jnp.float32) / 255.0))

  image = np.random.default_rng(0).integers(
    0, 256, (2, side, side, 3), np.uint8
  )
  expected = np.asarray(jax.jit(apply)(variables, image))
  return lambda x: apply(variables, x), image, expected


def conv(x, kernel, **options):
  options = {"window_strides": (1, 1), "padding": "SAME"} | options
  return jax.lax.conv_general_dilated(
    x, kernel, dimension_numbers=("NHWC", "HWIO", "NHWC"), **options
  )


def attention(x):
  """Two heads of two channels over the 64 cells of [B, 8, 8, 4]."""
  x = x.reshape(-1, 64, 2, 2)
  shares = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", x, 0.5 * x))
  return jnp.einsum("bhqk,bkhd->bqhd", shares, x)


# What teachers are made of and students are not, of [B, 8, 8, 4].
OPERATIONS_OF_TEACHERS = {
  "weights behind": lambda x: jnp.einsum("bhwc,cd->bhwd", x, draw(4, 5)),
  "weights turned": lambda x: jnp.einsum("bhwc,dc->bhwd", x, draw(5, 4)),
  "weights before": lambda x: jnp.einsum("ih,bhwc->biwc", draw(3, 8), x),
  "weights of two axes": lambda x: jnp.einsum(
    "ijhw,bhwc->bijc", draw(3, 5, 8, 8), x
  ),
  "rows and columns": lambda x: jnp.einsum(
    "ih,jw,bhwc->bijc", draw(3, 8), draw(5, 8), x
  ),
  "attention": attention,
  "layer norm": lambda x: nn.LayerNorm().apply(
    {"params": {"scale": draw(4), "bias": draw(4, seed=1)}}, x
  ),
  "gelu": lambda x: layers.exact_gelu(3.0 * x),
  "upsampled": lambda x: layers.resize_bilinear(x, 18, 11),
  "made smaller": lambda x: layers.resize_bilinear(x, 5, 3),
  "repeated": lambda x: jnp.concatenate(
    [x, jnp.broadcast_to(jnp.mean(x, (1, 2), keepdims=True), x.shape)], -1
  ),
  "repeated twice": lambda x: (
    jnp.broadcast_to(jnp.sum(x, 1, keepdims=True), x.shape)
    + jnp.broadcast_to(jnp.sum(x, 2, keepdims=True), x.shape)
  ),
  "cut": lambda x: x[:, 1:, :3, 1],
  "padded rows": lambda x: jnp.pad(x[..., 0], ((0, 0), (1, 0), (0, 0))),
  "largest": lambda x: jnp.max(x, (1, 3)),
  "stopped": lambda x: jax.lax.stop_gradient(jnp.square(x)) + jnp.exp(x),
  "root": lambda x: jax.lax.rsqrt(1.0 + jnp.square(x)),
}


class Writer:
  """A format's writer, with how to run its graphs and count operators."""

  def make(self, function, shape=(8, 8, 4), dtype=np.float32):
    return self.module.make_model(function, shape, dtype, {})

  def assert_same(self, function, *, atol=1e-5):
    x = draw(3, 8, 8, 4)
    model = self.make(function)
    np.testing.assert_allclose(self.run(model, x), function(x), atol=atol)
    return model


class Onnx(Writer):
  module = onnx

  def run(self, model, x):
    session = onnx.open_session(model.SerializeToString(), 0)
    return session.run(None, {"image": x})[0]

  def kinds(self, model):
    return collections.Counter(node.op_type for node in model.graph.node)


class Litert(Writer):
  module = litert

  def run(self, model, x):
    runner = interpreter.Interpreter(model_content=model, num_threads=1)
    [given] = runner.get_input_details()
    runner.resize_tensor_input(given["index"], x.shape)
    runner.allocate_tensors()
    runner.set_tensor(given["index"], x)
    runner.invoke()
    [output] = runner.get_output_details()
    return runner.get_tensor(output["index"])

  def kinds(self, model):
    names = {
      value: name
      for name, value in vars(schema.BuiltinOperator).items()
      if name.isupper()
    }
    read = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model))
    codes = [names[code.builtinCode] for code in read.operatorCodes]
    operators = read.subgraphs[0].operators
    return collections.Counter(codes[o.opcodeIndex] for o in operators)


WRITERS = (Onnx(), Litert())
