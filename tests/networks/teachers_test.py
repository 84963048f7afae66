"""What the convolutional teachers promise beyond the contract of all."""

import functools
import math
import operator

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.networks import layers
from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.encoders import pretrained
from kdseg.networks.teachers import deeplab
from kdseg.networks.teachers import pspnet
from kdseg.networks.teachers import unetpp

TEACHERS = {
  "unetpp": unetpp.UNetPlusPlus,
  "deeplab": deeplab.DeepLabV3Plus,
  "pspnet": pspnet.PSPNet,
}
FIRST, LAST = slice(0, 2), slice(2, 4)
# Of the encoder's maps, by stride.
CHANNELS = {2: 16, 4: 24, 8: 40, 16: 112, 32: 320}


def _see_without_encoder(next_function, args, kwargs, context):
  """Pools and mixes colours in the encoder's place, to compile sooner."""
  module = context.module
  if not isinstance(module, efficientnet_lite.EfficientNetLite):
    return next_function(*args, **kwargs)
  draw = np.random.default_rng(2)
  features = {}
  for stride, channels in CHANNELS.items():
    if stride <= module.output_stride:
      if stride == module.output_stride:
        channels = CHANNELS[32]
      window = (stride, stride)
      pooled = nn.avg_pool(args[0] - 0.5, window, window)
      features[stride] = pooled @ draw.normal(size=(3, channels))
  return features


def _variables(network):
  """Draws in numpy: compiling `init` takes longer than all that is tested."""
  shapes = jax.eval_shape(
    lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
  )
  draw = np.random.default_rng(0)

  def leaf(path, shape):
    name = path[-1].key
    if name in ("scale", "var"):
      return np.ones(shape.shape, np.float32)
    if name in ("bias", "mean"):
      return np.zeros(shape.shape, np.float32)
    deviation = math.sqrt(2 / math.prod(shape.shape[:-1]))
    return draw.normal(scale=deviation, size=shape.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def _image(shape=(2, 64, 64, 3)):
  draw = np.random.default_rng(1)
  coarse = draw.uniform(size=(shape[0], shape[1] // 8, shape[2] // 8, 3))
  return np.repeat(np.repeat(coarse, 8, 1), 8, 2).astype(np.float32)


@functools.cache
def _run_decoder(name):
  """Runs a teacher on features that are no encoder's, once.

  Returns:
    Its outputs of two images and of the same two in the other order; statistics
    before and after a training step, and that step's gradient.
  """
  network = TEACHERS[name]("lite0")

  def loss(params, stats, image):
    out, updated = network.apply(
      {"params": params, "batch_stats": stats},
      image,
      train=True,
      mutable=["batch_stats"],
    )
    return jnp.mean(jnp.square(out["logits"] - 1)), updated["batch_stats"]

  @jax.jit
  def run(variables, image):
    params, before = variables["params"], variables["batch_stats"]
    gradient, after = jax.grad(loss, has_aux=True)(params, before, image)
    both = jnp.concatenate([image, image[::-1]])
    # No rngs, no mutable collection: a draw or an update would be an error.
    out = network.apply(variables, both)
    first, last = (
      jax.tree.map(operator.itemgetter(half), out) for half in (FIRST, LAST)
    )
    return (first, last), (before, after), gradient

  with nn.intercept_methods(_see_without_encoder):
    return run(_variables(network), _image())


@pytest.mark.parametrize("name", TEACHERS)
class TestEveryTeacher:
  def test_decoder_maps_have_few_channels(self, name):
    (out, _), _, _ = _run_decoder(name)
    assert 32 <= out["decoder_low"].shape[-1] <= 64
    assert 32 <= out["decoder_high"].shape[-1] <= 64

  def test_every_decoder_parameter_gets_a_gradient(self, name):
    _, _, gradient = _run_decoder(name)
    dead = [
      jax.tree_util.keystr(path)
      for path, leaf in jax.tree_util.tree_leaves_with_path(gradient)
      if not 1e-7 < np.abs(leaf).max() < 1e4
    ]
    assert not dead

  def test_training_moves_every_statistic_of_the_decoder(self, name):
    _, (before, after), _ = _run_decoder(name)
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), before, after)
    assert all(jax.tree.leaves(moved)), moved

  def test_an_image_is_evaluated_alone(self, name):
    (out, swapped), _, _ = _run_decoder(name)
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b[::-1], atol=1e-4, rtol=1e-3),
      out,
      swapped,
    )
    assert np.abs(out["logits"][0] - out["logits"][1]).max() > 1e-3
    assert np.isfinite(out["logits"]).all()

  @pytest.mark.parametrize("variant", ["lite0", "lite2"])
  def test_the_published_weights_fit(self, name, variant):
    network = TEACHERS[name](variant)
    variables = jax.eval_shape(
      lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    )
    for weights, path in network.published_weights():
      pretrained.insert(variables, weights, path)


class TestUNetPlusPlus:
  def test_node_is_a_1x1_convolution_over_all_maps_upsampled(self):
    draw = np.random.default_rng(2)
    beside = [
      jnp.asarray(draw.normal(size=(1, 4, 6, c)), jnp.float32) for c in (3, 2)
    ]
    below = jnp.asarray(draw.normal(size=(1, 2, 3, 5)), jnp.float32)
    kernels = draw.normal(size=(10, 4)).astype(np.float32)
    centre = np.zeros((3, 3, 4, 4), np.float32)
    centre[1, 1] = np.eye(4)
    params = {
      "mix_beside": {"kernel": kernels[None, None, :5]},
      "mix_below": {"kernel": kernels[None, None, 5:]},
      "conv": {"conv": {"kernel": centre}},
    }
    node = unetpp.Node(4, _identity)
    out = node.apply({"params": params}, beside, below)
    joined = jnp.concatenate([*beside, layers.upsample_2x(below)], -1)
    np.testing.assert_allclose(out, nn.relu(joined @ kernels), atol=1e-5)

  def test_nodes_join_all_earlier_ones_of_their_row(self):
    # Eq. 1 of the paper: node (i, j) takes x^{i,0} ... x^{i,j-1} and the one
    # below, x^{i+1,j-1}. Read off the shapes of the mixing kernels.
    widths = (33, 34, 35, 36)
    network = unetpp.UNetPlusPlus("lite0", widths)
    params = jax.eval_shape(
      lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    )["params"]
    encoder = (16, 24, 40, 112, 320)
    nodes = [(i, j) for j in range(1, 5) for i in range(5 - j)]
    assert {f"node{i}_{j}" for i, j in nodes} == {
      name for name in params if name.startswith("node")
    }
    for i, j in nodes:
      node = params[f"node{i}_{j}"]
      beside = encoder[i] + (j - 1) * widths[i]
      below = encoder[i + 1] if j == 1 else widths[i + 1]
      assert node["mix_beside"]["kernel"].shape[2:] == (beside, widths[i])
      assert node["mix_below"]["kernel"].shape[2:] == (below, widths[i])

  def test_deep_supervision_adds_three_maps_of_full_size(self):
    network = unetpp.UNetPlusPlus("lite0", deep_supervision=True)
    out, variables = jax.eval_shape(
      lambda: network.init_with_output(
        jax.random.key(0), jnp.zeros((2, 32, 64, 3))
      )
    )
    assert [x.shape for x in out["side_logits"]] == [(2, 32, 64)] * 3
    heads = {name for name in variables["params"] if "head" in name}
    assert heads == {"head", "side_head1", "side_head2", "side_head3"}

  def test_other_than_four_widths_are_an_error(self):
    network = unetpp.UNetPlusPlus("lite0", (16, 32, 64))
    with pytest.raises(ValueError, match="widths must be four"):
      jax.eval_shape(
        lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
      )


class TestDeepLabV3Plus:
  @pytest.mark.parametrize(
    ("output_stride", "channels"), [(16, 320), (32, 112)]
  )
  def test_same_parameters_at_either_output_stride(
    self, output_stride, channels
  ):
    network = deeplab.DeepLabV3Plus("lite0", output_stride)
    default = deeplab.DeepLabV3Plus("lite0")
    image = jnp.zeros((1, 64, 64, 3))
    out, variables = jax.eval_shape(
      lambda: network.init_with_output(jax.random.key(0), image)
    )
    expected = jax.eval_shape(lambda: default.init(jax.random.key(0), image))
    assert variables == expected
    assert out["s16"].shape == (1, 4, 4, channels)

  def test_a_rate_reaches_as_far_as_it_says(self):
    block = deeplab.SeparableBlock(1, _identity, dilation=3)
    params = {
      "depthwise": {"kernel": np.ones((3, 3, 1, 1), np.float32)},
      "pointwise": {"conv": {"kernel": np.ones((1, 1, 1, 1), np.float32)}},
    }
    image = np.zeros((1, 9, 9, 1), np.float32)
    image[0, 4, 4] = 1
    out = np.asarray(block.apply({"params": params}, image))[0, :, :, 0]
    assert {tuple(cell) for cell in np.argwhere(out)} == {
      (y, x) for y in (1, 4, 7) for x in (1, 4, 7)
    }

  def test_pyramid_sees_the_whole_image_everywhere(self):
    pyramid = deeplab.AtrousPyramid(2, (), _identity)
    params = {
      "point": {"conv": {"kernel": np.zeros((1, 1, 1, 2), np.float32)}},
      "whole": {
        "kernel": np.float32([1, 2]).reshape(1, 1, 1, 2),
        "bias": np.float32([0, 10]),
      },
    }
    image = np.zeros((1, 4, 4, 1), np.float32)
    image[0, 3, 0] = 8  # Mean of 8 / 16.
    out = pyramid.apply({"params": params}, image)
    np.testing.assert_allclose(out[..., :2], 0)
    np.testing.assert_allclose(out[..., 2], 0.5)
    np.testing.assert_allclose(out[..., 3], 11)


class TestPSPNet:
  @pytest.mark.parametrize("size", [(6, 6), (4, 7), (16, 9), (2, 3)])
  @pytest.mark.parametrize("bins", [1, 2, 3, 6])
  def test_pooling_is_the_mean_of_each_bin(self, size, bins):
    # PyTorch's adaptive_avg_pool2d, as its documentation defines the bins.
    draw = np.random.default_rng(3)
    x = draw.normal(size=(2, *size, 3)).astype(np.float32)
    expected = np.zeros((2, bins, bins, 3))
    for i in range(bins):
      for j in range(bins):
        top, bottom = i * size[0] // bins, math.ceil((i + 1) * size[0] / bins)
        left, right = j * size[1] // bins, math.ceil((j + 1) * size[1] / bins)
        expected[:, i, j] = x[:, top:bottom, left:right].mean((1, 2))
    np.testing.assert_allclose(
      jax.jit(pspnet.adaptive_mean_pool, static_argnums=1)(x, bins),
      expected,
      atol=1e-6,
    )

  def test_pyramid_keeps_the_map_and_appends_one_part_a_grid(self):
    pyramid = pspnet.PyramidPooling(1, (1, 2))
    kernel = np.ones((1, 1, 1, 1), np.float32)
    params = {
      "bins1": {"kernel": kernel, "bias": np.float32([0])},
      "bins2": {"kernel": kernel, "bias": np.float32([0])},
    }
    image = np.zeros((1, 4, 4, 1), np.float32)
    image[:, :2, :2] = 4
    out = np.asarray(jax.jit(pyramid.apply)({"params": params}, image))
    np.testing.assert_allclose(out[..., 0], image[..., 0])
    np.testing.assert_allclose(out[..., 1], 1)
    # The grid of 2 x 2 is (4, 0; 0, 0); its corner cells lie outside all
    # centres and keep their values.
    np.testing.assert_allclose(
      out[0, [0, 0, 3, 3], [0, 3, 0, 3], 2], [4, 0, 0, 0], atol=1e-6
    )


def _identity(name):
  """Stands for a norm that changes nothing and has no variables."""
  return lambda x: x
