"""Programs as ONNX and LiteRT graphs, run by their runtimes, against JAX."""

import contextlib
import functools

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_graph
from tiny_graph import conv
from tiny_graph import draw

from kdseg import networks
from kdseg.deploy.formats import jaxpr
from kdseg.networks import layers
from kdseg.networks.encoders import vit

SIDE = 32


@pytest.fixture(
  params=tiny_graph.WRITERS, ids=lambda writer: type(writer).__name__
)
def writer(request):
  return request.param


@pytest.mark.parametrize(
  ("kernel", "options"),
  [
    ((1, 1, 4, 5), {}),
    ((3, 5, 4, 5), {}),
    ((3, 3, 4, 5), {"padding": "VALID"}),
    # SAME of stride 2 pads an even side at its end alone; PyTorch both ends.
    ((3, 3, 4, 5), {"window_strides": (2, 2)}),
    (
      (3, 3, 4, 5),
      {"window_strides": (2, 2), "padding": ((1, 1), (1, 1))},
    ),
    ((3, 3, 4, 5), {"rhs_dilation": (2, 2)}),
    ((3, 3, 1, 4), {"feature_group_count": 4}),
    ((3, 3, 1, 8), {"feature_group_count": 4}),
  ],
)
def test_convolutions_are_those_of_jax(writer, kernel, options):
  weights = draw(*kernel, seed=1)
  writer.assert_same(lambda x: conv(x, weights, **options))


@pytest.mark.parametrize("depthwise", [False, True])
def test_a_norm_goes_into_the_convolution_before_it(writer, depthwise):
  kernel = draw(3, 3, 1 if depthwise else 4, 4, seed=1)
  scale, shift = draw(4, seed=2), draw(4)
  groups = 4 if depthwise else 1

  def function(x):
    y = (conv(x, kernel, feature_group_count=groups) - shift) * scale / 3.0
    return jax.nn.relu(y + jnp.float32(0.5))

  kinds = writer.kinds(writer.assert_same(function))
  assert not {"Mul", "Add", "Sub", "Div"} & {kind.title() for kind in kinds}


@pytest.mark.parametrize(
  "function",
  [
    lambda y, scale: y * scale + jax.nn.relu(y) + y,
    lambda y, scale: jax.nn.relu(y) + y * scale,
    lambda y, scale: jax.nn.relu(y) * scale + 1.0,
  ],
)
def test_a_norm_changes_nothing_that_others_read(writer, function):
  kernel, scale = draw(3, 3, 4, 4, seed=1), draw(4, seed=2)
  writer.assert_same(lambda x: function(conv(x, kernel), scale))


def test_a_number_for_each_column_is_not_taken_for_one_a_channel(writer):
  # As many columns as channels.
  kernel, shift = draw(3, 3, 4, 8, seed=1), draw(8, 1, seed=2)
  writer.assert_same(lambda x: conv(x, kernel) + shift)


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
    lambda x: jnp.mean(x, (1, 2)),
    lambda x: jnp.sum(x, (1, 2)) / 7.0,
    lambda x: jnp.sum(x, 3),
    lambda x: jnp.concatenate([x, 2.0 * x], -1),
    lambda x: jnp.pad(x, ((0, 0), (0, 1), (2, 0), (0, 0))),
    lambda x: jnp.pad(x, ((0, 0), (0, 1), (2, 0), (0, 0)), constant_values=2.0),
    lambda x: jnp.where(x >= 0, x, 0.1 * x),
    lambda x: jax.nn.relu6(3.0 * x),
    lambda x: jax.nn.sigmoid(x) * x,
    lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"),
    lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    lambda x: x / jnp.sum(jnp.ones((8, 8))),
    lambda x: x + jnp.broadcast_to(jnp.arange(4.0), x.shape),
    lambda x: jnp.maximum(x, -x),
    lambda x: 1.0 - x,
    lambda x: 2.0 / (3.0 + x * x),
    # Not a fold of pixels into channels, though it looks like the start of one.
    lambda x: x.reshape(-1, 4, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4, 5),
    lambda x: (
      x.reshape(-1, 4, 2, 4, 2, 4)
      .transpose(0, 1, 3, 2, 4, 5)
      .reshape(-1, 16, 4, 4)
    ),
    lambda x: jax.checkpoint(lambda y: jnp.exp(y) + 1.0)(x),
    *tiny_graph.OPERATIONS_OF_TEACHERS.values(),
  ],
)
def test_operations_are_those_of_jax(writer, function):
  writer.assert_same(function, atol=2e-5)


NETWORKS = {
  **{name: {} for name in networks.STUDENTS if name != "patch_unet"},
  "deeplab": {"encoder_variant": "lite0"},
  "pspnet": {"encoder_variant": "lite0"},
}


@functools.cache
def case(name):
  if name == "vit":
    network = vit.ViT(
      side=28, depth=2, width=8, heads=2, taps=(1, 2), trained_from=1
    )
    return tiny_graph.make_case(
      network, SIDE, lambda grids: jnp.concatenate(grids, -1)
    )
  network = networks.make_network(name, **NETWORKS[name])
  return tiny_graph.make_case(network, SIDE, lambda out: out["logits"])


@pytest.mark.parametrize("name", [*NETWORKS, "vit"])
def test_every_network_computes_the_same(name, writer):
  function, image, expected = case(name)
  model = writer.make(function, (SIDE, SIDE, 3), np.uint8)
  np.testing.assert_allclose(
    writer.run(model, image), expected, atol=1e-4 * np.abs(expected).max()
  )
  assert expected.std() > 1e-3
  assert not {"CUSTOM", "DELEGATE"} & set(writer.kinds(model))


@pytest.mark.parametrize(
  ("function", "said"),
  [
    (lambda x: jnp.sin(x), "operation sin, which cannot be written as"),
    (lambda x: x.reshape(-1, 4), "moves the batch"),
    (lambda x: x / x.shape[0], "batch's size"),
    (lambda x: jax.lax.fori_loop(0, 3, lambda i, v: v * 2, x), "scan"),
    (lambda x: jax.lax.scan(lambda v, _: (v * 2, 0), x, length=3)[0], "scan"),
    (lambda x: jnp.concatenate([x, jnp.zeros_like(x)], -1), "constant as long"),
    (
      lambda x: jax.lax.reduce_window(
        x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 1, 1, 1),
        ((0, 0), (1, 1), (1, 1), (0, 0)), window_dilation=(1, 2, 2, 1),
      ),
      "pooling over",
    ),
  ],
)  # fmt: skip
def test_what_cannot_be_written_is_named(writer, function, said):
  with pytest.raises(jaxpr.UnsupportedError, match=said):
    writer.make(function)


def test_layers_use_the_cpu_again_after_a_graph_was_written(writer):
  before = jax.default_backend()
  for function in (lambda x: x + 1.0, jnp.sin):
    with contextlib.suppress(jaxpr.UnsupportedError):
      writer.make(function)
    assert jax.default_backend() == before


def test_a_value_that_repeats_is_repeated_where_it_has_to_be(writer):
  def function(x):
    mean = jnp.broadcast_to(jnp.mean(x, (1, 2), keepdims=True), x.shape)
    return jnp.concatenate([x, 2.0 * mean, jnp.exp(mean)], -1)

  writer.assert_same(function)


def test_an_input_of_another_type_is_moved_before_it_is_a_number(writer):
  def function(x):
    return jnp.transpose(x, (0, 2, 1, 3))[:, 1:].astype(jnp.float32)

  image = np.random.default_rng(0).integers(0, 256, (2, 8, 8, 4), np.uint8)
  model = writer.make(function, (8, 8, 4), np.uint8)
  np.testing.assert_array_equal(writer.run(model, image), function(image))
