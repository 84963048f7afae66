"""The settings of a training, as typed records."""

from collections.abc import Callable
from collections.abc import Mapping
import dataclasses
import operator
from typing import Any

import jax
import optax

from kdseg.data import pipeline
from kdseg.runtime import hosts
from kdseg.training import optimizer

# What to do where a forward pass of a network does not fit into memory.
LOWER_EVALUATION = (
  "Free some, or lower evaluation.batch_size, then the same command continues"
)
# A GPU's default for `seeds_at_once`; activations take that many times the
# memory.
SEEDS_ON_GPU = 8
ON_NON_FINITE = ("stop", "skip")


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """How a stage trains its networks, all of them alike.

  Attributes:
    epochs: over the training split.
    max_steps: in place of the epochs, if above 0.
    learning_rate: the highest.
    optimizer: "adamw" or "sgd".
    schedule: "cosine", "linear" or "constant".
    warmup: share of the training in which the learning rate rises.
    weight_decay: decoupled, on kernels.
    clip_norm: of the gradients; 0 for none.
    encoder_scale: share of the learning rate for pretrained encoders.
    ema_decay: of the moving average of the weights; 0 for none.
    validate_epochs: between validations.
    save_epochs: between checkpoints.
    on_non_finite: "stop" ends an arm at its first loss or gradient that is not
      finite; "skip" leaves that update out, see `loop.SKIPPED_AT_MOST`.
  """

  epochs: float
  learning_rate: float
  max_steps: int = 0
  optimizer: str = "adamw"
  schedule: str = "cosine"
  warmup: float = 0.05
  weight_decay: float = 1e-4
  clip_norm: float = 1.0
  encoder_scale: float = 1.0
  ema_decay: float = 0.0
  validate_epochs: float = 2.0
  save_epochs: float = 4.0
  on_non_finite: str = "stop"

  def check(self) -> None:
    """Raises ValueError on a value that would only fail in the training."""
    if self.on_non_finite not in ON_NON_FINITE:
      raise ValueError(
        f'on_non_finite must be "stop" or "skip": {self.on_non_finite!r}'
      )
    if not 0 <= self.warmup < 1:
      raise ValueError(
        f"warmup is the share of the steps, from 0 to below 1: {self.warmup}"
      )
    self.make_tx(1)

  def make_tx(
    self, steps: int, is_frozen: Callable[[Any], bool] | None = None
  ) -> optax.GradientTransformation:
    """Returns the optimizer of a training of so many steps."""
    return optimizer.make_optimizer(
      name=self.optimizer,
      schedule=optimizer.make_schedule(
        peak=self.learning_rate,
        steps=steps,
        warmup_steps=int(self.warmup * steps),
        kind=self.schedule,
      ),
      weight_decay=self.weight_decay,
      clip_norm=self.clip_norm,
      encoder_scale=self.encoder_scale,
      is_frozen=is_frozen,
    )

  def steps(self, examples: int, batch_size: int) -> int:
    """Returns how many steps the training takes."""
    if self.max_steps > 0:
      return self.max_steps
    return pipeline.steps_for_epochs(self.epochs, batch_size, examples)


@dataclasses.dataclass(frozen=True)
class RunConfig:
  """The settings that all stages of a run share.

  Attributes:
    seed: of the order of the data and of the augmentation.
    batch_size: over all devices and hosts.
    evaluation_batch_size: of validation, over all devices and hosts.
    size: side of the images in pixels.
    segmentation: weights of the segmentation terms.
    augment: fields of `data.augment.Strengths`.
    encoder_weights: whether encoders start from published weights.
    log_every: steps between log lines.
    seeds_at_once: how many seeds of a kind one program updates; see the
      function `seeds_at_once`.
    mapping: how a program is mapped over the devices; see `devices.parallel`.
  """

  seed: int
  batch_size: int
  evaluation_batch_size: int
  size: int
  segmentation: Mapping[str, float]
  augment: Mapping[str, Any]
  encoder_weights: bool
  log_every: int
  seeds_at_once: int = 1
  mapping: str = "pmap"


def seeds_at_once(wanted: int) -> int:
  """Returns how many seeds of a kind one program updates on this backend.

  A small student leaves a GPU waiting for the CPU that launches its kernels; a
  program for several seeds launches hardly more kernels than one for a single
  seed. A CPU is busy with one seed, and slower with several (a convolution of
  stacked kernels is a grouped one). Not measured on a TPU, nor on several
  hosts, which would have to gather every array at each validation.

  Args:
    wanted: returned as it is, if above 0; 0 for the backend's default.

  Raises:
    ValueError: if it is below 0.
    TypeError: if it is no integer.
  """
  if operator.index(wanted) < 0:
    raise ValueError(f"seeds_at_once must be 0 or more: {wanted}")
  if wanted:
    return wanted
  alone = jax.default_backend() != "gpu" or hosts.are_many()
  return 1 if alone else SEEDS_ON_GPU
