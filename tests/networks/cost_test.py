import functools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import pytest

from kdseg.networks import cost
from kdseg.networks import layers


class One(nn.Module):
  """A network of one layer."""

  layer: Any

  def __call__(self, image, train=False):
    return {"logits": self.layer(image)}


class Attend(nn.Module):
  """Mixes 16 cells with each other: a product with a batch axis."""

  @nn.compact
  def __call__(self, x):
    x = nn.Dense(6, use_bias=False)(x.reshape(1, 16, 3)).reshape(1, 16, 2, 3)
    return jnp.einsum("bqhd,bkhd->bhqk", x, x)


@pytest.mark.parametrize(
  ("layer", "size", "expected"),
  [
    # Outputs times what goes into each.
    (layers.Conv(4, 3), 8, 8 * 8 * 4 * (9 * 3)),
    (layers.Conv(4, 3, stride=2), 8, 4 * 4 * 4 * (9 * 3)),
    (layers.Conv(5, 1), 8, 8 * 8 * 5 * 3),
    (nn.Conv(6, (3, 3), feature_group_count=3), 4, 4 * 4 * 6 * 9),
    (nn.Dense(7), 4, 4 * 4 * 7 * 3),
    (Attend(), 4, 16 * 6 * 3 + 2 * 16 * 16 * 3),
  ],
)
def test_by_hand(layer, size, expected):
  assert cost.count_macs(One(layer), size=size) == expected


@pytest.mark.parametrize("implementation", ["cpu", "portable"])
@pytest.mark.parametrize(("kernel", "stride"), [(3, 1), (5, 2)])
def test_a_depthwise_layer_costs_the_same_on_every_backend(
  implementation, kernel, stride
):
  layer = layers.DepthwiseConv(
    kernel, stride=stride, implementation=implementation
  )
  expected = (8 // stride) ** 2 * 3 * kernel**2
  assert cost.count_macs(One(layer), size=8) == expected


class Twice(nn.Module):
  """Two layers inside a function that is compiled by itself."""

  @nn.compact
  def __call__(self, image, train=False):
    inner = nn.jit(lambda module, x: layers.Conv(3, 3)(layers.Conv(3, 3)(x)))
    return {"logits": inner(self, image)}


def test_inner_programs_are_counted():
  assert cost.count_macs(Twice(), size=8) == 2 * 8 * 8 * 3 * 27


def bicubic(x):
  return jax.image.resize(x, (1, 16, 16, x.shape[-1]), "bicubic")


@pytest.mark.parametrize(
  "layer",
  [
    nn.BatchNorm(use_running_average=True),
    nn.relu,
    functools.partial(layers.upsample_2x, implementation="cpu"),
    functools.partial(layers.upsample_2x, implementation="portable"),
    functools.partial(layers.upsample, factor=4, implementation="portable"),
    functools.partial(layers.resize_bilinear, height=12, width=12),
    bicubic,
  ],
)
def test_norms_activations_and_resizing_are_free(layer):
  assert cost.count_macs(One(layer), size=8) == 0


class Named(nn.Module):
  """A layer in a function that has the name of one that resizes."""

  @nn.compact
  def __call__(self, image, train=False):
    def _resize(module, x):
      return layers.Conv(3, 3)(x)

    return {"logits": nn.jit(_resize)(self, image)}


def test_a_convolution_is_counted_whatever_its_function_is_called():
  assert cost.count_macs(Named(), size=8) == 8 * 8 * 3 * 27
