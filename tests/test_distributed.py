"""Several processes on one machine train as one, and end together."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import automaton
from sleep_jax.training.preemption import EXIT_CODE
from tests.test_checkpoints import save
from tests.test_loop import final_params, lines

FLAGS = (
  "--config.run.steps=6 --config.run.checkpoint_every=2 "
  "--config.run.log_every=1 --config.run.evaluate_every=3 "
  "--config.run.evaluation_examples=40"
).split()


def free_port():
  with socket.socket() as free:
    free.bind(("localhost", 0))
    return free.getsockname()[1]


def start(workdir, count, *flags, devices=4, timeout=120):
  """`count` processes of one run, with `devices` over all of them."""
  port = free_port()
  environment = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_NUM_CPU_DEVICES": str(devices // count),
  }
  together = [f"--coordinator=localhost:{port}", f"--processes={count}"]
  return [
    subprocess.Popen(
      [
        *(sys.executable, "-m", "experiments.main"),
        *("--config=experiments/automaton.py:tiny", f"--workdir={workdir}"),
        *(FLAGS if count == 1 else [*FLAGS, *together, f"--process={i}"]),
        *(f"--timeout={timeout}", *flags),
      ],
      env=environment,
      cwd=Path(__file__).parents[1],
      stderr=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
    )
    for i in range(count)
  ]


def finish(processes, timeout=600):
  """(exit code, stdout, stderr) of each."""
  ended = []
  for process in processes:
    printed, said = process.communicate(timeout=timeout)
    # Gloo greets on stdout, from threads of its own, sometimes in two pieces.
    lines = [
      x
      for x in printed.splitlines()
      if "connected" not in x and not x.strip().isdigit()
    ]
    ended.append((process.returncode, "\n".join(lines), said))
  return ended


def losses(workdir):
  return {x["step"]: x["loss"] for x in lines(workdir) if "loss" in x}


def wait_for_step(workdir, step, processes):
  for _ in range(3000):
    try:
      if step in losses(workdir):
        return
    except (OSError, ValueError):
      pass
    assert all(process.poll() is None for process in processes)
    time.sleep(0.1)
  raise AssertionError(f"step {step} was never reached")


def params_of(workdir):
  return jax.tree.leaves(final_params(workdir, automaton.tiny()))


def test_a_partner_that_never_comes(tmp_path):
  """Within the time-out, in one line, and without a folder."""
  before = time.monotonic()
  _, absent = started = start(tmp_path / "run", 2, timeout=5)
  absent.kill()
  absent.communicate()
  ((code, _, said),) = finish(started[:1], timeout=120)
  assert code == 2
  assert said.splitlines()[-1].startswith(
    "error: not all processes came within 5 seconds (this is process 0 of 2, by"
  )
  assert not (tmp_path / "run").exists()
  assert time.monotonic() - before < 90


def test_flags_that_belong_together(tmp_path):
  program = [sys.executable, "-m", "experiments.main"]
  ended = subprocess.run(
    [*program, "--config=experiments/automaton.py:tiny", "--processes=2"],
    cwd=Path(__file__).parents[1],
    capture_output=True,
    text=True,
  )
  assert ended.returncode == 2
  assert "--coordinator, --processes and --process belong" in ended.stderr


@pytest.mark.slow
def test_a_cluster_tells_who_the_others_are():
  """SLURM's variables in place of our flags."""
  program = (
    "from sleep_jax.parallel import distributed; distributed.start(60); "
    "import jax; print(jax.process_index(), jax.device_count())"
  )
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", program],
      env=os.environ
      | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "2"}
      | {"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NODELIST": "localhost"}
      | {"SLURM_NTASKS": "2", "SLURM_PROCID": str(i), "SLURM_LOCALID": str(i)},
      cwd=Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  said = [said.strip() for _, said, _ in finish(processes, timeout=120)]
  assert said == ["0 4", "1 4"]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
  """A run of one process with four devices."""
  workdir = tmp_path_factory.mktemp("alone") / "run"
  ((code, said, _),) = finish(start(workdir, 1))
  assert code == 0
  return workdir, said


@pytest.mark.slow
# Not four over (1, 2, 2), see docs/distributed.md.
@pytest.mark.parametrize(
  "count, mesh", [(2, (4, 1, 1)), (4, (4, 1, 1)), (2, (1, 2, 2))]
)
def test_processes_train_as_one(alone, tmp_path, count, mesh):
  """The same losses, results and checkpoints, whoever holds what."""
  flags = [
    f"--config.mesh.{axis}={size}"
    for axis, size in zip(("data", "fsdp", "tensor"), mesh, strict=True)
  ]
  ended = finish(start(tmp_path / "run", count, *flags))
  assert [code for code, *_ in ended] == [0] * count, ended
  one, many = losses(alone[0]), losses(tmp_path / "run")
  assert list(one) == list(many) == [1, 2, 3, 4, 5, 6]
  np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-4)
  # Only the first says anything, and what one process says.
  table = ended[0][1].splitlines()
  assert len(table) == len(alone[1].splitlines()) == 5
  assert all(not said for _, said, _ in ended[1:])
  for x, y in zip(
    params_of(tmp_path / "run"), params_of(alone[0]), strict=True
  ):
    np.testing.assert_allclose(x, y, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("count", [1, 2])
def test_on_with_the_same_mesh_to_the_bit(tmp_path, count):
  flags = "--config.mesh.fsdp=2", "--config.mesh.tensor=2"
  broken, whole = tmp_path / "broken", tmp_path / "whole"
  assert {x[0] for x in finish(start(whole, count, *flags))} == {0}
  for step in (1, 4):
    running = start(broken, count, *flags)
    wait_for_step(broken, step, running)
    running[0].send_signal(signal.SIGTERM)
    assert {x[0] for x in finish(running)} == {EXIT_CODE}
  assert {x[0] for x in finish(start(broken, count, *flags))} == {0}
  assert losses(broken) == losses(whole)
  for x, y in zip(params_of(broken), params_of(whole), strict=True):
    np.testing.assert_array_equal(x, y)


@pytest.mark.slow
def test_on_with_other_meshes_and_numbers_of_processes(alone, tmp_path):
  """Two steps each on 8 -> 4 -> 1 -> 2 devices, by 2, 4, 1 and 1 processes."""
  workdir = tmp_path / "run"
  for count, devices, step in ((2, 8, 2), (4, 4, 4), (1, 1, 5), (1, 2, 6)):
    if step in (2, 6):
      assert (step == 6) == workdir.exists()
    elif step in losses(workdir):  # the one before went that far at once
      continue
    running = start(workdir, count, "--config.mesh.fsdp=1", devices=devices)
    if step < 6:
      wait_for_step(workdir, step, running)
      running[-1].send_signal(signal.SIGTERM)
    ended = finish(running)
    if step == 6:
      assert ended[0][0] == 0
    else:
      assert {code for code, *_ in ended} <= {EXIT_CODE, 0}, ended
  one, many = losses(alone[0]), losses(workdir)
  assert list(one) == list(many)
  np.testing.assert_allclose(list(many.values()), list(one.values()), rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [0.0, 2.0, 5.0, 9.0])
def test_a_signal_to_one_of_two_ends_both_at_one_step(tmp_path, seconds):
  """At some moment after the start: compiling, stepping, judging, saving."""
  workdir = tmp_path / "run"
  running = start(workdir, 2, "--config.run.steps=200")
  while not (workdir / "config.json").exists():
    assert all(process.poll() is None for process in running)
    time.sleep(0.1)
  time.sleep(seconds)
  running[1].send_signal(signal.SIGTERM)
  ended = finish(running)
  assert [code for code, *_ in ended] == [EXIT_CODE] * 2, ended
  (step,) = {
    line.split("step ")[1].split(" is saved")[0]
    for _, _, said in ended
    for line in said.splitlines()
    if "is saved" in line
  }
  steps = [int(x.name) for x in (workdir / "checkpoints").iterdir()]
  assert max(steps) == int(step)
  assert (workdir / "checkpoints" / step / "commit_success.txt").exists()


@pytest.mark.slow
def test_one_of_two_dies(tmp_path):
  """The other ends within the time-out, with a message; what is saved stays."""
  workdir = tmp_path / "run"
  running = start(workdir, 2, "--config.run.steps=10000", timeout=20)
  wait_for_step(workdir, 3, running)
  running[1].kill()
  before = time.monotonic()
  code, _, said = finish(running, timeout=120)[0]
  assert code != 0 and time.monotonic() - before < 60
  assert "error: " in said or "distributed" in said, said
  assert any((workdir / "checkpoints").glob("*/commit_success.txt"))


@pytest.mark.slow
def test_what_one_of_two_cannot_read_neither_takes(tmp_path):
  """Bytes that come back bad to the second process alone."""
  save(tmp_path, (1, 2))
  program = f"""
from orbax.checkpoint import StandardCheckpointHandler as Handler
from sleep_jax.parallel import distributed
from sleep_jax.training.checkpoints import Checkpoints
from tests.test_checkpoints import batches, state
process = int(__import__("sys").argv[1])
distributed.start(60, "localhost:{free_port()}", 2, process)
restore = Handler.restore
def damaged(self, folder, *args, **kwargs):
  if process == 1 and folder.parent.name == "2":
    raise ValueError("bad bytes")
  return restore(self, folder, *args, **kwargs)
Handler.restore = damaged
with Checkpoints({str(tmp_path)!r}) as checkpoints:
  print("step", checkpoints.restore_latest(*state(0), batches())[0])
"""
  processes = [
    subprocess.Popen(
      [sys.executable, "-c", program, str(i)],
      env=os.environ | {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"},
      cwd=Path(__file__).parents[1],
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for i in range(2)
  ]
  ended = finish(processes, timeout=120)
  assert [(code, said) for code, said, _ in ended] == [(0, "step 1")] * 2, ended
  assert "another process cannot read it" in ended[0][2]
  assert "bad bytes" in ended[1][2]
