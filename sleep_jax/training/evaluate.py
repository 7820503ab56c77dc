"""Judging a model on held-out examples."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from sleep_jax.config import RunConfig
from sleep_jax.data import pipeline
from sleep_jax.data.pipeline import Batch
from sleep_jax.data.tokenizers import Tokenizer
from sleep_jax.tasks import Task
from sleep_jax.training import judging


def evaluation_sets(
  task: Task, tokenizer: Tokenizer, run: RunConfig, layout: Mapping[str, Any]
) -> dict[str, list[Batch]]:
  """The batches of every split that is judged; see `pipeline.eval_batches`.

  Args:
    task: gives the examples.
    tokenizer: turns them into tokens.
    run: says how many, and how many in a batch.
    layout: the arguments that rows are laid out by.

  Raises:
    ValueError: an example does not fit.
  """
  sets = {}
  for split in task.eval_splits:
    size = task.size(split)
    count = min(run.evaluation_examples, size or run.evaluation_examples)
    batches = pipeline.eval_batches(
      task,
      tokenizer,
      split,
      count,
      batch_size=min(run.evaluation_batch_size, count),
      **layout,
    )
    sets[split] = list(batches)
  return sets


def evaluate_sets(
  predict, params, sets: Mapping[str, list[Batch]], modes, share: int
) -> tuple[dict[str, Any], dict[str, float]]:
  """(results by split, metrics) on the first 1 / `share` of the batches."""
  results, metrics = {}, {}
  for split, batches in sets.items():
    some = batches[: math.ceil(len(batches) / share)]
    judged, loss = evaluate(predict, params, split, some, modes)
    results |= judged
    metrics[f"eval/{split}/loss"] = loss
    metrics[f"eval/{split}/accuracy"] = judged[split]["overall"]["accuracy"]
    for depth, scores in judged[split]["depth"].items():
      metrics[f"eval/{split}/depth_{depth}"] = scores["accuracy"]
  return results, metrics


def evaluate(predict, params, split: str, batches: list[Batch], modes) -> tuple:
  """(results, mean loss) of a split; `results` as `judging.judge` gives them.

  An answer is right when all its tokens and the end token are the argmax,
  given the right tokens before them: exactly when greedy decoding writes it
  (`greedy_decode`), at the cost of one pass.

  Args:
    predict: from `step.make_predict`.
    params: the model's parameters.
    split: its name in the results.
    batches: the examples; rows without a masked place are padding.
    modes: the task's modes, which `Batch.mode` indexes.
  """
  loss_sum, predictions = 0.0, []
  for batch in batches:
    batch_loss, batch_predictions = predict(params, batch)
    loss_sum += float(batch_loss)
    predictions.append(np.asarray(batch_predictions))
  _, targets, mask, _, depth, mode = (
    np.concatenate(column) for column in zip(*batches, strict=True)
  )
  used = mask.any(axis=1)
  answers = [
    tuple(row_targets[row_mask][:-1].tolist())
    for row_targets, row_mask in zip(targets[used], mask[used], strict=True)
  ]
  results = judging.judge(
    split,
    (np.concatenate(predictions) == targets)[used],
    mask[used],
    answers,
    depth[used],
    [modes[i] for i in mode[used]],
  )
  return results, loss_sum / int(mask.sum())


def greedy_decode(predict, params, batch: Batch) -> Any:
  """Tokens [B, T] that the model writes by itself at the masked places.

  The answers in `batch.inputs` are not looked at: from the marker on, each
  input is the argmax before it.
  """
  rank = np.cumsum(batch.loss_mask, axis=1) * batch.loss_mask
  # The marker (rank 1) stays; what follows is unknown yet.
  inputs = np.where(rank > 1, 0, batch.inputs)
  written = np.zeros_like(batch.targets)
  for place in range(1, rank.max(initial=0) + 1):
    _, predictions = predict(params, batch._replace(inputs=inputs))
    here = rank == place
    written = np.where(here, predictions, written)
    following = np.roll(here, 1, axis=1) & (rank == place + 1)
    inputs[following] = np.roll(written, 1, axis=1)[following]
  return written
