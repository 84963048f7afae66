"""The eight orientations of a square image: flips and quarter turns."""

import numpy as np

ORIENTATIONS = 8


def orient(array: np.ndarray, orientation: int) -> np.ndarray:
  """Brings [B, H, W, ...] into one of the eight orientations; 0 is as it is.

  Raises:
    ValueError: if `orientation` is not in 0 to 7.
  """
  if not 0 <= orientation < ORIENTATIONS:
    raise ValueError(f"orientation must be in 0 to 7: {orientation}")
  if orientation >= 4:
    array = array[:, :, ::-1]
  return np.rot90(array, orientation % 4, (1, 2))


def restore_orientation(array: np.ndarray, orientation: int) -> np.ndarray:
  """Undoes `orient`."""
  array = np.rot90(array, -(orientation % 4), (1, 2))
  return array[:, :, ::-1] if orientation >= 4 else array


def draw_orientations(seed: int, step: int, batch_size: int) -> np.ndarray:
  """Draws one orientation an example from (seed, step); [batch_size] int."""
  generator = np.random.default_rng((seed, step, 0x0B1E27))
  return generator.integers(0, ORIENTATIONS, batch_size)


def orient_each(array: np.ndarray, orientations: np.ndarray) -> np.ndarray:
  """Brings each example of [B, S, S, ...] into its own orientation."""
  return np.stack([orient(x[None], o)[0] for x, o in zip(array, orientations)])
