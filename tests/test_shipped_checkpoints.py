"""The parameters that come with the project are those of its models."""

import dataclasses
import json
from pathlib import Path

import pytest

from experiments import math
from sleep_jax.training import loop

EXPERIMENTS = Path(__file__).parents[1] / "experiments"


@pytest.mark.parametrize("passes", [1, 4])
def test_shipped_parameters_answer_as_recorded(passes, tmp_path):
  """On the first 256 held-out problems, near the accuracy on all of them."""
  name = f"math-evening-n{passes}"
  config = math.evening()
  config = dataclasses.replace(
    config,
    sleep=dataclasses.replace(config.sleep, passes=passes),
    run=dataclasses.replace(
      config.run,
      steps=0,
      init_from=str(EXPERIMENTS / "checkpoints" / name),
      evaluation_examples=256,
    ),
  )
  mine = loop.train(config, tmp_path)["heldout"]["overall"]
  path = EXPERIMENTS / f"results/math-evening/n{passes}/results.json"
  recorded = json.loads(path.read_text())["heldout"]["overall"]
  low, high = mine["interval"]
  assert mine["count"] == 256
  assert low < recorded["accuracy"] < high
  assert low > 2 * mine["floor"]
