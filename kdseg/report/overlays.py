"""A picture of cases: the lesion as annotated and as predicted, outlined.

A mean hides lost lesions. `choose_columns` chooses the arms to show, `pick` the
images, by what the baseline and one arm make of them, and `overlays` draws
them: one column an arm, one row an image, so that a row compares the arms.
"""

from collections.abc import Iterable
from collections.abc import Sequence
import dataclasses

import numpy as np
from PIL import Image
from PIL import ImageDraw
from PIL import ImageFont
import scipy.ndimage

from kdseg.report import meta as meta_lib
from kdseg.report import scores

COLUMNS = 6  # at most: more are too many to look at
# Distinct in any colour vision, and from skin and lesions.
TRUTH_COLOUR = (0, 229, 255)
PREDICTION_COLOUR = (255, 214, 0)
_INK = (28, 32, 36)
_FAINT = (106, 112, 118)
_TILE = 320  # pixels, the longer side of a case
_GAP = 18
_MARGIN = 28

_Font = ImageFont.FreeTypeFont | ImageFont.ImageFont


@dataclasses.dataclass(frozen=True)
class Case:
  """One image with its annotated and its predicted mask.

  `rank` is the row's name ("worst", ...), `dice` as in scores.csv; `image`
  uint8 [h, w, 3], `truth` and `prediction` bool [h, w].
  """

  arm: str
  rank: str
  id: str
  dice: float
  image: np.ndarray
  truth: np.ndarray
  prediction: np.ndarray


def choose_columns(
  arms: Iterable[str], meta: meta_lib.Meta
) -> tuple[list[str], str, str | None]:
  """Chooses the arms to show: a teacher, the baseline, then the others.

  The others are those that the primary family names, then those of the same
  student, then the rest, each in their order.

  Args:
    arms: those that were scored.
    meta: of report.json; see `report.meta`.

  Returns:
    At most `COLUMNS` arms; the baseline (one of them; the first arm if none was
    scored); the arm that is compared with it, None if there is no other.
  """
  arms = list(dict.fromkeys(arms))
  students = [arm for arm in arms if not meta_lib.is_teacher(arm)]
  teachers = [arm for arm in arms if arm not in students]
  if meta.get("teacher") in teachers:
    teachers = [meta["teacher"]]
  primary = meta_lib.primary(meta)
  named = [arm for _, arm, _ in primary] + [other for _, _, other in primary]
  ordered = [arm for arm in named if arm in students] + students
  if not ordered:
    return teachers[:COLUMNS], teachers[0], None
  baseline = meta_lib.baseline_of(ordered[0], meta)
  if baseline not in students:
    baseline = ordered[0]
  student = baseline.partition("-")[0]
  ordered.sort(key=lambda arm: arm.partition("-")[0] != student)
  others = [arm for arm in dict.fromkeys(ordered) if arm != baseline]
  shown = [*teachers[:1], baseline, *others][:COLUMNS]
  return shown, baseline, others[0] if others else None


def pick(
  baseline: Iterable[scores.Row], arm: Iterable[scores.Row] | None = None
) -> dict[str, str]:
  """Chooses the images to show, by Dice.

  Args:
    baseline: rows of scores.csv, one group (an arm, a seed, a data set).
    arm: the same images, as another arm predicts them.

  Returns:
    Rank -> id: the baseline's "worst", "median" and "best", and the arm's "most
    improved" and "most worsened" against it. The same ones whatever the order
    of the rows: ties go by id, and of an even number the lower median is taken.

  Raises:
    ValueError: on no row, or rows of several groups.
  """
  dice = _dice(baseline)
  ordered = sorted(dice, key=lambda identity: (dice[identity], identity))
  places = (0, (len(ordered) - 1) // 2, len(ordered) - 1)
  picked = dict(zip(("worst", "median", "best"), (ordered[i] for i in places)))
  if arm is not None:
    other = _dice(arm)
    gains = [(other[identity] - dice[identity], identity) for identity in dice]
    picked["most improved"] = min(gains, key=lambda g: (-g[0], g[1]))[1]
    picked["most worsened"] = min(gains)[1]
  return picked


def _dice(rows: Iterable[scores.Row]) -> dict[str, float]:
  found = scores.groups(rows)
  if len(found) != 1:
    raise ValueError(f"cases are picked from one group, got {len(found)}")
  [group] = found.values()
  return {str(row["id"]): float(row["dice"]) for row in group}


def overlays(cases: Sequence[Case], *, title: str = "") -> Image.Image:
  """Draws cases in a grid, on white.

  Args:
    cases: at least one; columns are arms, rows are ranks, both in the order of
      their first appearance. A pair without a case stays blank.
    title: lines above, for example the data set and the seed.
  """
  arms = list(dict.fromkeys(case.arm for case in cases))
  ranks = list(dict.fromkeys(case.rank for case in cases))
  placed = {(case.arm, case.rank): case for case in cases}
  tiles = {place: _outlined(case) for place, case in placed.items()}

  titles = title.split("\n") if title else []
  big, normal, small = (ImageFont.load_default(size) for size in (22, 17, 15))
  left = _MARGIN + max(int(normal.getlength(rank)) for rank in ranks) + 16
  heights = [
    max(tile.height for (_, r), tile in tiles.items() if r == rank)
    for rank in ranks
  ]
  # The legend and the title may be wider than one column.
  width = max(
    left + len(arms) * (_TILE + _GAP) - _GAP + _MARGIN,
    *(int(big.getlength(line)) + 2 * _MARGIN for line in titles),
    left + 330,
  )
  top = _MARGIN + 30 * len(titles) + (8 if title else 0) + 34
  height = top + 32 + sum(heights) + len(ranks) * (30 + _GAP) - _GAP + _MARGIN
  canvas = Image.new("RGB", (width, height), "white")
  draw = ImageDraw.Draw(canvas)
  for i, line in enumerate(titles):
    draw.text((_MARGIN, _MARGIN + 30 * i), line, _INK, big, anchor="lt")
  _legend(draw, (left, top - 26), small)
  columns = {arm: left + i * (_TILE + _GAP) for i, arm in enumerate(arms)}
  for arm, x in columns.items():
    draw.text(
      (x, top + 22), _fit(arm, normal, _TILE), _INK, normal, anchor="ls"
    )
  y = top + 32
  for rank, row_height in zip(ranks, heights):
    draw.text((_MARGIN, y + row_height // 2), rank, _FAINT, normal, anchor="lm")
    for arm, x in columns.items():
      if (arm, rank) in placed:
        tile = tiles[arm, rank]
        canvas.paste(tile, (x, y))
        _caption(draw, (x, y + tile.height + 19), placed[arm, rank], small)
    y += row_height + 30 + _GAP
  return canvas


def outline(
  image: np.ndarray,
  masks: Sequence[tuple[np.ndarray, tuple[int, int, int], float, float]],
  side: int = _TILE,
) -> Image.Image:
  """Draws the outlines of masks over an image.

  Args:
    image: [h, w, 3] uint8.
    masks: (mask [h, w] bool, colour, half width of the line, width of its dark
      rim), the lowest first; widths in half pixels of the drawing.
    side: longer side of the drawing, in pixels.

  Returns:
    The drawing.
  """
  scale = side / max(image.shape[:2])
  # Drawn at twice the size and shrunk, so that lines come out smooth.
  size = [max(2, round(2 * scale * length)) for length in image.shape[1::-1]]
  picture = np.array(
    Image.fromarray(image).resize(size, Image.Resampling.BICUBIC),
    np.float32,
  )
  for mask, colour, radius, rim in masks:
    distance = _distance_to_outline(mask, size)
    for reach, ink, strength in (
      (radius + rim, (0, 0, 0), 0.55),  # a dark rim, seen on any skin
      (radius, colour, 1.0),
    ):
      line = distance < reach + 0.5
      cover = strength * np.clip(reach + 0.5 - distance[line], 0, 1)[:, None]
      picture[line] = picture[line] * (1 - cover) + np.array(ink) * cover
  drawn = Image.fromarray(np.round(picture).astype(np.uint8))
  return drawn.resize(
    [max(1, length // 2) for length in size], Image.Resampling.BOX
  )


def _outlined(case: Case) -> Image.Image:
  # The prediction is the thinner line and on top: where both agree, one sees
  # both.
  return outline(
    case.image,
    [
      (case.truth, TRUTH_COLOUR, 5.5, 1.5),
      (case.prediction, PREDICTION_COLOUR, 2.2, 1.0),
    ],
  )


def _distance_to_outline(mask: np.ndarray, size: list[int]) -> np.ndarray:
  """Returns the distance [h, w] of each pixel of the drawing to the outline."""
  smooth = Image.fromarray(mask.astype(np.float32)).resize(
    size, Image.Resampling.BILINEAR
  )
  inside = np.asarray(smooth) > 0.5
  # Outside the frame is background, so that the outline closes along it.
  padded = np.pad(inside, 1)
  edge = padded & ~scipy.ndimage.binary_erosion(padded)
  if not edge.any():
    return np.full(inside.shape, np.inf)
  return scipy.ndimage.distance_transform_edt(~edge)[1:-1, 1:-1]


def _caption(
  draw: ImageDraw.ImageDraw, at: tuple[int, int], case: Case, font: _Font
) -> None:
  x, y = at
  value = f"Dice {case.dice:.3f}"
  if not case.prediction.any():
    value = f"empty, {value}"
  room = _TILE - int(font.getlength(value)) - 16
  draw.text(at, _fit(case.id, font, room), _FAINT, font, anchor="ls")
  draw.text((x + _TILE, y), value, _INK, font, anchor="rs")


def _legend(
  draw: ImageDraw.ImageDraw, at: tuple[int, int], font: _Font
) -> None:
  x, y = at
  for name, colour, thick in (
    ("ground truth", TRUTH_COLOUR, 6),
    ("prediction", PREDICTION_COLOUR, 3),
  ):
    middle = y + 7
    draw.line((x - 1, middle, x + 31, middle), (90, 90, 90), thick + 2)
    draw.line((x, middle, x + 30, middle), colour, thick)
    draw.text((x + 40, middle), name, _INK, font, anchor="lm")
    x += 40 + int(font.getlength(name)) + 28


def _fit(text: str, font: _Font, room: int) -> str:
  """Takes the middle out of a text that is wider than `room` pixels."""
  text = " ".join(text.split()).encode("utf-8", "replace").decode("utf-8")
  if font.getlength(text) <= room:
    return text
  keep = len(text) - 1
  while keep > 1:
    short = text[: (keep + 1) // 2] + "…" + text[len(text) - keep // 2 :]
    if font.getlength(short) <= room:
      return short
    keep -= 1
  return "…"
