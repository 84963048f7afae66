"""Metrics against hand-made geometry, slow restatements, surface-distance."""

import math
import warnings

import numpy as np
import PIL.Image
import pytest
import scipy.ndimage

from kdseg.evaluation import metrics

with warnings.catch_warnings():  # it uses names that SciPy calls old
  warnings.simplefilter("ignore")
  import surface_distance


def square(size, top, left, side):
  mask = np.zeros((size, size), bool)
  mask[top : top + side, left : left + side] = True
  return mask


def blobs(rng, height, width):
  """A few smooth shapes, some of which touch the frame."""
  noise = scipy.ndimage.gaussian_filter(rng.normal(size=(height, width)), 3)
  return noise > 0.5 * noise.std()


def corners_of_boundary(mask):
  """Restates the definition, one corner at a time."""
  height, width = mask.shape
  points, lengths = [], []
  for i in range(height + 1):
    for j in range(width + 1):
      block = [
        [
          0 <= y < height and 0 <= x < width and bool(mask[y, x])
          for x in (j - 1, j)
        ]
        for y in (i - 1, i)
      ]
      count = sum(map(sum, block))
      if count in (0, 4):
        continue
      points.append((i, j))
      diagonal = count == 2 and block[0][0] == block[1][1]
      lengths.append(
        math.sqrt(2) if diagonal else 1.0 if count == 2 else math.sqrt(0.5)
      )
  return points, lengths


def slow_surface(prediction, truth, tolerance):
  """HD95, ASSD and NSD in pixels, by loops over all pairs."""
  sides = [corners_of_boundary(prediction), corners_of_boundary(truth)]
  percentiles, total, within, weight = [], 0.0, 0.0, 0.0
  for (points, lengths), (others, _) in (sides, sides[::-1]):
    distances = [min(math.dist(p, q) for q in others) for p in points]
    reached = 0.0
    ordered = sorted(zip(distances, lengths))
    for distance, length in ordered:
      reached += length
      if reached / sum(lengths) >= 0.95 - 1e-12:
        percentiles.append(distance)
        break
    for distance, length in ordered:
      total += distance * length
      within += length * (distance <= tolerance)
      weight += length
  return max(percentiles), total / weight, within / weight


def slow_boundary_iou(prediction, truth, width):
  """The whole frame, eroded `width` times by a 3 x 3 square."""
  bands = []
  for mask in (prediction, truth):
    eroded = np.pad(mask, 1)
    for _ in range(width):
      eroded = scipy.ndimage.binary_erosion(eroded, np.ones((3, 3)))
    bands.append(mask & ~eroded[1:-1, 1:-1])
  return (bands[0] & bands[1]).sum() / (bands[0] | bands[1]).sum()


class TestOverlap:
  def test_worked_by_hand(self):
    # 8 x 8: truth 4 x 4 = 16 pixels, prediction the same moved by 1 column:
    # TP 4 * 3 = 12, FP 4, FN 4, TN 64 - 20 = 44.
    got = metrics.score(square(8, 2, 3, 4), square(8, 2, 2, 4))
    want = {
      "dice": 24 / 32,
      "jaccard": 12 / 20,
      "accuracy": 56 / 64,
      "sensitivity": 12 / 16,
      "specificity": 44 / 48,
      "thresholded_jaccard": 0.0,  # .6 is below .65
      "true_positive": 12,
      "false_positive": 4,
      "false_negative": 4,
      "true_negative": 44,
      "height": 8,
      "width": 8,
      "empty_prediction": 0,
    }
    assert {key: got[key] for key in want} == want

  @pytest.mark.parametrize(
    ("hit", "missed", "want"), [(13, 7, 13 / 20), (12, 8, 0.0)]
  )
  def test_thresholded_jaccard_keeps_what_reaches_65_percent(
    self, hit, missed, want
  ):
    # 13 of 20 pixels are exactly .65, which still counts.
    truth = np.ones((1, hit + missed), bool)
    prediction = np.arange(hit + missed)[None] < hit
    got = metrics.score(prediction, truth)
    assert got["thresholded_jaccard"] == want

  def test_jaccard_is_dice_over_two_minus_dice_of_one_image(self):
    rng = np.random.default_rng(0)
    got = metrics.score(blobs(rng, 40, 30), blobs(rng, 40, 30))
    assert got["jaccard"] == pytest.approx(got["dice"] / (2 - got["dice"]))

  def test_half_is_not_lesion_and_more_than_half_is(self):
    probability = np.array([[0.5, np.nextafter(0.5, 1), 0.0, 1.0]])
    got = metrics.score(probability, np.array([[False, True, False, True]]))
    assert got["dice"] == 1

  def test_the_threshold_can_be_another(self):
    probability = np.array([[0.3, 0.2]])
    truth = np.array([[True, False]])
    assert metrics.score(probability, truth)["dice"] == 0
    got = metrics.score(probability, truth, threshold=0.25)
    assert got["dice"] == 1

  def test_a_mask_scores_as_its_probabilities_do(self):
    rng = np.random.default_rng(1)
    probability, truth = rng.random((20, 30)), rng.random((20, 30)) > 0.6
    assert metrics.score(probability, truth) == metrics.score(
      probability > 0.5, truth
    )

  def test_keys_come_in_the_order_of_the_file(self):
    got = metrics.score(square(8, 2, 3, 4), square(8, 2, 2, 4))
    assert tuple(got) == metrics.COLUMNS
    assert {type(value) for value in got.values()} == {int, float}

  def test_height_and_width_are_not_swapped(self):
    got = metrics.score(np.ones((3, 5), bool), np.ones((3, 5), bool))
    assert (got["height"], got["width"]) == (3, 5)


class TestEmptyMask:
  def test_two_empty_masks_score_perfectly(self):
    nothing = np.zeros((6, 8), bool)
    got = metrics.score(nothing, nothing)
    for name in (
      *("dice", "jaccard", "accuracy", "sensitivity", "specificity"),
      *("thresholded_jaccard", "nsd", "boundary_iou", "empty_prediction"),
    ):
      assert got[name] == 1, name
    for name in ("hd95", "assd", "hd95_diagonal", "assd_diagonal"):
      assert got[name] == 0, name

  @pytest.mark.parametrize("how", ["missed", "invented"])
  def test_a_lesion_missed_or_invented_costs_the_diagonal(self, how):
    nothing = np.zeros((6, 8), bool)
    lesion = nothing.copy()
    lesion[2:4, 2:4] = True
    pair = (nothing, lesion) if how == "missed" else (lesion, nothing)
    got = metrics.score(*pair)
    for name in ("dice", "jaccard", "nsd", "boundary_iou"):
      assert got[name] == 0, name
    # 6 x 8 has a diagonal of 10 pixels, 10 * 256 / 6 of the reference size.
    for name in ("hd95", "assd"):
      assert got[name] == pytest.approx(2560 / 6), name
      assert got[name + "_diagonal"] == pytest.approx(1), name
    assert got["empty_prediction"] == (how == "missed")
    # Nothing to find: sensitivity 1. Else all of it was missed.
    assert got["sensitivity"] == (how == "invented")
    assert got["specificity"] == (1 if how == "missed" else 44 / 48)

  def test_specificity_is_one_where_there_is_no_background(self):
    everything = np.ones((4, 4), bool)
    got = metrics.score(square(4, 0, 0, 2), everything)
    assert got["specificity"] == 1
    assert got["sensitivity"] == 4 / 16


class TestBoundary:
  def test_a_shifted_square_worked_by_hand(self):
    # 256 x 256, so that a pixel is a pixel. A 10 x 10 square, moved by 3
    # columns. Each boundary has 40 corners: 36 of length 1 and the square's
    # four of sqrt(.5). Rows top and bottom overlap over 8 of 11 corners.
    got = metrics.score(square(256, 20, 23, 10), square(256, 20, 20, 10))
    assert got["hd95"] == 3
    assert got["hd95_diagonal"] == pytest.approx(3 / math.hypot(256, 256))
    # Of each boundary: top and bottom rows 1, 2, 3 off (the 3 is the corner),
    # the far side's 9 inner corners 3 off, the near side's inner ones lie
    # inside the other square, 1 to 3 off: min(3, rows to the top or bottom).
    corner = math.sqrt(0.5)
    inner = 1 + 2 + 3 * 5 + 2 + 1
    total = 2 * (1 + 2 + 3 * corner) + 9 * 3 + inner
    length = 36 + 4 * corner
    assert got["assd"] == pytest.approx(total / length)
    # Within 2 pixels: all but the 2 far corners, 9 far and 5 near ones.
    assert got["nsd"] == pytest.approx((length - 2 * corner - 9 - 5) / length)

  def test_masks_out_of_pillow_score_as_others_do(self):
    # Its bools have bytes of 255, equal to True and not to 1 when viewed.
    one, other = square(30, 2, 3, 9), square(30, 5, 3, 9)
    pillow = [np.asarray(PIL.Image.fromarray(m)) for m in (one, other)]
    assert pillow[0].view(np.uint8).max() == 255
    assert metrics.score(*pillow) == metrics.score(one, other)

  def test_equal_masks_are_at_no_distance(self):
    mask = blobs(np.random.default_rng(2), 30, 40)
    got = metrics.score(mask, mask)
    assert (got["hd95"], got["assd"]) == (0, 0)
    assert (got["nsd"], got["boundary_iou"]) == (1, 1)

  @pytest.mark.parametrize("seed", range(12))
  def test_equals_loops_over_all_corners(self, seed):
    rng = np.random.default_rng(seed)
    height, width = rng.integers(6, 24, 2)
    prediction, truth = blobs(rng, height, width), blobs(rng, height, width)
    prediction[rng.integers(height), rng.integers(width)] = True
    truth[rng.integers(height), rng.integers(width)] = True
    shorter = min(height, width)
    hd95, assd, nsd = slow_surface(prediction, truth, 2 * shorter / 256)
    got = metrics.score(prediction, truth)
    assert got["hd95"] == pytest.approx(hd95 * 256 / shorter)
    assert got["assd"] == pytest.approx(assd * 256 / shorter)
    assert got["nsd"] == pytest.approx(nsd)

  @pytest.mark.parametrize("seed", range(20))
  def test_equals_surface_distance(self, seed):
    rng = np.random.default_rng(100 + seed)
    # At 256 pixels the tolerance of 2 can be met exactly.
    height, width = (256, 300) if seed < 3 else rng.integers(8, 70, 2)
    prediction = blobs(rng, height, width)
    truth = (
      rng.random((height, width)) < 0.1 if seed % 4 == 0
      else blobs(rng, height, width)
    )  # fmt: skip
    prediction[0, 0] = truth[height // 2, width // 2] = True
    scale = 256 / min(height, width)
    with warnings.catch_warnings():
      warnings.simplefilter("ignore")
      distances = surface_distance.compute_surface_distances(
        truth, prediction, (scale, scale)
      )
    got = metrics.score(prediction, truth)
    assert got["hd95"] == pytest.approx(
      surface_distance.compute_robust_hausdorff(distances, 95)
    )
    assert got["nsd"] == pytest.approx(
      surface_distance.compute_surface_dice_at_tolerance(distances, 2)
    )
    lengths = distances["surfel_areas_gt"], distances["surfel_areas_pred"]
    means = surface_distance.compute_average_surface_distance(distances)
    assert got["assd"] == pytest.approx(
      sum(mean * length.sum() for mean, length in zip(means, lengths))
      / sum(length.sum() for length in lengths)
    )

  @pytest.mark.parametrize("seed", range(10))
  def test_boundary_iou_equals_repeated_erosion_of_the_whole_frame(self, seed):
    rng = np.random.default_rng(200 + seed)
    height, width = rng.integers(60, 160, 2)
    prediction, truth = blobs(rng, height, width), blobs(rng, height, width)
    got = metrics.score(prediction, truth)
    assert got["boundary_iou"] == pytest.approx(
      slow_boundary_iou(
        prediction, truth, max(1, round(0.02 * math.hypot(height, width)))
      )
    )

  def test_boundary_iou_worked_by_hand(self):
    # Diagonal 362: a band of 7. Squares of 20, one inside the other by 0:
    # the same top left, sides 20 and 22; bands 20^2 - 6^2 = 364 and
    # 22^2 - 8^2 = 420 pixels. Of the smaller one's band, the larger one's
    # core [7, 15) takes the part of [7, 15)^2 outside [7, 13)^2: 64 - 36 = 28.
    got = metrics.score(square(256, 9, 9, 20), square(256, 9, 9, 22))
    shared = 364 - 28
    assert got["boundary_iou"] == pytest.approx(shared / (364 + 420 - shared))

  @pytest.mark.parametrize(("top", "left"), [(0, 0), (0, 30), (44, 44)])
  def test_the_place_of_the_lesion_changes_nothing(self, top, left):
    # Touching the frame or not: the contour is closed along it.
    rng = np.random.default_rng(3)
    one, other = blobs(rng, 20, 20), blobs(rng, 20, 20)
    want = metrics.score(*(np.pad(m, 22) for m in (one, other)))
    padding = ((top, 44 - top), (left, 44 - left))
    got = metrics.score(*(np.pad(m, padding) for m in (one, other)))
    for name in ("hd95", "assd", "nsd", "boundary_iou"):
      assert got[name] == want[name], name

  def test_distances_do_not_depend_on_the_size_of_the_pixels(self):
    rng = np.random.default_rng(4)
    one, other = blobs(rng, 64, 80), blobs(rng, 64, 80)
    small = metrics.score(one, other)
    large = metrics.score(*(m.repeat(3, 0).repeat(3, 1) for m in (one, other)))
    assert large["hd95"] == pytest.approx(small["hd95"], abs=2)
    assert large["assd"] == pytest.approx(small["assd"], abs=1)
    assert large["hd95_diagonal"] == pytest.approx(
      large["hd95"] / math.hypot(256, 320)
    )

  def test_prediction_and_annotation_can_change_places(self):
    rng = np.random.default_rng(5)
    one, other = blobs(rng, 50, 40), blobs(rng, 50, 40)
    got, swapped = metrics.score(one, other), metrics.score(other, one)
    for name in ("dice", "jaccard", "hd95", "boundary_iou"):
      assert got[name] == swapped[name], name
    for name in ("assd", "nsd"):
      assert got[name] == pytest.approx(swapped[name]), name
    assert got["sensitivity"] != swapped["sensitivity"]


class TestPooled:
  def test_pools_pixels_not_images(self):
    # A small lesion missed and a large one found: TP 0 + 90, FP 0 + 10,
    # FN 10 + 0, TN 90 + 0.
    names = metrics.Counts._fields
    rows = [
      dict(zip(names, (0, 0, 10, 90))),
      dict(zip(names, (90, 10, 0, 0))),
    ]
    got = metrics.pooled(rows)
    assert got["dice"] == pytest.approx(180 / 200)
    assert got["jaccard"] == pytest.approx(90 / 110)
    assert got["jaccard"] == pytest.approx(got["dice"] / (2 - got["dice"]))
    assert got["sensitivity"] == pytest.approx(90 / 100)
    assert got["specificity"] == pytest.approx(90 / 100)
    assert got["accuracy"] == pytest.approx(180 / 200)

  def test_one_image_pools_to_its_own_scores(self):
    row = metrics.score(square(9, 1, 1, 5), square(9, 2, 3, 5))
    for name, value in metrics.pooled([row]).items():
      assert value == row[name]

  def test_no_image_is_an_error(self):
    with pytest.raises(ValueError, match="no image"):
      metrics.pooled(iter(()))


class TestResize:
  def test_the_same_size_is_left_alone(self):
    probability = np.random.default_rng(6).random((7, 7), np.float32)
    got = metrics.resize_probability(probability, 7, 7)
    np.testing.assert_array_equal(got, probability)
    assert got is not probability

  def test_doubling_worked_by_hand(self):
    # Centres of the new pixels lie at -.25, .25, .75, 1.25 of the old ones.
    got = metrics.resize_probability(np.array([[0.0, 1.0]]), 1, 4)
    np.testing.assert_allclose(got, [[0, 0.25, 0.75, 1]], atol=1e-7)
    assert got.dtype == np.float32

  def test_rows_and_columns_are_not_swapped(self):
    got = metrics.resize_probability(np.array([[0.0, 1.0]] * 2), 5, 3)
    assert got.shape == (5, 3)
    assert (np.diff(got, axis=1) > 0).all()

  def test_shrinking_averages(self):
    checks = np.indices((8, 8)).sum(0) % 2.0
    got = metrics.resize_probability(checks, 2, 2)
    np.testing.assert_allclose(got, 0.5, atol=0.02)

  @pytest.mark.parametrize("size", [(101, 77), (9, 200), (33, 34)])
  def test_stays_between_0_and_1(self, size):
    rng = np.random.default_rng(8)
    got = metrics.resize_probability(rng.integers(0, 2, (33, 33)) * 1.0, *size)
    assert got.min() >= 0
    assert got.max() <= 1
    ones = metrics.resize_probability(np.ones((33, 33)), *size)
    np.testing.assert_array_equal(ones, 1)

  def test_equals_pillow_on_a_picture(self):
    probability = np.random.default_rng(7).random((16, 16), np.float32)
    want = PIL.Image.fromarray(probability).resize((23, 41), resample=2)
    np.testing.assert_allclose(
      metrics.resize_probability(probability, 41, 23), want, atol=1e-6
    )


class TestBadInput:
  @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
  def test_a_probability_that_is_not_finite_is_refused_with_its_place(
    self, value
  ):
    probability = np.zeros((4, 5))
    probability[2, 3] = value
    with pytest.raises(ValueError, match="row 2, column 3"):
      metrics.score(probability, np.zeros((4, 5), bool))
    with pytest.raises(ValueError, match="row 2, column 3"):
      metrics.resize_probability(probability, 8, 8)

  @pytest.mark.parametrize("value", [-0.01, 1.01])
  def test_logits_are_refused(self, value):
    with pytest.raises(ValueError, match="logits"):
      metrics.score(np.full((2, 2), value), np.zeros((2, 2), bool))

  def test_a_mask_of_0_and_255_is_refused(self):
    with pytest.raises(ValueError, match="mask > 128"):
      metrics.score(np.zeros((2, 2), np.uint8), np.zeros((2, 2), bool))

  def test_a_truth_that_is_no_mask_is_refused(self):
    with pytest.raises(ValueError, match="bool mask"):
      metrics.score(np.zeros((2, 2)), np.zeros((2, 2), np.uint8))

  def test_another_size_is_refused(self):
    with pytest.raises(ValueError, match=r"\(2, 3\).*\(3, 2\)"):
      metrics.score(np.zeros((2, 3)), np.zeros((3, 2), bool))

  @pytest.mark.parametrize(("height", "width"), [(0, 5), (5, -1)])
  def test_no_size_is_refused(self, height, width):
    with pytest.raises(ValueError, match="cannot resize"):
      metrics.resize_probability(np.zeros((2, 2)), height, width)

  def test_more_than_one_map_is_refused(self):
    with pytest.raises(ValueError, match=r"\(1, 2, 2\)"):
      metrics.resize_probability(np.zeros((1, 2, 2)), 4, 4)
