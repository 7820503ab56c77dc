"""A sweep: every point of a grid of settings is a run in its own folder.

  python -m experiments.sweep --config=experiments/automaton.py \
      --grid="sleep.passes=1,2,4 run.seed=0,1,2"

A grid is the product of its settings, each named as `--config.<path>` of
`experiments.main` names it; several --grid are put together. The runs lie in
--workdir (default: runs/<config>-sweep), each named by its settings, with what
it says in log.txt. The same command skips what is done, goes on with what was
cut, tries again what failed, and writes sweep.json and sweep.csv. On a
cluster: --list gives the commands that are left, `--slurm | sbatch` starts
them, and --table_only makes the table.

Exit codes: 0, all points are done; 1, some are not, which are named; 2, with
one line, something was refused before any of them ran, or the table could not
be written; 75, told to end, the same command goes on.
"""

import contextlib
import csv
import dataclasses
import fcntl
import functools
import hashlib
import io
import itertools
import json
import operator
import re
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from experiments import main as command
from experiments import studies

_LOG = "log.txt"
_DONE = "done"
_STOPPED = "stopped"
_POLL_SECONDS = 0.5
# Of a row of the table: what has a mean and an interval over the seeds, and
# what all seeds share.
_MEASURED = ("accuracy", "label_accuracy", "loss", "seconds")
_SHARED = ("count", "floor", "label_floor", "tokens", "flops")


@dataclasses.dataclass(frozen=True, eq=False)
class Point:
  """One run of a sweep."""

  # Path of a setting -> its value, of those that the grid sets.
  settings: Mapping[str, Any]
  # The whole `sleep_jax.config.ExperimentConfig`.
  config: Any
  # The run's workdir, and what starts the run or goes on with it.
  folder: Path
  command: Sequence[str]

  @property
  def name(self) -> str:
    return self.folder.name


def combinations(grid: str) -> list[dict[str, str]]:
  """All combinations of a grid: path -> value, as text.

  Args:
    grid: like "sleep.passes=1,2 run.seed=0,1"; commas within brackets are of
      one value.

  Raises:
    ValueError: it cannot be read so.
  """
  axes: dict[str, list[str]] = {}
  for axis in re.split(r"\s+(?=[\w.]+=)", grid.strip()):
    path, equals, values = axis.partition("=")
    if not equals or not re.fullmatch(r"\w+(\.\w+)+", path):
      raise ValueError(
        f"--grid: {axis!r}: give PATH=VALUE,VALUE, as in sleep.passes=1,2,4"
      )
    if path in axes:
      raise ValueError(f"--grid: {path} is set twice: give it all its values")
    axes[path] = _split(values)
  return [
    dict(zip(axes, values, strict=True))
    for values in itertools.product(*axes.values())
  ]


def make_points(
  filename: str,
  base: ConfigDict,
  overrides: Mapping[str, Any],
  grids: Sequence[str],
  folder: Path,
) -> list[Point]:
  """The points of all grids, each once, their configs checked.

  Args:
    filename: what --config says.
    base: the config that it gives, with the overrides.
    overrides: of the command line, for all points: path -> value.
    grids: see `combinations`.
    folder: gets the folders of all points.

  Raises:
    ValueError: a grid or a config is wrong.
  """
  from sleep_jax.config import ExperimentConfig, from_config_dict

  points: dict[ExperimentConfig, Point] = {}
  for texts in itertools.chain.from_iterable(map(combinations, grids)):
    try:
      config = _overridden(base, texts)
      settings = {
        path: functools.reduce(operator.getitem, path.split("."), config)
        for path in texts
      }
      checked = from_config_dict(config)
    except Exception as error:  # flags raise anything; the last line says what
      at = " ".join(f"{path}={text}" for path, text in texts.items())
      raise ValueError(f"--grid, at {at}: {command.said(error)}") from error
    workdir = folder / _name(settings)
    point = Point(
      settings,
      checked,
      workdir,
      [
        *(sys.executable, "-m", "experiments.main", f"--config={filename}"),
        *_as_flags({**overrides, **texts}),
        f"--workdir={workdir}",
      ],
    )
    # Two grids may meet in one config, by other settings.
    points.setdefault(checked, point)
  return list(points.values())


def is_done(point: Point) -> bool:
  """Whether the point's run has ended, and been judged.

  Raises:
    ValueError: its folder holds a run with another config.
  """
  from sleep_jax.training.workdir import check_config

  check_config(point.folder, dataclasses.asdict(point.config))
  try:
    return studies.read_run(point.folder).finished
  except ValueError:
    return False


def run_points(points: Sequence[Point], jobs: int) -> dict[str, str]:
  """Runs the points that are not done, `jobs` at once, and shows how far.

  Those that fail leave the others alone. On SIGTERM, SIGINT or SIGHUP all runs
  get SIGTERM, and are waited for.

  Returns:
    name -> "done", "stopped" (told to end; what it has done is saved), or how
    it failed.

  Raises:
    ValueError: a folder holds a run with another config; none has run.
  """
  from tqdm import tqdm

  from sleep_jax.training.workdir import open_workdir

  waiting = [point for point in points if not is_done(point)]
  ends = {point.name: _STOPPED for point in waiting}
  ends = {point.name: ends.get(point.name, _DONE) for point in points}
  for point in waiting:
    open_workdir(point.folder, dataclasses.asdict(point.config))
  steps = {point.name: _step(point) for point in points}
  running: dict[Point, subprocess.Popen | None] = {}
  heard, ended, began = 0, len(points) - len(waiting), {}
  with (
    _signals() as told,
    # A bar on a terminal only; its `write` is for both.
    tqdm(
      total=sum(point.config.run.steps for point in points),
      initial=sum(steps.values()),
      unit="step",
      disable=None,
    ) as bar,
  ):

    def say(point: Point, what: str):
      line = f"[{ended}/{len(points)}] {point.name}: {what}"
      bar.write(line, file=sys.stderr)

    try:
      while waiting or running:
        if len(told) > heard:
          heard = len(told)
          waiting.clear()
          for process in filter(None, running.values()):
            process.terminate()
        while waiting and len(running) < jobs:
          running[waiting.pop(0)] = None
        for point, process in list(running.items()):
          if process is None and not told and not is_done(point):
            try:
              running[point] = _start(point)
            except OSError as error:  # a full disk
              del running[point]
              ends[point.name] = f"cannot be started: {error}"
              ended += 1
              continue
            if point not in began:
              other = running[point] is None
              say(point, "waits for another process there" * other or "runs")
            began.setdefault(point, time.monotonic())
          elif process is None or process.poll() is not None:
            del running[point]
            ends[point.name] = end = _end(point, process, bool(told))
            ended += 1
            seconds = time.monotonic() - began.get(point, time.monotonic())
            say(point, f"{end} ({seconds:.0f} s)")
          steps[point.name] = _step(point)
        bar.n = sum(steps.values())
        bar.set_postfix_str(
          f"{ended}/{len(points)} points ended, {len(running)} at work"
        )
        if running:
          time.sleep(_POLL_SECONDS)
    finally:
      for process in filter(None, running.values()):
        process.terminate()
        process.wait()
  return ends


def table(points: Sequence[Point]) -> list[dict[str, Any]]:
  """Rows over the seeds of each setting, for each split, all depths and each.

  A row has the settings, "seeds" (how many), "split", "depth" and, for each of
  "accuracy" (exact), "label_accuracy", "loss" (of all depths alone) and
  "seconds" (of the training steps, without compiling and judging), the mean and
  the ends of its 95% interval over the seeds (`mean_and_interval`): "loss",
  "loss_low", "loss_high". And "count" (of answers), their "floor" and
  "label_floor" (what the best constant answer scores on them), "tokens" and
  "flops" (`baselines.training_flops`) of one training.

  Args:
    points: those that are done.

  Raises:
    ValueError: the FLOPs of a config cannot be counted.
  """
  from sleep_jax.baselines import training_flops

  paths = dict.fromkeys(path for point in points for path in point.settings)
  for path in studies.SEEDS:
    paths.pop(path, None)
  groups: dict[tuple, list[Point]] = {}
  for point in points:
    # Also what only another grid sets.
    key = tuple(operator.attrgetter(path)(point.config) for path in paths)
    groups.setdefault(key, []).append(point)
  rows = []
  for key, seeds in groups.items():
    runs = [studies.read_run(point.folder) for point in seeds]
    results, config = [run.results for run in runs], seeds[0].config
    once = {
      "seconds": [run.seconds for run in runs],
      "tokens": [config.run.steps * runs[0].step_tokens],
      "flops": [training_flops(config)],
    }
    for split in results[0]:
      sets = {"all": [result[split]["overall"] for result in results]}
      # With few examples some depth may not have been drawn for every seed.
      for by_depth in (result[split]["depth"] for result in results):
        for depth, score in by_depth.items():
          sets.setdefault(depth, []).append(score)
      for depth, scores in sets.items():
        values = once | {
          name: [score[name] for score in scores]
          for name in (*_MEASURED, *_SHARED)
          if name in scores[0]
        }
        if depth == "all":
          values["loss"] = [
            run.metrics[-1][f"eval/{split}/loss"] for run in runs
          ]
        row = dict(zip(paths, key, strict=True))
        row |= {"seeds": len(scores), "split": split, "depth": depth}
        for name in _MEASURED:
          mean, low, high = studies.mean_and_interval(values.get(name, ()))
          row |= {name: mean, f"{name}_low": low, f"{name}_high": high}
        # With other data the questions are others, and so are their floors.
        rows.append(
          row | {name: statistics.mean(values[name]) for name in _SHARED}
        )
  return rows


def as_text(rows: Sequence[Mapping[str, Any]]) -> str:
  """The table in Markdown, the intervals behind the means."""

  def cell(row, name):
    value, low, high = (row.get(name + end) for end in ("", "_low", "_high"))
    digits = ".4g" if name in ("flops", "seconds") else ".3f"
    measured = name in (*_MEASURED, "floor", "label_floor", "flops")
    if value is None or not measured:
      return "" if value is None else str(value)
    interval = "" if low is None else f" [{low:{digits}}, {high:{digits}}]"
    return f"{value:{digits}}{interval}"

  names = [name for name in rows[0] if not name.endswith(("_low", "_high"))]
  return studies.markdown_table(
    [{name: cell(row, name) for name in names} for row in rows]
  )


def slurm(points: Sequence[Point]) -> str:
  """A script for sbatch: an array with a task for each point."""
  # `exec`: the signal, two minutes before the end, is for the run itself.
  tasks = [
    f"{i}) mkdir -p {at} && exec flock --nonblock --no-fork {at}/lock "
    f"{shlex.join(point.command)} >>{at}/{_LOG} 2>&1 ;;"
    for i, point in enumerate(points)
    for at in [shlex.quote(str(point.folder))]
  ]
  return "\n".join(
    [
      "#!/bin/bash",
      "#SBATCH --job-name=sweep",
      f"#SBATCH --array=0-{len(points) - 1}",
      "#SBATCH --signal=B:TERM@120",
      "case $SLURM_ARRAY_TASK_ID in",
      *tasks,
      "esac",
    ]
  )


def write_table(
  folder: Path,
  rows: Sequence[Mapping[str, Any]],
  points: Sequence[Point],
  ends: Mapping[str, str],
) -> None:
  """Writes sweep.json (the points, how they ended, the rows) and sweep.csv."""
  from sleep_jax.training.workdir import write_atomically

  report = {
    "points": [
      {"folder": point.name, "settings": point.settings}
      | {"end": ends[point.name]}
      for point in points
    ],
    "rows": rows,
  }
  text = json.dumps(report, indent=2, allow_nan=False) + "\n"
  write_atomically(folder / "sweep.json", text)
  lines = io.StringIO()
  writer = csv.DictWriter(lines, list(rows[0]) if rows else [])
  writer.writeheader()
  writer.writerows(rows)
  write_atomically(folder / "sweep.csv", lines.getvalue())


def main(_):
  import jax

  from sleep_jax.training import preemption

  logging.set_verbosity(logging.WARNING)
  # This process only counts; the devices are for the runs.
  jax.config.update("jax_platforms", "cpu")
  given, config_flag = flags.FLAGS, flags.FLAGS["config"]
  folder = Path(command.WORKDIR.value or f"runs/{command.config_name()}-sweep")
  try:
    points = make_points(
      config_flags.get_config_filename(config_flag),
      command.CONFIG.value,
      config_flags.get_override_values(config_flag),
      given.grid,
      folder,
    )
    left = [point for point in points if not is_done(point)]
    if given.list or given.slurm:
      if given.list:
        print(*(shlex.join(point.command) for point in left), sep="\n")
      elif left:
        print(slurm(left))
      return
    if given.table_only:
      if not folder.exists():
        raise ValueError(f"there is no folder {folder}: name it by --workdir")
      ends = {
        point.name: "not done" if point in left else _DONE for point in points
      }
    else:
      ends = run_points(points, given.jobs)
    if _STOPPED in ends.values():
      sys.exit(preemption.EXIT_CODE)
    rows = table([point for point in points if ends[point.name] == _DONE])
    write_table(folder, rows, points, ends)
  except (ValueError, OSError) as error:
    command.fail(error)
  if rows:
    print(as_text(rows))
  print(f"{folder}/sweep.json\n{folder}/sweep.csv")
  for name, end in ends.items():
    if end != _DONE:
      sys.stderr.write(f"error: {folder / name}: {end}\n")
  sys.exit(int(set(ends.values()) != {_DONE}))


def _split(values: str) -> list[str]:
  """The parts between the commas that no bracket encloses."""
  parts, depth = [""], 0
  for character in values:
    depth += (character in "([{") - (character in ")]}")
    if character == "," and not depth:
      parts.append("")
    else:
      parts[-1] += character
  return [part.strip() for part in parts]


def _overridden(base: ConfigDict, texts: Mapping[str, str]) -> ConfigDict:
  """The config as `experiments.main` parses these overrides of it."""
  argv = ["", *_as_flags(texts)]
  values = flags.FlagValues()
  config = config_flags.DEFINE_config_dict(
    "config",
    base.copy_and_resolve_references(),
    flag_values=values,
    sys_argv=argv,
  )
  values(argv)
  return config.value


def _as_flags(settings: Mapping[str, Any]) -> list[str]:
  return [f"--config.{path}={value}" for path, value in settings.items()]


def _name(settings: Mapping[str, Any]) -> str:
  """A folder's name, which tells these settings from all others."""
  text = "+".join(f"{path}={value}" for path, value in settings.items())
  name = re.sub(r"[^\w.=+-]", "_", text, flags=re.ASCII)
  if name == text and len(name) <= 200:
    return name
  return f"{name[:180]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def _start(point: Point) -> subprocess.Popen | None:
  """Starts the run; None while another process is at work in its folder.

  The run inherits the lock and keeps it as long as it lives, even if the sweep
  is killed.
  """
  with (
    open(point.folder / "lock", "a") as lock,
    open(point.folder / _LOG, "a") as log,
  ):
    try:
      fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      return None
    return subprocess.Popen(
      point.command,
      stdin=subprocess.DEVNULL,
      stdout=log,
      stderr=log,
      pass_fds=[lock.fileno()],
      # What a terminal sends is for the sweep, which passes on SIGTERM.
      start_new_session=True,
    )


def _end(point: Point, process: subprocess.Popen | None, told: bool) -> str:
  """How a run ended, in one line; see `run_points`."""
  from sleep_jax.training import preemption

  if is_done(point):
    return _DONE
  if told or process is None:
    return _STOPPED
  log = point.folder / _LOG
  code = process.returncode
  if code == preemption.EXIT_CODE:
    return "told to end by another than the sweep"
  if code < 0:
    return f"killed by {signal.Signals(-code).name}, see {log}"
  lines = log.read_text("utf-8", "replace").strip().splitlines() or [""]
  return f"exit code {code}, see {log}: {lines[-1].strip()}"


def _step(point: Point) -> int:
  """The last step that the run has written a line of metrics for."""
  try:
    text = (point.folder / "metrics.jsonl").read_text("utf-8", "replace")
  except FileNotFoundError:
    return 0
  steps = re.findall(r'^{"step": (\d+)', text, re.MULTILINE)
  return int(steps[-1]) if steps else 0


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
  """The signals to end that have come, so far."""
  told: list[int] = []
  numbers = signal.SIGTERM, signal.SIGINT, signal.SIGHUP
  before = {
    number: signal.signal(number, lambda number, _: told.append(number))
    for number in numbers
    if signal.getsignal(number) != signal.SIG_IGN  # as under nohup
  }
  try:
    yield told
  finally:
    for number, handler in before.items():
      signal.signal(number, handler)


if __name__ == "__main__":
  flags.DEFINE_multi_string(
    "grid", None, 'settings, as "sleep.passes=1,2,4 run.seed=0,1,2"'
  )
  flags.DEFINE_integer("jobs", 1, "runs at once, which share the devices", 1)
  flags.DEFINE_bool("list", False, "only print the commands that are left")
  flags.DEFINE_bool("slurm", False, "only print a script for sbatch")
  flags.DEFINE_bool("table_only", False, "only make the table")
  flags.mark_flag_as_required("grid")
  flags.mark_bool_flags_as_mutual_exclusive(["list", "slurm", "table_only"])
  app.run(main, flags_parser=command.parse)
