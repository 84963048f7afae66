"""Losses against the teacher's features: MBF, M2BF, and what they grew from.

`mbf`, masked boundary features: hide a random part of the student's features
along the lesion's edge, let a small generator fill them in, and compare the
whole map with the teacher's. `m2bf` does so several times in a row, each head
hiding anew what the head before it filled in.

Only the abstract of the method is public (Zhang et al., Med Biol Eng Comput
2024, doi 10.1007/s11517-024-03095-y), so this is a reconstruction. It follows
MGD (Yang et al., ECCV 2022), from which masking and regenerating come; each
choice that the abstract leaves open is an argument.

Student features come in aligned, that is, with the teacher's grid and channels
(`kdseg.distill.layers`). Generators come in as functions with their
parameters bound.
"""

from collections.abc import Callable
from collections.abc import Mapping
from collections.abc import Sequence
import math
import zlib

import chex
import jax
import jax.numpy as jnp

from kdseg.losses import boundary
from kdseg.losses import reduce
from kdseg.runtime import rng as rng_lib

Array = jax.Array
Generate = Callable[[Array], Array]

LOSS_REGIONS = ("all", "band", "band_weighted")
NORMALISATIONS = ("none", "std", "l2")
TOPOLOGIES = ("cascade", "parallel", "multiscale")
HEAD_INPUTS = ("generated", "residual")


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
  if value not in choices:
    raise ValueError(f"{what} must be one of {', '.join(choices)}: {value!r}")


def _check_features(student_feat: Array, teacher_feat: Array) -> None:
  chex.assert_rank(student_feat, 4, exception_type=ValueError)
  chex.assert_equal_shape(
    [student_feat, teacher_feat], exception_type=ValueError
  )


def _check_ratio(what: str, value: float) -> None:
  if not 0.0 <= value <= 1.0:
    raise ValueError(f"{what} must be in [0, 1]: {value}")


def keep_mask(
  rng: Array,
  region: Array,
  *,
  mask_ratio: float,
  ratio_outside: float = 0.0,
  granularity: int = 1,
) -> Array:
  """Draws which cells stay visible.

  Each cell is hidden or kept with all its channels, as MGD does for dense
  tasks; kept cells are not scaled up.

  Args:
    rng: one key, or one an image.
    region: [B, h, w]; a cell above 0 belongs to the region.
    mask_ratio: probability in [0, 1] that a cell of the region is hidden.
    ratio_outside: the same for the other cells.
    granularity: side, in cells, of the blocks that share one draw. A hidden
      single cell is easily interpolated from its neighbours, a block is not.

  Returns:
    [B, h, w] bool, true where a cell is kept.

  Raises:
    ValueError: if `region` has no three axes, a ratio lies outside [0, 1], or
      `granularity` is below 1.
  """
  chex.assert_rank(region, 3, exception_type=ValueError)
  _check_ratio("mask_ratio", mask_ratio)
  _check_ratio("ratio_outside", ratio_outside)
  if granularity < 1:
    raise ValueError(f"granularity must be at least 1: {granularity}")
  batch, height, width = region.shape
  blocks = (-(-height // granularity), -(-width // granularity))
  uniform = jax.vmap(lambda key: jax.random.uniform(key, blocks))(
    rng_lib.per_image(rng, batch)
  )
  uniform = jnp.repeat(jnp.repeat(uniform, granularity, 1), granularity, 2)
  ratio = jnp.where(region > 0, mask_ratio, ratio_outside)
  return uniform[:, :height, :width] >= ratio


def _hide(features: Array, keep: Array) -> Array:
  return jnp.where(keep[..., None], features, jnp.zeros((), features.dtype))


def _target(
  teacher_feat: Array, normalise: str, teacher_std: Array | None
) -> Array:
  _check_choice("normalise", normalise, NORMALISATIONS)
  target = jax.lax.stop_gradient(teacher_feat).astype(jnp.float32)
  if normalise == "std":
    if teacher_std is None:
      raise ValueError('normalise="std" needs teacher_std, one a channel')
    chex.assert_shape(teacher_std, target.shape[-1:], exception_type=ValueError)
    return target / jax.lax.stop_gradient(teacher_std).astype(jnp.float32)
  return reduce.unit(target) if normalise == "l2" else target


def _squared_error(
  restored: Array,
  target: Array,
  region: Array,
  *,
  loss_region: str,
  band_weight: float,
  normalise: str,
) -> Array:
  """Compares [B, h, w, C] with [B, h, w, C]; [B]."""
  chex.assert_equal_shape([restored, target], exception_type=ValueError)
  _check_choice("loss_region", loss_region, LOSS_REGIONS)
  restored = restored.astype(jnp.float32)
  if normalise == "l2":
    restored = reduce.unit(restored)
  error = jnp.square(restored - target)
  if loss_region == "all":
    return reduce.mean_per_image(error)
  inside = (region > 0).astype(jnp.float32)[..., None]
  if loss_region == "band":
    return reduce.weighted_mean_per_image(error, inside)
  return reduce.weighted_mean_per_image(error, 1.0 + band_weight * inside)


def fitnet(
  student_feat: Array,
  teacher_feat: Array,
  *,
  normalise: str = "none",
  teacher_std: Array | None = None,
) -> Array:
  """Squared distance of the student's features from the teacher's.

  FitNets (Romero et al., ICLR 2015, eq. 3), as a mean rather than half a sum;
  the regressor is the alignment.

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C].
    normalise: see `mbf`.
    teacher_std: [C]; see `mbf`.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape does not fit or an option is unknown.
  """
  _check_features(student_feat, teacher_feat)
  return _squared_error(
    student_feat,
    _target(teacher_feat, normalise, teacher_std),
    jnp.ones(student_feat.shape[:3]),
    loss_region="all",
    band_weight=0.0,
    normalise=normalise,
  )


def mgd(
  student_feat: Array,
  teacher_feat: Array,
  rng: Array,
  *,
  generate: Generate,
  mask_ratio: float = 0.75,
  granularity: int = 1,
  normalise: str = "none",
  teacher_std: Array | None = None,
) -> Array:
  """Masked generative distillation: hides cells anywhere.

  Yang et al., ECCV 2022, eq. 3-5. They sum over cells and channels; this is
  the mean, so that one weight fits all sizes of map (`mean_weight` converts).

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C].
    rng: one key, or one an image.
    generate: maps [B, h, w, C] to the same shape.
    mask_ratio: probability in [0, 1] that a cell is hidden.
    granularity: see `keep_mask`.
    normalise: see `mbf`.
    teacher_std: [C]; see `mbf`.

  Returns:
    [B] float32, squared error averaged over cells and channels.

  Raises:
    ValueError: if a shape does not fit or an option is out of range.
  """
  _check_features(student_feat, teacher_feat)
  everywhere = jnp.ones(student_feat.shape[:3])
  keep = keep_mask(
    rng_lib.fold_in(rng, 0),
    everywhere,
    mask_ratio=mask_ratio,
    granularity=granularity,
  )
  return _squared_error(
    generate(_hide(student_feat, keep)),
    _target(teacher_feat, normalise, teacher_std),
    everywhere,
    loss_region="all",
    band_weight=0.0,
    normalise=normalise,
  )


def mean_weight(sum_weight: float, shape: Sequence[int]) -> float:
  """Turns MGD's weight of a sum into the equal weight of a mean.

  Args:
    sum_weight: the weight in the source, where errors are summed over cells
      and channels and averaged over images (2e-5 for segmentation).
    shape: (h, w, C) of the features compared.
  """
  return sum_weight * math.prod(shape)


def mbf(
  student_feat: Array,
  teacher_feat: Array,
  region: Array,
  rng: Array,
  *,
  generate: Generate,
  mask_ratio: float = 0.75,
  ratio_outside: float = 0.0,
  granularity: int = 1,
  loss_region: str = "all",
  band_weight: float = 1.0,
  normalise: str = "none",
  teacher_std: Array | None = None,
) -> Array:
  """Masked boundary features, one head.

  `mean((G(K * S) - T)^2)`: K is 0 at a random share `mask_ratio` of the cells
  of `region` and 1 elsewhere. The mean is over the whole map, as in MGD and as
  "the comprehensive features of the teacher" says. A hidden cell of S has no
  gradient of its own: the student learns it through the neighbours from which
  the generator restores it.

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C].
    region: [B, h, w], `boundary.region` on this grid; above 0 is inside.
    rng: one key, or one an image. What is hidden depends on nothing else.
    generate: maps [B, h, w, C] to the same shape; `lambda x: x` for none.
    mask_ratio: probability in [0, 1] that a cell of the region is hidden.
    ratio_outside: the same for the other cells.
    granularity: see `keep_mask`.
    loss_region: where errors count; "all", the whole map; "band", the region
      only (0 for an image without one); "band_weighted", the whole map as a
      weighted mean, with weight `1 + band_weight` in the region.
    band_weight: for "band_weighted" only.
    normalise: "none"; "std", the teacher divided by `teacher_std`; "l2", each
      cell of both divided by its norm over the channels.
    teacher_std: [C], standard deviation of `teacher_feat` over the training
      set; for "std" only.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape does not fit or an option is unknown or out of
      range.
  """
  _check_features(student_feat, teacher_feat)
  chex.assert_shape(region, student_feat.shape[:3], exception_type=ValueError)
  keep = keep_mask(
    rng_lib.fold_in(rng, 0),
    region,
    mask_ratio=mask_ratio,
    ratio_outside=ratio_outside,
    granularity=granularity,
  )
  return _squared_error(
    generate(_hide(student_feat, keep)),
    _target(teacher_feat, normalise, teacher_std),
    region,
    loss_region=loss_region,
    band_weight=band_weight,
    normalise=normalise,
  )


def band_radii(radius: float, heads: int, schedule: str) -> tuple[int, ...]:
  """Gives each head the radius of its band, in pixels.

  Args:
    radius: pixels; of every head ("const"), of the last, each one before it
      1.5 times as wide ("narrowing"), or of the first, each one after it 1.5
      times as wide ("widening").
    heads: how many.
    schedule: "const", "narrowing" or "widening".

  Returns:
    One radius a head, halves rounded up.

  Raises:
    ValueError: if `schedule` is unknown.
  """
  _check_choice("schedule", schedule, ("const", "narrowing", "widening"))
  powers = {
    "const": [0] * heads,
    "narrowing": range(heads - 1, -1, -1),
    "widening": range(heads),
  }[schedule]
  return tuple(math.floor(radius * 1.5**power + 0.5) for power in powers)


def mask_ratios(ratio: float, heads: int, schedule: str) -> tuple[float, ...]:
  """Gives each head the share of its region that it hides.

  Args:
    ratio: in [0, 1]; of every head ("const"), or of the last, the heads
      before it taking equal steps towards it ("increasing").
    heads: how many.
    schedule: "const" or "increasing".

  Raises:
    ValueError: if `schedule` is unknown.
  """
  _check_choice("schedule", schedule, ("const", "increasing"))
  if schedule == "const":
    return (ratio,) * heads
  return tuple(ratio * (head + 1) / heads for head in range(heads))


def head_weights(heads: int, kind: str) -> tuple[float, ...]:
  """Gives each head its weight in the loss; they sum to 1.

  Args:
    heads: how many, in the order in which they run.
    kind: "uniform"; "last", only the last head counts; "geometric", each head
      counts half as much as the next.

  Raises:
    ValueError: if `kind` is unknown.
  """
  _check_choice("head_weights", kind, ("uniform", "last", "geometric"))
  raw = {
    "uniform": [1.0] * heads,
    "last": [0.0] * (heads - 1) + [1.0],
    "geometric": [0.5 ** (heads - 1 - head) for head in range(heads)],
  }[kind]
  return tuple(weight / sum(raw) for weight in raw)


def _check_heads(generate: Sequence[Generate], **others: Sequence) -> None:
  if not generate:
    raise ValueError("generate must hold one function a head, at least one")
  for what, values in others.items():
    if len(values) != len(generate):
      raise ValueError(
        f"{what} must hold one value for each of {len(generate)} heads: "
        f"{len(values)}"
      )


def m2bf(
  student_feat: Array,
  teacher_feat: Array,
  regions: Sequence[Array],
  rng: Array,
  *,
  generate: Sequence[Generate],
  mask_ratios: Sequence[float],
  topology: str = "cascade",
  head_input: str = "generated",
  weights: str = "uniform",
  ratio_outside: float = 0.0,
  granularity: int = 1,
  loss_region: str = "all",
  band_weight: float = 1.0,
  normalise: str = "none",
  teacher_std: Array | None = None,
) -> Array:
  """Masked boundary features, several heads on one tap.

  From x_0 = S, each head restores F_h = G_h(K_h * x_{h-1}), hands on x_h = F_h
  and is compared with T: `sum_h w_h mean((F_h - T)^2)`. With one head this is
  `mbf`, to the bit.

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C].
    regions: one [B, h, w] a head; see `mbf`.
    rng: one key, or one an image; each head folds in its number.
    generate: one function a head, in the order in which they run; the same
      function several times for shared parameters.
    mask_ratios: one probability a head; see the function `mask_ratios`.
    topology: "cascade", each head reads what the one before it made;
      "parallel", all heads read S.
    head_input: what a cascade hands on; "generated", F_h, or "residual",
      S + F_h.
    weights: of the heads; see `head_weights`.
    ratio_outside: see `mbf`.
    granularity: see `keep_mask`.
    loss_region: see `mbf`.
    band_weight: see `mbf`.
    normalise: see `mbf`.
    teacher_std: [C]; see `mbf`.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape or a number of heads does not fit, or an option is
      unknown or out of range.
  """
  _check_features(student_feat, teacher_feat)
  _check_heads(generate, regions=regions, mask_ratios=mask_ratios)
  _check_choice("topology", topology, ("cascade", "parallel"))
  _check_choice("head_input", head_input, HEAD_INPUTS)
  target = _target(teacher_feat, normalise, teacher_std)
  loss = jnp.zeros(student_feat.shape[0])
  x = student_feat
  for head, weight in enumerate(head_weights(len(generate), weights)):
    region = regions[head]
    chex.assert_shape(region, student_feat.shape[:3], exception_type=ValueError)
    keep = keep_mask(
      rng_lib.fold_in(rng, head),
      region,
      mask_ratio=mask_ratios[head],
      ratio_outside=ratio_outside,
      granularity=granularity,
    )
    restored = generate[head](_hide(x, keep))
    if weight:
      loss = loss + weight * _squared_error(
        restored,
        target,
        region,
        loss_region=loss_region,
        band_weight=band_weight,
        normalise=normalise,
      )
    if topology == "cascade":
      x = restored if head_input == "generated" else student_feat + restored
  return loss


def m2bf_multiscale(
  student_taps: Sequence[Array],
  teacher_taps: Sequence[Array],
  regions: Sequence[Array],
  rng: Array,
  *,
  generate: Sequence[Generate],
  carry: Sequence[Generate],
  mask_ratios: Sequence[float],
  weights: str = "uniform",
  ratio_outside: float = 0.0,
  granularity: int = 1,
  loss_region: str = "all",
  band_weight: float = 1.0,
  normalise: str = "none",
  teacher_std: Sequence[Array] | None = None,
) -> Array:
  """Masked boundary features, one head a tap, from the deep to the shallow.

  Each head reads its own tap plus what the deeper head made:
  F_l = G_l(K_l * (S_l + carry_l(F_{l-1}))). To add after a 1x1 convolution is
  to concatenate before one, because the alignment of S_l is a 1x1 convolution
  too; so there is no switch between the two.

  Args:
    student_taps: [B, h_l, w_l, C_l] each, aligned, the deepest first.
    teacher_taps: the same shapes.
    regions: one [B, h_l, w_l] a tap.
    rng: one key, or one an image; each head folds in its number.
    generate: one function a tap.
    carry: one function for each tap but the first, from the shape of the tap
      before it to its own.
    mask_ratios: one probability a tap.
    weights: of the taps; see `head_weights`.
    ratio_outside: see `mbf`.
    granularity: see `keep_mask`.
    loss_region: see `mbf`.
    band_weight: see `mbf`.
    normalise: see `mbf`.
    teacher_std: one [C_l] a tap; see `mbf`.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape or a number of taps does not fit, or an option is
      unknown or out of range.
  """
  _check_heads(
    generate,
    student_taps=student_taps,
    teacher_taps=teacher_taps,
    regions=regions,
    mask_ratios=mask_ratios,
    carry=(None, *carry),
  )
  if teacher_std is not None:
    _check_heads(generate, teacher_std=teacher_std)
  loss = jnp.zeros(student_taps[0].shape[0])
  restored = None
  for tap, weight in enumerate(head_weights(len(generate), weights)):
    student_feat, teacher_feat = student_taps[tap], teacher_taps[tap]
    region = regions[tap]
    _check_features(student_feat, teacher_feat)
    chex.assert_shape(region, student_feat.shape[:3], exception_type=ValueError)
    x = student_feat
    if restored is not None:
      carried = carry[tap - 1](restored)
      chex.assert_equal_shape([carried, x], exception_type=ValueError)
      x = x + carried
    keep = keep_mask(
      rng_lib.fold_in(rng, tap),
      region,
      mask_ratio=mask_ratios[tap],
      ratio_outside=ratio_outside,
      granularity=granularity,
    )
    restored = generate[tap](_hide(x, keep))
    if weight:
      loss = loss + weight * _squared_error(
        restored,
        _target(
          teacher_feat,
          normalise,
          None if teacher_std is None else teacher_std[tap],
        ),
        region,
        loss_region=loss_region,
        band_weight=band_weight,
        normalise=normalise,
      )
  return loss


def tap_key(rng: Array, tap: str) -> Array:
  """Folds a tap's name into `rng`: its draws don't depend on the other taps."""
  return rng_lib.fold_in(rng, zlib.crc32(tap.encode()))


def boundary_distillation(
  student_taps: Mapping[str, Array],
  teacher_taps: Mapping[str, Array],
  regions: Sequence[Array],
  rng: Array,
  *,
  generate: Callable[[str, int, Array], Array],
  mask_ratios: Sequence[float],
  teacher_std: Mapping[str, Array] | None = None,
  **options: str | float | int,
) -> dict[str, Array]:
  """Runs `m2bf` on each tap, from regions of the image's size.

  Args:
    student_taps: {tap: [B, h, w, C]}, aligned.
    teacher_taps: {tap: [B, h, w, C]}, with every tap of `student_taps`.
    regions: one [B, H, W] a head, from `boundary.region`.
    rng: one key, or one an image; each tap folds in its name, each head its
      number.
    generate: maps (tap, head, [B, h, w, C]) to the same shape; for instance
      `functools.partial(distiller.apply, {"params": p}, method="generate")`.
    mask_ratios: one probability a head.
    teacher_std: {tap: [C]}; for `normalise="std"`.
    **options: of `m2bf`.

  Returns:
    {tap: [B] float32}.

  Raises:
    ValueError: as `m2bf`, or if the teacher lacks a tap.
  """
  losses = {}
  for tap, student_feat in student_taps.items():
    if tap not in teacher_taps:
      raise ValueError(
        f"the teacher has no tap {tap!r}, only {', '.join(teacher_taps)}"
      )
    grid = student_feat.shape[1:3]
    losses[tap] = m2bf(
      student_feat,
      teacher_taps[tap],
      [boundary.to_grid(region, *grid) for region in regions],
      tap_key(rng, tap),
      generate=[
        lambda x, tap=tap, head=head: generate(tap, head, x)
        for head in range(len(regions))
      ],
      mask_ratios=mask_ratios,
      teacher_std=None if teacher_std is None else teacher_std[tap],
      **options,
    )
  return losses
