import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kdseg.runtime import devices
from kdseg.training import prepare as prepare_lib
from kdseg.training import settings

TEACHER = tiny.Network(5)


@functools.cache
def teacher_variables():
  return TEACHER.init(
    jax.random.key(1), jnp.zeros((1, tiny.SIDE, tiny.SIDE, 3))
  )


# ----------------------------------------------------------- prepare and teach


def convert(keys, image, mask):
  return image.astype(jnp.float32) / 255.0, mask.astype(jnp.float32)


def prepare(batch, teach=None):
  """`prepare` on one device, without compiling."""
  return jax.vmap(
    prepare_lib.make_prepare(convert, teach),
    (None, None, None, 0),
    axis_name=devices.AXIS,
  )(jnp.int32(0), jnp.int32(0), {"bias": 2.0}, batch)


def test_the_teacher_sees_the_augmented_image():
  batch = {
    "image": np.full((1, 2, 4, 4, 3), 255, np.uint8),
    "mask": np.ones((1, 2, 4, 4), np.uint8),
  }
  found = prepare(batch, lambda v, image: {"low": image + v["bias"]})
  np.testing.assert_array_equal(found["teacher_out"]["low"], 3.0)
  assert found["mask"].dtype == jnp.float32


def test_teacher_outputs_that_come_with_the_batch_are_passed_on():
  batch = {
    "image": np.zeros((1, 2, 4, 4, 3), np.uint8),
    "mask": np.zeros((1, 2, 4, 4), np.uint8),
    "teacher_out": {"low": np.full((1, 2, 1), 0.5, np.float16)},
    "encoder_features": {"grids": np.full((1, 2, 1), 0.25, np.float16)},
  }

  def unwanted(*arguments):
    raise AssertionError("the teacher ran")

  found = prepare(batch, unwanted)
  assert found["teacher_out"]["low"].dtype == jnp.float32
  np.testing.assert_array_equal(found["teacher_out"]["low"], 0.5)
  np.testing.assert_array_equal(found["encoder_features"]["grids"], 0.25)


def test_without_a_teacher_there_are_no_teacher_outputs():
  batch = {
    "image": np.zeros((1, 2, 4, 4, 3), np.uint8),
    "mask": np.zeros((1, 2, 4, 4), np.uint8),
  }
  assert set(prepare(batch)) == {"image", "mask"}


def test_a_teacher_hands_over_its_logits_and_the_taps_asked_for():
  image = jnp.asarray(tiny.draw_lesions(2)[0]) / 255.0
  whole = TEACHER.apply(teacher_variables(), image)
  found = prepare_lib.make_teach(TEACHER, ("high",))(teacher_variables(), image)
  assert set(found) == {"logits", "high"}
  for name, value in found.items():
    np.testing.assert_array_equal(value, whole[name])


def test_wide_taps_are_projected_and_narrow_ones_left():
  image = jnp.asarray(tiny.draw_lesions(1)[0]) / 255.0
  teach = prepare_lib.make_teach(TEACHER, ("low", "high"), channels=5)
  found = teach(teacher_variables(), image)
  # 5 channels at stride 4, 6 at stride 8.
  assert found["low"].shape[-1] == found["high"].shape[-1] == 5
  whole = TEACHER.apply(teacher_variables(), image)
  np.testing.assert_array_equal(found["low"], whole["low"])


def test_no_gradient_reaches_the_teacher():
  teach = prepare_lib.make_teach(TEACHER, ("low", "high"))
  image = jnp.asarray(tiny.draw_lesions(2)[0]) / 255.0

  def total(variables):
    return sum(jnp.sum(jnp.square(x)) for x in teach(variables, image).values())

  variables = teacher_variables()
  assert total(variables) > 0
  gradient = jax.grad(total)(variables)
  assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


# --------------------------------------------------------------------- prepare

COLOURS = ("brightness", "contrast", "saturation", "hue", "gain", "tone")


@pytest.mark.parametrize("oriented", [False, True])
def test_what_was_oriented_before_is_not_moved_again(oriented):
  run_config = settings.RunConfig(
    seed=0, batch_size=8, evaluation_batch_size=4, size=tiny.SIDE,
    segmentation={"bce": 1.0}, augment=dict.fromkeys(COLOURS, 0.0),
    encoder_weights=False, log_every=1,
  )  # fmt: skip
  prepare = prepare_lib.parallel_prepare(run_config, None, None, oriented)
  image, mask = tiny.draw_lesions(8)
  prepared = prepare(0, devices.shard({"image": image, "mask": mask}))
  found = np.asarray(prepared["mask"]).reshape(mask.shape)
  assert (found == mask).all() == oriented
  if oriented:
    np.testing.assert_allclose(
      np.asarray(prepared["image"]).reshape(image.shape), image / 255, atol=1e-6
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
