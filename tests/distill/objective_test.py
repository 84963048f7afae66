"""How terms are named, weighed and added; and that every switch can be run."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from kdseg.distill import extensions
from kdseg.distill import objective
from kdseg.losses import boundary
from kdseg.losses import logits as logit_losses
from kdseg.losses import relations
from kdseg.losses import segmentation
from kdseg.training import arms as arms_lib

BATCH = 2


def make_method(term="mbf", **switches):
  return objective.Method(terms={term: 1.0}, **switches)


@functools.cache
def _answers():
  """What a student and a teacher make of two images; the labels."""
  images, masks = tiny.draw_lesions(BATCH)
  image = jnp.asarray(images) / 255.0
  outs = []
  for seed, channels in ((0, 3), (1, 5)):
    network = tiny.Network(channels)
    variables = network.init(jax.random.key(seed), image)
    outs.append(network.apply(variables, image))
  out, teacher_out = outs
  labels = jnp.asarray(masks, jnp.float32)
  # A teacher that sees the lesions, and sees them to the right of the truth.
  teacher_out["logits"] = 8.0 * (jnp.roll(labels, 6, axis=2) - 0.5)
  return out, teacher_out, labels


@functools.cache
def _shapes():
  _, teacher_out, _ = _answers()
  return jax.tree.map(
    lambda x: jax.ShapeDtypeStruct((1, *x.shape[1:]), x.dtype), teacher_out
  )


def make_distiller(method):
  """As a run makes it; None and no parameters where none is needed."""
  module, (features, grids) = arms_lib.make_distiller(
    tiny.Network(3), _shapes(), method, size=tiny.SIDE
  )
  if module is None:
    return None, {}
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape), features)
  variables = module.init(jax.random.key(5), zeros, grids)
  return module, variables.get("params", {})


def distil(method, *, seed=0, module=None, params=None, **changes):
  """The terms of `method`, with its own distiller unless one is given."""
  out, teacher_out, labels = _answers()
  if module is None:
    module, params = make_distiller(method)
  given = {"out": out, "teacher_out": teacher_out, "labels": labels, **changes}
  return objective.distillation_terms(
    given["out"],
    given["teacher_out"],
    given["labels"],
    jax.random.key(seed),
    method=method,
    distiller=(
      functools.partial(module.apply, {"params": params}) if module else None
    ),
    teacher_std=given.get("teacher_std"),
  )


# ------------------------------------------------------------------- switches


def test_a_misspelt_switch_is_answered_with_the_nearest():
  with pytest.raises(
    ValueError, match=r'"mask_ration".*did you mean "mask_rat'
  ):
    objective.make_method({"mask_ration": 0.5})


def test_a_switch_like_no_other_is_refused_without_a_guess():
  with pytest.raises(ValueError, match=r'switch of a method "zzz"\.'):
    objective.make_method({"zzz": 1})


def test_lists_of_a_config_become_tuples():
  assert objective.make_method({"taps": ["low"]}).taps == ("low",)


@pytest.mark.parametrize(
  ("switches", "message"),
  [
    ({"terms": {"mbff": 1.0}}, "unknown distillation term 'mbff'; known: mbf"),
    ({"terms": {"mbf": 0.0}}, "leave the term out"),
    ({"terms": {"mbf": float("nan")}}, "must be positive"),
    ({"terms": {"mbf": 1.0, "m2bf": 1.0}}, "choose one"),
    ({"terms": {"mgd": 1.0, "m2bf": 1.0}}, "choose one"),
    ({"answers": "other"}, "answers must be one of own"),
    ({"region": "edge"}, "region must be one of gt_band"),
    ({"loss_region": "edge"}, "loss_region must be one of all"),
    ({"normalise": "max"}, "normalise must be one of none"),
    ({"generator": "mlp"}, "generator must be one of c3rc3"),
    ({"topology": "tree"}, "topology must be one of cascade"),
    ({"head_input": "both"}, "head_input must be one of generated"),
    ({"head_weights": "first"}, "head_weights must be one of uniform"),
    ({"band_schedule": "up"}, "band_schedule must be one of const"),
    ({"ratio_schedule": "up"}, "ratio_schedule must be one of const"),
    ({"balance": "auto"}, "balance must be one of calibrate"),
    ({"mask_ratio": 1.1}, r"shares in \[0, 1\]"),
    ({"ratio_outside": -0.1}, r"shares in \[0, 1\]"),
    ({"heads": 0}, "start at 1"),
    ({"maskd_tokens": 0}, "start at 1"),
    ({"dist_inter_weight": -1.0}, "at 0"),
    ({"segmentation": {"jaccard": 1.0}}, r"bce.*dice.*not \['jaccard'\]"),
    ({"granularity": 0}, "start at 1"),
    ({"radius": -1.0}, "radius at 0"),
    ({"kd_temperature": 0.0}, "above 0"),
    ({"cwd_temperature": -1.0}, "above 0"),
    ({"generator_width": -3}, "starts at 0"),
    ({"warmup": -1.0}, "a share in"),
    ({"calibration_steps": 0}, "calibration_steps start at 1"),
    ({"terms": {"mbf": 1.0}, "topology": "multiscale"}, "one of m2bf"),
    ({"terms": {"mgd": 1.0}, "taps": ()}, "mgd compares features"),
    ({"terms": {"at": 1.0}, "taps": ()}, "at compares features"),
  ],
)
def test_a_value_that_means_nothing_is_refused(switches, message):
  with pytest.raises(ValueError, match=message):
    objective.make_method(switches)


@pytest.mark.parametrize(
  ("terms", "heads", "expected"),
  [
    ({}, 3, 0),
    ({"kd": 1.0, "fitnet": 1.0}, 3, 0),
    ({"mbf": 1.0}, 3, 1),
    ({"mgd": 1.0}, 3, 1),
    ({"m2bf": 1.0}, 3, 3),
    ({"fgd": 1.0, "maskd": 1.0}, 3, 0),
  ],
)
def test_as_many_generators_as_the_terms_use(terms, heads, expected):
  assert objective.Method(terms=terms, heads=heads).generator_heads == expected


@pytest.mark.parametrize("term", objective.TERMS)
def test_what_a_term_needs_of_the_teacher_and_beside_the_student(term):
  method = make_method(term)
  assert method.needs_taps == (term not in objective.LOGIT_TERMS)
  assert method.feature_terms == (
    (term,) if term in objective.FEATURE_TERMS else ()
  )
  assert method.token_count == (8 if term == "maskd" else 0)
  module, _ = make_distiller(method)
  assert (module is not None) == (term in objective.FEATURE_TERMS)


def test_nothing_is_needed_where_nothing_is_taught():
  method = objective.Method(segmentation={"smoothed_bce": 1.0})
  assert not method.needs_taps
  assert method.token_count == 0


@pytest.mark.parametrize("term", objective.RELATION_TERMS)
def test_a_relation_of_a_missing_tap_is_refused_before_it_is_trained(term):
  with pytest.raises(ValueError, match="the student has no tap 'deep', only"):
    make_distiller(make_method(term, taps=("deep",)))


# ---------------------------------------------------------------------- names


def test_every_term_has_a_group_and_a_published_weight():
  groups = (
    objective.FEATURE_TERMS + objective.RELATION_TERMS + objective.LOGIT_TERMS
  )
  assert groups == objective.TERMS
  assert len(set(groups)) == len(groups)
  assert set(objective.PUBLISHED_WEIGHTS) == set(groups)
  assert min(objective.PUBLISHED_WEIGHTS.values()) > 0
  assert set(objective.CALIBRATED_TERMS) <= set(objective.FEATURE_TERMS)


def test_published_weights_are_those_of_the_sources():
  assert {
    **dict.fromkeys(objective.TERMS, 1.0),
    "cwd": 3.0,
    "at": 1e4,
    "skd_pa": 10.0,
    "ifvd": 20.0,
  } == objective.PUBLISHED_WEIGHTS


@pytest.mark.parametrize("term", objective.TERMS)
def test_only_terms_without_a_published_weight_are_calibrated(term):
  method = make_method(term, taps=("low",))
  calibrated = {"mbf", "m2bf", "mgd", "fitnet", "fgd"}
  assert objective.balanced_names(method) == (
    (f"{term}_low",) if term in calibrated else ()
  )


def test_the_parts_of_emkd_are_one_term_and_those_of_maskd_two():
  method = objective.Method(terms={"emkd": 1.0, "maskd": 1.0})
  assert objective.term_names(method) == {
    "emkd": ("emkd",),
    "maskd": (
      "maskd_low",
      "maskd_high",
      "maskd_tokens_low",
      "maskd_tokens_high",
    ),
  }


def test_feature_terms_are_named_by_tap_and_logit_terms_are_whole():
  method = objective.Method(
    terms={"mbf": 1.0, "fitnet": 1.0, "kd": 1.0, "cwd": 1.0}
  )
  assert objective.term_names(method) == {
    "mbf": ("mbf_low", "mbf_high"),
    "fitnet": ("fitnet_low", "fitnet_high"),
    "kd": ("kd",),
    "cwd": ("cwd",),
  }
  assert objective.balanced_names(method) == (
    "mbf_low",
    "mbf_high",
    "fitnet_low",
    "fitnet_high",
  )


def test_nothing_is_calibrated_with_a_fixed_balance():
  assert objective.balanced_names(make_method(balance="fixed")) == ()


def test_the_scales_of_a_multiscale_cascade_are_one_term():
  method = make_method("m2bf", topology="multiscale")
  assert objective.term_names(method) == {"m2bf": ("m2bf",)}


# ----------------------------------------------------------------- task losses


def test_the_task_is_the_weighted_sum_of_batch_means():
  out, _, labels = _answers()
  weights = {"bce": 0.5, "dice": 2.0, "focal": 3.0}
  total, parts = objective.segmentation_loss(out["logits"], labels, weights)
  by_hand = {
    "bce": segmentation.bce(out["logits"], labels).mean(),
    "dice": segmentation.soft_dice(out["logits"], labels).mean(),
    "focal": segmentation.focal(out["logits"], labels).mean(),
  }
  assert parts.keys() == by_hand.keys()
  for name, value in by_hand.items():
    np.testing.assert_allclose(parts[name], value, rtol=1e-6)
  expected = sum(weights[name] * by_hand[name] for name in weights)
  np.testing.assert_allclose(total, expected, rtol=1e-6)


@pytest.mark.parametrize("weights", [{}, {"bce": 1.0, "jaccard": 1.0}])
def test_an_unknown_or_missing_task_is_answered_with_the_known(weights):
  with pytest.raises(ValueError, match=r"bce.*dice.*focal"):
    objective.segmentation_loss(jnp.zeros((1, 2, 2)), jnp.zeros((1, 2, 2)),
                                weights)  # fmt: skip


def test_smoothed_labels_are_a_tenth_of_the_way_to_a_half():
  # -(.95 ln p + .05 ln (1 - p)) of a lesion at p = 3/4.
  logits = jnp.full((1, 2, 2), np.log(3.0))
  total, parts = objective.segmentation_loss(
    logits, jnp.ones((1, 2, 2)), {"smoothed_bce": 2.0}
  )
  expected = -(0.95 * np.log(0.75) + 0.05 * np.log(0.25))
  np.testing.assert_allclose(parts["smoothed_bce"], expected, rtol=1e-6)
  np.testing.assert_allclose(total, 2 * expected, rtol=1e-6)


# --------------------------------------------------------------- distillation

SWITCHES = [
  *({"region": region} for region in boundary.REGIONS),
  *({"generator": g} for g in ("c3rc3_norm", "dwconv", "1x1", "identity")),
  *({"normalise": n} for n in ("std", "l2")),
  *({"loss_region": r} for r in ("band", "band_weighted")),
  {"granularity": 2},
  {"ratio_outside": 0.3},
  {"generator_width": 2},
  {"taps": ("s16", "low")},
  *({"term": term} for term in objective.TERMS if term not in ("mbf", "m2bf")),
  {"term": "dist", "dist_inter_weight": 1.0},
  {"term": "maskd", "maskd_tokens": 1},
  *({"term": "m2bf", "topology": t} for t in ("cascade", "parallel")),
  # The deepest tap comes first.
  {"term": "m2bf", "topology": "multiscale", "taps": ("high", "low")},
  {"term": "m2bf", "head_input": "residual"},
  {"term": "m2bf", "share_generators": True},
  *({"term": "m2bf", "head_weights": w} for w in ("last", "geometric")),
  *({"term": "m2bf", "band_schedule": s} for s in ("narrowing", "widening")),
  {"term": "m2bf", "ratio_schedule": "increasing"},
]


@pytest.mark.parametrize("switches", SWITCHES, ids=str)
def test_every_switch_runs_and_teaches_the_student(switches):
  out, teacher_out, _ = _answers()
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
    names = objective.term_names(method)
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


@pytest.mark.parametrize("switches", CHANGES, ids=str)
def test_every_switch_reaches_its_loss(switches):
  _, teacher_out, _ = _answers()
  teacher_std = {
    tap: jnp.full(teacher_out[tap].shape[-1], 2.0) for tap in ("low", "high")
  }
  changed = make_method(**{**BAND, **switches})
  term = switches.get("term", "mbf")
  default = make_method(term, **BAND)
  module, params = make_distiller(default)
  given = {"module": module, "params": params, "teacher_std": teacher_std}
  before, after = distil(default, **given), distil(changed, **given)
  assert before.keys() == after.keys()
  for name in before:
    assert before[name] != after[name], name


def test_the_weight_of_the_band_reaches_its_loss():
  light, heavy = (
    make_method(loss_region="band_weighted", band_weight=weight, **BAND)
    for weight in (1.0, 5.0)
  )
  module, params = make_distiller(light)
  given = {"module": module, "params": params}
  one, other = distil(light, **given), distil(heavy, **given)
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


def test_shuffled_answers_are_those_for_another_image():
  _, teacher_out, _ = _answers()
  method = make_method("kd", answers="shuffled")
  other = {name: x[::-1] for name, x in teacher_out.items()}  # of two images
  expected = distil(make_method("kd"), teacher_out=other)["kd"]
  np.testing.assert_allclose(distil(method)["kd"], expected, rtol=1e-6)
  assert distil(make_method("kd"))["kd"] != expected


def test_a_lone_image_has_no_other_to_take_the_answers_of():
  out, teacher_out, labels = (
    jax.tree.map(lambda x: x[:1], t) for t in _answers()
  )
  with pytest.raises(ValueError, match=r"raise data\.batch_size"):
    distil(
      make_method("kd", answers="shuffled"),
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
  _, teacher_out, _ = _answers()
  terms = dict.fromkeys(set(objective.TERMS) - {"mgd", "m2bf"}, 1.0)
  method = objective.Method(terms=terms, taps=("low",), region=region)
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
  out, teacher_out, labels = _answers()
  terms = objective.RELATION_TERMS + objective.LOGIT_TERMS
  found = distil(objective.Method(terms=dict.fromkeys(terms, 1.0)))
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


@pytest.mark.parametrize("term", objective.RELATION_TERMS)
def test_a_student_on_a_coarser_grid_is_compared_on_the_teachers(term):
  out, _, _ = _answers()
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
  out, _, _ = _answers()
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


def test_a_term_that_is_not_asked_for_is_not_computed():
  out, teacher_out, labels = _answers()

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


# -------------------------------------------------------------------- balance


def sums(**values):
  return {name: jnp.asarray(value) for name, value in values.items()}


def test_sums_grow_until_the_calibration_ends():
  balance = sums(task=0.0, count=0.0, mbf_low=0.0)
  for step, (task, term) in enumerate([(2.0, 0.5), (4.0, 0.25), (9.0, 9.0)]):
    balance = objective.update_balance(
      balance,
      jnp.asarray(task),
      sums(mbf_low=term, kd=7.0),
      jnp.asarray(step),
      calibration_steps=2,
    )
  assert balance == {"task": 6.0, "count": 2.0, "mbf_low": 0.75}


def test_no_gradient_goes_through_the_balance():
  def weight(values):
    balance = objective.update_balance(
      sums(task=1.0, count=1.0, mbf_low=1.0),
      values["task"],
      {"mbf_low": values["mbf_low"]},
      jnp.asarray(0),
      calibration_steps=2,
    )
    return balance["task"] / balance["mbf_low"]

  gradient = jax.grad(weight)(sums(task=3.0, mbf_low=2.0))
  assert gradient == {"task": 0.0, "mbf_low": 0.0}


@pytest.mark.parametrize(
  ("step", "fade"), [(0, 0.2), (1, 0.4), (4, 1.0), (9, 1.0)]
)
def test_terms_are_faded_in_and_calibrated(step, fade):
  # Over the first half of 10 steps. Means so far: task 6 / 3 = 2, term
  # 1.5 / 3 = 0.5, so alpha is 4; logit terms are taken as they are.
  method = objective.Method(
    terms={"fitnet": 2.0, "kd": 0.5}, taps=("low",), warmup=0.5
  )
  total, weights = objective.total_loss(
    jnp.asarray(1.5),
    sums(fitnet_low=0.3, kd=0.8),
    sums(task=6.0, count=3.0, fitnet_low=1.5),
    jnp.asarray(step),
    method=method,
    steps=10,
  )
  np.testing.assert_allclose(weights["fitnet_low"], fade * 2 * 4, rtol=1e-6)
  np.testing.assert_allclose(weights["kd"], fade * 0.5, rtol=1e-6)
  np.testing.assert_allclose(
    total, 1.5 + fade * (2 * 4 * 0.3 + 0.5 * 0.8), rtol=1e-6
  )


def test_a_fixed_balance_without_warm_up_takes_the_weights_as_they_are():
  method = objective.Method(
    terms={"fitnet": 2.0}, taps=("low",), warmup=0.0, balance="fixed"
  )
  total, weights = objective.total_loss(
    jnp.asarray(1.5),
    sums(fitnet_low=0.3),
    sums(task=6.0, count=3.0),
    jnp.asarray(0),
    method=method,
    steps=10,
  )
  assert weights == {"fitnet_low": 2.0}
  np.testing.assert_allclose(total, 1.5 + 2 * 0.3, rtol=1e-6)


def test_a_term_of_zero_stays_finite():
  method = objective.Method(terms={"fitnet": 1.0}, taps=("low",), warmup=0.0)
  total, _ = objective.total_loss(
    jnp.asarray(1.5),
    sums(fitnet_low=0.0),
    sums(task=1.5, count=1.0, fitnet_low=0.0),
    jnp.asarray(0),
    method=method,
    steps=10,
  )
  np.testing.assert_allclose(total, 1.5)


# ----------------------------------------------------------- a user's additions


def add(name, loss):
  return objective.make_method(
    {"terms": {name: 2.0}}, extensions.Extensions(terms={name: loss})
  )


def test_a_term_of_a_users_own_is_the_mean_of_what_it_returns():
  method = add(
    "mine", lambda out, teacher_out, labels, rng: jnp.array([1.0, 3.0])
  )
  assert distil(method) == {"mine": 2.0}
  assert objective.term_names(method) == {"mine": ("mine",)}
  assert objective.balanced_names(method) == ()


def test_a_term_of_a_users_own_moves_no_teacher():
  def loss(out, teacher_out, labels, rng):
    return jnp.mean(out["logits"] * teacher_out["logits"], (1, 2))

  _, teacher_out, _ = _answers()
  gradient = jax.grad(
    lambda logits: distil(
      add("mine", loss), teacher_out={**teacher_out, "logits": logits}
    )["mine"]
  )(teacher_out["logits"])
  assert not gradient.any()


def test_a_term_of_a_users_own_gets_a_key_an_image():
  seen = []
  add_up = lambda out, teacher_out, labels, rng: (  # noqa: E731
    seen.append(rng.shape) or jax.vmap(jax.random.uniform)(rng)
  )
  first, other = (distil(add("mine", add_up), seed=s)["mine"] for s in (0, 1))
  assert seen == [(BATCH,), (BATCH,)]
  assert first != other


def test_a_term_of_a_users_own_without_a_value_an_image_is_refused():
  with pytest.raises(ValueError, match=r"mine gives \(\), not one value an im"):
    distil(add("mine", lambda out, teacher_out, labels, rng: jnp.zeros(())))


def test_a_region_of_a_users_own_is_where_features_are_hidden():
  everywhere = objective.make_method(
    {"terms": {"mbf": 1.0}, "region": "mine", "mask_ratio": 1.0},
    extensions.Extensions(
      regions={"mine": lambda labels, radius: jnp.ones_like(labels)}
    ),
  )
  expected = make_method("mbf", region="all", mask_ratio=1.0)
  module, params = make_distiller(expected)
  found, wanted = (
    distil(method, module=module, params=params)
    for method in (everywhere, expected)
  )
  jax.tree.map(np.testing.assert_array_equal, found, wanted)
