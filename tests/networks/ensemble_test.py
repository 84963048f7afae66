import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kdseg.networks.teachers import ensemble

IMAGE = jax.random.uniform(jax.random.key(0), (2, 32, 32, 3))


def make_members(*channels):
  members = [tiny.Network(c) for c in channels]
  variables = [
    jax.jit(member.init)(jax.random.key(i), IMAGE)
    for i, member in enumerate(members)
  ]
  return members, variables


def test_the_probability_is_the_mean_of_the_members():
  members, variables = make_members(3, 5, 2)
  joined = jax.jit(ensemble.Ensemble(members).apply)(
    ensemble.join_variables(variables), IMAGE
  )
  expected = np.mean(
    [
      1 / (1 + np.exp(-np.asarray(jax.jit(m.apply)(v, IMAGE)["logits"])))
      for m, v in zip(members, variables)
    ],
    axis=0,
  )
  found = 1 / (1 + np.exp(-np.asarray(joined["logits"])))
  np.testing.assert_allclose(found, expected, atol=1e-6)


def test_taps_lie_side_by_side_in_the_members_order():
  members, variables = make_members(3, 5)
  joined = jax.jit(ensemble.Ensemble(members).apply)(
    ensemble.join_variables(variables), IMAGE
  )
  outs = [jax.jit(m.apply)(v, IMAGE) for m, v in zip(members, variables)]
  for tap, width in (("low", 8), ("high", 10), ("s16", 12)):
    assert joined[tap].shape[-1] == width
    np.testing.assert_allclose(
      joined[tap], np.concatenate([o[tap] for o in outs], -1), atol=1e-6
    )


class Constant(tiny.nn.Module):
  """Returns one logit everywhere, and one map of a given side."""

  logit: float
  side: int = 8
  extra: str = "low"

  def __call__(self, image, train=False, encoder_features=None):
    batch = image.shape[0]
    value = (
      self.logit if encoder_features is None else encoder_features["logit"]
    )
    return {
      "logits": jnp.full((batch, 32, 32), value),
      self.extra: jnp.full((batch, self.side, self.side, 1), value),
    }


def run(members, **options):
  return ensemble.Ensemble(members).apply({}, IMAGE, **options)


def test_by_hand_on_two_sure_members():
  # 0.9 and 0.5 make 0.7: logit ln(7 / 3).
  out = run([Constant(np.log(9.0)), Constant(0.0)])
  np.testing.assert_allclose(out["logits"], np.log(7 / 3), rtol=1e-5)


@pytest.mark.parametrize("logit", [-1e4, 1e4])
def test_a_unanimous_ensemble_keeps_a_finite_logit(logit):
  out = run([Constant(logit), Constant(logit)])
  assert np.isfinite(out["logits"]).all()
  assert (np.sign(out["logits"]) == np.sign(logit)).all()


def test_maps_are_resized_to_those_of_the_first_member():
  out = run([Constant(1.0, side=8), Constant(2.0, side=4)])
  assert out["low"].shape == (2, 8, 8, 2)
  np.testing.assert_allclose(out["low"][..., 1], 2.0, rtol=1e-6)


def test_a_tap_that_one_member_lacks_is_left_out():
  out = run([Constant(1.0), Constant(1.0, extra="high")])
  assert set(out) == {"logits"}


def test_encoder_features_go_to_the_member_they_are_of():
  out = run(
    [Constant(1.0), Constant(2.0)],
    encoder_features={"members_1": {"logit": -3.0}},
  )
  np.testing.assert_allclose(out["low"][..., 0], 1.0)
  np.testing.assert_allclose(out["low"][..., 1], -3.0)


def test_training_is_refused():
  with pytest.raises(ValueError, match="train its members"):
    run([Constant(1.0)], train=True)
