import numpy as np
import pytest

from kdseg.data import orientations as orientations_lib
from kdseg.training import cached_outputs

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 4, 3), np.uint8)


def describe(images):
  """A network in small: one number an image, one map an image."""
  values = images.astype(np.float32) / 16
  return {"mean": values.mean((1, 2, 3)), "grid": values[..., 0]}


class InterruptionError(Exception):
  pass


class Counting:
  """Calls `function`, and stops for good after `limit` calls."""

  def __init__(self, function=describe, limit=None):
    self.function = function
    self.limit = limit
    self.calls = 0

  def __call__(self, *arguments):
    if self.calls == self.limit:
      raise InterruptionError
    self.calls += 1
    return self.function(*arguments)


def compute(
  function, directory, *, images=IMAGES, key="k", batch_size=2, **options
):
  return cached_outputs.compute(
    function, images, directory, batch_size=batch_size, key=key, **options
  )


def test_orientations_are_the_eight_and_all_different():
  image = np.arange(9).reshape(1, 3, 3)
  views = {orientations_lib.orient(image, o).tobytes() for o in range(8)}
  assert len(views) == 8
  np.testing.assert_array_equal(orientations_lib.orient(image, 0), image)
  # A quarter turn against the clock puts the right column on top.
  np.testing.assert_array_equal(
    orientations_lib.orient(image, 1)[0], [[2, 5, 8], [1, 4, 7], [0, 3, 6]]
  )
  np.testing.assert_array_equal(
    orientations_lib.orient(image, 4)[0], [[2, 1, 0], [5, 4, 3], [8, 7, 6]]
  )


@pytest.mark.parametrize("orientation", range(8))
@pytest.mark.parametrize("shape", [(2, 4, 4), (2, 3, 5, 2)])
def test_restore_undoes_orient(orientation, shape):
  array = np.random.default_rng(1).random(shape)
  there = orientations_lib.orient(array, orientation)
  np.testing.assert_array_equal(
    orientations_lib.restore_orientation(there, orientation), array
  )


@pytest.mark.parametrize("orientation", [-1, 8])
def test_there_is_no_ninth_orientation(orientation):
  with pytest.raises(ValueError, match="0 to 7"):
    orientations_lib.orient(IMAGES, orientation)


def test_each_example_has_its_own_orientation():
  orientations = np.array([3, 0, 7, 4, 1])
  oriented = orientations_lib.orient_each(IMAGES, orientations)
  for image, orientation, view in zip(IMAGES, orientations, oriented):
    np.testing.assert_array_equal(
      orientations_lib.orient(image[None], orientation)[0], view
    )


def test_draws_hang_on_seed_and_step_and_reach_all_eight():
  draw = orientations_lib.draw_orientations
  np.testing.assert_array_equal(draw(1, 2, 50), draw(1, 2, 50))
  assert (draw(1, 2, 50) != draw(1, 3, 50)).any()
  assert (draw(1, 2, 50) != draw(2, 2, 50)).any()
  assert set(draw(0, 0, 400)) == set(range(8))


def test_outputs_are_those_of_each_orientation_without_the_padding(tmp_path):
  found = compute(describe, tmp_path)
  for orientation in range(8):
    expected = describe(orientations_lib.orient(IMAGES, orientation))
    for name, values in expected.items():
      assert found[name].shape == (8, *values.shape)
      np.testing.assert_array_equal(
        found[name][orientation], values.astype(np.float16)
      )


def test_every_call_gets_a_whole_batch_padded_with_zeros(tmp_path):
  given = []

  def record(images):
    given.append(images.copy())
    return describe(images)

  compute(record, tmp_path, orientations=1)
  assert [len(images) for images in given] == [2, 2, 2]
  assert not given[-1][1].any()
  np.testing.assert_array_equal(given[-1][0], IMAGES[4])


def test_a_second_call_reads_what_the_first_computed(tmp_path):
  first = compute(describe, tmp_path)
  again = Counting()
  second = compute(again, tmp_path)
  assert not again.calls
  for name in first:
    np.testing.assert_array_equal(first[name], second[name])


def test_resumes_where_it_was_interrupted(tmp_path):
  # 24 batches in all, recorded as done every 16.
  with pytest.raises(InterruptionError):
    compute(Counting(limit=20), tmp_path)
  rest = Counting()
  found = compute(rest, tmp_path)
  assert rest.calls == 24 - 16
  np.testing.assert_array_equal(
    found["grid"], compute(describe, tmp_path / "whole")["grid"]
  )


def test_resumes_in_batches_of_another_size(tmp_path):
  with pytest.raises(InterruptionError):
    compute(Counting(limit=20), tmp_path)
  rest = Counting()
  # 16 batches, three for the five images of an orientation, are 27 images.
  found = compute(rest, tmp_path, batch_size=1)
  assert rest.calls == 40 - 27
  np.testing.assert_array_equal(
    found["grid"], compute(describe, tmp_path / "whole")["grid"]
  )


def test_another_key_computes_again_and_leaves_nothing_of_the_old(tmp_path):
  compute(describe, tmp_path, key="old")
  other = Counting(lambda images: {"mean": describe(images)["mean"] + 1})
  found = compute(other, tmp_path, key="new")
  assert other.calls == 24
  np.testing.assert_array_equal(
    found["mean"][0], (describe(IMAGES)["mean"] + 1).astype(np.float16)
  )
  assert set(compute(other, tmp_path, key="new")) == {"mean"}


def test_another_number_of_orientations_computes_again(tmp_path):
  compute(describe, tmp_path, orientations=1)
  more = Counting()
  assert compute(more, tmp_path, orientations=2)["mean"].shape == (2, 5)
  assert more.calls == 6


@pytest.mark.parametrize("limit", [3, 18])
def test_what_another_key_left_half_done_is_not_used(tmp_path, limit):
  compute(describe, tmp_path, key="old")
  with pytest.raises(InterruptionError):
    compute(
      Counting(lambda images: {"mean": images.mean((1, 2, 3)) + 1}, limit),
      tmp_path,
      key="new",
    )
  again = Counting()
  found = compute(again, tmp_path, key="old")
  assert again.calls == 24
  np.testing.assert_array_equal(
    found["mean"][0], describe(IMAGES)["mean"].astype(np.float16)
  )


def test_extra_arrays_come_with_their_example_and_orientation(tmp_path):
  extra = {"code": np.arange(2 * 5).reshape(2, 5).astype(np.float32)}

  def both(images, given):
    assert set(given) == {"code"}
    return {"code": given["code"], "mean": describe(images)["mean"]}

  found = compute(both, tmp_path, orientations=2, extra=extra)
  np.testing.assert_array_equal(found["code"], extra["code"])


def test_progress_counts_images_up_to_all(tmp_path):
  told = []
  compute(
    describe,
    tmp_path,
    orientations=2,
    progress=lambda *pair: told.append(pair),
  )
  assert told == [(2, 10), (4, 10), (5, 10), (7, 10), (9, 10), (10, 10)]


def test_the_average_is_that_of_eight_outputs_turned_back():
  # A network that prefers the left: its answer depends on the orientation.
  ramp = np.linspace(0, 1, 4, dtype=np.float32)[None, None]
  views = [
    orientations_lib.orient(IMAGES[..., 0] / 255 * ramp, o) for o in range(8)
  ]
  answers = [
    orientations_lib.orient(IMAGES[..., 0], o) / 255 * ramp for o in range(8)
  ]
  files = {"map": np.stack(answers).astype(np.float16)}
  found = cached_outputs.average(files)["map"]
  assert found.shape == (1, 5, 4, 4)
  assert found.dtype == np.float16
  expected = np.mean(
    [orientations_lib.restore_orientation(a, o) for o, a in enumerate(answers)],
    0,
  )
  np.testing.assert_allclose(found[0], expected, atol=1e-3)
  # Turned and averaged is averaged and turned.
  turned = {"map": np.stack([views[o] for o in range(8)])}
  np.testing.assert_allclose(
    cached_outputs.average(turned)["map"][0], views[0], atol=1e-3
  )
