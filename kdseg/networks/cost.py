"""Multiply-accumulate operations of a network, counted in its program."""

from collections.abc import Callable
import math
from typing import Any

from flax import linen as nn
import jax
import jax.numpy as jnp

from kdseg.networks import layers

# Names of the functions that resize, this project's and `jax.image`'s. On some
# backends, and in some versions, they multiply with a matrix of weights.
_RESIZING = ("upsample_2x", "resize_bilinear", "_resize")


def count_macs(network: nn.Module, *, size: int) -> int:
  """Counts the multiply-accumulates of one forward pass of one image.

  Convolutions and matrix products count; norms, activations, pooling and
  resizing do not, as is usual, except PSPNet's pooling into cells of uneven
  size, which is a matrix product. FLOPs are twice as many.

  Args:
    network: called as `network(image, train=False)`.
    size: side of the image in pixels.

  Returns:
    The count, the same on every backend.
  """
  shifted = 0

  def watch(
    call: Callable[..., Any],
    arguments: tuple[Any, ...],
    keywords: dict[str, Any],
    context: nn.module.InterceptorContext,
  ) -> Any:
    nonlocal shifted
    out = call(*arguments, **keywords)
    module = context.module
    # On a CPU the program has shifts and elementwise products for this layer.
    if isinstance(module, layers.DepthwiseConv) and (
      layers.implementation_for_backend(module.implementation) == "cpu"
    ):
      shifted += out.size * module.kernel_size**2
    return out

  image = jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32)
  variables = jax.eval_shape(network.init, jax.random.key(0), image)

  def forward(variables: Any, image: jax.Array) -> Any:
    with nn.intercept_methods(watch):
      out: Any = network.apply(variables, image, train=False)
    return out["logits"]

  program = jax.make_jaxpr(forward)(variables, image)
  return _count(program.jaxpr) + shifted


def _count(jaxpr: Any, resizing: bool = False) -> int:
  total = 0
  for equation in jaxpr.eqns:
    within = resizing or equation.params.get("name") in _RESIZING
    for value in equation.params.values():
      for inner in value if isinstance(value, tuple | list) else (value,):
        inner = getattr(inner, "jaxpr", inner)
        if hasattr(inner, "eqns"):
          total += _count(inner, within)
    name = equation.primitive.name
    if name == "dot_general" and not resizing:
      (contracted, _), _ = equation.params["dimension_numbers"]
      left = equation.invars[0].aval.shape
      total += equation.outvars[0].aval.size * math.prod(
        left[axis] for axis in contracted
      )
    elif name == "conv_general_dilated":
      numbers = equation.params["dimension_numbers"]
      kernel = equation.invars[1].aval
      # Per output: the kernel's size without its output channels, which are
      # counted in the output; the input channels of a kernel are a group's.
      per_output = kernel.size // kernel.shape[numbers.rhs_spec[0]]
      total += equation.outvars[0].aval.size * per_output
  return total
