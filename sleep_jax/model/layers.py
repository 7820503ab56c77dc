"""Layers that every block shares."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sleep_jax.array_types import Hidden, Mask
from sleep_jax.config import ModelConfig


def dtypes(config: ModelConfig):
  """(compute dtype, parameter dtype) of a `ModelConfig`."""
  compute = jnp.dtype(config.compute_dtype)
  return compute, jnp.promote_types(compute, jnp.float32)


@jax.custom_vjp
def _product(x, kernel):
  return jnp.matmul(x, kernel)


def _product_forward(x, kernel):
  return _product(x, kernel), (x, kernel)


def _product_backward(residuals, dy):
  """The kernel's gradient as x^T dy, which autodiff writes as (dy^T x)^T.

  For that XLA makes a transposed copy of dy on a CPU: a tenth of a step.
  """
  x, kernel = residuals
  tokens = x.reshape(-1, x.shape[-1])
  return jnp.matmul(dy, kernel.T), tokens.T @ dy.reshape(-1, dy.shape[-1])


_product.defvjp(_product_forward, _product_backward)


def dense(
  config: ModelConfig,
  features: int,
  name: str,
  use_bias: bool = False,
  **options: Any,
):
  """A linear layer in the config's dtypes, without bias unless asked for."""
  compute, parameters = dtypes(config)
  return nn.Dense(
    features,
    use_bias=use_bias,
    **options,
    dtype=compute,
    param_dtype=parameters,
    dot_general=lambda x, kernel, *_, **__: _product(x, kernel),
    name=name,
  )


def norm(config: ModelConfig, name: str | None = None):
  """RMSNorm with a learned scale."""
  compute, parameters = dtypes(config)
  return nn.RMSNorm(
    epsilon=config.norm_eps, dtype=compute, param_dtype=parameters, name=name
  )


def rotary(x, position, theta):
  """x [B, T, H, d] turned by `position` [B or 1, T]: rotate-half."""
  half = x.shape[-1] // 2
  # bfloat16 has no integers between 256 and 258.
  dtype = jnp.promote_types(x.dtype, jnp.float32)
  frequencies = theta ** (-jnp.arange(half, dtype=dtype) / half)
  angles = position.astype(dtype)[..., None, None] * frequencies.reshape(
    1, 1, 1, half
  )
  cos, sin = jnp.cos(angles).astype(x.dtype), jnp.sin(angles).astype(x.dtype)
  first, second = jnp.split(x, 2, axis=-1)
  return jnp.concatenate(
    [first * cos - second * sin, second * cos + first * sin], axis=-1
  )


class ShortConvolution(nn.Module):
  """Causal depthwise convolution, then SiLU.

  The kernel is [taps, channels]; its last tap meets the current token. What
  stands before the first token and what is kept for the next call: `shifts`.
  """

  taps: int
  param_dtype: jnp.dtype

  @nn.compact
  def __call__(self, x: Hidden, history, valid: Mask):
    kernel = self.param(
      "kernel",
      # Each channel sums its own taps: they are the fan-in.
      nn.initializers.variance_scaling(1.0, "fan_in", "normal", 0, 1),
      (self.taps, x.shape[-1]),
      self.param_dtype,
    ).astype(x.dtype)
    shifted, history = shifts(x, history, valid, self.taps)
    y = sum(kernel[tap][None, None] * shifted[tap] for tap in range(self.taps))
    return jax.nn.silu(y), history


class DynamicConvolution(nn.Module):
  """Causal depthwise convolution with taps made for each token, then SiLU.

  kernel_t = W2 silu(W1 x_t) + b2, of the *output's* token; its last tap meets
  the current token. History as in `ShortConvolution`.

  With W1 and W2 both at zero neither would ever have a gradient. Here W2 alone
  starts there, and b2 as the taps of a `ShortConvolution`: the layer starts as
  one, and learns to depart from it.
  """

  config: ModelConfig

  @nn.compact
  def __call__(self, u, x: Hidden, history, valid: Mask):
    """(convolved u [B, T, channels], history after it); x makes the taps."""
    config, channels = self.config, u.shape[-1]
    taps = config.convolution_size
    hidden = dense(config, channels // config.generator_reduction, "w1_proj")(x)
    kernel = dense(
      config,
      channels * taps,
      "w2_proj",
      use_bias=True,
      kernel_init=nn.initializers.zeros,
      bias_init=nn.initializers.normal(taps**-0.5),
    )(jax.nn.silu(hidden)).reshape(*u.shape, taps)
    shifted, history = shifts(u, history, valid, taps)
    y = sum(kernel[..., tap] * shifted[tap] for tap in range(taps))
    return jax.nn.silu(y), history


def shifts(x: Hidden, history, valid: Mask, taps: int):
  """(x moved back by taps - 1, ..., 1, 0 tokens; history after it).

  Before the first token stands `history` [B, taps - 1, channels], or zeros;
  the one after it ends with the last valid token.
  """
  length = x.shape[1]
  before = taps - 1
  if history is None:
    padded = jnp.pad(x, ((0, 0), (before, 0), (0, 0)))
  else:
    padded = jnp.concatenate([history, x], axis=1)
    after = jnp.max(valid * jnp.arange(1, length + 1)[None], axis=1)
    index = after[:, None, None] + jnp.arange(before)[None, :, None]
    history = jnp.take_along_axis(padded, index, axis=1)
  return [padded[:, tap : tap + length] for tap in range(taps)], history


class SwiGLU(nn.Module):
  """down(silu(gate(x)) * up(x))."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x: Hidden) -> Hidden:
    gate = dense(self.config, self.config.mlp_width, "gate_proj")(x)
    up = dense(self.config, self.config.mlp_width, "up_proj")(x)
    return dense(self.config, self.config.width, "down_proj")(
      jax.nn.silu(gate) * up
    )


def clear_padding(x, valid: Mask):
  """x [B, T, ...] with zeros in the places that are padding."""
  valid = jnp.expand_dims(valid, tuple(range(2, x.ndim)))
  return jnp.where(valid, x, jnp.zeros((), x.dtype))
