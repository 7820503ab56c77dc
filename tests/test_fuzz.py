"""Mutated configs and files end in an error of one line, and soon."""

import copy
import dataclasses
import json
import random
import signal
import string
from pathlib import Path

import pytest

from experiments import automaton, math
from sleep_jax.config import ExperimentConfig, from_config_dict
from sleep_jax.data import pipeline
from sleep_jax.data.source import task_and_tokenizer, vocabulary_size
from sleep_jax.data.tokenizers import make_tokenizer
from sleep_jax.parallel import sharding
from sleep_jax.tasks.gsm_infinite import (
  GsmInfinite,
  GsmInfiniteConfig,
  GsmInfiniteFile,
)
from sleep_jax.tasks.gsm_infinite import __main__ as gsm_infinite
from sleep_jax.tasks.gsm_infinite.jsonl import read_records, write_problems
from sleep_jax.training import optimizers

COUNT = 1000
SAMPLES = Path(__file__).parents[2] / "shared/samples/gsm_infinite.jsonl"


@pytest.fixture(autouse=True)
def no_hang():
  """Ends a test that does not end by itself."""

  def ring(*_):
    raise AssertionError("two minutes are over")

  before = signal.signal(signal.SIGALRM, ring)
  signal.alarm(120)
  yield
  signal.alarm(0)
  signal.signal(signal.SIGALRM, before)


def deep(levels):
  value: list = []
  for _ in range(levels):
    value = [value]
  return value


VALUES = (
  *(None, True, False, 0, 1, -1, 2, 3, 7, 2**31 - 1, 2**31, 2**63, 10**400),
  *(0.0, -0.0, 0.5, 1e-300, 1e308, -1.5, float("inf"), float("nan")),
  *(
    "",
    "0",
    "4",
    "none",
    "sliding",
    "attn",
    "a\nb",
    "\0",
    "\ud800",
    "x" * 9999,
  ),
  *("/", "/dev/null", "..", "(", "a{99999999999}", "eval/heldout/accuracy"),
  *([], [0], [1, 2], [-1], [2.5], ["attn"], [None], [[]], [["a", 1]], ()),
  *([[["attn"], 1]], [[{"attn": 1}, 1]], [["kernel", ["fsdp", None]]]),
  *([["kernel", "fsdp"]], [["(", []]], [[b"x", []]], {}, {"a": {"b": 1}}),
  *(object, b"bytes", 1j, {1, 2}),
)


def mutated(rng, config):
  """One to three leaves, sections or names of the config are changed."""
  config = copy.deepcopy(config)
  for _ in range(rng.randint(1, 3)):
    section = rng.choice(list(config))
    leaves = config[section]
    value = rng.choice(VALUES) if rng.random() < 0.98 else deep(100_000)
    kind = rng.random()
    if kind < 0.8 and isinstance(leaves, dict) and leaves:
      name = rng.choice(list(leaves))
      if kind < 0.6:
        value = rng.choice(
          [value, *(x for x in VALUES if type(x) is type(leaves[name]))]
        )
      leaves[name] = value
    elif kind < 0.85 and isinstance(leaves, dict) and leaves:
      del leaves[rng.choice(list(leaves))]
    elif kind < 0.9 and isinstance(leaves, dict):
      leaves["".join(rng.choices(string.printable, k=3))] = value
    elif kind < 0.95:
      config[section] = value
    else:
      config[rng.choice(["extra", 7, None])] = value
  return config


def set_up(config):
  """What a run does before it compiles, but for making parameters."""
  sharding.make_mesh(config)
  task, tokenizer = task_and_tokenizer(config)
  vocabulary_size(config, tokenizer)
  optimizers.optimizer(config.optimizer, max(config.run.steps, 1))
  if config.data.length > 10**5:
    return
  batches = pipeline.eval_batches(
    task,
    tokenizer,
    task.eval_splits[0],
    1,
    length=config.data.length,
    window_length=config.sleep.window_length,
    align_answer=config.data.align_answer,
    batch_size=1,
  )
  next(batches)


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("start", [math.tiny(), automaton.tiny()])
def test_mutated_configs(start, seed):
  rng, valid = random.Random(seed), 0
  for _ in range(COUNT // 4):
    wrong = mutated(rng, dataclasses.asdict(start))
    try:
      config = from_config_dict(wrong)
    except ValueError:
      continue
    assert isinstance(config, ExperimentConfig)
    valid += 1
    try:
      set_up(config)
    except (ValueError, OSError):
      continue
    # Arguments of `jax.jit` that are not traced.
    hash(config.model), hash(config.sleep)
  assert 10 < valid < COUNT // 8


@pytest.mark.parametrize(
  "value", [None, 3, "text", [], [1], [["task", {}]], {}]
)
def test_what_is_no_config(value):
  with pytest.raises(ValueError, match="bad config"):
    from_config_dict(value)


@pytest.fixture(scope="module")
def problem_lines(tmp_path_factory):
  """Lines of the benchmark where they are at hand, and of our generator."""
  path = tmp_path_factory.mktemp("fuzz") / "written.jsonl"
  tasks = [
    GsmInfinite(GsmInfiniteConfig(style=style, layers=(layers,)), seed=0)
    for style in ("prose", "terse")
    for layers in (2, 3)
  ]
  write_problems(
    path, [task.problem("train", i) for task in tasks for i in range(9)]
  )
  lines = path.read_bytes().splitlines()
  return lines + (SAMPLES.read_bytes().splitlines() if SAMPLES.exists() else [])


GARBAGE = (
  *(b"\0", b"\xff\xfe", b"\xed\xa0\x80", b"\r", b"\n", b'"', b"\\", b"{", b"]"),
  *(b"9" * 5000, b"-1", b"1e999", b"NaN", b"null", b"[" * 100_000, b"\\ud800"),
  *(b" = ", b" .", b". ", b" equals ", b" times 99999999999999999999 "),
)


def mutated_line(rng, line):
  """Bytes changed, cut, put in or repeated; or a field of another type."""
  kind = rng.random()
  if kind < 0.3:
    fields = json.loads(line)
    name = rng.choice(list(fields))
    if rng.random() < 0.2:
      del fields[name]
    else:
      fields[name] = rng.choice(
        [None, True, -1, 2.5, 10**30, 1e400, "", "x", "3", [], {}, deep(900)]
      )
    return json.dumps(fields).encode()
  for _ in range(rng.randint(1, 4)):
    at, to = sorted(rng.choices(range(len(line) + 1), k=2))
    to = min(to, at + 50)
    put = rng.choice(
      [b"", b"", rng.choice(GARBAGE), rng.randbytes(3), line[at:to] * 2]
    )
    line = line[:at] + put + line[to:]
  return line if kind < 0.8 else line[: rng.randrange(len(line) + 1)]


def test_mutated_lines_of_problems(
  problem_lines, tmp_path, monkeypatch, capsys
):
  rng, path, readable = random.Random(0), tmp_path / "one.jsonl", []
  for _ in range(COUNT):
    line = mutated_line(rng, rng.choice(problem_lines))
    path.write_bytes(line)
    try:
      list(read_records(path))
      readable.append(line)
    except ValueError as error:
      assert "\n" not in str(error) and len(str(error)) < 300
      with pytest.raises(ValueError):
        GsmInfiniteFile(path)
    # The command line: nothing but 0, 1 and 2, and one line for 2.
    for command in ("check", "floors"):
      monkeypatch.setattr("sys.argv", ["gsm_infinite", command, str(path)])
      code = gsm_infinite.main()
      said = capsys.readouterr()
      assert code in (0, 1, 2) and len(said.err.splitlines()) == int(code == 2)
  assert COUNT // 5 < len(readable) < COUNT
  # What can be read makes rows, or one line that says why it does not.
  path.write_bytes(b"\n".join(readable))
  task = GsmInfiniteFile(path, 0.2)
  tokenizer = make_tokenizer("words", task.vocabulary, task.text_separator)
  for index in range(task.size("train")):
    example = task.example("train", index)
    ids = tokenizer.encode(example.context)
    part = pipeline.prediction_part(example, tokenizer)
    try:
      pipeline.lay_out(ids, *part, tokenizer.pad_id, 3000, 1000, True)
    except ValueError as error:
      assert "\n" not in str(error)
