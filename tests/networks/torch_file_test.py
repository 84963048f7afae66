"""The reader of old PyTorch files: what it reads, and what it refuses."""

import collections
import io
import os
import pickle
import struct
import sys
import tracemalloc
import types

import numpy as np
import pytest

from kdseg.networks.encoders import torch_file


class _Pickler(pickle.Pickler):
  """Writes storages the way `torch.save` did before version 1.6."""

  def persistent_id(self, obj):
    return obj.pid if isinstance(obj, _FakeStorage) else None


class _FakeStorage:
  def __init__(self, key, array):
    self.array = np.ascontiguousarray(array).ravel()
    kind = sys.modules["torch"].FloatStorage
    self.pid = ("storage", kind, key, "cpu", self.array.size, None)


class _FakeTensor:
  def __init__(self, storage, offset, shape, stride):
    self.parts = (storage, offset, shape, stride)

  def __reduce__(self):
    rebuild = sys.modules["torch._utils"]._rebuild_tensor_v2
    empty = collections.OrderedDict()
    return rebuild, (*self.parts, False, empty)


@pytest.fixture
def fake_torch(monkeypatch):
  """Names a pickle can refer to, as the real torch has them."""
  torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
  torch.FloatStorage = type("FloatStorage", (), {"__module__": "torch"})

  def _rebuild_tensor_v2():
    raise AssertionError("only named, never called")

  _rebuild_tensor_v2.__module__ = "torch._utils"
  _rebuild_tensor_v2.__qualname__ = "_rebuild_tensor_v2"
  utils._rebuild_tensor_v2 = _rebuild_tensor_v2
  monkeypatch.setitem(sys.modules, "torch", torch)
  monkeypatch.setitem(sys.modules, "torch._utils", utils)


def _write(path, tensors, storages, magic=0x1950A86A20F9469CFC6C):
  stream = io.BytesIO()
  for header in (magic, 1001, {"little_endian": True}):
    pickle.dump(header, stream, protocol=2)
  _Pickler(stream, protocol=2).dump(tensors)
  pickle.dump([s.pid[2] for s in storages], stream, protocol=2)
  for storage in storages:
    stream.write(struct.pack("<q", storage.array.size))
    stream.write(storage.array.tobytes())
  path.write_bytes(stream.getvalue())


class TestLegacyReader:
  def test_reads_shape_offset_and_strides(self, fake_torch, tmp_path):
    values = np.arange(12, dtype=np.float32)
    storage = _FakeStorage("7", values)
    tensors = collections.OrderedDict(
      whole=_FakeTensor(storage, 0, (3, 4), (4, 1)),
      columns_first=_FakeTensor(storage, 0, (4, 3), (1, 4)),
      tail=_FakeTensor(storage, 10, (2,), (1,)),
      scalar=_FakeTensor(storage, 5, (), ()),
    )
    _write(tmp_path / "a.pth", tensors, [storage])
    read = torch_file.read(tmp_path / "a.pth")
    assert list(read) == ["whole", "columns_first", "tail", "scalar"]
    np.testing.assert_array_equal(read["whole"], values.reshape(3, 4))
    np.testing.assert_array_equal(read["columns_first"], values.reshape(3, 4).T)
    np.testing.assert_array_equal(read["tail"], [10, 11])
    assert read["scalar"].shape == ()
    assert read["scalar"] == 5
    assert all(array.dtype == np.float32 for array in read.values())

  def test_two_storages_keep_apart(self, fake_torch, tmp_path):
    first = _FakeStorage("x", np.float32([1, 2]))
    second = _FakeStorage("y", np.float32([3]))
    tensors = collections.OrderedDict(
      b=_FakeTensor(second, 0, (1,), (1,)), a=_FakeTensor(first, 0, (2,), (1,))
    )
    _write(tmp_path / "a.pth", tensors, [first, second])
    read = torch_file.read(tmp_path / "a.pth")
    np.testing.assert_array_equal(read["a"], [1, 2])
    np.testing.assert_array_equal(read["b"], [3])

  @pytest.mark.parametrize(
    ("offset", "shape", "stride"),
    [(1, (4,), (1,)), (0, (2, 2), (3, 1)), (3, (2,), (-1,)), (-1, (1,), (1,))],
  )
  def test_refuses_to_read_outside_a_storage(
    self, fake_torch, tmp_path, offset, shape, stride
  ):
    storage = _FakeStorage("0", np.zeros(4, np.float32))
    tensors = {"far": _FakeTensor(storage, offset, shape, stride)}
    _write(tmp_path / "a.pth", tensors, [storage])
    with pytest.raises(ValueError, match="far reaches outside"):
      torch_file.read(tmp_path / "a.pth")

  @pytest.mark.parametrize("function", [os.system, eval, getattr, print])
  def test_refuses_to_run_what_a_file_names(self, tmp_path, function):
    class Attack:
      def __reduce__(self):
        return function, (f"open({str(tmp_path / 'ran')!r}, 'w')",)

    stream = io.BytesIO()
    for header in (0x1950A86A20F9469CFC6C, 1001, {}, {"w": Attack()}):
      pickle.dump(header, stream, protocol=2)
    (tmp_path / "evil.pth").write_bytes(stream.getvalue())
    # os.system is posix.system, or nt.system.
    wanted = rf"'{function.__module__}\.{function.__name__}'".replace(
      "builtins", "(builtins|__builtin__)"
    )
    with pytest.raises(
      ValueError, match=rf"evil\.pth .* must not load {wanted}"
    ):
      torch_file.read(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()

  def test_what_a_file_names_is_escaped_in_the_message(self, tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(b"\x80\x02c\x1b[2J\nx\n.")
    with pytest.raises(ValueError, match="must not load") as error:
      torch_file.read(path)
    assert str(error.value).isprintable()

  def test_a_number_of_a_file_reserves_no_memory(self, tmp_path):
    # LONG_BINPUT: "call this object number 2 147 483 647".
    path = tmp_path / "evil.pth"
    path.write_bytes(b"\x80\x02K\x01r\xff\xff\xff\x7f.")
    tracemalloc.start()
    try:
      with pytest.raises(ValueError, match=r"evil\.pth is not a readable"):
        torch_file.read(path)
      _, peak = tracemalloc.get_traced_memory()
    finally:
      tracemalloc.stop()
    assert peak < 2**20

  def test_a_storage_longer_than_its_file_reserves_no_memory(
    self, fake_torch, tmp_path
  ):
    storage = _FakeStorage("0", np.ones(4, np.float32))
    storage.pid = (*storage.pid[:4], 2**60, None)
    tensors = {"w": _FakeTensor(storage, 0, (4,), (1,))}
    _write(tmp_path / "a.pth", tensors, [])
    content = (tmp_path / "a.pth").read_bytes()
    empty = pickle.dumps([], protocol=2)
    listed = pickle.dumps(["0"], protocol=2)
    assert content.endswith(empty)
    content = content.removesuffix(empty) + listed + struct.pack("<q", 2**60)
    (tmp_path / "a.pth").write_bytes(content)
    with pytest.raises(ValueError, match="storage 0 is cut short"):
      torch_file.read(tmp_path / "a.pth")

  @pytest.mark.parametrize(
    ("shape", "stride"),
    [((2**40,), (0,)), ((0, 2**70), (1, 1)), ((2,), (1, 1)), ((2**70,), (1,))],
  )
  def test_refuses_shapes_that_would_fill_the_memory(
    self, fake_torch, tmp_path, shape, stride
  ):
    storage = _FakeStorage("0", np.zeros(4, np.float32))
    tensors = {"far": _FakeTensor(storage, 0, shape, stride)}
    _write(tmp_path / "a.pth", tensors, [storage])
    with pytest.raises(ValueError, match=r"a\.pth is not a readable"):
      torch_file.read(tmp_path / "a.pth")

  @pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a newer torch file", b"\x80\x02K\x01."]
  )
  def test_says_that_another_file_is_none(self, tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(
      ValueError, match=r"other\.pth is not a readable .* before 1\.6: \w"
    ):
      torch_file.read(tmp_path / "other.pth")

  @pytest.mark.parametrize("cut", [1, 4, 20, 200])
  def test_refuses_a_file_cut_short(self, fake_torch, tmp_path, cut):
    storage = _FakeStorage("0", np.ones(4, np.float32))
    tensors = {"w": _FakeTensor(storage, 0, (4,), (1,))}
    _write(tmp_path / "a.pth", tensors, [storage])
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[:-cut])
    with pytest.raises(ValueError, match=r"a\.pth is not a readable"):
      torch_file.read(tmp_path / "a.pth")
