from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.losses import boundary


def _disc(side, radius):
  y, x = np.mgrid[:side, :side] - side / 2
  return jnp.asarray((y**2 + x**2 <= radius**2)[None], jnp.float32)


def _rectangle(side=32, rows=(8, 22), columns=(6, 26)):
  mask = np.zeros((1, side, side), np.float32)
  mask[0, slice(*rows), slice(*columns)] = 1
  return jnp.asarray(mask)


def _slow_band(labels, radius):
  """Restates the definition: does any pixel in reach differ from another?"""
  labels = np.asarray(labels)
  band = np.zeros_like(labels)
  batch, height, width = labels.shape
  for b in range(batch):
    for i in range(height):
      for j in range(width):
        seen = set()
        for y in range(max(i - radius, 0), min(i + radius + 1, height)):
          for x in range(max(j - radius, 0), min(j + radius + 1, width)):
            seen.add(labels[b, y, x])
        band[b, i, j] = len(seen) > 1
  return band


def _slow_grid(mask, height, width):
  """Restates the definition: the greatest of the pixels that a cell touches."""
  mask = np.asarray(mask)
  grid = np.zeros((mask.shape[0], height, width), np.float32)
  tall, wide = mask.shape[1] / height, mask.shape[2] / width
  for i in range(height):
    for j in range(width):
      for y in range(mask.shape[1]):
        for x in range(mask.shape[2]):
          apart = (
            y + 1 <= i * tall + 1e-9
            or y >= (i + 1) * tall - 1e-9
            or x + 1 <= j * wide + 1e-9
            or x >= (j + 1) * wide - 1e-9
          )
          if not apart:
            grid[:, i, j] = np.maximum(grid[:, i, j], mask[:, y, x])
  return grid


class BandTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  @parameterized.parameters(1, 2, 4)
  def test_equals_slow_loops(self, radius):
    noise = jax.random.uniform(jax.random.key(radius), (2, 11, 13))
    labels = (noise < 0.05).astype(jnp.float32)
    band = self.variant(lambda x: boundary.boundary_band(x, radius=radius))(
      labels
    )
    chex.assert_type(band, jnp.float32)
    np.testing.assert_array_equal(band, _slow_band(labels, radius))

  @parameterized.parameters(1, 3, 5)
  def test_band_of_a_rectangle_is_known_in_closed_form(self, radius):
    # 14 x 20 pixels, grown and shrunk by the radius on every side.
    r = 2 * radius
    expected = (14 + r) * (20 + r) - (14 - r) * (20 - r)
    band = boundary.boundary_band(_rectangle(), radius=radius)
    assert float(jnp.sum(band)) == expected

  def test_square_element_marks_a_closed_form_set_of_pixels(self):
    band = boundary.boundary_band(_rectangle(), radius=2)
    outer = _rectangle(rows=(6, 24), columns=(4, 28))
    inner = _rectangle(rows=(10, 20), columns=(8, 24))
    np.testing.assert_array_equal(band, outer - inner)

  def test_empty_and_full_masks_have_no_band(self):
    for labels in (jnp.zeros((1, 8, 9)), jnp.ones((1, 8, 9))):
      band = boundary.boundary_band(labels, radius=3)
      np.testing.assert_array_equal(band, 0)

  def test_a_lesion_cut_by_the_frame_has_no_edge_along_the_frame(self):
    labels = jnp.zeros((1, 16, 16)).at[:, :, :6].set(1)
    band = boundary.boundary_band(labels, radius=2)
    expected = jnp.zeros((1, 16, 16)).at[:, :, 4:8].set(1)
    np.testing.assert_array_equal(band, expected)

  def test_radius_zero_gives_no_band(self):
    band = boundary.boundary_band(_rectangle(), radius=0)
    np.testing.assert_array_equal(band, 0)

  def test_bool_and_bfloat16_labels_give_the_same_band(self):
    labels = _rectangle()
    band = boundary.boundary_band(labels, radius=3)
    for kind in (jnp.bool_, jnp.bfloat16, jnp.uint8):
      other = boundary.boundary_band(labels.astype(kind), radius=3)
      np.testing.assert_array_equal(other, band)

  def test_wrong_arguments_are_refused(self):
    with pytest.raises(ValueError, match="rank"):
      boundary.boundary_band(jnp.zeros((8, 8)), radius=1)
    with pytest.raises(ValueError, match="radius"):
      boundary.boundary_band(jnp.zeros((1, 8, 8)), radius=-1)


class GridTest(chex.TestCase):
  @chex.variants(with_jit=True, without_jit=True, with_pmap=True)
  @parameterized.parameters((3, 4), (6, 2), (5, 7), (12, 8), (20, 9), (1, 1))
  def test_equals_slow_loops(self, height, width):
    noise = jax.random.uniform(jax.random.key(0), (2, 12, 8))
    mask = (noise < 0.15).astype(jnp.float32)
    grid = self.variant(lambda x: boundary.to_grid(x, height, width))(mask)
    np.testing.assert_array_equal(grid, _slow_grid(mask, height, width))

  def test_neither_band_nor_grid_carries_a_gradient(self):
    noise = jax.random.uniform(jax.random.key(0), (1, 8, 8))
    for name, marks in (
      ("band", lambda x: boundary.boundary_band(x, radius=1)),
      ("grid", lambda x: boundary.to_grid(x, 4, 4)),
    ):
      with self.subTest(name):
        slope = jax.grad(lambda x, marks=marks: jnp.sum(marks(x)))(noise)
        np.testing.assert_array_equal(slope, 0)

  def test_one_pixel_marks_its_cell(self):
    mask = jnp.zeros((1, 16, 16)).at[0, 3, 8].set(1)
    grid = boundary.to_grid(mask, 4, 4)
    np.testing.assert_array_equal(grid[0], np.eye(4)[[0]].T @ np.eye(4)[[2]])


@pytest.mark.parametrize(
  ("side", "radius"), [(256, 5), (128, 3), (512, 10), (320, 6), (8, 1)]
)
def test_radius_scales_with_the_side_and_halves_go_up(side, radius):
  assert boundary.radius_at(side) == radius


def test_a_radius_at_256_may_be_given():
  assert boundary.radius_at(128, radius_at_256=12) == 6


class RegionTest(chex.TestCase):
  def setUp(self):
    super().setUp()
    self.labels = _rectangle()
    self.teacher = 4.0 * jnp.roll(self.labels, 2, 1) - 2.0
    self.student = 4.0 * jnp.roll(self.labels, 3, 2) - 2.0

  def _region(self, name, **arguments):
    return boundary.region(name, self.labels, radius=2, **arguments)

  def _every(self):
    return {
      name: self._region(
        name,
        teacher_logits=self.teacher,
        student_logits=self.student,
        rng=jax.random.key(0),
      )
      for name in boundary.REGIONS
    }

  def test_every_region_is_a_mask_with_no_gradient(self):
    for name, marked in self._every().items():
      with self.subTest(name):
        chex.assert_shape(marked, self.labels.shape)
        chex.assert_type(marked, jnp.float32)
        assert set(np.unique(marked)) <= {0.0, 1.0}

    def total(labels, teacher, student):
      return sum(
        jnp.sum(
          boundary.region(
            name,
            labels,
            radius=2,
            teacher_logits=teacher,
            student_logits=student,
            rng=jax.random.key(0),
          )
        )
        for name in boundary.REGIONS
      )

    slopes = jax.grad(total, (0, 1, 2))(self.labels, self.teacher, self.student)
    for slope in slopes:
      np.testing.assert_array_equal(slope, 0)

  def test_no_two_regions_are_the_same(self):
    regions = list(self._every().items())
    for index, (name, marked) in enumerate(regions):
      for other, also_marked in regions[:index]:
        if {name, other} != {"all", "teacher_uncertain"}:
          assert np.any(marked != also_marked), f"{name} = {other}"

  def test_interior_exterior_and_band_cover_each_pixel_once(self):
    band, interior, exterior, rest = (
      self._region(name)
      for name in ("gt_band", "interior", "exterior", "inv_band")
    )
    np.testing.assert_array_equal(band + interior + exterior, 1)
    np.testing.assert_array_equal(interior + exterior, rest)
    np.testing.assert_array_equal(interior * self.labels, interior)
    assert float(jnp.sum(interior)) == 10 * 16

  def test_teacher_band_is_the_band_of_the_teachers_mask(self):
    marked = self._region("teacher_band", teacher_logits=self.teacher)
    shifted = jnp.roll(self._region("gt_band"), 2, 1)
    np.testing.assert_array_equal(marked, shifted)
    union = self._region("union", teacher_logits=self.teacher)
    np.testing.assert_array_equal(
      union, jnp.maximum(self._region("gt_band"), shifted)
    )

  def test_uncertain_means_a_probability_between_a_tenth_and_nine_tenths(self):
    probability = jnp.asarray([0.05, 0.09, 0.11, 0.5, 0.89, 0.91])
    logits = jnp.log(probability / (1 - probability))[None, None]
    marked = boundary.region(
      "teacher_uncertain",
      jnp.zeros((1, 1, 6)),
      radius=2,
      teacher_logits=logits,
    )
    np.testing.assert_array_equal(marked[0, 0], [0, 0, 1, 1, 1, 0])

  def test_disagreement_is_where_the_masks_differ(self):
    marked = self._region(
      "disagreement", teacher_logits=self.teacher, student_logits=self.student
    )
    expected = (self.teacher > 0) ^ (self.student > 0)
    np.testing.assert_array_equal(marked, expected)

  def test_all_and_none(self):
    np.testing.assert_array_equal(self._region("all"), 1)
    np.testing.assert_array_equal(self._region("none"), 0)

  def test_a_region_without_what_it_needs_is_refused(self):
    for name, missing in (
      ("teacher_band", "teacher_logits"),
      ("teacher_uncertain", "teacher_logits"),
      ("union", "teacher_logits"),
      ("disagreement", "teacher_logits"),
      ("rolled_band", "rng"),
    ):
      with pytest.raises(ValueError, match=f"'{name}' needs {missing}"):
        self._region(name)
    with pytest.raises(ValueError, match="needs student_logits"):
      self._region("disagreement", teacher_logits=self.teacher)
    with pytest.raises(ValueError, match=r"gt_band.*'edge'"):
      self._region("edge")
    with pytest.raises(ValueError, match="shape"):
      self._region("teacher_band", teacher_logits=self.teacher[:, :5])


class RolledBandTest(chex.TestCase):
  def _offsets(self, side, images, seed=0):
    """Where the centre of a one-pixel lesion's band went, modulo the side."""
    labels = jnp.zeros((images, side, side)).at[:, 0, 0].set(1)
    # One pixel at the corner and radius 1: pixels (0..1, 0..1), and rolled
    # the first of them goes to the offset itself.
    band = boundary.boundary_band(labels, radius=1)
    rolled = np.asarray(
      boundary.region("rolled_band", labels, radius=1, rng=jax.random.key(seed))
    )
    assert np.all(np.sum(rolled, (1, 2)) == np.sum(band, (1, 2)))
    down, right = np.roll(rolled, -1, 1), np.roll(rolled, -1, 2)
    first = rolled * down * right * np.roll(down, -1, 2)
    image, *offset = np.nonzero(first)
    assert list(image) == list(range(images))
    return np.stack(offset, 1)

  @parameterized.parameters(16, 18, 24)
  def test_each_image_moves_by_a_quarter_of_each_side_or_more(self, side):
    offsets = self._offsets(side, 40)
    assert np.min(offsets) >= side / 4
    assert np.max(offsets) <= 3 * side / 4
    assert len(np.unique(offsets, axis=0)) > 3

  def test_area_and_shape_are_kept_to_the_pixel_and_to_the_cell(self):
    labels = jnp.concatenate(
      [_disc(256, radius) for radius in (30, 64, 90)] * 2
    )
    band = boundary.region("gt_band", labels, radius=5)
    rolled = boundary.region(
      "rolled_band", labels, radius=5, rng=jax.random.key(1)
    )
    for side in (256, 64, 32, 16):
      there = jnp.sum(boundary.to_grid(band, side, side), (1, 2))
      here = jnp.sum(boundary.to_grid(rolled, side, side), (1, 2))
      np.testing.assert_array_equal(there, here)
    # Elsewhere: of the smallest lesion's band, nothing stays.
    assert float(jnp.sum((band * rolled)[0])) == 0

  def test_same_key_same_place_and_another_key_another_place(self):
    first, again = self._offsets(16, 8), self._offsets(16, 8)
    np.testing.assert_array_equal(first, again)
    assert np.any(first != self._offsets(16, 8, seed=1))

  def test_an_images_offset_follows_its_key_not_its_batch(self):
    labels = jnp.tile(_rectangle(), (4, 1, 1))
    rng = jax.random.split(jax.random.key(0), 4)
    whole = boundary.region("rolled_band", labels, radius=2, rng=rng)
    parts = [
      boundary.region(
        "rolled_band", labels[i : i + 2], radius=2, rng=rng[i : i + 2]
      )
      for i in (0, 2)
    ]
    np.testing.assert_array_equal(whole, jnp.concatenate(parts))
