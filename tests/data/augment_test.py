"""What a random view of an image promises."""

import functools
from unittest import mock

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.data import augment

GEOMETRY_OFF = {
  "flips": False,
  "quarter_turns": False,
  "rotate": 0.0,
  "scale": 0.0,
  "translate": 0.0,
}
COLOURS_OFF = {
  "brightness": 0.0,
  "contrast": 0.0,
  "saturation": 0.0,
  "hue": 0.0,
  "gain": 0.0,
  "tone": 0.0,
}
OFF = {**GEOMETRY_OFF, **COLOURS_OFF}
KEY = jax.random.key(7)


def only(**switches):
  """Compiled: op by op the draws of a batch take seconds to dispatch."""
  strengths = augment.Strengths(**{**OFF, **switches})
  return jax.jit(functools.partial(augment.augment, strengths=strengths))


def unit(image):
  return image.astype(np.float32) * np.float32(1 / 255)


def noise(batch=8, height=16, width=16, seed=0):
  rng = np.random.default_rng(seed)
  image = rng.integers(0, 256, (batch, height, width, 3), np.uint8)
  mask = rng.integers(0, 2, (batch, height, width), np.uint8)
  return image, mask


def coordinates(batch, side):
  """Red is the row and green the column of every pixel, counted from 0."""
  row, column = np.mgrid[:side, :side]
  image = np.stack([row, column, 0 * row], -1).astype(np.uint8)
  return np.broadcast_to(image, (batch, side, side, 3))


def dihedral(x):
  """The eight flips and turns of [H, W, ...]."""
  turns = [np.rot90(x, k) for k in range(4)]
  return [*turns, *(turn[::-1] for turn in turns)]


def slow_warp(image, mask, matrix, shift):
  """One image, loops, a mirrored frame, and no tricks."""
  height, width = mask.shape
  frame = 6 * max(height, width)
  pads = ((frame, frame), (frame, frame))
  big = np.pad(image.astype(np.float64), (*pads, (0, 0)), mode="symmetric")
  big_mask = np.pad(mask, pads, mode="symmetric")
  view, view_mask = np.zeros(image.shape), np.zeros(mask.shape)
  centre = np.array([(height - 1) / 2, (width - 1) / 2])
  for i in range(height):
    for j in range(width):
      y, x = matrix @ (np.array([i, j]) - centre) + shift + centre + frame
      top, left = int(np.floor(y)), int(np.floor(x))
      for r, down in ((top, 1 - (y - top)), (top + 1, y - top)):
        for c, right in ((left, 1 - (x - left)), (left + 1, x - left)):
          view[i, j] += down * right * big[r, c] / 255
      nearest = int(np.floor(y + 0.5)), int(np.floor(x + 0.5))
      view_mask[i, j] = big_mask[nearest]
  return view, view_mask


class AugmentTest(chex.TestCase):
  def test_all_off_converts_exactly(self):
    image, mask = noise()
    view, view_mask = only()(KEY, image, mask)
    assert view.dtype == view_mask.dtype == jnp.float32
    np.testing.assert_array_equal(view, unit(image))
    np.testing.assert_array_equal(view_mask, mask)

  @parameterized.named_parameters(
    ("flips", {"flips": True}, [0, 2, 4, 6]),
    ("turns", {"quarter_turns": True}, [0, 1, 2, 3]),
    ("both", {"flips": True, "quarter_turns": True}, list(range(8))),
  )
  def test_flips_and_turns_are_exact_and_all_occur(self, switches, expected):
    image, mask = noise(batch=64)
    view, view_mask = only(**switches)(KEY, image, mask)
    seen = set()
    for i in range(len(image)):
      matches = [
        k
        for k, (x, y) in enumerate(zip(dihedral(image[i]), dihedral(mask[i])))
        if np.array_equal(y, view_mask[i]) and np.array_equal(unit(x), view[i])
      ]
      assert len(matches) == 1
      seen.update(matches)
    assert sorted(seen) == expected

  @chex.variants(with_jit=True, with_pmap=True)
  def test_mask_and_image_move_together(self):
    # The mask says where red is bright, so it must do so in every view, the
    # mirrored outside included. Half-way between, nearest and bilinear differ.
    batch, side = 8, 48
    rng = np.random.default_rng(0)
    low = rng.integers(0, 2, (batch, 6, 6))
    mask = low.repeat(8, 1).repeat(8, 2).astype(np.uint8)
    image = np.stack([255 * mask] * 3, -1).astype(np.uint8)
    view, view_mask = self.variant(
      functools.partial(
        only(
          flips=True, quarter_turns=True, rotate=40.0, scale=0.3, translate=0.4
        ),
        KEY,
      )
    )(image, mask)
    clear = np.abs(view[..., 0] - 0.5) > 0.499
    assert clear.mean() > 0.5
    assert view_mask.shape == (batch, side, side)
    np.testing.assert_array_equal(
      np.where(clear, view[..., 0] > 0.5, 0), np.where(clear, view_mask, 0)
    )

  def test_nearest_is_within_half_a_pixel_of_bilinear(self):
    side = 64
    image = coordinates(8, side)
    mask = (image[..., 0] >= 20).astype(np.uint8)
    view, view_mask = only(rotate=30.0)(KEY, image, mask)
    row = np.asarray(view[..., 0]) * 255
    inside = np.abs(row - 19.5) > 1e-3
    np.testing.assert_array_equal(
      view_mask[inside], (row > 19.5)[inside].astype(np.float32)
    )

  def test_draws_fill_their_stated_limits(self):
    side, batch = 64, 256
    image = coordinates(batch, side)
    mask = np.zeros(image.shape[:3], np.uint8)
    view, _ = only(rotate=10.0, scale=0.25, translate=0.05)(KEY, image, mask)
    # An affine map is its value and its two differences at the centre.
    source = np.asarray(view)[..., :2].astype(np.float64) * 255
    mid = side // 2
    down = source[:, mid, mid] - source[:, mid - 1, mid]
    right = source[:, mid, mid] - source[:, mid, mid - 1]
    zoom = np.sqrt(down[:, 0] * right[:, 1] - down[:, 1] * right[:, 0])
    angle = np.rad2deg(np.arctan2(down[:, 1], down[:, 0]))
    centre = source[:, mid - 1 : mid + 1, mid - 1 : mid + 1].mean((1, 2))
    shift = (centre - (side - 1) / 2) / side
    for drawn, lower, upper in (
      (np.log(zoom), -np.log(1.25), np.log(1.25)),
      (angle, -10, 10),
      (shift[:, 0], -0.05, 0.05),
      (shift[:, 1], -0.05, 0.05),
    ):
      slack = 0.03 * (upper - lower)
      assert lower - 1e-3 <= drawn.min() <= lower + slack
      assert upper - slack <= drawn.max() <= upper + 1e-3
    drawn = np.stack([np.log(zoom), angle, shift[:, 0], shift[:, 1]])
    off_diagonal = np.corrcoef(drawn) - np.eye(4)
    assert np.abs(off_diagonal).max() < 0.2

  def test_rotation_keeps_lengths_on_images_that_are_not_square(self):
    row, column = np.mgrid[:32, :64]
    image = np.stack([row, column, 0 * row], -1).astype(np.uint8)[None]
    image = image.repeat(4, 0)
    view, _ = only(rotate=20.0)(KEY, image, image[..., 2])
    source = np.asarray(view)[..., :2].astype(np.float64) * 255
    step = source[:, 16, 33] - source[:, 16, 32]
    np.testing.assert_allclose(np.linalg.norm(step, axis=-1), 1, atol=1e-3)

  def test_nothing_dark_comes_in_from_outside(self):
    image = np.full((8, 32, 32, 3), 200, np.uint8)
    mask = np.ones((8, 32, 32), np.uint8)
    view, view_mask = only(
      flips=True, quarter_turns=True, rotate=90.0, scale=1.0, translate=1.0
    )(KEY, image, mask)
    np.testing.assert_allclose(view, 200 / 255, atol=1e-6)
    np.testing.assert_array_equal(view_mask, 1)

  def test_strongest_changes_stay_in_range_and_masks_binary(self):
    image, mask = noise(height=32, width=32)
    view, view_mask = only(
      flips=True,
      quarter_turns=True,
      rotate=180.0,
      scale=2.0,
      translate=1.0,
      brightness=1.0,
      contrast=1.0,
      saturation=1.0,
      hue=180.0,
      gain=1.0,
      tone=1.0,
    )(KEY, image, mask)
    assert float(view.min()) == 0
    assert 0.9 < float(view.max()) <= 1
    assert set(np.unique(view_mask)) == {0.0, 1.0}

  def test_jit_equals_no_jit(self):
    # Random pixels: a sample one pixel off would differ by a third.
    image, mask = noise(batch=4, height=32, width=32)
    plain = augment.augment(KEY, image, mask)
    jitted = jax.jit(augment.augment)(KEY, image, mask)
    np.testing.assert_allclose(plain[0], jitted[0], atol=1e-3)
    # A position may round to the other side of the middle between two pixels.
    assert np.mean(plain[1] != jitted[1]) < 1e-3

  def test_same_key_same_view_and_other_key_other_view(self):
    image, mask = noise()
    view = jax.jit(augment.augment)
    one = view(KEY, image, mask)
    same = view(KEY, image, mask)
    other = view(jax.random.key(8), image, mask)
    chex.assert_trees_all_equal(one, same)
    assert np.abs(one[0] - other[0]).max(axis=(1, 2, 3)).min() > 0.1

  @parameterized.named_parameters(
    ("geometry", {"rotate": 15.0, "scale": 0.15, "translate": 0.08}),
    ("flips", {"flips": True, "quarter_turns": True}),
    ("colours", {"brightness": 0.1, "contrast": 0.1, "hue": 5.0, "tone": 0.1}),
  )
  def test_a_draw_depends_on_key_and_position_only(self, switches):
    image, mask = noise()
    whole = only(**switches)(KEY, image, mask)
    part = only(**switches)(KEY, image[:3], mask[:3])
    beside, beside_mask = noise(seed=1)
    beside[2], beside_mask[2] = image[2], mask[2]
    others = only(**switches)(KEY, beside, beside_mask)
    np.testing.assert_allclose(whole[0][:3], part[0], atol=1e-5)
    np.testing.assert_allclose(whole[0][2], others[0][2], atol=1e-5)
    np.testing.assert_array_equal(whole[1][2], others[1][2])

  def test_one_key_an_image_is_taken_as_it_is(self):
    image, mask = noise()
    keys = jax.random.split(KEY, 8)[::-1]
    view = only(rotate=15.0, brightness=0.1)
    whole = view(keys, image, mask)
    # The same images in two halves, as two devices get them.
    half = view(keys[4:], image[4:], mask[4:])
    np.testing.assert_allclose(whole[0][4:], half[0], atol=1e-5)
    one = view(KEY, image, mask)
    assert np.abs(one[0] - whole[0]).max(axis=(1, 2, 3)).min() > 0.1

  def test_two_positions_draw_two_views(self):
    image, mask = noise(batch=1)
    image, mask = image.repeat(4, 0), mask.repeat(4, 0)
    for switches in ({"rotate": 15.0}, {"brightness": 0.2}):
      view, _ = only(**switches)(KEY, image, mask)
      for i in range(4):
        for j in range(i):
          assert np.abs(view[i] - view[j]).max() > 1e-3

  def test_switching_colours_leaves_the_geometry_alone(self):
    image, mask = noise()
    plain = jax.jit(augment.augment, static_argnums=3)(
      KEY, image, mask, augment.Strengths(**COLOURS_OFF)
    )
    coloured = jax.jit(augment.augment)(KEY, image, mask)
    np.testing.assert_array_equal(plain[1], coloured[1])
    assert np.abs(plain[0] - coloured[0]).max() > 0.05

  def test_each_number_drawn_serves_one_change(self):
    # Image i is given zeros but for its i-th number; the last one only zeros.
    count = 17

    def one_at_a_time(key, shape, minval):
      assert shape == (count,)
      assert minval == -1
      return -0.9 * jax.nn.one_hot(jax.random.key_data(key)[-1], count)

    data = np.stack([np.zeros(count + 1), np.arange(count + 1)], -1)
    keys = jax.random.wrap_key_data(jnp.asarray(data, jnp.uint32))
    image, mask = noise(batch=1)
    image = (64 + image // 2).repeat(count + 1, 0)
    mask = mask.repeat(count + 1, 0)
    served = []
    with mock.patch.object(jax.random, "uniform", one_at_a_time):
      for name, expected in (
        ("flips", 2),
        ("quarter_turns", 1),
        ("rotate", 1),
        ("scale", 1),
        ("translate", 2),
        ("brightness", 1),
        ("contrast", 1),
        ("saturation", 1),
        ("hue", 1),
        ("gain", 3),
        ("tone", 3),
      ):
        strength = {"flips": True, "quarter_turns": True, "rotate": 20.0}
        view, _ = only(**{name: strength.get(name, 0.3)})(keys, image, mask)
        view = np.asarray(view)
        changed = np.abs(view - view[-1]).max((1, 2, 3)) > 1e-4
        assert changed.sum() == expected, name
        served.extend(np.flatnonzero(changed))
    assert sorted(served) == list(range(count))

  @parameterized.named_parameters(
    ("float_image", (2, 8, 8, 3), np.float32, (2, 8, 8), np.uint8, "uint8"),
    ("four_channels", (2, 8, 8, 4), np.uint8, (2, 8, 8), np.uint8, "image"),
    ("other_mask", (2, 8, 8, 3), np.uint8, (2, 8, 4), np.uint8, "mask"),
    ("float_mask", (2, 8, 8, 3), np.uint8, (2, 8, 8), np.float32, "mask"),
    ("not_square", (2, 8, 4, 3), np.uint8, (2, 8, 4), np.uint8, "square"),
  )
  def test_refuses(self, shape, dtype, mask_shape, mask_dtype, message):
    image, mask = np.zeros(shape, dtype), np.zeros(mask_shape, mask_dtype)
    with pytest.raises(ValueError, match=message):
      augment.augment(KEY, image, mask)

  @parameterized.parameters("rotate", "scale", "translate", *COLOURS_OFF)
  def test_refuses_a_negative_strength(self, name):
    with pytest.raises(ValueError, match=name):
      augment.augment(KEY, *noise(batch=1), augment.Strengths(**{name: -0.1}))

  def test_refuses_a_tone_curve_that_folds_back(self):
    with pytest.raises(ValueError, match="tone"):
      augment.augment(KEY, *noise(batch=1), augment.Strengths(tone=1.1))


class WarpTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  def test_equals_slow_loops(self):
    batch, height, width = 4, 11, 14
    image, mask = noise(batch, height, width)
    rng = np.random.default_rng(3)
    matrix = rng.normal(size=(batch, 2, 2)).astype(np.float32)
    shift = rng.uniform(-9, 9, (batch, 2)).astype(np.float32)
    view, view_mask = self.variant(augment.warp)(image, mask, matrix, shift)
    for i in range(batch):
      slow = slow_warp(image[i], mask[i], matrix[i], shift[i])
      np.testing.assert_allclose(view[i], slow[0], atol=1e-5)
      np.testing.assert_array_equal(view_mask[i], slow[1])

  @parameterized.parameters(0, 3, -5, 16, -31, 40)
  def test_whole_shifts_show_the_mirrored_picture(self, shift):
    image, mask = noise(batch=1)
    eye = jnp.eye(2)[None]
    view, view_mask = augment.warp(
      image, mask, eye, jnp.array([[shift, -shift]], jnp.float32)
    )
    frame = ((0, 0), (48, 48), (48, 48))
    big = np.pad(image, (*frame, (0, 0)), mode="symmetric")
    big_mask = np.pad(mask, frame, mode="symmetric")
    rows = slice(48 + shift, 64 + shift)
    columns = slice(48 - shift, 64 - shift)
    expected = unit(big[:, rows, columns])
    np.testing.assert_array_equal(view, expected)
    np.testing.assert_array_equal(view_mask, big_mask[:, rows, columns])

  def test_half_a_pixel_is_the_mean_of_two(self):
    image = np.zeros((1, 2, 2, 3), np.uint8)
    image[0, :, 0], image[0, :, 1] = (10, 20, 30), (20, 40, 90)
    view, _ = augment.warp(
      image, image[..., 0], jnp.eye(2)[None], jnp.array([[0.0, 0.5]])
    )
    # Right of the last column lies its mirror image: itself.
    np.testing.assert_allclose(view[0, 0, 0] * 255, [15, 30, 60], rtol=1e-6)
    np.testing.assert_allclose(view[0, 0, 1] * 255, [20, 40, 90], rtol=1e-6)


def colours(matrix=None, contrast=1.0, brightness=0.0, tone=(0.0, 0.0, 0.0)):
  matrix = jnp.eye(3) if matrix is None else jnp.asarray(matrix)
  return augment.Colours(
    matrix[None],
    jnp.array([contrast]),
    jnp.array([brightness]),
    jnp.array([tone]),
  )


class ColoursTest(chex.TestCase):
  def floats(self, batch=4):
    return unit(noise(batch=batch)[0])

  def test_neutral_colours_change_nothing(self):
    image = self.floats(1)
    np.testing.assert_array_equal(augment.recolour(image, colours()), image)

  def test_worked_by_hand(self):
    # One grey pixel of 0.2 and one of 0.6: mean luma 0.4. Contrast 1.5 makes
    # 0.1 and 0.7, brightness 0.1 then 0.2 and 0.8; the red curve adds
    # 0.5 * 0.2 * 0.8 = 0.08 to both, the blue one takes as much.
    image = np.zeros((1, 1, 2, 3), np.float32)
    image[0, 0, 0], image[0, 0, 1] = 0.2, 0.6
    out = augment.recolour(
      image, colours(None, 1.5, 0.1, tone=(0.5, 0.0, -0.5))
    )
    expected = [[0.28, 0.2, 0.12], [0.88, 0.8, 0.72]]
    np.testing.assert_allclose(out[0, 0], expected, atol=1e-6)

  def test_the_matrix_maps_rows_to_columns(self):
    image = np.zeros((1, 1, 1, 3), np.float32)
    image[..., 0] = 0.5
    matrix = np.array([[0.1, 0.2, 0.4], [0, 0, 0], [0, 0, 0]])
    out = augment.recolour(image, colours(matrix))
    np.testing.assert_allclose(out[0, 0, 0], [0.05, 0.1, 0.2], atol=1e-6)

  def test_brightness_adds_one_number_an_image(self):
    image = 0.3 + 0.4 * self.floats()
    raw = np.round(image * 255).astype(np.uint8)
    view, _ = only(brightness=0.2)(KEY, raw, raw[..., 0])
    change = np.asarray(view - unit(raw))
    np.testing.assert_allclose(change.std((1, 2, 3)), 0, atol=1e-6)
    change = change.mean((1, 2, 3))
    assert np.abs(change).max() <= 0.2
    assert np.ptp(change) > 0.02

  def test_contrast_scales_around_the_mean_luma(self):
    raw = np.round((0.3 + 0.4 * self.floats()) * 255).astype(np.uint8)
    image = unit(raw)
    view, _ = only(contrast=0.2)(KEY, raw, raw[..., 0])
    luma = (image @ np.array([0.299, 0.587, 0.114])).mean((1, 2))
    luma = luma[:, None, None, None]
    factor = np.asarray(view - luma) / (image - luma)
    near = np.abs(image - luma) > 0.05
    for i in range(len(raw)):
      values = factor[i][near[i]]
      np.testing.assert_allclose(values, values[0], atol=1e-4)
      assert 0.8 <= values[0] <= 1.2
      assert abs(values[0] - 1) > 1e-3

  @parameterized.parameters("saturation", "hue")
  def test_grey_stays_grey_where_only_chroma_changes(self, name):
    raw = self.floats()[..., :1].repeat(3, -1)
    raw = np.round(raw * 255).astype(np.uint8)
    view, _ = only(**{name: 1.0 if name == "saturation" else 60.0})(
      KEY, raw, raw[..., 0]
    )
    np.testing.assert_allclose(view, raw / 255, atol=1e-6)

  def test_saturation_keeps_luma_and_scales_its_distance(self):
    raw = np.round((0.3 + 0.4 * self.floats()) * 255).astype(np.uint8)
    image = unit(raw)
    view, _ = only(saturation=0.3)(KEY, raw, raw[..., 0])
    weights = np.array([0.299, 0.587, 0.114])
    luma = (image @ weights)[..., None]
    np.testing.assert_allclose(
      np.asarray(view) @ weights, luma[..., 0], atol=1e-5
    )
    for i in range(len(raw)):
      chroma, changed = (image - luma)[i], (np.asarray(view) - luma)[i]
      factor = np.sum(changed * chroma) / np.sum(chroma * chroma)
      np.testing.assert_allclose(changed, factor * chroma, atol=1e-5)
      assert 1e-3 < abs(factor - 1) <= 0.3

  def test_hue_turns_around_grey_by_at_most_its_angle(self):
    raw = np.round((0.3 + 0.4 * self.floats(64)) * 255).astype(np.uint8)
    image = raw.astype(np.float64) / 255
    view, _ = only(hue=10.0)(KEY, raw, raw[..., 0])
    view = np.asarray(view, np.float64)
    np.testing.assert_allclose(view.sum(-1), image.sum(-1), atol=1e-5)
    before = image - image.mean(-1, keepdims=True)
    after = view - view.mean(-1, keepdims=True)
    lengths = [np.linalg.norm(x, axis=-1) for x in (before, after)]
    np.testing.assert_allclose(*lengths, atol=1e-5)
    clear = lengths[0] > 0.1
    product = np.where(clear, lengths[0] * lengths[1], 1)
    cosine = np.clip(np.sum(before * after, -1) / product, -1, 1)
    angle = np.rad2deg(np.arccos(cosine))
    largest = [a[c].max() for a, c in zip(angle, clear)]
    assert 9 < max(largest) < 10.01
    assert min(largest) < 1

  def test_gain_scales_each_channel_alone(self):
    raw = np.round((0.3 + 0.4 * self.floats()) * 255).astype(np.uint8)
    image = unit(raw)
    view, _ = only(gain=0.1)(KEY, raw, raw[..., 0])
    factor = np.asarray(view) / image
    np.testing.assert_allclose(factor.std((1, 2)), 0, atol=1e-5)
    factor = factor.mean((1, 2))
    assert np.abs(factor - 1).max() <= 0.1
    assert np.ptp(factor, axis=1).min() > 1e-3

  def test_tone_bends_and_keeps_black_and_white(self):
    raw = np.zeros((8, 1, 3, 3), np.uint8)
    raw[:, :, 1], raw[:, :, 2] = 51, 255
    view, _ = only(tone=0.5)(KEY, raw, raw[..., 0])
    np.testing.assert_array_equal(view[:, 0, 0], 0)
    np.testing.assert_allclose(view[:, 0, 2], 1, atol=1e-7)
    # At 0.2 the curve bends by tone * 0.2 * 0.8.
    bend = (np.asarray(view[:, 0, 1]) - 0.2) / 0.16
    assert bend.min() < 0 < bend.max()
    assert np.abs(bend).max() <= 0.5 + 1e-5
    assert np.ptp(bend, axis=1).min() > 1e-3
