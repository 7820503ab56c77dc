"""Kept answers of the naive loop at N = 4: what has changed since is a mistake.

  python -m tests.test_golden

writes them anew: weights, rows, the loss and each block's S.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.rollout import rollout
from tests import naive
from tests.test_rollout import (
  JET_NEMOTRON,
  OURO,
  VOCABULARY,
  WINDOW,
  make,
  sleep_config,
)

FOLDER = Path(__file__).parent / "golden"
CASES = {
  "jet_nemotron": (JET_NEMOTRON, sleep_config(4, looped_groups=(1, 2))),
  "ouro": (
    dataclasses.replace(OURO, loops=2),
    sleep_config(4, eviction="sliding", carry_convolution=True),
  ),
}


def make_row():
  """Inputs, targets and loss mask [3 windows]: two windows sleep."""
  rng = np.random.default_rng(7)
  inputs, targets = rng.integers(0, VOCABULARY, (2, 3 * WINDOW), np.int32)
  return inputs, targets, np.arange(3 * WINDOW) >= 2 * WINDOW


def state_name(g, j, r):
  return f"S.{g}.{j}.{r}"


@pytest.mark.parametrize("name", CASES)
def test_four_passes_give_what_they_gave(name):
  config, sleep = CASES[name]
  with np.load(FOLDER / f"{name}.npz") as file:
    stored = dict(file)
  with jax.enable_x64(True):
    model = HybridLM(config, VOCABULARY)
    like = jax.eval_shape(lambda: make(config)[1])
    params = jax.tree.unflatten(
      jax.tree.structure(like),
      [
        stored[jax.tree_util.keystr(path, simple=True, separator="/")]
        for path, _ in jax.tree.leaves_with_path(like)
      ],
    )
    row = [x[None] for x in make_row()]
    result = jax.jit(
      lambda params: rollout(model, params, *row, np.ones_like(row[2]), sleep)
    )(params)
    np.testing.assert_allclose(result.loss_sum, stored["loss"], rtol=1e-12)
    for g, group in enumerate(result.memory.state):
      for j, state in enumerate(group):
        for r, mine in enumerate([] if state is None else state[:, 0]):
          expected = stored[state_name(g, j, r)]
          np.testing.assert_allclose(mine, expected, atol=1e-12)


def write():
  FOLDER.mkdir(exist_ok=True)
  for name, (config, sleep) in CASES.items():
    with jax.enable_x64(True):
      _, params = make(config)
      windows = [
        tuple(x[start : start + WINDOW] for x in make_row())
        for start in range(0, 3 * WINDOW, WINDOW)
      ]
      loss, states = naive.loss_sum(config, params, windows, sleep)
    arrays = {
      jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x)
      for path, x in jax.tree.leaves_with_path(params)
    }
    repeats = [count for _, count in config.pattern]
    states = {
      # Our first axis has all repeats of a loop, then those of the next.
      state_name(g, j, u * repeats[g] + r): np.asarray(state)
      for (g, r, j, u), state in states.items()
      if jnp.any(state)
    }
    np.savez(FOLDER / f"{name}.npz", loss=np.asarray(loss), **arrays, **states)


if __name__ == "__main__":
  write()
