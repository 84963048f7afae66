"""Teachers and students: pure Flax modules with one contract.

`network.apply(variables, image, train=...)` maps `image`, [B, H, W, 3] float
RGB in [0, 1] with sides divisible by 32, to a dict of "logits", [B, H, W]
float32, lesion where above 0, and the features that distillation compares, one
map [B, H/stride, W/stride, C] a tap of `STRIDES`. Each network normalises the
image itself, so that a teacher and a student can share a batch. The fields
`dtype` (of the computation; parameters and logits are float32) and `axis_name`
(the mapped axis over which BatchNorm shares its statistics) are common to all;
sides that 32 does not divide are a ValueError.

A network may have three methods more:

  published_weights()  yields (variables, path of the submodule they belong to)
  encode(image)        returns what its frozen blocks compute, which `apply`
                       then takes as `encoder_features`
  is_frozen(path)      whether the parameter at `path` belongs to such a block

To add a network, write its module and one row of `TEACHERS` or `STUDENTS`.
"""

from collections.abc import Callable
from collections.abc import Mapping
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.networks.cost import count_macs as count_macs
from kdseg.networks.encoders import pretrained
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

# Of the maps that every network returns; the first three are the encoder's.
STRIDES: Mapping[str, int] = {
  "low": 4,
  "high": 8,
  "s16": 16,
  "decoder_low": 4,
  "decoder_high": 8,
}
TAPS = tuple(STRIDES)


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
  """Returns initial variables on the default device; see `make_initializer`."""
  variables = make_initializer(network, size=size, weights=weights)(rng)
  return jax.tree.map(jnp.asarray, jax.device_get(variables))


def make_initializer(
  network: nn.Module, *, size: int, weights: bool = True
) -> Callable[[jax.Array], dict[str, Any]]:
  """Returns rng -> initial variables; compiles, and reads weights, once.

  Args:
    network: from `make_network`.
    size: side of the images in pixels; parameters don't depend on it.
    weights: whether the network's published weights replace what is drawn.

  Raises:
    ImportError: if published weights are wanted and not installed.
    ValueError: if their file is damaged or another.
  """
  image = np.zeros((1, size, size, 3), np.float32)
  draw = on_cpu(lambda rng: network.init(rng, image))
  published_weights = getattr(network, "published_weights", tuple)
  published = list(published_weights()) if weights else []

  def initialize(rng: jax.Array) -> dict[str, Any]:
    variables = dict(draw(rng))
    for tree, path in published:
      variables = pretrained.insert(variables, tree, path)
    return variables

  return initialize


def on_cpu(function: Callable[..., Any]) -> Callable[..., Any]:
  """Compiles a function that runs once, on little data, for the CPU.

  Without optimisation, which takes the CPU backend twenty seconds even for a
  small network, and a GPU's compiler as long.
  """
  device = cpu()
  options = {"xla_backend_optimization_level": 0} if device else {}
  compiled = jax.jit(function, compiler_options=options)

  def call(*arguments: Any) -> Any:
    with jax.default_device(device):
      return compiled(*arguments)

  return call


def cpu() -> jax.Device | None:
  """Returns the CPU of this host, or None where JAX does not offer it."""
  try:
    return jax.local_devices(backend="cpu")[0]
  except RuntimeError:  # JAX was told to use other platforms only.
    return None


def count_parameters(variables: Mapping[str, Any]) -> int:
  """Returns the number of trained parameters."""
  return sum(x.size for x in jax.tree.leaves(variables["params"]))
