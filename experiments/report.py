"""experiments/RESULTS.md, and its figures, from experiments/results/.

  python -m experiments.report
  python -m experiments.report --commands

Nothing in it is typed by hand but the notes in `experiments/plan.py`, which
also says what is to be run; --commands prints what is left of that, most wanted
first. A study whose runs are missing is called so.
"""

import argparse
import ast
import functools
import json
import shlex
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import figures, latency, plan, studies, throughput
from experiments.sweep import combinations
from sleep_jax.training.workdir import write_atomically

# Folder in results/ -> its runs.
_Read = Callable[[str], list[studies.Run]]

_HERE = Path(__file__).parent
_HEAD = """# Results

Written by `python -m experiments.report` from the runs in `results/`, each
with its config.json, metrics.jsonl and results.json. What is asked of them,
and the notes, are in `plan.py`; `python -m experiments.report --commands`
prints the commands that are left.

*Accuracy* is exact: every label of an answer and its end are right, on held-out
examples. Beside its mean stand the 95% interval over the seeds (Student's t;
not cut at 0 and 1) and each seed. *Constant* is the floor: what the best
constant answer scores on the very same examples; *chance* is a guess among the
possible ones. *At equal FLOPs* is the accuracy where the cheapest training of
the study ends: its own at the end, the others' on the way, on a quarter of the
examples and with a learning rate that has not decayed. Only the studies at
equal training FLOPs compare what was trained for the same. A commit with a +
had changes on top.

Pictures: by_tokens is drawn as the paper's figures 2b (Rule 110), 3 (Depo: the
loss), 4 and 5 (math), but against tokens in place of steps, depths_by_tokens as
its 2a, throughput as its 6; by_depth stands beside what the paper prints, where
there is any, at the paper's depths. Thin lines are seeds, thick ones their
means; whiskers are 95% intervals over the seeds, cut at 0 and 1, and a point
without any is one seed. A pocket run was meant to take five minutes: those of
Rule 110 mostly do, those of Depo, of math and of more depth mostly do not.
"""
_CLAIMS_HEAD = """## The paper's claims, and our questions, at this scale

Each difference is of mean accuracies, with a 95% interval: seed by seed where
both sides have the same seeds, else Welch's. **Shown**: the interval is above
0. **Opposite**: it is below 0. *Not shown*: it holds 0; with few seeds that
says little. *At the floor* is added where at one depth no side's mean is 0.05
above the best constant answer: little was learned there that could differ (that
it be 0.05 is a choice). *Too few seeds*: one side
has one. *No spread*: all seeds agree, and nothing is known of others. *Not
run*: a side has no run. Beside a claim stands how often each was found; they
are of several tasks and depths, and no vote. Of so many intervals one in twenty
misses by chance. Seeds change the initial parameters, and the questions only
where a study says so; the choice of the questions, the same for all, is in no
interval: with 2,048 of them an accuracy of 0.3 is within 0.02 by that alone. A
depth is t, hops or operations; where one side is near 1 there is little left to
gain, so that what all N answer at a small depth makes a gain at a larger one
look like a gain with depth. What is compared was trained with one and the same
learning rate; where one was chosen, for Depo and math, it was on runs that
sleep. Studies were added, and some given up, after results had been seen, as
each says of itself. Of time, the value is a median, with the range of four
histories or the quartiles of twelve rounds, and *shown* if all three keep the
rule.

| claim | source | difference | value | verdict |
| --- | --- | --- | --- | --- |"""


def report(results: Path, counted: dict[str, float]) -> str:
  """The text of RESULTS.md.

  Args:
    results: the folder of the runs.
    counted: see `studies.step_flops`.

  Raises:
    ValueError: a run cannot be read.
  """
  read = _reader(results)
  return "\n".join(
    [
      _HEAD,
      _claims(read) + _measured_claims(results),
      *(_study(read, study, counted) for study in plan.STUDIES),
      *(_measured(results, module) for module in (latency, throughput)),
    ]
  )


def draw(results: Path, counted: dict[str, float]) -> list[Path]:
  """Draws the figures that the text shows; returns their paths."""
  read, drawn = _reader(results), []
  for study in plan.STUDIES:
    if runs := _runs(read, study):
      for name, make in figures.study_figures(runs, counted).items():
        drawn.append(results / study.folder / name)
        make(drawn[-1])
  for name in ("latency", "throughput"):
    if (results / name / f"{name}.json").exists():
      drawn += figures.draw_folder(results / name, results / name)
  return drawn


def commands_left(results: Path) -> list[tuple[str, int, int]]:
  """(command, points done, points) of every sweep that is not done."""
  read, found = _reader(results), []
  for sweep in (sweep for study in plan.STUDIES for sweep in study.sweeps):
    done, points = _progress(read, sweep)
    if done < points:
      found.append((_command(sweep), done, points))
  return found


def verdict(
  difference: float | None, low: float | None, high: float | None
) -> str:
  """What a difference says of the claim that it is positive."""
  if difference is None:
    return "not run"
  if low is None or high is None:
    return "too few seeds"
  if high - low < 1e-9:
    return "no spread"
  if low > 0:
    return "**shown**"
  return "**opposite**" if high < 0 else "not shown"


def _reader(results: Path) -> _Read:
  @functools.cache
  def read(folder):
    judged = [
      path
      for pattern in ("*/results.json", "*/*/results.json")
      for path in (results / folder).glob(pattern)
    ]
    return studies.read_study(results / folder) if judged else []

  return read


def _runs(read: _Read, study: plan.Study) -> list[studies.Run]:
  """Its own and those beside; none without its own."""
  own = read(study.folder)
  beside = [
    run
    for folder, where in study.beside.items()
    for run in studies.chosen(read(folder), where)
  ]
  return beside + own if own else []


def _command(sweep: plan.Sweep) -> str:
  words = [
    "python -m experiments.sweep",
    f"--config=experiments/{sweep.config}",
    *(
      shlex.quote(f"--config.{path}={value}")
      for path, value in sweep.overrides.items()
    ),
    f"--workdir=experiments/results/{sweep.folder}",
    *(f'--grid="{grid}"' for grid in sweep.grids),
  ]
  return " \\\n    ".join(words)


def _progress(read: _Read, sweep: plan.Sweep) -> tuple[int, int]:
  """How many points are done, and how many there are."""
  runs = [run.settings for run in read(sweep.folder) if run.finished]
  points = [
    {**sweep.overrides, **point}
    for grid in sweep.grids
    for point in combinations(grid)
  ]
  done = [
    any(
      all(_as_set(run[path]) == _as_set(x) for path, x in point.items())
      for run in runs
    )
    for point in points
  ]
  return sum(done), len(points)


def _as_set(value: Any) -> Any:
  """A setting's value, whether a grid, JSON or Python has written it."""
  try:
    value = ast.literal_eval(value) if isinstance(value, str) else value
  except (SyntaxError, ValueError):  # a text
    return value
  return json.dumps(value)


def _study(read: _Read, study: plan.Study, counted: dict[str, float]) -> str:
  parts = [f"## {study.title}\n\n{study.about}\n"]
  if study.sweeps:
    parts += ["```", *map(_command, study.sweeps), "```\n"]
    progress = [_progress(read, sweep) for sweep in study.sweeps]
    done, points = map(sum, zip(*progress, strict=True))
    parts.append(f"{done} of {points} points are done.\n")
  if runs := _runs(read, study):
    parts += [_provenance(read(study.folder)), _table(runs, counted)]
    parts += [_woken_table(runs)]
    parts += [
      f"![{name}](results/{study.folder}/{name})\n"
      for name in figures.study_figures(runs, counted)
    ]
  else:
    parts.append("Not run.\n")
  if study.notes:
    parts.append(f"Note: {study.notes}\n")
  return "\n".join(filter(None, parts))


def _provenance(runs: Sequence[studies.Run]) -> str:
  """Commits, machines and times that the runs themselves tell."""
  made = {}
  for run in runs:
    x = run.surroundings
    words = "commit and machine not recorded"
    if x:
      words = (
        f"commit {x['commit']}, {x['devices']} x {x['device']} of"
        f" {x['cores']} cores, jax {x['jax']}"
      )
    made.setdefault(words, []).append(run.seconds)
  return "".join(
    f"{len(seconds)} runs: {words}; training took {min(seconds):.0f} to"
    f" {max(seconds):.0f} s each.\n"
    for words, seconds in made.items()
  )


def _table(runs: Sequence[studies.Run], counted: dict[str, float]) -> str:
  """Of each line and depth: accuracy, floors, and what training took."""
  # Variants may be matched by their whole training.
  varied = any(run.variant for run in runs)
  budget = 0 if varied else min(_flops(run, counted) for run in runs)
  rows = []
  for label, at, seeds in _cells(runs):
    first = seeds[0]
    scores = [studies.scores_by_depth(run)[at] for run in seeds]
    accuracy = [score["accuracy"] for score in scores]
    chance = studies.chance(first)
    rows.append(
      {
        "setting": label,
        "depth": str(at),
        "accuracy": _mean(studies.mean_and_interval(accuracy)),
        "each seed": " ".join(f"{x:.3f}" for x in accuracy),
        "constant": f"{np.mean([score['floor'] for score in scores]):.3f}",
        "chance": "" if chance is None else f"{chance:.3f}",
        "tokens": f"{first.config['run']['steps'] * first.step_tokens:.3g}",
        "FLOPs": f"{_flops(first, counted):.3g}",
      }
    )
    if budget:
      on_the_way = [_accuracy_at(run, at, budget, counted) for run in seeds]
      equal = _mean(studies.mean_and_interval(on_the_way))
      rows[-1]["at equal FLOPs"] = equal
    if any(run.settings["sleep.tolerance"] for run in runs):
      used = studies.mean_and_interval([*map(studies.passes_used, seeds)])
      rows[-1]["passes used"] = _mean(used)
  return studies.markdown_table(rows) + "\n"


def _woken_table(runs: Sequence[studies.Run]) -> str:
  """The mean accuracies after each number of passes that was judged."""
  rows = []
  for label, at, seeds in _cells(runs):
    woken = list(map(studies.woken_after, seeds))
    numbers = sorted(set.intersection(*map(set, woken)))
    if not numbers:
      continue
    rows.append({"setting": label, "depth": str(at)})
    for n in numbers:
      scores = [studies.scores_by_depth(x[n])[at] for x in woken]
      rows[-1][f"judged at N = {n}"] = _mean(
        studies.mean_and_interval([score["accuracy"] for score in scores])
      )
  return studies.markdown_table(rows) + "\n" if rows else ""


def _cells(runs: Sequence[studies.Run]):
  """(label, depth, seeds) of each line and depth."""
  depth = studies.depth_setting(runs)
  for label, some in studies.by_setting(runs, [depth] if depth else []).items():
    for at in sorted(
      {at for run in some for at in studies.scores_by_depth(run)}
    ):
      yield (
        label,
        at,
        [run for run in some if at in studies.scores_by_depth(run)],
      )


def _flops(run: studies.Run, counted: dict[str, float]) -> float:
  return run.config["run"]["steps"] * studies.step_flops(run, counted)


def _accuracy_at(run, depth, budget, counted) -> float | None:
  """Between the evaluations on the way; None before the first of them."""
  curve = studies.curve(run.metrics, studies.accuracy_metric(run, depth))
  step = budget / studies.step_flops(run, counted)
  if not curve or step < min(curve):
    return None
  return float(np.interp(step, list(curve), list(curve.values())))


def _mean(values: Sequence[float | None], sign: str = "") -> str:
  mean, low, high = values
  if mean is None:
    return ""
  if low is None:
    return f"{mean:{sign}.3f}"
  return f"{mean:{sign}.3f} [{low:{sign}.3f}, {high:{sign}.3f}]"


def _claims(read: _Read) -> str:
  def scores(cell: plan.Cell) -> dict[tuple, Mapping[str, float]]:
    """Seeds of a run -> its scores."""
    found = {}
    for run in studies.chosen(read(cell.folder), cell.where):
      seeds = tuple(run.settings[path] for path in studies.SEEDS)
      if cell.woken is not None:
        run = studies.woken_after(run).get(cell.woken)
      at = studies.scores_by_depth(run) if run else {}
      if cell.depth in at:
        found[seeds] = at[cell.depth]
    return found

  rows = [_CLAIMS_HEAD]
  for claim in plan.CLAIMS:
    lines, missing, verdicts = [], [], Counter()
    for name, plus, minus in claim.contrasts:
      sides = [
        [(cell.depth, scores(cell)) for cell in cells]
        for cells in (plus, minus)
      ]
      value = studies.difference_and_interval(
        *(
          [
            {seeds: x["accuracy"] for seeds, x in found.items()}
            for _, found in side
          ]
          for side in sides
        )
      )
      said = verdict(*value)
      if value[0] is not None and _at_the_floor(*sides):
        said += ", at the floor"
      if value[0] is None:
        missing.append(name)
      else:
        lines.append(f"{name} | {_mean(value, '+')} | {said} |")
      verdicts[said.replace("*", "")] += 1
    if missing:
      lines.append(f"{'; '.join(missing)} | | {verdict(None, None, None)} |")
    counts = "; ".join(f"{n} {said}" for said, n in verdicts.most_common())
    rows.append(f"| {claim.says} ({counts}) | {claim.source} | {lines[0]}")
    rows += [f"| | | {line}" for line in lines[1:]]
  return "\n".join(rows) + "\n"


def _at_the_floor(plus: Sequence, minus: Sequence) -> bool:
  """Whether a depth is compared at which no mean is above the floor.

  Args:
    plus, minus: (depth, seeds of a run -> its scores) of each cell.
  """

  def above(found):
    return np.mean([x["accuracy"] - x["floor"] for x in found.values()])

  compared = {depth for depth, _ in plus} & {depth for depth, _ in minus}
  return any(
    all(above(found) < 0.05 for at, found in (*plus, *minus) if at == depth)
    for depth in compared
  )


def _measured_claims(results: Path) -> str:
  """Of time and memory, by rules that each row names."""
  rows = []

  def row(says, source, rule, ratios, spread, holds):
    low, middle, high = np.quantile(ratios, (0.5 - spread, 0.5, 0.5 + spread))
    said = "**shown**" if all(map(holds, (low, middle, high))) else "not shown"
    rows.append(
      f"| {says} | {source} | {rule} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
      f" {said} |\n"
    )

  if cells := _json(results / "latency/latency.json").get("cells"):
    at = {
      (x["passes"], x["history"]): x["seconds_per_token"]
      for x in cells
      if x["passes"]
    }
    most = max(n for n, _ in at)
    row(
      "A token awake costs the same whatever N",
      "ours",
      f"within 10%, of each history: seconds at N = {most} over N = 1",
      [at[most, history] / x for (n, history), x in at.items() if n == 1],
      0.5,
      lambda ratio: abs(ratio - 1) < 0.1,
    )
  if cells := _json(results / "throughput/throughput.json").get("cells"):
    # Of steps of as many tokens; each round ran all kinds in the same moment.
    seconds = {
      (x["kind"], x["window"], x["passes"]): np.array(x["seconds"])
      for x in cells
    }
    longest, most = max(w for _, w, _ in seconds), max(n for *_, n in seconds)
    row(
      "Windows in sequence cost little in training",
      "paper, figure 6a",
      "under 10% lost: tokens a second over the parallel step's,"
      f" L = {longest}",
      seconds["parallel", longest, 1] / seconds["windowed", longest, 1],
      0.25,
      lambda ratio: ratio > 0.9,
    )
    row(
      "Training's throughput falls as 1/N",
      "paper, figure 6b",
      f"within 20% of 1/{most}: tokens a second at N = {most} over N = 1",
      seconds["sleeping", longest, 1] / seconds["sleeping", longest, most],
      0.25,
      lambda ratio: abs(ratio * most - 1) < 0.2,
    )
  return "".join(rows)


def _measured(results: Path, module: Any) -> str:
  """What `experiments.latency` or `experiments.throughput` has measured."""
  name = module.__name__.rpartition(".")[2]
  title = {"latency": "Latency of a session", "throughput": "Throughput"}[name]
  folder = f"results/{name}"
  parts = [
    f"## {title}\n",
    f"```\npython -m experiments.{name}"
    f" --json=experiments/{folder}/{name}.json\n```\n",
  ]
  if found := _json(results / name / f"{name}.json"):
    parts += [
      f"Commit {found.get('commit', 'not recorded')}, {found['device']} of"
      f" {found['cores']} cores, load average {found['load_average']:.1f}, jax"
      f" {found['jax']}; {found['parameters']} random parameters.\n",
      "```",
      *(module.table(found), *module.verdicts(found), "```\n"),
      f"![{name}]({folder}/{name}.png)\n",
    ]
  else:
    parts.append("Not run.\n")
  return "\n".join([*parts, plan.MEASURED_NOTES[name], ""])


def _json(path: Path) -> Mapping[str, Any]:
  return json.loads(path.read_text()) if path.exists() else {}


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m experiments.report")
  parser.add_argument(
    "--commands", action="store_true", help="only print what is left to run"
  )
  arguments = parser.parse_args()
  results = _HERE / "results"
  try:
    if arguments.commands:
      for command, done, points in commands_left(results):
        print(f"# {done} of {points} points are done\n{command}\n")
      return
    counts = results / "flops.json"
    counted = dict(_json(counts))
    text = report(results, counted)
    write_atomically(_HERE / "RESULTS.md", text)
    text = json.dumps(counted, indent=2, sort_keys=True) + "\n"
    write_atomically(counts, text)
    print(_HERE / "RESULTS.md", *draw(results, counted), sep="\n")
  except (OSError, ValueError) as error:
    parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
  main()
