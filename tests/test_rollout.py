"""Sleep and rollout against the naive loop of `naive.py`, and by gradient."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.data.pipeline import eval_batches
from sleep_jax.data.tokenizers import make_tokenizer
from sleep_jax.model.fast_weights import init_fast_weights
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.rollout import rollout
from sleep_jax.tasks.depo import Depo, DepoConfig
from tests import naive

VOCABULARY = 11
WINDOW = 3
CONFIG = ModelConfig(
  pattern=((("attn", "gdn"), 2),),
  width=8,
  attention_heads=2,
  key_value_heads=1,
  fast_weight_heads=2,
  key_dim=3,
  value_dim=5,
  convolution_size=3,
  mlp_width=12,
  compute_dtype="float64",
)


def make(config=CONFIG, seed=1):
  """A model and parameters that no initialisation at 0 or 1 hides.

  Some seeds (0, say) make a norm near zero, whose gradients of 100 float32
  gets right to 5e-5 of the largest only.
  """
  model = HybridLM(config, VOCABULARY)
  tokens = jnp.zeros((1, 1), jnp.int32)
  params = jax.jit(model.init)(
    jax.random.key(seed), tokens, init_fast_weights(config, 1), tokens == 0
  )["params"]
  rng = np.random.default_rng(seed)
  return model, jax.tree.map(
    lambda x: x + jnp.asarray(0.1 * rng.normal(size=x.shape), x.dtype), params
  )


# Rows by their windows: "s" sleeps (no loss), "p" predicts at its last places.
ROWS = {
  "sleeps twice, then answers": [("s", 3), ("s", 3), ("p", 3)],
  "answers in the middle, sleeps, answers": [("p", 3), ("s", 3), ("p", 2)],
  "answers early, then nothing": [("s", 3), ("p", 3)],
  "short first window": [("s", 2), ("s", 3), ("p", 3)],
  "first window all padding": [("", 0), ("s", 3), ("p", 3)],
}


ROWS_END_AWAKE = [windows[-1][0] == "p" for windows in ROWS.values()]


def make_rows(seed=0):
  """(batch arrays [B, 3 windows], the same rows as lists without padding).

  A window that is all padding is None there.
  """
  rng = np.random.default_rng(seed)
  shape = len(ROWS), 3 * WINDOW
  inputs = rng.integers(1, VOCABULARY, shape).astype(np.int32)
  targets = rng.integers(1, VOCABULARY, shape).astype(np.int32)
  mask, valid = np.zeros(shape, bool), np.zeros(shape, bool)
  lists = []
  for row, windows in enumerate(ROWS.values()):
    pieces = []
    for w, (kind, length) in enumerate(windows):
      # Contexts are padded on their left, predictions on their right.
      start = w * WINDOW + (WINDOW - length if kind == "s" else 0)
      places = slice(start, start + length)
      valid[row, places] = True
      if kind == "p":
        mask[row, start + length // 2 : start + length] = True
      window = inputs[row, places], targets[row, places], mask[row, places]
      pieces.append(window if length else None)
    pieces += [None] * (3 - len(pieces))
    lists.append(pieces)
  return (inputs, targets, mask, valid), lists


def sleep_config(passes, **settings):
  return SleepConfig(passes=passes, window_length=WINDOW, **settings)


@functools.partial(jax.jit, static_argnums=(0, 3))
def run(model, params, arrays, sleep, held=None):
  return rollout(model, params, *arrays, sleep, pass_targets=held)


def make_held(passes):
  """(pass_targets [B, N, T], and of each row what `naive.loss_sum` wants).

  That is its N, every other row's being one less, and what its windows are to
  hold: on the first two places; the third is left open.
  """
  rng = np.random.default_rng(5)
  held = np.full((len(ROWS), passes, 3 * WINDOW), -1, np.int32)
  rows = []
  for row, windows in enumerate(ROWS.values()):
    not_taken = row % 2
    rows.append((passes - not_taken, {}))
    for w, (kind, length) in enumerate(windows):
      if kind == "s":
        places = slice((w + 1) * WINDOW - length, (w + 1) * WINDOW)
        for n in range(not_taken, passes):
          said = rng.integers(0, VOCABULARY, length)
          said[2:] = -1
          held[row, n, places] = said
          rows[row][1][w, n - not_taken] = said.tolist()
  return held, rows


@functools.cache
def by_the_naive_loop(config, sleep):
  """(parameters, (loss, gradients)), of all rows."""
  _, rows = make_rows()
  held_by_row = [(sleep.passes, None)] * len(rows)
  if sleep.pass_loss:
    _, held_by_row = make_held(sleep.passes)

  def naive_loss(params):
    return sum(
      naive.loss_sum(
        config, params, row, dataclasses.replace(sleep, passes=n), its
      )[0]
      for row, (n, its) in zip(rows, held_by_row, strict=True)
    )

  with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
    _, params = make(config)
    return params, jax.value_and_grad(naive_loss)(params)


def mine_and_naive(config, sleep, dtype="float64"):
  """(loss, gradients) by `rollout` and by the naive loop, of all rows."""
  arrays, _ = make_rows()
  held, _ = make_held(sleep.passes) if sleep.pass_loss else (None, None)

  def loss(params, model):
    result = run(model, params, arrays, sleep, held)
    if sleep.pass_loss:
      return result.loss_sum + jnp.sum(result.pass_loss)
    return result.loss_sum

  params, expected = by_the_naive_loop(config, sleep)
  with jax.enable_x64(dtype == "float64"):
    model = HybridLM(
      dataclasses.replace(config, compute_dtype=dtype), VOCABULARY
    )
    params = jax.tree.map(lambda x: np.asarray(x, dtype), params)
    mine = jax.jit(jax.value_and_grad(loss), static_argnums=1)(params, model)
  return jax.tree.map(np.asarray, (mine, expected))


def assert_equal(mine, expected, tolerance):
  """Losses to a relative tolerance, gradients to one of the largest."""
  np.testing.assert_allclose(mine[0], expected[0], rtol=tolerance)
  largest = max(np.abs(x).max() for x in jax.tree.leaves(expected[1]))
  for x, y in zip(
    jax.tree.leaves(mine[1]), jax.tree.leaves(expected[1]), strict=True
  ):
    np.testing.assert_allclose(x, y, rtol=0, atol=tolerance * largest)


# One block of each kind, and three groups of which the middle one is looped.
SMALL = dataclasses.replace(CONFIG, pattern=((("attn", "gdn"), 1),))
MIDDLE = dataclasses.replace(
  CONFIG,
  pattern=((("gdn", "attn"), 1), (("attn", "gdn"), 1), (("gdn", "attn"), 1)),
)
# The kinds and settings of pretrained models, in small.
JET_NEMOTRON = dataclasses.replace(
  CONFIG,
  pattern=((("swa",), 1), (("jet", "attn"), 1), (("jet", "swa"), 1)),
  attention_bias=True,
  sliding_window=2,
  generator_reduction=2,
  tied_head=True,
)
OURO = dataclasses.replace(
  CONFIG,
  pattern=((("attn", "inserted_jet"), 1),),
  generator_reduction=2,
  sandwich_norms=True,
  norm_in_loop=True,
)
OLMO_HYBRID = dataclasses.replace(
  CONFIG,
  pattern=((("gdn", "post_attn"), 1),),
  beta_range=2.0,
  rope_theta=0.0,
)


@pytest.mark.parametrize(
  "config, sleep, dtype, tolerance",
  [
    pytest.param(
      JET_NEMOTRON,
      sleep_config(2, looped_groups=(1, 2)),
      *("float64", 1e-12),
      id="jet nemotron",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      JET_NEMOTRON,
      sleep_config(1, eviction="sliding", carry_convolution=True),
      *("float64", 1e-12),
      id="jet nemotron, sliding",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      OURO,
      sleep_config(2, eviction="sliding"),
      *("float64", 1e-12),
      id="ouro with jet layers",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      dataclasses.replace(OURO, loops=2),
      sleep_config(2, eviction="sliding", carry_convolution=True),
      *("float64", 1e-12),
      id="ouro with jet layers and loops of its own",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      OLMO_HYBRID,
      sleep_config(2, eviction="sliding", carry_convolution=True),
      *("float64", 1e-12),
      id="olmo hybrid, sliding",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      *(CONFIG, sleep_config(1), "float64", 1e-12), marks=pytest.mark.slow
    ),
    (CONFIG, sleep_config(3), "float64", 1e-12),
    (CONFIG, sleep_config(3), "float32", 1e-5),
    pytest.param(
      SMALL,
      sleep_config(3, eviction="sliding", remat_passes=True),
      *("float64", 1e-12),
      id="sliding",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      MIDDLE,
      sleep_config(
        2,
        eviction="sliding",
        kept_pass="first",
        carry_convolution=True,
        looped_groups=(1, 2),
        remat_windows=True,
      ),
      *("float64", 1e-12),
      id="a middle loop that keeps the first pass's keys",
    ),
    pytest.param(
      SMALL,
      sleep_config(3, gradient_passes=2, gradient_windows=2),
      *("float64", 1e-12),
      id="truncated",
      marks=pytest.mark.slow,
    ),
    pytest.param(
      SMALL,
      sleep_config(
        3,
        eviction="sliding",
        kept_pass="first",
        gradient_passes=1,
        gradient_windows=2,
        remat_passes=True,
        remat_windows=True,
      ),
      *("float64", 1e-12),
      id="truncated and sliding",
    ),
    pytest.param(
      SMALL,
      sleep_config(3, pass_loss=1.0),
      *("float64", 1e-12),
      id="a loss after each pass",
    ),
  ],
)
def test_loss_and_gradients_equal_the_naive_loop(
  config, sleep, dtype, tolerance
):
  mine, expected = mine_and_naive(config, sleep, dtype)
  assert_equal(mine, expected, tolerance)


@pytest.mark.slow
def test_padding_of_depo_s_rows_leaves_no_trace():
  """Short cycles, several questions: against the naive loop without padding."""
  config = DepoConfig(nodes=6, hops=2, queries=2, mini_vocab=2)
  task = Depo(config, seed=0)
  (batch,) = eval_batches(
    task,
    make_tokenizer("words", task.vocabulary, task.text_separator),
    "train",
    5,
    batch_size=5,
    length=36,
    window_length=12,
    align_answer=True,
  )
  rows = [
    [
      (inputs[valid], targets[valid], mask[valid]) if valid.any() else None
      for inputs, targets, mask, valid in zip(
        *(x[row].reshape(3, 12) for x in batch[:4]), strict=True
      )
    ]
    for row in range(5)
  ]
  assert {row[0] is None for row in rows} == {True, False}
  sleep = SleepConfig(passes=2, window_length=12)
  noise = np.random.default_rng(0).integers(1, VOCABULARY, (5, 36))
  noisy = batch._replace(
    inputs=np.where(batch.valid, batch.inputs, noise).astype(np.int32),
    targets=np.where(batch.loss_mask, batch.targets, noise).astype(np.int32),
  )
  with jax.enable_x64(True), jax.numpy_rank_promotion("allow"):
    model, params = make(SMALL)
    expected = sum(naive.loss_sum(SMALL, params, row, sleep)[0] for row in rows)
    results = [run(model, params, b[:4], sleep) for b in (batch, noisy)]
  for result in results:
    np.testing.assert_allclose(result.loss_sum, expected, rtol=1e-12)
  np.testing.assert_array_equal(*(x.predictions for x in results))


@pytest.mark.slow
def test_truncation_changes_the_gradient_alone():
  """And in a way that the rows show: else the tests above prove nothing."""
  arrays, _ = make_rows()
  model, params = make(dataclasses.replace(SMALL, compute_dtype="float32"))

  def value_and_gradient(**settings):
    sleep = sleep_config(3, **settings)
    loss = jax.jit(
      jax.value_and_grad(lambda p: run(model, p, arrays, sleep).loss_sum)
    )
    return loss(params)

  loss, whole = value_and_gradient()
  for name in ("gradient_passes", "gradient_windows"):
    same_loss, cut = value_and_gradient(**{name: 2})
    np.testing.assert_allclose(same_loss, loss, rtol=1e-6)
    difference = jax.tree.map(lambda x, y: np.abs(x - y).max(), whole, cut)
    assert max(jax.tree.leaves(difference)) > 1e-3
    _, uncut = value_and_gradient(**{name: 3})
    assert_equal((0, uncut), (0, whole), 1e-6)


def test_logits_of_masked_places_alone_give_the_same():
  arrays, _ = make_rows()
  masked = arrays[2].reshape(len(ROWS), 3, WINDOW).sum(-1)
  most = int(masked.max())
  assert 0 < most < WINDOW and masked.min() == 0
  with jax.enable_x64(True):
    # No fast weights: they have no part in it, and compile longest.
    model, params = make(dataclasses.replace(CONFIG, pattern=((("attn",), 1),)))

    def value_and_gradient(answer_length):
      def loss(params):
        result = rollout(
          *(model, params, *arrays, sleep_config(1)),
          answer_length=answer_length,
        )
        return result.loss_sum, result.predictions

      return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)

    (whole, predictions), gradients = value_and_gradient(0)
    (loss, same), other = value_and_gradient(most)
    np.testing.assert_array_equal(same, predictions)
    assert_equal((loss, other), (whole, gradients), 1e-12)


def test_bfloat16_computes_low_and_keeps_state_and_gradients_high():
  model, params = make(dataclasses.replace(CONFIG, compute_dtype="bfloat16"))
  exact, _ = make(dataclasses.replace(CONFIG, compute_dtype="float32"))
  arrays, _ = make_rows()

  def loss(params):
    result = run(model, params, arrays, sleep_config(2))
    return result.loss_sum, result.memory.state

  (low, state), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(
    params
  )
  high = run(exact, params, arrays, sleep_config(2)).loss_sum
  assert low != high
  np.testing.assert_allclose(low, high, rtol=0.02)
  for leaf in jax.tree.leaves((state, gradients)):
    assert leaf.dtype == np.float32


def test_the_loss_of_passes_is_float32_whatever_computes():
  held, _ = make_held(2)
  config = dataclasses.replace(SMALL, compute_dtype="bfloat16")
  model = HybridLM(config, VOCABULARY)
  _, params = make(dataclasses.replace(SMALL, compute_dtype="float32"))
  result = jax.eval_shape(
    lambda p: run(
      model, p, make_rows()[0], sleep_config(2, pass_loss=1.0), held
    ),
    params,
  )
  assert result.pass_loss.dtype == jnp.float32
  assert result.pass_loss.shape == (len(ROWS),)


def test_each_row_gets_what_it_would_get_alone():
  with jax.enable_x64(True):
    model, params = make()
    arrays, rows = make_rows()
    together = run(model, params, arrays, sleep_config(2))
    for row, windows in enumerate(rows):
      alone = run(
        model, params, tuple(x[row : row + 1] for x in arrays), sleep_config(2)
      )
      np.testing.assert_array_equal(
        together.predictions[row], alone.predictions[0]
      )
      with jax.numpy_rank_promotion("allow"):
        _, states = naive.loss_sum(CONFIG, params, windows, sleep_config(2))
      # The last window's sleep is left out: nothing reads its S.
      if ROWS_END_AWAKE[row]:
        for result, at in ((together, row), (alone, 0)):
          for mine, theirs in (
            (result.memory.state[0][1][0, at], states[0, 0, 1, 0]),
            (result.memory.state[0][1][1, at], states[0, 1, 1, 0]),
          ):
            np.testing.assert_allclose(mine, theirs, atol=1e-12)


def test_one_pass_is_the_ordinary_hybrid():
  """N = 1: each window one forward pass, S going from one to the next."""
  with jax.enable_x64(True):
    model, params = make()
    (inputs, targets, _, _), _ = make_rows()
    everywhere = np.ones_like(inputs, bool)
    mask = everywhere.copy()
    mask[:, : 2 * WINDOW] = False  # two windows sleep
    mine = run(
      model, params, (inputs, targets, mask, everywhere), sleep_config(1)
    )
    forward = jax.jit(model.apply)
    state = init_fast_weights(CONFIG, len(ROWS))
    for start in range(0, inputs.shape[1], WINDOW):
      window = slice(start, start + WINDOW)
      logits, state = forward(
        {"params": params}, inputs[:, window], state, everywhere[:, window]
      )
    logits, labels = np.asarray(logits), targets[:, window, None]
    nats = (
      np.log(np.exp(logits).sum(-1))
      - np.take_along_axis(logits, labels, -1)[..., 0]
    )
    np.testing.assert_allclose(mine.loss_sum, nats.sum(), rtol=1e-12)
    np.testing.assert_array_equal(
      mine.predictions[:, window], logits.argmax(-1)
    )
    assert not np.any(mine.predictions[:, : 2 * WINDOW])


def test_nothing_but_the_fast_weights_crosses_a_boundary():
  """Without fast weights the past cannot matter; with them it does."""
  (inputs, targets, _, _), _ = make_rows()
  mask = np.zeros_like(inputs, bool)
  mask[:, 2 * WINDOW :] = True
  other = inputs.copy()
  other[:, : 2 * WINDOW] = (inputs[:, : 2 * WINDOW] + 1) % VOCABULARY

  def losses(kinds):
    config = dataclasses.replace(
      CONFIG, pattern=((kinds, 2),), compute_dtype="float32"
    )
    model, params = make(config)
    return [
      run(
        model, params, (x, targets, mask, np.ones_like(mask)), sleep_config(2)
      ).loss_sum
      for x in (inputs, other)
    ]

  before, after = losses(("attn",))
  assert before == after
  before, after = losses(("attn", "gdn"))
  assert abs(before - after) > 1e-3


def test_one_long_window_attends_causally():
  """A changed token changes no prediction before it, and some after it."""
  model, params = make(dataclasses.replace(CONFIG, compute_dtype="float32"))
  tokens = np.arange(10, dtype=np.int32)[None] % VOCABULARY
  changed = tokens.copy()
  changed[0, 6] += 1

  def logits(tokens):
    state = init_fast_weights(model.config, 1)
    valid = np.ones(tokens.shape, bool)
    return jax.jit(model.apply)({"params": params}, tokens, state, valid)[0][0]

  before, after = logits(tokens), logits(changed)
  np.testing.assert_array_equal(before[:6], after[:6])
  assert np.all(np.abs(before[6:] - after[6:]).max(1) > 1e-6)


def test_the_graph_does_not_grow_with_passes_windows_or_depth():
  def size(passes, windows, repeats):
    config = dataclasses.replace(
      CONFIG, pattern=((("attn", "gdn"), repeats),), compute_dtype="float32"
    )
    model = HybridLM(config, VOCABULARY)
    length = windows * WINDOW + 2
    tokens = jax.ShapeDtypeStruct((2, length), jnp.int32)
    mask = jax.ShapeDtypeStruct((2, length), bool)
    params = jax.eval_shape(lambda: make(config)[1])
    gradient = jax.grad(
      lambda p, *arrays: run(model, p, arrays, sleep_config(passes)).loss_sum
    )
    return len(
      str(jax.make_jaxpr(gradient)(params, tokens, tokens, mask, mask))
    )

  small = size(passes=2, windows=2, repeats=2)
  # Numbers grow longer, equations do not grow more.
  assert size(passes=8, windows=5, repeats=4) < 1.02 * small
