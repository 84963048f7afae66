import jax
import jax.numpy as jnp
import numpy as np
import optax

from kdseg.training import state as state_lib

VARIABLES = {
  "params": {"w": jnp.arange(3.0)},
  "batch_stats": {"mean": jnp.ones(2)},
}
DISTILLER = {"low": {"kernel": jnp.ones((2, 2))}}


def make_state(variables=VARIABLES, **options):
  return state_lib.make_state(
    variables, DISTILLER, optax.adam(1e-3), seed=4, **options
  )


def test_starts_at_step_0_with_nothing_measured():
  state = make_state(terms=("mbf_low",))
  assert state.step.dtype == state.seed.dtype == jnp.int32
  assert (int(state.step), int(state.seed)) == (0, 4)
  assert state.balance == {"task": 0.0, "count": 0.0, "mbf_low": 0.0}


def test_the_optimizer_sees_the_network_and_the_distiller():
  state = make_state()
  assert state.params == {
    "network": VARIABLES["params"],
    "distiller": DISTILLER,
  }
  moments = state.opt_state[0].mu
  assert jax.tree.structure(moments) == jax.tree.structure(state.params)


def test_the_average_is_of_the_network_alone_and_in_buffers_of_its_own():
  state = make_state(keep_average=True)
  assert set(state.average) == {"params", "batch_stats"}
  np.testing.assert_array_equal(
    state.average["params"]["w"], VARIABLES["params"]["w"]
  )
  # The step donates its state: one buffer must not be given twice.
  pointers = [
    leaf.unsafe_buffer_pointer()
    for leaf in (state.average["params"]["w"], state.params["network"]["w"])
  ]
  assert pointers[0] != pointers[1]


def test_exports_the_average_where_one_is_kept():
  state = make_state(keep_average=True)
  state = state.replace(
    average={"params": {"w": jnp.full(3, 7.0)}, "batch_stats": {}}
  )
  assert state_lib.network_variables(state) == state.average


def test_exports_the_network_without_its_distiller():
  found = state_lib.network_variables(make_state())
  assert found == VARIABLES


def test_a_network_without_statistics_has_an_empty_subtree():
  state = make_state({"params": VARIABLES["params"]}, keep_average=True)
  assert state.batch_stats == {}
  assert state.average["batch_stats"] == {}
