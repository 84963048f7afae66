"""Is one arm better than another, and how sure can one be?

Two arms are compared on the same images with the same seeds: `baseline` and
`method` are [seeds, images], one metric, and everything here looks at the
differences method - baseline only.

No single number answers the question, so a table shows three:

* `hierarchical_bootstrap`: the interval, over seeds and images. With few
  seeds it is too narrow where seeds differ more than images do: resampling S
  seeds has (S - 1) / S of their variance and too light tails. In simulations
  with 379 images, a seed sd of .01 and an image sd of .02 its "95 %" covered
  78 % at 3 seeds, 87 % at 5, 92 % at 10; with a seed sd of .005 and an image
  sd of .05, 95 to 96 %.
* `random_effects_interval`: the same question by analysis of variance and
  Student's t, which pays for few seeds with width: 93 to 96 % in all of
  those.
* `wilcoxon`, corrected by `holm`: over images only. It tells whether *these*
  runs differ on such images, not whether new runs would.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import scipy  # its `stats`, half a second, at its first use

_CHUNK = 1000  # resamples at a time: 1000 x 1000 images are 8 MB


class Interval(NamedTuple):
  """A difference or a mean, and its interval; NaN for that of one value."""

  value: float
  low: float
  high: float


class Wilcoxon(NamedTuple):
  """The smaller rank sum, the two-sided p, and how many images differ.

  `leaning` is 1 if the method has the larger rank sum, -1 if the baseline has
  it, else 0. It need not be the sign of the mean difference: a few lost
  lesions can outweigh many small gains.
  """

  statistic: float
  p_value: float
  differing: int
  leaning: int


def hierarchical_bootstrap(
  baseline: np.ndarray,
  method: np.ndarray,
  *,
  resamples: int = 10_000,
  seed: int,
  level: float = 0.95,
) -> list[Interval]:
  """Returns the percentile interval of each metric's mean difference.

  Each resample draws seeds with replacement and images with replacement, and
  averages the difference over the drawn seeds crossed with the drawn images:
  the arms stay paired by both. (Every seed was scored on the same images, so
  the two are crossed; for what it estimates see Owen, Ann Appl Stat 1(2),
  2007.) All metrics share the draws.

  Args:
    baseline: [seeds, images, metrics] finite.
    method: the same shape, the same seeds and images in the same order.
    resamples: how many; 10 000 settle the ends of a 95 % interval.
    seed: of the draws; the result depends on nothing else.
    level: share of the resamples between the two ends.

  Returns:
    [metrics] means of method - baseline, with intervals. With one seed they
    leave out the luck of training.

  Raises:
    ValueError: on other shapes, values that are not finite, or a level
      outside (0, 1).
  """
  difference = _paired(baseline, method, ndim=3)
  _check_level(level)
  if resamples < 1:
    raise ValueError(f"resamples has to be at least 1, got {resamples}")
  seeds, images, metrics = difference.shape
  rng = np.random.default_rng(seed)
  means = np.empty((resamples, metrics))
  for start in range(0, resamples, _CHUNK):
    count = min(_CHUNK, resamples - start)
    of_seeds = _draw_counts(rng, seeds, count) / seeds
    of_images = _draw_counts(rng, images, count) / images
    for metric in range(metrics):
      by_seed = of_images @ difference[:, :, metric].T
      means[start : start + count, metric] = (by_seed * of_seeds).sum(1)
  tail = (1 - level) / 2
  ends = np.quantile(means, [tail, 1 - tail], axis=0)
  return [
    Interval(float(value), float(low), float(high))
    for value, low, high in zip(difference.mean((0, 1)), *ends)
  ]


def random_effects_interval(
  baseline: np.ndarray, method: np.ndarray, *, level: float = 0.95
) -> Interval:
  """Returns Student's t interval of the mean difference.

  Two-way random effects, difference[s, n] = mu + seed[s] + image[n] + rest,
  as in the analysis of several readers and several cases (Obuchowski and
  Rockette, Commun Stat Simul Comput 24(2), 1995): the mean's variance is
  (MS_seed + MS_image - MS_rest) / (S N), its degrees of freedom are Hillis's
  (Stat Med 26, 2007), (MS_seed + ...)^2 / (MS_seed^2 / (S - 1)). The part of
  the images has no freedom of its own there: images are many, seeds few.

  Args:
    baseline: [seeds, images] finite.
    method: the same shape, the same seeds and images in the same order.
    level: the promised coverage.

  Returns:
    The mean difference and its interval: with one seed, the t interval over
    images; with one image, over seeds.

  Raises:
    ValueError: on other shapes, values that are not finite, or a level
      outside (0, 1).
  """
  difference = _paired(baseline, method, ndim=2)
  _check_level(level)
  seeds, images = difference.shape
  if seeds == 1 or images == 1:
    return interval_of_mean(difference.ravel(), level=level)
  value = difference.mean()
  by_seed, by_image = difference.mean(1), difference.mean(0)
  rest = difference - by_seed[:, None] - by_image + value
  ms_seed = images * by_seed.var(ddof=1)
  ms_image = seeds * by_image.var(ddof=1)
  ms_rest = np.square(rest).sum() / ((seeds - 1) * (images - 1))
  # Below 0, the images' own variance is taken as none.
  total = ms_seed + max(ms_image - ms_rest, 0.0)
  if total == 0 or ms_seed == 0:
    freedom = images - 1.0
  else:
    freedom = total**2 / (ms_seed**2 / (seeds - 1))
  half = scipy.stats.t.ppf((1 + level) / 2, freedom) * np.sqrt(
    total / difference.size
  )
  return Interval(float(value), float(value - half), float(value + half))


def interval_of_mean(
  values: Sequence[float] | np.ndarray, *, level: float = 0.95
) -> Interval:
  """Returns Student's t interval of a mean.

  Args:
    values: [n] finite, for example one mean Dice a seed.
    level: the promised coverage, where the values are near to normal.

  Raises:
    ValueError: on no value, another shape, values that are not finite, or a
      level outside (0, 1).
  """
  values = np.asarray(values, float)
  _check_level(level)
  if values.ndim != 1 or not values.size:
    raise ValueError(f"expected at least one value, got {values.shape}")
  if not np.isfinite(values).all():
    raise ValueError(f"not all values are finite: {values}")
  mean = float(values.mean())
  if values.size == 1:
    return Interval(mean, float("nan"), float("nan"))
  half = float(
    scipy.stats.t.ppf((1 + level) / 2, values.size - 1)
    * values.std(ddof=1)
    / np.sqrt(values.size)
  )
  return Interval(mean, mean - half, mean + half)


def wilcoxon(baseline: np.ndarray, method: np.ndarray) -> Wilcoxon:
  """Tests whether images favour one arm (signed ranks, two-sided).

  Each image enters once, with its mean over the seeds, so that n is the
  number of images however many seeds there are. Images without a difference
  are left out (Wilcoxon's way). The p value of up to 50 images without ties is
  exact, else the normal approximation with its correction for ties.

  Args:
    baseline: [seeds, images] finite.
    method: the same shape, the same seeds and images in the same order.

  Returns:
    The test's result; p is 1 when no image differs.

  Raises:
    ValueError: on other shapes or values that are not finite.
  """
  difference = _paired(baseline, method, ndim=2)
  by_image = difference.mean(0)
  by_image = by_image[by_image != 0]
  if not by_image.size:
    return Wilcoxon(0.0, 1.0, 0, 0)
  tied = np.unique(np.abs(by_image)).size < by_image.size
  result = scipy.stats.wilcoxon(
    by_image,
    method="exact" if by_image.size <= 50 and not tied else "asymptotic",
  )
  ranks = scipy.stats.rankdata(np.abs(by_image))
  return Wilcoxon(
    float(result.statistic),
    float(result.pvalue),
    int(by_image.size),
    int(np.sign((np.sign(by_image) * ranks).sum())),
  )


def holm(p_values: Sequence[float] | np.ndarray) -> np.ndarray:
  """Corrects p values for their number (Holm, Scand J Stat 6, 1979).

  Args:
    p_values: [n] in [0, 1], the whole family.

  Returns:
    [n] corrected, in the order given; at most 1. Rejecting where they are
    below .05 errs anywhere in the family with probability .05 at most.

  Raises:
    ValueError: on values outside [0, 1] or NaN.
  """
  p_values = np.asarray(p_values, float)
  if p_values.ndim != 1 or not ((p_values >= 0) & (p_values <= 1)).all():
    raise ValueError(f"p values are a list of numbers in [0, 1]: {p_values}")
  order = np.argsort(p_values, kind="stable")
  factors = np.arange(p_values.size, 0, -1)
  adjusted = np.empty_like(p_values)
  adjusted[order] = np.minimum(
    np.maximum.accumulate(p_values[order] * factors), 1
  )
  return adjusted


def _paired(
  baseline: np.ndarray, method: np.ndarray, *, ndim: int
) -> np.ndarray:
  baseline, method = np.asarray(baseline, float), np.asarray(method, float)
  if baseline.shape != method.shape:
    raise ValueError(
      f"the baseline is {baseline.shape}, the method {method.shape}: they "
      "need the same seeds and images, in the same order"
    )
  if baseline.ndim != ndim or 0 in baseline.shape:
    axes = ("seeds", "images", "metrics")[:ndim]
    raise ValueError(f"expected [{', '.join(axes)}], got {baseline.shape}")
  difference = method - baseline
  if not np.isfinite(difference).all():
    seed, image = np.argwhere(~np.isfinite(difference))[0][:2]
    raise ValueError(
      f"the difference at seed index {seed}, image index {image} is not finite"
    )
  return difference


def _draw_counts(rng: np.random.Generator, n: int, times: int) -> np.ndarray:
  """Draws n of n with replacement; returns how often each came [times, n]."""
  drawn = rng.integers(n, size=(times, n)) + n * np.arange(times)[:, None]
  return np.bincount(drawn.ravel(), minlength=times * n).reshape(times, n)


def _check_level(level: float) -> None:
  if not 0 < level < 1:
    raise ValueError(f"level has to lie between 0 and 1, got {level}")
