"""Both implementations of each layer compute the same, and the right thing."""

import functools

from absl.testing import parameterized
import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kdseg.networks import layers


def normal(*shape, seed=0):
  return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def same_pads(size, kernel, stride):
  """TensorFlow's SAME, restated: ceil(size / stride) windows, odd one last."""
  windows = int(np.ceil(size / stride))
  total = max((windows - 1) * stride + kernel - size, 0)
  return total // 2, total - total // 2


def slow_conv(x, kernel, stride, dilation, depthwise):
  """[B, H, W, C] with loops over everything but the batch."""
  rows, columns = ((k - 1) * dilation + 1 for k in kernel.shape[:2])
  pads = (
    same_pads(x.shape[1], rows, stride),
    same_pads(x.shape[2], columns, stride),
  )
  padded = np.pad(x.astype(np.float64), ((0, 0), *pads, (0, 0)))
  height, width = -(-x.shape[1] // stride), -(-x.shape[2] // stride)
  channels = x.shape[-1] if depthwise else kernel.shape[-1]
  out = np.zeros((x.shape[0], height, width, channels))
  for i in range(height):
    for j in range(width):
      for r in range(kernel.shape[0]):
        for c in range(kernel.shape[1]):
          pixel = padded[
            :, i * stride + r * dilation, j * stride + c * dilation
          ]
          if depthwise:
            out[:, i, j] += pixel * kernel[r, c, 0]
          else:
            out[:, i, j] += pixel @ kernel[r, c]
  return out


def both(module_class, x, **fields):
  """Values and gradients of the two implementations, one set of parameters."""
  results = []
  cpu = module_class(**fields, implementation="cpu")
  variables = cpu.init(jax.random.key(0), x)
  weights = normal(*cpu.apply(variables, x).shape, seed=1)
  for implementation in ("cpu", "portable"):
    module = module_class(**fields, implementation=implementation)

    def weighed(variables, x, module=module):
      y = module.apply(variables, x)
      return jnp.sum(y * weights), y

    (_, y), gradients = jax.jit(
      jax.value_and_grad(weighed, (0, 1), has_aux=True)
    )(variables, x)
    results.append((y, gradients))
  return variables, *results


GEOMETRIES = parameterized.product(
  size=((8, 8), (7, 10)), stride=(1, 2), dilation=(1, 2)
)


class ConvTest(chex.TestCase):
  @GEOMETRIES
  def test_depthwise_is_the_slow_loop_in_both(self, size, stride, dilation):
    if stride > 1 and dilation > 1:
      return
    for kernel_size in (3, 5):
      x = normal(2, *size, 3)
      variables, cpu, portable = both(
        layers.DepthwiseConv,
        x,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
      )
      kernel = np.asarray(variables["params"]["kernel"])
      assert kernel.shape == (kernel_size, kernel_size, 1, 3)
      expected = slow_conv(x, kernel, stride, dilation, depthwise=True)
      np.testing.assert_allclose(cpu[0], expected, atol=1e-5)
      chex.assert_trees_all_close(cpu, portable, atol=1e-5, rtol=1e-5)

  @GEOMETRIES
  def test_conv_is_the_slow_loop_in_both(self, size, stride, dilation):
    if stride > 1 and dilation > 1:
      return
    for kernel_size, features in ((1, 4), (3, 4), ((5, 1), 4), (3, 32)):
      x = normal(2, *size, 3)
      variables, cpu, portable = both(
        layers.Conv,
        x,
        features=features,
        kernel_size=kernel_size,
        stride=stride,
        dilation=dilation,
      )
      kernel = np.asarray(variables["params"]["kernel"])
      sides = np.broadcast_to(kernel_size, 2)
      assert kernel.shape == (*sides, 3, features)
      expected = slow_conv(x, kernel, stride, dilation, depthwise=False)
      np.testing.assert_allclose(cpu[0], expected, atol=1e-5)
      chex.assert_trees_all_close(cpu, portable, atol=1e-5, rtol=1e-5)

  @parameterized.parameters("cpu", "portable")
  def test_same_puts_the_odd_pixel_last(self, implementation):
    # Four pixels, kernel 3, stride 2: one pixel of padding, at the end.
    # 1 + 2 + 3 and 3 + 4 + 0, in both directions at once: rows are equal, so
    # the three rows count 3 times, then 2 times.
    x = np.tile(np.array([1.0, 2, 3, 4], np.float32), (4, 1))[None, :, :, None]
    module = layers.DepthwiseConv(3, 2, implementation=implementation)
    y = module.apply({"params": {"kernel": jnp.ones((3, 3, 1, 1))}}, x)
    np.testing.assert_allclose(y[0, :, :, 0], [[18, 21], [12, 14]])

  def test_a_kernel_larger_than_the_map_is_no_error(self):
    x = normal(1, 2, 2, 3)
    _, cpu, portable = both(layers.DepthwiseConv, x, kernel_size=5, dilation=2)
    chex.assert_trees_all_close(cpu, portable, atol=1e-5)

  def test_bias_is_there_only_when_asked_for_and_added(self):
    x = normal(2, 4, 4, 3)
    plain = layers.Conv(2).init(jax.random.key(0), x)["params"]
    assert set(plain) == {"kernel"}
    variables = layers.Conv(2, use_bias=True).init(jax.random.key(0), x)
    assert set(variables["params"]) == {"kernel", "bias"}
    bias = jnp.array([1.0, -2.0])
    with_bias = layers.Conv(2, use_bias=True).apply(
      {"params": {**plain, "bias": bias}}, x
    )
    without = layers.Conv(2).apply({"params": plain}, x)
    np.testing.assert_allclose(
      with_bias - without, 0 * without + bias, atol=1e-6
    )

  @parameterized.parameters("cpu", "portable")
  def test_computes_in_its_dtype_and_keeps_float32_parameters(self, name):
    x = normal(1, 4, 4, 3)
    for module in (
      layers.Conv(2, 3, dtype=jnp.bfloat16, implementation=name),
      layers.Conv(2, 1, use_bias=True, dtype=jnp.bfloat16, implementation=name),
      layers.DepthwiseConv(dtype=jnp.bfloat16, implementation=name),
    ):
      y, variables = module.init_with_output(jax.random.key(0), x)
      assert y.dtype == jnp.bfloat16
      for leaf in jax.tree.leaves(variables):
        assert leaf.dtype == jnp.float32


class PoolingTest(chex.TestCase):
  @parameterized.parameters(
    (layers.max_pool_2x, [[6.0, 8.0]]), (layers.mean_pool_2x, [[3.5, 5.5]])
  )
  def test_worked_by_hand(self, pool, expected):
    x = np.array([[1.0, 2, 3, 4], [5, 6, 7, 8]], np.float32)[None, :, :, None]
    for implementation in ("cpu", "portable"):
      y = pool(x, implementation=implementation)
      np.testing.assert_allclose(y[0, :, :, 0], expected)

  @parameterized.parameters(layers.max_pool_2x, layers.mean_pool_2x)
  def test_implementations_agree_with_their_gradients(self, pool):
    x, weights = normal(2, 6, 8, 3), normal(2, 3, 4, 3, seed=1)
    values = [
      jax.value_and_grad(
        lambda x, name=name: jnp.sum(pool(x, implementation=name) * weights)
      )(x)
      for name in ("cpu", "portable")
    ]
    chex.assert_trees_all_close(*values, rtol=1e-5, atol=1e-5)

  @parameterized.product(
    pool=(layers.max_pool_2x, layers.mean_pool_2x),
    shape=((1, 5, 4, 1), (1, 4, 5, 1)),
  )
  def test_refuses_odd_sides(self, pool, shape):
    for implementation in ("cpu", "portable"):
      with pytest.raises(ValueError, match="divisible by 2"):
        pool(jnp.zeros(shape), implementation=implementation)


class UpsampleTest(chex.TestCase):
  @parameterized.parameters("cpu", "portable")
  def test_worked_by_hand(self, implementation):
    # Half-pixel centres: a new pixel lies a quarter of the way between two
    # old ones, and the outer ones repeat the edge.
    x = np.array([[0.0, 4.0], [8.0, 12.0]], np.float32)[None, :, :, None]
    y = layers.upsample_2x(x, implementation=implementation)
    expected = np.add.outer([0.0, 2, 6, 8], [0.0, 1, 3, 4])
    np.testing.assert_allclose(y[0, :, :, 0], expected, atol=1e-6)

  @parameterized.parameters((1, 1), (3, 5), (4, 4))
  def test_implementations_agree_with_their_gradients(self, height, width):
    x = normal(2, height, width, 3)
    weights = normal(2, 2 * height, 2 * width, 3, seed=1)
    values = [
      jax.value_and_grad(
        lambda x, name=name: jnp.sum(
          layers.upsample_2x(x, implementation=name) * weights
        )
      )(x)
      for name in ("cpu", "portable")
    ]
    chex.assert_trees_all_close(*values, rtol=1e-5, atol=1e-5)

  def test_a_power_of_two_is_that_many_doublings(self):
    x = normal(1, 3, 4, 2)
    np.testing.assert_array_equal(layers.upsample(x, 1), x)
    twice = layers.upsample_2x(layers.upsample_2x(x))
    np.testing.assert_allclose(layers.upsample(x, 4), twice, atol=1e-6)

  @parameterized.parameters(0, 3, -2, 6)
  def test_refuses_other_factors(self, factor):
    with pytest.raises(ValueError, match="power of two"):
      layers.upsample(jnp.zeros((1, 2, 2, 1)), factor)

  def test_an_exporter_meets_one_call_by_name_and_doubling(self):
    jaxpr = jax.make_jaxpr(lambda x: layers.upsample(x, 4))(
      jnp.zeros((1, 2, 2, 1))
    )
    names = [equation.params.get("name") for equation in jaxpr.eqns]
    assert names == ["upsample_2x", "upsample_2x"]

  def test_resize_takes_any_size_and_keeps_its_own(self):
    x = normal(2, 6, 4, 3)
    np.testing.assert_array_equal(layers.resize_bilinear(x, 6, 4), x)
    up = layers.resize_bilinear(x, 12, 8)
    np.testing.assert_allclose(up, layers.upsample_2x(x), atol=1e-5)
    # Three from six: each lies between two of them.
    down = layers.resize_bilinear(x, 3, 4)
    np.testing.assert_allclose(down, (x[:, ::2] + x[:, 1::2]) / 2, atol=1e-6)


class DepthTest(chex.TestCase):
  def test_channels_are_ordered_by_row_column_and_channel(self):
    x = np.arange(1 * 4 * 6 * 2).reshape(1, 4, 6, 2)
    y = layers.space_to_depth(jnp.asarray(x), 2)
    assert y.shape == (1, 2, 3, 8)
    for i in range(2):
      for j in range(3):
        square = x[0, 2 * i : 2 * i + 2, 2 * j : 2 * j + 2]
        np.testing.assert_array_equal(y[0, i, j], square.reshape(-1))

  def test_one_undoes_the_other(self):
    x = normal(2, 8, 12, 3)
    deep = layers.space_to_depth(jnp.asarray(x), 4)
    np.testing.assert_array_equal(layers.depth_to_space(deep, 4), x)

  def test_refuse_what_does_not_divide(self):
    with pytest.raises(ValueError, match="divisible by 4"):
      layers.space_to_depth(jnp.zeros((1, 8, 6, 3)), 4)
    with pytest.raises(ValueError, match="divisible by 4"):
      layers.space_to_depth(jnp.zeros((1, 6, 8, 3)), 4)
    with pytest.raises(ValueError, match="divisible by 16"):
      layers.depth_to_space(jnp.zeros((1, 2, 2, 17)), 4)


class BlockTest(chex.TestCase):
  def test_conv_block_normalises_over_the_batch_then_activates(self):
    x = 3 + normal(4, 8, 8, 3)
    block = layers.ConvBlock(5, layers.batch_norm(True), activation=lambda x: x)
    variables = block.init(jax.random.key(0), x)
    assert set(variables["params"]) == {"conv", "norm"}
    assert set(variables["params"]["conv"]) == {"kernel"}
    y, _ = block.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-4)
    np.testing.assert_allclose(y.std((0, 1, 2)), 1, atol=1e-2)
    block = layers.ConvBlock(5, layers.batch_norm(True))
    relu, _ = block.apply(variables, x, mutable=["batch_stats"])
    np.testing.assert_allclose(relu, np.maximum(y, 0), atol=1e-6)

  def test_batch_norm_shares_its_statistics_over_the_axis(self):
    x = normal(4, 2, 3, 3, 5) * np.arange(1, 5)[:, None, None, None, None]
    norm = layers.batch_norm(True)()
    variables = norm.init(jax.random.key(0), x[0])
    whole, whole_stats = norm.apply(
      variables, x.reshape(8, 3, 3, 5), mutable=["batch_stats"]
    )
    shared = layers.batch_norm(True, axis_name="devices")()
    parts, stats = jax.pmap(
      lambda x: shared.apply(variables, x, mutable=["batch_stats"]),
      axis_name="devices",
    )(x)
    np.testing.assert_allclose(parts.reshape(whole.shape), whole, atol=1e-4)
    for device in range(4):
      chex.assert_trees_all_close(
        jax.tree.map(lambda x, d=device: x[d], stats), whole_stats, atol=1e-4
      )

  def test_batch_norms_agree_with_their_gradients_and_statistics(self):
    x = 2.0 + 3.0 * normal(4, 2, 3, 3, 5)
    weights = normal(4, 2, 3, 3, 5, seed=1)
    scale, bias = normal(5, seed=2), normal(5, seed=3)

    def values(implementation, axis_name, x, weights):
      norm = layers.batch_norm(
        True, axis_name=axis_name, implementation=implementation
      )()
      variables = norm.init(jax.random.key(0), x)

      def weighed(x, scale, bias):
        y, updated = norm.apply(
          {**variables, "params": {"scale": scale, "bias": bias}},
          x,
          mutable=["batch_stats"],
        )
        return jnp.sum(weights * y), (y, updated)

      return jax.grad(weighed, (0, 1, 2), has_aux=True)(x, scale, bias)

    for axis_name, run in (
      (None, jax.jit),
      ("devices", functools.partial(jax.pmap, axis_name="devices")),
    ):
      cpu, portable = (
        run(functools.partial(values, name, axis_name))(x, weights)
        for name in ("cpu", "portable")
      )
      chex.assert_trees_all_close(cpu, portable, rtol=1e-4, atol=1e-5)

  def test_batch_norm_uses_what_it_learned_outside_training(self):
    x = normal(2, 3, 3, 5)
    norm = layers.batch_norm(False)()
    variables = norm.init(jax.random.key(0), x)
    np.testing.assert_allclose(
      norm.apply(variables, x), x / np.sqrt(1 + 1e-3), rtol=1e-5
    )

  def test_whole_image_adds_one_projected_mean_an_image(self):
    x = normal(2, 4, 4, 3)
    kernel, bias = normal(3, 3, seed=1), normal(3, seed=2)
    y = layers.WholeImage().apply(
      {"params": {"project": {"kernel": kernel[None, None], "bias": bias}}}, x
    )
    added = x.mean((1, 2)) @ kernel + bias
    np.testing.assert_allclose(y, x + added[:, None, None], atol=1e-5)

  def test_pixel_head_corrects_the_upsampled_logit_pixel_by_pixel(self):
    x = normal(2, 3, 3, 5)
    head = layers.PixelHead(4)
    params = head.init(jax.random.key(0), x)["params"]
    y = head.apply({"params": params}, x)
    chex.assert_shape(y, (2, 12, 12))
    cell = x @ np.asarray(params["cell"]["kernel"])[0, 0]
    upsampled = layers.upsample(jnp.asarray(cell), 4)[..., 0]
    pixels = x @ np.asarray(params["pixels"]["kernel"])[0, 0]
    for i in range(12):
      for j in range(12):
        own = pixels[:, i // 4, j // 4, 4 * (i % 4) + j % 4]
        np.testing.assert_allclose(
          y[:, i, j], upsampled[:, i, j] + own, atol=1e-4
        )

  def test_pixel_head_is_float32_whatever_it_computes_in(self):
    y, _ = layers.PixelHead(2, dtype=jnp.bfloat16).init_with_output(
      jax.random.key(0), jnp.zeros((1, 2, 2, 3), jnp.bfloat16)
    )
    assert y.dtype == jnp.float32

  def test_normalize_maps_grey_to_zero(self):
    image = jnp.array([0.0, 0.5, 1.0], jnp.bfloat16)
    np.testing.assert_array_equal(layers.normalize(image), [-2, 0, 2])
    assert layers.normalize(image).dtype == jnp.float32


class ImplementationTest(chex.TestCase):
  def test_the_backend_chooses_where_nobody_does(self):
    assert jax.default_backend() == "cpu"
    assert layers.implementation_for_backend() == "cpu"
    assert layers.implementation_for_backend("portable") == "portable"

  def test_another_name_is_an_error(self):
    with pytest.raises(ValueError, match="gpu"):
      layers.implementation_for_backend("gpu")

  @parameterized.parameters(
    ("cpu", 3, 32, 1), ("cpu", 3, 16, 2), ("cpu", 8, 32, 2),
    ("portable", 3, 32, 2),
  )  # fmt: skip
  def test_cpu_gradient_from_few_channels_to_many_is_a_product(
    self, implementation, channels, features, convolutions
  ):
    x = normal(1, 8, 8, channels)
    module = layers.Conv(features, implementation=implementation)
    variables = module.init(jax.random.key(0), x)
    gradient = jax.grad(lambda v: jnp.sum(module.apply(v, x) ** 2))
    text = jax.jit(gradient).lower(variables).as_text()
    assert text.count("stablehlo.convolution") == convolutions
    assert text.count("stablehlo.dot_general") == 2 - convolutions

  def test_cpu_depthwise_has_no_grouped_convolution(self):
    x = jnp.zeros((1, 4, 4, 2))
    for name, expected in (("cpu", False), ("portable", True)):
      module = layers.DepthwiseConv(implementation=name)
      variables = module.init(jax.random.key(0), x)
      jaxpr = str(jax.make_jaxpr(module.apply)(variables, x))
      assert ("conv_general_dilated" in jaxpr) == expected
