"""Fast weights: the layer whose state S survives eviction."""

import functools
import math
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from sleep_jax.array_types import FastWeights, Hidden
from sleep_jax.config import ATTENTION, ModelConfig
from sleep_jax.model import layers
from sleep_jax.model.places import Places
from sleep_jax.model.update_rules import UPDATE_RULES
from sleep_jax.parallel import sharding

# Of the l2 norm of q and k, and of the gated norm of the output (fla's
# layer defaults; these are not the model's norm_eps).
KEY_NORM_EPS = 1e-6
OUTPUT_NORM_EPS = 1e-5


def init_fast_weights(config: ModelConfig, batch_size: int):
  """The start state of `HybridLM`: zeros (paper, Algorithm 1, line 1).

  A tuple over the pattern's groups of tuples over a group's blocks: None for
  attention, [R, B, H, K, V] for fast weights, in the parameters' dtype. With
  `model.loops` the first axis is as in `places.init_cache`.
  """
  _, dtype = layers.dtypes(config)

  def state(kind, repeats):
    if kind in ATTENTION:
      return None
    shape = (config.fast_weight_heads, config.key_dim, config.value_dim)
    return jnp.zeros((config.loops * repeats, batch_size, *shape), dtype)

  return tuple(
    tuple(state(kind, repeats) for kind in kinds)
    for kinds, repeats in config.pattern
  )


def l2_normalise(x):
  """x / sqrt(sum x^2 + eps) over the last axis, summed in float32 at least."""
  high = x.astype(jnp.promote_types(x.dtype, jnp.float32))
  square = jnp.sum(jnp.square(high), axis=-1, keepdims=True)
  return (high * jax.lax.rsqrt(square + KEY_NORM_EPS)).astype(x.dtype)


def init_decay_rate(key, shape, dtype):
  """A_log = log A with A uniform in (0, 16)."""
  return jnp.log(jax.random.uniform(key, shape, dtype, 1e-6, 16.0))


def init_time_step(key, shape, dtype):
  """The inverse softplus of dt, log-uniform in (1e-3, 1e-1)."""
  low, high = jnp.log(1e-3), jnp.log(1e-1)
  dt = jnp.exp(jax.random.uniform(key, shape, dtype, low, high))
  return dt + jnp.log(-jnp.expm1(-dt))


class GatedDeltaNet(nn.Module):
  """Gated DeltaNet: short convolutions, delta rule, gated norm.

  S <- a S (I - b k k^T) + b v k^T with a, b, k, v computed from x (paper,
  section 3), or another of the `UPDATE_RULES` in the same layer; what a rule
  has no use for has no parameters. A padded place writes nothing and decays
  nothing.
  """

  config: ModelConfig
  # Start values of the last projection.
  output_init: Callable = nn.initializers.lecun_normal()

  @nn.compact
  def __call__(
    self, x: Hidden, state: FastWeights, history, places: Places
  ) -> tuple[Hidden, FastWeights, Any]:
    config, valid = self.config, places.valid
    heads, batch_and_length = config.fast_weight_heads, x.shape[:2]
    compute, parameters = layers.dtypes(config)

    projected = [
      layers.dense(config, heads * dim, f"{name}_proj")(x)
      for name, dim in (
        ("q", config.key_dim),
        ("k", config.key_dim),
        ("v", config.value_dim),
      )
    ]
    mixed, history = self._convolve(x, projected, history, valid)
    q, k, v = (y.reshape(*batch_and_length, heads, -1) for y in mixed)
    q, k = l2_normalise(q), l2_normalise(k)
    rate = jax.nn.sigmoid(layers.dense(config, heads, "b_proj")(x))
    beta = config.beta_range * rate
    rule = UPDATE_RULES[config.update_rule]
    g = self._log_decay(x, rule.decay)
    rule = sharding.over_heads(
      functools.partial(rule, implementation=config.implementation or None),
      (*[sharding.TOKENS] * 5, sharding.STATE),
      (sharding.TOKENS, sharding.STATE),
    )
    o, state = rule(
      q,
      k,
      v,
      layers.clear_padding(g, valid),
      layers.clear_padding(beta.astype(parameters), valid),
      state,
    )
    gate = layers.dense(config, heads * config.value_dim, "g_proj")(x)
    o = nn.RMSNorm(
      epsilon=OUTPUT_NORM_EPS,
      dtype=compute,
      param_dtype=parameters,
      name="o_norm",
    )(o)
    o = o.reshape(gate.shape) * jax.nn.silu(gate)
    project = layers.dense(
      config, config.width, "o_proj", kernel_init=self.output_init
    )
    return project(o), state, history

  def _convolve(self, x: Hidden, projected, history, valid) -> Any:
    """((q, k, v), history): one convolution over q | k | v."""
    _, parameters = layers.dtypes(self.config)
    width = projected[0].shape[-1]
    mixed, history = layers.ShortConvolution(
      self.config.convolution_size, parameters, name="qkv_conv"
    )(
      layers.clear_padding(jnp.concatenate(projected, -1), valid),
      history,
      valid,
    )
    return jnp.split(mixed, [width, 2 * width], axis=-1), history

  def _log_decay(self, x: Hidden, kind: str):
    """g = -exp(A_log) softplus(a_proj x + dt_bias), as an `UpdateRule` asks."""
    config = self.config
    heads, batch_and_length = config.fast_weight_heads, x.shape[:2]
    _, parameters = layers.dtypes(config)
    if kind == "none":
      return jnp.zeros((*batch_and_length, heads), parameters)
    channels = (config.key_dim,) if kind == "channel" else ()
    features = (heads, *channels)
    decay_rate = self.param("A_log", init_decay_rate, (heads,), parameters)
    time_bias = self.param("dt_bias", init_time_step, features, parameters)
    time_step = jnp.zeros((*batch_and_length, *features), parameters)
    if kind != "fixed":
      projected = layers.dense(config, math.prod(features), "a_proj")(x)
      time_step = projected.reshape(time_step.shape).astype(parameters)
    rate = jnp.exp(decay_rate).reshape(1, 1, heads, *(1 for _ in channels))
    return -rate * jax.nn.softplus(time_step + time_bias[None, None])


class JetLayer(GatedDeltaNet):
  """Jet-Nemotron's: a dynamic convolution on v, none on q and k."""

  def _convolve(self, x: Hidden, projected, history, valid) -> Any:
    """((q, k, v), history): SiLU of q and k, taps for v made from x."""
    q, k, v = projected
    v, history = layers.DynamicConvolution(self.config, name="v_conv")(
      layers.clear_padding(v, valid), x, history, valid
    )
    return (jax.nn.silu(q), jax.nn.silu(k), v), history
