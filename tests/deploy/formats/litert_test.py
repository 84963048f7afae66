"""What is special about LiteRT graphs; graph_test.py has what they compute."""

from ai_edge_litert import interpreter as litert
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_graph
from tiny_graph import conv
from tiny_graph import draw

from kdseg.deploy.formats import litert as litert_lib
from kdseg.deploy.formats import litert_graph
from kdseg.networks import layers

WRITER = tiny_graph.Litert()


@pytest.mark.parametrize(
  ("function", "kind"),
  [
    # Padding that the format knows is no operator, and neither is a ReLU.
    (
      lambda x: conv(x, draw(3, 3, 4, 5, seed=1), window_strides=(2, 2)),
      "CONV_2D",
    ),
    (lambda x: jax.nn.relu(conv(x, draw(3, 3, 4, 5, seed=1))), "CONV_2D"),
    (lambda x: layers.space_to_depth(x, 4), "SPACE_TO_DEPTH"),
    (lambda x: layers.depth_to_space(x, 2), "DEPTH_TO_SPACE"),
    (lambda x: layers.upsample_2x(x), "RESIZE_BILINEAR"),
    (lambda x: jnp.mean(x, (1, 2)), "MEAN"),
  ],
)
def test_what_the_format_has_an_operator_for_is_one_operator(function, kind):
  assert WRITER.kinds(WRITER.make(function)) == {kind: 1}


def test_its_batch_is_one_until_it_is_resized():
  runner = litert.Interpreter(model_content=WRITER.make(lambda x: x + 1.0))
  [given] = runner.get_input_details()
  assert list(given["shape"]) == [1, 8, 8, 4]
  assert list(given["shape_signature"]) == [-1, 8, 8, 4]


def test_it_can_be_called_by_its_signature():
  runner = litert.Interpreter(model_content=WRITER.make(lambda x: x + 1.0))
  call = runner.get_signature_runner(litert_graph.SIGNATURE)
  np.testing.assert_array_equal(
    call(image=np.zeros((1, 8, 8, 4), np.float32))["probability"], 1.0
  )


def test_a_padded_mean_is_refused():
  with pytest.raises(litert_lib.UnsupportedError, match="padded sum"):
    WRITER.make(lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME"))
