"""Every wrong setting is named in one line, before anything compiles."""

import dataclasses
import json
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from experiments import automaton, depo, math
from sleep_jax.config import (
  ExperimentConfig,
  SleepConfig,
  from_config_dict,
)

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
  "module, size",
  [(math, size) for size in math.SIZES]
  + [(automaton, size) for size in automaton.SIZES]
  + [(depo, size) for size in depo.SIZES],
)
def test_every_size_is_valid_and_comes_back_unchanged(module, size):
  config = module.SIZES[size]()
  assert from_config_dict(module.get_config(size)) == config


def test_sizes_that_are_not_there():
  with pytest.raises(ValueError, match="unknown size 'huge'.*pocket"):
    math.get_config("huge")


@pytest.mark.parametrize(
  "leaf, value, message",
  [
    ("sleep.passes", 0, r"sleep.passes = 0: must be at least 1"),
    ("sleep.window_length", 0, r"sleep.window_length = 0"),
    ("sleep.eviction", "soft", r"eviction = 'soft': one of .*'sliding'"),
    ("sleep.eviction", "none", r"passes = 2: with .* set sleep.passes to 1"),
    ("sleep.evaluation_passes", (2, 2), r"passes = \(2, 2\): .*different"),
    ("sleep.kept_pass", "middle", r"kept_pass = 'middle': one of"),
    ("sleep.tolerance", -0.1, r"tolerance = -0.1: must be at least 0"),
    ("sleep.pass_loss", -0.5, r"pass_loss = -0.5: must be at least 0"),
    ("sleep.tolerance", float("nan"), r"tolerance = nan"),
    ("sleep.evaluation_passes", (1, 0), r"passes = \(1, 0\): .*\(1, 2, 4\)"),
    ("sleep.looped_groups", (1, 1), r"groups = \(1, 1\): .*one after the last"),
    ("sleep.looped_groups", (0, 2), r"groups = \(0, 2\): .* has 1 groups"),
    ("sleep.gradient_passes", -1, r"gradient_passes = -1"),
    ("sleep.gradient_windows", -1, r"gradient_windows = -1"),
    ("model.implementation", "cuda", r"= 'cuda': .*'gated_delta' has .*tpu"),
    ("sleep.window_length", -3, r"sleep.window_length = -3"),
    ("data.length", 20, r"data.length = 20: .* sleep.window_length = 32"),
    ("data.batch_size", 0, r"data.batch_size = 0"),
    ("optimizer.accumulation_steps", 3, r"batch_size = 64: .* multiple"),
    ("optimizer.clip_norm", 0.0, r"optimizer.clip_norm = 0.0"),
    ("optimizer.decay_fraction", 1.5, r"must sum to at most 1"),
    ("model.width", 63, r"model.width = 63: must be a multiple"),
    ("model.key_value_heads", 3, r"model.key_value_heads = 3: must divide"),
    ("model.compute_dtype", "float16", r"model.compute_dtype = 'float16'"),
    ("model.pattern", ((("attn", "rnn"), 2),), r"model.pattern = .*rnn"),
    ("model.pattern", (), r"model.pattern = \(\)"),
    ("model.pattern", ((("attn",), 2.5),), r"model.pattern = .*2.5"),
    ("model.pattern", (([["gdn"]], 2),), r"model.pattern = "),
    ("model.norm_eps", float("nan"), r"model.norm_eps = nan"),
    ("model.rope_theta", -5.0, r"model.rope_theta = -5.0: .* 0 for no rotary"),
    ("model.beta_range", 2.5, r"beta_range = 2.5: .*above 0 and at most 2"),
    ("model.compute_dtype", "float64", r"model.compute_dtype = 'float64'"),
    ("optimizer.weight_decay", float("nan"), r"weight_decay = nan"),
    ("optimizer.muon_learning_rate", float("inf"), r"learning_rate = inf"),
    ("data.seed", -1, r"data.seed = -1: must be in 0"),
    ("run.seed", 2**70, r"run.seed = "),
    ("run.steps", -1, r"run.steps = -1"),
    ("model.update_rule", "oja", r"update_rule = 'oja': one of .*kda"),
    ("model.sliding_window", -1, r"sliding_window = -1: .*at least 0"),
    ("model.pattern", ((("swa",), 1),), r"sliding_window = 0: .*'swa' blocks"),
    ("model.generator_reduction", 0, r"generator_reduction = 0"),
    ("model.loops", 0, r"model.loops = 0: must be at least 1"),
    ("optimizer.trainable", "(", r"trainable = '\(': .*regular expression"),
    ("first_stage.steps", 2000, r"steps = 2000: .*run.steps = 1000"),
    ("first_stage.eviction", "none", r"first_stage.eviction = 'none'"),
    ("task.name", "chess", r"task.name = 'chess': one of .*rule110"),
    ("task.ops", (9,), r"task.ops = \(9,\)"),
    ("task.ops", (1.0,), r"task.ops = \(1.0,\): must be a tuple like \(1, 2"),
    ("task.max_value", 2**30, r"task.max_value = 1073741824: use 4 .*100000"),
    ("sleep.passes", "four", r"passes = 'four': must be a whole number"),
    ("sleep.passes", True, r"sleep.passes = True: must be a whole number"),
    ("sleep.passes", 2**31, r"must be a whole number below 2147483648"),
    ("sleep.remat_passes", 1, r"remat_passes = 1: must be True or False"),
    ("optimizer.clip_norm", "1", r"clip_norm = '1': must be a number"),
    ("data.path", None, r"data.path = None: must be a text"),
    ("model.pattern", "attn", r"model.pattern = 'attn': must be a tuple like"),
    ("model.pattern", (({"attn": 1}, 2),), r"model.pattern = "),
    ("mesh.rules", (("a{99999999999}", ()),), r"mesh.rules = "),
  ],
)
def test_a_bad_value_is_named(leaf, value, message):
  config = dataclasses.asdict(ExperimentConfig())
  section, name = leaf.split(".")
  config[section][name] = value
  with pytest.raises(ValueError, match=message) as error:
    from_config_dict(config)
  assert "\n" not in str(error.value)


def test_all_violations_come_in_one_error():
  config = dataclasses.asdict(ExperimentConfig())
  config["sleep"]["passes"] = 0
  config["model"]["width"] = -1
  config["run"]["speed"] = 3
  del config["data"]["seed"]
  with pytest.raises(ValueError) as error:
    from_config_dict(config)
  assert "unknown leaf run.speed" in str(error.value)
  assert "missing leaf data.seed" in str(error.value)
  del config["run"]["speed"]
  config["data"]["seed"] = 0
  with pytest.raises(ValueError) as error:
    from_config_dict(config)
  assert "sleep.passes" in str(error.value)
  assert "model.width" in str(error.value)


@pytest.mark.parametrize(
  "others",
  [
    {"sampled_passes": True},
    {"gradient_passes": 1},
    {"eviction": "none", "passes": 1},
  ],
)
def test_a_loss_of_each_pass_is_for_all_passes(others):
  sleep = SleepConfig(pass_loss=1.0, passes=2)
  with pytest.raises(ValueError, match=r"pass_loss = 1.0: is for all N passes"):
    ExperimentConfig(sleep=dataclasses.replace(sleep, **others))


def test_a_whole_number_serves_as_any_number():
  config = dataclasses.asdict(ExperimentConfig())
  config["optimizer"]["clip_norm"] = 2
  clip_norm = from_config_dict(config).optimizer.clip_norm
  assert clip_norm == 2 and isinstance(clip_norm, float)


def test_a_config_survives_its_json():
  config = ExperimentConfig(
    sleep=SleepConfig(evaluation_passes=(1, 4), looped_groups=(0, 1))
  )
  text = json.dumps(dataclasses.asdict(config))
  assert from_config_dict(json.loads(text)) == config


def test_no_config_can_be_made_that_is_wrong():
  with pytest.raises(ValueError, match="bad config: sleep.passes = 0"):
    ExperimentConfig(sleep=SleepConfig(passes=0))


def run_tiny(*arguments, **options):
  return subprocess.run(
    [sys.executable, "-m", "experiments.main"]
    + ["--config=experiments/math.py:tiny", *arguments],
    cwd=ROOT,
    capture_output=True,
    text=True,
    **options,
  )


@pytest.mark.parametrize(
  "arguments, words",
  [
    (["--config.sleep.pases=4"], ["has no 'pases'", '"passes" instead']),
    (["--config.sleep.nope=4"], ["has no 'nope'; sleep_jax/config.py"]),
    (["--config.sleep.passes=four"], ["passes", "four"]),
    (["--config.sleep.passes=0"], ["sleep.passes = 0", "at least 1"]),
    (["sleep.passes=4"], ["sleep.passes=4", "--config.LEAF"]),
    (["--workdir=README.md/x"], ["README.md/x", "--workdir"]),
    (["--config.data.path=missing.jsonl"], ["missing.jsonl"]),
    (["--config=experiments/math.py:ouro_1_4b"], ["ouro_1_4b/tokenizer.json"]),
    (["--config=experiments/math.py:huge"], ["unknown size 'huge'"]),
    (["--config.data.length=65"], ["length = 65", "at least 66"]),
  ],
)
def test_bad_command_lines_exit_in_one_line(arguments, words):
  result = run_tiny(*arguments)
  errors = [
    line for line in result.stderr.splitlines() if line.startswith("error:")
  ]
  assert result.returncode == 2, result.stderr
  assert len(errors) == 1 and "Traceback" not in result.stderr
  assert len(errors[0]) < 300
  for word in words:
    assert word in errors[0]


@pytest.mark.slow
def test_a_full_disk_ends_a_run_in_one_line_and_loses_nothing(tmp_path):
  """No file may exceed 60 kB: the first checkpoint cannot be written."""
  limit = (60_000, resource.RLIM_INFINITY)
  workdir = f"--workdir={tmp_path}"
  full = run_tiny(
    workdir,
    preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limit),
  )
  assert full.returncode == 2, full.stderr
  last_line = full.stderr.splitlines()[-1]
  assert last_line.startswith("error: a checkpoint could not be written")
  assert (tmp_path / "metrics.jsonl").read_text().startswith('{"step": 5,')
  # With room again the same command does the whole run.
  again = run_tiny(workdir)
  assert again.returncode == 0, again.stderr
  assert (tmp_path / "results.json").exists()
  made = json.loads((tmp_path / "surroundings.json").read_text())
  assert made.keys() >= {"commit", "device", "cores", "jax"}
