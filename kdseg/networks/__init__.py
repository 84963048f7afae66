"""Teachers and students: pure Flax modules with one contract.

`network.apply(variables, image, train=...)` maps `image`, [B, H, W, 3] float
RGB in [0, 1] with sides divisible by 32, to a dict; each network normalises
the image by itself, so that a teacher and a student can share a batch.

  logits        [B, H, W] float32; lesion where above 0
  low           [B, H/4, W/4, C]   features of the encoder at stride 4,
  high          [B, H/8, W/8, C]   at stride 8
  s16           [B, H/16, W/16, C] and at stride 16
  decoder_low   [B, H/4, W/4, C]   features of the decoder at stride 4
  decoder_high  [B, H/8, W/8, C]   and at stride 8

Fields `dtype` (of the computation) and `axis_name` (over which BatchNorm
shares its statistics) are common to all. `networks_test` holds every network
to this.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.networks.cost import count_macs as count_macs
from kdseg.networks.encoders import pretrained
from kdseg.networks.encoders import vit_weights
from kdseg.networks.students import enet
from kdseg.networks.students import lite_unet
from kdseg.networks.students import patch_unet
from kdseg.networks.teachers import deeplab
from kdseg.networks.teachers import pspnet
from kdseg.networks.teachers import unetpp
from kdseg.networks.teachers import vit_unet
from kdseg.runtime import names

TEACHERS: Mapping[str, Callable[..., nn.Module]] = {
  "vit_unet": vit_unet.ViTUNet,
  "unetpp": unetpp.UNetPlusPlus,
  "deeplab": deeplab.DeepLabV3Plus,
  "pspnet": pspnet.PSPNet,
}
STUDENTS: Mapping[str, Callable[..., nn.Module]] = {
  "patch_unet": patch_unet.PatchUNet,
  "patch_unet_50k": patch_unet.patch_unet_50k,
  "patch_unet_12k": patch_unet.patch_unet_12k,
  "enet": enet.ENet,
  "lite_unet": lite_unet.LiteUNet,
}
NETWORKS: Mapping[str, Callable[..., nn.Module]] = {**TEACHERS, **STUDENTS}

TAPS = ("low", "high", "s16", "decoder_low", "decoder_high")


def make_network(name: str, **options: Any) -> nn.Module:
  """Returns the network of that name.

  Args:
    name: a key of `NETWORKS`.
    **options: fields of the module; a list becomes a tuple, and `dtype` can
      be given by its name.

  Raises:
    ValueError: on an unknown name or option, with the nearest known one.
  """
  names.check_known("network", [name], NETWORKS)
  fields = {
    key: tuple(value) if isinstance(value, list) else value
    for key, value in options.items()
  }
  try:
    if isinstance(fields.get("dtype"), str):
      fields["dtype"] = jnp.dtype(fields["dtype"])
    return NETWORKS[name](**fields)
  except TypeError as error:
    raise ValueError(f'options of network "{name}": {error}') from error


def make_variables(
  network: nn.Module, rng: jax.Array, *, size: int, weights: bool = True
) -> dict[str, Any]:
  """Returns initial variables, encoders with ImageNet weights where they exist.

  Args:
    network: from `make_network`.
    rng: one key.
    size: side of the images in pixels; parameters don't depend on it.
    weights: whether to read published encoder weights; without, every
      parameter is drawn.

  Raises:
    ImportError: if published weights are wanted and not installed.
  """
  variables = make_initializer(network, size=size, weights=weights)(rng)
  return jax.tree.map(jnp.asarray, jax.device_get(variables))


def make_initializer(
  network: nn.Module, *, size: int, weights: bool = True
) -> Callable[[jax.Array], dict[str, Any]]:
  """Returns rng -> initial variables; compiled, and weights read, once.

  Args:
    network: from `make_network`.
    size: side of the images in pixels; parameters don't depend on it.
    weights: whether to read published encoder weights.

  Raises:
    ImportError: if published weights are wanted and not installed.
  """
  image = np.zeros((1, size, size, 3), np.float32)
  draw = on_processor(lambda rng: network.init(rng, image))
  published = list(_published(network)) if weights else []

  def initialize(rng: jax.Array) -> dict[str, Any]:
    variables = dict(draw(rng))
    for tree, path in published:
      variables = pretrained.insert(variables, tree, path)
    return variables

  return initialize


def on_processor(function: Callable[..., Any]) -> Callable[..., Any]:
  """Compiles what is run once, on next to no data, for the host's processor.

  It is not worth optimising, which takes the CPU backend twenty seconds even
  for a small network, and the compiler of a GPU as long.
  """
  device = processor()
  options = {"xla_backend_optimization_level": 0} if device else {}
  compiled = jax.jit(function, compiler_options=options)

  def call(*arguments: Any) -> Any:
    with jax.default_device(device):
      return compiled(*arguments)

  return call


def processor() -> jax.Device | None:
  """Returns the host's processor, or None where JAX has it as no device."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX was told to use other devices alone.
    return None


def _published(
  network: nn.Module,
) -> Iterator[tuple[Mapping[str, Any], tuple[str, ...]]]:
  """Yields published weights, and where in the parameters they belong."""
  if isinstance(network, vit_unet.ViTUNet):
    yield vit_weights.load_vit_small(blocks=max(network.taps)), ("encoder",)
    if network.branch != "conv":
      lite = pretrained.load_efficientnet_lite(network.branch)
      yield lite, ("decoder", "encoder")
  elif isinstance(network, lite_unet.LiteUNet):
    yield (
      pretrained.load_efficientnet_lite("lite0", network.stages),
      ("encoder",),
    )
  elif isinstance(network, CONVOLUTIONAL_TEACHERS):
    yield (
      pretrained.load_efficientnet_lite(network.encoder_variant),
      ("encoder",),
    )


CONVOLUTIONAL_TEACHERS = (
  unetpp.UNetPlusPlus,
  deeplab.DeepLabV3Plus,
  pspnet.PSPNet,
)


def count_parameters(variables: Mapping[str, Any]) -> int:
  """Returns the number of trained parameters."""
  return sum(x.size for x in jax.tree.leaves(variables["params"]))
