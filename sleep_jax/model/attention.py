"""Attention inside a window: what sleep evicts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sleep_jax.array_types import Hidden, Mask
from sleep_jax.model import layers


class Attention(nn.Module):
  """Causal attention over one window, rotary positions, grouped-query heads.

  Paper, equation (2). Keys and values live for this call alone: a later
  window sees nothing of them (hard eviction). Padding is never attended to.
  """

  config: object

  @nn.compact
  def __call__(
    self, x: Hidden, state: None, valid: Mask
  ) -> tuple[Hidden, None]:
    config = self.config
    head_dim = config.width // config.attention_heads

    def heads(name, count):
      y = layers.dense(config, count * head_dim, name)(x)
      return y.reshape(*x.shape[:2], count, head_dim)

    q = layers.rotary(heads("q_proj", config.attention_heads), config.rope_theta)
    k = layers.rotary(heads("k_proj", config.key_value_heads), config.rope_theta)
    v = heads("v_proj", config.key_value_heads)
    y = jax.nn.dot_product_attention(
      q, k, v, mask=valid[:, None, None, :], is_causal=True
    )
    y = y.reshape(*x.shape[:2], config.width)
    return layers.dense(config, config.width, "o_proj")(y), state
