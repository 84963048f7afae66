"""The loop, driven by arms that are plain functions."""

import dataclasses
import logging
import math
import threading
import time

import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.runtime import preemption
from kdseg.training import arms as arms_lib
from kdseg.training import loop
from kdseg.training import state as state_lib


@dataclasses.dataclass
class Course:
  """One call of `fit`, and everything that it did to the world."""

  arms: dict
  scores: dict = dataclasses.field(default_factory=dict)
  records: list = dataclasses.field(default_factory=list)
  saves: list = dataclasses.field(default_factory=list)
  bad: list = dataclasses.field(default_factory=list)
  validated: list = dataclasses.field(default_factory=list)

  def run(
    self, steps=6, *, every=2, save_every=3, at_once=1, stop=None, **options
  ):
    def validate(name, variables):
      done = int(variables["params"]["w"])
      self.validated.append((name, done))
      return self.scores.get((name, done), 0.5)

    def save(step, arms):
      held = {n: (a.best.get("score"), a.diverged) for n, a in arms.items()}
      self.saves.append((step, held))

    def batches(first_step):
      for step in range(first_step, steps):
        prepared = {"at": step, "value": 10.0 * step}
        yield step, prepared, {"ids": [f"a{step}", f"b{step}"]}

    loop.fit(
      self.arms,
      arms_lib.make_groups(self.arms, at_once),
      batches,
      loop.LoopConfig(
        "students", steps, every, save_every, **{"log_every": 2} | options
      ),
      loop.Callbacks(
        validate=validate,
        log=self.records.append,
        save=save,
        save_bad_batch=lambda *what: self.bad.append(what),
        stop=stop or preemption.never,
      ),
    )

  def of(self, arm, key):
    return [
      (r["step"], r[key]) for r in self.records if r["arm"] == arm and key in r
    ]


def make_arm(bad_steps=()):
  """Counts its updates in its one weight; not finite at `bad_steps`."""
  seen = []

  def step(state, prepared):
    seen.append((prepared["at"], prepared["value"]))
    bad = prepared["at"] in bad_steps
    params = {"network": {"w": state.params["network"]["w"] + 1}}
    metrics = {
      "loss": math.nan if bad else 2.0,
      "task": 1.0 + prepared["at"],
      "finite": 0.0 if bad else 1.0,
    }
    return state.replace(params=params, step=state.step + 1), metrics

  state = state_lib.TrainState(
    step=jnp.zeros((), jnp.int32),
    seed=jnp.zeros((), jnp.int32),
    params={"network": {"w": jnp.zeros(())}},
    batch_stats={},
    opt_state=(),
    average={},
    balance={},
  )
  arm = arms_lib.ArmState(state, step)
  return arm, seen


def make_kind(names, bad=()):
  """Arms of one kind, by name; the batches that their one program has seen.

  An arm's seed is its place, and its `task` that place plus the step. `bad` are
  (place, step) whose loss is not finite.
  """
  seen = []

  def step(state, prepared):
    raise AssertionError("one program was to update all of them")

  def step_stacked(state, prepared):
    seen.append((prepared["at"], [int(place) for place in state.seed]))
    params = {"network": {"w": state.params["network"]["w"] + 1}}
    at, place = prepared["at"], np.asarray(state.seed)
    sound = np.array([(int(i), at) not in bad for i in place])
    metrics = {
      "loss": np.where(sound, 2.0, np.nan),
      "task": place + float(at),
      "finite": sound.astype(float),
    }
    return state.replace(params=params, step=state.step + 1), metrics

  arms = {}
  for place, name in enumerate(names):
    arm, _ = make_arm()
    state = arm.state.replace(seed=jnp.asarray(place, jnp.int32))
    arms[name] = arms_lib.ArmState(state, step, step_stacked)
  return arms, seen


@pytest.mark.parametrize(
  ("step", "every", "expected"),
  [
    (1, 3, False),
    (2, 3, False),
    (3, 3, True),
    (4, 3, False),
    (6, 3, True),
    (10, 3, True),  # The last step, whatever the interval.
    (9, 0, False),
    (10, 0, True),
    (9, -1, False),
    (1, 1, True),
  ],
)
def test_due_at_the_edges(step, every, expected):
  assert loop.due(step, every, 10) is expected


@pytest.mark.parametrize(
  ("seconds", "text"),
  [
    (0.4, "0s"),
    (59.4, "59s"),
    (59.6, "1m00s"),
    (200, "3m20s"),
    (3599.7, "1h00m"),
    (3720, "1h02m"),
  ],
)
def test_duration_reads_like_a_clock(seconds, text):
  assert loop.duration(seconds) == text


def test_every_arm_sees_every_prepared_batch_once():
  first, seen_first = make_arm()
  second, seen_second = make_arm()
  Course({"x": first, "y": second}).run(5)
  assert seen_first == [(i, 10.0 * i) for i in range(5)]
  assert seen_second == seen_first


def lowered(arm, compile_):
  """Gives an arm's step a `lower`; what that returns is `compile_`."""
  step, begun = arm.step, []

  def with_lower(state, prepared):
    return step(state, prepared)

  def lower(state, prepared):
    begun.append((threading.current_thread().name, prepared["at"]))
    return compile_

  with_lower.lower = lower
  arm.step = with_lower
  return begun


def test_the_programs_of_the_first_step_are_compiled_side_by_side():
  arms = {name: make_arm()[0] for name in ("none", "mbf", "kd")}
  met = threading.Barrier(2)
  begun = [
    lowered(arms[name], lambda: met.wait(timeout=60)) for name in ("none", "kd")
  ]
  Course(arms).run(steps=3)
  # Traced once each, here, where contexts of JAX hold.
  assert begun == [[(threading.main_thread().name, 0)]] * 2
  assert [int(arm.state.step) for arm in arms.values()] == [3, 3, 3]


def test_arms_of_one_program_compile_it_once():
  first, second = make_arm()[0], make_arm()[0]
  compiled = []
  begun = lowered(first, lambda: compiled.append(1))
  second.step = first.step
  Course({"seed0": first, "seed1": second}).run(steps=2)
  assert len(begun) == len(compiled) == 1


def test_what_cannot_be_compiled_stops_the_run_and_the_other_programs():
  compiled = []

  def fail():
    raise MemoryError("out of memory")

  arms = {f"arm{i}": make_arm()[0] for i in range(20)}
  for i, arm in enumerate(arms.values()):
    lowered(arm, (lambda: time.sleep(0.1) or compiled.append(1)) if i else fail)
  with pytest.raises(MemoryError, match="out of memory"):
    Course(arms).run()
  assert len(compiled) <= 2 * arms_lib.COMPILED_AT_ONCE
  assert all(int(arm.state.step) == 0 for arm in arms.values())


def test_validates_and_saves_when_due_and_after_the_last_step():
  arm, _ = make_arm()
  course = Course({"x": arm})
  course.run(7, every=2, save_every=3)
  assert course.validated == [("x", 2), ("x", 4), ("x", 6), ("x", 7)]
  assert [step for step, _ in course.saves] == [3, 6, 7]


def test_a_checkpoint_holds_the_best_of_the_validation_before_it():
  arm, _ = make_arm()
  course = Course({"x": arm}, {("x", 2): 0.7})
  course.run(2, every=2, save_every=2)
  assert course.saves == [(2, {"x": (0.7, "")})]


def test_the_best_weights_are_kept_not_the_last_and_ties_go_to_the_first():
  arm, _ = make_arm()
  scores = {("x", 2): 0.6, ("x", 4): 0.9, ("x", 6): 0.9, ("x", 8): 0.8}
  Course({"x": arm}, scores).run(8)
  assert arm.best["score"] == 0.9
  assert arm.best["step"] == 4
  assert arm.best["variables"]["params"]["w"] == 4
  assert arm.state.params["network"]["w"] == 8


def test_a_best_from_before_a_stop_is_beaten_only_by_a_better_one():
  arm, _ = make_arm()
  arm.best = {"variables": "old", "score": 0.8, "step": 1}
  Course({"x": arm}, {("x", 2): 0.7}).run(2)
  assert arm.best["variables"] == "old"


def test_arms_of_a_kind_are_updated_by_one_program_on_every_batch():
  kind, seen = make_kind("abc")
  lone, seen_lone = make_arm()
  course = Course({**kind, "x": lone}, {("b", 2): 0.9})
  course.run(4, save_every=0, at_once=8)
  assert seen == [(at, [0, 1, 2]) for at in range(4)]
  assert [at for at, _ in seen_lone] == [0, 1, 2, 3]
  # Each has its own metrics, weights and best.
  assert course.of("c", "task") == [(2, 2.5), (4, 4.5)]
  assert course.of("x", "task") == [(2, 1.5), (4, 3.5)]
  assert [int(arm.state.step) for arm in kind.values()] == [4, 4, 4]
  assert [int(arm.state.seed) for arm in kind.values()] == [0, 1, 2]
  assert [arm.best["step"] for arm in kind.values()] == [2, 2, 2]
  assert [arm.best["score"] for arm in kind.values()] == [0.5, 0.9, 0.5]


def test_no_more_than_so_many_are_updated_at_once():
  kind, seen = make_kind("abcd")
  Course(kind).run(1, at_once=2)
  assert seen == [(0, [0, 1]), (0, [2, 3])]


def test_one_alone_of_its_kind_is_not_stacked():
  kind, seen = make_kind("abc")
  lone, seen_lone = make_arm()
  kind["c"].step = lone.step
  Course(kind).run(1, at_once=2)
  assert seen == [(0, [0, 1])]
  assert [at for at, _ in seen_lone] == [0]


def test_one_that_diverges_among_its_kind_is_left_behind_alone():
  kind, seen = make_kind("abc", bad=[(1, 2)])
  course = Course(kind)
  course.run(6, at_once=8)
  assert kind["b"].diverged == "loss not finite at step 2, batch of a2, b2"
  assert not kind["a"].diverged
  assert not kind["c"].diverged
  assert [(name, step) for name, step, _ in course.bad] == [("b", 2)]
  # Of fewer, it would be another program.
  assert all(places == [0, 1, 2] for _, places in seen)
  assert ("b", 4) not in course.validated
  assert ("c", 6) in course.validated


def test_a_kind_that_diverged_is_not_updated_any_more():
  kind, seen = make_kind("ab", bad=[(0, 1), (1, 1)])
  lone, _ = make_arm()
  Course({**kind, "x": lone}).run(6, at_once=8)
  assert [at for at, _ in seen] == [0, 1]


def test_after_a_stop_it_is_the_same_program_though_an_arm_had_diverged():
  kind, seen = make_kind("abc")
  kind["b"].diverged = "loss not finite at step 1"
  course = Course(kind)
  course.run(4, first_step=2, save_every=0, at_once=8)
  assert seen == [(2, [0, 1, 2]), (3, [0, 1, 2])]
  assert {name for name, _ in course.validated} == {"a", "c"}
  assert course.of("b", "task") == []


def test_asked_to_stop_it_saves_what_one_program_has_done_for_all():
  kind, _ = make_kind("ab")
  course = Course(kind)
  with pytest.raises(preemption.StoppedError):
    course.run(6, every=0, save_every=0, at_once=8, stop=lambda: True)
  assert [int(arm.state.step) for arm in kind.values()] == [1, 1]


def test_logs_the_mean_of_the_interval_under_the_arm_and_the_step():
  arm, _ = make_arm()
  course = Course({"x": arm})
  course.run(4, every=0, save_every=0, log_every=2)
  # `task` is 1 + step: (1 + 2) / 2 and (3 + 4) / 2.
  assert course.of("x", "task") == [(2, 1.5), (4, 3.5)]
  assert {r["stage"] for r in course.records} == {"students"}


def test_starts_from_the_first_step_it_is_given():
  arm, seen = make_arm()
  course = Course({"x": arm})
  course.run(6, every=0, save_every=0, first_step=4)
  assert [at for at, _ in seen] == [4, 5]
  assert [step for step, _ in course.saves] == [6]


def test_asked_to_stop_it_saves_the_step_it_has_done():
  arm, seen = make_arm()
  course = Course({"x": arm})
  asked = iter([False, True])
  with pytest.raises(preemption.StoppedError, match="after step 2 of 6"):
    course.run(6, every=0, save_every=0, stop=lambda: next(asked))
  assert [at for at, _ in seen] == [0, 1]
  assert [step for step, _ in course.saves] == [2]


def test_at_the_last_step_it_is_not_asked_to_stop():
  arm, _ = make_arm()
  course = Course({"x": arm})
  asked = iter([False, False])
  course.run(3, every=0, save_every=0, stop=lambda: next(asked))
  assert [step for step, _ in course.saves] == [3]


def test_a_diverged_arm_is_named_with_its_batch_and_the_others_are_trained_on():
  good, seen_good = make_arm()
  sick, seen_sick = make_arm(bad_steps=(2, 3))
  course = Course({"good": good, "sick": sick}, {("sick", 2): 0.4})
  course.run(6, save_every=0)
  assert len(seen_good) == 6
  assert [at for at, _ in seen_sick] == [0, 1, 2, 3]
  assert sick.diverged == "loss not finite at step 2, batch of a2, b2"
  assert not good.diverged
  # The weights it had while it was sound are kept.
  assert sick.best["step"] == 2
  assert ("sick", 4) not in course.validated
  assert [(arm, step) for arm, step, _ in course.bad] == [("sick", 2)]
  [record] = [r for r in course.records if "non_finite" in r]
  assert record["non_finite"] == ["loss"]
  assert record["ids"] == ["a2", "b2"]


def test_divergence_is_seen_before_the_checkpoint_that_would_hide_it():
  good, _ = make_arm()
  sick, _ = make_arm(bad_steps=(0,))
  course = Course({"good": good, "sick": sick})
  course.run(2, every=0, save_every=1, log_every=0)
  for _, held in course.saves:
    assert held["sick"][1].startswith("loss not finite at step 0")
  assert [step for step, _ in course.saves] == [1, 2]


def test_an_arm_that_had_diverged_before_a_stop_is_left_alone():
  good, _ = make_arm()
  sick, seen = make_arm()
  sick.diverged = "loss not finite at step 1"
  Course({"good": good, "sick": sick}).run(4, first_step=2)
  assert not seen


def test_raises_when_no_arm_is_left_and_says_why_for_each():
  sick, _ = make_arm(bad_steps=(0, 1))
  ill, _ = make_arm(bad_steps=(1,))
  course = Course({"sick": sick, "ill": ill})
  with pytest.raises(loop.DivergedError) as error:
    course.run(6, save_every=0)
  message = str(error.value)
  assert "students: no arm is left at step 2" in message
  assert "sick: loss not finite at step 0, batch of a0, b0" in message
  assert "ill: loss not finite at step 1, batch of a1, b1" in message
  assert not course.saves


def test_skipping_leaves_out_a_lone_bad_batch_and_saves_it(caplog):
  arm, seen = make_arm(bad_steps=(2,))
  course = Course({"x": arm})
  with caplog.at_level(logging.WARNING, logger="kdseg"):
    course.run(6, save_every=0, on_non_finite="skip")
  assert len(seen) == 6
  assert not arm.diverged
  assert [(name, step) for name, step, _ in course.bad] == [("x", 2)]
  assert "skipped 1 update(s)" in caplog.text
  assert "a2, b2" in caplog.text


def test_a_skipped_step_has_no_part_in_the_means_that_are_logged():
  arm, _ = make_arm(bad_steps=(2,))
  course = Course({"x": arm})
  course.run(6, save_every=0, on_non_finite="skip")
  logged = [r for r in course.records if "task" in r]
  assert len(logged) == 3
  for record in logged:
    assert all(
      math.isfinite(v) for v in record.values() if isinstance(v, float)
    )


@pytest.mark.parametrize("log_every", [0, 1, 3, 7])
def test_skipping_ends_after_so_many_in_a_row_wherever_they_fall(log_every):
  most = loop.SKIPPED_AT_MOST
  # A whole row but one, a sound step, and a whole row.
  bad = [*range(1, most), *range(most + 1, 2 * most + 1)]
  arm, seen = make_arm(bad_steps=bad)
  course = Course({"x": arm})
  with pytest.raises(loop.DivergedError):
    course.run(
      3 * most, every=5, log_every=log_every, save_every=0, on_non_finite="skip"
    )
  assert 2 * most + 1 <= len(seen) <= 2 * most + 7
  assert arm.diverged
  for record in course.records:
    assert all(not isinstance(v, float) or v == v for v in record.values())


def test_a_row_of_skipped_steps_is_counted_over_a_stop():
  arm, seen = make_arm(bad_steps=range(3, 30))
  arm.skipped = loop.SKIPPED_AT_MOST - 2
  with pytest.raises(loop.DivergedError):
    Course({"x": arm}).run(
      9, save_every=0, log_every=1, first_step=3, on_non_finite="skip"
    )
  assert len(seen) == 2


def test_progress_says_how_far_and_how_long(caplog):
  arm, _ = make_arm()
  with caplog.at_level(logging.INFO, logger="kdseg"):
    Course({"x": arm}).run(4)
  assert "students: step 2/4 (50 %)" in caplog.text
  assert "ETA" in caplog.text
  assert "validation Dice 0.5000 (best so far)" in caplog.text
