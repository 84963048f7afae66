"""The switches of a method: what is refused, and what follows from terms."""

from distilling import make_distiller
from distilling import make_method
import pytest

from configs import isic2016
from kdseg.distill import method as method_lib
from kdseg.distill import term as term_lib
from kdseg.distill import terms as terms_lib

ALIGNING = {"mbf", "m2bf", "mgd", "fitnet", "fgd", "maskd"}
CALIBRATED = {"mbf", "m2bf", "mgd", "fitnet", "fgd"}
OF_LOGITS = {"kd", "cwd", "dist", "bpkd", "ultralbm"}
NAMES = tuple(term.name for term in terms_lib.TERMS)


def test_a_misspelt_switch_is_refused_with_the_nearest():
  with pytest.raises(
    ValueError, match=r'"mask_ration".*did you mean "mask_rat'
  ):
    method_lib.make_method({"mask_ration": 0.5})


def test_a_switch_like_no_other_is_refused_without_a_guess():
  with pytest.raises(ValueError, match=r'switch of a method "zzz"\.'):
    method_lib.make_method({"zzz": 1})


def test_lists_of_a_config_become_tuples():
  assert method_lib.make_method({"taps": ["low"]}).taps == ("low",)


@pytest.mark.parametrize(
  ("switches", "message"),
  [
    ({"terms": {"mbff": 1.0}}, "unknown distillation term 'mbff'; known: mbf"),
    ({"terms": {"mbf": 0.0}}, "leave the term out"),
    ({"terms": {"mbf": float("nan")}}, "must be positive"),
    ({"terms": {"mbf": 1.0, "m2bf": 1.0}}, "mbf and m2bf .* choose one"),
    ({"terms": {"mgd": 1.0, "m2bf": 1.0}}, "mgd and m2bf .* choose one"),
    ({"teacher_out": "other"}, "teacher_out must be one of own"),
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
    ({"mask_ratio": 1.1}, r"mask_ratio must be a share in \[0, 1\]"),
    ({"ratio_outside": -0.1}, r"ratio_outside must be a share in \[0, 1\]"),
    ({"distill_ramp": -1.0}, "distill_ramp must be a share"),
    ({"heads": 0}, "heads must be at least 1: 0"),
    ({"maskd_tokens": 0}, "maskd_tokens must be at least 1"),
    ({"granularity": 0}, "granularity must be at least 1"),
    ({"calibration_steps": 0}, "calibration_steps must be at least 1"),
    ({"dist_inter_weight": -1.0}, "dist_inter_weight must be at least 0"),
    ({"radius": -1.0}, "radius must be at least 0"),
    ({"radius": float("nan")}, "radius must be at least 0"),
    ({"generator_width": -3}, "generator_width must be at least 0"),
    ({"kd_temperature": 0.0}, "kd_temperature must be above 0"),
    ({"cwd_temperature": -1.0}, "cwd_temperature must be above 0"),
    ({"segmentation": {"jaccard": 1.0}}, r"bce.*dice.*not \['jaccard'\]"),
    ({"terms": {"mbf": 1.0}, "topology": "multiscale"}, "needs the term m2bf"),
    ({"terms": {"mgd": 1.0}, "taps": ()}, "mgd compares features"),
    ({"terms": {"at": 1.0}, "taps": ()}, "at compares features"),
  ],
)
def test_a_value_that_means_nothing_is_refused(switches, message):
  with pytest.raises(ValueError, match=message):
    method_lib.make_method(switches)


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
  method = method_lib.Method(terms=terms, heads=heads)
  assert method.generator_heads == method.head_count == expected


def test_a_multiscale_cascade_has_a_head_a_tap():
  method = make_method("m2bf", topology="multiscale", taps=("low", "high"))
  assert method.head_count == 2


@pytest.mark.parametrize("term", NAMES)
def test_what_a_term_needs_of_the_teacher_and_beside_the_student(term):
  method = make_method(term)
  assert method.needs_taps == (term not in OF_LOGITS)
  assert method.aligns == (term in ALIGNING)
  assert method.token_count == (8 if term == "maskd" else 0)
  module, _ = make_distiller(method)
  assert (module is not None) == (term in ALIGNING)


def test_nothing_is_needed_where_nothing_is_distilled():
  method = method_lib.Method(segmentation={"smoothed_bce": 1.0})
  assert not method.needs_taps
  assert not method.aligns
  assert method.token_count == 0


def test_a_relation_of_a_missing_tap_is_refused_before_it_is_trained():
  for term in terms_lib.TERMS:
    if term.compares == term_lib.FEATURES:
      with pytest.raises(ValueError, match="the student has no tap 'deep', on"):
        make_distiller(make_method(term.name, taps=("deep",)))


@pytest.mark.parametrize("term", NAMES)
def test_only_terms_without_a_published_weight_are_calibrated(term):
  method = make_method(term, taps=("low",))
  assert method.balanced_names == (
    (f"{term}_low",) if term in CALIBRATED else ()
  )


def test_nothing_is_calibrated_with_a_fixed_balance():
  assert make_method(balance="fixed").balanced_names == ()


def test_terms_are_named_by_part_and_tap_or_whole():
  terms = ("mbf", "kd", "emkd", "maskd")
  method = method_lib.Method(terms=dict.fromkeys(terms, 1.0))
  assert method.term_names == {
    "mbf": ("mbf_low", "mbf_high"),
    "kd": ("kd",),
    "emkd": ("emkd",),
    "maskd": (
      "maskd_low",
      "maskd_high",
      "maskd_tokens_low",
      "maskd_tokens_high",
    ),
  }


def test_the_scales_of_a_multiscale_cascade_are_one_term():
  method = make_method("m2bf", topology="multiscale")
  assert method.term_names == {"m2bf": ("m2bf",)}


def test_every_term_is_a_method_by_its_name_at_its_published_weight():
  methods = method_lib.shipped_methods()
  assert list(methods) == ["none", *NAMES]
  assert methods["none"] == {}
  assert methods["cwd"] == {"terms": {"cwd": 3.0}}
  assert methods["fgd"] == {"terms": {"fgd": 1.0}, "taps": ("high",)}
  for name, switches in methods.items():
    method = method_lib.make_method(switches)
    assert [term.name for term in method.records] == (
      [] if name == "none" else [name]
    )


def test_the_shipped_comparison_covers_every_rival():
  rivals = {term.name for term in terms_lib.TERMS if term.is_rival}
  config = isic2016.get_config("comparison")
  [arm] = config.arms.values()
  assert rivals <= set(arm.methods)
  for name in rivals:
    assert list(config.methods[name].terms) == [name]
  _, compared = config.primary[-1]
  assert set(compared) == rivals
