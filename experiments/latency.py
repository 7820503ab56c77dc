"""What a token costs awake, and what a sleep costs, by history and passes.

  python -m experiments.latency --json=latency.json --plot=latency.png

A session at each N against a transformer that keeps all keys and values: the
same model with attention in place of every fast-weight block. Parameters are
random, histories are random tokens, one sequence, greedy decoding: the times do
not depend on what is written. Histories are read before the clock runs; cells
take turns in every round, so that a slow moment of the machine meets them all.

By default a model of 5 million parameters with a window of 128 tokens;
`--config=experiments/math.py` chooses another.
"""

import dataclasses
import sys
import time
from typing import Any

from experiments import measuring
from experiments.surroundings import surroundings

# Tokens between two readings of the clock.
_BLOCK = 32
# Whole windows take long, and average over themselves.
_ROUNDS_A_WINDOW = 4


def default_config():
  """Fast weights as large as attention: their blocks have equal parameters."""
  from sleep_jax.config import ExperimentConfig, ModelConfig, SleepConfig

  return ExperimentConfig(
    model=ModelConfig(
      pattern=((("attn", "gdn"), 2),),
      width=256,
      attention_heads=4,
      key_value_heads=4,
      fast_weight_heads=4,
      key_dim=32,
      value_dim=64,
      mlp_width=1024,
    ),
    sleep=SleepConfig(window_length=128),
    data=dataclasses.replace(ExperimentConfig().data, length=256),
  )


def measure(config, passes, histories, rounds: int) -> dict[str, Any]:
  """The report: "cells", one for each N (0 is the full cache) and history.

  A cell has "passes", "history" (windows), "seconds_per_token" and
  "p95_seconds_per_token" (medians and 95% points over rounds, of the mean over
  some tokens inside a window), "noise" (of that median: how far medians of a
  quarter of the rounds lie apart, relative to it), "tokens_per_second" (over a
  whole window and its sleep), "stall_seconds" (of a sleep, median),
  "state_bytes" (all that a session keeps), "kv_bytes" of these.
  """
  import jax
  import numpy as np

  from sleep_jax.baselines import full_cache
  from sleep_jax.config import SleepConfig
  from sleep_jax.data.source import task_and_tokenizer, vocabulary_size
  from sleep_jax.model.hybrid_lm import HybridLM
  from sleep_jax.model.places import KeyValueCache
  from sleep_jax.session import Session
  from sleep_jax.training.step import init_params

  _, tokenizer = task_and_tokenizer(config)
  vocabulary = vocabulary_size(config, tokenizer)
  length = config.sleep.window_length
  block = min(_BLOCK, length - 1)
  tokens = np.random.default_rng(0).integers(
    0, vocabulary, (1, length * max(histories)), dtype=np.int32
  )

  def read(session, params, state, start, stop, **options):
    """A window at a time, also where nothing is evicted."""
    for begin in range(start * length, stop * length, length):
      piece = tokens[:, begin : begin + length]
      state = session.feed(params, state, piece, **options)
    return state

  def timed(run):
    jax.block_until_ready(run())  # compiled, and warm
    readings = []

    def again():
      began = time.perf_counter()
      jax.block_until_ready(run())
      readings.append(time.perf_counter() - began)

    return again, readings

  def sizes(state):
    leaves = jax.tree.leaves(
      state.cache, is_leaf=lambda x: isinstance(x, KeyValueCache)
    )
    leaves += jax.tree.leaves(
      state.start.cache, is_leaf=lambda x: isinstance(x, KeyValueCache)
    )
    kv = [x.keys.nbytes * 2 for x in leaves if isinstance(x, KeyValueCache)]
    return {
      "state_bytes": sum(x.nbytes for x in jax.tree.leaves(state)),
      "kv_bytes": sum(kv),
    }

  def cell(session, params, full, n, history, options):
    """(clocks by name, what is known of the cell already)."""
    inside = session.feed(params, full, tokens[:, :1], **options)

    def decode():
      return session.generate(params, inside, block, **options)

    clocks = {"decode": timed(decode)}
    if n:

      def window():
        return session.generate(params, full, length, **options)

      def sleep():
        return session.sleep(params, full, **options)

      clocks |= {"window": timed(window), "sleep": timed(sleep)}
    known = {"passes": n, "history": history} | sizes(full)
    return clocks, known

  cells = []
  # Every token of the window at once: the loops of a sleep have few trips.
  sleeping = Session(
    HybridLM(config.model, vocabulary),
    dataclasses.replace(config.sleep, tolerance=0.0),
  )
  params = init_params(sleeping.model, 0)
  for n in passes:
    state, read_so_far = sleeping.start(1), 0
    for history in histories:
      state = read(sleeping, params, state, read_so_far, history, passes=n)
      read_so_far = history
      cells.append(cell(sleeping, params, state, n, history, {"passes": n}))
  model = HybridLM(full_cache(config).model, vocabulary)
  full_params = init_params(model, 0)
  for history in histories:
    # As much as is decoded, and no more.
    capacity = history * length + block + 1
    keeping = Session(
      model, SleepConfig(1, window_length=capacity, eviction="none")
    )
    state = read(keeping, full_params, keeping.start(1), 0, history)
    cells.append(cell(keeping, full_params, state, 0, history, {}))

  for i in range(rounds):
    for clocks, _ in cells:
      for name, (again, _) in clocks.items():
        if name != "window" or i % _ROUNDS_A_WINDOW == 0:
          again()

  def summary(clocks, known):
    readings = {name: np.array(x) for name, (_, x) in clocks.items()}
    each = readings["decode"] / block
    quarters = [np.median(x) for x in np.array_split(each, 4)]
    median = float(np.median(each))
    after = {
      "seconds_per_token": median,
      "p95_seconds_per_token": float(np.quantile(each, 0.95)),
      "noise": float(np.ptp(quarters)) / median,
      "tokens_per_second": 1 / median,
      "stall_seconds": 0.0,
    }
    if "window" in readings:
      after["tokens_per_second"] = length / float(np.median(readings["window"]))
      after["stall_seconds"] = float(np.median(readings["sleep"]))
    return known | after

  def count(params):
    return sum(x.size for x in jax.tree.leaves(params))

  return {
    "cells": [summary(*x) for x in cells],
    "window_length": length,
    "parameters": count(params),
    "full_cache_parameters": count(full_params),
    "vocabulary": vocabulary,
    "rounds": rounds,
    "tokens_per_reading": block,
    **surroundings(),
    "model": dataclasses.asdict(config.model),
  }


def verdicts(report) -> list[str]:
  """What the numbers say, a sentence each."""
  import numpy as np

  cells = {(x["passes"], x["history"]): x for x in report["cells"]}
  passes = sorted({n for n, _ in cells if n})
  histories = sorted({history for _, history in cells})
  few, many = passes[0], passes[-1]
  short, long = histories[0], histories[-1]

  def cost(n, history):
    return cells[n, history]["seconds_per_token"]

  def noise(*some):
    return max(cells[x]["noise"] for x in some)

  said = []
  ratios = [cost(many, x) / cost(few, x) for x in histories]
  around = [noise((many, x), (few, x)) for x in histories]
  said.append(
    f"a token at N = {many} against N = {few}: {np.median(ratios) - 1:+.1%} "
    f"(median over histories, {min(ratios) - 1:+.1%} to {max(ratios) - 1:+.1%};"
    f" noise of a cell {np.median(around):.1%})"
  )
  ratios = [cost(n, long) / cost(n, short) for n in passes]
  around = [noise((n, long), (n, short)) for n in passes]
  said.append(
    f"a token after {long} windows against {short}: "
    f"{np.median(ratios) - 1:+.1%} (median over N, {min(ratios) - 1:+.1%} to "
    f"{max(ratios) - 1:+.1%}; noise of a cell {np.median(around):.1%})"
  )
  if len(passes) > 2:
    stalls = [
      np.median([cells[n, x]["stall_seconds"] for x in histories])
      for n in passes
    ]
    base, slope, off = measuring.affine(passes, stalls)
    said.append(
      f"a sleep: {1e3 * base:.1f} ms + {1e3 * slope:.1f} ms x N, within "
      f"{off:.1%}"
    )
  sizes = {x["state_bytes"] for (n, _), x in cells.items() if n}
  said.append(
    f"the state: {min(sizes)} bytes"
    + ("" if len(sizes) == 1 else f" to {max(sizes)}: not constant")
  )
  awake = np.median([cost(n, long) for n in passes])
  # What must be read for a token at least; our cache is also copied.
  least_bytes = [
    4 * report[parameters] + cells[n, long]["kv_bytes"]
    for parameters, n in (("parameters", few), ("full_cache_parameters", 0))
  ]
  said.append(
    f"the full cache after {long} windows: {cost(0, long) / awake:.1f} times "
    "as slow; parameters, keys and values are "
    f"{least_bytes[1] / least_bytes[0]:.1f} times the bytes"
  )
  return said


def table(report) -> str:
  """The cells, a line each."""
  header = (
    "         N  history  ms/token    p95  noise  tokens/s  stall ms"
    " state MiB   KV MiB"
  )
  lines = [header]
  for x in report["cells"]:
    name = f"N = {x['passes']}" if x["passes"] else "full cache"
    stall = f"{1e3 * x['stall_seconds']:.1f}" if x["passes"] else "-"
    lines.append(
      f"{name:>10}{x['history']:>8}x{1e3 * x['seconds_per_token']:>10.3f}"
      f"{1e3 * x['p95_seconds_per_token']:>7.2f}{x['noise']:>7.1%}"
      f"{x['tokens_per_second']:>10.1f}{stall:>10}"
      f"{x['state_bytes'] / 2**20:>10.2f}{x['kv_bytes'] / 2**20:>9.2f}"
    )
  return "\n".join(lines)


def check(config) -> None:
  """ValueError where the config's model never sleeps."""
  if config.sleep.eviction == "none" or config.sleep.window_length < 2:
    raise ValueError(
      "the config's model never sleeps, or its window is one token: set "
      "sleep.eviction to 'hard' and sleep.window_length above 1"
    )


if __name__ == "__main__":
  measuring.run(
    sys.modules[__name__],
    {
      "passes": ("1,2,4,8", "N of the sleeps"),
      "histories": ("1,4,16,64", "in windows"),
    },
    rounds=16,
    figure="latency",
  )
