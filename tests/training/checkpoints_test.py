import json

import jax.numpy as jnp
import numpy as np
import tiny

from kdseg.runtime import checkpoint
from kdseg.training import arms as arms_lib
from kdseg.training import checkpoints
from kdseg.training import state as state_lib


def make_arm(value, **options):
  params = {"network": {"w": jnp.full(2, value)}, "distiller": {}}
  state = state_lib.TrainState(
    step=jnp.asarray(3, jnp.int32),
    seed=jnp.asarray(1, jnp.int32),
    params=params,
    batch_stats={},
    opt_state=(),
    average={},
    balance={"task": jnp.asarray(0.5)},
  )
  return arms_lib.ArmState(state, step=None, **options)


def test_arms_come_back_with_their_best_and_their_failures(tmp_path):
  best = {"params": {"w": np.full(2, 7.0, np.float32)}, "batch_stats": {}}
  arms = {
    "good": make_arm(1.0, best={"variables": best, "score": 0.75, "step": 2}),
    "sick": make_arm(2.0, diverged="loss not finite at step 1"),
  }
  with checkpoint.open_checkpoints(tmp_path) as manager:
    checkpoints.save(manager, 3, arms)
    fresh = {"good": make_arm(0.0), "sick": make_arm(0.0)}
    assert checkpoints.resume(manager, fresh, "students", 9) == 3
  for name, arm in arms.items():
    np.testing.assert_array_equal(
      fresh[name].state.params["network"]["w"],
      arm.state.params["network"]["w"],
    )
    assert fresh[name].state.params["distiller"] == {}
    assert fresh[name].diverged == arm.diverged
  assert fresh["good"].best["score"] == 0.75
  assert fresh["good"].best["step"] == 2
  np.testing.assert_array_equal(
    fresh["good"].best["variables"]["params"]["w"], [7, 7]
  )
  assert fresh["sick"].best == {}


def test_an_arm_without_weights_leaves_a_reason_in_their_place(tmp_path):
  arm = make_arm(1.0, diverged="loss not finite at step 1")
  spec = arms_lib.ArmSpec(
    "plain", tiny.Network(2), 0, tmp_path / "x", {"arm": "plain"}
  )
  checkpoints.write_result(spec, arm, steps=9)
  assert not checkpoint.is_finished(tmp_path / "x")
  about = json.loads((tmp_path / "x" / "failed.json").read_text())
  assert about["diverged"] == "loss not finite at step 1"
  assert about["arm"] == "plain"
