import numpy as np
import pytest
import tensorflow_datasets as tfds

from kdseg.data import decode
from kdseg.data import loading
from kdseg.data import masks
from kdseg.data.sets import synthetic

SMALL = {"train": 3, "validation": 2, "test": 2, "image_size": 32}


def _draw(seed: int, size: int = 48) -> tuple[np.ndarray, np.ndarray]:
  return synthetic.draw(np.random.default_rng(seed), size)


def test_a_drawing_depends_on_its_generator_alone():
  first, second, other = _draw(0), _draw(0), _draw(1)
  np.testing.assert_array_equal(first[0], second[0])
  np.testing.assert_array_equal(first[1], second[1])
  assert (first[0] != other[0]).any()
  assert (first[1] != other[1]).any()


@pytest.mark.parametrize("size", [16, 33, 96])
def test_a_drawing_has_the_size_asked_for_and_a_lesion(size):
  for seed in range(20):
    picture, mask = _draw(seed, size)
    assert picture.shape == (size, size, 3)
    assert picture.dtype == np.uint8
    assert mask.shape == (size, size)
    assert mask.dtype == bool
    assert 0 < mask.mean() < 0.75


def test_lesions_are_mostly_darker_but_often_hardly():
  contrasts = []
  for seed in range(60):
    picture, mask = _draw(seed, 64)
    grey = picture.mean(-1)
    contrasts.append(grey[~mask].mean() - grey[mask].mean())
  contrasts = np.array(contrasts)
  assert np.mean(contrasts > 0) > 0.8
  assert np.median(contrasts) > 20
  # Corners and hair darken the surroundings; some lesions are faint.
  assert 0.08 < np.mean(contrasts < 15) < 0.5


def _otsu(grey: np.ndarray) -> float:
  """The threshold between two classes of least variance, by trying all."""

  def spread(threshold: int) -> float:
    low, high = grey[grey <= threshold], grey[grey > threshold]
    return sum(part.size * part.var() for part in (low, high) if part.size)

  return min(range(255), key=spread)


def test_a_threshold_is_no_solution_but_no_guess_either():
  dice = []
  for seed in range(24):
    picture, mask = _draw(seed, 48)
    grey = picture.mean(-1)
    guess = grey <= _otsu(grey)
    dice.append(2 * (guess & mask).sum() / (guess.sum() + mask.sum()))
  assert 0.35 < np.mean(dice) < 0.85


def _inventory(**options):
  return synthetic.Synthetic(**{**SMALL, **options}).inventory()


def test_every_image_of_every_split_is_another_one():
  found = _inventory()
  contents = [
    pair.image.read() for split in found.splits.values() for pair in split
  ]
  assert len(contents) == len(set(contents)) == 7
  assert {name: len(split) for name, split in found.splits.items()} == {
    "train": 3,
    "validation": 2,
    "test": 2,
  }


def test_more_images_leave_the_first_as_they_were_and_a_seed_does_not():
  few = _inventory().splits["train"]
  more = _inventory(train=5).splits["train"]
  other = _inventory(seed=1).splits["train"]
  for index, pair in enumerate(few):
    assert pair.image.read() == more[index].image.read()
    assert pair.mask.read() == more[index].mask.read()
    assert pair.image.read() != other[index].image.read()


def test_image_and_mask_of_a_pair_are_one_drawing():
  for index, pair in enumerate(_inventory().splits["test"]):
    seeds = np.random.SeedSequence([0, 2, index])
    picture, mask = synthetic.draw(
      np.random.Generator(np.random.PCG64(seeds)), 32
    )
    # The mask first: reading order must not matter.
    np.testing.assert_array_equal(masks.decode_mask(pair.mask.read(), ""), mask)
    np.testing.assert_array_equal(
      decode.decode_image(pair.image.read(), ""), picture
    )


@pytest.mark.parametrize(
  "options", [{"train": 0}, {"validation": 0}, {"test": -1}, {"image_size": 8}]
)
def test_too_few_images_or_pixels_are_refused(options):
  with pytest.raises(ValueError, match="draw at least"):
    synthetic.Synthetic(**options)


def test_it_is_a_tfds_builder_whose_options_lie_apart(tmp_path):
  kwargs = {**SMALL, "data_dir": tmp_path}
  arrays = loading.load("synthetic", "train", size=32, **kwargs)
  assert arrays.image.shape == (3, 32, 32, 3)
  assert arrays.coverage == "3 of 3"
  builder = tfds.builder("synthetic", **kwargs)
  assert len(builder.as_data_source("validation")) == 2
  other = tfds.builder("synthetic", **{**kwargs, "seed": 1})
  assert other.data_dir != builder.data_dir
