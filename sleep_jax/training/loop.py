"""The whole run of an experiment: data, training, judging, records."""

import dataclasses
import functools
import math
import os
import time
from typing import Any

import jax
import numpy as np
from absl import logging

from sleep_jax.config import ExperimentConfig
from sleep_jax.data import pipeline
from sleep_jax.data.source import task_and_tokenizer, vocabulary_size
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.training import checkpoints, judging, optimizers, workdir
from sleep_jax.training.evaluate import (
  evaluate_sets,
  evaluation_sets,
  greedy_decode,
)
from sleep_jax.training.metrics import MetricsWriter
from sleep_jax.training.step import (
  TrainState,
  draw_passes,
  init_params,
  make_predict,
  make_train_step,
)

_EXAMPLES_SHOWN = 4
# Evaluations during training use one of this many batches.
_SHARE_ON_THE_WAY = 4


def train(config: ExperimentConfig, path: str | os.PathLike) -> dict[str, Any]:
  """Trains (or resumes), judges, and returns the results by split.

  What it writes to the workdir `path`: config.json, metrics.jsonl,
  checkpoints/ and results.json. A run that was stopped goes on from its last
  checkpoint and ends with the bits that it would have ended with.

  Raises:
    ValueError: the config, the data or the workdir cannot be used.
    OSError: something could not be written; what was saved stays.
  """
  # Data first: what is wrong with it should be known before compiling.
  run = config.run
  task, tokenizer = task_and_tokenizer(config)
  layout = dict(
    length=config.data.length,
    window_length=config.sleep.window_length,
    align_answer=config.data.align_answer,
  )
  evaluation = evaluation_sets(task, tokenizer, run, layout)
  batches = pipeline.train_iterator(
    task,
    tokenizer,
    batch_size=config.data.batch_size,
    seed=config.data.seed,
    process_index=jax.process_index(),
    process_count=jax.process_count(),
    **layout,
  )
  model = HybridLM(config.model, vocabulary_size(config, tokenizer))
  params = init_params(model, run.seed)
  if run.init_from and not checkpoints.is_started(path):
    params = checkpoints.restore_params(run.init_from, params)
  folder = workdir.open_workdir(path, dataclasses.asdict(config))

  optimizer = optimizers.optimizer(config.optimizer, max(run.steps, 1))
  state = TrainState(params, optimizer.init(params))
  train_step = make_train_step(model, optimizer, config)
  predict = make_predict(model, config)

  def judge(params, share: int = 1):
    return evaluate_sets(predict, params, evaluation, task.modes, share, config)

  with checkpoints.Checkpoints(folder) as saved:
    start, restored = 0, saved.restore_latest(*state, batches)
    if restored is not None:
      start, *arrays = restored
      state = TrainState(*arrays)
      logging.info("resuming from step %d", start)
    with MetricsWriter(
      folder,
      total_steps=run.steps,
      start_step=start,
      tensorboard=run.tensorboard,
      process_index=jax.process_index(),
    ) as writer:
      if start < run.steps:
        state = _steps(
          config, start, state, train_step, batches, judge, saved, writer
        )
      results, metrics = judge(state.params)
      writer.write(run.steps, metrics)
  judging.write_results(folder, results)
  predict_at_n = functools.partial(
    predict, passes=np.int32(config.sleep.passes)
  )
  _show_examples(predict_at_n, state.params, evaluation, tokenizer)
  return results


def _steps(config, start, state, train_step, batches, judge, saved, writer):
  """Takes the steps from `start` on and returns the last state."""
  run = config.run
  multiplier = optimizers.schedule(config.optimizer, run.steps)
  began = last_line = time.perf_counter()
  waited, recent, due = 0.0, [], None

  def write_line(step, recent, waited):
    """Reads the metrics, which waits for their steps, and writes a line."""
    nonlocal last_line
    means = {
      name: float(np.mean([metrics[name] for metrics in recent]))
      for name in recent[0]
    }
    if not math.isfinite(means["loss"] + means["grad_norm"]):
      raise ValueError(
        f"loss or gradient is not finite near step {step}: lower "
        "optimizer.muon_learning_rate; the last checkpoint is intact"
      )
    now = time.perf_counter()
    rate = len(recent) / (now - last_line)
    learning_rate = config.optimizer.muon_learning_rate * multiplier(step - 1)
    writer.write(
      step,
      means
      | {
        "learning_rate": learning_rate,
        "steps_per_second": rate,
        "tokens_per_second": rate * config.data.batch_size * config.data.length,
        "data_wait_fraction": waited / (now - last_line),
        "seconds": now - began,
      },
    )
    last_line = now

  for step in range(start + 1, run.steps + 1):
    before = time.perf_counter()
    batch = next(batches)
    waited += time.perf_counter() - before
    passes = draw_passes(config, step)
    state, metrics = train_step(state, batch, passes)
    recent.append(metrics)
    if step == start + 1:
      jax.block_until_ready(metrics)
      logging.info(
        "first step, compiling: %.1f s", time.perf_counter() - before
      )
      last_line, waited = time.perf_counter(), 0.0
    if due is not None:  # one step late, so that a step is always running
      write_line(*due)
      due = None
    last = step == run.steps
    evaluates = not last and step % run.evaluate_every == 0
    saves = last or step % run.checkpoint_every == 0
    # A line before each save: what is saved has been seen to be finite, and a
    # run that goes on from there averages over the same steps.
    if saves or step % run.log_every == 0:
      due = step, recent, waited
      waited, recent = 0.0, []
    if not evaluates and not saves:
      continue
    jax.block_until_ready(metrics)
    if due is not None:
      write_line(*due)
      due = None
    before = time.perf_counter()
    if evaluates:
      writer.write(step, judge(state.params, _SHARE_ON_THE_WAY)[1])
    if saves:
      saved.save(step, *state, batches)
    # Neither belongs to the steps' own speed.
    last_line += time.perf_counter() - before
  return state


def _show_examples(predict, params, evaluation, tokenizer):
  """Logs a few held-out examples with what the model writes."""
  for split, batches in evaluation.items():
    batch = batches[0]
    written = greedy_decode(predict, params, batch)
    for row in range(min(_EXAMPLES_SHOWN, batch.inputs.shape[0])):
      mask = batch.loss_mask[row]
      context = batch.inputs[row][batch.valid[row] & ~mask]
      logging.info(
        "%s: %s -> %s (right: %s)",
        split,
        tokenizer.decode(context),
        tokenizer.decode(written[row][mask]),
        tokenizer.decode(batch.targets[row][mask]),
      )
