import json
import logging
import os
import time

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kdseg.runtime import checkpoint
from kdseg.training import state as state_lib

EXTRA = {"arms": {"x": {"diverged": "", "best": {"score": 0.5, "step": 2}}}}


class _Layer(nn.Module):
  @nn.compact
  def __call__(self, x):
    return nn.Dense(3)(x)


def make_state(*, keep_average=False, terms=()):
  """A state as the step makes it: with empty subtrees and empty optax nodes."""
  tx = optax.chain(
    optax.clip_by_global_norm(1.0), optax.adam(optax.constant_schedule(1e-3))
  )
  variables = _Layer().init(jax.random.key(0), jnp.ones((1, 2)))
  return state_lib.make_state(
    variables, {}, tx, seed=7, terms=terms, keep_average=keep_average
  )


def save(directory, step, tree, extra=EXTRA):
  with checkpoint.open_checkpoints(directory) as manager:
    checkpoint.save(manager, step, tree, extra)


def restore(directory):
  with checkpoint.open_checkpoints(directory) as manager:
    return checkpoint.restore_latest(manager)


def assert_same(left, right):
  assert jax.tree.structure(left) == jax.tree.structure(right)
  for a, b in zip(jax.tree.leaves(left), jax.tree.leaves(right)):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("keep_average", [False, True])
def test_a_state_comes_back_whole_with_its_empty_subtrees(
  tmp_path, keep_average
):
  state = make_state(keep_average=keep_average, terms=("mbf_low",))
  assert state.params["distiller"] == {}
  assert isinstance(state.opt_state[0], optax.EmptyState)
  save(tmp_path, 5, {"x": {"state": checkpoint.flatten(state)}})
  step, tree, extra = restore(tmp_path)
  assert step == 5
  assert extra == EXTRA
  assert_same(checkpoint.unflatten(tree["x"]["state"], state, "here"), state)


def test_nothing_saved_is_nothing_restored(tmp_path):
  assert restore(tmp_path / "new") is None


def test_the_latest_two_are_kept(tmp_path):
  with checkpoint.open_checkpoints(tmp_path) as manager:
    for step in (1, 2, 3):
      checkpoint.save(manager, step, {"w": np.full(2, step)}, {})
    assert sorted(manager.all_steps()) == [2, 3]
  step, tree, _ = restore(tmp_path)
  assert step == 3
  np.testing.assert_array_equal(tree["w"], [3, 3])


def test_the_latest_checkpoint_is_that_of_most_steps_not_the_newest_file(
  tmp_path, monkeypatch
):
  for step in (1, 2):
    save(tmp_path, step, {"w": np.full(2, step)})
  now = time.time()
  os.utime(tmp_path / "1", (now + 1e9, now + 1e9))
  os.utime(tmp_path / "2", (0, 0))
  monkeypatch.setattr(time, "time", lambda: 1.0)
  assert restore(tmp_path)[0] == 2
  save(tmp_path, 3, {"w": np.full(2, 3)})
  os.utime(tmp_path / "3", (0, 0))
  assert restore(tmp_path)[0] == 3
  assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {"2", "3"}


def _overwrite(folder):
  for path in folder.rglob("*"):
    if path.is_file():
      path.write_bytes(b"not what was here")


def _remove(folder):
  for path in sorted(folder.rglob("*"), reverse=True):
    if path.is_file():
      path.unlink()


@pytest.mark.parametrize("damage", [_overwrite, _remove])
def test_a_damaged_checkpoint_is_named_and_the_one_before_used(
  tmp_path, caplog, damage
):
  for step in (4, 8):
    save(tmp_path, step, {"w": np.full(2, step)}, {"at": step})
  damage(tmp_path / "8" / "tree")
  with caplog.at_level(logging.WARNING, logger="kdseg"):
    step, tree, extra = restore(tmp_path)
  assert (step, extra) == (4, {"at": 4})
  np.testing.assert_array_equal(tree["w"], [4, 4])
  assert "checkpoint of step 8" in caplog.text
  assert str(tmp_path) in caplog.text


def test_a_damaged_checkpoint_is_renamed_and_its_step_saved_again(tmp_path):
  for again in range(2):
    for step in (4, 8):
      save(tmp_path, step, {"w": np.full(2, step)}, {"again": again})
    _overwrite(tmp_path / "8" / "tree")
    assert restore(tmp_path)[0] == 4
    assert (tmp_path / "damaged-8").is_dir()
    assert not (tmp_path / "8").exists()
    _remove(tmp_path / "4")
    (tmp_path / "4").rename(tmp_path / f"old-{again}")
  save(tmp_path, 8, {"w": np.full(2, 8)})
  step, tree, _ = restore(tmp_path)
  assert step == 8
  np.testing.assert_array_equal(tree["w"], [8, 8])


def test_if_all_are_damaged_the_error_says_what_to_delete(tmp_path):
  for step in (4, 8):
    save(tmp_path, step, {"w": np.full(2, step)})
    _overwrite(tmp_path / str(step) / "tree")
  with pytest.raises(checkpoint.CheckpointError, match="delete the folder"):
    restore(tmp_path)


@pytest.mark.parametrize(
  ("change", "name", "what"),
  [
    (lambda s: s | {"a/kernel": np.zeros((2, 5))}, "a/kernel", r"\(2, 5\)"),
    (lambda s: s | {"c": np.zeros(1)}, "c", "unknown"),
    (lambda s: {k: v for k, v in s.items() if k != "b"}, "b", "missing"),
  ],
)
def test_a_checkpoint_of_another_network_is_refused_by_its_leaf(
  change, name, what
):
  like = {"a": {"kernel": np.zeros((2, 3))}, "b": np.zeros(4)}
  flat = change(checkpoint.flatten(like))
  with pytest.raises(checkpoint.CheckpointError) as error:
    checkpoint.unflatten(flat, like, "runs/x")
  assert error.match(f"runs/x is of another network: {name} ")
  assert error.match(what)


def test_finished_variables_come_back_with_their_description(tmp_path):
  variables = {"params": {"w": jnp.arange(3.0)}, "batch_stats": {}}
  checkpoint.save_variables(tmp_path / "x", variables, {"dice": 0.5})
  assert checkpoint.is_finished(tmp_path / "x")
  found, about = checkpoint.load_variables(
    tmp_path / "x", jax.eval_shape(lambda: {"params": {"w": jnp.zeros(3)}})
  )
  np.testing.assert_array_equal(found["params"]["w"], [0, 1, 2])
  assert about == {"dice": 0.5}


def test_variables_of_another_network_are_refused_by_their_folder(tmp_path):
  checkpoint.save_variables(tmp_path, {"params": {"w": np.zeros(3)}}, {})
  with pytest.raises(checkpoint.CheckpointError, match="params/w") as error:
    checkpoint.load_variables(tmp_path, {"params": {"w": np.zeros(4)}})
  assert str(tmp_path) in str(error.value)


def test_a_network_counts_as_finished_only_when_all_is_written(
  tmp_path, monkeypatch
):
  def interrupt(path, value):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch:
    patch.setattr(checkpoint, "write_json", interrupt)
    with pytest.raises(KeyboardInterrupt):
      checkpoint.save_variables(tmp_path, {"w": np.zeros(3)}, {})
  assert (tmp_path / "variables").exists()
  assert not checkpoint.is_finished(tmp_path)
  with pytest.raises(checkpoint.CheckpointError, match=r"about\.json"):
    checkpoint.load_variables(tmp_path)
  # And the next attempt is not in its own way.
  checkpoint.save_variables(tmp_path, {"w": np.ones(3)}, {})
  np.testing.assert_array_equal(
    checkpoint.load_variables(tmp_path)[0]["w"], np.ones(3)
  )


def test_damaged_variables_are_refused_by_their_folder(tmp_path):
  checkpoint.save_variables(tmp_path, {"w": np.zeros(3)}, {})
  _overwrite(tmp_path / "variables")
  with pytest.raises(checkpoint.CheckpointError, match="cannot be read"):
    checkpoint.load_variables(tmp_path)


def test_json_lines_are_appended(tmp_path):
  path = tmp_path / "log.jsonl"
  for record in ({"step": 1}, {"step": 2, "loss": 0.5}):
    checkpoint.append_json_line(path, record)
  lines = path.read_text().splitlines()
  assert [json.loads(line)["step"] for line in lines] == [1, 2]
