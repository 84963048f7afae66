"""Every term of the distillation loss, one record each.

What a term needs, trains, weighs and is called in the log is derived from its
record; no other module of the package asks for a term by its name.
"""

from collections.abc import Callable
from collections.abc import Mapping
import functools
import zlib

import jax

from kdseg.distill.term import ALIGNED
from kdseg.distill.term import FEATURES
from kdseg.distill.term import Inputs
from kdseg.distill.term import Term
from kdseg.losses import attention
from kdseg.losses import boundary
from kdseg.losses import features
from kdseg.losses import logits
from kdseg.losses import masking
from kdseg.losses import mbf
from kdseg.losses import relations
from kdseg.losses import segmentation
from kdseg.runtime import rng as rng_lib

Array = jax.Array

SEGMENTATION: Mapping[str, Callable[[Array, Array], Array]] = {
  "bce": segmentation.bce,
  "smoothed_bce": functools.partial(segmentation.bce, label_smoothing=0.1),
  "dice": segmentation.soft_dice,
  "focal": segmentation.focal,
}
# Names in the log that no distillation term may have.
RESERVED = ("loss", "task", "finite", "gradient_norm", *SEGMENTATION)


def tap_key(rng: Array, tap: str) -> Array:
  """Folds a tap's name into `rng`: its draws don't depend on the other taps."""
  return rng_lib.fold_in(rng, zlib.crc32(tap.encode()))


def _comparison(inputs: Inputs, tap: str) -> masking.Comparison:
  m, std = inputs.method, inputs.teacher_std or {}
  return masking.Comparison(
    m.loss_region, m.band_weight, m.normalise, std.get(tap)
  )


def _head(inputs: Inputs, index: int, tap: str, generator: int) -> mbf.Head:
  """Returns one head on the grid of a tap, with a generator of that tap."""
  m = inputs.method
  ratios = mbf.mask_ratios(m.mask_ratio, m.head_count, m.ratio_schedule)
  return mbf.Head(
    boundary.to_grid(
      inputs.regions[index], *inputs.teacher_out[tap].shape[1:3]
    ),
    inputs.layer("generate", tap, generator),
    masking.Hiding(ratios[index], m.ratio_outside, m.granularity),
    mbf.head_weights(m.head_count, m.head_weights)[index],
  )


def _mbf(inputs: Inputs, tap: str) -> Array:
  head = _head(inputs, 0, tap, 0)
  return mbf.mbf(
    *inputs.features(tap),
    head.region,
    tap_key(inputs.rng, tap),
    generate=head.generate,
    hiding=head.hiding,
    comparison=_comparison(inputs, tap),
  )


def _m2bf(inputs: Inputs, tap: str) -> Array:
  m = inputs.method
  if not tap:
    return _m2bf_multiscale(inputs)
  return mbf.m2bf(
    *inputs.features(tap),
    [_head(inputs, index, tap, index) for index in range(m.head_count)],
    tap_key(inputs.rng, tap),
    topology=m.topology,
    head_input=m.head_input,
    comparison=_comparison(inputs, tap),
  )


def _m2bf_multiscale(inputs: Inputs) -> Array:
  def carry(tap: str) -> mbf.Generate:
    grid = inputs.teacher_out[tap].shape[1:3]
    layer = inputs.layer("carry", tap)
    return lambda x: layer(x, *grid)

  taps = inputs.method.taps
  return mbf.m2bf_multiscale(
    [inputs.student[tap] for tap in taps],
    [inputs.teacher_out[tap] for tap in taps],
    [_head(inputs, index, tap, 0) for index, tap in enumerate(taps)],
    inputs.rng,
    carry=[carry(tap) for tap in taps[1:]],
    comparisons=[_comparison(inputs, tap) for tap in taps],
  )


def _mgd(inputs: Inputs, tap: str) -> Array:
  m = inputs.method
  return features.mgd(
    *inputs.features(tap),
    tap_key(inputs.rng, tap),
    generate=inputs.layer("generate", tap, 0),
    hiding=masking.Hiding(m.mask_ratio, block=m.granularity),
    comparison=_comparison(inputs, tap),
  )


def _fitnet(inputs: Inputs, tap: str) -> Array:
  return features.fitnet(
    *inputs.features(tap), comparison=_comparison(inputs, tap)
  )


def _maskd(inputs: Inputs, tap: str) -> tuple[Array, Array]:
  student, teacher = inputs.features(tap)
  masks = attention.token_masks(
    teacher, inputs.layer("receptive_tokens", tap)()
  )
  return (
    attention.maskd(student, teacher, masks),
    attention.token_fit(
      masks, teacher, inputs.labels, probe=inputs.layer("probe", tap)
    ),
  )


def _emkd(inputs: Inputs, tap: str) -> Array:
  teacher = {name: inputs.teacher_out[name] for name in inputs.student}
  return relations.emkd(*inputs.logits, inputs.student, teacher, inputs.labels)


def _bpkd(inputs: Inputs, tap: str) -> Array:
  radius = boundary.radius_at(inputs.labels.shape[1], 3.0)
  return logits.bpkd(*inputs.logits, inputs.labels, radius=radius)


PAPER = "Zhang et al., Med Biol Eng Comput 2024"
BOTH, DEEP = ("low", "high"), ("high",)

TERMS: tuple[Term, ...] = (
  Term(
    "mbf", _mbf, ALIGNED, per_tap=True, calibrated=True, labels=True,
    trains=("generator",), taps=BOTH, source=PAPER, is_rival=False,
  ),
  Term(
    "m2bf", _m2bf, ALIGNED, per_tap=True, calibrated=True, labels=True,
    trains=("generators",), taps=BOTH, source=PAPER, is_rival=False,
  ),
  Term(
    "mgd", _mgd, ALIGNED, per_tap=True, calibrated=True,
    trains=("generator",), taps=BOTH, source="Yang et al., ECCV 2022",
  ),
  Term(
    "fitnet", _fitnet, ALIGNED, per_tap=True, calibrated=True,
    taps=BOTH, source="Romero et al., ICLR 2015",
  ),
  Term(
    "fgd", lambda x, tap: attention.fgd(*x.features(tap), x.labels),
    ALIGNED, per_tap=True, calibrated=True, labels=True,
    taps=DEEP, source="Yang et al., CVPR 2022",
  ),
  Term(
    "maskd", _maskd, ALIGNED, per_tap=True, labels=True,
    trains=("tokens", "probe"), parts=("", "tokens"),
    taps=DEEP, source="Huang et al., ICLR 2023",
  ),
  Term(
    "at", lambda x, tap: relations.at(*x.features(tap)),
    FEATURES, per_tap=True, weight=1e4,
    taps=BOTH, source="Zagoruyko and Komodakis, ICLR 2017",
  ),
  Term(
    "skd_pa", lambda x, tap: relations.skd_pa(*x.features(tap)),
    FEATURES, per_tap=True, weight=10.0,
    taps=DEEP, source="Liu et al., CVPR 2019",
  ),
  Term(
    "ifvd", lambda x, tap: relations.ifvd(*x.features(tap), x.labels),
    FEATURES, per_tap=True, weight=20.0, labels=True,
    taps=DEEP, source="Wang et al., ECCV 2020",
  ),
  Term(
    "cirkd_lite", lambda x, tap: relations.cirkd_lite(*x.features(tap)),
    FEATURES, per_tap=True, taps=DEEP, source="Yang et al., CVPR 2022",
  ),
  Term(
    "emkd", _emkd, FEATURES, labels=True,
    taps=BOTH, source="Qin et al., TMI 2021",
  ),
  Term(
    "kd",
    lambda x, _: logits.kd(*x.logits, temperature=x.method.kd_temperature),
    source="Hinton et al., 2015",
  ),
  Term(
    "cwd",
    lambda x, _: logits.cwd(*x.logits, temperature=x.method.cwd_temperature),
    weight=3.0, source="Shu et al., ICCV 2021",
  ),
  Term(
    "dist",
    lambda x, _: logits.dist(
      *x.logits, inter_weight=x.method.dist_inter_weight
    ),
    source="Huang et al., NeurIPS 2022",
  ),
  Term("bpkd", _bpkd, labels=True, source="Liu et al., WACV 2024"),
  Term(
    "ultralbm", lambda x, _: logits.ultralbm(*x.logits),
    source="Fan et al., 2025",
  ),
)  # fmt: skip
