"""Tokens a second of training, by window length L and passes N.

  python -m experiments.throughput --json=throughput.json --plot=throughput.png

The step that a run takes, optimizer included. By L: N = 1 and a loss on every
token, against a fully parallel step of equal FLOPs, the same tokens as
independent rows of one window each: what is lost is the price of windows that
follow each other. By N: of the longest L, with a loss in the last window alone,
so that all others sleep. Parameters and tokens are random. Each round takes one
step of each cell, so that a slow moment of the machine meets them all.

Rows have the config's data.length, rounded up to whole windows of every L, and
four of the longest at least. By default a model of a million parameters and
rows of 2,048 tokens; `--config=experiments/math.py` chooses another.
"""

import dataclasses
import math
import sys
import time
from typing import Any

from experiments import measuring
from experiments.surroundings import surroundings

_LEAST_WINDOWS = 4
# From here on the paper's figure has windows cost little.
_LONG = 256


def default_config():
  """Four blocks; rows enough that a window of 256 keeps a CPU busy."""
  import jax

  from sleep_jax.config import ExperimentConfig, ModelConfig

  config = ExperimentConfig(
    model=ModelConfig(pattern=((("attn", "gdn"), 2),), width=128, mlp_width=512)
  )
  return dataclasses.replace(
    config,
    data=dataclasses.replace(
      config.data, length=2048, batch_size=2 * jax.device_count()
    ),
  )


def cells(config, windows, passes) -> list[dict[str, Any]]:
  """What is measured: "config", "window", "passes", "kind".

  Kinds: "parallel", "windowed" (N = 1, a loss everywhere), "sleeping".
  """
  unit, least = math.lcm(*windows), _LEAST_WINDOWS * max(windows)
  length = unit * math.ceil(max(least, config.data.length) / unit)

  def cell(kind, window, n):
    rows = length // window if kind == "parallel" else 1
    changed = dataclasses.replace(
      config,
      sleep=dataclasses.replace(
        config.sleep,
        window_length=window,
        passes=n,
        sampled_passes=False,
        pass_loss=0.0,
      ),
      data=dataclasses.replace(
        config.data,
        length=length // rows,
        batch_size=config.data.batch_size * rows,
        align_answer=False,
        answer_length=0,
      ),
    )
    return {"config": changed, "window": window, "passes": n, "kind": kind}

  by_window = [
    cell(kind, x, 1) for x in windows for kind in ("windowed", "parallel")
  ]
  return by_window + [cell("sleeping", max(windows), n) for n in passes]


def measure(config, windows, passes, rounds: int) -> dict[str, Any]:
  """The report: `cells`, each with "seconds" (of each step), "tokens", "flops".

  FLOPs are `train_step_flops`, of one step.
  """
  import jax
  import numpy as np

  from sleep_jax.baselines import train_step_flops
  from sleep_jax.data.pipeline import Batch
  from sleep_jax.data.source import task_and_tokenizer, vocabulary_size
  from sleep_jax.model.hybrid_lm import HybridLM
  from sleep_jax.parallel import sharding
  from sleep_jax.training import optimizers
  from sleep_jax.training.step import draw_passes, init_state, make_train_step

  _, tokenizer = task_and_tokenizer(config)
  vocabulary = vocabulary_size(config, tokenizer)
  mesh = sharding.make_mesh(config)
  model = HybridLM(config.model, vocabulary)
  optimizer = optimizers.optimizer(config.optimizer, max(config.run.steps, 1))
  # One for all cells: whatever the windows, a step gives a state alike.
  state = init_state(model, optimizer, config, mesh)

  def batch(data, window, kind):
    shape = data.batch_size, data.length
    tokens = np.random.default_rng(0).integers(
      0, vocabulary, shape, dtype=np.int32
    )
    everywhere = np.ones(shape, np.bool_)
    loss_mask = everywhere.copy()
    if kind == "sleeping":
      loss_mask[:, :-window] = False
    label = np.zeros(shape[:1], np.int32)
    targets = np.roll(tokens, -1, axis=1)
    arrays = tokens, targets, loss_mask, everywhere, label, label
    return sharding.place(Batch(*arrays))

  with jax.set_mesh(mesh):
    measured = cells(config, windows, passes)
    steps = []
    for cell in measured:
      its = cell.pop("config")
      rows = batch(its.data, cell["window"], cell["kind"])
      arguments = rows, draw_passes(its, 1)
      step = make_train_step(model, optimizer, its)
      compiled = step.lower(state, *arguments).compile()
      steps.append((compiled, arguments))
      cell["tokens"] = its.data.batch_size * its.data.length
      cell["flops"] = train_step_flops(its, vocabulary).total
      cell["seconds"] = []
    for i in range(rounds + 1):
      for cell, (step, arguments) in zip(measured, steps, strict=True):
        began = time.perf_counter()
        state, _ = jax.block_until_ready(step(state, *arguments))
        if i:  # the first is to warm up
          cell["seconds"].append(time.perf_counter() - began)

  return {
    "cells": measured,
    "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
    "vocabulary": vocabulary,
    **surroundings(),
    "model": dataclasses.asdict(config.model),
  }


def _by_kind(report, kind) -> dict[tuple[int, int], dict[str, Any]]:
  return {
    (x["window"], x["passes"]): x for x in report["cells"] if x["kind"] == kind
  }


def verdicts(report) -> list[str]:
  """What the numbers say, a sentence each."""
  import numpy as np

  said, long = [], []
  parallel = _by_kind(report, "parallel")
  for key, x in _by_kind(report, "windowed").items():
    other = parallel[key]
    # By rounds: both of a pair ran in the same moment.
    lost = 1 - np.array(other["seconds"]) / np.array(x["seconds"])
    low, middle, high = np.quantile(lost, (0.25, 0.5, 0.75))
    said.append(
      f"L = {key[0]}: {middle:+.1%} lost against the parallel step (median of "
      f"{len(lost)} rounds, quartiles {low:+.1%} to {high:+.1%}; "
      f"{x['flops'] / other['flops']:.4f} of its FLOPs)"
    )
    if key[0] >= _LONG:
      long.append(middle)
  if long:
    verdict = "yes" if max(long) < 0.1 else "NO"
    said.append(f"under 10% lost at every L >= {_LONG}: {verdict}")
  sleeping = _by_kind(report, "sleeping")
  passes = np.array([n for _, n in sleeping])
  times = np.array([np.median(x["seconds"]) for x in sleeping.values()])
  if len(passes) > 2:
    base, slope, off = measuring.affine(passes, times)
    said.append(
      f"a step of L = {max(x for x, _ in sleeping)}: {1e3 * base:.0f} ms + "
      f"{1e3 * slope:.0f} ms x N, within {off:.1%}"
    )
  if len(passes) > 1:
    few, *_, many = (np.array(x["seconds"]) for x in sleeping.values())
    low, middle, high = np.quantile(few / many, (0.25, 0.5, 0.75))
    said.append(
      f"N = {passes[-1]} trains {middle:.2f} of the tokens a second of N = "
      f"{passes[0]} (median of {len(few)} rounds, quartiles {low:.2f} to "
      f"{high:.2f})"
    )
  return said


def table(report) -> str:
  """The cells, a line each; medians, and the quartiles' distance to them."""
  import numpy as np

  lines = ["    kind     L   N   s/step  quartiles   tokens/s  GFLOPs  GFLOP/s"]
  for x in report["cells"]:
    low, seconds, high = np.quantile(x["seconds"], (0.25, 0.5, 0.75))
    lines.append(
      f"{x['kind']:>8}{x['window']:>6}{x['passes']:>4}{seconds:>9.3f}"
      f"{f'{low:.3f}-{high:.3f}':>13}{x['tokens'] / seconds:>9.1f}"
      f"{x['flops'] / 1e9:>8.2f}{x['flops'] / 1e9 / seconds:>9.2f}"
    )
  return "\n".join(lines)


def check(config) -> None:
  """ValueError where the config's model never sleeps."""
  if config.sleep.eviction == "none":
    raise ValueError(
      "the config's model has one window and never sleeps: set "
      "sleep.eviction to 'hard' or 'sliding'"
    )


if __name__ == "__main__":
  measuring.run(
    sys.modules[__name__],
    {
      "windows": ("64,256,512", "L"),
      "passes": ("1,2,4", "N of the sleeps"),
    },
    rounds=12,
    figure="throughput",
  )
