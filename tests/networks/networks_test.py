"""One contract for every row of networks, checked on shapes alone."""

import functools
import importlib.util
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_run import make_config

from kdseg import networks
from kdseg.distill import extensions
from kdseg.experiment import config as config_lib
from kdseg.networks.encoders import pretrained
from kdseg.networks.encoders import vit_weights
from kdseg.runtime import devices

HEIGHT, WIDTH = 64, 96
LIMITS = {"patch_unet_50k": 50_000, "patch_unet_12k": 12_000}
# Every row, and what its options change of the modules.
CASES = [(name, {}) for name in sorted(networks.NETWORKS)] + [
  ("lite_unet", {"stages": 3}),
  ("vit_unet", {"branch": "lite0", "trained_from": 7}),
]
every_network = pytest.mark.parametrize(
  ("name", "options"),
  CASES,
  ids=["-".join((name, *options)) for name, options in CASES],
)


def make_image(batch=2, height=HEIGHT, width=WIDTH):
  return jax.ShapeDtypeStruct((batch, height, width, 3), jnp.float32)


@functools.cache
def _trace(name, options=()):
  network = networks.make_network(name, **dict(options))
  variables = jax.eval_shape(network.init, jax.random.key(0), make_image(1))
  return network, variables


def trace(name, options):
  """Returns a network and the shapes of its variables, traced once."""
  return _trace(name, tuple(options.items()))


@every_network
def test_evaluates_to_the_named_maps_and_draws_nothing(name, options):
  network, variables = trace(name, options)
  # Evaluation is the default. Without keys, a draw would raise; without
  # `mutable`, an update would.
  out = jax.eval_shape(network.apply, variables, make_image())
  assert out["logits"].shape == (2, HEIGHT, WIDTH)
  assert set(out) == {"logits", *networks.TAPS}
  for tap, stride in networks.STRIDES.items():
    grid = (2, HEIGHT // stride, WIDTH // stride)
    assert out[tap].shape[:3] == grid, tap
    assert out[tap].ndim == 4, tap


@every_network
def test_trains_without_a_key_and_shares_every_statistic(name, options):
  _, variables = trace(name, options)
  network = networks.make_network(name, axis_name="devices", **options)

  def train(variables, image):
    return network.apply(variables, image, train=True, mutable=["batch_stats"])

  program, (out, updated) = jax.make_jaxpr(
    train, axis_env=[("devices", 2)], return_shape=True
  )(variables, make_image())
  assert out["logits"].shape == (2, HEIGHT, WIDTH)
  assert set(variables) == {"params", "batch_stats"}
  shapes = jax.tree.map(lambda x: x.shape, variables["batch_stats"])
  assert jax.tree.map(lambda x: x.shape, updated["batch_stats"]) == shapes
  norms = [
    path
    for path, _ in jax.tree_util.tree_leaves_with_path(variables["batch_stats"])
    if path[-1].key == "mean"
  ]
  assert len(re.findall(r"\bpsum\w*\[", str(program))) == len(norms) > 0


@every_network
def test_half_precision_leaves_parameters_and_logits_whole(name, options):
  network = networks.make_network(name, dtype="bfloat16", **options)
  out, variables = jax.eval_shape(
    network.init_with_output, jax.random.key(0), make_image(1)
  )
  assert variables == trace(name, options)[1]
  assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {
    jnp.dtype(jnp.float32)
  }
  assert out["logits"].dtype == jnp.float32
  for tap in networks.TAPS:
    assert out[tap].dtype == jnp.bfloat16, tap


@every_network
def test_a_pretrained_part_is_called_encoder(name, options):
  assert "encoder" in trace(name, options)[1]["params"]


@every_network
@pytest.mark.parametrize(("height", "width"), [(48, 64), (64, 40)])
def test_sides_not_divisible_by_32_are_refused(name, options, height, width):
  network = networks.make_network(name, **options)
  with pytest.raises(ValueError, match="must be divisible by"):
    jax.eval_shape(
      network.init, jax.random.key(0), make_image(1, height, width)
    )


STUDENT = """
from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers


class Dots(nn.Module):
  widths: tuple[int, ...] = (4,)
  dtype: object = jnp.float32
  axis_name: str | None = None

  @nn.compact
  def __call__(self, image, train=False):
    norm = layers.batch_norm(train, axis_name=self.axis_name)
    x = layers.space_to_depth(layers.normalize(image), 4)
    maps = {}
    for stride, (name, width) in enumerate(zip(TAPS, self.widths * 3)):
      x = layers.ConvBlock(width, norm, 1, dtype=self.dtype, name=name)(x)
      maps[name] = x
      x = layers.max_pool_2x(x)
    logits = layers.PixelHead(4, name="head")(maps["low"])
    return {"logits": logits, **maps}

  def published_weights(self):
    shape = (1, 1, 48, self.widths[0])
    yield {"params": {"kernel": jnp.ones(shape)}}, ("low", "conv")


TAPS = ("low", "high", "s16")
"""


def test_a_student_is_added_by_a_module_and_one_row(tmp_path):
  path = tmp_path / "dots.py"
  path.write_text(STUDENT)
  spec = importlib.util.spec_from_file_location("dots", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  config = make_config(
    tmp_path,
    students={"dots": {"widths": (2,)}},
    arms={"dots": {"methods": ("none",), "seeds": (0,)}},
  )
  added = extensions.Extensions(students={"dots": module.Dots})
  student = config_lib.parse(config, added).students["dots"]
  assert student.widths == (2,)
  assert student.axis_name == devices.AXIS
  variables = networks.make_variables(student, jax.random.key(0), size=32)
  kernel = variables["params"]["low"]["conv"]["kernel"]
  np.testing.assert_array_equal(kernel, 1)
  assert networks.count_macs(student, size=32) == 8 * 8 * (48 * 2 + 2 * 17) + (
    4 * 4 * 2 * 2 + 2 * 2 * 2 * 2
  )


@pytest.mark.parametrize("name", sorted(LIMITS))
def test_is_as_small_as_its_name_says(name):
  _, variables = trace(name, {})
  assert 0 < networks.count_parameters(variables) <= LIMITS[name]


def test_parameters_are_counted_without_statistics():
  variables = {
    "params": {"a": jnp.zeros((2, 3)), "b": {"c": jnp.zeros(4)}},
    "batch_stats": {"a": jnp.zeros(100)},
  }
  assert networks.count_parameters(variables) == 10


def test_an_unknown_network_is_refused_with_the_nearest_name():
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
def test_without_weights_nothing_is_read(sources, name):
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


def test_draws_the_same_where_jax_offers_no_cpu(
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
