"""Training steps and evaluation: sums, parts, and greedy decoding."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from sleep_jax.config import (
  ExperimentConfig,
  ModelConfig,
  OptimizerConfig,
  SleepConfig,
)
from sleep_jax.data.pipeline import Batch
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.training import optimizers
from sleep_jax.training.evaluate import evaluate, greedy_decode
from sleep_jax.training.step import (
  TrainState,
  init_params,
  make_predict,
  make_train_step,
)

CONFIG = ExperimentConfig(
  model=ModelConfig(
    pattern=((("attn", "gdn"), 1),),
    width=16,
    attention_heads=2,
    key_value_heads=2,
    key_dim=8,
    value_dim=8,
    mlp_width=16,
  ),
  sleep=SleepConfig(passes=2, window_length=4),
  optimizer=OptimizerConfig(muon_learning_rate=0.02, adamw_learning_rate=0.02),
)
VOCABULARY = 7


def make_batch(rows=6, seed=0):
  """One window of context, then answers of 1 to 3 tokens and the end (2)."""
  rng = np.random.default_rng(seed)
  inputs = np.zeros((rows, 8), np.int32)
  targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
  inputs[:, :4] = rng.integers(3, VOCABULARY, (rows, 4))
  for row in range(rows):
    answer = rng.integers(3, VOCABULARY, 1 + row % 3)
    stop = 4 + len(answer) + 1
    inputs[row, 4:stop] = [1, *answer]
    targets[row, 4:stop] = [*answer, 2]
    mask[row, 4:stop] = True
  valid = mask.copy()
  valid[:, :4] = True
  zeros = np.zeros(rows, np.int32)
  return Batch(inputs, targets, mask, valid, zeros + 1, zeros)


def predict_at_n(model):
  predict = make_predict(model, CONFIG)
  return functools.partial(predict, passes=CONFIG.sleep.passes)


@pytest.fixture(scope="module")
def trained():
  """(predict, params, batch) half-way to knowing the batch by heart."""
  model = HybridLM(CONFIG.model, VOCABULARY)
  optimizer = optimizers.optimizer(CONFIG.optimizer, 100)
  step = make_train_step(model, optimizer, CONFIG)
  params = init_params(model, 0)
  state, batch = TrainState(params, optimizer.init(params)), make_batch(48)
  for _ in range(30):
    state, metrics = step(state, batch, CONFIG.sleep.passes)
    if metrics["accuracy"] > 0.3:
      break
  return predict_at_n(model), state.params, batch


def test_a_batch_in_parts_is_one_batch():
  model = HybridLM(CONFIG.model, VOCABULARY)
  params, batch = init_params(model, 0), make_batch()
  results, batch = [], jax.tree.map(lambda x: x[[0, 3, 1, 4, 2, 5]], batch)
  for parts in (1, 3):
    config = dataclasses.replace(
      CONFIG,
      data=dataclasses.replace(CONFIG.data, batch_size=6),
      optimizer=dataclasses.replace(CONFIG.optimizer, accumulation_steps=parts),
    )
    optimizer = optimizers.optimizer(config.optimizer, 100)
    state = TrainState(
      jax.tree.map(lambda x: x + 0, params), optimizer.init(params)
    )
    state, metrics = make_train_step(model, optimizer, config)(
      state, batch, config.sleep.passes
    )
    results.append((state.params, metrics))
  (one, one_metrics), (many, many_metrics) = results
  for name in one_metrics:
    np.testing.assert_allclose(one_metrics[name], many_metrics[name], rtol=1e-5)
  # AdamW's first step is the sign of the gradient: where that is nearly zero
  # rounding decides, so only what Muon updates is compared.
  compared = 0
  for label, x, y in zip(
    jax.tree.leaves(optimizers.labels(one)),
    jax.tree.leaves(one),
    jax.tree.leaves(many),
    strict=True,
  ):
    if label == "muon":
      np.testing.assert_allclose(x, y, atol=2e-4)
      compared += 1
  assert compared == 17
  # The loss is the mean over all masked places, which no part has equally many
  # of; the accuracy is that of whole rows.
  loss, predictions, _ = predict_at_n(model)(params, batch)
  np.testing.assert_allclose(
    many_metrics["loss"], loss / batch.loss_mask.sum(), rtol=1e-5
  )
  wrong = (np.asarray(predictions) != batch.targets) & batch.loss_mask
  np.testing.assert_allclose(
    many_metrics["accuracy"], np.mean(~wrong.any(axis=1))
  )


def test_greedy_decoding_agrees_with_the_judgement(trained):
  """Exact by teacher-forced argmax if and only if greedy decoding writes it."""
  predict, params, batch = trained
  written = greedy_decode(predict, params, batch)
  by_greedy = [
    np.array_equal(row[mask], target[mask])
    for row, mask, target in zip(
      written, batch.loss_mask, batch.targets, strict=True
    )
  ]
  results, _ = evaluate(predict, params, "train", [batch], ["only"])
  assert 0 < sum(by_greedy) < len(by_greedy)
  assert results["train"]["overall"]["accuracy"] == np.mean(by_greedy)


def test_greedy_decoding_does_not_read_the_answers(trained):
  predict, params, batch = trained
  rank = np.cumsum(batch.loss_mask, axis=1) * batch.loss_mask
  other = batch._replace(
    inputs=np.where(rank > 1, 5, batch.inputs), targets=batch.targets * 0
  )
  np.testing.assert_array_equal(
    greedy_decode(predict, params, batch), greedy_decode(predict, params, other)
  )


def test_greedy_decoding_equals_a_forward_pass_per_token(trained):
  """Against the plain loop: append the argmax, run everything again."""
  predict, params, batch = trained
  written = greedy_decode(predict, params, batch)
  for row in range(2):
    places = np.flatnonzero(batch.loss_mask[row])
    inputs = batch.inputs[row].copy()
    for place in places:
      # Everything after this place is cleared: causality is not relied on.
      cut = np.where(np.arange(8) <= place, inputs, 0)
      prediction = predict(
        params,
        jax.tree.map(lambda x, r=row: x[r : r + 1], batch)._replace(
          inputs=cut[None]
        ),
      )
      token = int(prediction.predictions[0, place])
      assert token == written[row, place]
      if place < places[-1]:
        inputs[place + 1] = token


def test_padding_rows_are_not_judged(trained):
  predict, params, batch = trained
  padding = jax.tree.map(np.zeros_like, batch)
  alone, loss = evaluate(predict, params, "x", [batch], ["only"])
  padded, padded_loss = evaluate(
    predict, params, "x", [batch, padding], ["only"]
  )
  assert alone == padded
  assert loss == pytest.approx(padded_loss)
