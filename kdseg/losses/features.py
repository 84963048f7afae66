"""Squared distances from the teacher's features: FitNets and MGD.

Student features come in aligned, that is, with the teacher's grid and channels
(`kdseg.distill.layers`). Generators come in as functions with their parameters
bound.
"""

from collections.abc import Callable
from collections.abc import Sequence
import math

import jax
import jax.numpy as jnp

from kdseg.losses import masking
from kdseg.runtime import rng as rng_lib

Array = jax.Array


def fitnet(
  student_feat: Array,
  teacher_feat: Array,
  *,
  comparison: masking.Comparison = masking.Comparison(),
) -> Array:
  """Squared distance of the student's features from the teacher's.

  FitNets (Romero et al., ICLR 2015, eq. 3), as a mean rather than half a sum;
  the regressor is the alignment.

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C].
    comparison: its scale; errors count everywhere.

  Returns:
    [B] float32.

  Raises:
    ValueError: if a shape does not fit or an option is unknown.
  """
  masking.check_features(student_feat, teacher_feat)
  everywhere = jnp.ones(student_feat.shape[:3])
  return masking.squared_error(
    student_feat, teacher_feat, everywhere, comparison._replace(where="all")
  )


def mgd(
  student_feat: Array,
  teacher_feat: Array,
  rng: Array,
  *,
  generate: Callable[[Array], Array],
  hiding: masking.Hiding = masking.Hiding(),
  comparison: masking.Comparison = masking.Comparison(),
) -> Array:
  """Masked generative distillation: hides cells anywhere.

  Yang et al., ECCV 2022, eq. 3-5. They sum over cells and channels; this is
  the mean, so that one weight fits all sizes of map (`mean_weight` converts).

  Args:
    student_feat: [B, h, w, C], aligned.
    teacher_feat: [B, h, w, C].
    rng: one key, or one an image.
    generate: maps [B, h, w, C] to the same shape.
    hiding: `ratio` is that of every cell; there is no outside.
    comparison: its scale; errors count everywhere.

  Returns:
    [B] float32, squared error averaged over cells and channels.

  Raises:
    ValueError: if a shape does not fit or an option is out of range.
  """
  masking.check_features(student_feat, teacher_feat)
  everywhere = jnp.ones(student_feat.shape[:3])
  keep = masking.keep_mask(rng_lib.fold_in(rng, 0), everywhere, hiding)
  restored = generate(masking.hide(student_feat, keep))
  return masking.squared_error(
    restored, teacher_feat, everywhere, comparison._replace(where="all")
  )


def mean_weight(sum_weight: float, shape: Sequence[int]) -> float:
  """Turns MGD's weight of a sum into the equal weight of a mean.

  Args:
    sum_weight: the weight in the source, where errors are summed over cells
      and channels and averaged over images (2e-5 for segmentation).
    shape: (h, w, C) of the features compared.
  """
  return sum_weight * math.prod(shape)
