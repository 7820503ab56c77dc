"""The whole run of an experiment: data, training, judging, records."""

import contextlib
import dataclasses
import functools
import math
import os
import re
import time
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from pallas_kernels.chips import peak_flops
from sleep_jax.array_types import by_name
from sleep_jax.config import ExperimentConfig
from sleep_jax.data import pipeline
from sleep_jax.data.source import task_and_tokenizer, vocabulary_size
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.parallel import sharding
from sleep_jax.training import checkpoints, judging, optimizers, workdir
from sleep_jax.training.evaluate import (
  evaluate_sets,
  evaluation_sets,
  greedy_decode,
)
from sleep_jax.training.host_memory import keep_freed_memory
from sleep_jax.training.metrics import MetricsWriter
from sleep_jax.training.preemption import Preempted, Preemption
from sleep_jax.training.step import (
  TrainState,
  abstract_state,
  draw_passes,
  init_state,
  make_predict,
  make_train_step,
  model_flops,
)

_EXAMPLES_SHOWN = 4
# Evaluations during training use one of this many batches.
_SHARE_ON_THE_WAY = 4


@contextlib.contextmanager
def _errors_explained():
  """Says of what the runtime raises what a user can do about it."""
  try:
    yield
  except MemoryError as error:
    raise ValueError(
      "this machine's own memory does not suffice: lower data.length, "
      "data.batch_size, run.evaluation_batch_size or run.evaluation_examples"
    ) from error
  except jax.errors.JaxRuntimeError as error:
    # Where a step is at fault, a note has its memory table.
    said = [str(error).splitlines()[0], *getattr(error, "__notes__", [])]
    if "RESOURCE_EXHAUSTED" in said[0] or "out of memory" in said[0].lower():
      raise ValueError(
        f"out of memory ({'; '.join(said)}): less is taken with a higher "
        "optimizer.accumulation_steps, with sleep.remat_windows or "
        "sleep.remat_passes, and with more devices in mesh.fsdp; the last "
        "checkpoint is intact"
      ) from error
    if jax.process_count() > 1:
      raise ConnectionError(
        f"another process may have ended: {said[0]}"
      ) from error
    raise


@_errors_explained()
def train(config: ExperimentConfig, path: str | os.PathLike) -> dict[str, Any]:
  """Trains (or resumes), judges, and returns the results by split.

  What it writes to the workdir `path`: config.json, metrics.jsonl,
  checkpoints/ and results.json. A run that was stopped goes on from its last
  checkpoint and ends with the bits that it would have ended with. On a CPU the
  process keeps what it frees, until it ends: Depo's pocket size then trains 1.6
  times as fast with N = 1.

  Raises:
    ValueError: the config, the data or the workdir cannot be used; the loss or
      a gradient is not finite, or memory does not suffice.
    OSError: something could not be written; what was saved stays.
    Preempted: SIGTERM came, and all is saved.
  """
  # Data first: what is wrong with it should be known before compiling.
  run = config.run
  mesh = sharding.make_mesh(config)
  if jax.default_backend() == "cpu":
    keep_freed_memory()
  task, tokenizer = task_and_tokenizer(config)
  splits = "|".join(map(re.escape, task.eval_splits))
  metric = rf"eval/({splits})/(accuracy|depth_\d+)"
  if run.keep_best and not re.fullmatch(metric, run.keep_best):
    raise ValueError(
      f"run.keep_best = {run.keep_best!r}: no evaluation gives it, or it is "
      f"not the better the higher; give eval/{task.eval_splits[0]}/accuracy"
    )
  layout = dict(
    length=config.data.length,
    window_length=config.sleep.window_length,
    align_answer=config.data.align_answer,
    answer_length=config.data.answer_length,
  )
  evaluation = evaluation_sets(task, tokenizer, run, layout, mesh)
  index, processes = sharding.share_of_rows(mesh)
  batches = pipeline.train_iterator(
    task,
    tokenizer,
    batch_size=config.data.batch_size,
    seed=config.data.seed,
    passes=config.sleep.passes if config.sleep.pass_loss else 0,
    process_index=index,
    process_count=processes,
    **layout,
  )
  model = HybridLM(config.model, vocabulary_size(config, tokenizer))
  optimizer = optimizers.optimizer(config.optimizer, max(run.steps, 1))
  # A run that has started needs what it started from no more.
  started = checkpoints.is_started(path)
  state = (abstract_state if started else init_state)(
    model, optimizer, config, mesh
  )
  optimizers.check_stages(state.params, config)
  folder = workdir.open_workdir(
    path, dataclasses.asdict(config), jax.process_index()
  )
  with Preemption() as preemption, jax.set_mesh(mesh):
    make_step = functools.partial(make_train_step, model, optimizer)
    predict = make_predict(model, config)

    def judge(params, share: int = 1):
      def predict_or_end(*arguments, **options):
        if preemption.noticed():
          raise Preempted("told to end while judging")
        return predict(*arguments, **options)

      return evaluate_sets(
        predict_or_end,
        params,
        evaluation,
        task.modes,
        (tokenizer.marker_id, tokenizer.end_id),
        share,
        config,
      )

    with checkpoints.Checkpoints(
      folder, run.keep_last, run.keep_every, run.keep_best
    ) as saved:
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
          # What SIGTERM has cut short is made up for.
          due = start and start % run.evaluate_every == 0
          if due and not multihost_utils.broadcast_one_to_all(writer.judged):
            _, judged = judge(state.params, _SHARE_ON_THE_WAY)
            writer.write(start, judged)
          state = _steps(
            *(model, config, start, state, make_step, batches),
            *(judge, saved, writer, preemption),
          )
        results, metrics = judge(state.params)
        writer.write(run.steps, metrics)
    if jax.process_index() == 0:
      judging.write_results(folder, results)
    predict_at_n = functools.partial(
      predict, passes=np.int32(config.sleep.passes)
    )
    _show_examples(predict_at_n, state.params, evaluation, tokenizer)
  return results


def _steps(
  model,
  config,
  start,
  state,
  make_step,
  batches,
  judge,
  saved,
  writer,
  preemption,
) -> TrainState:
  """Takes the steps from `start` on and returns the last state."""
  run, compiled = config.run, None
  first, final = run.profile_steps or (1, 0)
  # Those of them that are taken here.
  profiled = range(max(first, start + 1), min(final, run.steps) + 1)
  lines = _Lines(config, state.params, writer)
  try:
    for step in range(start + 1, run.steps + 1):
      before = time.perf_counter()
      batch = sharding.place(next(batches))
      lines.waited += time.perf_counter() - before
      arguments = state, batch, draw_passes(config, step)
      now = config.at_step(step)
      if compiled is None:
        lines.flops = model_flops(model, config, state.params, batch)
      if compiled is None or now != config.at_step(step - 1):
        compiled = make_step(now).lower(*arguments).compile()
        # Else one that has it cached would try in vain to connect to those that
        # compile: see `distributed.start`.
        multihost_utils.sync_global_devices("compiled")
        seconds = time.perf_counter() - before
        logging.info("compiled in %.1f s: %s", seconds, memory_table(compiled))
        lines.skip(seconds)
      if step in profiled[:1]:
        jax.profiler.start_trace(str(writer.workdir / "profile"))
      state, metrics = compiled(*arguments)
      lines.flush()  # of the step before, so that a step is always running
      lines.add(metrics)
      if step in profiled[-1:]:
        jax.block_until_ready(metrics)
        jax.profiler.stop_trace()

      last, ends = step == run.steps, preemption.noticed()
      saves = last or ends or step % run.checkpoint_every == 0
      evaluates = step % run.evaluate_every == 0 and not ends
      # The last step is judged on more, after this; but the best is chosen by
      # one and the same measure.
      if last and not run.keep_best:
        evaluates = False
      # A line before each save: what is saved has been seen to be finite.
      if saves or step % run.log_every == 0:
        lines.end(step)
      if not evaluates and not saves:
        continue
      jax.block_until_ready(metrics)
      lines.flush()
      before, judged = time.perf_counter(), None
      if evaluates:
        try:
          _, judged = judge(state.params, _SHARE_ON_THE_WAY)
          writer.write(step, judged)
        except Preempted:
          ends = True
          lines.end(step)
          lines.flush()
      if saves or ends:
        saved.save(step, *state, batches, judged)
      if ends:
        raise Preempted(f"told to end: step {step} is saved")
      # Neither belongs to the steps' own speed.
      lines.skip(time.perf_counter() - before)
  except jax.errors.JaxRuntimeError as error:
    if compiled is not None:
      error.add_note(f"a step takes {memory_table(compiled)}")
    raise
  return state


class _Lines:
  """Lines of metrics: means over the steps since the line before."""

  def __init__(self, config, params, writer):
    self._config, self._writer = config, writer
    self._multiplier = optimizers.schedule(config.optimizer, config.run.steps)
    paths = by_name(params)
    # What `bad_leaf` of the metrics counts.
    self._leaves = [*(f"the gradient of {path}" for path in paths), *paths]
    self._began = self._last = time.perf_counter()
    # Seconds that steps have waited for data; model FLOPs of a step, if known.
    self.waited = 0.0
    self.flops: int | None = None
    self._recent: list[Any] = []
    self._due: tuple | None = None

  def add(self, metrics) -> None:
    """The metrics of one more step, which may still be running."""
    self._recent.append(metrics)

  def skip(self, seconds: float) -> None:
    """Leaves out seconds that are not the steps' own."""
    self._last += seconds

  def end(self, step: int) -> None:
    """A line ends with this step, to be written by `flush`."""
    if self._recent:
      self._due = step, self._recent, self.waited
      self._recent, self.waited = [], 0.0

  def flush(self) -> None:
    """Writes the line that is due, if any, which waits for its steps.

    Raises:
      ValueError: something in it is not finite.
    """
    if self._due is None:
      return
    (step, recent, waited), self._due = self._due, None
    recent = jax.device_get(recent)
    config, now = self._config, time.perf_counter()
    rate = len(recent) / (now - self._last)
    values = {
      name: np.array([metrics[name] for metrics in recent])
      for name in recent[0]
    }
    bad = values.pop("bad_leaf")
    right = np.isfinite(values["loss"] + values["grad_norm"])
    in_a_row = values.pop("skipped_in_a_row", np.where(right, 0, 1))
    means = {
      name: float(x[right].mean()) if right.any() else math.nan
      for name, x in values.items()
    }
    if "skipped_steps" in values:
      means["skipped_steps"] = int(values["skipped_steps"][-1])
    if self.flops is not None:
      means["model_flops_per_second"] = rate * self.flops
      if peak := peak_flops(jax.devices()[0].device_kind):
        means["model_flop_utilization"] = (
          rate * self.flops / (jax.device_count() * peak)
        )
    learning_rate = config.optimizer.muon_learning_rate
    taken = step - means.get("skipped_steps", 0)
    self._writer.write(
      step,
      means
      | {
        "learning_rate": learning_rate * self._multiplier(taken - 1),
        "steps_per_second": rate,
        "tokens_per_second": rate * config.data.batch_size * config.data.length,
        "data_wait_fraction": waited / (now - self._last),
        "seconds": now - self._began,
      },
    )
    self._last = now
    over = in_a_row > config.optimizer.skipped_steps
    over |= ~np.isfinite(values["param_norm"])
    if over.any():
      first = int(np.argmax(over))
      where = self._leaves[bad[first]] if bad[first] >= 0 else "the loss"
      step = step - len(recent) + 1 + first
      raise ValueError(
        f"{where} is not finite at step {step}: lower "
        "optimizer.muon_learning_rate; the last checkpoint is intact"
      )


def memory_table(compiled) -> str:
  """What the compiler says that a program takes on each device."""
  memory = compiled.memory_analysis()
  parts = "argument output temp generated_code".split()
  sizes = {part: getattr(memory, f"{part}_size_in_bytes") for part in parts}
  return ", ".join(
    f"{part} {size / 2**20:.1f} MiB" for part, size in sizes.items()
  )


def _show_examples(predict, params, evaluation, tokenizer):
  """Logs a few held-out examples with what the model writes."""
  for split, batches in evaluation.items():
    batch = sharding.fetch(sharding.place(batches[0]))
    written = greedy_decode(predict, params, batch)
    for row in range(min(_EXAMPLES_SHOWN, batch.inputs.shape[0])):
      inputs, targets, mask, valid = (x[row] for x in batch[:4])
      first = int(np.argmax(mask))
      before = slice(first + 1)
      logging.info(
        "%s: %s -> %s (right: %s)",
        split,
        tokenizer.decode(inputs[before][valid[before]]),
        # Between answers stand the prompts.
        tokenizer.decode(np.where(mask, written[row], targets)[first:]),
        tokenizer.decode(targets[first:]),
      )
