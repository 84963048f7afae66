"""Passing a network over a data set; the network is a function of numpy."""

import io

import numpy as np
from PIL import Image
import pytest

from kdseg.data import loading
from kdseg.data import orientations
from kdseg.evaluation import evaluate

SIDE, COUNT = 8, 5


def to_png(mask):
  file = io.BytesIO()
  Image.fromarray(mask.astype(np.uint8) * 255).save(file, "png")
  return file.getvalue()


def make_arrays():
  image = np.random.default_rng(0).integers(
    0, 256, (COUNT, SIDE, SIDE, 3), np.uint8
  )
  mask = image[..., 1] > 100
  return loading.Arrays(
    name="synthetic",
    split="test",
    ids=tuple(f"id{i}" for i in range(COUNT)),
    image=image,
    mask=mask.astype(np.uint8),
    official_count=COUNT,
    found_count=COUNT,
    native_masks=tuple(to_png(m) for m in mask),
  )


class Network:
  """Answers with the image's red; counts its calls."""

  def __init__(self, ramp=1.0):
    self.ramp = ramp
    self.calls = 0

  def __call__(self, variables, batch):
    self.calls += 1
    assert batch["image"].shape[:2] == (4, 1)
    return batch["image"][..., 0].astype(np.float32) / 255 * self.ramp


def test_every_example_comes_once_without_the_padding():
  arrays = make_arrays()
  found = list(evaluate.probabilities(Network(), {}, arrays, batch_size=4))
  assert [i for i, _ in found] == list(range(COUNT))
  for i, probability in found:
    np.testing.assert_allclose(probability, arrays.image[i, ..., 0] / 255)


def test_dihedral_tta_is_the_mean_of_eight_orientations_turned_back():
  arrays, ramp = make_arrays(), np.linspace(0, 1, SIDE, dtype=np.float32)
  found = evaluate.probabilities(
    Network(ramp), {}, arrays, batch_size=4, tta="dihedral"
  )
  for i, probability in found:
    views = [
      orientations.restore_orientation(
        orientations.orient(arrays.image[i : i + 1, ..., 0], o) / 255 * ramp, o
      )[0]
      for o in range(8)
    ]
    np.testing.assert_allclose(probability, np.mean(views, 0), atol=1e-6)


def test_an_unknown_tta_is_refused_with_the_known():
  with pytest.raises(ValueError, match="none, dihedral: 'flips'"):
    list(
      evaluate.probabilities(
        Network(), {}, make_arrays(), batch_size=4, tta="flips"
      )
    )


def test_encoder_features_come_in_the_orientation_of_the_image():
  arrays = make_arrays()
  views = np.stack([orientations.orient(arrays.image, o) for o in range(8)])
  seen = []

  def predict(variables, batch):
    seen.append((batch["image"], batch["encoder_features"]["copy"]))
    return np.zeros((4, 1, SIDE, SIDE), np.float32)

  list(
    evaluate.probabilities(
      predict,
      {},
      arrays,
      batch_size=4,
      tta="dihedral",
      encoder_features={"copy": views},
    )
  )
  for image, copy in seen[:8]:
    np.testing.assert_array_equal(image, copy)


def test_mean_dice_is_the_mean_over_images():
  arrays = make_arrays()
  dice = []
  for image, mask in zip(arrays.image, arrays.mask):
    prediction, truth = image[..., 0] / 255 > 0.5, mask > 0
    dice.append(
      2 * (prediction & truth).sum() / (prediction.sum() + truth.sum())
    )
  found = evaluate.mean_dice(Network(), {}, arrays, batch_size=4)
  np.testing.assert_allclose(found, np.mean(dice), rtol=1e-6)


def test_a_stopped_scoring_resumes_after_the_batches_that_were_noted():
  arrays, noted, kept = make_arrays(), [], {}
  whole = evaluate.score(Network(), {}, arrays, batch_size=4, note=noted.append)
  assert [row["id"] for row in whole] == list(arrays.ids)
  assert [len(rows) for rows in noted] == [4, 1]
  rest = Network()
  again = evaluate.score(
    rest, {}, arrays, batch_size=4, before=noted[:1], keep=kept.__setitem__
  )
  assert again == whole
  assert rest.calls == 1
  np.testing.assert_array_equal(
    kept["id4"], arrays.image[4, ..., 0] / np.float32(255) > 0.5
  )
  assert set(kept) == {"id4"}
