"""Several teachers as one: mean probability, concatenated features."""

from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers

Array = jax.Array
Tree = Any


class Ensemble(nn.Module):
  """Runs its members on the same image.

  The logits are those of the members' mean probability; each tap is the
  members' taps, concatenated along the channels.
  """

  members: Sequence[nn.Module]

  @nn.compact
  def __call__(
    self,
    image: Array,
    train: bool = False,
    encoder_features: Mapping[str, Mapping[str, Array]] | None = None,
  ) -> dict[str, Array]:
    """Maps `image` [B, H, W, 3] to the named outputs of `networks`.

    Args:
      image: float RGB in [0, 1].
      train: must be false: members are trained one by one.
      encoder_features: of the members that have frozen blocks, by their name
        ("members_0", ...).

    Raises:
      ValueError: if `train` is true.
    """
    if train:
      raise ValueError("an ensemble is not trained; train its members")
    outs = []
    for i, member in enumerate(self.members):
      extra = {}
      if encoder_features and f"members_{i}" in encoder_features:
        extra["encoder_features"] = encoder_features[f"members_{i}"]
      outs.append(member(image, train=False, **extra))
    probability = sum(jax.nn.sigmoid(out["logits"]) for out in outs) / len(outs)
    # Away from 0 and 1, so that a unanimous ensemble keeps finite logits.
    probability = jnp.clip(probability, 1e-6, 1.0 - 1e-6)
    joined = {"logits": jnp.log(probability) - jnp.log1p(-probability)}
    for name in outs[0]:
      if name != "logits" and all(name in out for out in outs):
        grid = outs[0][name].shape[1:3]
        joined[name] = jnp.concatenate(
          [layers.resize_bilinear(out[name], *grid) for out in outs], axis=-1
        )
    return joined


def join_variables(variables: Sequence[Mapping[str, Tree]]) -> dict[str, Tree]:
  """Returns an ensemble's variables from its members', in their order."""
  return {
    collection: {
      f"members_{i}": member[collection]
      for i, member in enumerate(variables)
      if collection in member
    }
    for collection in ("params", "batch_stats")
  }
