"""Every term and every switch: that it runs, and computes what it says."""

import functools

from distilling import BATCH
from distilling import distil
from distilling import make_distiller
from distilling import make_method
from distilling import make_outputs
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kdseg.distill import method as method_lib
from kdseg.distill import objective
from kdseg.distill import term as term_lib
from kdseg.distill import terms as terms_lib
from kdseg.losses import boundary
from kdseg.losses import logits as logit_losses
from kdseg.losses import relations

NAMES = tuple(term.name for term in terms_lib.TERMS)


def names_that_compare(*kinds):
  return tuple(t.name for t in terms_lib.TERMS if t.compares in kinds)


SWITCHES = [
  {"region": "gt_band"},
  *({"generator": g} for g in ("c3rc3_norm", "dwconv", "1x1", "identity")),
  *({"normalise": n} for n in ("std", "l2")),
  *({"loss_region": r} for r in ("band", "band_weighted")),
  {"granularity": 2},
  {"ratio_outside": 0.3},
  {"generator_width": 2},
  {"taps": ("s16", "low")},
  *({"term": term} for term in NAMES if term not in ("mbf", "m2bf")),
  {"term": "dist", "dist_inter_weight": 1.0},
  {"term": "maskd", "maskd_tokens": 1},
  *({"term": "m2bf", "topology": t} for t in ("cascade", "parallel")),
  # The deepest tap comes first.
  {"term": "m2bf", "topology": "multiscale", "taps": ("high", "low")},
  {"term": "m2bf", "head_input": "residual"},
  {"term": "m2bf", "share_generators": True},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_runs_and_teaches_the_student(switches):
  out, teacher_out, _ = make_outputs()
  method = make_method(**switches)
  module, params = make_distiller(method)
  teacher_std = {
    tap: jnp.full(teacher_out[tap].shape[-1], 2.0)
    for tap in teacher_out
    if tap != "logits"
  }

  def total(out, params):
    terms = distil(
      method, module=module, params=params, out=out, teacher_std=teacher_std
    )
    names = method.term_names
    assert set(terms) == {n for term in names.values() for n in term}
    assert all(term.shape == () for term in terms.values())
    assert all(term.dtype == jnp.float32 for term in terms.values())
    return sum(terms.values())

  gradients = jax.jit(jax.value_and_grad(total, (0, 1)))
  value, (by_out, by_params) = gradients(out, params)
  assert np.isfinite(value)
  assert value > 0
  for leaf in jax.tree.leaves((by_out, by_params)):
    assert np.isfinite(leaf).all()
  wanted = method.taps if method.needs_taps else ("logits",)
  if "emkd" in method.terms:
    wanted = ("logits", *method.taps)
  for name in wanted:
    assert by_out[name].any(), f"no gradient reaches {name}"


# A band of some width on 32 pixels, so that its switches have an effect.
BAND = {"radius": 16.0}
CHANGES = [
  *({"region": region} for region in boundary.REGIONS if region != "gt_band"),
  {"radius": 80.0},
  {"mask_ratio": 0.2},
  {"ratio_outside": 0.5},
  {"granularity": 2},
  {"loss_region": "band"},
  {"loss_region": "band_weighted"},
  {"normalise": "std"},
  {"normalise": "l2"},
  *({"term": "m2bf", **switch} for switch in (
    {"topology": "parallel"},
    {"head_input": "residual"},
    {"head_weights": "last"},
    {"head_weights": "geometric"},
    {"band_schedule": "narrowing"},
    {"band_schedule": "widening"},
    {"ratio_schedule": "increasing"},
  )),
  {"term": "kd", "kd_temperature": 1.0},
  {"term": "cwd", "cwd_temperature": 1.0},
  {"term": "dist", "dist_inter_weight": 1.0},
  {"term": "mgd", "mask_ratio": 0.2},
  {"term": "mgd", "granularity": 2},
  {"term": "mgd", "normalise": "std"},
  {"term": "fitnet", "normalise": "l2"},
]  # fmt: skip


@functools.cache
def default(term):
  """The terms without a switch; what they train, for others to start from."""
  _, teacher_out, _ = make_outputs()
  teacher_std = {
    tap: jnp.full(teacher_out[tap].shape[-1], 2.0) for tap in ("low", "high")
  }
  method = make_method(term, **BAND)
  module, params = make_distiller(method)
  given = {"module": module, "params": params, "teacher_std": teacher_std}
  return distil(method, **given), given


@pytest.mark.parametrize("switches", CHANGES, ids=str)
def test_every_switch_reaches_its_loss(switches):
  before, given = default(switches.get("term", "mbf"))
  after = distil(make_method(**{**BAND, **switches}), **given)
  assert before.keys() == after.keys()
  for name in before:
    assert before[name] != after[name], name


def test_the_weight_of_the_band_reaches_its_loss():
  _, given = default("mbf")
  one, other = (
    distil(
      make_method(loss_region="band_weighted", band_weight=weight, **BAND),
      **given,
    )
    for weight in (1.0, 5.0)
  )
  for name in one:
    assert one[name] != other[name]


def test_hiding_everywhere_is_mgd():
  mbf = make_method("mbf", region="all")
  module, params = make_distiller(mbf)
  given = {"module": module, "params": params}
  hidden = distil(mbf, **given)
  whole = distil(make_method("mgd"), **given)
  for tap in mbf.taps:
    np.testing.assert_allclose(
      hidden[f"mbf_{tap}"], whole[f"mgd_{tap}"], rtol=1e-6
    )


def test_m2bf_with_one_head_is_mbf():
  mbf, m2bf = make_method("mbf"), make_method("m2bf", heads=1)
  module, params = make_distiller(mbf)
  given = {"module": module, "params": params}
  one, other = distil(mbf, **given), distil(m2bf, **given)
  for tap in mbf.taps:
    np.testing.assert_allclose(
      one[f"mbf_{tap}"], other[f"m2bf_{tap}"], rtol=1e-6
    )


def test_hiding_nothing_before_no_generator_is_fitnet():
  mbf = make_method("mbf", mask_ratio=0.0, generator="identity")
  module, params = make_distiller(mbf)
  given = {"module": module, "params": params}
  one, other = distil(mbf, **given), distil(make_method("fitnet"), **given)
  for tap in mbf.taps:
    np.testing.assert_allclose(
      one[f"mbf_{tap}"], other[f"fitnet_{tap}"], rtol=1e-6
    )


def test_shuffled_teacher_outputs_are_those_for_another_image():
  _, teacher_out, _ = make_outputs()
  method = make_method("kd", teacher_out="shuffled")
  other = {name: x[::-1] for name, x in teacher_out.items()}  # of two images
  expected = distil(make_method("kd"), teacher_out=other)["kd"]
  np.testing.assert_allclose(distil(method)["kd"], expected, rtol=1e-6)
  assert distil(make_method("kd"))["kd"] != expected


def test_a_lone_image_has_no_other_to_take_the_outputs_of():
  out, teacher_out, labels = (
    jax.tree.map(lambda x: x[:1], t) for t in make_outputs()
  )
  with pytest.raises(ValueError, match=r"raise data\.batch_size"):
    distil(
      make_method("kd", teacher_out="shuffled"),
      out=out,
      teacher_out=teacher_out,
      labels=labels,
    )


def test_the_key_decides_what_is_hidden_and_nothing_else():
  method = make_method("mbf", taps=("low",))
  module, params = make_distiller(method)
  at = functools.partial(distil, method, module=module, params=params)
  assert at(seed=1) == at(seed=1)
  assert at(seed=1) != at(seed=2)
  still = make_method("mbf", taps=("low",), mask_ratio=0.0)
  at = functools.partial(distil, still, module=module, params=params)
  assert at(seed=1) == at(seed=2)


@pytest.mark.parametrize(
  "region", ["gt_band", "teacher_band", "union", "disagreement"]
)
def test_the_teacher_gets_no_gradient(region):
  _, teacher_out, _ = make_outputs()
  terms = dict.fromkeys(set(NAMES) - {"mgd", "m2bf"}, 1.0)
  method = method_lib.Method(terms=terms, taps=("low",), region=region)
  module, params = make_distiller(method)
  gradient = jax.jit(
    jax.grad(
      lambda teacher_out: sum(
        distil(
          method, module=module, params=params, teacher_out=teacher_out
        ).values()
      )
    )
  )(teacher_out)
  assert not any(leaf.any() for leaf in jax.tree.leaves(gradient))


def test_terms_are_the_losses_they_are_named_after():
  out, teacher_out, labels = make_outputs()
  terms = names_that_compare(term_lib.FEATURES, term_lib.LOGITS)
  found = distil(method_lib.Method(terms=dict.fromkeys(terms, 1.0)))
  pair = out["logits"], teacher_out["logits"]
  taps = [{tap: x[tap] for tap in ("low", "high")} for x in (out, teacher_out)]
  expected = {
    "kd": logit_losses.kd(*pair),
    "cwd": logit_losses.cwd(*pair),
    "dist": logit_losses.dist(*pair),
    # At 32 pixels the window of 7 pixels of 256 is one of 3.
    "bpkd": logit_losses.bpkd(*pair, labels, radius=1),
    "ultralbm": logit_losses.ultralbm(*pair),
    "emkd": relations.emkd(*pair, *taps, labels),
  }
  for tap in ("low", "high"):
    pair = out[tap], teacher_out[tap]
    expected |= {
      f"at_{tap}": relations.at(*pair),
      f"skd_pa_{tap}": relations.skd_pa(*pair),
      f"ifvd_{tap}": relations.ifvd(*pair, labels),
      f"cirkd_lite_{tap}": relations.cirkd_lite(*pair),
    }
  assert found.keys() == expected.keys()
  for name, value in expected.items():
    np.testing.assert_allclose(found[name], value.mean(), rtol=1e-5)


@pytest.mark.parametrize("term", names_that_compare(term_lib.FEATURES))
def test_a_student_on_a_coarser_grid_is_compared_on_the_teachers(term):
  out, _, _ = make_outputs()
  method = make_method(term, taps=("low",))
  small = {**out, "low": out["low"][:, ::2, ::2]}
  grown = {
    **out, "low": jax.image.resize(small["low"], out["low"].shape, "bilinear")
  }  # fmt: skip
  one, other = distil(method, out=small), distil(method, out=grown)
  for name in one:
    np.testing.assert_allclose(one[name], other[name], rtol=1e-5)


def test_the_masks_of_maskd_are_those_of_its_trained_tokens():
  method = make_method("maskd", taps=("low",))
  module, params = make_distiller(method)
  at = functools.partial(distil, method, module=module)
  # Tokens of zeros find each cell by a half: of the squared error there is left
  # 1/2 (1/2)^2 / (1/2), a quarter.
  params["low"]["tokens"] = jnp.zeros_like(params["low"]["tokens"])
  fitnet = distil(
    make_method("fitnet", taps=("low",)), module=module, params=params
  )
  np.testing.assert_allclose(
    at(params=params)["maskd_low"], fitnet["fitnet_low"] / 4, rtol=1e-5
  )


def test_the_tokens_learn_from_their_fit_and_the_student_from_the_distance():
  out, _, _ = make_outputs()
  method = make_method("maskd", taps=("low",))
  module, params = make_distiller(method)

  def slopes(name):
    return jax.grad(
      lambda out, params: distil(method, module=module, params=params, out=out)[
        name
      ],
      (0, 1),
    )(out, params)

  by_out, by_params = slopes("maskd_low")
  assert by_out["low"].any()
  assert by_params["low"]["align"]["conv"]["kernel"].any()
  assert not by_params["low"]["tokens"].any()
  by_out, by_params = slopes("maskd_tokens_low")
  assert not by_out["low"].any()
  assert by_params["low"]["tokens"].any()
  assert by_params["low"]["probe"]["kernel"].any()
  assert not by_params["low"]["align"]["conv"]["kernel"].any()


def test_a_term_that_the_method_lacks_is_not_computed():
  out, teacher_out, labels = make_outputs()

  def unwanted(*arguments, **options):
    raise AssertionError("the distiller was called")

  terms = objective.distillation_terms(
    {"logits": out["logits"]},
    {"logits": teacher_out["logits"]},
    labels,
    jax.random.key(0),
    method=make_method("kd"),
    distiller=unwanted,
  )
  assert set(terms) == {"kd"}


def test_a_rolled_band_is_drawn_apart_from_what_is_hidden():
  out, teacher_out, labels = make_outputs()
  keys = jax.random.split(jax.random.key(0), BATCH)
  inputs = term_lib.Inputs(
    out, teacher_out, {}, labels, keys, make_method(region="rolled_band")
  )
  [found] = inputs.regions
  at = functools.partial(
    boundary.region, "rolled_band", labels, radius=boundary.radius_at(tiny.SIDE)
  )
  apart = jax.vmap(lambda key: jax.random.fold_in(key, 0x0FF5E7))(keys)
  np.testing.assert_array_equal(found, at(rng=apart))
  assert np.any(found != at(rng=keys))


def test_taps_draw_apart():
  keys = [
    jax.random.key_data(terms_lib.tap_key(jax.random.key(7), tap)).tolist()
    for tap in ("low", "high", "s16")
  ]
  assert len({tuple(key) for key in keys}) == 3


def test_a_tap_draws_the_same_whatever_taps_are_beside_it():
  both, alone = make_method(taps=("low", "high")), make_method(taps=("high",))
  module, params = make_distiller(both)
  given = {"module": module, "params": params}
  np.testing.assert_array_equal(
    distil(both, **given)["mbf_high"], distil(alone, **given)["mbf_high"]
  )


def test_each_tap_has_its_own_teacher_std():
  _, teacher_out, _ = make_outputs()
  scale = {"low": 2.0, "high": 4.0}
  std = {t: jnp.full(teacher_out[t].shape[-1], s) for t, s in scale.items()}
  scaled = {t: teacher_out[t] / s for t, s in scale.items()}
  method = make_method("m2bf")
  module, params = make_distiller(method)
  given = {"module": module, "params": params}
  found = distil(make_method("m2bf", normalise="std"), teacher_std=std, **given)
  expected = distil(method, teacher_out={**teacher_out, **scaled}, **given)
  for name in expected:
    np.testing.assert_allclose(found[name], expected[name], rtol=1e-5)


def test_the_terms_that_are_no_rivals_are_those_of_the_paper():
  ours = {term.name for term in terms_lib.TERMS if not term.is_rival}
  assert ours == {"mbf", "m2bf"}
