"""The examples of docs/adding_*.md, as they stand there."""

import dataclasses
import importlib.util
import json
import re
from pathlib import Path

import jax
import numpy as np
import pytest

from sleep_jax.config import from_config_dict
from sleep_jax.data.source import task_and_tokenizer
from sleep_jax.model.update_rules import UPDATE_RULES
from sleep_jax.tasks import TASKS
from sleep_jax.training.loop import train

DOCS = Path(__file__).parents[1] / "docs"


@pytest.fixture
def example(request, tmp_path):
  """The module that a page shows; what it registers is forgotten again."""
  registries = TASKS, UPDATE_RULES
  before = [dict(x) for x in registries]
  text = (DOCS / f"{request.param}.md").read_text()
  found = re.search(r"```python\n(.*?)```", text, re.DOTALL)
  assert found and found[1].count("\n") < 60
  file = tmp_path / "example.py"
  file.write_text(found[1])
  spec = importlib.util.spec_from_file_location("example", file)
  module = importlib.util.module_from_spec(spec)
  spec.loader.exec_module(module)
  yield module
  for registry, names in zip(registries, before, strict=True):
    for name in registry.keys() - names.keys():
      del registry[name]


def run_once(config, path, steps=2):
  config = dataclasses.replace(
    config, run=dataclasses.replace(config.run, steps=steps)
  )
  return train(config, path)


@pytest.mark.parametrize("example", ["adding_a_task"], indirect=True)
def test_the_task(example, tmp_path):
  config = from_config_dict(example.get_config())
  task, _ = task_and_tokenizer(config)
  shown = task.example("train", 3)
  assert sum(map(int, shown.context)) % 10 == int(shown.questions[0].answer)
  assert len(shown.context) == 8 and shown != task.example("test", 3)
  results = run_once(config, tmp_path / "run")
  assert list(map(str, results["test"]["depth"])) == ["8"]
  settings = example.get_config()
  settings.task.terms = 101
  with pytest.raises(ValueError, match="task.terms = 101: use 1..100"):
    from_config_dict(settings)
  settings.task.terms = 8
  settings.data.path = "x.jsonl"
  with pytest.raises(ValueError, match="only gsm_infinite reads files"):
    task_and_tokenizer(from_config_dict(settings))


@pytest.mark.parametrize("example", ["adding_an_update_rule"], indirect=True)
def test_the_update_rule(example, tmp_path):
  draw = np.random.default_rng(0).standard_normal
  q, k, v = (draw((2, 5, 3, n), np.float32) for n in (4, 4, 6))
  beta = np.abs(draw((2, 5, 3), np.float32))
  state = draw((2, 3, 4, 6), np.float32)
  rule = UPDATE_RULES["longhorn"]
  arrays = q, k, v, np.zeros_like(beta), beta, state
  by_token = rule(*arrays, implementation="reference")
  jax.tree.map(
    lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5),
    by_token,
    rule(*arrays),
  )
  # What the rule is the solution of: |S - S_0|^2 + beta |v - S^T k|^2, least.
  _, after = rule(*(x[:, :1] for x in arrays[:5]), state)
  k, v, beta = (np.asarray(x[:, 0], np.float64) for x in (k, v, beta))
  identity = np.eye(4)
  for row in np.ndindex(2, 3):
    outer = beta[row] * np.outer(k[row], k[row])
    target = state[row] + beta[row] * np.outer(k[row], v[row])
    solved = np.linalg.solve(identity + outer, target)
    np.testing.assert_allclose(after[row], solved, atol=1e-5)
  config = from_config_dict(example.get_config("tiny"))
  run_once(config, tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  assert np.isfinite(json.loads(lines[0])["loss"])
