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
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg import choices
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
  choices.check_known("network", [name], NETWORKS)
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
  image = jnp.zeros((1, size, size, 3), jnp.float32)
  # Run once, on next to no data: not worth optimising, which takes the CPU
  # backend twenty seconds even for a small network.
  options = {}
  if jax.default_backend() == "cpu":
    options = {"xla_backend_optimization_level": 0}
  draw = jax.jit(network.init, compiler_options=options)
  variables = dict(draw(rng, image))
  if not weights:
    return variables
  if isinstance(network, vit_unet.ViTUNet):
    vit = vit_weights.load_vit_small(blocks=max(network.taps))
    variables = pretrained.insert(variables, vit)
    if network.branch != "conv":
      lite = pretrained.load_efficientnet_lite(network.branch)
      variables = pretrained.insert(variables, lite, ("decoder", "encoder"))
  elif isinstance(network, lite_unet.LiteUNet):
    lite = pretrained.load_efficientnet_lite("lite0", network.stages)
    variables = pretrained.insert(variables, lite)
  elif isinstance(network, CONVOLUTIONAL_TEACHERS):
    lite = pretrained.load_efficientnet_lite(network.encoder_variant)
    variables = pretrained.insert(variables, lite)
  return variables


CONVOLUTIONAL_TEACHERS = (
  unetpp.UNetPlusPlus,
  deeplab.DeepLabV3Plus,
  pspnet.PSPNet,
)


def count_parameters(variables: Mapping[str, Any]) -> int:
  """Returns the number of trained parameters."""
  return sum(x.size for x in jax.tree.leaves(variables["params"]))
