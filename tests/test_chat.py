"""The terminal program over a session, on the parameters that come along."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from experiments import automaton, chat, depo, math
from sleep_jax.data import pipeline
from sleep_jax.data.source import task_and_tokenizer
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.pretrained import convert
from sleep_jax.tasks import make_task
from sleep_jax.tasks.depo import Depo, DepoConfig
from sleep_jax.training.evaluate import greedy_decode
from sleep_jax.training.step import init_params, make_predict
from tests import hf_folders
from tests.test_convert import with_jet_layers, write

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
    assert answer == f"answer: {example.questions[0].answer}"
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


@pytest.mark.slow
@pytest.mark.parametrize(
  # Of the seeds, some answer everything alike, which would show nothing.
  "variant, seed, settings",
  [
    # 32 bits in windows of 12: the first is padded, the answer starts a window.
    ("hard", 1, dict(window_length=12, passes=3)),
    # The last window has 8 bits, the marker, and part of the answer.
    ("packed", 1, dict(window_length=12, passes=3)),
    ("none", 0, dict(eviction="none", passes=1)),
  ],
)
def test_it_writes_what_evaluation_scores(variant, seed, settings):
  """Against `greedy_decode` over the rollout, with random parameters."""
  config = automaton.tiny()
  config = dataclasses.replace(
    config,
    sleep=dataclasses.replace(config.sleep, **settings),
    data=dataclasses.replace(
      config.data, length=39, align_answer=variant != "packed"
    ),
  )
  task, tokenizer = task_and_tokenizer(config)
  model = HybridLM(config.model, tokenizer.vocab_size)
  params = init_params(model, seed)
  # What is read from S and the window decides the answer, not the marker alone.
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: 30 * x if "o_proj" in str(path) else x, params
  )
  (batch,) = pipeline.eval_batches(
    *(task, tokenizer, "heldout", 6),
    batch_size=6,
    length=config.data.length,
    window_length=config.sleep.window_length,
    align_answer=config.data.align_answer,
  )
  predict = functools.partial(
    make_predict(model, config), passes=config.sleep.passes
  )
  written = greedy_decode(predict, params, batch)
  example = task.example("heldout", 0)
  talk = chat.Chat(config, model, params, tokenizer, example, max_tokens=3)
  answers = set()
  for row in range(6):
    mask = batch.loss_mask[row]
    context = batch.inputs[row][batch.valid[row] & ~mask]
    talk.run("/new")
    *_, answer, _ = talk.run(f"/ask {tokenizer.decode(context)}")
    expected = written[row][mask].tolist()
    if tokenizer.end_id in expected:
      expected = expected[: expected.index(tokenizer.end_id) + 1]
    assert answer == f"answer: {tokenizer.decode(expected)}"
    answers.add(answer)
  assert len(answers) > 1


@pytest.mark.slow
def test_it_talks_to_a_converted_model(tmp_path):
  """Random weights, but the model's own tokenizer: text in, sleep, text out."""
  # Of a task whose examples these few words can say, too.
  task = DepoConfig(
    nodes=3, hops=1, queries=1, name_length=(1, 1), mini_vocab=3
  )
  words = ["?", "bear", "barn", "=", "8", ".", *Depo(task, 0).vocabulary]
  folder = write(tmp_path / "hf")
  hf_folders.write_tokenizer(folder / "tokenizer.json", words)
  config = with_jet_layers(loops=1)
  config = dataclasses.replace(
    config,
    task=task,
    sleep=dataclasses.replace(config.sleep, window_length=8),
  )
  convert.convert(folder, tmp_path / "w", config)
  config, model, params, tokenizer, example = chat.load_run(tmp_path / "w")
  assert tokenizer.vocab_size == 6 + 7 + 3 and model.vocabulary_size == 61
  session = chat.Chat(config, model, params, tokenizer, example, max_tokens=4)
  assert session.run("bear barn = 8 .") == [
    "window 5/8, 5 tokens read, 0 sleeps"
  ]
  slept, place = session.run("bear barn = 8 . bear barn")
  assert slept.startswith("slept with 2 passes: S moved by ")
  assert place == "window 4/8, 12 tokens read, 1 sleeps"
  *_, answer, place = session.run("/ask = bear")
  assert answer.startswith("answer: ") and place.startswith("window ")
  session.run(f"/save {tmp_path / 'file'}")
  session.run("/new")
  assert session.run(f"/load {tmp_path / 'file'}") == [place]


@pytest.mark.slow
def test_it_answers_one_question_after_another():
  """Depo, one token a name: against `greedy_decode`, with random parameters."""
  config = depo.tiny()
  config = dataclasses.replace(
    config,
    task=DepoConfig(
      nodes=6, hops=3, queries=3, name_length=(1, 1), marker_counts=False
    ),
    data=dataclasses.replace(config.data, length=24),
  )
  task, tokenizer = task_and_tokenizer(config)
  model = HybridLM(config.model, tokenizer.vocab_size)
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: 30 * x if "o_proj" in str(path) else x,
    init_params(model, 1),
  )
  (batch,) = pipeline.eval_batches(
    *(task, tokenizer, "hops_2", 4),
    batch_size=4,
    length=24,
    window_length=12,
    align_answer=True,
  )
  predict = functools.partial(make_predict(model, config), passes=2)
  written = greedy_decode(predict, params, batch)
  answers = set()
  for row in range(4):
    example = task.example("hops_2", row)
    talk = chat.Chat(config, model, params, tokenizer, example, max_tokens=1)
    talk.run(example.context)
    for i, question in enumerate(example.questions):
      *slept, answer, place = talk.run(f"/ask {question.prompt}")
      assert len(slept) == (i == 0)
      token = int(written[row, 12 + 4 * i + 2])
      assert answer == f"answer: {tokenizer.decode([token])}"
      assert (
        place == f"window {4 * i + 4}/12, {16 + 4 * i} tokens read, 1 sleeps"
      )
      answers.add(answer)
  assert len(answers) > 1
