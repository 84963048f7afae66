import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kdseg.distill import method as method_lib
from kdseg.runtime import devices
from kdseg.training import arms as arms_lib
from kdseg.training import settings

RUN = settings.RunConfig(
  seed=0, batch_size=8, evaluation_batch_size=4, size=tiny.SIDE,
  segmentation={"bce": 1.0}, augment={}, encoder_weights=False, log_every=1,
)  # fmt: skip
TRAINING = settings.TrainConfig(epochs=2.0, learning_rate=0.05)


def spec(folder, *, network=None, seed=0, **options):
  return arms_lib.ArmSpec(
    kind=options.pop("kind", "plain"),
    network=network or tiny.Network(2, axis_name=devices.AXIS),
    seed=seed,
    destination=folder,
    about={"arm": "plain"},
    **options,
  )


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


# ------------------------------------------------------------------------ arms


@pytest.mark.parametrize("own", [{}, {"smoothed_bce": 1.0, "dice": 0.5}])
def test_a_methods_segmentation_loss_takes_the_place_of_the_runs(
  own, monkeypatch, tmp_path
):
  asked = []

  def remember(*arguments, segmentation, **options):
    asked.append(segmentation)

  monkeypatch.setattr(arms_lib.step_lib, "make_train_step", remember)
  monkeypatch.setattr(arms_lib, "_map_update", lambda *_: (None, None))
  arms_lib.make_arms(
    {"a": spec(tmp_path, method=method_lib.Method(segmentation=own))},
    RUN,
    TRAINING,
    steps=4,
  )
  assert asked == [own or RUN.segmentation]


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
  arms = arms_lib.make_arms(specs, RUN, TRAINING, steps=4)
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
