"""Studies: the runs of one folder, what tells them apart, and their means."""

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sleep_jax.config import completed, from_config_dict
from sleep_jax.training.metrics import read_metrics

# Runs that differ in these alone are one setting's seeds.
SEEDS = ("run.seed", "data.seed")
# Sections that have no say in what is learnt, but for some of their leaves.
_BOOKKEEPING = ("mesh.", "run.")
_DECISIVE = ("run.steps", "run.init_from")
# A setting in a legend; the others as path = value.
_NAMES = {
  "sleep.passes": "N = {}",
  "task.steps": "t = {}",
  "run.steps": "{} steps",
  "model.update_rule": "{}",
  "sleep.eviction": "{} eviction",
  "model.width": "D = {}",
}
# The setting that is a task's depth, where a run has only one.
_DEPTHS = {"rule110": "task.steps"}


class Run(NamedTuple):
  """A finished run.

  Attributes:
    config: what config.json holds.
    metrics: the lines of metrics.jsonl.
    results: what results.json holds.
  """

  config: Mapping[str, Any]
  metrics: Sequence[Mapping[str, Any]]
  results: Mapping[str, Any]

  @property
  def settings(self) -> dict[str, Any]:
    """Path -> value of every leaf of the config; of lists, their JSON."""
    return {
      f"{section}.{name}": json.dumps(x) if isinstance(x, list) else x
      for section, leaves in self.config.items()
      for name, x in leaves.items()
    }


class Panel(NamedTuple):
  """What one panel of curves shows: of these runs, this metric."""

  title: str
  runs: Sequence[Run]
  metric: str


def read_study(folder: str | os.PathLike) -> list[Run]:
  """The finished runs that lie in `folder`, each in its own folder.

  Raises:
    ValueError: there is none, one of its files is not JSON, or they are of
      several tasks.
  """
  folder = Path(folder)
  runs = []
  for results in sorted(folder.glob("*/results.json")):
    try:
      config = completed(
        json.loads((results.parent / "config.json").read_text())
      )
      run = Run(
        config,
        read_metrics(results.parent / "metrics.jsonl"),
        json.loads(results.read_text()),
      )
      # Also for what it says of a section or of the task.
      from_config_dict(config)
      if not (isinstance(run.results, dict) and run.results):
        raise ValueError("results.json holds no split: judge the run again")
      runs.append(run)
    except FileNotFoundError as error:
      raise ValueError(
        f"{results.parent} has no {Path(error.filename).name}"
      ) from error
    except ValueError as error:
      raise ValueError(f"{results.parent}: {error}") from error
  if not runs:
    raise ValueError(f"{folder}: no folder in it has a results.json")
  tasks = {run.config["task"]["name"] for run in runs}
  if len(tasks) > 1:
    raise ValueError(f"{folder}: runs of several tasks, {sorted(tasks)}")
  return runs


def by_setting(
  runs: Sequence[Run], apart: Sequence[str] = ()
) -> dict[str, list[Run]]:
  """Label -> the seeds of each setting, labelled by what differs.

  Args:
    apart: paths of settings that are shown in another way.
  """
  settings = [run.settings for run in runs]
  paths = [
    path
    for path in settings[0]
    if path not in (*SEEDS, *apart)
    and (path in _DECISIVE or not path.startswith(_BOOKKEEPING))
    and len({each.get(path) for each in settings}) > 1
  ]
  # In the order of their values, not of their folders.
  order = sorted(
    range(len(runs)), key=lambda i: [_ordered(settings[i][x]) for x in paths]
  )
  lines: dict[str, list[Run]] = {}
  for i in order:
    label = ", ".join(
      _NAMES.get(path, f"{path} = {{}}").format(settings[i][path])
      for path in paths
    )
    lines.setdefault(label or "all runs", []).append(runs[i])
  return lines


def depth_setting(runs: Sequence[Run]) -> str | None:
  """The path of the setting that is the depth; None where a run has several."""
  return _DEPTHS.get(runs[0].config["task"]["name"])


def panels(runs: Sequence[Run]) -> list[Panel]:
  """One for each depth; its metric is judged on the way.

  Depo's is the loss, as in the paper's figure 3; else exact accuracy.
  """
  if depth_setting(runs):
    metric = f"eval/{_split(runs)}/accuracy"
    return [
      Panel(label, some, metric) for label, some in by_depth(runs).items()
    ]
  if runs[0].config["task"]["name"] == "depo":
    return [
      Panel(split.replace("_", " = "), runs, f"eval/{split}/loss")
      for split in runs[0].results
    ]
  split = _split(runs)
  return [
    Panel(f"depth {depth}", runs, f"eval/{split}/depth_{depth}")
    for depth in sorted(runs[0].results[split]["depth"], key=int)
  ]


def by_depth(runs: Sequence[Run]) -> dict[str, list[Run]]:
  """Label -> runs of that depth, ascending, where `depth_setting` has one."""
  path = _DEPTHS[runs[0].config["task"]["name"]]
  return {
    _NAMES[path].format(depth): [
      run for run in runs if run.settings[path] == depth
    ]
    for depth in sorted({run.settings[path] for run in runs})
  }


def scores_by_depth(run: Run) -> dict[int, Mapping[str, Any]]:
  """Depth -> its scores: of the held-out split, or of each k's own (Depo)."""
  if run.config["task"]["name"] == "depo":
    return {
      int(split.rpartition("_")[2]): scores["overall"]
      for split, scores in run.results.items()
    }
  depths = run.results[_split([run])]["depth"]
  return {int(depth): scores for depth, scores in depths.items()}


def mean_and_interval(
  values: Sequence[float | None],
) -> tuple[float | None, float | None, float | None]:
  """Mean and 95% interval (Student's t) of independent values.

  None where there is none: the mean of no values or of one that is None, the
  interval of less than two. That of a share may go beyond 0 and 1.
  """
  from scipy import stats

  if not values or None in values:
    return None, None, None
  mean = float(np.mean(np.array(values, float)))
  if len(values) < 2:
    return mean, None, None
  error = np.std(np.array(values, float), ddof=1) / math.sqrt(len(values))
  half_width = float(stats.t.ppf(0.975, len(values) - 1) * error)
  return mean, mean - half_width, mean + half_width


def _split(runs: Sequence[Run]) -> str:
  """The split that counts: of strings or problems never trained on."""
  splits = runs[0].results
  return "heldout" if "heldout" in splits else next(iter(splits))


def _ordered(value: Any) -> tuple:
  """Numbers before texts, each in their order."""
  number = isinstance(value, int | float)
  return (not number, value if number else 0, str(value))
