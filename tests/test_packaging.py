"""The pinned versions fit setup.py, and make picks the right environment."""

import ast
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PINNED_EXTRAS = ("compile", "dev", "hf", "notebooks", "plots", "tensorboard")


def read_pins(name):
  lines = (ROOT / "constraints" / name).read_text().splitlines()
  pins = [line for line in lines if line and not line.startswith("#")]
  assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
  return {canonicalize_name(p): v for p, v in (x.split("==") for x in pins)}


def read_requirements():
  tree = ast.parse((ROOT / "setup.py").read_text())
  (call,) = (
    node
    for node in ast.walk(tree)
    if isinstance(node, ast.Call)
    and isinstance(node.func, ast.Name)
    and node.func.id == "setup"
  )
  arguments = {keyword.arg: keyword.value for keyword in call.keywords}
  extras = ast.literal_eval(arguments["extras_require"])
  return ast.literal_eval(arguments["install_requires"]) + [
    requirement for extra in PINNED_EXTRAS for requirement in extras[extra]
  ]


@pytest.mark.parametrize("name", ["py311.txt", "py312.txt"])
def test_constraints_pin_what_setup_asks_for(name):
  pins = read_pins(name)
  for requirement in map(Requirement, read_requirements()):
    version = pins[canonicalize_name(requirement.name)]
    assert version in requirement.specifier, (requirement, version)


@pytest.mark.parametrize("name", ["py311.txt", "py312.txt"])
def test_constraints_hold_one_release_of_jax(name):
  pins = read_pins(name)
  names = ("jax", "jaxlib", "jax-cuda13-plugin", "jax-cuda13-pjrt")
  assert len({pins[name] for name in names}) == 1


def test_every_source_folder_is_a_package():
  for top in ("sleep_jax", "pallas_kernels", "experiments"):
    for path in (ROOT / top).rglob("*.py"):
      assert (path.parent / "__init__.py").exists(), path


def write_python(path, version):
  """Writes a stand-in for a Python that only knows its version."""
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(f"#!/bin/sh\necho {version}\n")
  path.chmod(0o755)


def run_make(folder, *arguments):
  shutil.copy(ROOT / "Makefile", folder)
  return subprocess.run(
    ["make", "--dry-run", "setup", *arguments],
    cwd=folder,
    # Without the variables of the make that may have started the tests.
    env={"PATH": os.environ["PATH"]},
    capture_output=True,
    text=True,
  )


@pytest.mark.parametrize(
  ("version", "venv", "constraints"),
  [("3.11", ".venv", "py311"), ("3.12", ".venv-3.12", "py312")],
)
def test_each_python_has_its_own_environment(
  tmp_path, version, venv, constraints
):
  write_python(tmp_path / ".venv/bin/python", "3.11")
  write_python(tmp_path / "python", version)
  for path in ("setup.py", f"constraints/{constraints}.txt"):
    (tmp_path / path).parent.mkdir(exist_ok=True)
    (tmp_path / path).touch()
  made = run_make(tmp_path, "PYTHON=./python")
  assert f"{venv}/bin/python -m pip install" in made.stdout
  assert f"--constraint constraints/{constraints}.txt" in made.stdout


@pytest.mark.parametrize("version", ["", None])
def test_old_or_missing_python_is_one_clear_line(tmp_path, version):
  if version is not None:
    write_python(tmp_path / "python", version)
  made = run_make(tmp_path, "PYTHON=./python")
  assert made.returncode == 2
  assert made.stdout == ""
  (line,) = made.stderr.splitlines()
  assert "PYTHON=./python is missing or older than Python 3.11" in line
