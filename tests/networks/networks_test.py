"""One contract for every network that has a name, from its shapes alone."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg import networks
from kdseg.networks.encoders import pretrained
from kdseg.networks.encoders import vit_weights

STRIDES = {
  "low": 4,
  "high": 8,
  "s16": 16,
  "decoder_low": 4,
  "decoder_high": 8,
}
HEIGHT, WIDTH = 64, 96
NAMES = sorted(networks.NETWORKS)
LIMITS = {"patch_unet_50k": 50_000, "patch_unet_12k": 12_000}


@functools.cache
def _shapes(name, dtype=jnp.float32, axis_name=None):
  """Shapes of a network's variables; (network, variables)."""
  network = networks.make_network(name, dtype=dtype, axis_name=axis_name)
  image = jax.ShapeDtypeStruct((1, HEIGHT, WIDTH, 3), jnp.float32)
  return network, jax.eval_shape(network.init, jax.random.key(0), image)


def _apply(name, batch=2, dtype=jnp.float32, **options):
  network, variables = _shapes(name, dtype)
  image = jax.ShapeDtypeStruct((batch, HEIGHT, WIDTH, 3), jnp.float32)
  return jax.eval_shape(
    functools.partial(network.apply, **options), variables, image
  )


@pytest.mark.parametrize("name", NAMES)
def test_evaluates_to_the_named_maps_and_draws_nothing(name):
  # Without keys: a draw would raise. Without `mutable`: so would an update.
  out = _apply(name, train=False)
  assert out["logits"].shape == (2, HEIGHT, WIDTH)
  assert set(out) == {"logits", *networks.TAPS}
  for tap, stride in STRIDES.items():
    grid = (2, HEIGHT // stride, WIDTH // stride)
    assert out[tap].shape[:3] == grid, tap
    assert out[tap].ndim == 4, tap


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_is_the_default(name):
  assert _apply(name) == _apply(name, train=False)


@pytest.mark.parametrize("name", NAMES)
def test_trains_with_statistics_of_the_same_shapes_and_no_key(name):
  out, updated = _apply(name, train=True, mutable=["batch_stats"])
  _, variables = _shapes(name)
  assert out["logits"].shape == (2, HEIGHT, WIDTH)
  assert updated["batch_stats"] == variables["batch_stats"]
  assert set(variables) == {"params", "batch_stats"}


@pytest.mark.parametrize("name", NAMES)
def test_half_precision_leaves_parameters_and_logits_whole(name):
  _, variables = _shapes(name, jnp.bfloat16)
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    jnp.dtype(jnp.float32)
  }
  assert variables == _shapes(name)[1]
  out = _apply(name, dtype=jnp.bfloat16)
  assert out["logits"].dtype == jnp.float32
  assert out["low"].dtype == jnp.bfloat16


@pytest.mark.parametrize("name", NAMES)
def test_every_norm_shares_its_statistics_over_the_axis(name):
  network, variables = _shapes(name, axis_name="devices")

  def train(variables, image):
    return network.apply(variables, image, train=True, mutable=["batch_stats"])

  program = jax.make_jaxpr(train, axis_env=[("devices", 2)])(
    variables, jax.ShapeDtypeStruct((1, HEIGHT, WIDTH, 3), jnp.float32)
  )
  norms = [
    path
    for path, _ in jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
    if path[-1].key == "mean"
  ]
  assert len(re.findall(r"\bpsum\w*\[", str(program))) == len(norms) > 0


@pytest.mark.parametrize("name", NAMES)
def test_a_pretrained_part_is_called_encoder(name):
  _, variables = _shapes(name)
  assert "encoder" in variables["params"]


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_is_as_small_as_its_name_says(name):
  _, variables = _shapes(name)
  assert 0 < networks.count_parameters(variables) <= LIMITS[name]


def test_parameters_are_counted_without_statistics():
  variables = {
    "params": {"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4)}},
    "batch_stats": {"a": jnp.zeros(100)},
  }
  assert networks.count_parameters(variables) == 10


def test_a_misspelt_network_is_answered_with_the_nearest():
  with pytest.raises(ValueError, match=r'"patch_unt".*mean "patch_unet"'):
    networks.make_network("patch_unt")


def test_an_unknown_option_is_named_with_its_network():
  with pytest.raises(ValueError, match=r'network "enet": .*depth'):
    networks.make_network("enet", depth=3)


def test_lists_of_a_config_become_tuples():
  network = networks.make_network("patch_unet", widths=[4, 4, 4])
  assert network.widths == (4, 4, 4)


# --------------------------------------------------------- published weights


@pytest.fixture
def sources(monkeypatch):
  """Replaces drawing by zeros and reading by a record of what was wanted."""
  read = []

  def jit(function, **options):
    def zeros(*arguments):
      shapes = jax.eval_shape(function, *arguments)
      return jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), shapes)

    return zeros

  def insert(variables, found, path=("encoder",)):
    subtree = variables["params"]
    for name in path:
      subtree = subtree[name]
    read.append((*found, "/".join(path)))
    return variables

  monkeypatch.setattr(jax, "jit", jit)
  monkeypatch.setattr(pretrained, "insert", insert)
  monkeypatch.setattr(
    pretrained, "load_efficientnet_lite", lambda *which: ("lite", *which)
  )
  monkeypatch.setattr(
    vit_weights, "load_vit_small", lambda blocks: ("vit", blocks)
  )
  return read


def _read(sources, name, *, weights=True, **options):
  network = networks.make_network(name, **options)
  networks.make_variables(network, jax.random.key(0), size=64, weights=weights)
  return sources


@pytest.mark.parametrize(
  ("name", "options", "expected"),
  [
    ("vit_unet", {"taps": (1, 2)}, [("vit", 2, "encoder")]),
    (
      "vit_unet",
      {"taps": (1,), "branch": "lite2"},
      [("vit", 1, "encoder"), ("lite", "lite2", "decoder/encoder")],
    ),
    ("lite_unet", {"stages": 3}, [("lite", "lite0", 3, "encoder")]),
    (
      "deeplab",
      {"encoder_variant": "lite0"},
      [("lite", "lite0", "encoder")],
    ),
    (
      "unetpp",
      {"encoder_variant": "lite2"},
      [("lite", "lite2", "encoder")],
    ),
    ("pspnet", {"encoder_variant": "lite0"}, [("lite", "lite0", "encoder")]),
    ("patch_unet_12k", {}, []),
    ("enet", {}, []),
  ],
)
def test_published_weights_go_where_they_belong(
  sources, name, options, expected
):
  assert _read(sources, name, **options) == expected


@pytest.mark.parametrize("name", ["vit_unet", "lite_unet", "deeplab"])
def test_nothing_is_read_where_every_parameter_is_to_be_drawn(sources, name):
  assert _read(sources, name, weights=False) == []


def test_the_seed_decides_what_is_drawn():
  network = networks.make_network("patch_unet", widths=(2, 2, 2))
  first, again, other = (
    networks.make_variables(network, jax.random.key(seed), size=32)
    for seed in (0, 0, 1)
  )
  jax.tree.map(np.testing.assert_array_equal, first, again)
  assert any(
    (a != b).any()
    for a, b in zip(jax.tree.leaves(first), jax.tree.leaves(other))
  )


def test_is_drawn_alike_where_jax_has_no_processor_beside_its_devices(
  monkeypatch,
):
  network = networks.make_network("patch_unet", widths=(2, 2, 2))
  expected = networks.make_variables(network, jax.random.key(0), size=32)

  def none(backend):
    raise RuntimeError(f"Unknown backend {backend}")

  monkeypatch.setattr(jax, "local_devices", none)
  assert networks.cpu() is None
  found = networks.make_variables(network, jax.random.key(0), size=32)
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-6), found, expected
  )
