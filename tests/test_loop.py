"""Whole runs: what they leave behind, and that they resume to the bit."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest

from experiments import automaton
from sleep_jax.config import FirstStageConfig
from sleep_jax.data.tokenizers import make_tokenizer
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.tasks import make_task
from sleep_jax.tasks.gsm_infinite import GsmInfiniteConfig
from sleep_jax.tasks.gsm_infinite.__main__ import main as gsm_infinite
from sleep_jax.training import checkpoints, loop
from sleep_jax.training.step import draw_passes, init_params

CONFIG = automaton.tiny()
CONFIG = dataclasses.replace(
  CONFIG,
  model=dataclasses.replace(
    CONFIG.model, width=8, attention_heads=2, key_value_heads=2, mlp_width=8
  ),
  sleep=dataclasses.replace(CONFIG.sleep, passes=2),
  run=dataclasses.replace(
    CONFIG.run, steps=6, checkpoint_every=2, evaluate_every=3, log_every=2
  ),
)


def final_params(workdir, config=CONFIG):
  task = make_task(config.task, "", 0, len)
  vocabulary = make_tokenizer("words", task.vocabulary, "").vocab_size
  like = init_params(HybridLM(config.model, vocabulary), 0)
  return checkpoints.restore_params(workdir, like)


def equal(one, other):
  return all(
    np.array_equal(a, b)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
  )


def lines(workdir):
  return [
    json.loads(line)
    for line in (workdir / "metrics.jsonl").read_text().splitlines()
  ]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("run")
  results = loop.train(CONFIG, workdir)
  return workdir, results


def test_what_a_run_leaves_behind(finished):
  workdir, results = finished
  assert json.loads((workdir / "config.json").read_text()) == json.loads(
    json.dumps(dataclasses.asdict(CONFIG))
  )
  assert json.loads((workdir / "results.json").read_text()) == results
  assert set(results) == {"seen", "heldout"}
  scores = results["heldout"]["depth"]["4"]
  assert scores["count"] == CONFIG.run.evaluation_examples
  training = [line for line in lines(workdir) if "loss" in line]
  assert [line["step"] for line in training] == [2, 4, 6]
  evaluations = [line for line in lines(workdir) if "eval/seen/loss" in line]
  assert [line["step"] for line in evaluations] == [3, 6]
  # The rate of the last step, as the schedule has it.
  assert 0 < training[-1]["learning_rate"] < training[0]["learning_rate"]


@pytest.mark.parametrize("damage", ["never written", "truncated", "position"])
def test_a_stopped_run_ends_with_the_same_bits(finished, tmp_path, damage):
  """The newest checkpoint is missing, or bad: on from the one before it."""
  workdir = tmp_path / "copy"
  shutil.copytree(finished[0], workdir)
  newest = workdir / "checkpoints" / "6"
  if damage == "never written":
    shutil.rmtree(newest)
  elif damage == "position":
    (path,) = (newest / "data").glob("process_0*")
    path.write_text(path.read_text().replace("6", "0"))
  else:
    for path in (newest / "params").rglob("*"):
      if path.is_file():
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
  if damage == "never written":  # stopped earlier still
    (workdir / "results.json").unlink()
  results = loop.train(CONFIG, workdir)
  assert results == finished[1]
  assert equal(final_params(workdir), final_params(finished[0]))

  def comparable(run):
    clocks = ("second", "wait")
    return [
      {k: v for k, v in line.items() if not any(c in k for c in clocks)}
      for line in lines(run)
    ]

  assert comparable(workdir) == comparable(finished[0])


def test_passes_and_seeds_reach_the_run(finished, tmp_path):
  """N, run.seed and data.seed each make another model; equal ones the same."""
  config = dataclasses.replace(
    CONFIG,
    run=dataclasses.replace(CONFIG.run, steps=1, evaluation_examples=32),
  )
  changed = {
    "same": config,
    "passes": dataclasses.replace(
      config, sleep=dataclasses.replace(config.sleep, passes=1)
    ),
    "run seed": dataclasses.replace(
      config, run=dataclasses.replace(config.run, seed=1)
    ),
    "data seed": dataclasses.replace(
      config, data=dataclasses.replace(config.data, seed=1)
    ),
  }
  loop.train(config, tmp_path / "first")
  first = final_params(tmp_path / "first")
  for name, other in changed.items():
    loop.train(other, tmp_path / name)
    same = equal(final_params(tmp_path / name), first)
    assert same == (name == "same"), name


def test_divergence_is_told_and_never_saved(tmp_path):
  config = dataclasses.replace(
    CONFIG,
    optimizer=dataclasses.replace(
      CONFIG.optimizer, adamw_learning_rate=1e16, warmup_fraction=0.0
    ),
    run=dataclasses.replace(CONFIG.run, checkpoint_every=1, log_every=100),
  )
  with pytest.raises(ValueError, match="not finite at step 2"):
    loop.train(config, tmp_path)
  assert all(
    np.all(np.isfinite(x)) for x in jax.tree.leaves(final_params(tmp_path))
  )


def test_a_cpu_keeps_what_it_frees(tmp_path, monkeypatch):
  calls = []
  monkeypatch.setattr(loop, "keep_freed_memory", lambda: calls.append(None))
  run = dataclasses.replace(automaton.tiny().run, keep_best="none")
  with pytest.raises(ValueError, match="no evaluation gives it"):
    loop.train(dataclasses.replace(CONFIG, run=run), tmp_path)
  assert len(calls) == (jax.default_backend() == "cpu")


def test_another_config_is_refused_and_nothing_lost(finished):
  workdir, _ = finished
  before = (workdir / "metrics.jsonl").read_bytes()
  other = dataclasses.replace(
    CONFIG, sleep=dataclasses.replace(CONFIG.sleep, passes=3)
  )
  with pytest.raises(ValueError, match="sleep.passes: 2 there, 3 now"):
    loop.train(other, workdir)
  assert (workdir / "metrics.jsonl").read_bytes() == before
  assert (workdir / "checkpoints" / "6").exists()


def test_judging_alone_from_other_parameters(finished, tmp_path):
  """run.steps = 0 and run.init_from: the same results, another N allowed."""
  config = dataclasses.replace(
    CONFIG,
    run=dataclasses.replace(CONFIG.run, steps=0, init_from=str(finished[0])),
  )
  for _ in range(2):  # the second time there is nothing left to do
    assert loop.train(config, tmp_path / "judged") == finished[1]
    (line,) = lines(tmp_path / "judged")
    assert "eval/heldout/loss" in line
  wider = dataclasses.replace(
    config, model=dataclasses.replace(config.model, width=16)
  )
  with pytest.raises(ValueError, match="but the model's is"):
    loop.train(wider, tmp_path / "wider")


def test_problems_from_a_file(tmp_path, monkeypatch):
  """data.path: the original's JSONL format, here written by our generator."""
  path = tmp_path / "problems.jsonl"
  arguments = (
    "--count=60 --style=terse --themes=zoo --ops=1,2 --layers=2 --max_tokens=64"
  )
  monkeypatch.setattr(
    "sys.argv", ["gsm", "write", str(path), *arguments.split()]
  )
  assert gsm_infinite() == 0
  config = dataclasses.replace(
    CONFIG,
    task=GsmInfiniteConfig(heldout_fraction=0.3),
    data=dataclasses.replace(CONFIG.data, path=str(path), length=66),
    sleep=dataclasses.replace(CONFIG.sleep, window_length=64),
    run=dataclasses.replace(CONFIG.run, steps=2),
  )
  results = loop.train(config, tmp_path / "run")
  assert 0 < results["heldout"]["overall"]["count"] < 60

  # One line that does not fit, wherever it would be drawn: told at once.
  texts = path.read_text().splitlines()
  fields = json.loads(texts[40])
  fields["problem"] += " owl pine = 1 ." * 20
  path.write_text("\n".join([*texts[:40], json.dumps(fields), *texts[41:]]))
  with pytest.raises(ValueError, match=r"problems.jsonl, line 41: a context"):
    loop.train(config, tmp_path / "long")
  assert not (tmp_path / "long").exists()


def test_a_started_run_needs_what_it_started_from_no_more(finished, tmp_path):
  source = tmp_path / "source"
  shutil.copytree(finished[0], source)
  config = dataclasses.replace(
    CONFIG, run=dataclasses.replace(CONFIG.run, init_from=str(source))
  )
  results = loop.train(config, tmp_path / "run")
  shutil.rmtree(source)
  assert loop.train(config, tmp_path / "run") == results


@pytest.mark.slow
def test_passes_that_training_never_used_are_judged(finished, tmp_path):
  """Each as a run of that N judges the same parameters."""

  def judged(name, run=(), **sleep):
    config = dataclasses.replace(
      CONFIG,
      sleep=dataclasses.replace(CONFIG.sleep, **sleep),
      run=dataclasses.replace(
        CONFIG.run,
        steps=0,
        init_from=str(finished[0]),
        evaluation_examples=32,
        **dict(run),
      ),
    )
    return loop.train(config, tmp_path / name)

  log = dict(log_passes=True)
  results = judged("many", log, evaluation_passes=(1, 3))["heldout"]
  assert results["sleep"]["passes"] == 2
  assert list(results["by_passes"]) == ["1", "3"]
  for n, scores in results["by_passes"].items():
    alone = judged(f"n{n}", log, passes=int(n))["heldout"]
    assert scores["overall"] == alone["overall"]
    assert (
      scores["sleep"]["passes"] == int(n) == len(scores["sleep"]["by_pass"])
    )
    for at_pass, same in zip(
      scores["sleep"]["by_pass"].values(),
      alone["sleep"]["by_pass"].values(),
      strict=True,
    ):
      assert at_pass == pytest.approx(same, rel=1e-4)
  (line,) = lines(tmp_path / "many")
  assert (
    line["eval/heldout/passes_3/accuracy"]
    == (results["by_passes"]["3"]["overall"]["accuracy"])
  )
  assert line["sleep/heldout/pass_2/change"] > 0
  # One pass is enough where any change will do.
  patient = judged("adaptive", tolerance=100.0)["heldout"]
  assert patient["sleep"]["passes"] == 1


def test_a_loss_of_passes_needs_a_task_that_says_what_they_hold(tmp_path):
  sleep = dataclasses.replace(CONFIG.sleep, pass_loss=1.0)
  config = dataclasses.replace(CONFIG, sleep=sleep)
  with pytest.raises(
    ValueError, match="'train': nothing is said of what passes"
  ):
    loop.train(config, tmp_path / "none")
  task = dataclasses.replace(CONFIG.task, pass_steps=2)
  with pytest.raises(ValueError, match="3 passes .* = 2: set that to 3"):
    loop.train(dataclasses.replace(config, task=task), tmp_path / "other")
  assert not list(tmp_path.iterdir())


def test_sampled_passes_are_drawn_anew_and_reproducibly():
  config = dataclasses.replace(
    CONFIG,
    sleep=dataclasses.replace(CONFIG.sleep, passes=3, sampled_passes=True),
  )
  drawn = [int(draw_passes(config, step)) for step in range(1, 200)]
  assert drawn == [int(draw_passes(config, step)) for step in range(1, 200)]
  assert set(drawn) == {1, 2, 3} and 45 < drawn.count(2) < 90
  assert {int(draw_passes(CONFIG, step)) for step in range(9)} == {2}


@pytest.mark.slow
def test_a_first_stage_trains_new_layers_alone_and_resumes(tmp_path):
  """Stopped at the boundary, a run ends with the bits that it ends with."""
  config = dataclasses.replace(
    CONFIG,
    model=dataclasses.replace(
      CONFIG.model, pattern=((("attn", "inserted_jet"), 1),)
    ),
    sleep=dataclasses.replace(CONFIG.sleep, eviction="sliding"),
    first_stage=FirstStageConfig(steps=2),
    run=dataclasses.replace(CONFIG.run, steps=4),
  )
  first, second = config.at_step(2), config.at_step(3)
  assert first.sleep.eviction == "hard" and second == config
  loop.train(config, tmp_path)
  task = make_task(config.task, "", 0, len)
  size = make_tokenizer("words", task.vocabulary, "").vocab_size
  start = init_params(HybridLM(config.model, size), config.run.seed)

  def moved(one, other):
    return {
      jax.tree_util.keystr(path, simple=True, separator="/")
      for (path, x), y in zip(
        jax.tree.leaves_with_path(one), jax.tree.leaves(other), strict=True
      )
      if not np.array_equal(x, y)
    }

  whole = final_params(tmp_path, config)
  shutil.rmtree(tmp_path / "checkpoints" / "4")
  boundary = final_params(tmp_path, config)
  assert moved(start, boundary)
  assert all("inserted_jet" in name for name in moved(start, boundary))
  assert not all("inserted_jet" in name for name in moved(boundary, whole))
  loop.train(config, tmp_path)
  assert equal(final_params(tmp_path, config), whole)
