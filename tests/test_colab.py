"""The notebooks are whole, install beside any jax, and run at tiny size."""

import base64
import importlib.metadata
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient
from packaging.requirements import Requirement

from tests.test_packaging import read_pins, read_requirements

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "experiments/colab"
NAMES = ("ablation", "first_sleep", "math_on_tpu")
# What the tests run in place of the notebooks' own parameters.
TINY = {
  "ablation": {
    "size": "tiny",
    "rules": "hebbian,gated_delta",
    "passes": "2",
  },
  "first_sleep": {"size": "tiny"},
  "math_on_tpu": {"size": "tiny", "virtual_devices": 2},
}


def read(name):
  return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def code(notebook):
  return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
  return [output for cell in code(notebook) for output in cell.outputs]


def install_cell(source=""):
  """The source of the cell, the same in all notebooks."""
  (text,) = {code(read(name))[0].source for name in NAMES}
  assert text.count('SOURCE = ""') == 1
  return text.replace('SOURCE = ""', f"SOURCE = {json.dumps(source)}")


def test_every_notebook_is_tested():
  assert sorted(path.stem for path in FOLDER.glob("*.ipynb")) == [*NAMES]


@pytest.mark.parametrize("name", NAMES)
def test_the_notebook_is_whole(name):
  notebook = read(name)
  nbformat.validate(notebook)
  title, install, parameters = notebook.cells[:3]
  assert title.source.startswith("# ")
  assert "| hardware |" in title.source
  assert install.source == install_cell()
  assert parameters.metadata.tags == ["parameters"]
  settings = {}
  exec(parameters.source, settings)
  assert settings.keys() >= TINY[name].keys() | {"workdir"}
  assert not any(out.output_type == "error" for out in outputs(notebook))


@pytest.mark.parametrize(
  "name", [name for name in NAMES if name != "first_sleep"]
)
def test_no_outputs_are_kept(name):
  for cell in code(read(name)):
    assert (cell.outputs, cell.execution_count) == ([], None)


def test_first_sleep_keeps_the_outputs_of_one_run_from_its_top():
  notebook = read("first_sleep")
  counts = [cell.execution_count for cell in code(notebook)]
  assert counts == list(range(1, len(counts) + 1))
  pictures = [
    out.data["image/png"]
    for out in outputs(notebook)
    if "image/png" in out.get("data", {})
  ]
  assert len(pictures) >= 4
  for picture in pictures:
    assert base64.b64decode(picture).startswith(b"\x89PNG")
  assert (FOLDER / "first_sleep.ipynb").stat().st_size < 600_000
  for out in outputs(notebook):
    rest = dict(out.get("data", {}), text=out.get("text", ""))
    rest.pop("image/png", None)
    assert not re.search(r"(^|[\s'\"(])/\w", json.dumps(rest)), rest


class Machine:
  """Stands in for what the install cell finds and runs."""

  def __init__(self, monkeypatch, cwd, **versions):
    self.commands = []
    cwd.mkdir(exist_ok=True)
    monkeypatch.chdir(cwd)
    monkeypatch.setattr(sys, "path", [*sys.path])

    def version(name):
      if name not in versions:
        raise importlib.metadata.PackageNotFoundError(name)
      return versions[name]

    def run(command):
      self.commands.append([*command])
      if command[0] == "git":
        Path(command[-1]).mkdir()
      if "pip" in command:
        versions.setdefault("jax", "0.12.0")
      return subprocess.CompletedProcess(command, 0)

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(subprocess, "run", run)


def test_the_jax_that_is_there_is_kept(monkeypatch, tmp_path, capsys):
  machine = Machine(monkeypatch, tmp_path, jax="0.11.1", jaxlib="0.11.1+tpu")
  exec(install_cell("https://example.org/x"), {})
  clone, pip = machine.commands
  root = tmp_path / "sleep_jax"
  assert clone[:2] == ["git", "clone"]
  assert clone[-2:] == ["https://example.org/x", str(root)]
  assert pip[:4] == [sys.executable, "-m", "pip", "install"]
  assert pip[-3:] == [f"{root}[plots]", "jax==0.11.1", "jaxlib==0.11.1+tpu"]
  assert Path.cwd() == root
  assert sys.path[0] == str(root)
  assert capsys.readouterr().out.endswith("jax 0.11.1\n")


def test_without_jax_one_is_installed(monkeypatch, tmp_path):
  machine = Machine(monkeypatch, tmp_path)
  exec(install_cell("https://example.org/x"), {})
  assert machine.commands[-1][-1] == f"{tmp_path}/sleep_jax[plots]"


def test_in_a_clone_nothing_is_fetched(monkeypatch):
  machine = Machine(monkeypatch, FOLDER, jax="0.11.1", sleep_jax="0.1.0")
  exec(install_cell(), {})
  assert machine.commands == []
  assert Path.cwd() == ROOT


@pytest.mark.parametrize(
  ("jax", "python", "said"),
  [
    ("0.4.38", (3, 12, 3), "jax 0.4.38"),
    ("0.10.1", (3, 12, 3), "jax 0.10.1"),
    ("0.11.1", (3, 10, 9), "Python 3.10.9"),
  ],
)
def test_what_is_too_old_is_one_message(
  monkeypatch, tmp_path, jax, python, said
):
  machine = Machine(monkeypatch, tmp_path, jax=jax, jaxlib=jax)
  monkeypatch.setattr(sys, "version_info", python)
  monkeypatch.setattr(sys, "version", f"{'.'.join(map(str, python))} (main)")
  with pytest.raises(SystemExit, match=said) as error:
    exec(install_cell("https://example.org/x"), {})
  assert "jax 0.10.2 or later" in str(error.value)
  assert "Nothing was installed" in str(error.value)
  assert machine.commands == []
  assert [*tmp_path.iterdir()] == []


def test_a_missing_source_is_one_message(monkeypatch, tmp_path):
  machine = Machine(monkeypatch, tmp_path, jax="0.11.1", jaxlib="0.11.1")
  with pytest.raises(SystemExit, match="Set SOURCE"):
    exec(install_cell(), {})
  assert machine.commands == []


def test_the_bounds_are_those_of_setup():
  (jax,) = (
    requirement
    for requirement in map(Requirement, read_requirements())
    if requirement.name == "jax"
  )
  assert f'"{str(jax.specifier).removeprefix(">=")}"' in install_cell()
  oldest = re.search(
    r'python_requires=">=(.*)"', (ROOT / "setup.py").read_text()
  )
  major, minor = oldest[1].split(".")
  assert f"({major}, {minor})," in install_cell()


def find_python312():
  """A Python 3.12, by preference the one that runs this."""
  # One that pyenv has put aside is not what its python3.12 starts.
  aside = Path.home().glob(".pyenv/versions/3.12.*/bin/python")
  for name in (sys.executable, shutil.which("python3.12"), *aside):
    if (
      name
      and "3.12"
      in subprocess.run(
        [name, "--version"], capture_output=True, text=True
      ).stdout.rpartition(".")[0]
    ):
      return name
  pytest.skip("no python3.12 here")


@pytest.mark.slow
def test_a_bare_python_312_keeps_its_jax(tmp_path):
  """The oldest jax: left to itself, pip takes the newest flax and its jax."""
  subprocess.run(
    [find_python312(), "-m", "venv", tmp_path / "venv"], check=True
  )
  python = tmp_path / "venv/bin/python"
  oldest = read_pins("py311.txt")["jax"]

  def versions():
    """Package -> version."""
    listed = subprocess.run(
      [python, "-m", "pip", "list", "--format=json"],
      capture_output=True,
      check=True,
    ).stdout
    return {x["name"]: x["version"] for x in json.loads(listed)}

  bare = [f"jax=={oldest}", "packaging"]
  pip = [python, "-m", "pip", "install", "--quiet", *bare]
  if subprocess.run(pip).returncode:
    pytest.skip("pip finds no packages here")
  before = versions()
  (tmp_path / "cell.py").write_text(install_cell(str(ROOT)))
  said = subprocess.run(
    [python, tmp_path / "cell.py"],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert said.returncode == 0, said.stderr
  assert said.stdout.endswith(f"jax {oldest}\n")
  after = versions()
  assert after.keys() >= {"flax", "matplotlib", "sleep_jax"}
  assert {name: after[name] for name in before} == before
  # What was installed goes with this jax.
  subprocess.run(
    [python, "-c", "import sleep_jax.training.loop, experiments.figures"],
    cwd=tmp_path,
    check=True,
  )


class Manager(AsyncKernelManager):
  """Starts kernels by the Python that runs the tests."""

  def format_kernel_cmd(self, extra_arguments=None):
    file = self.connection_file
    return [sys.executable, "-m", "ipykernel_launcher", "-f", file]


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_it_runs_at_tiny_size(name, tmp_path, monkeypatch):
  monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
  notebook = read(name)
  settings = TINY[name] | {"workdir": str(tmp_path / "runs")}
  lines = [f"{key} = {value!r}" for key, value in settings.items()]
  notebook.cells.insert(3, nbformat.v4.new_code_cell("\n".join(lines)))
  NotebookClient(
    notebook,
    timeout=1800,
    kernel_manager_class=Manager,
    resources={"metadata": {"path": str(FOLDER)}},
  ).execute()
  assert any("image/png" in out.get("data", {}) for out in outputs(notebook))
  assert [*(tmp_path / "runs").rglob("results.json")]
