import jax
import numpy as np
import pytest

from kdseg.data import loading
from kdseg.data import orientations
from kdseg.training import batches

SIDE, COUNT = 4, 10


def make_arrays():
  image = np.random.default_rng(0).integers(
    0, 256, (COUNT, SIDE, SIDE, 3), np.uint8
  )
  return loading.Arrays(
    name="synthetic",
    split="train",
    ids=tuple(f"id{i}" for i in range(COUNT)),
    image=image,
    # The mask tells from which image it is, and which way it is turned.
    mask=(image[..., 0] > 127).astype(np.uint8),
    official_count=COUNT,
    found_count=COUNT,
  )


def make_computed(arrays):
  """A network that answers with its own image, by orientation."""
  views = [orientations.orient(arrays.image, o) for o in range(8)]
  return {"teacher_out": {"copy": np.stack(views).astype(np.float16)}}


def feed_all(
  first_step=0, *, cached_outputs=None, seed=3, steps=6, batch_size=8
):
  made = batches.make_batches(
    make_arrays(),
    seed=seed,
    batch_size=batch_size,
    steps=steps,
    cached_outputs=cached_outputs,
  )
  return list(made(first_step))


def joined(x):
  return np.asarray(x).reshape(-1, *x.shape[2:])


def test_batches_are_split_over_the_devices_in_order():
  [(step, batch, batch_info), *_] = feed_all()
  devices = jax.local_device_count()
  assert step == 0
  assert batch["image"].shape == (devices, 8 // devices, SIDE, SIDE, 3)
  assert batch["image"].dtype == np.uint8
  assert set(batch) == {"image", "mask"}
  np.testing.assert_array_equal(joined(batch["image"]), batch_info["image"])
  np.testing.assert_array_equal(joined(batch["mask"]), batch_info["mask"])


def test_ids_name_the_examples():
  arrays = make_arrays()
  for _, _, batch_info in feed_all():
    for identity, image in zip(batch_info["ids"], batch_info["image"]):
      i = arrays.ids.index(identity)
      np.testing.assert_array_equal(image, arrays.image[i])


def test_image_mask_and_cached_outputs_are_turned_alike():
  for _, batch, _ in feed_all(cached_outputs=make_computed(make_arrays())):
    image = batch["image"]
    np.testing.assert_array_equal(batch["teacher_out"]["copy"], image)
    np.testing.assert_array_equal(batch["mask"], image[..., 0] > 127)


def test_a_map_known_once_is_turned_with_the_image():
  image = make_arrays().image.astype(np.float16)
  cached_outputs = {"teacher_out": {"copy": image[None]}}
  for _, batch, _ in feed_all(cached_outputs=cached_outputs):
    np.testing.assert_array_equal(batch["teacher_out"]["copy"], batch["image"])


def test_every_orientation_is_drawn_and_reported_ids_stay_right():
  arrays = make_arrays()
  seen = set()
  for _, batch, batch_info in feed_all(
    cached_outputs=make_computed(arrays), steps=12
  ):
    for identity, image in zip(batch_info["ids"], joined(batch["image"])):
      original = arrays.image[arrays.ids.index(identity)][None]
      [orientation] = [
        o
        for o in range(8)
        if (orientations.orient(original, o)[0] == image).all()
      ]
      seen.add(orientation)
  assert seen == set(range(8))


@pytest.mark.parametrize("oriented", [False, True])
def test_starting_in_the_middle_changes_nothing(oriented):
  cached_outputs = make_computed(make_arrays()) if oriented else None
  whole = feed_all(cached_outputs=cached_outputs)
  rest = feed_all(first_step=4, cached_outputs=cached_outputs)
  assert [step for step, _, _ in rest] == [4, 5]
  for (_, expected, _), (_, found, _) in zip(whole[4:], rest):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def test_another_seed_orders_and_turns_otherwise():
  cached_outputs = make_computed(make_arrays())
  first, second = feed_all(seed=1), feed_all(seed=2)
  assert [m["ids"] for *_, m in first] != [m["ids"] for *_, m in second]
  turned = [
    feed_all(seed=s, cached_outputs=cached_outputs)[0][1]["image"]
    for s in (1, 2)
  ]
  assert (turned[0] != turned[1]).any()


def test_a_batch_that_does_not_split_says_what_to_change():
  with pytest.raises(ValueError, match=r"batch of 6 does not split over 4"):
    feed_all(batch_size=6)
