"""Killed at any moment, however often, a run ends with the same bits.

KILLS=100 python -m pytest tests/test_reliability.py -m slow -s
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import automaton
from tests.test_loop import equal, final_params

KILLS = int(os.environ.get("KILLS", "5"))
STEPS = 40
FLAGS = (
  f"--config.run.steps={STEPS} --config.run.checkpoint_every=2 "
  "--config.run.evaluate_every=15 --config.run.log_every=5 "
  "--config.run.evaluation_examples=32"
).split()


def start(workdir, said):
  """Starts a run, or goes on with it; what it says is in the file `said`.

  What one process has compiled the next ones find (tests/conftest.py).
  """
  with open(said, "w") as errors:
    return subprocess.Popen(
      [
        *(sys.executable, "-m", "experiments.main", f"--workdir={workdir}"),
        *("--config=experiments/automaton.py:tiny", *FLAGS),
      ],
      cwd=Path(__file__).parents[1],
      stdout=subprocess.DEVNULL,
      stderr=errors,
    )


def outcome(workdir):
  results = (workdir / "results.json").read_bytes()
  return results, final_params(workdir, automaton.tiny())


def newest(workdir):
  """The newest finished step, 0 if there is none."""
  finished = (workdir / "checkpoints").glob("*/commit_success.txt")
  return max((int(path.parent.name) for path in finished), default=0)


@pytest.mark.slow
def test_killed_at_random_moments(tmp_path):
  said = tmp_path / "said"
  for name in ("unbroken", "again"):  # the second finds all compiled
    began = time.monotonic()
    assert start(tmp_path / name, said).wait() == 0, said.read_text()
    seconds = time.monotonic() - began
  results, params = outcome(tmp_path / "unbroken")
  rng, kills, runs, resumed = random.Random(0), 0, 0, []
  while kills < KILLS:
    workdir, running = tmp_path / f"killed-{runs}", True
    while running:
      before = newest(workdir)
      process = start(workdir, said)
      try:
        # After the last kill the run may end.
        wait = rng.uniform(0, seconds) if kills < KILLS else None
        assert process.wait(wait) == 0, said.read_text()
        running = False
      except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        kills += 1
      lines = said.read_text().splitlines()
      found = [line for line in lines if "resuming from step" in line]
      assert all(line.endswith(f"from step {before}") for line in found), found
      resumed += [before] * len(found)
      assert not any("cannot be read" in line for line in lines), lines
    runs += 1
    mine = outcome(workdir)
    assert mine[0] == results
    assert equal(mine[1], params)
  print(
    f"{kills} kills in {runs} runs of {STEPS} steps ({seconds:.0f} s each "
    f"where nothing happens), resumed from steps {sorted(resumed)}"
  )
  assert resumed
