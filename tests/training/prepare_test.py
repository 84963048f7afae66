import numpy as np
import pytest
import tiny

from kdseg.runtime import devices
from kdseg.training import prepare as prepare_lib
from kdseg.training import settings

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
