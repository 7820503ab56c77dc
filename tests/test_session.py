"""Sessions against the rollout, the naive loop, and themselves cut otherwise.

Few shapes are compiled: most feeds are [2, 16], or a token at a time.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.config import SleepConfig
from sleep_jax.model.fast_weights import init_fast_weights
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.rollout import rollout
from sleep_jax.session import Session
from tests import naive
from tests.test_rollout import CONFIG, VOCABULARY, make

WINDOW = 4
HARD = SleepConfig(passes=2, window_length=WINDOW)
SLIDING = dataclasses.replace(HARD, eviction="sliding")
# Only the middle of three groups is looped.
LOOPED = dataclasses.replace(
  HARD,
  eviction="sliding",
  kept_pass="first",
  carry_convolution=True,
  looped_groups=(1, 2),
)
THREE_GROUPS = dataclasses.replace(CONFIG, pattern=((("attn", "gdn"), 1),) * 3)


@pytest.fixture(autouse=True)
def float64():
  with jax.enable_x64(True):
    yield


@pytest.fixture(scope="module")
def hard():
  """(session, parameters) that most tests share."""
  with jax.enable_x64(True):
    model, params = make()
  return Session(model, HARD), params


def make_tokens(length, batch=2, seed=0):
  rng = np.random.default_rng(seed)
  return rng.integers(0, VOCABULARY, (batch, length)).astype(np.int32)


def feed(session, params, state, tokens, lengths=None, **options):
  """The next state, by the one shape [B, 16] that is compiled."""
  batch, size = tokens.shape
  lengths = [size] * batch if lengths is None else lengths
  padded = np.zeros((batch, 16), np.int32)
  padded[:, :size] = tokens
  return session.feed(params, state, padded, lengths, **options)


def fed(session, params, tokens, lengths=None, **options):
  state = session.start(len(tokens))
  return feed(session, params, state, tokens, lengths, **options)


def one_by_one(session, params, state, tokens):
  for t in range(tokens.shape[1]):
    state = session.feed(params, state, tokens[:, t : t + 1])
  return state


def kept(state):
  """All but what no token will see: slots and places beyond the length."""
  window_length = state.tokens.shape[1]
  used = np.arange(window_length) < np.asarray(state.length)[:, None]

  def keys(path, x):
    if not {"keys", "values"} & {getattr(p, "name", "") for p in path}:
      return x
    x = np.asarray(x)[:, :, -window_length:]
    return np.where(used[None, :, :, None, None], x, 0)

  return state._replace(
    tokens=np.where(used, state.tokens, 0),
    cache=jax.tree.map_with_path(keys, state.cache),
  )


def assert_close(one, other, atol=1e-12):
  one, other = jax.tree.leaves(one), jax.tree.leaves(other)
  for a, b in zip(one, other, strict=True):
    np.testing.assert_allclose(a, b, rtol=0, atol=atol)


def assert_equal(one, other):
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    np.testing.assert_array_equal(a, b)


def row(state, b):
  """One row of a state, as a batch of 1."""

  def of_leaf(path, x):
    # Arrays of blocks are [R, B, ...].
    blocks = any(isinstance(key, jax.tree_util.SequenceKey) for key in path)
    return np.take(x, [b], axis=int(blocks))

  return jax.tree.map_with_path(of_leaf, state)


def unrolled(session, params, tokens, passes, valid=None):
  """(S, loss) after the rollout of these tokens, the last one predicting 0."""
  valid = np.ones(tokens.shape, bool) if valid is None else valid
  mask = np.zeros(tokens.shape, bool)
  mask[:, -1] = True

  @jax.jit
  def run(params, passes):
    return rollout(
      session.model,
      params,
      tokens,
      np.zeros_like(tokens),
      mask,
      valid,
      session.config,
      passes=passes,
      most_passes=4,
    )

  results = [run(params, np.int32(n)) for n in passes]
  return [(result.memory.state, result.loss_sum) for result in results]


def nats_of_0(state):
  return -jax.nn.log_softmax(state.logits)[:, 0].sum()


def assert_is_rollout(session, params, length, passes=(1, 4)):
  tokens = make_tokens(length)
  answers = unrolled(session, params, tokens, passes)
  for n, (expected, loss) in zip(passes, answers, strict=True):
    state = fed(session, params, tokens, passes=n)
    assert_close(state.fast_weights, expected)
    np.testing.assert_allclose(nats_of_0(state), loss, rtol=1e-12)
    slept = (length - 1) // WINDOW
    np.testing.assert_array_equal(state.sleeps, [slept] * 2)
    np.testing.assert_array_equal(state.passes, [n] * 2)


@pytest.mark.parametrize("length", [3 * WINDOW, 3 * WINDOW + 1])
def test_whole_windows_are_the_rollout(hard, length):
  """Awake after whole windows; and asleep when one more token arrives."""
  assert_is_rollout(*hard, length)


def test_sliding_windows_are_the_rollout(hard):
  session, params = hard
  session = dataclasses.replace(session, config=SLIDING)
  assert_is_rollout(session, params, 3 * WINDOW - 1)


@pytest.mark.slow
def test_looped_groups_and_what_is_carried_are_the_rollout():
  model, params = make(THREE_GROUPS)
  session = Session(model, LOOPED)
  assert_is_rollout(session, params, 3 * WINDOW - 1)
  # And however they are cut.
  tokens = make_tokens(3 * WINDOW - 1)
  state = one_by_one(session, params, session.start(2), tokens)
  assert_close(kept(state), kept(fed(session, params, tokens)))


def naive_stream(params, tokens, passes):
  """(logits after each token, S at the last window's start) of one row."""
  zeros = jnp.zeros(
    (CONFIG.fast_weight_heads, CONFIG.key_dim, CONFIG.value_dim)
  )
  states = {
    (g, r, j, 0): zeros
    for g, (kinds, repeats) in enumerate(CONFIG.pattern)
    for r in range(repeats)
    for j in range(len(kinds))
  }

  def one_pass(h, states):
    groups = range(len(CONFIG.pattern))
    return naive.blocks(CONFIG, params, h, states, {}, groups, WINDOW)[:2]

  embedding = params["embedding"]["embedding"]
  window, logits = [], []
  with jax.numpy_rank_promotion("allow"):
    for token in tokens:
      if len(window) == WINDOW:
        h = embedding[jnp.array(window)]
        for _ in range(passes):
          h, states = one_pass(h, states)
        window = []
      window.append(token)
      h, _ = one_pass(embedding[jnp.array(window)], states)
      scale = params["final_norm"]["scale"]
      x = naive.rms_norm(h[-1], scale, CONFIG.norm_eps)
      logits.append(x @ params["head"]["kernel"])
  return np.array(logits), states


@pytest.mark.parametrize("passes", [pytest.param(1, marks=pytest.mark.slow), 4])
def test_streaming_is_the_naive_loop(hard, passes):
  session, params = hard
  tokens = make_tokens(2 * WINDOW + 3)
  expected = [naive_stream(params, row, passes) for row in tokens]
  state = session.start(2)
  for t in range(tokens.shape[1]):
    state = session.feed(params, state, tokens[:, t : t + 1], passes=passes)
    for b, (logits, _) in enumerate(expected):
      np.testing.assert_allclose(state.logits[b], logits[t], atol=1e-12)
  for b, (_, states) in enumerate(expected):
    mine = state.start.state[0][1][:, b]
    assert_close([mine[0], mine[1]], [states[0, 0, 1, 0], states[0, 1, 1, 0]])
    assert np.abs(mine).max() > 0.1


def test_rows_of_any_lengths_get_what_they_would_get_alone(hard):
  session, params = hard
  tokens = make_tokens(16)
  state, pieces = session.start(2), ([], [])
  for lengths in [(3, 13), (2, 0), (16, 1), (0, 4)]:
    state = session.feed(params, state, tokens, lengths)
    for b, count in enumerate(lengths):
      pieces[b].extend(tokens[b, :count])
  np.testing.assert_array_equal(state.fed, [21, 18])
  np.testing.assert_array_equal(state.length, [1, 2])
  for b, piece in enumerate(pieces):
    alone = session.start(1)
    for start in range(0, len(piece), 16):
      some = np.array([piece[start : start + 16]])
      alone = feed(session, params, alone, some)
    assert_close(kept(row(state, b)), kept(alone))


def test_any_split_gives_the_same_state(hard):
  session, params = hard
  tokens = make_tokens(15)
  whole = fed(session, params, tokens)
  assert_close(
    kept(one_by_one(session, params, session.start(2), tokens)), kept(whole)
  )
  for cuts in [(4, 8, 12), (1, 9), (6, 7, 14)]:
    state = session.start(2)
    for start, stop in zip((0, *cuts), (*cuts, 15), strict=True):
      state = feed(session, params, state, tokens[:, start:stop])
    assert_close(kept(state), kept(whole))


def test_a_sleep_at_once_is_that_of_a_window_padded_on_its_left(hard):
  session, params = hard
  session = dataclasses.replace(session, config=SLIDING)
  context, answer = make_tokens(3), make_tokens(2, seed=1)
  row = np.concatenate([np.zeros((2, 1), np.int32), context, answer], 1)
  valid = np.arange(6)[None].repeat(2, 0) > 0
  ((expected, loss),) = unrolled(session, params, row, (2,), valid)
  state = fed(session, params, context)
  state = session.sleep(params, state)
  np.testing.assert_array_equal(state.length, 0)
  state = feed(session, params, state, answer)
  assert_close(state.fast_weights, expected)
  np.testing.assert_allclose(nats_of_0(state), loss, rtol=1e-12)


def test_how_far_the_fast_weights_moved(hard):
  session, params = hard
  tokens = make_tokens(9)
  # S after the first sleep and the second.
  before, after = (
    fed(session, params, tokens[:, :n]).start.state[0][1] for n in (5, 9)
  )
  moved = fed(session, params, tokens).moved
  for b in range(2):
    change = np.linalg.norm((after - before)[:, b])
    ratio = change / np.linalg.norm(after[:, b])
    np.testing.assert_allclose(moved[b], ratio, rtol=1e-12)


def test_a_tolerance_ends_sleeps_early(hard):
  session, params = hard
  tokens = make_tokens(9)
  once = fed(session, params, tokens, passes=1)
  loose = fed(session, params, tokens, passes=4, tolerance=1e9)
  tight = fed(session, params, tokens, passes=4, tolerance=1e-9)
  np.testing.assert_array_equal(loose.passes, [1, 1])
  np.testing.assert_array_equal(tight.passes, [4, 4])
  assert_close(kept(loose), kept(once))
  assert_close(kept(tight), kept(fed(session, params, tokens, passes=4)))


def test_nothing_is_evicted_and_no_more_fits(hard):
  """One long window, in pieces: the ordinary forward pass."""
  model, params = hard[0].model, hard[1]
  session = Session(
    model, SleepConfig(passes=1, window_length=16, eviction="none")
  )
  tokens = make_tokens(16)
  state = session.start(2)
  for start in (0, 8):
    state = session.feed(params, state, tokens[:, start : start + 8])
  logits, fast_weights = jax.jit(model.apply)(
    {"params": params}, tokens, init_fast_weights(CONFIG, 2), tokens >= 0
  )
  assert_close(state.logits, logits[:, -1])
  assert_close(state.fast_weights, fast_weights)
  np.testing.assert_array_equal(state.sleeps, 0)
  with pytest.raises(ValueError, match="room for 0"):
    session.feed(params, state, tokens[:, :1])
  with pytest.raises(ValueError, match="room for 0"):
    session.generate(params, state, 1)
  with pytest.raises(ValueError, match="never sleeps"):
    session.sleep(params, state)


def test_generating_is_feeding_the_likeliest_token(hard):
  session, params = hard
  # Rows with boundaries of their own.
  state = fed(session, params, make_tokens(16), lengths=[3, 9])
  tokens, lengths, after = session.generate(params, state, 7)
  np.testing.assert_array_equal(lengths, [7, 7])
  assert tokens.shape == (2, 7)
  for t in range(7):
    likeliest = np.argmax(state.logits, axis=1)
    np.testing.assert_array_equal(tokens[:, t], likeliest)
    state = session.feed(params, state, likeliest[:, None])
  assert_close(kept(after), kept(state))
  np.testing.assert_array_equal(after.sleeps, [2, 3])


def test_rows_stop_by_themselves(hard):
  session, params = hard
  state = fed(session, params, make_tokens(16), lengths=[3, 9])
  free, _, _ = session.generate(params, state, 8)
  # A token that one row says first in the middle, the other later or never.
  stop, first = next(
    (token, places)
    for token in range(VOCABULARY)
    if 8
    > min(places := [list(r).index(token) if token in r else 9 for r in free])
    > 0
    and places[0] != places[1]
  )
  tokens, lengths, after = session.generate(params, state, 8, stop=stop)
  np.testing.assert_array_equal(lengths, np.minimum(np.add(first, 1), 8))
  for b, length in enumerate(lengths):
    np.testing.assert_array_equal(tokens[b, :length], free[b, :length])
    assert not tokens[b, length:].any()
  # The state has seen what was returned, the stop token included.
  again = feed(session, params, state, tokens, lengths)
  assert_close(kept(after), kept(again))


def test_draws(hard):
  session, params = hard
  state = fed(session, params, make_tokens(16), lengths=[3, 9])

  def generate(count=8, state=state, **options):
    options = dict(temperature=1.0, key=jax.random.key(1)) | options
    tokens, _, after = session.generate(params, state, count, **options)
    return tokens, after

  greedy, _, _ = session.generate(params, state, 8)
  np.testing.assert_array_equal(generate(top_k=1)[0], greedy)
  np.testing.assert_array_equal(generate(temperature=1e-4)[0], greedy)
  drawn, _ = generate()
  np.testing.assert_array_equal(drawn, generate()[0])
  assert (drawn != generate(key=jax.random.key(2))[0]).any()
  # However it is cut.
  first, after = generate(5)
  second, _ = generate(5, after)
  np.testing.assert_array_equal(drawn, np.hstack([first, second])[:, :8])
  # Only the likeliest three, and not always one of them.
  keys = jax.random.split(jax.random.key(0), 40)
  tokens = np.array([generate(5, key=k, top_k=3)[0][:, 0] for k in keys])
  for b in range(2):
    best = np.argsort(-np.asarray(state.logits[b]))[:3]
    assert set(tokens[:, b]) == set(best)


def test_nothing_is_compiled_while_a_session_runs(hard):
  session, params = hard
  tokens = make_tokens(16)

  def everything(lengths, **options):
    state = session.start(2)
    for length in lengths:
      state = session.feed(params, state, tokens, length, **options)
      state = session.feed(params, state, tokens[:, :1], **options)
      _, _, state = session.generate(params, state, 5, **options)
      session.generate(
        params, state, 8, 0.5, 3, 1, key=jax.random.key(0), **options
      )
    return session.sleep(params, state, **options)

  everything([(16, 1)])
  everything([(16, 1)], tolerance=0.5)
  compiled = []
  listen = lambda name, *_, **__: compiled.append(name)  # noqa: E731
  jax.monitoring.register_event_duration_secs_listener(listen)
  try:
    everything([(3, 4), (16, 16), (9, 1)], passes=3, tolerance=0.1)
    everything([(0 + 1, 16)], passes=1)
    assert not [name for name in compiled if "compile" in name]
    session.feed(params, session.start(3), make_tokens(3, 3))
    assert [name for name in compiled if "compile" in name]
  finally:
    jax.monitoring.unregister_event_duration_listener(listen)


def test_bad_input_is_told_and_leaves_the_state_as_it_was(hard):
  session, params = hard
  tokens = make_tokens(16)
  state = fed(session, params, tokens, lengths=[5, 9])
  before = jax.tree.map(np.array, state)
  foreign = Session(
    HybridLM(dataclasses.replace(CONFIG, key_dim=5), VOCABULARY), HARD
  ).start(2)

  def feed(tokens=tokens, state=state, **options):
    return lambda: session.feed(params, state, tokens, **options)

  def generate(*arguments, state=state, **options):
    return lambda: session.generate(params, state, *arguments, **options)

  for call, message in (
    (lambda: session.start(0), "batch_size = 0"),
    (feed(tokens + VOCABULARY), "in 0..10, the vocabulary"),
    (feed(-1 - tokens), "a token is -"),
    (feed(tokens / 2), "whole number in 0..10"),
    (feed(tokens[:, :0]), "empty feed"),
    (feed(lengths=[0, 0]), "empty feed"),
    (feed(lengths=[17, 0]), "in 0..16"),
    (feed(lengths=[-1, 1]), "in 0..16"),
    (feed(lengths=[1, 1, 1]), "must be 2 whole numbers"),
    (feed(lengths=[1.5, 1]), "whole numbers"),
    (generate(1, 0.5, key=0), "a key"),
    (generate(1, 0.5, key=jax.random.split(jax.random.key(0), 3)), "a key"),
    (feed(make_tokens(4, 3)), "batch of 2"),
    (feed(tokens[0]), "batch of 2"),
    (feed(passes=0), "at least one pass"),
    (feed(passes=65), "in 1..64"),
    (feed(tolerance=0.0), "tolerance = 0.0"),
    (feed(tolerance=-1.0), "must be positive"),
    (feed(tolerance=float("nan")), "tolerance = nan"),
    (feed(state=foreign), "cache/0/1 is float64"),
    (feed(state=None), "NoneType"),
    (feed(state=session.start(3)), "batch of 3"),
    (generate(0), "max_tokens = 0"),
    (generate(2, -1.0), "temperature = -1.0"),
    (generate(2, float("nan")), "temperature = nan"),
    (generate(2, 1.0), "give a key"),
    (generate(2, top_k=0), "top_k = 0"),
    (generate(2, top_k=12), "in 1..11"),
    (generate(2, stop=11), "stop = 11"),
    (generate(2, passes=0), "passes = 0"),
    (generate(2, tolerance=0.0), "tolerance = 0.0"),
    (generate(2, state=session.start(2)), "fed no token"),
    (generate(2, state=foreign), "another model"),
    (lambda: session.sleep(params, state, passes=0), "passes = 0"),
    (lambda: session.sleep(params, foreign), "another model"),
  ):
    with pytest.raises(ValueError, match=message):
      call()
  # A token out of bounds that does not count is no mistake.
  beyond = np.where(np.arange(16)[None] < 9, tokens, VOCABULARY)
  assert_equal(
    session.feed(params, state, beyond, [9, 2]),
    session.feed(params, state, tokens, [9, 2]),
  )
  assert_equal(jax.tree.map(np.array, state), before)
  feed()()
