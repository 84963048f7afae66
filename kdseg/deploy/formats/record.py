"""What an export format is: one record, and what its two functions exchange."""

from collections.abc import Callable
from collections.abc import Iterator
from collections.abc import Mapping
from collections.abc import Sequence
import contextlib
from typing import Any
from typing import NamedTuple

import jax
import numpy as np

INPUT, OUTPUT = "image", "probability"

# Of a network: uint8 [B, S, S, 3] to [B, S, S] float32.
Function = Callable[[jax.Array], jax.Array]
Run = Callable[[np.ndarray], np.ndarray]


class Opened(NamedTuple):
  """A file in its runtime.

  Attributes:
    run: [B, S, S, 3] uint8 to [B, S, S] float32.
    size: side of its input, S pixels.
    about: what the file says of itself; empty if the format has no room.
  """

  run: Run
  size: int
  about: Mapping[str, Any]


class Format(NamedTuple):
  """An export format.

  Attributes:
    name: as in `--formats`.
    suffix: of its files; no two formats share one.
    extra: of setup.cfg, with the packages that the functions below import.
    write: (function, size, about) to the content of a file; `about` is what
      preprocess.json says.
    open: (content, threads) to the file in its runtime; 0 threads are the
      runtime's own choice. Any error means that the content is damaged.
    quantize: (content, images [N, S, S, 3] uint8) to the content of the file
      with 8-bit weights, if the format has one.
  """

  name: str
  suffix: str
  extra: str
  write: Callable[[Function, int, Mapping[str, Any]], bytes]
  open: Callable[[bytes, int], Opened]
  quantize: Callable[[bytes, np.ndarray], bytes] | None = None

  @property
  def file(self) -> str:
    """Name of the file in an export."""
    return f"model{self.suffix}"

  @property
  def int8_file(self) -> str:
    """Name of the file with 8-bit weights."""
    return f"model.int8{self.suffix}"

  @contextlib.contextmanager
  def naming_extra(self) -> Iterator[None]:
    """Makes a missing package inside the block an error that names the extra.

    Raises:
      ImportError: if a package is not installed.
    """
    try:
      yield
    except ModuleNotFoundError as error:
      raise ImportError(
        f"{self.name} files need the package {error.name or error}: "
        f"pip install 'kdseg[{self.extra}]'"
      ) from error


def check_signature(
  is_uint8: bool, shape: Sequence[Any], has_output: bool
) -> None:
  """Refuses a file that `kdseg.deploy.export` did not write.

  Raises:
    ValueError: if it does not map uint8 [B, S, S, 3] to `OUTPUT`.
  """
  square = len(shape) == 4 and shape[1] == shape[2] and shape[3] == 3
  if not (is_uint8 and square and has_output):
    raise ValueError(
      "it is no file of kdseg.deploy.export, which takes uint8 [B, S, S, 3] "
      f'and gives "{OUTPUT}"'
    )
