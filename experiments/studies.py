"""Studies: the runs of one folder, what tells them apart, and their means."""

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
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
  "sleep.sampled_passes": "N drawn: {}",
  "sleep.tolerance": "tolerance {}",
  "model.width": "D = {}",
}
# The setting that is a task's depth, where a run has only one.
_DEPTHS = {"rule110": "task.steps"}
_DEPTH_UNITS = {"rule110": "t", "depo": "hops", "gsm_infinite": "operations"}
_DEPTH_AXES = _DEPTH_UNITS | {"rule110": "t (steps of the rule)"}
# What the paper prints of accuracy by depth, at its scale: task -> title of a
# panel -> label -> depth -> accuracy. That of Rule 110 is read off its figure.
PAPER: Mapping[str, Mapping[str, Mapping[str, Mapping[int, float]]]] = {
  "rule110": {
    "paper, figure 2b (N = 3, 4: above 0.3; chance 0.06)": {
      "N = 1": {32: 0.1},
      "N = 2": {32: 0.2},
      "N = 3": {32: 0.3},
      "N = 4": {32: 0.3},
    },
  },
  "gsm_infinite": {
    "paper, Jet-Nemotron 2B (2, 4: all N above 0.97)": {
      "N = 1": {6: 0.742, 8: 0.351},
      "N = 6": {6: 0.812, 8: 0.388},
    },
    "paper, Ouro 1.4B (2, 4: all N 0.86 to 0.93)": {
      "N = 1": {6: 0.419, 8: 0.210},
      "N = 2": {8: 0.209},
      "N = 4": {6: 0.615, 8: 0.272},
    },
    "paper, Ouro 1.4B, sliding": {
      "N = 1": {2: 0.596, 4: 0.839, 6: 0.251, 8: 0.116},
      "N = 4": {2: 0.905, 4: 0.926, 6: 0.320, 8: 0.137},
    },
  },
}


class Run(NamedTuple):
  """A judged run.

  Attributes:
    config: what config.json holds.
    metrics: the lines of metrics.jsonl.
    results: what results.json holds.
    surroundings: what surroundings.json holds, which older runs lack.
    variant: the folder within the study's that it lies in, if any.
  """

  config: Mapping[str, Any]
  metrics: Sequence[Mapping[str, Any]]
  results: Mapping[str, Any]
  surroundings: Mapping[str, Any] = {}
  variant: str = ""

  @property
  def settings(self) -> dict[str, Any]:
    """Path -> value of every leaf of the config; of lists, their JSON."""
    return {
      f"{section}.{name}": json.dumps(x) if isinstance(x, list | tuple) else x
      for section, leaves in self.config.items()
      for name, x in leaves.items()
    }

  @property
  def finished(self) -> bool:
    """Whether its last step is judged: judging anew drops that line first."""
    last = self.metrics[-1] if self.metrics else {"step": -1}
    judged = {f"eval/{split}/loss" for split in self.results} <= last.keys()
    return judged and last["step"] == self.config["run"]["steps"]

  @property
  def seconds(self) -> float:
    """What the steps took; a run that was cut has a line before each save."""
    seconds, before = 0.0, 0
    for line in self.metrics:
      if "steps_per_second" in line:
        seconds += (line["step"] - before) / line["steps_per_second"]
        before = line["step"]
    return seconds

  @property
  def step_tokens(self) -> int:
    data = self.config["data"]
    return data["batch_size"] * data["length"]


class Panel(NamedTuple):
  """What one panel of curves shows: of these runs, this metric.

  Attributes:
    floor: what the best constant answer scores, of an accuracy at one depth.
  """

  title: str
  runs: Sequence[Run]
  metric: str
  floor: float | None = None


def read_run(folder: str | os.PathLike) -> Run:
  """The run that lies in `folder`, judged.

  Raises:
    ValueError: a file is missing, is not JSON, or does not hold what it should.
  """
  folder = Path(folder)
  with _naming(folder):
    config = completed(json.loads((folder / "config.json").read_text()))
    metrics = read_metrics(folder / "metrics.jsonl")
    # Also for what it says of a section or of the task.
    from_config_dict(config)
    surroundings = folder / "surroundings.json"
    found = json.loads(
      surroundings.read_text() if surroundings.exists() else "{}"
    )
  return Run(config, metrics, read_results(folder), found)


def read_results(folder: str | os.PathLike) -> dict[str, Any]:
  """What results.json of a run's folder holds: its splits.

  Raises:
    ValueError: the file is missing, is not JSON, or does not hold splits.
  """
  with _naming(folder):
    results = json.loads((Path(folder) / "results.json").read_text())
    if not (
      isinstance(results, dict)
      and results
      and all(map(_is_split, results.values()))
    ):
      raise ValueError(
        "results.json does not hold splits as judging writes them: judge the "
        "run again"
      )
  return results


@contextlib.contextmanager
def _naming(folder: str | os.PathLike) -> Iterator[None]:
  """What cannot be read is a ValueError that names the folder."""
  try:
    yield
  except FileNotFoundError as error:
    raise ValueError(f"{folder} has no {Path(error.filename).name}") from error
  except ValueError as error:
    raise ValueError(f"{folder}: {error}") from error


def _is_split(split: Any) -> bool:
  if not (isinstance(split, dict) and isinstance(split.get("depth"), dict)):
    return False
  return all(
    isinstance(scores, dict)
    and {"accuracy", "count", "floor", "label_floor"} <= scores.keys()
    for scores in (split.get("overall"), *split["depth"].values())
  )


def read_study(folder: str | os.PathLike) -> list[Run]:
  """The runs of a folder, each in its own folder in it.

  Or in a variant's: `folder`/longer/run.seed=0 is of the variant "longer".

  Raises:
    ValueError: there is none, one cannot be read, or they are of several tasks.
  """
  folder = Path(folder)
  runs = [
    read_run(path.parent)._replace(
      variant=path.parent.parent.name if deep else ""
    )
    for deep, pattern in enumerate(("*/results.json", "*/*/results.json"))
    for path in sorted(folder.glob(pattern))
  ]
  if not runs:
    raise ValueError(f"{folder}: no folder in it has a results.json")
  tasks = {run.config["task"]["name"] for run in runs}
  if len(tasks) > 1:
    raise ValueError(f"{folder}: runs of several tasks, {sorted(tasks)}")
  return runs


def chosen(runs: Sequence[Run], where: Mapping[str, Sequence]) -> list[Run]:
  """Those of the runs whose settings, path -> values, are among these."""
  return [
    run
    for run in runs
    if all(run.settings[path] in values for path, values in where.items())
  ]


def by_setting(
  runs: Sequence[Run], apart: Sequence[str] = ()
) -> dict[str, list[Run]]:
  """Label -> the seeds of each setting.

  They are labelled by the variant, and by what differs within it. Models that
  are only judged, each trained elsewhere, count as seeds.

  Args:
    apart: paths of settings that are shown in another way.
  """
  lines: dict[str, list[Run]] = {}
  for variant in sorted({run.variant for run in runs}):
    group = [run for run in runs if run.variant == variant]
    settings = [run.settings for run in group]
    trained = any(each["run.steps"] for each in settings)
    decisive = _DECISIVE if trained else ()
    paths = [
      path
      for path in sorted({path for each in settings for path in each})
      if path not in (*SEEDS, *apart)
      and (path in decisive or not path.startswith(_BOOKKEEPING))
      and len({each.get(path) for each in settings}) > 1
    ]
    # In the order of their values, not of their folders.
    order = sorted(
      range(len(group)),
      key=lambda i: [_ordered(settings[i].get(x)) for x in paths],
    )
    for i in order:
      labels = [variant] * bool(variant) + [
        _NAMES.get(path, f"{path} = {{}}").format(settings[i].get(path))
        for path in paths
      ]
      lines.setdefault(", ".join(labels) or "all runs", []).append(group[i])
  return lines


def depth_setting(runs: Sequence[Run]) -> str | None:
  """The path of the setting that is the depth; None where a run has several."""
  return _DEPTHS.get(runs[0].config["task"]["name"])


def depth_unit(runs: Sequence[Run]) -> str:
  """What the depth of the task counts."""
  return _DEPTH_UNITS[runs[0].config["task"]["name"]]


def depth_axis(runs: Sequence[Run]) -> str:
  """The same as the label of an axis."""
  return _DEPTH_AXES[runs[0].config["task"]["name"]]


def panels(runs: Sequence[Run]) -> list[Panel]:
  """One for each depth, of exact accuracy, judged on the way."""
  if depth_setting(runs):
    metric = f"eval/{_split(runs)}/accuracy"
    return [
      Panel(label, some, metric, max(floors(some).values()))
      for label, some in by_depth(runs).items()
    ]
  return [
    Panel(
      f"{depth_unit(runs)} = {depth}",
      runs,
      accuracy_metric(runs[0], depth),
      floor,
    )
    for depth, floor in floors(runs).items()
  ]


def loss_panels(runs: Sequence[Run]) -> list[Panel]:
  """Of Depo's the same of the test loss (paper, figure 3); else none."""
  if runs[0].config["task"]["name"] != "depo":
    return []
  return [
    Panel(split.replace("_", " = "), runs, f"eval/{split}/loss")
    for split in runs[0].results
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


def floors(runs: Sequence[Run]) -> dict[int, float]:
  """Depth, ascending -> the highest that a constant answer scores on a run."""
  found: dict[int, float] = {}
  for run in runs:
    for depth, score in scores_by_depth(run).items():
      found[depth] = max(score["floor"], found.get(depth, 0.0))
  return dict(sorted(found.items()))


def accuracy_metric(run: Run, depth: int) -> str:
  """The metric of the accuracy at a depth, judged on the way."""
  if run.config["task"]["name"] == "depo":
    return f"eval/hops_{depth}/accuracy"
  return f"eval/{_split([run])}/depth_{depth}"


def woken_after(run: Run) -> dict[int, Run]:
  """Number of passes -> the run as judged after so many before each eviction.

  Of those in sleep.evaluation_passes; with none there is nothing.
  """
  numbers = next(iter(run.results.values())).get("by_passes", {})
  return {
    int(n): run._replace(
      results={
        split: scores["by_passes"][n] for split, scores in run.results.items()
      }
    )
    for n in numbers
  }


def passes_used(run: Run) -> float:
  """Mean number of passes of a sleep, where a row may stop earlier."""
  splits = [scores["sleep"]["passes"] for scores in run.results.values()]
  return float(np.mean(splits))


def chance(run: Run) -> float | None:
  """What a guess among the answers that are possible scores, if it is known."""
  task = run.config["task"]
  if task["name"] == "rule110":
    return 0.5 ** task["strings"]
  if task["name"] == "depo":
    # Another node than the one asked about: cycles have more than K nodes.
    return 1 / (task["nodes"] - 1) if task["nodes"] > task["hops"] else None
  return None


def curve(lines: Sequence[Mapping], name: str) -> dict[int, float]:
  """Step -> value where a line has it; not finite there, NaN here."""
  return {
    line["step"]: float("nan") if line[name] is None else line[name]
    for line in lines
    if name in line
  }


def step_flops(run: Run, counted: dict[str, float]) -> float:
  """Training FLOPs of a step (`baselines.training_flops`).

  Args:
    counted: remembers those of each config, as JSON can hold it.
  """
  usual = run._replace(
    config=completed({"task": {"name": run.config["task"]["name"]}})
  ).settings
  # A leaf that is new to config.py leaves the keys as they are.
  key = " ".join(
    f"{path}={value}"
    for path, value in sorted(run.settings.items())
    if path == "task.name"
    or not (path.startswith(("mesh.", "run.")) or path == "data.seed")
    and value != usual[path]
  )
  if key not in counted:
    from sleep_jax.baselines import training_flops

    config = dict(run.config, run=dict(run.config["run"], steps=1))
    config["first_stage"] = dict(config["first_stage"], steps=0)
    counted[key] = training_flops(from_config_dict(config))
  return counted[key]


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


def difference_and_interval(
  plus: Sequence[Mapping[Any, float]], minus: Sequence[Mapping[Any, float]]
) -> tuple[float | None, float | None, float | None]:
  """Sum of the means of `plus` less that of `minus`, with its 95% interval.

  Each maps seeds to values. Where all have the same seeds, these are pairs:
  what the seeds share is left out (Student's t); else all values are taken for
  independent, of unequal variances (Welch's t). None as of `mean_and_interval`.
  """
  from scipy import stats

  signs = [1] * len(plus) + [-1] * len(minus)
  every = [*plus, *minus]
  if not all(every):
    return None, None, None
  if all(each.keys() == every[0].keys() for each in every):
    return mean_and_interval(
      [
        sum(sign * each[seed] for sign, each in zip(signs, every, strict=True))
        for seed in every[0]
      ]
    )
  groups = [np.array(list(each.values()), float) for each in every]
  difference = float(np.dot(signs, [group.mean() for group in groups]))
  if min(map(len, groups)) < 2:
    return difference, None, None
  errors = np.array([x.var(ddof=1) / len(x) for x in groups])
  freedom = errors.sum() ** 2 / max(
    sum(e**2 / (len(x) - 1) for e, x in zip(errors, groups, strict=True)),
    1e-300,
  )
  half_width = float(
    stats.t.ppf(0.975, max(freedom, 1)) * math.sqrt(errors.sum())
  )
  return difference, difference - half_width, difference + half_width


def markdown_table(rows: Sequence[Mapping[str, str]]) -> str:
  """Rows of cells by column, as Markdown; the columns are the first row's."""
  lines = [rows[0].keys(), ["---"] * len(rows[0])]
  lines += [[row.get(name, "") for name in rows[0]] for row in rows]
  return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _split(runs: Sequence[Run]) -> str:
  """The split that counts: of strings or problems never trained on."""
  splits = runs[0].results
  return "heldout" if "heldout" in splits else next(iter(splits))


def _ordered(value: Any) -> tuple:
  """Numbers before texts, each in their order."""
  number = isinstance(value, int | float)
  return (not number, value if number else 0, str(value))
