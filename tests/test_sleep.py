"""Ways to sleep: sliding eviction, numbers of passes, stopping early."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.rollout import init_memory, rollout, run_window
from sleep_jax.sleep import sleep, sleep_until
from tests import naive
from tests.test_rollout import (
  SMALL,
  VOCABULARY,
  WINDOW,
  make,
  make_rows,
  sleep_config,
)

FLOAT32 = dataclasses.replace(SMALL, compute_dtype="float32")


MOST = 6


@functools.cache
def made(config):
  return make(config)


@functools.cache
def compiled(sleeper, passes, settings):
  model, _ = made(FLOAT32)

  def run(params, memory, tokens, valid, row_passes):
    arrays = params, tokens, memory, valid, row_passes
    return run_window(model, *arrays, passes, settings, sleeper)[2]

  return jax.jit(run)


def one_sleep(sleeper, row_passes, passes=MOST, tolerance=0.0):
  """`Slept` of four rows, of which one begins with padding."""
  model, params = made(FLOAT32)
  settings = sleep_config(passes, tolerance=tolerance)
  rng = np.random.default_rng(0)
  tokens = rng.integers(0, VOCABULARY, (4, WINDOW)).astype(np.int32)
  valid = np.ones(tokens.shape, bool)
  valid[3, 0] = False
  memory = init_memory(model, 4, settings)
  state = jax.tree.map(
    lambda x: jnp.asarray(0.3 * rng.normal(size=x.shape), x.dtype), memory.state
  )
  return compiled(sleeper, passes, settings)(
    params,
    memory._replace(state=state),
    *(tokens, valid, np.asarray(row_passes, np.int32)),
  )


def assert_rows_equal(one, other, rows):
  """h and S of these rows."""
  rows = np.asarray(rows)
  np.testing.assert_allclose(one.h[rows], other.h[rows], atol=1e-6)
  for x, y in zip(
    jax.tree.leaves(one.state), jax.tree.leaves(other.state), strict=True
  ):
    np.testing.assert_allclose(x[:, rows], y[:, rows], atol=1e-6)


def norms(state):
  """|S| of each row over all layers, in numpy."""
  return np.sqrt(
    sum(
      np.square(np.asarray(x, np.float64)).sum((0, 2, 3, 4))
      for x in jax.tree.leaves(state)
    )
  )


def test_rows_take_the_passes_that_they_are_given():
  """Scanned and while alike: row i of a mixed batch as if all were like it."""
  mixed = one_sleep(sleep, [1, 3, 2, 3], 3)
  until = one_sleep(sleep_until, [1, 3, 2, 3])
  np.testing.assert_array_equal(until.passes, [1, 3, 2, 3])
  assert_rows_equal(mixed, until, range(4))
  for passes, rows in {1: [0], 2: [2], 3: [1, 3]}.items():
    assert_rows_equal(mixed, one_sleep(sleep_until, [passes] * 4), rows)
  # A scan over as many passes as all rows take.
  assert_rows_equal(mixed, one_sleep(sleep, [1] * 4, 1), [0])


def test_a_row_without_passes_keeps_its_state():
  still = one_sleep(sleep_until, [0, 2, 0, 1])
  moved = one_sleep(sleep_until, [2, 2, 2, 1])
  never = one_sleep(sleep_until, [0, 0, 0, 0])
  assert_rows_equal(still, never, [0, 2])
  assert_rows_equal(still, moved, [1, 3])
  (x, *_), (y, *_) = map(jax.tree.leaves, (still.state, never.state))
  assert np.abs(x[:, 1] - y[:, 1]).max() > 1e-3


def test_what_each_pass_did_to_the_fast_weights():
  """Norms and changes against those of shorter sleeps, in numpy."""
  slept = one_sleep(sleep_until, [4, 4, 4, 2])
  states = [one_sleep(sleep_until, [n] * 4).state for n in range(5)]
  for n in range(1, 5):
    change = jax.tree.map(lambda x, y: x - y, states[n], states[n - 1])
    norm = norms(states[n])
    rows = slice(0, 4 if n <= 2 else 3)
    np.testing.assert_allclose(slept.norms[n - 1, rows], norm[rows], rtol=1e-5)
    np.testing.assert_allclose(
      slept.changes[n - 1, rows], (norms(change) / norm)[rows], rtol=1e-3
    )
  assert not slept.norms[2:, 3].any() and not slept.changes[2:, 3].any()


def test_sleep_stops_when_the_fast_weights_stop_changing():
  """Each row by itself: where its own change first is at most the tolerance."""
  whole = one_sleep(sleep_until, [MOST] * 4)
  changes = np.asarray(whole.changes)
  # Between two rows' changes by their third pass: these rows then differ.
  low, high = np.sort(changes[2])[[1, 2]]
  tolerance = float(np.sqrt(low * high))
  expected = [
    next((n for n in range(1, MOST) if column[n - 1] <= tolerance), MOST)
    for column in changes.T
  ]
  assert len(set(expected)) > 1
  stopped = one_sleep(sleep_until, [MOST] * 4, tolerance=tolerance)
  np.testing.assert_array_equal(stopped.passes, expected)
  assert_rows_equal(stopped, one_sleep(sleep_until, expected), range(4))


@pytest.mark.slow
def test_a_drawn_number_of_passes_is_that_number():
  """Values and gradients with N = 3 and two passes drawn are those of N = 2."""
  model, params = made(FLOAT32)
  arrays, _ = make_rows()

  @functools.partial(jax.jit, static_argnums=0)
  def value_and_gradient(config, passes):
    return jax.value_and_grad(
      lambda p: rollout(model, p, *arrays, config, passes=passes).loss_sum
    )(params)

  drawn = value_and_gradient(sleep_config(3), np.int32(2))
  fixed = value_and_gradient(sleep_config(2), None)
  for x, y in zip(*map(jax.tree.leaves, (drawn, fixed)), strict=True):
    np.testing.assert_allclose(x, y, atol=2e-5 * max(1, np.abs(y).max()))


def test_one_pass_with_sliding_eviction_is_a_sliding_window_hybrid():
  """Equal to the naive loop over the whole row as one window of banded
  attention, its fast weights and convolution never interrupted."""
  config = sleep_config(1, eviction="sliding", carry_convolution=True)
  with jax.enable_x64(True):
    model, params = make(SMALL)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (1, 3 * WINDOW + 2)).astype(np.int32)
    everywhere = np.ones(tokens.shape, bool)
    mine = jax.jit(
      lambda: rollout(
        model, params, tokens, tokens, everywhere, everywhere, config
      )
    )()
    with jax.numpy_rank_promotion("allow"):
      loss, states = naive.loss_sum(
        SMALL,
        params,
        [(tokens[0], tokens[0], everywhere[0])],
        # One window; what a token sees is bounded by the band alone.
        dataclasses.replace(config, carry_convolution=False),
      )
  np.testing.assert_allclose(mine.loss_sum, loss, rtol=1e-12)
  np.testing.assert_allclose(
    mine.memory.state[0][1][0, 0], states[0, 0, 1, 0], atol=1e-12
  )


@pytest.mark.parametrize(
  "eviction, passes, far", [("hard", 3, 0), ("sliding", 1, WINDOW - 1)]
)
def test_how_far_back_attention_sees(eviction, passes, far):
  """By gradient, with one attention block and no fast weights: the answer
  depends on tokens of earlier windows at most `far` before it. (After several
  passes a kept key has itself read what came before it.)"""
  config = dataclasses.replace(FLOAT32, pattern=((("attn",), 1),))
  model, params = make(config)
  length = 3 * WINDOW
  rng = np.random.default_rng(0)
  tokens = rng.permutation(VOCABULARY)[:length].astype(np.int32)[None]
  mask = np.arange(length)[None] == 2 * WINDOW  # the last window's first place
  settings = sleep_config(passes, eviction=eviction)

  def loss(embedding):
    changed = params | {"embedding": {"embedding": embedding}}
    return rollout(
      *(model, changed, tokens, tokens, mask, np.ones_like(mask), settings)
    ).loss_sum

  gradient = jax.jit(jax.grad(loss))(params["embedding"]["embedding"])
  reached = np.abs(gradient).max(axis=1)[tokens[0]] > 0
  distance = 2 * WINDOW - np.arange(length)
  np.testing.assert_array_equal(reached, (0 <= distance) & (distance <= far))


@pytest.mark.parametrize(
  "eviction", [pytest.param("hard", marks=pytest.mark.slow), "sliding"]
)
def test_nothing_else_crosses_a_boundary(eviction):
  """With S and the kept tokens cut off, nothing of a window reaches the next;
  each of them alone lets something through."""
  model, params = made(FLOAT32)
  settings = sleep_config(2, eviction=eviction)
  rng = np.random.default_rng(0)
  first, second = rng.integers(0, VOCABULARY, (2, 2, WINDOW)).astype(np.int32)
  valid = np.ones(first.shape, bool)
  start = init_memory(model, 2, settings)
  twice = np.full(2, 2, np.int32)

  def reached(cut):
    def answer(embedding):
      early = params | {"embedding": {"embedding": embedding}}
      _, memory, _ = run_window(
        *(model, early, first, start, valid, twice, 2, settings)
      )
      h, _, _ = run_window(
        *(model, params, second, cut(memory), valid, twice, 2, settings)
      )
      return jnp.sum(h**2)

    embedding = params["embedding"]["embedding"]
    return float(jnp.abs(jax.jit(jax.grad(answer))(embedding)).max())

  still = jax.lax.stop_gradient
  assert reached(still) == 0
  assert reached(lambda m: m._replace(cache=still(m.cache))) > 0
  kept = reached(lambda m: m._replace(state=still(m.state)))
  assert (kept > 0) == (eviction == "sliding")


def test_a_window_over_everything_evicts_nothing():
  """eviction = "none": the naive loop with one window over the whole row."""
  config = sleep_config(1, eviction="none")
  attention = dataclasses.replace(SMALL, pattern=((("attn",), 1),))
  with jax.enable_x64(True):
    model, params = make(attention)
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, VOCABULARY, (1, 3 * WINDOW)).astype(np.int32)
    everywhere = np.ones(tokens.shape, bool)
    mine = jax.jit(
      lambda: rollout(
        model, params, tokens, tokens, everywhere, everywhere, config
      )
    )()
    with jax.numpy_rank_promotion("allow"):
      loss, _ = naive.loss_sum(
        attention,
        params,
        [(tokens[0], tokens[0], everywhere[0])],
        dataclasses.replace(config, window_length=3 * WINDOW),
      )
  np.testing.assert_allclose(mine.loss_sum, loss, rtol=1e-12)
