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
from sleep_jax.training import optimizers, step
from sleep_jax.training.evaluate import evaluate, greedy_decode
from sleep_jax.training.step import (
  Prediction,
  TrainState,
  count_exact,
  init_params,
  make_predict,
  make_train_step,
  total_loss,
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
SPECIAL = (1, 2)  # marker and end


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


def make_prompted_batch(rows):
  """A window of context, then [prompt, marker, answer] twice, no end token.

  The answers have 1 to 3 tokens; the marker counts, too.
  """
  rng = np.random.default_rng(0)
  inputs = np.zeros((rows, 16), np.int32)
  targets, mask = np.zeros_like(inputs), np.zeros(inputs.shape, bool)
  valid = np.zeros_like(mask)
  inputs[:, 4:8] = rng.integers(3, VOCABULARY, (rows, 4))
  for row in range(rows):
    tokens, counts = [], []
    for length in (1 + row % 2, 1 + row % 3):
      tokens += [3 + row % 4, 1, *rng.integers(3, VOCABULARY, length)]
      counts += [False] + [True] * (1 + length)
    stop = 8 + len(tokens) - 1
    inputs[row, 8:stop] = tokens[:-1]
    targets[row, 8:stop] = tokens[1:]
    mask[row, 8:stop] = counts[1:]
    valid[row, 4:stop] = True
  zeros = np.zeros(rows, np.int32)
  return Batch(inputs, targets, mask, valid, zeros + 1, zeros)


def exact_by_hand(predictions, batch):
  """{(row, question): exact}, place by place."""
  exact = {}
  for row, mask in enumerate(batch.loss_mask):
    question, before = -1, False
    for place, masked in enumerate(mask):
      if masked:
        question += not before
        right = predictions[row, place] == batch.targets[row, place]
        exact[row, question] = exact.get((row, question), True) and right
      before = masked
  return exact


def predict_at_n(model, config=CONFIG):
  predict = make_predict(model, config)
  return functools.partial(predict, passes=config.sleep.passes)


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
  params, batch = init_params(model, 0), make_prompted_batch(6)
  results, batch = [], jax.tree.map(lambda x: x[[0, 3, 1, 4, 2, 5]], batch)
  sleep = dataclasses.replace(CONFIG.sleep, window_length=8, pass_loss=0.5)
  prompted = dataclasses.replace(CONFIG, sleep=sleep)
  held = np.full((6, 2, 16), -1, np.int32)
  held[:, :, 6:8] = np.arange(24).reshape(6, 2, 2) % VOCABULARY
  batch = batch._replace(pass_targets=held)
  for parts in (1, 3):
    config = dataclasses.replace(
      prompted,
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

  @jax.jit
  @jax.grad
  def gradient(params):
    result = step.run(model, prompted, params, batch)
    return total_loss(prompted, result, batch) / batch.loss_mask.sum()

  squares = [float((x**2).sum()) for x in jax.tree.leaves(gradient(params))]
  np.testing.assert_allclose(
    one_metrics["grad_norm"], sum(squares) ** 0.5, rtol=1e-5
  )
  # The loss is the mean over all masked places, which no part has equally many
  # of; the accuracy is that of answers.
  loss, predictions, _ = predict_at_n(model, prompted)(params, batch)
  np.testing.assert_allclose(
    many_metrics["loss"], loss / batch.loss_mask.sum(), rtol=1e-5
  )
  exact = exact_by_hand(np.asarray(predictions), batch)
  np.testing.assert_allclose(
    many_metrics["accuracy"], np.mean(list(exact.values()))
  )


def test_the_loss_of_passes_is_a_mean_by_rows_and_parts_change_nothing():
  """Rows count as often as they have masked places, whatever they hold."""
  sleep = dataclasses.replace(CONFIG.sleep, pass_loss=0.5)
  config = dataclasses.replace(CONFIG, sleep=sleep)
  model = HybridLM(CONFIG.model, VOCABULARY)
  params, batch = init_params(model, 0), make_batch(6)
  rng = np.random.default_rng(3)
  held = np.full((6, 2, 8), -1, np.int32)
  for row in range(6):  # of 1 to 4 places each
    places = slice(3 - row % 4, 4)
    held[row, :, places] = rng.integers(0, VOCABULARY, (2, 1 + row % 4))
  batch = batch._replace(pass_targets=held)

  @jax.jit
  def losses(batch):
    result = step.run(model, config, params, batch)
    return total_loss(config, result, batch), result

  total, result = losses(batch)
  expected = float(result.loss_sum)
  for row, pass_loss in enumerate(result.pass_loss):
    mean = pass_loss / (2 * (1 + row % 4))
    expected += 0.5 * mean * batch.loss_mask[row].sum()
  assert expected > float(result.loss_sum) + 1
  np.testing.assert_allclose(total, expected, rtol=1e-5)
  parts = [jax.tree.map(lambda x, i=i: x[i : i + 2], batch) for i in (0, 2, 4)]
  totals = [losses(part)[0] for part in parts]
  np.testing.assert_allclose(sum(totals), expected, rtol=1e-5)
  without = batch._replace(pass_targets=None)
  assert total_loss(config, result, without) == result.loss_sum


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
  results, _ = evaluate(predict, params, "train", [batch], ["only"], SPECIAL)
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
  alone, loss = evaluate(predict, params, "x", [batch], ["only"], SPECIAL)
  padded, padded_loss = evaluate(
    predict, params, "x", [batch, padding], ["only"], SPECIAL
  )
  assert alone == padded
  assert loss == pytest.approx(padded_loss)


@pytest.fixture
def often_right():
  """(predict, batch): a stub whose predictions depend on the inputs before."""
  batch = make_prompted_batch(48)

  def predict(params, other):
    sums = np.cumsum(other.inputs, axis=1)
    predictions = np.where(sums % 6 > 0, batch.targets, 3 + sums % 4)
    predictions = np.where(other.loss_mask, predictions, 0)
    return Prediction(np.float32(1), predictions, None)

  return predict, batch


def test_each_question_of_a_row_is_an_answer(often_right):
  predict, batch = often_right
  predictions = predict(None, batch).predictions
  exact = exact_by_hand(predictions, batch)
  assert len(exact) == 2 * 48 and 10 < sum(exact.values()) < 86
  counted = jax.jit(count_exact)(predictions, batch.targets, batch.loss_mask)
  assert counted == sum(exact.values())
  results, _ = evaluate(predict, None, "x", [batch], ["only"], SPECIAL)
  overall = results["x"]["overall"]
  assert overall["count"] == 96
  assert overall["accuracy"] == np.mean(list(exact.values()))
  # A marker is no label.
  labels = batch.loss_mask & (batch.targets > 2)
  assert labels.sum() == batch.loss_mask.sum() - 96
  right = (predictions == batch.targets)[labels]
  assert overall["label_accuracy"] == pytest.approx(right.mean())


def test_greedy_decoding_of_several_questions(often_right):
  """Against a plain loop over places: prompts are given, answers its own."""
  predict, batch = often_right
  written = greedy_decode(predict, None, batch)
  wrong, inputs = 0, batch.inputs.copy()
  for place in range(15):
    predictions = predict(None, batch._replace(inputs=inputs)).predictions
    for row in np.flatnonzero(batch.loss_mask[:, place]):
      assert written[row, place] == predictions[row, place]
      wrong += written[row, place] != batch.targets[row, place]
      inputs[row, place + 1] = predictions[row, place]
  assert wrong > 10
  # A row's first answer is written exactly when it is judged right; the second
  # is judged after a right first one.
  greedy = exact_by_hand(written, batch)
  judged = exact_by_hand(predict(None, batch).predictions, batch)
  first = {key for key in judged if key[1] == 0}
  assert {k: greedy[k] for k in first} == {k: judged[k] for k in first}
  assert greedy != judged
