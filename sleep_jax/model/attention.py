"""Attention inside a window: what sleep evicts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sleep_jax.array_types import Hidden, Mask
from sleep_jax.config import ModelConfig
from sleep_jax.model import layers


class Attention(nn.Module):
  """Causal attention over one window, rotary positions, grouped-query heads.

  Paper, equation (2). Keys and values live for this call alone: a later
  window sees nothing of them (hard eviction). Padding is never attended to.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Hidden, state: None, valid: Mask
  ) -> tuple[Hidden, None]:
    config = self.config
    head_dim = config.width // config.attention_heads

    def heads(name, count):
      y = layers.dense(config, count * head_dim, name)(x)
      return y.reshape(*x.shape[:2], count, head_dim)

    q = layers.rotary(
      heads("q_proj", config.attention_heads), config.rope_theta
    )
    k = layers.rotary(
      heads("k_proj", config.key_value_heads), config.rope_theta
    )
    v = heads("v_proj", config.key_value_heads)
    y = causal_attention(q, k, v, valid).reshape(*x.shape[:2], config.width)
    return layers.dense(config, config.width, "o_proj")(y), state


def causal_attention(q, k, v, valid: Mask):
  """softmax(q k^T / sqrt(d)) v [B, T, H, d] over valid places up to one's own.

  The softmax is in the promotion of float32 and q's dtype; that of
  `jax.nn.dot_product_attention` is in float32 even for float64.
  """
  batch, length, _, head_dim = q.shape
  key_value_heads = k.shape[2]
  q = q.reshape(batch, length, key_value_heads, -1, head_dim)
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum("BTGRd,BSGd->BGRTS", q, k, preferred_element_type=dtype)
  causal = jnp.tril(jnp.ones((length, length), bool))
  seen = causal[None] & valid[:, None, :]
  weights = jax.nn.softmax(
    jnp.where(seen[:, None, None], head_dim**-0.5 * logits, -1e30), axis=-1
  )
  y = jnp.einsum("BGRTS,BSGd->BTGRd", weights.astype(v.dtype), v)
  return y.reshape(batch, length, -1, head_dim)
