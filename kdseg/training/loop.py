"""The loop: every arm of a run on the same batches.

One arm after the other, or the seeds of a kind by one program.
"""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
from concurrent import futures
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
from kdseg.training import state as state_lib
from kdseg.training import step as step_lib

_LOG = logging.getLogger("kdseg")

Tree = Any
TrainState = state_lib.TrainState
Metrics = Mapping[str, jax.Array]
StepFn = Callable[[TrainState, Tree], tuple[TrainState, Metrics]]
# An arm and its metrics; or several, and theirs on a leading axis.
Measured = tuple[str | tuple[str, ...], Metrics]

# Updates in a row that may be left out; one more and nothing is learned.
SKIPPED_AT_MOST = 20
# Programs that are compiled at the same time; each takes memory.
COMPILED_AT_ONCE = 4


class DivergedError(RuntimeError):
  """No arm is left whose loss and gradients are finite."""


@dataclasses.dataclass
class ArmState:
  """One network in training.

  Attributes:
    state: replicated over the devices; what a checkpoint holds.
    step: its mapped update; with `lower`, see `step.parallel`, the programs of
      several arms are compiled at once. Arms of a kind have the same one.
    step_stacked: the same for the states of several arms of that kind on a
      leading axis, all on one batch; metrics come back with that axis.
    best: {"variables": host arrays, "score": validation, "step"}, or {}.
    diverged: why it stopped early, or "".
    skipped: how many of its last updates were left out, in a row.
  """

  state: TrainState
  step: StepFn
  step_stacked: StepFn | None = None
  best: dict[str, Any] = dataclasses.field(default_factory=dict)
  diverged: str = ""
  skipped: int = 0


@dataclasses.dataclass
class _Stack:
  """Arms whose states are updated by one program.

  Attributes:
    names: of the arms, those that diverged too: of fewer, it would be another
      program with other rounding.
    step: their update.
    state: theirs, on a leading axis.
  """

  names: tuple[str, ...]
  step: StepFn
  state: Tree


@dataclasses.dataclass(frozen=True)
class Schedule:
  """When what happens, in steps.

  Attributes:
    steps: of the whole training.
    validate_every: between validations; the last step is validated too.
    save_every: between checkpoints.
    log_every: between log lines, and between looks for NaNs.
  """

  steps: int
  validate_every: int
  save_every: int
  log_every: int = 20


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


def check_on_non_finite(value: str) -> None:
  """Raises ValueError on what `fit` does not know."""
  if value not in ("stop", "skip"):
    raise ValueError(f'on_non_finite must be "stop" or "skip": {value!r}')


def fit(
  arms: dict[str, ArmState],
  batches: Callable[[int], Iterator[tuple[int, Tree, Mapping[str, Any]]]],
  *,
  stage: str,
  schedule: Schedule,
  prepare: Callable[[int, Tree], Tree],
  validate: Callable[[str, Tree], float],
  log: Callable[[Mapping[str, Any]], None],
  save: Callable[[int, dict[str, ArmState]], None],
  save_bad_batch: Callable[[str, int, Mapping[str, Any]], None],
  first_step: int = 0,
  on_non_finite: str = "stop",
  stop: preemption.Stop = preemption.never,
  at_once: int = 1,
) -> None:
  """Trains all arms to the end, in place.

  Every arm sees the same prepared batch. An arm that diverges is named and
  left behind with the best weights it had; the others go on.

  Args:
    arms: by name; their states and bests are updated.
    batches: from the first step to do, yields (step, batch on the devices,
      what it was made of: "ids" and the host arrays).
    stage: name for the log.
    schedule: when to validate, save and log.
    prepare: (step, batch) -> what the arms are given.
    validate: (arm, variables) -> score to choose by, higher is better.
    log: writes one record.
    save: (step, arms), called when a checkpoint is due.
    save_bad_batch: (arm, step, what the batch was made of).
    first_step: steps already done.
    on_non_finite: "stop" ends an arm at its first non-finite loss or
      gradient; "skip" leaves that update out and goes on, unless
      `SKIPPED_AT_MOST` in a row were left out.
    stop: asked after every step; where it says yes, what was done is saved.
    at_once: how many arms of a kind one program updates, if they have a
      `step_stacked`. The states of the arms are brought up to date when they
      are validated or saved.

  Raises:
    StoppedError: if `stop` says so before the last step.
    DivergedError: if no arm is left.
    ValueError: on an unknown `on_non_finite`.
  """
  check_on_non_finite(on_non_finite)
  total = schedule.steps
  live = [name for name, arm in arms.items() if not arm.diverged]
  stacks = _stack(arms, live, at_once)
  stacked = {name for stack in stacks for name in stack.names}
  if stacks:
    _LOG.info(
      "%s: %d arms updated by %d programs", stage, len(stacked), len(stacks)
    )
  window: list[tuple[int, Mapping[str, Any], list[Measured]]] = []
  started, started_at, spent = time.monotonic(), first_step, 0.0
  for step, batch, batch_info in batches(first_step):
    prepared = prepare(step, batch)
    if step == first_step:
      _compile(arms, live, stacks, prepared)
    measured: list[Measured] = []
    for stack in stacks:
      if any(name in live for name in stack.names):
        stack.state, metrics = stack.step(stack.state, prepared)
        measured.append((stack.names, metrics))
    for name in live:
      if name not in stacked:
        arms[name].state, metrics = arms[name].step(arms[name].state, prepared)
        measured.append((name, metrics))
    window.append((step, batch_info, measured))
    done = step + 1

    if done == started_at + 1:
      # The first step is mostly compilation: leave it out of the forecast.
      jax.block_until_ready([metrics for _, metrics in measured])
      _LOG.info(
        "%s: first step after %s", stage, duration(time.monotonic() - started)
      )
      started = time.monotonic()
    validation_due = due(done, schedule.validate_every, total)
    stopping_now = done < total and stop()
    save_due = stopping_now or due(done, schedule.save_every, total)
    if due(done, schedule.log_every, total) or validation_due or save_due:
      host = _fetch(window, live)
      window = []
      live = _drop_diverged(
        arms, live, host, stage, on_non_finite, save_bad_batch, log
      )
      _report(stage, done, total, live, host, log, started, started_at, spent)
      if not live:
        raise DivergedError(
          f"{stage}: no arm is left at step {done}; "
          + "; ".join(f"{n}: {arm.diverged}" for n, arm in arms.items())
        )
    if validation_due or save_due:
      for stack in stacks:
        states = step_lib.unstack_states(stack.state)
        for name, state in zip(stack.names, states):
          arms[name].state = state
    if validation_due:
      before = time.monotonic()
      for name in live:
        _validate(name, arms[name], done, stage, validate, log)
      spent += time.monotonic() - before
    if save_due:
      before = time.monotonic()
      save(done, arms)
      spent += time.monotonic() - before
    if stopping_now:
      raise preemption.StoppedError(
        f"{stage}: stopped after step {done} of {total}, which is saved; the "
        "same command continues from there"
      )


def _stack(
  arms: Mapping[str, ArmState], live: Sequence[str], at_once: int
) -> list[_Stack]:
  """Returns stacks of up to `at_once` arms of a kind, none of one arm."""
  kinds: dict[StepFn, list[str]] = {}
  for name, arm in arms.items():
    if arm.step_stacked is not None:
      kinds.setdefault(arm.step_stacked, []).append(name)
  stacks = []
  for step, names in kinds.items():
    for first in range(0, len(names), at_once):
      chosen = names[first : first + at_once]
      if len(chosen) > 1 and any(name in live for name in chosen):
        state = step_lib.stack_states([arms[name].state for name in chosen])
        stacks.append(_Stack(tuple(chosen), step, state))
  return stacks


def _fetch(
  window: Sequence[tuple[int, Mapping[str, Any], Sequence[Measured]]],
  live: Sequence[str],
) -> list[tuple[int, Mapping[str, Any], dict[str, Metrics]]]:
  """Fetches a window's metrics from the devices and sorts them by arm."""
  fetched = jax.device_get(
    [[metrics for _, metrics in measured] for _, _, measured in window]
  )
  sorted_ = []
  for (step, batch_info, measured), values in zip(window, fetched):
    found: dict[str, Metrics] = {}
    for (names, _), metrics in zip(measured, values):
      if isinstance(names, str):
        found[names] = metrics
        continue
      for place, name in enumerate(names):
        if name in live:
          found[name] = {key: x[place] for key, x in metrics.items()}
    sorted_.append((step, batch_info, found))
  return sorted_


def _compile(
  arms: Mapping[str, ArmState],
  live: list[str],
  stacks: Sequence[_Stack],
  prepared: Tree,
) -> None:
  """Compiles the programs of the arms side by side, if they can be lowered.

  Compiling is most of a first step, and much of that uses one core. Traced is
  here, as what JAX was told by contexts holds for one thread.
  """
  stacked = {name for stack in stacks for name in stack.names}
  programs: dict[Any, tuple[StepFn, Tree]] = {
    arms[name].step: (arms[name].step, arms[name].state)
    for name in live
    if name not in stacked
  }
  for stack in stacks:
    programs[stack.step, len(stack.names)] = stack.step, stack.state
  pool = futures.ThreadPoolExecutor(COMPILED_AT_ONCE)
  try:
    begun = [
      pool.submit(step.lower(state, prepared))
      for step, state in programs.values()
      if hasattr(step, "lower")
    ]
    for compiled in begun:
      compiled.result()
  finally:
    # What has not begun when one fails, or somebody interrupts, is left.
    pool.shutdown(cancel_futures=True)


def _drop_diverged(
  arms: dict[str, ArmState],
  live: list[str],
  window: list[tuple[int, Mapping[str, Any], dict[str, Metrics]]],
  stage: str,
  on_non_finite: str,
  save_bad_batch: Callable[[str, int, Mapping[str, Any]], None],
  log: Callable[[Mapping[str, Any]], None],
) -> list[str]:
  """Marks arms with a non-finite update in `window`; returns the others."""
  kept = []
  for name in live:
    bad = [
      (step, batch_info, values[name])
      for step, batch_info, values in window
      if not values[name]["finite"]
    ]
    in_a_row = arms[name].skipped
    for _, _, values in window:
      in_a_row = 0 if values[name]["finite"] else in_a_row + 1
      if in_a_row >= SKIPPED_AT_MOST:
        break
    arms[name].skipped = in_a_row
    if not bad:
      kept.append(name)
      continue
    step, batch_info, values = bad[0]
    # Of all hosts, who came here alike: what they measured is a mean of all.
    ids = [i for part in hosts.gather(list(batch_info["ids"])) for i in part]
    odd = sorted(k for k, v in values.items() if not math.isfinite(v))
    why = (
      f"{', '.join(odd)} not finite at step {step}, batch of {', '.join(ids)}"
    )
    save_bad_batch(name, step, batch_info)
    if on_non_finite == "skip" and in_a_row < SKIPPED_AT_MOST:
      _LOG.warning(
        "%s: %s: skipped %d update(s): %s", stage, name, len(bad), why
      )
      kept.append(name)
    else:
      arms[name].diverged = why
      _LOG.error(
        "%s: %s diverged: %s. Its best weights so far are kept; lower its "
        "learning rate or the weight of its losses.",
        stage,
        name,
        why,
      )
    log(
      {
        "stage": stage,
        "arm": name,
        "step": step,
        "non_finite": odd,
        "ids": ids,
      }
    )
  return kept


def _report(
  stage: str,
  done: int,
  total: int,
  live: list[str],
  window: list[tuple[int, Mapping[str, Any], dict[str, Metrics]]],
  log: Callable[[Mapping[str, Any]], None],
  started: float,
  started_at: int,
  spent: float,
) -> None:
  """Logs the means over the window, and one line for a person."""
  means = {}
  for name in live:
    keys = window[0][2][name].keys()
    # A step that was left out has no part in the means, and NaN is no JSON.
    whole = [v[name] for _, _, v in window if v[name]["finite"]]
    if not whole:
      continue
    means[name] = {
      key: float(np.mean([values[key] for values in whole])) for key in keys
    }
    log({"stage": stage, "arm": name, "step": done, **means[name]})
  elapsed = time.monotonic() - started - spent
  rate = (done - started_at - 1) / elapsed if elapsed > 0 else 0.0
  eta = duration((total - done) / rate) if rate > 0 else "?"
  losses = "  ".join(f"{n} {m['task']:.4f}" for n, m in list(means.items())[:3])
  more = f"  +{len(means) - 3} more" if len(means) > 3 else ""
  _LOG.info(
    "%s: step %d/%d (%d %%)  %.2f steps/s  ETA %s  loss: %s%s",
    stage,
    done,
    total,
    100 * done // total,
    rate,
    eta,
    losses,
    more,
  )


def _validate(
  name: str,
  arm: ArmState,
  done: int,
  stage: str,
  validate: Callable[[str, Tree], float],
  log: Callable[[Mapping[str, Any]], None],
) -> None:
  """Scores one arm, and keeps its weights if they are the best so far."""
  variables = state_lib.network_variables(arm.state)
  score = float(validate(name, variables))
  better = not arm.best or score > arm.best["score"]
  if better:
    arm.best = {
      "variables": checkpoint.to_host(variables),
      "score": score,
      "step": done,
    }
  log({"stage": stage, "arm": name, "step": done, "validation_dice": score})
  _LOG.info(
    "%s: %s validation Dice %.4f%s",
    stage,
    name,
    score,
    " (best so far)"
    if better
    else f" (best {arm.best['score']:.4f} at step {arm.best['step']})",
  )
