"""Prepares a batch once for all arms: augments it and runs the teacher."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
import functools
import itertools
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from kdseg.data import augment as augment_lib
from kdseg.distill import layers as layers_lib
from kdseg.runtime import devices
from kdseg.runtime import hosts
from kdseg.training import settings
from kdseg.training import step as step_lib

Array = jax.Array
Tree = Any
Batch = dict[str, Any]
# (teacher_variables, image) -> the teacher's named outputs.
Teach = Callable[..., Mapping[str, Array]]
Prepare = Callable[[int, Tree], Tree]


def make_teach(
  teacher: nn.Module, names: tuple[str, ...], *, channels: int = 0
) -> Teach:
  """Makes `teach(variables, image)`: the teacher's outputs `names`, frozen.

  The teacher runs in evaluation mode and is never differentiated. Taps too
  wide for a generator are projected here, once for all arms.

  Args:
    teacher: the network.
    names: the taps wanted; the logits are always returned.
    channels: taps are projected to at most so many channels; 0 for the rule of
      `distill.layers.target_channels`.
  """

  def teach(
    variables: Tree, image: Array, encoder_features: Tree = None
  ) -> dict[str, Array]:
    extra = (
      {} if encoder_features is None else {"encoder_features": encoder_features}
    )
    out: Any = teacher.apply(variables, image, train=False, **extra)
    teacher_out = {"logits": out["logits"]}
    for name in names:
      if name != "logits":
        have = out[name].shape[-1]
        wanted = (
          min(have, channels) if channels else layers_lib.target_channels(have)
        )
        teacher_out[name] = layers_lib.project(out[name], wanted)
    return jax.tree.map(jax.lax.stop_gradient, teacher_out)

  return teach


def make_prepare(
  augment: Callable[[Array, Array, Array], tuple[Array, Array]],
  teach: Teach | None = None,
) -> Callable[[Array, Array, Tree, Batch], Batch]:
  """Makes `prepare(seed, step, teacher_variables, batch)`.

  Args:
    augment: (keys [B], image uint8, mask uint8) -> (image float32 in [0, 1],
      mask float32).
    teach: see `make_teach`; None where no arm is distilled, or where the batch
      brings the teacher's outputs along, as "teacher_out".

  Returns:
    A function to be mapped by `parallel`; its batch holds "image" [B, H, W, 3]
    uint8, "mask" [B, H, W] uint8, and optionally "teacher_out" and
    "encoder_features", dictionaries of precomputed arrays.
  """

  def prepare(
    seed: Array, step: Array, teacher_variables: Tree, batch: Batch
  ) -> Batch:
    keys = step_lib.example_keys(
      seed, step, step_lib.AUGMENT, batch["image"].shape[0]
    )
    image, mask = augment(keys, batch["image"], batch["mask"])
    prepared: Batch = {"image": image, "mask": mask}
    if "encoder_features" in batch:
      prepared["encoder_features"] = batch["encoder_features"]
    if "teacher_out" in batch:
      prepared["teacher_out"] = jax.tree.map(
        lambda x: x.astype(jnp.float32), batch["teacher_out"]
      )
    elif teach is not None:
      prepared["teacher_out"] = teach(teacher_variables, image)
    return prepared

  return prepare


def parallel_prepare(
  run_config: settings.RunConfig,
  teach: Teach | None,
  teacher_variables: Tree,
  oriented: bool,
) -> Prepare:
  """Returns (step, batch) -> the prepared batch, mapped over the devices.

  Args:
    run_config: of the run.
    teach: see `make_prepare`.
    teacher_variables: for `teach`.
    oriented: whether `make_batches` has turned the batch already. The outputs
      of the frozen networks are known for eight orientations only, so nothing
      else moves the pixels then.
  """
  strengths = augment_lib.Strengths(**run_config.augment)
  if oriented:
    strengths = strengths.without_geometry()
  mapped = devices.parallel(
    make_prepare(
      functools.partial(augment_lib.augment, strengths=strengths), teach
    ),
    replicated=3,
    out_replicated=False,
    mapping=run_config.mapping,
  )
  held = devices.replicate({} if teach is None else teacher_variables)
  seed = devices.replicate(jnp.asarray(run_config.seed, jnp.int32))

  def prepare(step: int, batch: Tree) -> Tree:
    at = devices.replicate(jnp.asarray(step, jnp.int32))
    return mapped(seed, at, held, batch)

  return prepare


def measure_teacher_std(
  batches: Callable[[int], Iterator[tuple[int, Tree, Any]]], count: int = 16
) -> dict[str, np.ndarray]:
  """Measures each channel of the teacher's taps over the first batches.

  Args:
    batches: from the first step, yields (step, prepared batch, batch_info).
    count: of batches, at most.

  Returns:
    {tap: [C] float32}, never below 1e-3 of the tap's largest.
  """
  sums: dict[str, list[np.ndarray]] = {}
  for _, prepared, _ in itertools.islice(batches(0), count):
    for name, value in prepared["teacher_out"].items():
      if name != "logits":
        flat = np.asarray(value, np.float64).reshape(-1, value.shape[-1])
        moments = np.stack([flat.mean(0), np.square(flat).mean(0)])
        # Every host has its share of the batch.
        if hosts.are_many():
          moments = np.mean(hosts.gather(moments.tolist()), axis=0)
        sums.setdefault(name, []).append(moments)
  teacher_std = {}
  for name, moments_ in sums.items():
    mean, square = np.mean(moments_, axis=0)
    std = np.sqrt(np.maximum(square - mean**2, 0.0))
    teacher_std[name] = np.maximum(std, 1e-3 * max(std.max(), 1e-6)).astype(
      np.float32
    )
  return teacher_std
