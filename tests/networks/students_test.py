"""What each student promises beyond the contract of all networks."""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.students import enet
from kdseg.networks.students import lite_unet
from kdseg.networks.students import patch_unet


def picture(batch=2, height=64, width=96, seed=0):
  return np.random.default_rng(seed).random(
    (batch, height, width, 3), np.float32
  )


@functools.cache
def make_12k():
  """The smallest student and its initial variables."""
  network = patch_unet.patch_unet_12k()
  image = jnp.zeros((1, 32, 32, 3))
  return network, jax.jit(network.init)(jax.random.key(0), image)


def shapes(network, image):
  return _shapes(network, image.shape)


@functools.cache
def _shapes(network, shape):
  image = jax.ShapeDtypeStruct(shape, jnp.float32)
  return jax.eval_shape(network.init, jax.random.key(0), image)


def count(tree):
  return sum(x.size for x in jax.tree.leaves(tree))


class StudentsTest(chex.TestCase):
  @parameterized.named_parameters(
    ("50k", patch_unet.patch_unet_50k(), 45_000, 50_000),
    ("12k", patch_unet.patch_unet_12k(), 11_000, 12_000),
    # 0.36 M in the paper's table 3.
    ("enet", enet.ENet(), 355_000, 365_000),
    ("lite3", lite_unet.LiteUNet(3), 55_000, 100_000),
    ("lite4", lite_unet.LiteUNet(4), 250_000, 300_000),
    ("lite5", lite_unet.LiteUNet(5), 695_000, 750_000),
  )
  def test_has_as_many_parameters_as_it_says(self, network, least, most):
    params = shapes(network, picture(1, 64, 64))["params"]
    assert least <= count(params) <= most

  @parameterized.named_parameters(
    ("patch_unet", patch_unet.patch_unet_12k()),
    ("enet", enet.ENet()),
    ("lite_unet", lite_unet.LiteUNet(3)),
  )
  def test_no_bias_stands_before_a_norm(self, network):
    params = shapes(network, picture(1, 64, 64))["params"]
    biases = [
      jax.tree_util.keystr(path)
      for path, _ in jax.tree_util.tree_leaves_with_path(params)
      if "bias" in jax.tree_util.keystr(path)
      and "norm" not in jax.tree_util.keystr(path)
    ]
    # Those without a norm: the logit and the projected mean.
    assert biases
    for name in biases:
      assert "head" in name or "whole" in name, name


class PatchUNetTest(chex.TestCase):
  def test_every_parameter_learns(self):
    network, variables = make_12k()
    image = picture(2, 64, 64)

    @jax.jit
    def gradient(variables, image):
      def loss(params):
        out, _ = network.apply(
          {**variables, "params": params}, image, True, mutable=["batch_stats"]
        )
        return jnp.sum(jnp.sin(3 * out["logits"]))

      return jax.grad(loss)(variables["params"])

    for path, leaf in jax.tree_util.tree_leaves_with_path(
      gradient(variables, image)
    ):
      assert np.abs(leaf).max() > 1e-6, jax.tree_util.keystr(path)

  def test_training_moves_statistics_and_evaluation_does_not(self):
    network, variables = make_12k()
    image = picture()
    apply = jax.jit(
      functools.partial(network.apply, mutable=["batch_stats"]),
      static_argnums=2,
    )
    _, trained = apply(variables, image, True)
    _, kept = apply(variables, image, False)
    chex.assert_trees_all_equal(kept["batch_stats"], variables["batch_stats"])
    for before, after in zip(
      jax.tree.leaves(variables["batch_stats"]),
      jax.tree.leaves(trained["batch_stats"]),
    ):
      assert np.abs(before - after).max() > 1e-6

  def test_one_image_is_scored_alone_outside_training(self):
    network, variables = make_12k()
    image = picture(3)
    apply = jax.jit(network.apply)
    whole = apply(variables, image)["logits"]
    alone = apply(variables, image[1:2])["logits"]
    np.testing.assert_allclose(whole[1:2], alone, atol=1e-4)

  def test_a_pixel_is_seen_from_the_whole_image(self):
    network, variables = make_12k()
    image = picture(1, 256, 256)

    # The weights are arguments: as constants, with the one pixel asked for
    # constant too, the compiler would evaluate the whole backward pass itself.
    @jax.jit
    def gradient(image, variables, asked):
      def weighed(image):
        return jnp.sum(network.apply(variables, image)["logits"] * asked)

      return jax.grad(weighed)(image)

    asked = np.zeros((1, 256, 256), np.float32)
    asked[0, -1, -1] = 1
    seen = np.abs(gradient(image, variables, asked)).max(-1)[0]
    assert np.mean(seen > 0) > 0.99

  def test_nothing_is_convolved_at_full_size(self):
    network, variables = make_12k()
    image = jnp.zeros((1, 64, 64, 3))
    jaxpr = str(jax.make_jaxpr(network.apply)(variables, image))
    convolved = [
      line for line in jaxpr.splitlines() if "= conv_general_dilated" in line
    ]
    assert convolved
    for line in convolved:
      assert "64,64," not in line.split("=")[0], line

  def test_mid_grey_is_the_zero_of_its_first_convolution(self):
    # All that a grey image leaves is what the offsets say: with offsets of
    # zero, nothing. Another centring would light up the kernels.
    network, variables = make_12k()
    image = np.full((1, 64, 64, 3), 0.5, np.float32)
    logits = jax.jit(network.apply)(variables, image)["logits"]
    np.testing.assert_allclose(logits, 0, atol=1e-6)

  def test_one_more_depth_is_one_more_residual_convolution(self):
    image = picture(1, 32, 32)
    one = shapes(patch_unet.PatchUNet(), image)["params"]
    two = shapes(patch_unet.PatchUNet(depths=(1, 1, 1, 2)), image)["params"]
    # A 3x3 convolution of 40 channels, scale and offset of its norm.
    assert count(two) - count(one) == 9 * 40 * 40 + 2 * 40

  def test_each_decoder_stage_sees_the_encoder_map_of_its_stride(self):
    network, variables = make_12k()
    image = picture(1, 64, 64)
    apply = jax.jit(network.apply)
    for stride, name in ((4, "decoder_low"), (8, "decoder_high")):
      # Nothing comes from below: what is left is the encoder's.
      params = dict(variables["params"])
      params[f"reduce{stride}"] = jax.tree.map(
        jnp.zeros_like, params[f"reduce{stride}"]
      )
      out = apply({**variables, "params": params}, image)
      assert np.std(out[name]) > 1e-3, name

  def test_context_is_a_projected_mean(self):
    image = picture(1, 32, 32)
    params = shapes(patch_unet.PatchUNet(), image)["params"]["encoder"]
    without = shapes(patch_unet.PatchUNet(context=False), image)["params"]
    assert set(params) - set(without["encoder"]) == {"whole"}


class ENetTest(chex.TestCase):
  def test_prelu_has_one_slope_a_channel(self):
    x = jnp.array([[-2.0, -2.0], [3.0, 3.0]])
    y = enet.PReLU().apply({"params": {"slope": jnp.array([0.5, -1.0])}}, x)
    np.testing.assert_allclose(y, [[-1.0, 2.0], [3.0, 3.0]])

  def test_stages_two_and_three_are_dilated_as_in_the_paper(self):
    image = jnp.zeros((1, 64, 64, 3))
    network = enet.ENet()
    variables = shapes(network, image)
    jaxpr = str(jax.make_jaxpr(network.apply)(variables, image))
    for dilation in (2, 4, 8, 16):
      assert jaxpr.count(f"rhs_dilation=({dilation}, {dilation})") == 2
    params = variables["params"]["encoder"]
    pairs = [name for name, block in params.items() if "rows" in block]
    assert sorted(pairs) == ["stage2_3", "stage2_7", "stage3_3", "stage3_7"]
    assert params["stage2_3"]["rows"]["kernel"].shape == (5, 1, 32, 32)
    assert params["stage2_3"]["columns"]["kernel"].shape == (1, 5, 32, 32)

  def test_dropout_acts_in_training_only(self):
    x = picture(2, 8, 8)
    block = enet.Bottleneck(
      16, lambda **fields: _Identity(), resize="down", drop_rate=0.5
    )
    variables = block.init(jax.random.key(0), x, False)

    def apply(train, seed):
      return block.apply(
        variables, x, train, rngs={"dropout": jax.random.key(seed)}
      )

    np.testing.assert_array_equal(apply(False, 1), apply(False, 2))
    assert np.abs(apply(True, 1) - apply(True, 2)).max() > 0.01


class _Identity:
  def __call__(self, x):
    return x


class LiteUNetTest(chex.TestCase):
  @parameterized.parameters(3, 4, 5)
  def test_the_encoder_has_the_names_of_the_published_weights(self, stages):
    image = picture(1, 32, 32)
    student = shapes(lite_unet.LiteUNet(stages), image)
    encoder = shapes(efficientnet_lite.EfficientNetLite("lite0", stages), image)
    for collection in ("params", "batch_stats"):
      chex.assert_trees_all_equal_shapes(
        dict(student[collection]["encoder"]), dict(encoder[collection])
      )

  @parameterized.parameters(2, 6)
  def test_refuses_other_numbers_of_stages(self, stages):
    with pytest.raises(ValueError, match="stages"):
      shapes(lite_unet.LiteUNet(stages), picture(1, 32, 32))
