"""Programs as LiteRT models, run by LiteRT, against JAX."""

import collections

from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema
from flax import linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny_graph import OPERATIONS_OF_TEACHERS
from tiny_graph import conv
from tiny_graph import draw
from tiny_graph import make_case

from kdseg import networks
from kdseg.deploy.formats import litert as litert_lib
from kdseg.networks import layers
from kdseg.networks.encoders import vit

SIDE = 32


def make_model(function, shape=(8, 8, 4), dtype=np.float32):
  return litert_lib.export(
    function, shape, dtype, input_name="x", output_name="y"
  )


def run(model, x):
  runner = litert.Interpreter(model_content=model, num_threads=1)
  [given] = runner.get_input_details()
  runner.resize_tensor_input(given["index"], x.shape)
  runner.allocate_tensors()
  runner.set_tensor(given["index"], x)
  runner.invoke()
  [answer] = runner.get_output_details()
  return runner.get_tensor(answer["index"])


def kinds(model):
  names = {
    value: name
    for name, value in vars(schema.BuiltinOperator).items()
    if name.isupper()
  }
  read = schema.ModelT.InitFromObj(schema.Model.GetRootAs(model))
  codes = [names[code.builtinCode] for code in read.operatorCodes]
  operators = read.subgraphs[0].operators
  return collections.Counter(codes[o.opcodeIndex] for o in operators)


def assert_same(function, *, batch=3, shape=(8, 8, 4), atol=1e-5):
  x = draw(batch, *shape)
  model = make_model(function, shape)
  np.testing.assert_allclose(run(model, x), function(x), atol=atol)
  return model


@pytest.mark.parametrize(
  ("kernel", "options"),
  [
    ((3, 3, 4, 5), {}),
    ((1, 1, 4, 5), {}),
    ((3, 5, 4, 5), {}),
    ((3, 3, 4, 5), {"padding": "VALID"}),
    # SAME of stride 2 pads an even side at its end alone; PyTorch both ends.
    ((3, 3, 4, 5), {"window_strides": (2, 2)}),
    (
      (3, 3, 4, 5),
      {"window_strides": (2, 2), "padding": ((1, 1), (1, 1))},
    ),
    ((3, 3, 4, 5), {"rhs_dilation": (2, 2)}),
    ((3, 3, 1, 4), {"feature_group_count": 4}),
    ((3, 3, 1, 8), {"feature_group_count": 4}),
  ],
)
def test_convolutions_are_those_of_jax(kernel, options):
  weights = draw(*kernel, seed=1)
  assert_same(lambda x: conv(x, weights, **options))


def test_padding_that_the_format_knows_is_no_operator():
  kernel = draw(3, 3, 4, 5, seed=1)
  model = assert_same(lambda x: conv(x, kernel, window_strides=(2, 2)))
  assert kinds(model) == {"CONV_2D": 1}


@pytest.mark.parametrize("depthwise", [False, True])
def test_a_norm_and_a_relu_go_into_the_convolution_before_them(depthwise):
  kernel = draw(3, 3, 1 if depthwise else 4, 4, seed=1)
  scale, shift = draw(4, seed=2), draw(4)
  groups = 4 if depthwise else 1

  def function(x):
    y = (conv(x, kernel, feature_group_count=groups) - shift) * scale / 3.0
    return jax.nn.relu(y + jnp.float32(0.5))

  assert sum(kinds(assert_same(function)).values()) == 1


def test_what_comes_after_a_relu_stays_after_it():
  kernel, scale = draw(3, 3, 4, 4, seed=1), draw(4, seed=2)
  assert_same(lambda x: jax.nn.relu(conv(x, kernel)) * scale + 1.0)


def test_what_others_read_too_is_changed_by_neither_norm_nor_relu():
  kernel, scale = draw(3, 3, 4, 4, seed=1), draw(4, seed=2)

  def function(x):
    y = conv(x, kernel)
    return y * scale + jax.nn.relu(y) + y

  assert_same(function)


def test_numbers_of_a_place_are_no_numbers_of_a_channel():
  # As many columns as channels: the shift is by column.
  kernel, shift = draw(3, 3, 4, 8, seed=1), draw(8, 1, seed=2)
  assert_same(lambda x: conv(x, kernel) + shift)


@pytest.mark.parametrize(
  "function",
  [
    lambda x: layers.upsample_2x(x),
    lambda x: layers.upsample(x, 4),
    lambda x: layers.max_pool_2x(x),
    lambda x: layers.mean_pool_2x(x),
    lambda x: layers.space_to_depth(x, 4),
    lambda x: layers.depth_to_space(x, 2),
    lambda x: x + jnp.mean(x, (1, 2), keepdims=True),
    lambda x: jnp.mean(x, (1, 2)),
    lambda x: jnp.sum(x, (1, 2)) / 7.0,
    lambda x: jnp.sum(x, 3),
    lambda x: jnp.concatenate([x, 2.0 * x], -1),
    lambda x: jnp.pad(x, ((0, 0), (0, 1), (2, 0), (0, 0))),
    lambda x: jnp.pad(x, ((0, 0), (0, 1), (2, 0), (0, 0)), constant_values=2.0),
    lambda x: jnp.where(x >= 0, x, 0.1 * x),
    lambda x: jax.nn.relu6(3.0 * x),
    lambda x: jax.nn.sigmoid(x) * x,
    lambda x: nn.max_pool(x, (3, 3), (2, 2), "SAME"),
    lambda x: nn.avg_pool(x, (2, 2), (2, 2)),
    lambda x: x / jnp.sum(jnp.ones((8, 8))),
    lambda x: x + jnp.broadcast_to(jnp.arange(4.0), x.shape),
    lambda x: jnp.maximum(x, -x),
    lambda x: 1.0 - x,
    lambda x: 2.0 / (3.0 + x * x),
    # Not a fold of pixels into channels, though it looks like the start of one.
    lambda x: x.reshape(-1, 4, 2, 4, 2, 4).transpose(0, 1, 3, 2, 4, 5),
    lambda x: (
      x.reshape(-1, 4, 2, 4, 2, 4)
      .transpose(0, 1, 3, 2, 4, 5)
      .reshape(-1, 16, 4, 4)
    ),
  ],
)
def test_operations_are_those_of_jax(function):
  assert_same(function)


@pytest.mark.parametrize(
  ("function", "kind"),
  [
    (lambda x: layers.space_to_depth(x, 4), "SPACE_TO_DEPTH"),
    (lambda x: layers.depth_to_space(x, 2), "DEPTH_TO_SPACE"),
    (lambda x: layers.upsample_2x(x), "RESIZE_BILINEAR"),
    (lambda x: jnp.mean(x, (1, 2)), "MEAN"),
  ],
)
def test_what_the_format_has_an_operator_for_is_one_operator(function, kind):
  assert kinds(make_model(function)) == {kind: 1}


def assert_network_same(network, answer=lambda out: out["logits"]):
  """A network with drawn weights, uint8 in."""
  function, image, expected = make_case(network, SIDE, answer)
  model = make_model(function, (SIDE, SIDE, 3), np.uint8)
  np.testing.assert_allclose(
    run(model, image), expected, atol=1e-5 * np.abs(expected).max()
  )
  assert expected.std() > 1e-3
  assert not {"CUSTOM", "DELEGATE"} & set(kinds(model))


@pytest.mark.parametrize(
  "name", ["patch_unet_50k", "patch_unet_12k", "enet", "lite_unet"]
)
def test_every_student_computes_the_same(name):
  assert_network_same(networks.make_network(name))


@pytest.mark.parametrize("name", list(OPERATIONS_OF_TEACHERS))
def test_operations_of_teachers_are_those_of_jax(name):
  assert_same(OPERATIONS_OF_TEACHERS[name], atol=1e-4)


@pytest.mark.parametrize("name", ["deeplab", "pspnet"])
def test_every_convolutional_teacher_computes_the_same(name):
  assert_network_same(networks.make_network(name, encoder_variant="lite0"))


def test_a_transformer_computes_the_same():
  network = vit.ViT(
    side=28, depth=2, width=8, heads=2, taps=(1, 2), trained_from=1
  )
  assert_network_same(network, answer=lambda grids: jnp.concatenate(grids, -1))


def test_its_batch_is_one_until_it_is_resized():
  runner = litert.Interpreter(model_content=make_model(lambda x: x + 1.0))
  [given] = runner.get_input_details()
  assert list(given["shape"]) == [1, 8, 8, 4]
  assert list(given["shape_signature"]) == [-1, 8, 8, 4]


def test_it_can_be_called_by_its_signature():
  runner = litert.Interpreter(model_content=make_model(lambda x: x + 1.0))
  call = runner.get_signature_runner(litert_lib.SIGNATURE)
  np.testing.assert_array_equal(
    call(x=np.zeros((1, 8, 8, 4), np.float32))["y"], 1.0
  )


@pytest.mark.parametrize(
  ("function", "said"),
  [
    (lambda x: jnp.cumsum(x, 1), "cumsum"),
    (lambda x: x.reshape(-1), "moves the batch"),
    (lambda x: x / x.shape[0], "batch's size"),
    (lambda x: nn.avg_pool(x, (3, 3), (1, 1), "SAME"), "padded sum"),
  ],
)
def test_an_operation_without_a_form_is_named(function, said):
  with pytest.raises(litert_lib.UnsupportedError, match=said):
    make_model(function)


def test_without_litert_the_error_names_the_extra(monkeypatch):
  monkeypatch.setitem(__import__("sys").modules, "ai_edge_litert", None)
  with pytest.raises(ImportError, match=r"kdseg\[litert\]"):
    make_model(lambda x: x)
