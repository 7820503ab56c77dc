"""Figures of finished runs: accuracy by depth, and training curves.

  python -m experiments.figures --workdirs=runs/a,runs/b --labels=N=1,N=2 \
      --out=figures
  python -m experiments.figures --from=runs/automaton-sweep --out=figures

Runs with the same label are seeds of one setting. With --from, all runs in a
folder, as `experiments.sweep` leaves them, are labelled by what they differ in,
and drawn as the paper draws, but against tokens in place of steps: a panel for
each depth (figures 2b, 3, 4, 5) or, where each run has its own depth, also one
for each setting (2a). Then accuracy against training FLOPs, and how runs end by
depth, next to what the paper prints. Runs that were judged after several
numbers of passes, or with several tolerances, are drawn by these too; a
folder's latency.json and throughput.json (figure 6) as they are measured. Needs
the extra `plots`.
"""

import argparse
import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from experiments import studies
from sleep_jax.training.metrics import read_metrics


class _Style(NamedTuple):
  color: str
  marker: str
  mfc: str
  ls: str


# Okabe and Ito's palette, told apart with any colour vision; the markers tell
# the labels apart without colour. The second six are hollow and dashed.
_STYLES = [
  _Style(color, marker, hollow or color, "--" if hollow else "-")
  for hollow in ("", "white")
  for color, marker in (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#E69F00", "v"),
    ("#56B4E9", "P"),
  )
]
_GREY = "#777777"
_FLOOR = "best constant answer"
_PASSES = re.compile(r"N = ([1-9]\d*)")
_MOST_BESIDE = 3
_SIZES = dict(ms=4.5, lw=1.2)


def accuracy_by_depth(
  results: Mapping[str, Sequence[Mapping[str, Any]]], path: str | os.PathLike
) -> None:
  """Draws exact accuracy by depth, a panel for each split, to a PNG.

  Each run has its point and 95% interval; seeds stand side by side.

  Args:
    results: label -> what `judging.judge` returned for each of its seeds.
    path: the PNG.

  Raises:
    ValueError: matplotlib is missing, or there are too many labels.
  """
  runs = [(label, run) for label, seeds in results.items() for run in seeds]
  styles = _styles(results)
  splits = list(dict.fromkeys(split for _, run in runs for split in run))
  figure, panels = _panels(len(splits))
  for panel, split in zip(panels, splits, strict=True):
    shown = [
      (label, run[split]["depth"]) for label, run in runs if split in run
    ]
    depths = sorted({int(d) for _, scores in shown for d in scores})
    place = {str(depth): i for i, depth in enumerate(depths)}
    for i, (label, scores) in enumerate(shown):
      width = 0.7 / len(shown)
      at = np.array([place[depth] for depth in scores])
      at = at + width * (i + 0.5) - 0.35
      accuracy, low, high = _accuracies(scores)
      panel.errorbar(
        at,
        accuracy,
        yerr=np.maximum([accuracy - low, high - accuracy], 0),
        label=label,
        **_SIZES,
        **styles[label]._replace(ls="none")._asdict(),
      )
      panel.hlines(
        [score["floor"] for score in scores.values()],
        at - width / 2,
        at + width / 2,
        color=_GREY,
        ls="--",
        lw=1,
        label=_FLOOR,
      )
    panel.set_title(split, loc="left", fontsize=10)
    panel.set_xticks(range(len(depths)), [str(d) for d in depths])
    panel.set_xlim(-0.6, len(depths) - 0.4)
    panel.set_xlabel("depth")
    panel.set_ylim(-0.02, 1.02)
  panels[0].set_ylabel("exact accuracy")
  _save(figure, path)


def training_curves(
  runs: Mapping[str, Sequence[str | os.PathLike]], path: str | os.PathLike
) -> None:
  """Draws loss and accuracies against steps to a PNG.

  A panel each for the training loss, the training accuracy and the accuracy on
  each split that the first run was judged on along the way. Several seeds are
  thin lines, their mean over the steps that all of them have is a thick one.

  Args:
    runs: label -> the metrics.jsonl of each of its seeds.
    path: the PNG.

  Raises:
    ValueError: matplotlib is missing, or there are too many labels.
  """
  styles = _styles(runs)
  metrics = {
    label: [read_metrics(path) for path in paths]
    for label, paths in runs.items()
  }
  shown = {"loss": "training loss", "accuracy": "training accuracy"}
  shown |= {
    name: f"{name.split('/')[1]} accuracy"
    for line in next(iter(metrics.values()))[0]
    for name in line
    if name.startswith("eval/") and name.endswith("/accuracy")
  }
  figure, panels = _panels(len(shown))
  for panel, (name, title) in zip(panels, shown.items(), strict=True):
    for label, seeds in metrics.items():
      curves = [studies.curve(lines, name) for lines in seeds]
      _draw_curves(panel, curves, styles[label], label)
    panel.set_xlabel("training steps")
    panel.set_ylabel(title)
    panel.set_xlim(left=0)
    panel.set_ylim(0, None if name == "loss" else 1.02)
  _save(figure, path)


def draw_run(
  label: str, results: Mapping[str, Any], workdir: str | os.PathLike
) -> None:
  """Draws both figures of one run into its workdir.

  Raises:
    ValueError: matplotlib is missing.
  """
  workdir = Path(workdir)
  accuracy_by_depth({label: [results]}, workdir / "accuracy_by_depth.png")
  training_curves(
    {label: [workdir / "metrics.jsonl"]}, workdir / "training_curves.png"
  )


def latency(report: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Draws what `experiments.latency` measured to a PNG.

  Seconds per token and bytes against the history; a token and a sleep against
  N, a point for each history.

  Raises:
    ValueError: matplotlib is missing, or there are too many N.
  """
  cells = report["cells"]
  labels = {
    x["passes"]: f"N = {x['passes']}" if x["passes"] else "full cache"
    for x in cells
  }
  styles = _styles(dict.fromkeys(labels.values()))
  figure, panels = _panels(4)
  for n, label in labels.items():
    some = [x for x in cells if x["passes"] == n]
    histories = [x["history"] for x in some]
    drawn = dict(label=label, **_SIZES, **styles[label]._asdict())
    for panel, name, scale in (
      (panels[0], "seconds_per_token", 1e3),
      (panels[1], "state_bytes", 2**-20),
    ):
      panel.plot(histories, [scale * x[name] for x in some], **drawn)
    if n:
      for panel, name in (
        (panels[2], "seconds_per_token"),
        (panels[3], "stall_seconds"),
      ):
        y = [1e3 * x[name] for x in some]
        panel.plot([n] * len(y), y, **(drawn | {"ls": "none"}))
  for panel in panels[:2]:
    panel.set_xscale("log", base=2)
    panel.set_yscale("log")
    panel.set_xlabel("history (windows)")
  panels[0].set_ylabel("ms per token")
  panels[1].set_ylabel("MiB of state")
  for panel, what in zip(
    panels[2:], ("ms per token, awake", "ms of a sleep"), strict=True
  ):
    panel.set_xlabel("passes N")
    panel.set_ylabel(what)
    panel.set_xlim(left=0)
    panel.set_ylim(0, 1.05 * panel.get_ylim()[1])
  _save(figure, path)


def throughput(report: Mapping[str, Any], path: str | os.PathLike) -> None:
  """Draws what `experiments.throughput` measured to a PNG.

  Tokens a second against the window's length and against N, the medians, with
  quartiles, and what 1/N would be.

  Raises:
    ValueError: matplotlib is missing.
  """
  longest = max(x["window"] for x in report["cells"])
  labels = {
    "parallel": "fully parallel",
    "windowed": "N = 1, window by window",
    "sleeping": f"N passes, L = {longest}",
  }
  figure, panels = _panels(2)
  for (kind, label), style, aside in zip(
    labels.items(), _styles(labels).values(), (0.98, 1.02, 1), strict=True
  ):
    some = [x for x in report["cells"] if x["kind"] == kind]
    slow, middle, fast = np.array(
      [x["tokens"] / np.quantile(x["seconds"], (0.75, 0.5, 0.25)) for x in some]
    ).T
    sleeps = kind == "sleeping"
    panels[int(sleeps)].errorbar(
      # Of one length a little apart: their quartiles overlap.
      [aside * x["passes" if sleeps else "window"] for x in some],
      middle,
      yerr=[middle - slow, fast - middle],
      label=label,
      **_SIZES,
      **style._asdict(),
    )
    if sleeps:
      passes = np.linspace(1, max(x["passes"] for x in some), 50)
      once = middle[0] * some[0]["passes"]
      panels[1].plot(
        passes, once / passes, color=_GREY, ls="--", lw=1, label="1/N"
      )
  panels[0].set_xscale("log", base=2)
  windows = sorted({x["window"] for x in report["cells"]})
  panels[0].set_xticks(windows, windows)
  panels[0].set_xlabel("window length L (tokens)")
  panels[1].set_xlabel("passes N")
  panels[1].set_xlim(left=0)
  for panel in panels:
    panel.set_ylabel("tokens per second of training")
    panel.set_ylim(bottom=0)
  _save(figure, path)


def study_curves(
  panels: Sequence[studies.Panel],
  lines: Mapping[str, Sequence[studies.Run]],
  x: str,
  path: str | os.PathLike,
  counted: dict[str, float],
) -> None:
  """Draws a metric on the way against what training has cost, to a PNG.

  Seeds are thin lines, their mean over the steps that all have a thick one.

  Args:
    panels: what each shows.
    lines: label -> its seeds, over all panels.
    x: "tokens" or "FLOPs" (`baselines.training_flops`) of training.
    path: the PNG.
    counted: see `studies.step_flops`.

  Raises:
    ValueError: matplotlib is missing, there are too many labels, or a config's
      FLOPs cannot be counted.
  """
  styles = _styles(lines)
  figure, axes = _panels(len(panels))
  for axis, panel in zip(axes, panels, strict=True):
    for label, runs in lines.items():
      seeds = [run for run in runs if any(run is own for own in panel.runs)]
      if not seeds:
        continue
      curves = [studies.curve(run.metrics, panel.metric) for run in seeds]
      cost = seeds[0].step_tokens
      if x == "FLOPs":
        cost = studies.step_flops(seeds[0], counted)
      _draw_curves(axis, curves, styles[label], label, cost)
    if panel.floor is not None:
      axis.axhline(panel.floor, color=_GREY, ls="--", lw=1, label=_FLOOR)
    axis.set_title(panel.title, loc="left", fontsize=10)
    axis.set_xlabel(f"training {x}")
    axis.set_xlim(left=0)
    loss = panel.metric.endswith("loss")
    axis.set_ylim(0, None if loss else 1.02)
    axis.set_ylabel(
      "test loss (nats a token)" if loss else "exact accuracy, held out"
    )
  _save(figure, path)


def study_by_depth(
  lines: Mapping[str, Sequence[studies.Run]], path: str | os.PathLike
) -> None:
  """Draws how runs end by depth, mean and 95% interval over seeds, to a PNG.

  Where they differ by N alone, panels with what the paper prints stand beside;
  else where there is one depth the lines stand side by side.

  Args:
    lines: label -> its seeds, of all depths.
    path: the PNG.

  Raises:
    ValueError: matplotlib is missing, or there are too many labels.
  """
  printed: Mapping[str, Mapping[str, Mapping[int, float]]] = {}
  every = [run for runs in lines.values() for run in runs]
  if all(map(_PASSES.fullmatch, lines)):
    printed = studies.PAPER.get(every[0].config["task"]["name"], {})
  labels = [*lines, *(label for panel in printed.values() for label in panel)]
  styles = _styles(dict.fromkeys(labels))
  figure, (panel, *others) = _panels(1 + len(printed))
  floors = studies.floors(every)
  depths = list(floors)
  unit = studies.depth_unit(every)
  beside = len(depths) == 1 and not printed
  apart = 0.8 / max(len(lines), 1 if beside else 6)
  places = apart * (np.arange(len(lines)) - (len(lines) - 1) / 2)
  for place, (label, some) in zip(places, lines.items(), strict=True):
    scores: dict[float, list] = {}
    for run in some:
      for depth, score in studies.scores_by_depth(run).items():
        at = depths.index(depth) + place
        scores.setdefault(at, []).append(score["accuracy"])
    _draw_means(panel, scores, styles[label], None if beside else label)
  panel.hlines(
    list(floors.values()),
    np.arange(len(depths)) - 0.45,
    np.arange(len(depths)) + 0.45,
    color=_GREY,
    ls="--",
    lw=1,
    label=_FLOOR,
  )
  panel.set_xticks(range(len(depths)), depths)
  panel.set_xlim(-0.5, len(depths) - 0.5)
  panel.set_ylabel("exact accuracy, held out")
  for other, (title, values) in zip(others, printed.items(), strict=True):
    for i, (label, by_depth) in enumerate(values.items()):
      style = styles[label]._replace(ls=":", mfc="white")._asdict()
      at = np.array(list(by_depth)) + 0.06 * (i - (len(values) - 1) / 2)
      accuracy = list(by_depth.values())
      other.plot(at, accuracy, label=label, **style)
    other.set_title(title, loc="left", fontsize=9)
    other.set_xticks(list(by_depth))
    other.set_xlim(min(by_depth) - 1, max(by_depth) + 1)
  for axis in figure.axes:
    axis.set_xlabel(studies.depth_axis(every))
    axis.set_ylim(0, 1.02)
  if beside:
    panel.set_xticks(places, list(lines), rotation=30, ha="right", fontsize=8)
    panel.set_xlabel("")
    panel.set_title(f"{unit} = {depths[0]}", loc="left", fontsize=10)
  _save(figure, path)


def study_by_test_passes(
  lines: Mapping[str, Sequence[studies.Run]], path: str | os.PathLike
) -> None:
  """Draws accuracy against the passes of each sleep when judged, to a PNG.

  A panel for each depth, of the runs that were judged after several N; means
  and 95% intervals over seeds.

  Raises:
    ValueError: matplotlib is missing, or there are too many labels.
  """
  scores: dict[int, dict[str, dict[float, list]]] = {}
  for label, runs in lines.items():
    for run in runs:
      for n, woken in studies.woken_after(run).items():
        for depth, score in studies.scores_by_depth(woken).items():
          by_n = scores.setdefault(depth, {}).setdefault(label, {})
          by_n.setdefault(n, []).append(score["accuracy"])
  styles = _styles(lines)
  figure, panels = _panels(len(scores))
  every = [run for runs in lines.values() for run in runs]
  unit, floors = studies.depth_unit(every), studies.floors(every)
  for panel, depth in zip(panels, sorted(scores), strict=True):
    for label, by_n in scores[depth].items():
      _draw_means(panel, by_n, styles[label], label)
    panel.axhline(floors[depth], color=_GREY, ls="--", lw=1, label=_FLOOR)
    panel.set_title(f"{unit} = {depth}", loc="left", fontsize=10)
    panel.set_xlabel("passes N when judged")
    panel.set_ylim(0, 1.02)
  panels[0].set_ylabel("exact accuracy, held out")
  _save(figure, path)


def study_by_tolerance(
  lines: Mapping[str, Sequence[studies.Run]], path: str | os.PathLike
) -> None:
  """Draws passes used and accuracy against the tolerance, to a PNG.

  Means and 95% intervals over seeds; accuracy is the mean over all depths.

  Args:
    lines: label -> its seeds, of all tolerances.
    path: the PNG.

  Raises:
    ValueError: matplotlib is missing, or there are too many labels.
  """
  styles = _styles(lines)
  figure, panels = _panels(2)
  every = [run for runs in lines.values() for run in runs]
  tolerances = sorted({run.settings["sleep.tolerance"] for run in every})
  for label, runs in lines.items():
    used: dict[float, list] = {}
    right: dict[float, list] = {}
    for run in runs:
      at = tolerances.index(run.settings["sleep.tolerance"])
      scores = studies.scores_by_depth(run).values()
      used.setdefault(at, []).append(studies.passes_used(run))
      right.setdefault(at, []).append(np.mean([x["accuracy"] for x in scores]))
    most = max(run.settings["sleep.passes"] for run in runs)
    _draw_means(panels[0], used, styles[label], label, most)
    _draw_means(panels[1], right, styles[label], label)
  for panel, what in zip(
    panels, ("passes used, mean", "exact accuracy, held out"), strict=True
  ):
    panel.set_xticks(range(len(tolerances)), [f"{x:g}" for x in tolerances])
    panel.set_xlabel("tolerance: relative change of S")
    panel.set_ylabel(what)
    panel.set_ylim(bottom=0)
  panels[1].set_ylim(top=1.02)
  _save(figure, path)


def study_figures(
  runs: Sequence[studies.Run], counted: dict[str, float]
) -> dict[str, Callable[[Path], None]]:
  """File name -> what draws it, of all figures that the runs give.

  Args:
    runs: of a study.
    counted: see `studies.step_flops`.
  """
  depth = studies.depth_setting(runs)
  apart = [depth] if depth else []
  tolerance = "sleep.tolerance"
  found: dict[str, Callable[[Path], None]] = {}
  if len({run.settings[tolerance] for run in runs}) > 1:
    lines = studies.by_setting(runs, [*apart, tolerance])
    found["by_tolerance.png"] = lambda path: study_by_tolerance(lines, path)
    return found
  panels, lines = studies.panels(runs), studies.by_setting(runs, apart)

  def curves(panels, lines, x):
    return lambda path: study_curves(panels, lines, x, path, counted)

  found["by_depth.png"] = lambda path: study_by_depth(lines, path)
  found["by_tokens.png"] = curves(
    studies.loss_panels(runs) or panels, lines, "tokens"
  )
  found["by_flops.png"] = curves(panels, lines, "FLOPs")
  if depth and len(panels) > 1:
    by_line = [
      studies.Panel(label, some, panels[0].metric)
      for label, some in lines.items()
    ]
    found["depths_by_tokens.png"] = curves(
      by_line, studies.by_depth(runs), "tokens"
    )
  if any(len(studies.woken_after(run)) > 1 for run in runs):
    found["by_test_passes.png"] = lambda path: study_by_test_passes(lines, path)
  return found


def draw_folder(
  folder: str | os.PathLike, out: str | os.PathLike
) -> list[Path]:
  """Draws all figures of what lies in `folder`; returns their paths.

  Raises:
    ValueError: as `studies.read_study` and the figures.
  """
  folder, out = Path(folder), Path(out)
  drawn = []
  for name, draw in (("latency", latency), ("throughput", throughput)):
    if (folder / f"{name}.json").exists():
      drawn.append(out / f"{name}.png")
      _draw_measured(draw, folder / f"{name}.json", drawn[-1])
  if drawn:
    return drawn
  for name, draw in study_figures(studies.read_study(folder), {}).items():
    drawn.append(out / name)
    draw(drawn[-1])
  return drawn


def main() -> None:
  parser = argparse.ArgumentParser(prog="python -m experiments.figures")
  parser.add_argument("--from", dest="study", help="folder of runs")
  parser.add_argument("--workdirs", help="DIR,DIR,...")
  parser.add_argument("--labels", help="one each; default: the folders")
  parser.add_argument("--out", required=True, help="folder that gets the PNGs")
  arguments = parser.parse_args()
  if (arguments.study is None) == (arguments.workdirs is None):
    parser.error("give --from or --workdirs")
  out = Path(arguments.out)
  try:
    if arguments.study is not None:
      print(*draw_folder(arguments.study, out), sep="\n")
    else:
      print(*_draw_workdirs(parser, arguments, out), sep="\n")
  except (OSError, ValueError) as error:
    parser.exit(2, f"error: {error}\n")


def _draw_workdirs(parser, arguments, out: Path) -> list[Path]:
  workdirs = [Path(workdir) for workdir in arguments.workdirs.split(",")]
  labels = (arguments.labels or arguments.workdirs).split(",")
  if len(labels) != len(workdirs):
    parser.error(f"{len(workdirs)} --workdirs but {len(labels)} --labels")
  metrics: dict[str, list[Path]] = {}
  results: dict[str, list[dict]] = {}
  for label, workdir in zip(labels, workdirs, strict=True):
    results.setdefault(label, []).append(studies.read_results(workdir))
    metrics.setdefault(label, []).append(workdir / "metrics.jsonl")
    if not metrics[label][-1].exists():
      raise ValueError(f"{workdir} has no metrics.jsonl")
  drawn = [out / "accuracy_by_depth.png", out / "training_curves.png"]
  accuracy_by_depth(results, drawn[0])
  training_curves(metrics, drawn[1])
  return drawn


def _draw_measured(draw, report: Path, path: Path) -> None:
  try:
    measured = json.loads(report.read_text())
    if not measured["cells"]:
      raise LookupError("no cells")
    draw(measured, path)
  except (json.JSONDecodeError, LookupError, TypeError) as error:
    raise ValueError(f"{report} is no such report: {error!r}") from error


def _draw_curves(axis, curves, style, label, scale: float = 1) -> None:
  """Thin lines, and a thick one for their mean; x is step times scale."""
  drawn = dict(color=style.color, ls=style.ls)
  if len(curves) > 1:
    for curve in curves:
      x = scale * np.array(list(curve))
      axis.plot(x, list(curve.values()), lw=0.7, alpha=0.45, **drawn)
  steps = sorted(set.intersection(*map(set, curves)))
  mean = [np.mean([curve[step] for curve in curves]) for step in steps]
  axis.plot(
    scale * np.array(steps),
    mean,
    label=label,
    markevery=[-1],
    **(_SIZES | {"lw": 1.8}),
    **style._asdict(),
  )


def _draw_means(
  axis, values: Mapping[float, Sequence], style, label, most: float = 1
) -> None:
  """At each x the mean of its values, 0..`most`, and its 95% interval."""
  places = sorted(values)
  middle, low, high = np.array(
    [studies.mean_and_interval(values[x]) for x in places], float
  ).T
  # There is nothing beyond 0 and `most`; of one value there is no interval.
  axis.errorbar(
    places,
    middle,
    yerr=np.nan_to_num(
      np.maximum(
        [middle - np.maximum(low, 0), np.minimum(high, most) - middle], 0
      )
    ),
    label=label,
    **_SIZES,
    **style._asdict(),
  )


def _accuracies(scores: Mapping[str, Any]) -> np.ndarray:
  """Accuracy and the ends of its interval: [3, depths]."""
  return np.array([[s["accuracy"], *s["interval"]] for s in scores.values()]).T


def _styles(labels: Mapping[str, Any]) -> dict[str, _Style]:
  """A style each; that of "N = n" alone is the same in every figure."""
  if len(labels) > len(_STYLES):
    raise ValueError(
      f"{len(labels)} labels cannot be told apart in one figure: draw at most"
      f" {len(_STYLES)}"
    )
  found = {
    label: _STYLES[int(said[1]) - 1]
    for label in labels
    if (said := _PASSES.fullmatch(label)) and int(said[1]) <= len(_STYLES)
  }
  left = (style for style in _STYLES if style not in found.values())
  return {label: found.get(label) or next(left) for label in labels}


def _panels(count: int) -> tuple[Any, Sequence[Any]]:
  """A figure and its `count` panels, at most _MOST_BESIDE in a row."""
  try:
    from matplotlib.figure import Figure
  except ImportError as error:
    raise ValueError(
      "figures need matplotlib: pip install 'sleep_jax[plots]'"
    ) from error
  rows = math.ceil(count / _MOST_BESIDE)
  columns = math.ceil(count / rows)
  figure = Figure(
    figsize=(0.8 + 3.4 * columns, 0.4 + 3.0 * rows), layout="constrained"
  )
  panels = figure.subplots(rows, columns, squeeze=False).ravel()
  for unused in panels[count:]:
    figure.delaxes(unused)
  panels = panels[:count]
  for panel in panels:
    panel.spines[["top", "right"]].set_visible(False)
    panel.grid(axis="y", color="#E5E5E5", lw=0.6)
    panel.set_axisbelow(True)
  return figure, panels


def _save(figure: Any, path: str | os.PathLike) -> None:
  """Writes the figure with one legend, each label in it once."""
  handles: dict[str, Any] = {}
  for panel in figure.axes:
    for handle, label in zip(*panel.get_legend_handles_labels(), strict=True):
      handles.setdefault(label, handle)
  labels = sorted(handles, key=_FLOOR.__eq__)  # the floor comes last
  columns = _fit(figure, labels)
  rows = math.ceil(len(labels) / columns)
  figure.set_figheight(figure.get_figheight() + 0.22 * max(0, rows - 2))
  figure.legend(
    [handles[label] for label in labels],
    labels,
    loc="outside upper center",
    ncols=columns,
    frameon=False,
  )
  Path(path).parent.mkdir(parents=True, exist_ok=True)
  figure.savefig(path, dpi=160)


def _fit(figure: Any, labels: Sequence[str]) -> int:
  """How many columns of a legend find room side by side."""
  inches = max(map(len, labels)) / 14 + 0.5
  return max(1, int(figure.get_figwidth() / inches))


if __name__ == "__main__":
  main()
