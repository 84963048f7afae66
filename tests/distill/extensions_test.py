"""What a user adds without a change to the package."""

import importlib.util

from distilling import BATCH
from distilling import TABLES
from distilling import distil
from distilling import make_distiller
from distilling import make_method
from distilling import make_outputs
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tiny

from kdseg.distill import method as method_lib
from kdseg.distill.extensions import Extensions
from kdseg.runtime import devices
from kdseg.training import state as state_lib
from kdseg.training import step as step_lib

# A term in one place: its function and its record.
MINE = """
import jax.numpy as jnp
from kdseg.distill.term import ALIGNED
from kdseg.distill.term import Term

def distance(inputs, tap):
  student, teacher = inputs.features(tap)
  return jnp.mean(jnp.abs(student - teacher), (1, 2, 3))

TERM = Term(
  "mine", distance, ALIGNED, per_tap=True, calibrated=True, weight=0.5,
  taps=("low",), source="Doe, 2026",
)
"""


def train_a_step(method):
  """The metrics of a step on four devices."""
  network = tiny.Network(3, axis_name=devices.AXIS)
  distiller, params = make_distiller(method)
  _, teacher_out, labels = make_outputs()
  # An image a device.
  batch = jax.tree.map(
    lambda x: np.concatenate([x, x]),
    {"mask": labels, "teacher_out": teacher_out},
  )
  image = np.zeros((2 * BATCH, tiny.SIDE, tiny.SIDE, 3), np.float32)
  tx = optax.sgd(0.1)
  state = state_lib.make_state(
    network.init(jax.random.key(0), image),
    params,
    tx,
    seed=0,
    terms=method.balanced_names,
    keep_average=False,
  )
  train_step = devices.parallel(
    step_lib.make_train_step(
      network,
      tx,
      segmentation={"bce": 1.0},
      steps=10,
      method=method,
      distiller=distiller,
    ),
    replicated=1,
    out_replicated=True,
  )
  batch = devices.shard({"image": image, **batch})
  return train_step(devices.replicate(state), batch)[1]


def test_a_term_of_one_file_is_trained_logged_balanced_and_listed(tmp_path):
  path = tmp_path / "mine.py"
  path.write_text(MINE)
  spec = importlib.util.spec_from_file_location("mine", path)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)

  method = method_lib.make_method(
    {"terms": {"mine": 0.5}, "taps": ("low",), "distill_ramp": 0.0},
    Extensions(terms={"mine": module.TERM}),
  )
  assert method.term_names == {"mine": ("mine_low",)}
  assert method.balanced_names == ("mine_low",)
  assert method.aligns
  metrics = train_a_step(method)
  assert metrics["finite"] == 1
  # Calibrated: as large as half the task.
  np.testing.assert_allclose(
    metrics["weight/mine_low"] * metrics["mine_low"],
    0.5 * metrics["task"],
    rtol=1e-4,
  )
  row = "| mine | low | 0.5 | calibrated | no | 1x1 | Doe, 2026 |\n"
  assert row in TABLES["describe_terms"]([module.TERM])


def add(name, loss, **switches):
  return method_lib.make_method(
    {"terms": {name: 2.0}, **switches}, Extensions(terms={name: loss})
  )


def test_a_plain_function_is_a_term_of_the_mean_of_what_it_returns():
  method = add(
    "mine", lambda out, teacher_out, labels, rng: jnp.array([1.0, 3.0])
  )
  assert distil(method) == {"mine": 2.0}
  assert method.term_names == {"mine": ("mine",)}
  assert method.balanced_names == ()


@pytest.mark.parametrize("taps", [("low",), ()])
def test_a_plain_function_gets_the_taps_of_its_method_or_none(taps):
  seen = []

  def loss(out, teacher_out, labels, rng):
    seen.append(teacher_out)
    return jnp.mean(out["logits"], (1, 2))

  method = add("mine", loss, taps=taps)
  assert method.needs_taps == bool(taps)
  assert not method.aligns
  _, teacher_out, _ = make_outputs()
  given = {n: teacher_out[n] for n in ("logits", *taps)}
  distil(method, teacher_out=given)
  assert seen[0].keys() == given.keys()


def test_a_plain_function_moves_no_teacher():
  def loss(out, teacher_out, labels, rng):
    return jnp.mean(out["logits"] * teacher_out["logits"], (1, 2))

  _, teacher_out, _ = make_outputs()
  gradient = jax.grad(
    lambda logits: distil(
      add("mine", loss), teacher_out={**teacher_out, "logits": logits}
    )["mine"]
  )(teacher_out["logits"])
  assert not gradient.any()


def test_a_plain_function_gets_a_key_an_image():
  seen = []
  add_up = lambda out, teacher_out, labels, rng: (  # noqa: E731
    seen.append(rng.shape) or jax.vmap(jax.random.uniform)(rng)
  )
  first, other = (distil(add("mine", add_up), seed=s)["mine"] for s in (0, 1))
  assert seen == [(BATCH,), (BATCH,)]
  assert first != other


def test_a_term_without_a_value_an_image_is_refused():
  with pytest.raises(ValueError, match=r"mine gives \(\), not one value an im"):
    distil(add("mine", lambda out, teacher_out, labels, rng: jnp.zeros(())))


def test_a_region_of_a_user_is_where_features_are_hidden():
  everywhere = method_lib.make_method(
    {"terms": {"mbf": 1.0}, "region": "mine", "mask_ratio": 1.0},
    Extensions(regions={"mine": lambda labels, radius: jnp.ones_like(labels)}),
  )
  expected = make_method("mbf", region="all", mask_ratio=1.0)
  module, params = make_distiller(expected)
  found, wanted = (
    distil(method, module=module, params=params)
    for method in (everywhere, expected)
  )
  jax.tree.map(np.testing.assert_array_equal, found, wanted)


@pytest.mark.parametrize(
  "mine",
  [
    Extensions(terms={"fitnet": None}),
    Extensions(terms={"loss": None}),
    Extensions(terms={"dice": None}),
    Extensions(regions={"all": None}),
    Extensions(students={"enet": None}),
  ],
  ids=lambda mine: str(mine)[:40],
)
def test_a_name_that_the_package_has_is_refused(mine):
  with pytest.raises(ValueError, match="is taken; choose another"):
    mine.check_names()
