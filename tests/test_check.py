"""Converted models against what independent code computed with the weights."""

import json
import subprocess
import sys

import jax
import numpy as np
import pytest

from sleep_jax.pretrained.check import check
from sleep_jax.pretrained.convert import convert
from tests import hf_folders


@pytest.fixture(scope="module", params=["ouro_tiny", "jet_nemotron_tiny_f64"])
def golden(request, tmp_path_factory):
  """(converted folder, file of expected arrays)."""
  weights, arrays = hf_folders.stored(request.param)
  ouro = request.param == "ouro_tiny"
  config = hf_folders.OURO if ouro else hf_folders.JET_NEMOTRON
  folder = tmp_path_factory.mktemp(request.param)
  hf_folders.write(folder / "hf", config, weights, files=2)
  convert(folder / "hf", folder / "converted")
  names = "ids logits exit_pdf expected_logits S.0 S.1 S.4".split()
  arrays = {x: arrays[x] for x in names if x in arrays}
  np.savez(folder / "expected.npz", **arrays)
  return folder / "converted", folder / "expected.npz"


def test_models_compute_what_independent_code_computes(golden):
  converted, expected = golden
  with jax.enable_x64(True):
    errors = check(converted, expected, "float64")
  assert "logits" in errors and len(errors) > 2
  assert max(errors.values()) < 1e-5, errors


@pytest.mark.slow
def test_the_command_prints_errors_and_judges_them(golden, tmp_path):
  converted, expected = golden

  def run(expected, *options):
    return subprocess.run(
      [sys.executable, "-m", "sleep_jax.pretrained.check"]
      + [f"--workdir={converted}", f"--expected={expected}", *options],
      capture_output=True,
      text=True,
    )

  done = run(expected)
  assert done.returncode == 0 and "logits: " in done.stdout, done.stderr
  assert run(expected, "--tolerance=1e-12").returncode == 1
  bad = tmp_path / "bad.npz"
  np.savez(bad, logits=np.zeros(3))
  done = run(bad)
  assert done.returncode == 2 and "has no ids and logits" in done.stderr
  assert len(done.stderr.splitlines()) == 1


def test_other_weights_are_noticed(golden, tmp_path):
  converted, expected = golden
  with np.load(expected) as file:
    arrays = dict(file)
  arrays["ids"] = (arrays["ids"] + 1) % 61
  np.savez(tmp_path / "other.npz", **arrays)
  assert max(check(converted, tmp_path / "other.npz").values()) > 0.1


def test_a_file_of_another_vocabulary_is_named(golden, tmp_path):
  converted, expected = golden
  with np.load(expected) as file:
    arrays = dict(file)
  arrays["ids"][0, 0] = 61
  np.savez(tmp_path / "bad.npz", **arrays)
  with pytest.raises(ValueError, match="ids must be whole numbers in 0..60"):
    check(converted, tmp_path / "bad.npz")
  assert json.loads((converted / "hf_config.json").read_text())
