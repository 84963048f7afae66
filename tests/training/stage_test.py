import dataclasses
import functools
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kdseg.data import loading
from kdseg.distill import method as method_lib
from kdseg.runtime import checkpoint
from kdseg.runtime import devices
from kdseg.training import arms as arms_lib
from kdseg.training import loop
from kdseg.training import prepare as prepare_lib
from kdseg.training import settings
from kdseg.training import stage

TRAINING = settings.TrainConfig(
  epochs=2.0, learning_rate=0.05, validate_epochs=1.0, save_epochs=1.0
)
SETTING = settings.RunConfig(
  seed=0,
  batch_size=8,
  evaluation_batch_size=4,
  size=tiny.SIDE,
  segmentation={"bce": 1.0},
  augment={"rotate": 0.0},
  encoder_weights=False,
  log_every=1,
)


@pytest.fixture(scope="module", autouse=True)
def compiled(tmp_path_factory):
  with tiny.compile_once(tmp_path_factory.mktemp("compiled")):
    yield


def make_arrays(count=16, split="train"):
  image, mask = tiny.draw_lesions(count, seed=len(split))
  return loading.Arrays(
    name="synthetic",
    split=split,
    ids=tuple(f"{split}{i}" for i in range(count)),
    image=image,
    mask=mask,
    official_count=count,
    found_count=count,
  )


def spec(folder, *, network=None, seed=0):
  return arms_lib.ArmSpec(
    kind="plain",
    network=network or tiny.Network(2, axis_name=devices.AXIS),
    seed=seed,
    destination=folder,
    about={"arm": "plain"},
  )


def train_together(folder, specs, *, inputs=(), may=False, **changes):
  log = []
  options = {"run_config": SETTING, "training": TRAINING, "log": log.append}
  stage.train_together(
    stage.Stage("students", folder / "steps", all_may_diverge=may),
    specs,
    inputs=stage.Inputs(
      make_arrays(), make_arrays(4, "validation"), **dict(inputs)
    ),
    **{**options, **changes},
  )
  return log


# -------------------------------------------------------------------- training


class Poisoned(tiny.Network):
  """Its logits are never finite."""

  def __call__(self, image, train=False):
    out = super().__call__(image, train)
    return {**out, "logits": out["logits"] / 0.0}


def variables_of(folder):
  return checkpoint.load_variables(folder)[0]


@pytest.fixture
def lone_updates(monkeypatch):
  """Lists the updates of arms that no stack has, as they are made."""
  made, make_arms = [], arms_lib.make_arms

  def counted(update):
    def call(state, prepared):
      made.append(int(state.seed))
      return update(state, prepared)

    return call

  def make(*arguments):
    arms = make_arms(*arguments)
    for arm in arms.values():
      arm.step = counted(arm.step)
    return arms

  monkeypatch.setattr(arms_lib, "make_arms", make)
  return made


@pytest.mark.parametrize(("at_once", "lone"), [(1, {0, 1}), (2, set())])
def test_arms_train_stop_resume_and_leave_their_best(
  tmp_path, caplog, lone_updates, at_once, lone
):
  run_config = dataclasses.replace(SETTING, seeds_at_once=at_once)

  def make(folder):
    return {
      "a": spec(folder / "a"),
      "b": spec(folder / "b", seed=1),
    }

  whole, torn = tmp_path / "whole", tmp_path / "torn"
  train_together(whole, make(whole), run_config=run_config)

  def pull_the_plug(record):
    if record["step"] == 3:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    train_together(torn, make(torn), run_config=run_config, log=pull_the_plug)
  assert not checkpoint.is_finished(torn / "a")
  with caplog.at_level("INFO", logger="kdseg"):
    train_together(torn, make(torn), run_config=run_config)
  assert "resumes at step 2 of 4" in caplog.text
  for name in "ab":
    jax.tree.map(
      np.testing.assert_array_equal,
      variables_of(whole / name),
      variables_of(torn / name),
    )
    about = json.loads((torn / name / "about.json").read_text())
    assert about == json.loads((whole / name / "about.json").read_text())
    assert about["steps"] == 4
    assert about["best_step"] in (2, 4)
    assert 0 <= about["validation_dice"] <= 1
    assert about["parameters"] > 0
  kernels = [
    variables_of(whole / name)["params"]["head"]["kernel"] for name in "ab"
  ]
  assert (kernels[0] != kernels[1]).any()

  assert set(lone_updates) == lone

  # A finished stage is passed over without a step.
  assert train_together(torn, make(torn), run_config=run_config) == []

  # And its checkpoints are nobody else's.
  with pytest.raises(checkpoint.CheckpointError, match="holds the arms a, b"):
    train_together(torn, {"c": spec(torn / "c")})


def test_an_arm_has_the_same_bits_alone_and_in_company(tmp_path):
  alone, company = tmp_path / "alone", tmp_path / "company"
  train_together(alone, {"a": spec(alone / "a")})
  wide = dataclasses.replace(
    spec(
      company / "b", network=tiny.Network(4, axis_name=devices.AXIS), seed=1
    ),
    kind="wide",
  )
  train_together(company, {"b": wide, "a": spec(company / "a")})
  jax.tree.map(
    np.testing.assert_array_equal,
    variables_of(alone / "a"),
    variables_of(company / "a"),
  )


def test_seeds_at_once_are_what_they_are_one_by_one(tmp_path, lone_updates):
  network = tiny.Network(2, axis_name=devices.AXIS)
  teacher = tiny.Network(5)
  weights = teacher.init(
    jax.random.key(9), jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3))
  )
  method = method_lib.make_method(
    {"terms": {"mbf": 1.0, "kd": 1.0}, "taps": ("low",), "generator": "1x1"}
  )
  distiller, inputs = arms_lib.make_distiller(
    network,
    {"low": jax.ShapeDtypeStruct((1, 8, 8, 5), jnp.float32)},
    method,
    size=tiny.SIDE,
  )
  records = []
  for at_once, lone in ((1, [0, 1, 2] * 4), (2, [2] * 4)):
    folder = tmp_path / str(at_once)
    lone_updates.clear()
    records.append(
      train_together(
        folder,
        {
          str(seed): dataclasses.replace(
            spec(folder / str(seed), network=network, seed=seed),
            method=method,
            distiller=distiller,
            distiller_inputs=inputs,
          )
          for seed in range(3)
        },
        run_config=dataclasses.replace(SETTING, seeds_at_once=at_once),
        # Adam makes full steps of what is rounding noise.
        training=dataclasses.replace(TRAINING, optimizer="sgd"),
        inputs={
          "teach": prepare_lib.make_teach(teacher, ("low",)),
          "teacher_variables": weights,
        },
      )
    )
    assert lone_updates == lone
    for seed in range(3):
      jax.tree.map(
        functools.partial(np.testing.assert_allclose, rtol=1e-3, atol=1e-5),
        variables_of(folder / str(seed)),
        variables_of(tmp_path / "1" / str(seed)),
      )

  def by_arm(log):
    return sorted(log, key=lambda r: (r["arm"], r["step"], len(r)))

  one_by_one, stacked = (by_arm(log) for log in records)
  for a, b in zip(stacked, one_by_one, strict=True):
    assert a.keys() == b.keys()
    for key in a:
      if isinstance(a[key], str):
        assert a[key] == b[key]
      else:
        np.testing.assert_allclose(a[key], b[key], rtol=1e-3, atol=1e-5)


def test_one_that_diverges_among_its_kind_changes_nothing_for_the_others(
  tmp_path, monkeypatch
):
  make_arms, sick = arms_lib.make_arms, {"b"}

  def poison(*arguments):
    arms = make_arms(*arguments)
    for name in sick:
      state = jax.tree.map(np.asarray, arms[name].state)
      params = jax.tree.map(lambda x: x * np.nan, state.params)
      arms[name].state = devices.replicate(state.replace(params=params))
    return arms

  monkeypatch.setattr(arms_lib, "make_arms", poison)

  def run(folder):
    train_together(
      folder,
      {n: spec(folder / n, seed=i) for i, n in enumerate("abc")},
      run_config=dataclasses.replace(SETTING, seeds_at_once=3),
    )

  whole, sound = tmp_path / "whole", tmp_path / "sound"
  run(whole)
  sick.clear()
  run(sound)
  for name in "ac":
    jax.tree.map(
      np.testing.assert_array_equal,
      variables_of(whole / name),
      variables_of(sound / name),
    )
  about = json.loads((whole / "b" / "failed.json").read_text())
  assert "not finite at step 0" in about["diverged"]
  assert checkpoint.is_finished(sound / "b")


def test_one_that_diverges_says_why_and_saves_its_batch(tmp_path):
  with pytest.raises(loop.DivergedError, match="not finite at step 0"):
    train_together(
      tmp_path,
      {
        "sick": spec(
          tmp_path / "sick", network=Poisoned(2, axis_name=devices.AXIS)
        )
      },
    )
  assert not (tmp_path / "sick").exists()
  [path] = (tmp_path / "steps").glob("non_finite-sick-step0.npz")
  with np.load(path) as saved:
    assert saved["image"].shape == (8, tiny.SIDE, tiny.SIDE, 3)
    assert saved["image"].dtype == np.uint8
    assert saved["mask"].shape == (8, tiny.SIDE, tiny.SIDE)
    assert all(str(name).startswith("train") for name in saved["ids"])


def test_that_all_diverged_may_be_a_result(tmp_path):
  sick = spec(tmp_path / "sick", network=Poisoned(2, axis_name=devices.AXIS))
  train_together(tmp_path, {"sick": sick}, may=True)
  about = json.loads((tmp_path / "sick" / "failed.json").read_text())
  assert "not finite at step 0" in about["diverged"]
