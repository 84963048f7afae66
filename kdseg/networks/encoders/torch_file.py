"""Reads weights from PyTorch files of before version 1.6, without PyTorch.

Such a file holds three pickled headers, a pickled dict whose tensors point at
numbered storages, the list of those numbers, then every storage as its length
and its raw bytes. A pickle is a program, so the reader admits only what
rebuilds tensors.
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import math
import os
import pathlib
import pickle
from typing import Any
from typing import BinaryIO
from typing import NamedTuple

import numpy as np

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES: Mapping[str, np.dtype] = {
  "DoubleStorage": np.dtype("<f8"),
  "FloatStorage": np.dtype("<f4"),
  "HalfStorage": np.dtype("<f2"),
  "LongStorage": np.dtype("<i8"),
  "IntStorage": np.dtype("<i4"),
}


class _Storage(NamedTuple):
  key: str
  dtype: np.dtype
  size: int


class _Tensor(NamedTuple):
  storage: _Storage
  offset: int
  shape: tuple[int, ...]
  stride: tuple[int, ...]


def _rebuild_tensor(
  storage: _Storage,
  offset: int,
  shape: tuple[int, ...],
  stride: tuple[int, ...],
  *unused_autograd: Any,
) -> _Tensor:
  return _Tensor(storage, offset, tuple(shape), tuple(stride))


# The unpickler in Python, not the one in C, which reserves memory for as many
# objects as the largest number in the file says: a few bytes say 4 billion.
class _Unpickler(pickle._Unpickler):
  """Unpickles tensors by reference and refuses everything else."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      # A new function each time: a pickle may set attributes of what it names.
      return lambda *parts: _rebuild_tensor(*parts)
    if module == "torch" and name in _DTYPES:
      return name
    # ascii: the name may hold control characters, and is printed.
    wanted = ascii(f"{module}.{name}")
    raise ValueError(f"a weight file must not load {wanted}")

  def persistent_load(self, pid: Any) -> _Storage:
    if len(pid) != 6 or pid[0] != "storage" or pid[5] is not None:
      raise ValueError("a tensor has no plain storage")
    _, kind, key, _, size, _ = pid
    return _Storage(key, _DTYPES[kind], size)


def _read_storages(
  file: BinaryIO, storages: Mapping[str, _Storage], keys: Sequence[str]
) -> dict[str, np.ndarray]:
  arrays = {}
  for key in keys:
    storage = storages[key]
    size = int.from_bytes(file.read(8), "little")
    length = size * storage.dtype.itemsize
    # Before reading, which reserves memory for the length that is asked for.
    left = os.fstat(file.fileno()).st_size - file.tell()
    if size != storage.size or length > left:
      raise ValueError(f"storage {key} is cut short or has another length")
    arrays[key] = np.frombuffer(file.read(length), storage.dtype)
  return arrays


def _tensor_to_array(
  name: str, tensor: _Tensor, arrays: Mapping[str, np.ndarray]
) -> np.ndarray:
  flat = arrays[tensor.storage.key]
  # The farthest element: `as_strided` checks nothing.
  last = tensor.offset + sum(
    (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride)
  )
  numbers = (tensor.offset, *tensor.shape, *tensor.stride)
  count = math.prod(tensor.shape)
  if (
    len(tensor.shape) != len(tensor.stride)
    or min(numbers) < 0
    or (count and last >= flat.size)
    # With a stride of 0, one number could become terabytes.
    or count > flat.size
  ):
    raise ValueError(f"{name} reaches outside its storage")
  view = np.lib.stride_tricks.as_strided(
    flat[tensor.offset :],
    tensor.shape,
    [stride * flat.itemsize for stride in tensor.stride],
    writeable=False,
  )
  return np.ascontiguousarray(view).reshape(tensor.shape)


def read(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a `state_dict`.

  Args:
    path: the file.

  Returns:
    {name: array}, in the file's order, shapes as PyTorch has them.

  Raises:
    ValueError: that names the file, if it has another format, is cut short, or
      refers to anything but tensors.
  """
  path = pathlib.Path(path)
  with path.open("rb") as file:
    try:
      magic = _Unpickler(file).load()
      protocol = _Unpickler(file).load()
      if (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise ValueError("its header is another")
      _Unpickler(file).load()  # Sizes of C types where it was written.
      tensors = _Unpickler(file).load()
      keys = _Unpickler(file).load()
      storages = {t.storage.key: t.storage for t in tensors.values()}
      arrays = _read_storages(file, storages, keys)
      return {
        name: _tensor_to_array(name, tensor, arrays)
        for name, tensor in tensors.items()
      }
    except Exception as error:
      # Bytes that are no pickle, or half of one, may raise anything.
      raise ValueError(
        f"{path} is not a readable PyTorch file of the format before 1.6: "
        f"{str(error) or 'it ends too early'}. If a package brought it, "
        "install that once more."
      ) from error
