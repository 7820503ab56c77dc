"""The terminal program over a session, on the parameters that come along."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import chat, math
from sleep_jax.tasks import make_task

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
  """What judging the parameters for N = 4 leaves behind, less its results."""
  folder = tmp_path_factory.mktemp("run")
  config = math.evening()
  source = ROOT / "experiments/checkpoints/math-evening-n4"
  run = dataclasses.replace(config.run, steps=0, init_from=str(source))
  config = dataclasses.asdict(dataclasses.replace(config, run=run))
  (folder / "config.json").write_text(json.dumps(config))
  return folder


@pytest.fixture(scope="module")
def loaded(workdir):
  return chat.load_run(workdir)


@pytest.fixture
def session(loaded):
  return chat.Chat(*loaded, max_tokens=8)


def lookups(config, count):
  """Problems that the model is nearly always right about."""
  task = dataclasses.replace(config.task, ops=(1,))
  examples = make_task(task, "", 5, lambda text: len(text.split()))
  return [examples.example("heldout", i) for i in range(count)]


def test_it_answers_as_the_model_was_trained_to(loaded, session):
  for example in lookups(loaded[0], 4):
    session.run("/new")
    slept, answer, place = session.run(f"/ask {example.context}")
    assert slept.startswith("slept with 4 passes: S moved by ")
    assert answer == f"answer: {example.answer}"
    assert place.startswith("window 3/64, ")


def test_a_question_in_pieces_is_the_same_question(
  loaded, session, tmp_path, monkeypatch
):
  (example,) = lookups(loaded[0], 1)
  expected = session.run(f"/ask {example.context}")
  words = loaded[3].decode(loaded[3].encode(example.context)).split()
  session.run("/new")
  assert session.run(" ".join(words[:5])) == [
    "window 5/64, 5 tokens read, 0 sleeps"
  ]
  path = tmp_path / "file"
  assert session.run(f"/save {path}") == [f"saved: {path.stat().st_size} bytes"]
  ids = loaded[3].encode(" ".join(words[5:]))
  session.run("/new")
  session.run(f"/load {path}")
  session.run(f"/tokens {' '.join(map(str, ids))}")
  assert session.run("/ask") == expected


def test_it_tells_of_every_sleep(session):
  lines = session.run("/tokens " + " ".join(["5"] * 130))
  assert [x.split(":")[0] for x in lines[:-1]] == ["slept with 4 passes"] * 2
  assert lines[-1] == "window 2/64, 130 tokens read, 2 sleeps"
  session.run("/passes 1")
  assert session.run("/sleep")[0].startswith("slept with 1 pass:")
  assert session.run("/sleep") == ["nothing to sleep on"]


@pytest.mark.parametrize(
  "line, message",
  [
    ("no such words here", "'no' is not in the vocabulary"),
    ("/tokens 3 x", "'x' is not a token id"),
    ("/tokens 3 100000", "vocabulary"),
    ("/tokens", "nothing to read"),
    ("/passes 0", "at least one pass"),
    ("/passes", "'' is not a number of passes"),
    ("/save", "the file is missing"),
    ("/load /no/such/file", "cannot be read"),
    ("/sing", "unknown command /sing"),
  ],
)
def test_mistakes_change_nothing(session, line, message):
  session.run("/tokens 3 4 5")
  before = session.run("/tokens 3")
  with pytest.raises(ValueError, match=message):
    session.run(line)
  session.run("/passes 4")
  assert before == ["window 4/64, 4 tokens read, 0 sleeps"]
  assert session.run("/tokens 3") == ["window 5/64, 5 tokens read, 0 sleeps"]


def test_folders_that_are_no_run(tmp_path):
  with pytest.raises(ValueError, match="No such file"):
    chat.load_run(tmp_path)
  (tmp_path / "config.json").write_text("{")
  with pytest.raises(ValueError):
    chat.load_run(tmp_path)


@pytest.mark.slow
def test_commands_from_a_pipe(workdir):
  done = subprocess.run(
    [sys.executable, "-m", "experiments.chat", f"--workdir={workdir}"],
    input="/tokens 3 4 5\nnonsense\n\n/tokens 3\n/quit\n/tokens 3\n",
    capture_output=True,
    text=True,
    cwd=ROOT,
    env=os.environ | {"JAX_PLATFORMS": "cpu"},
  )
  assert done.returncode == 0, done.stderr
  _, first, error, last = done.stdout.splitlines()
  assert first == "window 3/64, 3 tokens read, 0 sleeps"
  assert error.startswith("error: 'nonsense' is not in the vocabulary")
  assert last == "window 4/64, 4 tokens read, 0 sleeps"
