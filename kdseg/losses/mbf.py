"""The method: masked boundary features (MBF), and a cascade of them (M2BF).

`mbf` hides a random part of the student's features along the lesion's edge,
lets a small generator fill them in, and compares the whole map with the
teacher's. `m2bf` does so several times in a row: each head hides anew what the
head before it filled in.

Only the abstract of the method is public (Zhang et al., Med Biol Eng Comput
2024, doi 10.1007/s11517-024-03095-y), so this is a reconstruction. It follows
MGD (Yang et al., ECCV 2022), from which masking and regenerating come; each
choice that the abstract leaves open is an argument.

Student features come in aligned, that is, with the teacher's grid and channels
(`kdseg.distill.layers`). Generators come in as functions with their parameters
bound.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from kdseg.losses import masking
from kdseg.losses.masking import Comparison
from kdseg.losses.masking import Hiding
from kdseg.runtime import rng as rng_lib

Array = jax.Array
Generate = Callable[[Array], Array]

TOPOLOGIES = ("cascade", "parallel", "multiscale")
HEAD_INPUTS = ("generated", "residual")
HEAD_WEIGHTS = ("uniform", "last", "geometric")
BAND_SCHEDULES = ("const", "narrowing", "widening")
RATIO_SCHEDULES = ("const", "increasing")


class Head(NamedTuple):
  """One round of hiding, restoring and comparing.

  Attributes:
    region: [B, h, w], `boundary.region` on the grid of the features; above 0 is
      inside.
    generate: maps [B, h, w, C] to the same shape; `lambda x: x` for none.
    hiding: how much of the region is hidden.
    weight: in the sum over the heads, see `head_weights`.
  """

  region: Array
  generate: Generate
  hiding: Hiding = Hiding()
  weight: float = 1.0


def mbf(
  student_feat: Array,
  teacher_feat: Array,
  region: Array,
  rng: Array,
  *,
  generate: Generate,
  hiding: Hiding = Hiding(),
  comparison: Comparison = Comparison(),
) -> Array:
  """Masked boundary features: M2BF of one head.

  `mean((G(K * S) - T)^2)`: K is 0 at a random share `hiding.ratio` of the cells
  of `region` and 1 elsewhere. The mean is over the whole map, as in MGD and as
  "the comprehensive features of the teacher" says. A hidden cell of S has no
  gradient of its own: the student learns it through the neighbours from which
  the generator restores it.

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C]; receives no gradient.
    region: [B, h, w]; see `Head`.
    rng: one key, or one an image. What is hidden depends on nothing else.
    generate: maps [B, h, w, C] to the same shape; `lambda x: x` for none.
    hiding: how much of the region is hidden.
    comparison: where errors count, and on which scale.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape does not fit or an option is unknown or out of
      range.
  """
  head = Head(region, generate, hiding)
  return m2bf(student_feat, teacher_feat, [head], rng, comparison=comparison)


def m2bf(
  student_feat: Array,
  teacher_feat: Array,
  heads: Sequence[Head],
  rng: Array,
  *,
  topology: str = "cascade",
  head_input: str = "generated",
  comparison: Comparison = Comparison(),
) -> Array:
  """Masked boundary features, several heads on one tap.

  From x_0 = S, each head restores F_h = G_h(K_h * x_{h-1}), hands on x_h = F_h
  and is compared with T: `sum_h w_h mean((F_h - T)^2)`.

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C]; receives no gradient.
    heads: in the order in which they run.
    rng: one key, or one an image; each head folds in its number.
    topology: "cascade", each head reads what the one before it made;
      "parallel", all heads read S.
    head_input: what a cascade hands on; "generated", F_h, or "residual",
      S + F_h.
    comparison: where errors count, and on which scale.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape does not fit, there is no head, or an option is
      unknown or out of range.
  """
  masking.check_choice("topology", topology, ("cascade", "parallel"))
  masking.check_choice("head_input", head_input, HEAD_INPUTS)
  masking.check_features(student_feat, teacher_feat)
  if not heads:
    raise ValueError("m2bf needs at least one head")
  loss = jnp.zeros(student_feat.shape[0])
  x = student_feat
  for index, head in enumerate(heads):
    restored = _restore(x, head, rng_lib.fold_in(rng, index))
    if head.weight:
      loss = loss + head.weight * masking.squared_error(
        restored, teacher_feat, head.region, comparison
      )
    if topology == "cascade":
      x = restored if head_input == "generated" else student_feat + restored
  return loss


def m2bf_multiscale(
  student_taps: Sequence[Array],
  teacher_taps: Sequence[Array],
  heads: Sequence[Head],
  rng: Array,
  *,
  carry: Sequence[Generate],
  comparisons: Sequence[Comparison] | None = None,
) -> Array:
  """Masked boundary features, one head a tap, from the deep to the shallow.

  Each head reads its own tap plus what the deeper head made:
  F_l = G_l(K_l * (S_l + carry_l(F_{l-1}))). To add after a 1x1 convolution is
  to concatenate before one, because the alignment of S_l is a 1x1 convolution
  too; so there is no switch between the two.

  Args:
    student_taps: [B, h_l, w_l, C_l] each, aligned, the deepest first.
    teacher_taps: the same shapes; receive no gradient.
    heads: one a tap.
    rng: one key, or one an image; each head folds in its number.
    carry: one function for each tap but the first, from the shape of the tap
      before it to its own.
    comparisons: one a tap; None for the default.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape or a number of taps does not fit, or an option is
      unknown or out of range.
  """
  if comparisons is None:
    comparisons = [Comparison()] * len(heads)
  taps = zip(student_taps, teacher_taps, heads, comparisons, strict=True)
  if len(carry) != len(heads) - 1:
    raise ValueError(
      f"carry must hold one function for each of {len(heads)} taps but the "
      f"first: {len(carry)}"
    )
  loss = jnp.zeros(student_taps[0].shape[0])
  restored = student_taps[0]
  for index, (x, teacher_feat, head, comparison) in enumerate(taps):
    masking.check_features(x, teacher_feat)
    if index:
      carried = carry[index - 1](restored)
      chex.assert_equal_shape([carried, x], exception_type=ValueError)
      x = x + carried
    restored = _restore(x, head, rng_lib.fold_in(rng, index))
    if head.weight:
      loss = loss + head.weight * masking.squared_error(
        restored, teacher_feat, head.region, comparison
      )
  return loss


def _restore(x: Array, head: Head, rng: Array) -> Array:
  """Hides cells of `x` [B, h, w, C] and has the head's generator fill them."""
  chex.assert_shape(head.region, x.shape[:3], exception_type=ValueError)
  keep = masking.keep_mask(rng, head.region, head.hiding)
  return head.generate(masking.hide(x, keep))


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
  masking.check_choice("band_schedule", schedule, BAND_SCHEDULES)
  powers: dict[str, Sequence[int]] = {
    "const": [0] * heads,
    "narrowing": range(heads - 1, -1, -1),
    "widening": range(heads),
  }
  return tuple(
    math.floor(radius * 1.5**power + 0.5) for power in powers[schedule]
  )


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
  masking.check_choice("ratio_schedule", schedule, RATIO_SCHEDULES)
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
  masking.check_choice("head_weights", kind, HEAD_WEIGHTS)
  raw = {
    "uniform": [1.0] * heads,
    "last": [0.0] * (heads - 1) + [1.0],
    "geometric": [0.5 ** (heads - 1 - head) for head in range(heads)],
  }[kind]
  return tuple(weight / sum(raw) for weight in raw)
