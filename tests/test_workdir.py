"""The run's folder: one config for life, and writes that are whole or not."""

import contextlib
import dataclasses
import json
import os

import pytest

from sleep_jax.config import ExperimentConfig, completed, from_config_dict
from sleep_jax.tasks.rule110 import Rule110Config
from sleep_jax.training.workdir import (
  check_config,
  open_workdir,
  write_atomically,
)

CONFIG = {
  "model": {"width": 64, "layers": ("attention", "gated_delta")},
  "optimizer": {"learning_rate": 1e-3},
  "run": {"init_from": None},
}


@contextlib.contextmanager
def full_disk(free_bytes: int):
  """Stands in for a full disk: no file can grow over `free_bytes`."""
  resource = pytest.importorskip("resource")
  old = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (free_bytes, old[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, old)


def test_the_config_is_written_and_the_same_one_opens_the_folder_again(
  tmp_path,
):
  workdir = open_workdir(tmp_path / "runs" / "a", CONFIG)
  assert json.loads((workdir / "config.json").read_text()) == {
    "model": {"width": 64, "layers": ["attention", "gated_delta"]},
    "optimizer": {"learning_rate": 0.001},
    "run": {"init_from": None},
  }
  (workdir / "metrics.jsonl").write_text("kept")
  # 64.0 and a list are what JSON or a command line may make of 64, a tuple.
  again = json.loads(json.dumps(CONFIG)) | {
    "model": {"width": 64.0, "layers": ["attention", "gated_delta"]}
  }
  assert open_workdir(str(workdir), again) == workdir
  assert sorted(os.listdir(workdir)) == ["config.json", "metrics.jsonl"]


def test_another_config_is_refused_and_the_differences_named(tmp_path):
  open_workdir(tmp_path, CONFIG)
  before = (tmp_path / "config.json").read_text()
  other = {
    "model": {"width": 128, "layers": ("attention", "gated_delta")},
    "optimizer": {"learning_rate": 1e-3, "beta": 0.9},
    "run": {},
  }
  with pytest.raises(ValueError) as error:
    open_workdir(tmp_path, other)
  message = str(error.value)
  assert "\n" not in message
  assert "model.width: 64 there, 128 now" in message
  assert "optimizer.beta: 'absent' there, 0.9 now" in message
  assert "run.init_from: None there, 'absent' now" in message
  assert "layers" not in message and "learning_rate" not in message
  assert "--workdir" in message and "delete" in message
  assert (tmp_path / "config.json").read_text() == before


def test_of_many_differences_a_few_are_named_and_the_rest_counted(tmp_path):
  open_workdir(tmp_path, {f"leaf_{i}": i for i in range(9)})
  with pytest.raises(ValueError, match="leaf_3: 3 there.*and 5 more") as error:
    open_workdir(tmp_path, {f"leaf_{i}": i + 1 for i in range(9)})
  assert "leaf_4" not in str(error.value)


@pytest.mark.parametrize("text", ["", '{"model": {"wid', "\0\xff"])
def test_a_config_file_that_is_not_json_is_refused(tmp_path, text):
  (tmp_path / "config.json").write_text(text, encoding="latin-1")
  with pytest.raises(ValueError, match="not JSON.*delete"):
    open_workdir(tmp_path, CONFIG)


def test_a_place_that_cannot_be_written_is_refused_in_one_line(tmp_path):
  (tmp_path / "file").write_text("a file")
  places = [tmp_path / "file", tmp_path / "file" / "below"]
  if os.path.isdir("/proc/self"):  # where not even root may write
    places += ["/proc", "/proc/runs/a"]
  for place in places:
    with pytest.raises(ValueError, match="cannot be written") as error:
      open_workdir(place, CONFIG)
    assert str(place) in str(error.value) and "\n" not in str(error.value)
  assert (tmp_path / "file").read_text() == "a file"


def test_a_full_disk_is_found_out_when_the_folder_is_opened(tmp_path):
  open_workdir(tmp_path, CONFIG)
  with full_disk(10), pytest.raises(ValueError, match="cannot be written"):
    open_workdir(tmp_path, CONFIG)
  assert open_workdir(tmp_path, CONFIG) == tmp_path


def test_a_disk_that_fills_leaves_the_old_file(tmp_path):
  path = tmp_path / "results.json"
  write_atomically(path, "old")
  with full_disk(1000), pytest.raises(OSError):
    write_atomically(path, "new" * 1000)
  assert path.read_text() == "old"
  assert os.listdir(tmp_path) == ["results.json"]


def test_a_reader_sees_the_old_file_or_the_new_one_and_never_a_mixture(
  tmp_path,
):
  path = tmp_path / "results.json"
  write_atomically(path, "old")
  with open(path) as reader:
    write_atomically(path, "new")
    assert reader.read() == "old"
  assert path.read_text() == "new"


def test_a_leaf_newer_than_the_folder_counts_as_at_its_default(tmp_path):
  config = dataclasses.asdict(ExperimentConfig(task=Rule110Config()))
  workdir = open_workdir(tmp_path / "run", config)
  older = json.loads((workdir / "config.json").read_text())
  del older["model"]["tied_head"], older["task"]["boundary"], older["mesh"]
  (workdir / "config.json").write_text(json.dumps(older))
  assert from_config_dict(completed(older)) == from_config_dict(config)
  check_config(workdir, config)
  config["model"]["tied_head"] = True
  with pytest.raises(ValueError, match="tied_head: False there, True now"):
    check_config(workdir, config)
  older["gone"] = {"x": 1}
  with pytest.raises(ValueError, match="unknown section 'gone'"):
    from_config_dict(completed(older))
