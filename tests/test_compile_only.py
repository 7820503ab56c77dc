"""Targets, bad input and, where the compilers are installed, whole reports."""

import json
import pathlib
import subprocess
import sys

import jax
import pytest

from experiments import automaton
from pallas_kernels import chips
from sleep_jax import compile_only
from sleep_jax.baselines import train_step_flops
from sleep_jax.config import from_config_dict

ROOT = pathlib.Path(__file__).parents[1]


@pytest.mark.parametrize(
  "name, shape",
  [
    ("v5e-1", (1, 1)),
    ("v5e-8", (2, 4)),
    ("v6e-32", (4, 8)),
    ("v5e-256", (16, 16)),
    # Two cores a chip.
    ("v5p-8", (2, 2, 1)),
    ("v4-16", (2, 2, 2)),
    ("v5p-64", (2, 4, 4)),
    ("tpu7x-128", (4, 4, 4)),
    ("v5p-1024", (8, 8, 8)),
    ("v5p-12288", (16, 16, 24)),
  ],
)
def test_the_shape_of_a_slice(name, shape):
  assert compile_only.slice_shape(name) == (name.split("-")[0], shape)


@pytest.mark.parametrize(
  "name, said",
  [
    ("a100", "h100, or one of v4, v5e, v5p, v6e, tpu7x and a number"),
    ("v5e", "and a number, as v5e-16"),
    ("v5e-x", "and a number, as v5e-16"),
    ("v5e-2", "v5e counts chips: 1, 4, 8"),
    ("v6e-512", "128 or 256"),
    ("v5p-4", "v5p counts cores: 8, 16"),
    ("v4-16384", "a multiple of 128 up to 8192"),
    ("v5p-0", "v5p counts cores"),
    ("tpu7x-9", "tpu7x counts cores"),
  ],
)
def test_what_is_no_target_is_refused(name, said):
  with pytest.raises(ValueError, match=f"--target={name}: ") as caught:
    compile_only.find_target(name)
  assert said in str(caught.value)


@pytest.mark.parametrize("name", ["v5e-4", "h100"])
def test_a_missing_compiler_is_named_with_what_to_install(name, monkeypatch):
  monkeypatch.setattr(chips.importlib.util, "find_spec", lambda name: None)
  with pytest.raises(ValueError, match=r"missing: pip install -e '.\[compile"):
    compile_only.find_target(name)


def run(*arguments):
  return subprocess.run(
    [sys.executable, "-m", "sleep_jax.compile_only", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
  )


def test_bad_input_takes_one_line():
  done = run("--config=experiments/automaton.py:tiny", "--target=v5e-3")
  assert done.returncode == 2 and not done.stdout
  assert done.stderr.count("\n") == 1
  assert done.stderr.startswith("error: --target=v5e-3: v5e counts chips")


@pytest.mark.slow
def test_a_report_by_this_machines_compiler():
  config = from_config_dict(automaton.get_config("tiny"))
  devices = jax.devices()[:1]
  mesh, programs = compile_only.programs(config, devices)
  assert list(programs) == ["train step", "sleep step", "decode step"]
  peaks = compile_only.Peaks(1e12, 1e9, 1e9, 2**20)
  target = compile_only.Target("cpu", "cpu", devices, peaks)
  found = compile_only.report(
    "train step", programs["train step"], target, mesh, config.sleep.passes
  )
  flops = train_step_flops(config, 7)
  assert found.flops == pytest.approx(flops.total, rel=0.01)
  assert found.roofline_seconds["compute"] == pytest.approx(
    found.flops / 1e12, rel=0.5
  )
  # Parameters and optimizer state take the place of the old.
  assert found.outputs < 0.1 * found.arguments
  assert found.peak > 2**20 and "which has 0.00" in found.problem
  assert found.hbm_bytes > found.arguments and not found.sent_bytes


@pytest.mark.slow
class TestForATpu:
  TINY = "--config=experiments/automaton.py:tiny"

  @pytest.fixture(autouse=True)
  def compiler(self):
    pytest.importorskip("libtpu")

  def test_a_slice(self, tmp_path):
    file = tmp_path / "report.json"
    done = run(
      *(self.TINY, "--target=v5e-4", f"--json={file}"),
      *("--config.mesh.fsdp=2", "--config.mesh.tensor=2"),
    )
    assert done.returncode == 0, done.stderr
    report = json.loads(file.read_text())
    assert report["mesh"] == {"data": 1, "fsdp": 2, "tensor": 2}
    train, sleep, decode = report["programs"]
    for program in (train, sleep, decode):
      assert not program["problem"]
      assert 0 < program["peak"] < program["capacity"] == 16 * 2**30
      assert f"| {program['program']} | yes |" in done.stdout
    assert train["sent_bytes"]["all-reduce"] > 0
    assert train["flops"] > sleep["flops"] > decode["flops"] > 0

  def test_what_does_not_fit(self):
    done = run(
      *(self.TINY, "--target=v5e-1", "--config.data.batch_size=8388608")
    )
    assert done.returncode == 1
    # The compiler itself refuses.
    assert "| train step | JaxRuntimeError: RESOURCE_EXHAUSTED" in done.stdout
    assert "exceeds available HBM" in done.stdout
    assert "| decode step | yes |" in done.stdout

  def test_a_mesh_that_does_not_fit(self):
    done = run(self.TINY, "--target=v5e-4", "--config.mesh.fsdp=3")
    assert done.returncode == 2
    assert "there are 4 devices" in done.stderr.splitlines()[-1]
