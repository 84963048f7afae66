"""Programs as ONNX graphs, run by ONNX Runtime, against JAX."""

import collections

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import onnxruntime
import pytest
from tiny_graph import OPERATIONS_OF_TEACHERS
from tiny_graph import conv
from tiny_graph import draw
from tiny_graph import make_case

from kdseg import networks
from kdseg.deploy.formats import onnx
from kdseg.networks import layers
from kdseg.networks.encoders import vit

SIDE = 32


def make_model(function, shape=(8, 8, 4), dtype=np.float32):
  return onnx.export(function, shape, dtype, input_name="x", output_name="y")


def run(model, x):
  session = onnxruntime.InferenceSession(
    model.SerializeToString(), providers=["CPUExecutionProvider"]
  )
  return session.run(["y"], {"x": x})[0]


def kinds(model):
  return collections.Counter(node.op_type for node in model.graph.node)


def assert_same(function, *, batch=3, shape=(8, 8, 4), atol=1e-5):
  x = draw(batch, *shape)
  model = make_model(function, shape)
  np.testing.assert_allclose(run(model, x), function(x), atol=atol)
  return model


@pytest.mark.parametrize(
  ("kernel", "options"),
  [
    ((3, 3, 4, 5), {}),
    ((1, 1, 4, 5), {}),
    ((3, 5, 4, 5), {}),
    # SAME of stride 2 pads an even side at its end alone.
    ((3, 3, 4, 5), {"window_strides": (2, 2)}),
    ((3, 3, 4, 5), {"rhs_dilation": (2, 2)}),
    ((3, 3, 1, 4), {"feature_group_count": 4}),
  ],
)
def test_convolutions_are_those_of_jax(kernel, options):
  weights = draw(*kernel, seed=1)
  assert_same(lambda x: conv(x, weights, **options))


def test_a_norm_goes_into_the_convolution_before_it():
  kernel, scale, shift = draw(3, 3, 4, 5, seed=1), draw(5, seed=2), draw(5)

  def function(x):
    y = (conv(x, kernel) - shift) * scale / 3.0
    return jax.nn.relu(y + jnp.float32(0.5))

  counted = kinds(assert_same(function))
  assert counted["Conv"] == counted["Relu"] == 1
  assert not set(counted) & {"Mul", "Add", "Sub", "Div"}


def test_what_others_read_too_is_not_changed_by_a_norm():
  kernel, scale = draw(3, 3, 4, 4, seed=1), draw(4, seed=2)

  def function(x):
    y = conv(x, kernel)
    return jax.nn.relu(y) + y * scale

  assert_same(function)


def test_a_norm_that_is_read_before_the_other_reader_is_not_shared():
  kernel, scale = draw(3, 3, 4, 4, seed=1), draw(4, seed=2)

  def function(x):
    y = conv(x, kernel)
    return y * scale + jax.nn.relu(y)

  assert_same(function)


def test_numbers_of_a_place_are_no_numbers_of_a_channel():
  # As many columns as channels: the shift is by column.
  kernel, shift = draw(3, 3, 4, 8, seed=1), draw(8, 1, seed=2)
  assert_same(lambda x: conv(x, kernel) + shift)


def test_between_convolutions_nothing_is_turned():
  one, two = draw(3, 3, 4, 4, seed=1), draw(3, 3, 4, 4, seed=2)
  model = assert_same(
    lambda x: conv(jax.nn.relu(conv(x, one)) + 1.0, two), atol=1e-4
  )
  # Once at the beginning and once at the end.
  assert kinds(model)["Transpose"] == 2


@pytest.mark.parametrize(
  "function",
  [
    lambda x: layers.upsample_2x(x),
    lambda x: layers.upsample(x, 4),
    lambda x: layers.max_pool_2x(x),
    lambda x: layers.mean_pool_2x(x),
    lambda x: layers.space_to_depth(x, 4),
    lambda x: layers.depth_to_space(x, 2),
    lambda x: x + jnp.mean(x, (1, 2), keepdims=True),
    lambda x: jnp.concatenate([x, 2.0 * x], -1),
    lambda x: jnp.pad(x, ((0, 0), (0, 1), (2, 0), (0, 0))),
    lambda x: jnp.where(x >= 0, x, 0.1 * x),
    lambda x: jax.nn.relu6(3.0 * x),
    lambda x: jax.nn.sigmoid(x) * x,
    lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"),
    lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME"),
    lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False),
    lambda x: x / jnp.sum(jnp.ones((8, 8))),
    lambda x: x + jnp.broadcast_to(jnp.arange(4.0), x.shape),
    lambda x: jnp.maximum(x, -x),
    lambda x: 1.0 - x,
    lambda x: 2.0 / (3.0 + x * x),
  ],
)
def test_operations_are_those_of_jax(function):
  assert_same(function)


def assert_network_same(network, answer=lambda out: out["logits"]):
  """A network with drawn weights, uint8 in."""
  function, image, expected = make_case(network, SIDE, answer)
  model = make_model(function, (SIDE, SIDE, 3), np.uint8)
  np.testing.assert_allclose(
    run(model, image), expected, atol=1e-4 * np.abs(expected).max()
  )
  assert expected.std() > 1e-3
  # Only what every runtime has, and no weight that nobody reads.
  assert {node.domain for node in model.graph.node} == {""}
  read = {name for node in model.graph.node for name in node.input}
  assert {tensor.name for tensor in model.graph.initializer} <= read


@pytest.mark.parametrize(
  "name", ["patch_unet_50k", "patch_unet_12k", "enet", "lite_unet"]
)
def test_every_student_computes_the_same(name):
  assert_network_same(networks.make_network(name))


@pytest.mark.parametrize("name", list(OPERATIONS_OF_TEACHERS))
def test_operations_of_teachers_are_those_of_jax(name):
  assert_same(OPERATIONS_OF_TEACHERS[name], atol=1e-4)


@pytest.mark.parametrize("name", ["deeplab", "pspnet"])
def test_every_convolutional_teacher_computes_the_same(name):
  assert_network_same(networks.make_network(name, encoder_variant="lite0"))


def test_a_transformer_computes_the_same():
  network = vit.ViT(
    side=28, depth=2, width=8, heads=2, taps=(1, 2), trained_from=1
  )
  assert_network_same(network, answer=lambda grids: jnp.concatenate(grids, -1))


def test_an_operation_without_a_form_is_named():
  with pytest.raises(onnx.UnsupportedError, match="operation sin"):
    make_model(jnp.sin)


@pytest.mark.parametrize(
  "function",
  [
    lambda x: jax.lax.fori_loop(0, 3, lambda i, v: v * 2, x),
    lambda x: jax.lax.scan(lambda v, _: (v * 2, None), x, length=3)[0],
    lambda x: jnp.concatenate([x, jnp.zeros_like(x)], -1),
    lambda x: x * x.shape[0],
    lambda x: jax.lax.reduce_window(
      x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1),
      ((0, 0), (1, 1), (1, 1), (0, 0)), window_dilation=(1, 2, 2, 1),
    ),
    lambda x: x.astype(jnp.bfloat16) * 2,
  ],
)  # fmt: skip
def test_what_would_be_written_wrongly_is_refused(function):
  with pytest.raises(onnx.UnsupportedError):
    make_model(function)


def test_what_moves_the_batch_is_refused():
  with pytest.raises(onnx.UnsupportedError, match="moves the batch"):
    make_model(lambda x: x.reshape(-1, 4))


def test_layers_are_as_before_after_a_graph_was_written():
  before = jax.default_backend()
  make_model(lambda x: x + 1.0)
  assert jax.default_backend() == before
  with pytest.raises(onnx.UnsupportedError):
    make_model(jnp.sin)
  assert jax.default_backend() == before


def test_the_file_says_what_it_is():
  model = onnx.export(
    lambda x: x + 1.0,
    (8, 8, 3),
    np.float32,
    input_name="a",
    output_name="b",
    metadata={"size": "8"},
  )
  [given], [result] = model.graph.input, model.graph.output
  assert (given.name, result.name) == ("a", "b")
  sides = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
  assert sides == ["batch", 8, 8, 3]
  assert model.metadata_props[0].value == "8"
