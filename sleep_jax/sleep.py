"""Sleep: N passes of the blocks over a window that is about to be evicted."""

import jax
import jax.numpy as jnp

from sleep_jax.array_types import Hidden, Mask, Rows


def sleep(blocks, h: Hidden, state, valid: Mask, sleeps: Rows, passes: int):
  """(h, state) after `passes` passes, or after one where a row is awake.

  Paper, Algorithm 1: N times (h, S) <- Blocks(h, S). S is not reset between
  passes, and h is carried, so keys, values and gates are computed anew from
  features that have already read S.

  Args:
    blocks: (h, state, valid) -> (h, state).
    h: embedded window [B, L, D].
    state: fast weights at the window's start.
    valid: False where a place is padding: its h, and S, stay as they are.
    sleeps: rows [B] that take all passes; the others take the first alone.
    passes: N >= 1.
  """

  def one_pass(carry, n):
    h, state = carry
    active = valid & (sleeps | (n == 0))[:, None]
    new_h, state = blocks(h, state, active)
    return (jnp.where(active[..., None], new_h, h), state), None

  (h, state), _ = jax.lax.scan(one_pass, (h, state), jnp.arange(passes))
  return h, state
