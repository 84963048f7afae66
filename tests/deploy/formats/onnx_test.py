"""What is special about ONNX graphs; graph_test.py has what they compute."""

from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_graph
from tiny_graph import conv
from tiny_graph import draw

from kdseg import networks
from kdseg.deploy.formats import onnx

WRITER = tiny_graph.Onnx()


def test_between_convolutions_nothing_is_transposed():
  one, two = draw(3, 3, 4, 4, seed=1), draw(3, 3, 4, 4, seed=2)
  model = WRITER.assert_same(
    lambda x: conv(jax.nn.relu(conv(x, one)) + 1.0, two), atol=1e-4
  )
  # Once at the beginning and once at the end.
  assert WRITER.kinds(model)["Transpose"] == 2


@pytest.mark.parametrize("count_include_pad", [True, False])
def test_a_padded_mean_is_that_of_jax(count_include_pad):
  WRITER.assert_same(
    lambda x: nn.avg_pool(
      x, (3, 3), (1, 1), "SAME", count_include_pad=count_include_pad
    )
  )


def test_a_graph_holds_standard_operators_and_weights_that_are_read():
  network = networks.make_network("patch_unet_12k")
  function, *_ = tiny_graph.make_case(network, 32, lambda out: out["logits"])
  model = WRITER.make(function, (32, 32, 3), np.uint8)
  assert {node.domain for node in model.graph.node} == {""}
  read = {name for node in model.graph.node for name in node.input}
  assert {tensor.name for tensor in model.graph.initializer} <= read


def test_a_type_that_onnx_would_compute_otherwise_is_refused():
  with pytest.raises(onnx.UnsupportedError, match="not valid ONNX"):
    WRITER.make(lambda x: x.astype(jnp.bfloat16) * 2)


def test_the_file_says_what_it_is():
  model = onnx.make_model(lambda x: x + 1.0, (8, 8, 3), np.float32, {"size": 8})
  [given], [result] = model.graph.input, model.graph.output
  assert (given.name, result.name) == ("image", "probability")
  sides = [d.dim_param or d.dim_value for d in given.type.tensor_type.shape.dim]
  assert sides == ["batch", 8, 8, 3]
  assert model.metadata_props[0].value == "8"
