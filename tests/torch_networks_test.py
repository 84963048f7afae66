"""Each twin in PyTorch computes what its network computes."""

import functools
import importlib.util
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg import networks
from kdseg.losses import segmentation

torch = pytest.importorskip("torch")

BENCHMARKS = pathlib.Path(__file__).resolve().parents[1] / "benchmarks"
NAMES = (
  "patch_unet_12k",
  "patch_unet_50k",
  "lite_unet",
  "enet",
  "vit_unet",
  "unetpp",
  "deeplab",
  "pspnet",
)
SIZE, BATCH = 64, 2


@functools.cache
def twins():
  """The module under test, which is no part of a package."""
  path = BENCHMARKS / "torch_networks.py"
  spec = importlib.util.spec_from_file_location("torch_networks", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  return module


def draw(leaf, path, rng):
  """Kernels of unit gain; all else far from what it is initialised to.

  So that a statistic, a slope or a layer's scale that was not copied, or went
  elsewhere, shows in the logits.
  """
  name = path[-1].key
  if name == "kernel":
    gain = np.prod(leaf.shape[:-1]) ** -0.5
    return rng.normal(0, gain, leaf.shape).astype(np.float32)
  if name in ("scale", "var", "slope", "layer_scale1", "layer_scale2"):
    return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)
  return rng.normal(0, 0.2, leaf.shape).astype(np.float32)


@functools.cache
def drawn(name):
  network = networks.make_network(name)
  image = jax.ShapeDtypeStruct((BATCH, SIZE, SIZE, 3), jnp.float32)
  shapes = jax.eval_shape(network.init, jax.random.key(0), image)
  rng = np.random.default_rng(0)
  variables = jax.tree_util.tree_map_with_path(
    lambda path, leaf: draw(leaf, path, rng), shapes
  )
  return network, variables, rng.random(image.shape, np.float32)


def make_twin(name):
  network = twins().TWINS[name]()
  twins().copy_variables(network, drawn(name)[1])
  return network


def to_torch(image):
  return torch.from_numpy(image).permute(0, 3, 1, 2)


def test_every_twin_is_of_a_shipped_network():
  assert set(twins().TWINS) <= set(networks.NETWORKS)
  assert set(twins().TWINS) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_with_the_same_weights_has_the_same_logits(name):
  network, variables, image = drawn(name)
  ours = jax.jit(functools.partial(network.apply, train=False))(
    variables, image
  )["logits"]
  with torch.inference_mode():
    theirs = make_twin(name).eval()(to_torch(image)).numpy()
  spread = float(jnp.std(ours))
  assert spread > 0.02
  np.testing.assert_allclose(theirs, ours, rtol=0, atol=1e-4 * max(1, spread))


@pytest.mark.parametrize("name", NAMES)
def test_a_twin_has_as_many_parameters(name):
  trained = sum(x.size for x in jax.tree.leaves(drawn(name)[1]["params"]))
  twin = twins().TWINS[name]()
  count = sum(x.numel() for x in twin.parameters())
  if name == "vit_unet":
    # It holds the position table at the size of its grid.
    trained -= (37**2 - 18**2) * 384
  assert count == trained


def test_a_twin_in_training_has_the_same_gradients():
  name = "patch_unet_12k"
  network, variables, image = drawn(name)
  labels = (image[..., 0] > 0.5).astype(np.float32)

  @jax.jit
  def gradients(params):
    def loss(params):
      out, _ = network.apply(
        {**variables, "params": params}, image, True, mutable=["batch_stats"]
      )
      return jnp.mean(segmentation.bce(out["logits"], labels))

    return jax.grad(loss)(params)

  twin = make_twin(name).train()
  ours = twins().to_state_dict(twin, gradients(variables["params"]))
  torch.nn.functional.binary_cross_entropy_with_logits(
    twin(to_torch(image)), torch.from_numpy(labels)
  ).backward()
  theirs = {key: x.grad for key, x in twin.named_parameters()}
  assert set(ours) == set(theirs)
  for key, value in theirs.items():
    scale = max(1e-3, float(ours[key].abs().max()))
    np.testing.assert_allclose(
      value, ours[key], rtol=0, atol=1e-4 * scale, err_msg=key
    )
