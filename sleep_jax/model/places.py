"""Where tokens stand in their window, and what is kept of earlier ones."""

from typing import Any, NamedTuple

import flax.struct
import jax.numpy as jnp

from sleep_jax.array_types import Mask, Positions, Slots
from sleep_jax.config import ATTENTION, ModelConfig
from sleep_jax.model import layers

# The position of a cache slot that holds nothing: out of every window.
EMPTY = -(2**30)


class KeyValueCache(NamedTuple):
  """Keys, turned by their positions, and values in M slots [B, M, heads, d]."""

  keys: Any
  values: Any


@flax.struct.dataclass
class Places:
  """Where the tokens of a call stand, and those that the cache keeps.

  A token sees the tokens at most `window_length` - 1 before it, cached or in
  the same call. Positions count from the window's start; those of tokens kept
  from before it are negative.

  Attributes:
    valid: False where a place is padding: it is not seen, writes nothing, and
      is not kept.
    position: of the call's tokens [B or 1, T].
    cached: of what the cache's slots hold [B, M]; None without a cache.
    slots: where the cache takes the tokens [B, T], M being nowhere, before they
      look at it: what stood there is seen no more. None: they are a window
      that replaces the whole cache and is counted from its end, as the next
      window will see it; where they are less than a window, which nothing
      follows, the cache stays as it is.
    window_length: L.
  """

  valid: Mask
  position: Positions
  cached: Slots | None = None
  slots: Positions | None = None
  window_length: int = flax.struct.field(pytree_node=False, default=0)

  @property
  def seen_positions(self):
    """Of what a call sees: the cache [B, M], and without `slots` its tokens."""
    own = jnp.where(self.valid, self.position, EMPTY)
    if self.cached is None:
      return own
    if self.slots is None:
      return jnp.concatenate([self.cached, own], axis=1)
    row = jnp.arange(len(self.slots))[:, None]
    cached = jnp.asarray(self.cached)
    return cached.at[row, self.slots].set(own, mode="drop")

  @property
  def replaces_cache(self):
    return self.slots is None and self.valid.shape[1] == self.window_length

  def kept(self):
    """`cached` for the next window, whose cache this window is."""
    return jnp.where(self.valid, self.position - self.window_length, EMPTY)


def window(valid: Mask, window_length: int, cached=None) -> Places:
  """The places of a window's tokens, from its start."""
  position = jnp.arange(valid.shape[1], dtype=jnp.int32)[None]
  return Places(valid, position, cached, window_length=window_length)


def init_cache(config: ModelConfig, batch_size: int, slots: int, history: bool):
  """What attention and convolutions keep of earlier tokens: nothing yet.

  A tuple over the pattern's groups of tuples over a group's blocks: for
  attention a `KeyValueCache` of [R, B, slots, heads, d], None without slots;
  for fast weights the history of the convolution [R, B, taps - 1, channels],
  None without `history`. In the compute dtype. With `model.loops` the first
  axis holds the repeats of the first loop, then those of the second.
  """
  compute, _ = layers.dtypes(config)

  def cache(kind, repeats):
    repeats *= config.loops
    if kind in ATTENTION:
      head_dim = config.width // config.attention_heads
      shape = (repeats, batch_size, slots, config.key_value_heads, head_dim)
      zeros = jnp.zeros(shape, compute)
      return KeyValueCache(zeros, zeros) if slots else None
    convolved = config.value_dim
    if kind == "gdn":
      convolved += 2 * config.key_dim
    channels = config.fast_weight_heads * convolved
    shape = repeats, batch_size, config.convolution_size - 1, channels
    return jnp.zeros(shape, compute) if history else None

  return tuple(
    tuple(cache(kind, repeats) for kind in kinds)
    for kinds, repeats in config.pattern
  )
