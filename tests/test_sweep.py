"""A sweep runs what is left to run, and its table is that of its runs."""

import contextlib
import csv
import dataclasses
import fcntl
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from experiments import automaton, studies, sweep
from sleep_jax.training.workdir import open_workdir

ROOT = Path(__file__).parents[1]


def make_points(folder, *grids, overrides=None):
  base = automaton.get_config("tiny")
  for path, value in (overrides or {}).items():
    section, leaf = path.split(".")
    base[section][leaf] = value
  return sweep.make_points(
    "experiments/automaton.py:tiny", base, overrides or {}, grids, folder
  )


def results(accuracy):
  scores = {
    "count": 8,
    "accuracy": accuracy,
    "interval": [0.0, 1.0],
    "floor": 0.25,
    "label_accuracy": accuracy / 2,
    "label_floor": 0.5,
  }
  return {"heldout": {"overall": scores, "depth": {"4": scores}}}


def finish(point, accuracy=0.5, seconds=10.0):
  """Leaves what the point's run leaves when it has ended."""
  open_workdir(point.folder, dataclasses.asdict(point.config))
  steps = point.config.run.steps
  lines = [
    # The second line is of a run that was cut and went on.
    {"step": steps // 4, "loss": 1.0, "steps_per_second": steps / seconds},
    {"step": steps, "loss": 1.0, "steps_per_second": steps / seconds},
    {"step": steps, "eval/heldout/loss": 1 - accuracy},
  ]
  (point.folder / "metrics.jsonl").write_text(
    "".join(json.dumps(line) + "\n" for line in lines)
  )
  (point.folder / "results.json").write_text(json.dumps(results(accuracy)))


def acting(points, *scripts):
  """The points with Python scripts in place of their runs.

  In a script `{folder}` is the point's and `{finished}` a folder that has what
  a finished run leaves.
  """
  acting = []
  for point, script in zip(points, scripts, strict=True):
    finished = point.folder.with_name(f"finished-{point.name}")
    finish(dataclasses.replace(point, folder=finished))
    script = "import os, shutil, signal, sys, time\n" + script.format(
      folder=str(point.folder), finished=str(finished)
    )
    command = [sys.executable, "-S", "-c", script]
    acting.append(dataclasses.replace(point, command=command))
  return acting


# Not config.json, which is there, and which a sweep may be reading.
FINISH = (
  "shutil.copytree('{finished}', '{folder}', dirs_exist_ok=True,"
  " ignore=shutil.ignore_patterns('config.json'))"
)


def test_a_grid_is_the_product_of_its_settings():
  found = sweep.combinations(
    ' a.b=1,2 \n a.c=(1, 2),((3,),),"x"  task.d=^(?!a,b)'
  )
  assert found == [
    {"a.b": b, "a.c": c, "task.d": "^(?!a,b)"}
    for b in "12"
    for c in ("(1, 2)", "((3,),)", '"x"')
  ]


def test_points_are_configs_folders_and_commands(tmp_path):
  points = make_points(
    tmp_path,
    "sleep.passes=1,2 run.seed=0,1",
    "sleep.passes=1 optimizer.clip_norm=2,2.0 model.update_rule=kda",
    "sleep.passes=2 run.seed=1",  # it is there already
    overrides={"run.steps": 30, "sleep.passes": 3},
  )
  assert [point.name for point in points] == [
    "sleep.passes=1+run.seed=0",
    "sleep.passes=1+run.seed=1",
    "sleep.passes=2+run.seed=0",
    "sleep.passes=2+run.seed=1",
    "sleep.passes=1+optimizer.clip_norm=2.0+model.update_rule=kda",
  ]
  tiny = automaton.tiny()
  assert points[3].config == dataclasses.replace(
    tiny,
    sleep=dataclasses.replace(tiny.sleep, passes=2),
    run=dataclasses.replace(tiny.run, seed=1, steps=30),
  )
  assert points[4].config.model.update_rule == "kda"
  assert points[4].config.optimizer.clip_norm == 2.0
  assert points[4].config.sleep.passes == 1
  assert points[3].command == [
    sys.executable,
    *("-m", "experiments.main", "--config=experiments/automaton.py:tiny"),
    *("--config.run.steps=30", "--config.sleep.passes=2"),
    *("--config.run.seed=1", f"--workdir={tmp_path}/{points[3].name}"),
  ]


def test_names_are_those_of_folders_and_tell_points_apart(tmp_path):
  points = make_points(
    tmp_path,
    "sleep.evaluation_passes=(1,2),(1,4) data.path=/a/b,/a_b",
    f"data.path={'x' * 300},{'x' * 301}",
  )
  names = [point.name for point in points]
  assert len(set(names)) == len(names) == 6
  assert all(re.fullmatch(r"[\w.=+-]{1,200}", name) for name in names)
  assert points[0].settings["sleep.evaluation_passes"] == (1, 2)


@pytest.mark.parametrize(
  "grid, message",
  [
    ("", "give PATH=VALUE,VALUE"),
    ("passes=2", "'passes=2': give PATH=VALUE,VALUE"),
    ("sleep.passes 2", "'sleep.passes 2': give"),
    ("sleep.passes=1 sleep.passes=2", "sleep.passes is set twice"),
    ("sleep.pases=1", 'at sleep.pases=1: .* no .*"passes" instead'),
    ("sleep.nope=1", "at sleep.nope=1: the config has no 'nope'; "),
    ("sleep.passes=1,two", "at sleep.passes=two: .*invalid literal"),
    ("sleep.passes=1,,2", "at sleep.passes=: .*invalid literal"),
    (
      "run.seed=0,1 sleep.passes=1,0",
      "at run.seed=0 sleep.passes=0: .*must be at least 1",
    ),
  ],
)
def test_a_wrong_grid_is_refused(tmp_path, grid, message):
  with pytest.raises(ValueError, match=message) as error:
    make_points(tmp_path / "runs", grid)
  assert "\n" not in str(error.value)
  assert not (tmp_path / "runs").exists()


def test_what_is_done_is_left_alone_and_what_fails_stops_nothing(
  tmp_path, capfd
):
  points = make_points(tmp_path, "run.seed=0,1,2,3")
  points = acting(
    points,
    "os.mkdir('{folder}/run-again')",
    "print('error: it broke', file=sys.stderr); sys.exit(2)",
    "os.kill(os.getpid(), signal.SIGKILL)",
    FINISH,
  )
  finish(points[0])
  before = {
    path: path.stat().st_mtime_ns for path in points[0].folder.iterdir()
  }
  ends = sweep.run_points(points, jobs=2)
  assert list(ends) == [point.name for point in points]
  done, failed, killed, last = ends.values()
  assert done == last == "done"
  assert re.fullmatch(r"exit code 2, see .*log.txt: error: it broke", failed)
  assert re.fullmatch(r"killed by SIGKILL, see .*log.txt", killed)
  assert before == {
    path: path.stat().st_mtime_ns for path in points[0].folder.iterdir()
  }
  said = capfd.readouterr().err
  assert re.search(r"\[[23]/4\] run.seed=1: exit code 2", said)
  assert "[4/4] run.seed=3: done" in said
  # Tried again, the failed ones alone.
  again = acting(points, *["sys.exit(5)"] * 3, "sys.exit(6)")
  codes = [end[:11] for end in sweep.run_points(again, jobs=4).values()]
  assert codes == ["done", "exit code 5", "exit code 5", "done"]


@pytest.mark.parametrize(
  "damage", ["results.json", "metrics.jsonl", "cut", "no loss"]
)
def test_half_of_what_a_run_leaves_is_not_done(tmp_path, damage):
  (point,) = make_points(tmp_path, "run.seed=0")
  assert not sweep.is_done(point)
  finish(point)
  assert sweep.is_done(point)
  metrics = point.folder / "metrics.jsonl"
  lines = metrics.read_text().splitlines(keepends=True)
  if damage == "cut":  # as of a run that is being judged again
    metrics.write_text("".join(lines[:-1]))
  elif damage == "no loss":
    metrics.write_text("".join(lines[:-1]) + '{"step": 20}\n')
  else:
    (point.folder / damage).unlink()
  assert not sweep.is_done(point)


def test_a_folder_of_another_run_is_refused_before_any_runs(tmp_path):
  points = make_points(tmp_path, "run.seed=0,1")
  points = acting(points, FINISH, FINISH)
  (other,) = make_points(tmp_path, "run.seed=1 sleep.passes=3")
  finish(dataclasses.replace(other, folder=points[1].folder))
  with pytest.raises(ValueError, match="sleep.passes: 3 there, 4 now"):
    sweep.run_points(points, jobs=1)
  assert not points[0].folder.exists()


def test_told_to_end_it_tells_its_runs_and_starts_no_more(tmp_path):
  points = make_points(tmp_path, "run.seed=0,1")
  saves = (
    "def save(*_): os.mkdir('{folder}/saved'); sys.exit(75)\n"
    "signal.signal(signal.SIGTERM, save)\n"
    "os.mkdir('{folder}/runs'); time.sleep(60)"
  )
  points = acting(points, saves, FINISH)

  def tell():
    while not (points[0].folder / "runs").exists():
      time.sleep(0.05)
    # Not SIGINT, which a shell's background jobs ignore.
    os.kill(os.getpid(), signal.SIGTERM)

  before = signal.getsignal(signal.SIGTERM)
  threading.Thread(target=tell).start()
  ends = sweep.run_points(points, jobs=1)
  assert set(ends.values()) == {"stopped"}
  assert (points[0].folder / "saved").exists()
  assert not (points[1].folder / "results.json").exists()
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_run_that_a_killed_sweep_left_is_waited_for(tmp_path, capfd):
  """It keeps its folder's lock, and is not done a second time."""
  points = make_points(tmp_path, "run.seed=0")
  (left,) = acting(points, f"time.sleep(2)\n{FINISH}")
  (point,) = acting(points, "os.mkdir('{folder}/run-again')")
  open_workdir(point.folder, dataclasses.asdict(point.config))
  process = sweep._start(left)
  # Nothing but the run itself holds the lock.
  with open(point.folder / "lock") as lock, pytest.raises(BlockingIOError):
    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
  assert sweep.run_points([point], jobs=1) == {point.name: "done"}
  assert process.wait() == 0
  assert not (point.folder / "run-again").exists()
  assert "waits for another process" in capfd.readouterr().err


def test_mean_and_interval_are_students():
  # t of 2 degrees of freedom is 4.302653 at 97.5%; of 1, 12.706205.
  mean, low, high = studies.mean_and_interval([1.0, 2.0, 3.0])
  assert mean == 2.0
  assert (low, high) == pytest.approx(
    (2 - 4.302653 / 3**0.5, 2 + 4.302653 / 3**0.5), rel=1e-6
  )
  assert studies.mean_and_interval([0.0, 2.0]) == pytest.approx(
    (1.0, 1 - 12.706205, 1 + 12.706205), rel=1e-6
  )
  assert studies.mean_and_interval([0.5, 0.5]) == (0.5, 0.5, 0.5)
  assert studies.mean_and_interval([0.5]) == (0.5, None, None)
  assert studies.mean_and_interval([0.5, None]) == (None, None, None)


def test_the_table_is_over_the_seeds_of_each_setting(tmp_path, monkeypatch):
  monkeypatch.setattr(
    "sleep_jax.baselines.training_flops",
    lambda config: 1000 * config.sleep.passes,
  )
  points = make_points(
    tmp_path, "run.seed=0,1 sleep.passes=1,2", "sleep.passes=1 run.steps=40"
  )
  accuracies = (0.2, 0.5, 0.4, 0.75, 1.0)
  for point, accuracy in zip(points, accuracies, strict=True):
    finish(point, accuracy, seconds=100 * accuracy)
  rows = sweep.table(points)
  assert [
    (row["sleep.passes"], row["run.steps"], row["seeds"], row["depth"])
    for row in rows
  ] == [
    # Where a grid says nothing, the config's own.
    *((1, 20, 2, "all"), (1, 20, 2, "4")),
    *((2, 20, 2, "all"), (2, 20, 2, "4")),
    *((1, 40, 1, "all"), (1, 40, 1, "4")),
  ]
  one, one_deep, two, _, longer, _ = rows
  half_width = 12.706205 * 0.1  # t x the deviation 0.2 / sqrt(2) / sqrt(2)
  assert one["accuracy"] == pytest.approx(0.3)
  assert one["accuracy_low"] == pytest.approx(0.3 - half_width)
  assert one["accuracy_high"] == pytest.approx(0.3 + half_width)
  assert one["label_accuracy"] == pytest.approx(0.15)
  assert one["loss"] == pytest.approx(0.7)
  assert one["loss_high"] == pytest.approx(0.7 + half_width)
  assert one["seconds"] == pytest.approx(30)
  assert two["accuracy"] == pytest.approx(0.625)
  assert one_deep["loss"] is None and one_deep["loss_low"] is None
  assert (one["floor"], one["label_floor"], one["count"]) == (0.25, 0.5, 8)
  assert (one["flops"], two["flops"]) == (1000, 2000)
  tiny = automaton.tiny()
  tokens = tiny.data.batch_size * tiny.data.length
  assert (one["tokens"], longer["tokens"]) == (20 * tokens, 40 * tokens)
  assert longer["accuracy"] == 1.0 and longer["accuracy_low"] is None

  ends = {point.name: "done" for point in points} | {points[-1].name: "broke"}
  sweep.write_table(tmp_path, rows, points, ends)
  report = json.loads((tmp_path / "sweep.json").read_text())
  assert report["rows"] == rows
  assert report["points"][-1] == {
    "folder": "sleep.passes=1+run.steps=40",
    "settings": {"sleep.passes": 1, "run.steps": 40},
    "end": "broke",
  }
  with open(tmp_path / "sweep.csv", newline="") as file:
    lines = list(csv.DictReader(file))
  assert lines == [
    {name: "" if x is None else str(x) for name, x in row.items()}
    for row in rows
  ]
  header, _, first, *_ = sweep.as_text(rows).splitlines()
  assert header.startswith("| sleep.passes | run.steps | seeds | split |")
  assert first.startswith(
    "| 1 | 20 | 2 | heldout | all | 0.300 [-0.971, 1.571] |"
  )


def test_a_depth_that_one_seed_lacks_is_of_the_others(tmp_path, monkeypatch):
  monkeypatch.setattr("sleep_jax.baselines.training_flops", lambda config: 1)
  points = make_points(tmp_path, "data.seed=0,1")
  for point, accuracy in zip(points, (0.2, 0.6), strict=True):
    finish(point, accuracy)
  found = results(0.6)
  found["heldout"]["depth"]["7"] = found["heldout"]["overall"]
  (points[1].folder / "results.json").write_text(json.dumps(found))
  rows = {row["depth"]: row for row in sweep.table(points)}
  assert {depth: row["seeds"] for depth, row in rows.items()} == {
    "all": 2,
    "4": 2,
    "7": 1,
  }
  assert rows["7"]["accuracy"] == 0.6 and rows["7"]["accuracy_low"] is None


def test_a_slurm_array_has_a_task_for_each_point(tmp_path):
  points = make_points(tmp_path, "run.seed=0,1,2")
  points = acting(points, *("print('seed', {folder!r}[-1])" for _ in points))
  script = sweep.slurm(points)
  assert "#SBATCH --array=0-2\n" in script
  for i in range(3):
    said = subprocess.run(
      ["bash", "-c", script],
      env=os.environ | {"SLURM_ARRAY_TASK_ID": str(i)},
      capture_output=True,
      text=True,
      check=True,
    )
    assert not said.stdout
    log = points[i].folder / "log.txt"
    assert log.read_text() == f"seed {i}\n"


def start(workdir, *arguments):
  return subprocess.Popen(
    [
      *(sys.executable, "-m", "experiments.sweep", f"--workdir={workdir}"),
      "--config=experiments/automaton.py:tiny",
      "--config.run.evaluation_examples=32",
      "--grid=sleep.passes=1,2 run.seed=0,1",
      *arguments,
    ],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
  )


def test_the_commands_are_printed_and_nothing_is_written(tmp_path):
  listed, _ = start(tmp_path / "runs", "--list").communicate()
  assert listed.count("-m experiments.main --config=") == 4
  assert not (tmp_path / "runs").exists()


@pytest.mark.slow
@pytest.mark.parametrize("with_its_run", [False, True])
def test_a_killed_sweep_repeats_nothing_that_is_finished(
  tmp_path, with_its_run
):
  # Long enough to be killed between two saves.
  steps = "--config.run.steps=200"
  first = start(tmp_path, steps)

  def wait_for(pattern, count):
    while len(found := list(tmp_path.glob(pattern))) < count:
      assert first.poll() is None, first.stdout.read()
      time.sleep(0.2)
    return found

  done = wait_for("*/results.json", 1)
  (second,) = {*wait_for("*/log.txt", 2)} - {done[0].with_name("log.txt")}
  if with_its_run:  # as when a machine goes down
    # The save before it is whole.
    wait_for(f"{second.parent.name}/checkpoints/20", 1)
    for path in Path("/proc").glob("[0-9]*/cmdline"):
      with contextlib.suppress(OSError):
        if f"--workdir={tmp_path}".encode() in path.read_bytes():
          os.kill(int(path.parent.name), signal.SIGKILL)
  else:
    first.kill()
  first.wait()
  files = [
    done[0].with_name(name)
    for name in ("results.json", "metrics.jsonl", "log.txt")
  ]
  before = [(path.read_bytes(), path.stat().st_mtime_ns) for path in files]
  said, _ = (again := start(tmp_path, steps)).communicate()
  assert again.returncode == 0, said
  assert ("waits for another process" in said) != with_its_run
  assert ("resuming from step" in second.read_text()) == with_its_run
  assert before == [
    (path.read_bytes(), path.stat().st_mtime_ns) for path in files
  ]
  report = json.loads((tmp_path / "sweep.json").read_text())
  assert [point["end"] for point in report["points"]] == ["done"] * 4
  assert {row["seeds"] for row in report["rows"]} == {2}
  assert {row["sleep.passes"] for row in report["rows"]} == {1, 2}
  listed, _ = start(tmp_path, steps, "--list").communicate()
  assert listed.strip() == ""


def test_a_config_that_two_grids_meet_in_is_one_point(tmp_path):
  points = make_points(
    tmp_path, "sleep.passes=1,2", "sleep.passes=2,4 run.seed=0,1"
  )
  assert [(p.config.sleep.passes, p.config.run.seed) for p in points] == [
    *((1, 0), (2, 0)),
    *((2, 1), (4, 0), (4, 1)),
  ]


def test_what_cannot_be_started_is_told_and_the_rest_go_on(
  tmp_path, monkeypatch
):
  points = make_points(tmp_path, "run.seed=0,1")
  start = sweep._start

  def full(point):
    if point is points[0]:
      raise OSError(28, "No space left on device")
    return start(point)

  monkeypatch.setattr(sweep, "_start", full)
  points[1:] = acting(points[1:], "raise SystemExit(3)")
  ends = sweep.run_points(points, jobs=1)
  assert "No space left" in ends[points[0].name]
  assert "exit code 3" in ends[points[1].name]
