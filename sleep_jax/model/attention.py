"""Attention inside a window: what sleep evicts."""

import dataclasses
import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu import splash_attention

from pallas_kernels.target import target
from sleep_jax.array_types import Hidden
from sleep_jax.config import PORTABLE, ModelConfig
from sleep_jax.model import layers
from sleep_jax.model.places import EMPTY, KeyValueCache, Places
from sleep_jax.parallel import sharding

# From this many tokens on a library's kernel serves, in tiles of as many.
KERNEL_LENGTH = 512
LANES = 128
# What the kernels cut, forward and backward.
_BLOCKS = (
  *("block_q", "block_kv", "block_kv_compute"),
  *("block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute"),
  *("block_q_dq", "block_kv_dq"),
)


class Attention(nn.Module):
  """Causal attention in a window, rotary positions, grouped-query heads.

  With `sliding` a token sees at most `model.sliding_window` tokens of it. With
  `qk_norm` an RMSNorm over the width of all heads is on queries and on keys.

  Paper, equation (2). Without a cache, keys and values live for this call
  alone: a later window sees nothing of them. With one, the call's tokens see
  what it holds as far as `places` lets them, and go into it.
  """

  config: ModelConfig
  sliding: bool = False
  qk_norm: bool = False

  @nn.compact
  def __call__(
    self, x: Hidden, state: None, cache: KeyValueCache | None, places: Places
  ) -> tuple[Hidden, None, KeyValueCache | None]:
    config = self.config
    head_dim = config.width // config.attention_heads

    def heads(name, count):
      bias = config.attention_bias
      y = layers.dense(config, count * head_dim, f"{name}_proj", use_bias=bias)(
        x
      )
      if self.qk_norm and name != "v":
        y = layers.norm(config, f"{name}_norm")(y)
      return y.reshape(*x.shape[:2], count, head_dim)

    def turned(x, position):
      if not config.rope_theta:
        return x
      return layers.rotary(x, position, config.rope_theta)

    q = turned(heads("q", config.attention_heads), places.position)
    unturned = heads("k", config.key_value_heads)
    k = turned(unturned, places.position)
    v = heads("v", config.key_value_heads)
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
    near = places
    if self.sliding:
      length = min(places.window_length, config.sliding_window)
      near = dataclasses.replace(places, window_length=length)
    portable = config.implementation in PORTABLE
    y = attend(q, seen, near, portable).reshape(*x.shape[:2], config.width)
    if cache is not None and places.replaces_cache:
      after = places.position - places.window_length
      cache = KeyValueCache(turned(unturned, after), v)
    return layers.dense(config, config.width, "o_proj")(y), state, cache


def attend(q, seen: KeyValueCache, places: Places, portable: bool = False):
  """softmax(q k^T / sqrt(d)) v [B, T, H, d] over what `places` lets q see.

  k and v stand at `places.seen_positions`. For a long window in bfloat16 the
  `target` may have a library's kernel, which does not hold the weights in
  memory: splash attention on a TPU, cuDNN's on a GPU. What a padded place gets
  is finite, and else undefined.
  """
  length, head_dim = q.shape[1], q.shape[3]
  platform, _, here = target()
  if not portable and q.dtype == jnp.bfloat16 and length >= KERNEL_LENGTH:
    # Those of one window, in their order.
    if platform == "tpu" and places.slots is None and head_dim % LANES == 0:
      kernel = functools.partial(
        splash, window_length=places.window_length, block=KERNEL_LENGTH
      )
      valid = jnp.broadcast_to(places.valid, q.shape[:2])
      return sharding.over_heads(
        kernel,
        (*[sharding.TOKENS] * 3, *[sharding.BY_ROW] * 2),
        sharding.TOKENS,
      )(q, *seen, valid, places.seen_positions > EMPTY)
    # What cuDNN serves is found out from the GPU itself.
    if platform == "gpu" and here and head_dim <= 128 and head_dim % 8 == 0:
      return sharding.over_heads(
        cudnn, (*[sharding.TOKENS] * 3, sharding.BY_ROW), sharding.TOKENS
      )(q, *seen, _near(places))
  return plain(q, *seen, _near(places))


def _near(places: Places):
  """Which keys a token may see [B, T, S]."""
  distance = places.position[:, :, None] - places.seen_positions[:, None]
  return (distance >= 0) & (distance < places.window_length)


def plain(q, k, v, near):
  """`attend` in plain JAX.

  The softmax is in the promotion of float32 and q's dtype; that of
  `jax.nn.dot_product_attention` is in float32 even for float64.
  """
  batch, length, _, head_dim = q.shape
  key_value_heads = k.shape[2]
  q = q.reshape(batch, length, key_value_heads, -1, head_dim)
  dtype = jnp.promote_types(q.dtype, jnp.float32)
  logits = jnp.einsum("BTGRd,BSGd->BGRTS", q, k, preferred_element_type=dtype)
  weights = jax.nn.softmax(
    jnp.where(near[:, None, None], head_dim**-0.5 * logits, -1e30), axis=-1
  )
  y = jnp.einsum("BGRTS,BSGd->BTGRd", weights.astype(v.dtype), v)
  return y.reshape(batch, length, -1, head_dim)


def cudnn(q, k, v, near):
  """`attend` by cuDNN's kernel, through JAX."""
  return jax.nn.dot_product_attention(
    q, k, v, mask=near[:, None], implementation="cudnn"
  )


def splash(
  q, k, v, valid, seen, window_length: int, block: int, interpret: bool = False
):
  """`attend` by JAX's Pallas kernel for TPUs, for the tokens of one window.

  Args:
    q: [B, T, H, d].
    k, v: of the S - T tokens kept from before the window, and of its own
      [B, S, heads, d].
    valid: False where q is padding [B, T].
    seen: False where k is padding, or nothing was kept [B, S].
    window_length: L.
    block: tokens of a tile, to whose multiples T and S are padded.
    interpret: on a CPU.
  """
  (_, length, heads, head_dim), kept = q.shape, k.shape[1] - q.shape[1]

  def tiled(x):
    missing = -x.shape[1] % block
    return jnp.pad(x, ((0, 0), (0, missing), *[(0, 0)] * (x.ndim - 2)))

  q, k, v, valid, seen = map(tiled, (head_dim**-0.5 * q, k, v, valid, seen))
  mask = splash_attention.LocalMask(
    (q.shape[1], k.shape[1]), (window_length - 1, 0), offset=kept
  )
  blocks: Any = dict.fromkeys(_BLOCKS, block)
  kernel = splash_attention.make_splash_mha(
    splash_attention.MultiHeadMask([mask] * heads),
    block_sizes=splash_attention.BlockSizes(**blocks),
    head_shards=1,
    q_seq_shards=1,
    interpret=interpret,
  )
  # Padding sees padding alone, and is not seen.
  segments = splash_attention.SegmentIds(
    valid.astype(jnp.int32), seen.astype(jnp.int32)
  )
  by_head = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
  y: Any = jax.vmap(kernel)(*by_head, segments)
  return jnp.swapaxes(y, 1, 2)[:, :length]
