"""The loop: updates every arm of a stage on the same batches."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import dataclasses
import logging
import math
import time
from typing import Any

import jax
import numpy as np

from kdseg.runtime import checkpoint
from kdseg.runtime import hosts
from kdseg.runtime import preemption
from kdseg.training import arms as arms_lib
from kdseg.training import state as state_lib

_LOG = logging.getLogger("kdseg")

Tree = Any
Arms = dict[str, arms_lib.ArmState]
BatchInfo = Mapping[str, Any]

# With "skip", how many updates in a row are left out before the arm is ended.
SKIPPED_AT_MOST = 20


class DivergedError(RuntimeError):
  """No arm is left whose loss and gradients are finite."""


@dataclasses.dataclass(frozen=True)
class LoopConfig:
  """What the loop does when, in steps.

  Attributes:
    stage: name for the log.
    steps: of the whole training.
    validate_every: between validations; the last step is validated too.
    save_every: between checkpoints.
    log_every: between log lines, and between checks that all was finite.
    first_step: steps already done.
    on_non_finite: "stop" ends an arm at its first loss or gradient that is not
      finite; "skip" leaves that update out, and ends the arm after
      `SKIPPED_AT_MOST` in a row.
  """

  stage: str
  steps: int
  validate_every: int
  save_every: int
  log_every: int = 20
  first_step: int = 0
  on_non_finite: str = "stop"


@dataclasses.dataclass(frozen=True)
class Callbacks:
  """What the loop calls.

  Attributes:
    validate: (arm, variables) -> validation Dice; the best weights are kept.
    log: writes one record.
    save: (steps done, arms), called when a checkpoint is due.
    save_bad_batch: (arm, step, batch_info) of an update that was not finite.
    stop: polled after each step; if true, the loop saves and raises
      StoppedError.
  """

  validate: Callable[[str, Tree], float]
  log: Callable[[Mapping[str, Any]], None]
  save: Callable[[int, Arms], None]
  save_bad_batch: Callable[[str, int, BatchInfo], None]
  stop: preemption.Stop = preemption.never


@dataclasses.dataclass(frozen=True)
class _Update:
  """One step of all arms.

  Attributes:
    step: its number.
    batch_info: of its batch.
    metrics: on the devices, of each group that was updated; None for the rest.
  """

  step: int
  batch_info: BatchInfo
  metrics: Sequence[arms_lib.Metrics | None]


def due(step: int, every: int, total: int) -> bool:
  """Whether something done every `every` steps is due after step `step`.

  True too after the last of `total` steps; never for `every` below 1, the
  last step excepted.
  """
  return step == total or (every > 0 and step % every == 0)


def duration(seconds: float) -> str:
  """Returns "1h02m", "3m20s" or "12s"."""
  seconds = round(seconds)
  if seconds >= 3600:
    return f"{seconds // 3600}h{seconds % 3600 // 60:02d}m"
  if seconds >= 60:
    return f"{seconds // 60}m{seconds % 60:02d}s"
  return f"{seconds}s"


def fit(
  arms: Arms,
  groups: Sequence[arms_lib.Group],
  batches: Callable[[int], Iterator[tuple[int, Tree, BatchInfo]]],
  config: LoopConfig,
  callbacks: Callbacks,
) -> None:
  """Trains all arms to the end, in place.

  Every arm sees the same prepared batches. An arm that diverges keeps the best
  weights that it had, and is not validated any more; the others are trained on.

  Args:
    arms: by name; their states are brought up to date when they are validated
      or saved.
    groups: of these arms, see `arms.make_groups`.
    batches: from the first step to do, yields (step, prepared batch,
      batch_info: "ids" and the host arrays).
    config: when to validate, save and log.
    callbacks: what is called then.

  Raises:
    StoppedError: if `callbacks.stop` says so before the last step.
    DivergedError: if no arm is left.
  """
  window: list[_Update] = []
  began = time.monotonic()
  for step, prepared, batch_info in batches(config.first_step):
    done = step + 1
    if step == config.first_step:
      arms_lib.compile_groups(groups, prepared)
    window.append(_Update(step, batch_info, _update(arms, groups, prepared)))
    if step == config.first_step:
      jax.block_until_ready(window[-1].metrics)
      first = duration(time.monotonic() - began)
      _LOG.info("%s: first step after %s", config.stage, first)
      # That was mostly compilation: leave it out of the forecast.
      began = time.monotonic()
    validating = due(done, config.validate_every, config.steps)
    stopping = done < config.steps and callbacks.stop()
    saving = stopping or due(done, config.save_every, config.steps)
    if validating or saving or due(done, config.log_every, config.steps):
      _look(arms, groups, window, config, callbacks, began)
      window = []
    paused = time.monotonic()
    if validating or saving:
      for group in groups:
        for name, state in group.states().items():
          arms[name].state = state
    if validating:
      for name in _live(arms):
        _validate(name, arms[name], done, config.stage, callbacks)
    if saving:
      callbacks.save(done, arms)
    began += time.monotonic() - paused
    if stopping:
      raise preemption.StoppedError(
        f"{config.stage}: stopped after step {done} of {config.steps}, which "
        "is saved; the same command continues from there"
      )


def _live(arms: Arms) -> list[str]:
  return [name for name, arm in arms.items() if not arm.diverged]


def _update(
  arms: Arms, groups: Sequence[arms_lib.Group], prepared: Tree
) -> list[arms_lib.Metrics | None]:
  """Updates the groups with a live arm; returns each group's metrics."""
  return [
    None
    if all(arms[name].diverged for name in group.names)
    else group.update(prepared)
    for group in groups
  ]


def _look(
  arms: Arms,
  groups: Sequence[arms_lib.Group],
  window: Sequence[_Update],
  config: LoopConfig,
  callbacks: Callbacks,
  began: float,
) -> None:
  """Reads the metrics of the last updates: drops diverged arms, and logs."""
  rows = []
  fetched = jax.device_get([update.metrics for update in window])
  for update, metrics in zip(window, fetched):
    by_arm: dict[str, arms_lib.Metrics] = {}
    for group, values in zip(groups, metrics):
      if values is not None:
        by_arm |= group.split(values)
    rows.append((update, by_arm))
  for name in _live(arms):
    _check_finite(
      name,
      arms[name],
      [(update, by_arm[name]) for update, by_arm in rows],
      config,
      callbacks,
    )
  done = window[-1].step + 1
  means = {
    name: _means([by_arm[name] for _, by_arm in rows]) for name in _live(arms)
  }
  _report(config, done, {n: m for n, m in means.items() if m}, callbacks, began)
  if not _live(arms):
    raise DivergedError(
      f"{config.stage}: no arm is left at step {done}; "
      + "; ".join(f"{n}: {arm.diverged}" for n, arm in arms.items())
    )


def _means(rows: Sequence[arms_lib.Metrics]) -> dict[str, float]:
  """Returns the means of the updates that were made; {} if there is none.

  A skipped update has no part in them: NaN is no JSON.
  """
  finite = [row for row in rows if row["finite"]]
  if not finite:
    return {}
  return {
    key: float(np.mean([row[key] for row in finite])) for key in finite[0]
  }


def _check_finite(
  name: str,
  arm: arms_lib.ArmState,
  rows: Sequence[tuple[_Update, arms_lib.Metrics]],
  config: LoopConfig,
  callbacks: Callbacks,
) -> None:
  """Logs an arm's updates that were not finite; marks it if it diverged."""
  for _, metrics in rows:
    arm.skipped = 0 if metrics["finite"] else arm.skipped + 1
    if arm.skipped >= SKIPPED_AT_MOST:
      break
  bad = [row for row in rows if not row[1]["finite"]]
  if not bad:
    return
  update, metrics = bad[0]
  # All hosts come here, as the metrics are means over all devices.
  shares = hosts.gather(list(update.batch_info["ids"]))
  ids = [identity for share in shares for identity in share]
  odd = sorted(k for k, value in metrics.items() if not math.isfinite(value))
  why = (
    f"{', '.join(odd)} not finite at step {update.step}, batch of "
    f"{', '.join(ids)}"
  )
  callbacks.save_bad_batch(name, update.step, update.batch_info)
  skipped = config.on_non_finite == "skip" and arm.skipped < SKIPPED_AT_MOST
  if skipped:
    _LOG.warning(
      "%s: %s: skipped %d update(s): %s", config.stage, name, len(bad), why
    )
  else:
    arm.diverged = why
    _LOG.error(
      "%s: %s diverged: %s. Its best weights so far are kept; lower its "
      "learning rate or the weight of its losses.",
      config.stage,
      name,
      why,
    )
  record = {"stage": config.stage, "arm": name, "step": update.step}
  callbacks.log({**record, "non_finite": odd, "ids": ids})


def _report(
  config: LoopConfig,
  done: int,
  means: Mapping[str, Mapping[str, float]],
  callbacks: Callbacks,
  began: float,
) -> None:
  """Logs each arm's means since the last report, and one line of progress.

  Args:
    config: of the loop.
    done: steps.
    means: of the metrics, by arm.
    callbacks: of the loop.
    began: when the first step ended, moved on by validations and saves.
  """
  for name, values in means.items():
    record = {"stage": config.stage, "arm": name, "step": done}
    callbacks.log({**record, **values})
  elapsed = time.monotonic() - began
  rate = (done - config.first_step - 1) / elapsed if elapsed > 0 else 0.0
  eta = duration((config.steps - done) / rate) if rate > 0 else "?"
  losses = "  ".join(f"{n} {m['task']:.4f}" for n, m in list(means.items())[:3])
  more = f"  +{len(means) - 3} more" if len(means) > 3 else ""
  _LOG.info(
    "%s: step %d/%d (%d %%)  %.2f steps/s  ETA %s  loss: %s%s",
    config.stage,
    done,
    config.steps,
    100 * done // config.steps,
    rate,
    eta,
    losses,
    more,
  )


def _validate(
  name: str,
  arm: arms_lib.ArmState,
  done: int,
  stage: str,
  callbacks: Callbacks,
) -> None:
  """Scores one arm, and keeps its weights if they are the best so far."""
  variables = state_lib.network_variables(arm.state)
  score = float(callbacks.validate(name, variables))
  better = not arm.best or score > arm.best["score"]
  if better:
    arm.best = {
      "variables": checkpoint.to_host(variables),
      "score": score,
      "step": done,
    }
  record = {"stage": stage, "arm": name, "step": done}
  callbacks.log({**record, "validation_dice": score})
  best = f"best {arm.best['score']:.4f} at step {arm.best['step']}"
  _LOG.info(
    "%s: %s validation Dice %.4f (%s)",
    stage,
    name,
    score,
    "best so far" if better else best,
  )
