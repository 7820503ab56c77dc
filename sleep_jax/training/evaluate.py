"""Judging a model on held-out examples."""

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Int

from sleep_jax.config import ExperimentConfig, RunConfig
from sleep_jax.data import pipeline
from sleep_jax.data.pipeline import Batch
from sleep_jax.data.tokenizers import Tokenizer
from sleep_jax.parallel import sharding
from sleep_jax.sleep import Slept
from sleep_jax.tasks import Task
from sleep_jax.training import judging


def evaluation_sets(
  task: Task,
  tokenizer: Tokenizer,
  run: RunConfig,
  layout: Mapping[str, Any],
  mesh: Mesh,
) -> dict[str, list[Batch]]:
  """The batches of every split that is judged; see `pipeline.eval_batches`.

  Of each this process's share of the rows; there are as many as the mesh cuts.

  Args:
    task: gives the examples.
    tokenizer: turns them into tokens.
    run: says how many, and how many in a batch.
    layout: the arguments that rows are laid out by.
    mesh: over which a batch will lie.

  Raises:
    ValueError: an example does not fit.
  """
  sets = {}
  index, processes = sharding.share_of_rows(mesh)
  parts = sharding.parts_of_rows(mesh)
  for split in task.eval_splits:
    size = task.size(split)
    count = min(run.evaluation_examples, size or run.evaluation_examples)
    rows = min(run.evaluation_batch_size, count)
    batches = pipeline.eval_batches(
      task,
      tokenizer,
      split,
      count,
      batch_size=math.ceil(rows / parts) * parts,
      process_index=index,
      process_count=processes,
      **layout,
    )
    sets[split] = list(batches)
  return sets


def evaluate_sets(
  predict,
  params,
  sets: Mapping[str, list[Batch]],
  modes,
  special_ids: Sequence[int],
  share: int,
  config: ExperimentConfig,
) -> tuple[dict[str, Any], dict[str, float]]:
  """(results by split, metrics) on the first 1 / `share` of the batches.

  A split's results are those at N passes, and, on all batches or with
  `run.log_passes`, "by_passes" those at each of `sleep.evaluation_passes`. With
  `run.log_passes` the metrics have these too, and what each pass did to S.
  """
  results, metrics = {}, {}
  for split, batches in sets.items():
    some = batches[: math.ceil(len(batches) / share)]

    def judged_at(passes, split=split, some=some):
      at = functools.partial(predict, passes=np.int32(passes))
      judged, loss = evaluate(at, params, split, some, modes, special_ids)
      return judged[split], loss

    n = config.sleep.passes
    scores, loss = judged_at(n)
    if share == 1 or config.run.log_passes:
      at_n = dict(scores)
      scores["by_passes"] = {
        str(other): at_n if other == n else judged_at(other)[0]
        for other in config.sleep.evaluation_passes
      }
    results[split] = scores
    metrics[f"eval/{split}/loss"] = loss
    metrics[f"eval/{split}/accuracy"] = scores["overall"]["accuracy"]
    for depth, at_depth in scores["depth"].items():
      metrics[f"eval/{split}/depth_{depth}"] = at_depth["accuracy"]
    if not config.run.log_passes:
      continue
    metrics[f"sleep/{split}/passes"] = scores["sleep"]["passes"]
    for n, at_pass in scores["sleep"]["by_pass"].items():
      metrics[f"sleep/{split}/pass_{n}/norm"] = at_pass["norm"]
      metrics[f"sleep/{split}/pass_{n}/change"] = at_pass["change"]
    for n, woken in scores["by_passes"].items():
      accuracy = woken["overall"]["accuracy"]
      metrics[f"eval/{split}/passes_{n}/accuracy"] = accuracy
  return results, metrics


def evaluate(
  predict,
  params,
  split: str,
  batches: list[Batch],
  modes,
  special_ids: Sequence[int],
) -> tuple[dict[str, Any], float]:
  """(results, mean loss) of a split; `results` as `judging.judge` gives them.

  Beside these stands "sleep": the mean number of "passes" of a sleep, and
  "by_pass", where passes were watched (`step.make_predict`), the mean "norm" of
  S after it and relative "change" of S by it.

  An answer is right when all its tokens, a marker or end token included, are
  the argmax, given the right tokens before them: exactly when greedy decoding
  writes it (`greedy_decode`), at the cost of one pass. Of a row's several
  answers that is so for the first: the others are judged given right ones
  before them, not the model's own.

  Args:
    predict: from `step.make_predict`, its passes given.
    params: the model's parameters.
    batches: the examples, this process's share; rows without a masked place are
      padding.
    split: its name in the results.
    modes: the task's modes, which `Batch.mode` indexes.
    special_ids: the tokens of an answer that are no labels: marker and end.
  """
  loss_sum, predictions, sleeps, whole = 0.0, [], [], []
  for batch in batches:
    batch = sharding.place(batch)
    prediction = predict(params, batch)
    prediction, batch = sharding.fetch((prediction, batch))
    whole.append(batch)
    loss_sum += float(prediction.loss_sum)
    predictions.append(prediction.predictions)
    if prediction.slept is not None:
      sleeps.append(prediction.slept)
  _, targets, mask, _, depth, mode, _ = jax.tree.map(
    lambda *column: np.concatenate(column), *whole
  )
  rows, places = _answers(mask)
  labels = places & ~np.isin(targets, special_ids)[rows]
  results = judging.judge(
    split,
    (np.concatenate(predictions) == targets)[rows],
    places,
    labels,
    [
      tuple(targets[row, its_labels].tolist())
      for row, its_labels in zip(rows, labels, strict=True)
    ],
    depth[rows],
    [modes[i] for i in mode[rows]],
    rows,
  )
  results[split]["sleep"] = _sleep_summary(sleeps)
  return results, loss_sum / int(mask.sum())


def _answers(
  mask: Bool[np.ndarray, "B T"],
) -> tuple[Int[np.ndarray, "n"], Bool[np.ndarray, "n T"]]:
  """(row, places) of every answer: a run of masked places."""
  starts = mask & ~np.pad(mask, ((0, 0), (1, 0)))[:, :-1]
  rows, firsts = np.nonzero(starts)
  number = np.cumsum(starts, axis=1)
  its_number = number[rows, firsts][:, None]
  return rows, mask[rows] & (number[rows] == its_number)


def _sleep_summary(sleeps: list[Slept]) -> dict[str, Any]:
  """Means over all rows that took a pass; see `evaluate`."""
  if not sleeps or not any(x.passes.any() for x in sleeps):
    return {"passes": 0.0, "by_pass": {}}
  passes = np.concatenate([x.passes.ravel() for x in sleeps])
  mean = {"passes": float(passes[passes > 0].mean())}
  if sleeps[0].norms is None:
    return mean | {"by_pass": {}}
  norms, changes = (
    # [windows, N, B] -> [N, windows B]
    np.concatenate(
      [np.moveaxis(x, 1, 0).reshape(x.shape[1], -1) for x in arrays], axis=1
    )
    for arrays in zip(*((x.norms, x.changes) for x in sleeps), strict=True)
  )
  return mean | {
    "by_pass": {
      str(n): {
        "norm": float(norms[n - 1, passes >= n].mean()),
        "change": float(changes[n - 1, passes >= n].mean()),
      }
      for n in range(1, passes.max() + 1)
    }
  }


def greedy_decode(predict, params, batch: Batch) -> Any:
  """Tokens [B, T] that the model writes by itself at the masked places.

  The answers in `batch.inputs` are not looked at: after a masked place the
  input is the argmax there. All others, such as prompts, are given.
  """
  rank = np.cumsum(batch.loss_mask, axis=1) * batch.loss_mask
  inputs = np.array(batch.inputs)
  inputs[:, 1:][batch.loss_mask[:, :-1]] = 0  # unknown yet
  written = np.zeros_like(batch.targets)
  for place in range(1, rank.max(initial=0) + 1):
    predictions = sharding.fetch(
      predict(params, batch._replace(inputs=inputs)).predictions
    )
    here = rank == place
    written = np.where(here, predictions, written)
    following = here[:, :-1]
    inputs[:, 1:][following] = written[:, :-1][following]
  return written
