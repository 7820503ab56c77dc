"""Attention inside a window: what sleep evicts."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from sleep_jax.array_types import Hidden
from sleep_jax.config import ModelConfig
from sleep_jax.model import layers
from sleep_jax.model.places import KeyValueCache, Places


class Attention(nn.Module):
  """Causal attention in a window, rotary positions, grouped-query heads.

  Paper, equation (2). Without a cache, keys and values live for this call
  alone: a later window sees nothing of them. With one, the call's tokens see
  what it holds as far as `places` lets them, and go into it.
  """

  config: ModelConfig

  @nn.compact
  def __call__(
    self, x: Hidden, state: None, cache: KeyValueCache | None, places: Places
  ) -> tuple[Hidden, None, KeyValueCache | None]:
    config = self.config
    head_dim = config.width // config.attention_heads

    def heads(name, count):
      y = layers.dense(config, count * head_dim, name)(x)
      return y.reshape(*x.shape[:2], count, head_dim)

    def turned(x, position):
      return layers.rotary(x, position, config.rope_theta)

    q = turned(heads("q_proj", config.attention_heads), places.position)
    unturned = heads("k_proj", config.key_value_heads)
    k = turned(unturned, places.position)
    v = heads("v_proj", config.key_value_heads)
    own = KeyValueCache(k, v)
    if cache is None:
      seen = own
    elif places.slots is not None:
      row = jnp.arange(x.shape[0])[:, None]
      seen = cache = jax.tree.map(
        lambda x, y: x.at[row, places.slots].set(y, mode="drop"), cache, own
      )
    else:
      seen = jax.tree.map(
        lambda x, y: jnp.concatenate([x, y], axis=1), cache, own
      )
    y = attend(q, seen, places).reshape(*x.shape[:2], config.width)
    if cache is not None and places.replaces_cache:
      after = places.position - places.window_length
      cache = KeyValueCache(turned(unturned, after), v)
    return layers.dense(config, config.width, "o_proj")(y), state, cache


def attend(q, seen: KeyValueCache, places: Places):
  """softmax(q k^T / sqrt(d)) v [B, T, H, d] over what `places` lets q see.

  k and v stand at `places.seen_positions`. The softmax is in the promotion of
  float32 and q's dtype; that of `jax.nn.dot_product_attention` is in float32
  even for float64.
  """
  k, v = seen
  batch, length, _, head_dim = q.shape
  key_value_heads = k.shape[2]
  q = q.reshape(batch, length, key_value_heads, -1, head_dim)
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum("BTGRd,BSGd->BGRTS", q, k, preferred_element_type=dtype)
  distance = places.position[:, :, None] - places.seen_positions[:, None]
  near = (distance >= 0) & (distance < places.window_length)
  weights = jax.nn.softmax(
    jnp.where(near[:, None, None], head_dim**-0.5 * logits, -1e30), axis=-1
  )
  y = jnp.einsum("BGRTS,BSGd->BTGRd", weights.astype(v.dtype), v)
  return y.reshape(batch, length, -1, head_dim)
