"""Sleep: N passes of the blocks over a window that is about to be evicted.

Paper, Algorithm 1: N times (h, S) <- Blocks(h, S). S is not reset between
passes, and h is carried, so keys, values and gates are computed anew from
features that have already read S. A pass attends to its own keys of the window,
and to what the cache has kept of the window before; the cache of the next
window is made by a row's last pass, or by its first (`sleep.kept_pass`).

Rows of a batch take numbers of passes of their own. Where a row takes none,
its h, S and cache stay as they are.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sleep_jax.array_types import Counts, Hidden, Rows
from sleep_jax.config import SleepConfig
from sleep_jax.model.places import Places


class Slept(NamedTuple):
  """What a sleep gives.

  Attributes:
    h, state, cache: after the last pass.
    passes: that each row took [B].
    norms: of S after each pass, |S_n| over all looped layers [N, B]; None where
      they were not asked for, 0 where a row took no such pass.
    changes: |S_n - S_(n-1)| / |S_n|, likewise.
  """

  h: Hidden | None
  state: Any
  cache: Any
  passes: Counts
  norms: jax.Array | None = None
  changes: jax.Array | None = None


def sleep(
  blocks,
  params,
  h: Hidden,
  state,
  cache,
  places: Places,
  row_passes: Counts,
  passes: int,
  config: SleepConfig,
) -> Slept:
  """A sleep to be differentiated: a `lax.scan` over N passes.

  A row that takes n of the N passes takes the last n, so that all rows end
  together. The passes before the last `sleep.gradient_passes` count as the
  identity on the way back: h is a residual stream and S decays slowly, so that
  embeddings and earlier windows still learn.

  Args:
    blocks: (params, h, state, cache, places) -> (h, state, cache).
    params: the model's parameters.
    h: embedded window [B, L, D].
    state: fast weights at the window's start.
    cache: kept from before the window.
    places: where the window's tokens stand.
    row_passes: passes of each row [B], 1..N.
    passes: N >= 1.
    config: which passes are differentiated and rematerialised, and which one
      makes the next cache.
  """

  def scan(params, carry, first, last):
    def one_pass(carry, n):
      active = passes - n <= row_passes
      keeps = _keeps(config, active, passes - n == row_passes)
      return _one_pass(blocks, params, carry, cache, places, active, keeps)

    def body(carry, n):
      return one_pass(carry, n), None

    if config.remat_passes:
      body = jax.checkpoint(body, prevent_cse=False)
    return jax.lax.scan(body, carry, jnp.arange(first, last))[0]

  start = h, state, cache
  early = max(0, passes - config.gradient_passes)
  if config.gradient_passes == 0 or early == 0:
    return Slept(*scan(params, start, 0, passes), row_passes)
  still = jax.lax.stop_gradient
  end = scan(*still((params, start)), 0, early)
  # The value of `end`, the gradient of `start`.
  middle = jax.tree.map(lambda x, y: still(y) + (x - still(x)), start, end)
  return Slept(*scan(params, middle, early, passes), row_passes)


def sleep_until(
  blocks,
  params,
  h: Hidden,
  state,
  cache,
  places: Places,
  row_passes: Counts,
  passes: int,
  config: SleepConfig,
  tolerance=None,
) -> Slept:
  """A sleep that stops early: for evaluation and sessions, not for gradients.

  A row stops after its `row_passes`, at most N, or where
  |S_n - S_(n-1)| <= tolerance |S_n|; the loop ends with its last row.
  Arguments as those of `sleep`, and the tolerance, which may be traced (0 takes
  all passes; None is `sleep.tolerance`). `Slept.norms` and `changes` are given.
  """
  batch = h.shape[0]
  tolerance = config.tolerance if tolerance is None else tolerance

  def unfinished(loop):
    n, active, _ = loop
    return (n < passes) & jnp.any(active)

  def one_pass(loop):
    n, active, slept = loop
    before = slept.state
    h, state, cache_after = _one_pass(
      blocks,
      params,
      slept[:3],
      cache,
      places,
      active,
      _keeps(config, active, active & (n == 0)),
    )
    norm = row_norm(state, batch)
    change = row_norm(jax.tree.map(jnp.subtract, state, before), batch)
    change = change / jnp.maximum(norm, jnp.finfo(norm.dtype).tiny)
    slept = Slept(
      h,
      state,
      cache_after,
      slept.passes + active,
      slept.norms.at[n].set(jnp.where(active, norm, 0)),
      slept.changes.at[n].set(jnp.where(active, change, 0)),
    )
    active = active & (n + 1 < row_passes)
    active = active & ((tolerance <= 0) | (change > tolerance))
    return n + 1, active, slept

  zeros = jnp.zeros((passes, batch), row_norm(state, batch).dtype)
  start = Slept(h, state, cache, jnp.zeros_like(row_passes), zeros, zeros)
  _, _, slept = jax.lax.while_loop(
    unfinished, one_pass, (jnp.zeros((), jnp.int32), row_passes > 0, start)
  )
  return slept


def _one_pass(blocks, params, carry, cache, places, active: Rows, keeps: Rows):
  """(h, state, next cache) after one pass of the active rows."""
  h, state, kept = carry
  places = places.replace(valid=places.valid & active[:, None])
  new_h, state, new = blocks(params, h, state, cache, places)
  h = jnp.where(places.valid[..., None], new_h, h)

  def choose(new, kept):  # [R, B, ...]
    rows = keeps.reshape(1, -1, *[1] * (new.ndim - 2))
    return jnp.where(rows, new, kept)

  return h, state, jax.tree.map(choose, new, kept)


def _keeps(config: SleepConfig, active: Rows, first: Rows) -> Rows:
  """Rows whose keys of this pass, so far, are those to be kept."""
  return first if config.kept_pass == "first" else active


def row_norm(state, batch):
  """Frobenius norm of each row's S over all given layers [B]."""
  squares = [
    jnp.sum(jnp.square(x), axis=(0, *range(2, x.ndim)))
    for x in jax.tree.leaves(state)
  ]
  return jnp.sqrt(sum(squares, jnp.zeros(batch)))
