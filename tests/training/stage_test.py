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
from kdseg.training import checkpoints
from kdseg.training import loop
from kdseg.training import prepare as prepare_lib
from kdseg.training import settings
from kdseg.training import stage
from kdseg.training import state as state_lib

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


# ------------------------------------------------------------------ schedules


@pytest.mark.parametrize(
  ("options", "expected"),
  [
    ({"epochs": 2.0}, 20),
    ({"epochs": 0.25}, 3),
    ({"epochs": 2.0, "max_steps": 7}, 7),
  ],
)
def test_epochs_or_steps(options, expected):
  training = settings.TrainConfig(learning_rate=0.1, **options)
  assert training.steps(examples=80, batch_size=8) == expected


# ------------------------------------------------------------------ distillers


def shapes(**taps):
  return {
    name: jax.ShapeDtypeStruct((1, side, side, channels), jnp.float32)
    for name, (side, channels) in taps.items()
  }


def test_a_distiller_meets_the_teachers_grids_and_channels():
  module, (features, grids) = arms_lib.make_distiller(
    tiny.Network(3),
    shapes(low=(8, 5), high=(3, 7), s16=(2, 9)),
    method_lib.Method(terms={"m2bf": 1.0}, heads=2, generator_width=4),
    size=tiny.SIDE,
  )
  assert module.taps == {"low": 5, "high": 7}
  assert module.heads == 2
  assert module.width == 4
  assert {tap: x.shape for tap, x in features.items()} == {
    "low": (1, 8, 8, 3),
    "high": (1, 4, 4, 4),
  }
  assert grids == {"low": (8, 8), "high": (3, 3)}


def test_logits_need_no_distiller():
  module, inputs = arms_lib.make_distiller(
    tiny.Network(3), {}, method_lib.Method(terms={"kd": 1.0}), size=tiny.SIDE
  )
  assert module is None
  assert inputs == ((), ())


@pytest.mark.parametrize(
  ("teacher_out", "tap", "message"),
  [
    (shapes(low=(8, 5)), "high", "the teacher has no tap 'high', only low"),
    (
      shapes(decoder_low=(8, 5)),
      "decoder_low",
      "the student has no tap 'decoder_low', only high, logits, low, s16",
    ),
  ],
)
def test_a_missing_tap_is_named_with_those_there_are(teacher_out, tap, message):
  method = method_lib.Method(terms={"mbf": 1.0}, taps=(tap,))
  with pytest.raises(ValueError, match=message):
    arms_lib.make_distiller(
      tiny.Network(3), teacher_out, method, size=tiny.SIDE
    )


# ------------------------------------------------------------------ deviations


def measure(values, count=16):
  """`values` by batch, each [devices, B, h, w, C]."""
  return prepare_lib.measure_teacher_std(
    lambda first: (
      (i, {"teacher_out": {"low": x, "logits": None}}, {})
      for i, x in enumerate(values)
    ),
    count,
  )


def test_deviations_are_over_all_cells_of_all_batches_by_channel():
  values = np.random.default_rng(0).normal(3, 2, (2, 4, 2, 5, 5, 3))
  found = measure(values)
  assert set(found) == {"low"}
  np.testing.assert_allclose(
    found["low"], values.reshape(-1, 3).std(0), rtol=1e-5
  )
  assert found["low"].dtype == np.float32


def test_only_the_first_batches_are_measured():
  values = np.random.default_rng(0).normal(0, 1, (3, 1, 2, 5, 5, 3))
  np.testing.assert_array_equal(
    measure(values, count=2)["low"], measure(values[:2])["low"]
  )


def test_a_channel_that_never_varies_is_not_divided_by_nothing():
  values = np.random.default_rng(0).normal(0, 1, (1, 1, 8, 8, 8, 2))
  values[..., 1] = 4.0
  steady, varied = measure(values)["low"][1], measure(values)["low"][0]
  np.testing.assert_allclose(steady, 1e-3 * varied, rtol=1e-5)


# --------------------------------------------------------------------- prepare

COLOURS = ("brightness", "contrast", "saturation", "hue", "gain", "tone")


@pytest.mark.parametrize("oriented", [False, True])
def test_what_was_oriented_before_is_not_moved_again(oriented):
  run_config = dataclasses.replace(SETTING, augment=dict.fromkeys(COLOURS, 0.0))
  prepare = prepare_lib.parallel_prepare(run_config, None, None, oriented)
  image, mask = tiny.draw_lesions(8)
  prepared = prepare(0, devices.shard({"image": image, "mask": mask}))
  found = np.asarray(prepared["mask"]).reshape(mask.shape)
  assert (found == mask).all() == oriented
  if oriented:
    np.testing.assert_allclose(
      np.asarray(prepared["image"]).reshape(image.shape), image / 255, atol=1e-6
    )


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
def test_contenders_train_stop_go_on_and_leave_their_best(
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


def test_arms_that_are_alike_share_the_programs_that_draw_them(
  tmp_path, monkeypatch
):
  made, on_cpu = [], arms_lib.networks.on_cpu

  def noted(function):
    made.append(function)
    return on_cpu(function)

  monkeypatch.setattr(arms_lib.networks, "on_cpu", noted)
  network = tiny.Network(2, axis_name=devices.AXIS)
  method = method_lib.make_method(
    {"terms": {"mbf": 1.0}, "taps": ("low",), "generator": "1x1"}
  )
  distiller, inputs = arms_lib.make_distiller(
    network, shapes(low=(8, 5)), method, size=tiny.SIDE
  )
  specs = {}
  for seed in (0, 1):
    plain = spec(tmp_path, network=network, seed=seed)
    specs[f"none{seed}"] = plain
    for kind in ("mbf", "rolled"):
      specs[f"{kind}{seed}"] = dataclasses.replace(
        plain,
        kind=kind,
        method=method,
        distiller=distiller,
        distiller_inputs=inputs,
      )
  arms = arms_lib.make_arms(specs, SETTING, TRAINING, steps=4)
  # One for the network, one for what mbf and rolled train beside it.
  assert len(made) == 2
  image = jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3))
  for seed in (0, 1):
    rng = jax.random.key(seed)
    drawn = network.init(jax.random.fold_in(rng, 0), image)
    zeros = {"low": jnp.zeros((1, 8, 8, 2))}
    beside = distiller.init(jax.random.fold_in(rng, 1), zeros, {"low": (8, 8)})
    for kind in ("none", "mbf", "rolled"):
      params = arms[f"{kind}{seed}"].state.params
      assert_same(params["network"], drawn["params"])
      assert_same(
        params["distiller"], {} if kind == "none" else beside["params"]
      )


def assert_same(found, expected):
  # Drawn by a program of another form, so equal up to rounding.
  compare = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
  jax.tree.map(compare, found, dict(expected))


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
    network, shapes(low=(8, 5)), method, size=tiny.SIDE
  )
  records = []
  for at_once, lone in ((1, [0, 1, 2] * 4), (2, [2] * 4), (3, [])):
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

  for stacked in records[1:]:
    assert len(stacked) == len(records[0])
    for a, b in zip(by_arm(stacked), by_arm(records[0])):
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

  def run(folder, **options):
    train_together(
      folder,
      {n: spec(folder / n, seed=i) for i, n in enumerate("abc")},
      run_config=dataclasses.replace(SETTING, seeds_at_once=3),
      **options,
    )

  def pull_the_plug(record):
    if record["step"] == 3:
      raise KeyboardInterrupt

  whole, torn, sound = (tmp_path / n for n in ("whole", "torn", "sound"))
  run(whole)
  with pytest.raises(KeyboardInterrupt):
    run(torn, log=pull_the_plug)
  run(torn)
  sick.clear()
  run(sound)
  for folder in (whole, torn):
    for name in "ac":
      jax.tree.map(
        np.testing.assert_array_equal,
        variables_of(folder / name),
        variables_of(sound / name),
      )
    about = json.loads((folder / "b" / "failed.json").read_text())
    assert "not finite at step 0" in about["diverged"]
  assert checkpoint.is_finished(sound / "b")


@pytest.mark.parametrize(
  ("backend", "hosts", "wanted", "expected"),
  [
    ("cpu", 1, 0, 1),
    ("tpu", 1, 0, 1),
    ("gpu", 1, 0, 8),
    ("gpu", 2, 0, 1),
    ("gpu", 1, 1, 1),
    ("gpu", 2, 4, 4),
    ("cpu", 1, 3, 3),
  ],
)
def test_the_backend_decides_how_many_seeds_where_nobody_does(
  monkeypatch, backend, hosts, wanted, expected
):
  monkeypatch.setattr(jax, "default_backend", lambda: backend)
  monkeypatch.setattr(jax, "process_count", lambda: hosts)
  assert settings.seeds_at_once(wanted) == expected


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


# ---------------------------------------------------------------- checkpoints


def make_arm(value, **options):
  params = {"network": {"w": jnp.full(2, value)}, "distiller": {}}
  state = state_lib.TrainState(
    step=jnp.asarray(3, jnp.int32),
    seed=jnp.asarray(1, jnp.int32),
    params=params,
    batch_stats={},
    opt_state=(),
    average={},
    balance={"task": jnp.asarray(0.5)},
  )
  return arms_lib.ArmState(state, step=None, **options)


def test_arms_come_back_with_their_best_and_their_failures(tmp_path):
  best = {"params": {"w": np.full(2, 7.0, np.float32)}, "batch_stats": {}}
  arms = {
    "good": make_arm(1.0, best={"variables": best, "score": 0.75, "step": 2}),
    "sick": make_arm(2.0, diverged="loss not finite at step 1"),
  }
  with checkpoint.open_checkpoints(tmp_path) as manager:
    checkpoints.save(manager, 3, arms)
    fresh = {"good": make_arm(0.0), "sick": make_arm(0.0)}
    assert checkpoints.resume(manager, fresh, "students", 9) == 3
  for name, arm in arms.items():
    np.testing.assert_array_equal(
      fresh[name].state.params["network"]["w"],
      arm.state.params["network"]["w"],
    )
    assert fresh[name].state.params["distiller"] == {}
    assert fresh[name].diverged == arm.diverged
  assert fresh["good"].best["score"] == 0.75
  assert fresh["good"].best["step"] == 2
  np.testing.assert_array_equal(
    fresh["good"].best["variables"]["params"]["w"], [7, 7]
  )
  assert fresh["sick"].best == {}


def test_an_arm_without_weights_leaves_a_reason_in_their_place(tmp_path):
  arm = make_arm(1.0, diverged="loss not finite at step 1")
  checkpoints.write_result(spec(tmp_path / "x"), arm, steps=9)
  assert not checkpoint.is_finished(tmp_path / "x")
  about = json.loads((tmp_path / "x" / "failed.json").read_text())
  assert about["diverged"] == "loss not finite at step 1"
  assert about["arm"] == "plain"


@pytest.mark.parametrize("own", [{}, {"smoothed_bce": 1.0, "dice": 0.5}])
def test_a_task_loss_of_its_own_takes_the_place_of_that_of_the_run(
  own, monkeypatch, tmp_path
):
  asked = []

  def remember(*arguments, segmentation, **options):
    asked.append(segmentation)
    return lambda state, batch: (state, {})

  monkeypatch.setattr(arms_lib.step_lib, "make_train_step", remember)
  arm = dataclasses.replace(
    spec(tmp_path), method=method_lib.Method(segmentation=own)
  )
  arms_lib.make_arms({"plain": arm}, SETTING, TRAINING, steps=1)
  assert asked == [own or SETTING.segmentation]
