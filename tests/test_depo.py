"""Depo: the generator against the checker, the laws, and damaged files."""

import collections
import dataclasses
import json
import math
import pathlib
import subprocess
import sys

import numpy as np
import pytest

from experiments import depo
from sleep_jax.data.pipeline import eval_batches
from sleep_jax.data.source import task_and_tokenizer
from sleep_jax.data.tokenizers import make_tokenizer
from sleep_jax.tasks.depo import Depo, DepoConfig
from sleep_jax.tasks.depo.__main__ import main, record
from sleep_jax.tasks.depo.checker import Wrong, check, read_records

SAMPLES = pathlib.Path(__file__).parents[2] / "shared/samples/depo.jsonl"
LONG_NAMES = DepoConfig(nodes=20, name_length=(5, 7), mini_vocab=3)
CONFIGS = [
  DepoConfig(),
  LONG_NAMES,
  DepoConfig(nodes=5, hops=6, queries=2, name_length=(1, 1), mini_vocab=5),
  DepoConfig(nodes=6, hops=4, mini_vocab=4, separator=True),
]


def records(config, split, count, seed=0):
  task = Depo(config, seed)
  for i in range(count):
    fields = record(config, split, i, task.problem(split, i))
    yield json.loads(json.dumps(fields))


def run(monkeypatch, *arguments):
  monkeypatch.setattr(sys, "argv", ["depo", *map(str, arguments)])
  return main()


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("split", ["train", "hops_4"])
def test_the_checker_confirms_every_problem(config, split):
  for fields in records(config, split, 50):
    check(fields)


@pytest.mark.slow
@pytest.mark.parametrize(
  "names", ["", "--nodes=20 --name_length=5,7 --mini_vocab=3"]
)
@pytest.mark.parametrize("split", ["train", "hops_16"])
def test_the_checker_confirms_ten_thousand_problems(names, split, tmp_path):
  """In processes of their own, where checks of types take no time."""
  path = str(tmp_path / "problems.jsonl")
  program = [sys.executable, "-m", "sleep_jax.tasks.depo"]
  options = ["--count=2500", f"--split={split}", *names.split()]
  subprocess.run([*program, "write", path, *options], check=True)
  said = subprocess.check_output([*program, "check", path], text=True)
  assert said == "2500 right, 0 wrong\n"


@pytest.mark.skipif(not SAMPLES.exists(), reason="no samples here")
def test_the_original_s_problems_are_right(monkeypatch, capsys):
  assert run(monkeypatch, "check", SAMPLES) == 0
  assert capsys.readouterr().out == "15 right, 0 wrong\n"


def names_of(words, size):
  names, name = [], ()
  for word in words:
    name += (int(word),)
    if name[-1] > size:
      names.append(name)
      name = ()
  assert not name
  return names


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("split", ["train", "hops_2"])
def test_an_example_is_its_problem_as_text(config, split):
  task = Depo(config, seed=1)
  size = config.mini_vocab
  for index in range(20):
    example = task.example(split, index)
    words = example.context.split()
    if config.separator:
      edges = " ".join(words).split("9700")
      assert edges[0] == "" and len(edges) == 1 + len(example.questions)
      assert all(len(names_of(x.split(), size)) == 2 for x in edges[1:])
      words = [word for word in words if word != "9700"]
    names = names_of(words, size)
    following = dict(zip(names[::2], names[1::2], strict=True))
    depths = []
    for question in example.questions:
      hops, *words = question.prompt.split()
      (node,) = names_of(words, size)
      depths.append(int(hops) - 9000)
      for _ in range(depths[-1]):
        node = following[node]
      assert names_of(question.answer.split(), size) == [node]
    assert example.depth == max(depths)
    assert set(example.context.split()) <= set(task.vocabulary)
    assert len(example.questions) == min(len(following), config.queries)


def test_rows_are_the_records_shifted_by_one():
  """The pipeline's row holds ids and mask of the file, pads and all."""
  config = DepoConfig(nodes=12, hops=4, queries=4, mini_vocab=8)
  task = Depo(config, seed=0)
  tokenizer = make_tokenizer("words", task.vocabulary, task.text_separator)
  (batch,) = eval_batches(
    task,
    tokenizer,
    "hops_4",
    16,
    length=72,
    window_length=24,
    align_answer=True,
    batch_size=16,
  )
  for row, fields in enumerate(records(config, "hops_4", 16)):
    edges = fields["edges_tokens"]
    ids = [
      tokenizer.marker_id if i == 9500 else tokenizer.encode(str(i))[0]
      for i in fields["ids"][1:]
    ]
    part, mask = ids[edges:], fields["loss_mask"][1 + edges :]
    places = slice(48, 48 + len(part) - 1)
    np.testing.assert_array_equal(
      batch.inputs[row, 48 - edges : 48], ids[:edges]
    )
    np.testing.assert_array_equal(batch.inputs[row, places], part[:-1])
    np.testing.assert_array_equal(batch.targets[row, places], part[1:])
    np.testing.assert_array_equal(batch.loss_mask[row, places], mask[1:])
    assert batch.loss_mask[row].sum() == sum(mask)
    valid = np.zeros(72, bool)
    valid[48 - edges : places.stop] = True
    np.testing.assert_array_equal(batch.valid[row], valid)
  assert (batch.depth == 4).all()


def test_the_marker_counts_if_it_is_said_to():
  example = Depo(DepoConfig(marker_counts=False), 0).example("train", 0)
  assert not example.marker_counts


def chi_square_holds(counts, probabilities):
  """Within five standard deviations of what chi-square is on average."""
  counts, expected = np.array(counts), np.array(probabilities) * sum(counts)
  freedom = len(counts) - 1
  value = ((counts - expected) ** 2 / expected).sum()
  return abs(value - freedom) < 5 * math.sqrt(2 * freedom)


def test_the_laws_of_training():
  task = Depo(DepoConfig(nodes=12, hops=6, mini_vocab=20, queries=3), seed=0)
  problems = [task.problem("train", i) for i in range(2000)]
  sizes = collections.Counter(len(problem.edges) for problem in problems)
  weights = np.array([1 / (n + math.sqrt(12)) for n in range(3, 13)])
  counts = [sizes[n] for n in range(3, 13)]
  assert sum(counts) == 2000
  assert chi_square_holds(counts, weights / weights.sum())
  hops = collections.Counter(k for p in problems for k, _, _ in p.queries)
  assert chi_square_holds([hops[k] for k in range(1, 7)], [1 / 6] * 6)
  # The first edge is that of any node, and so is the first asked about.
  first = [
    [x for x, _ in p.edges].index(p.queries[0][1])
    for p in problems
    if len(p.edges) == 3
  ]
  assert chi_square_holds(np.bincount(first), [1 / 3] * 3)
  # Where the second edge starts, against where the first one ends.
  follows = sum(p.edges[0][1] == p.edges[1][0] for p in problems) / 2000
  expected = sum(sizes[n] / 2000 / (n - 1) for n in range(3, 13))
  assert abs(follows - expected) < 5 * math.sqrt(0.25 / 2000)


def test_the_hops_of_training():
  config = DepoConfig(nodes=12, hops=6, train_hops=(1, 4), mini_vocab=20)
  task = Depo(config, seed=0)
  problems = [task.problem("train", i) for i in range(300)]
  hops = collections.Counter(k for p in problems for k, _, _ in p.queries)
  assert set(hops) == {1, 4}
  assert chi_square_holds([hops[1], hops[4]], [1 / 2] * 2)
  # All else is drawn as ever.
  plain = Depo(dataclasses.replace(config, train_hops=()), 0)
  assert task.problem("hops_2", 0) == plain.problem("hops_2", 0)
  for i, problem in enumerate(problems[:20]):
    other = plain.problem("train", i)
    assert problem.edges == other.edges
    assert [x for _, x, _ in problem.queries] == [
      x for _, x, _ in other.queries
    ]


def test_a_share_of_full_cycles():
  config = DepoConfig(nodes=6, mini_vocab=20, full_cycles=0.4)
  task = Depo(config, seed=0)
  sizes = collections.Counter(
    len(task.problem("train", i).edges) for i in range(2000)
  )
  law = np.array([1 / (n + math.sqrt(6)) for n in range(3, 7)])
  expected = 0.6 * law / law.sum() + [0, 0, 0, 0.4]
  assert chi_square_holds([sizes[n] for n in range(3, 7)], expected)
  plain = Depo(dataclasses.replace(config, full_cycles=0.0), 0)
  assert task.problem("hops_2", 0) == plain.problem("hops_2", 0)


def test_training_begins_with_the_curriculum():
  config = DepoConfig(nodes=12, mini_vocab=20, full_cycles=1.0)
  stages = ((40, 0.0), (40, 0.5))
  task = Depo(dataclasses.replace(config, curriculum=stages), seed=0)
  for index in range(120):
    _, share = [*stages, (40, 1.0)][index // 40]
    plain = Depo(dataclasses.replace(config, full_cycles=share), seed=0)
    for split in ("train", "hops_2"):
      assert task.problem(split, index) == plain.problem(split, index)
  assert all(len(task.problem("train", i).edges) == 12 for i in range(80, 120))
  assert {len(task.problem("train", i).edges) for i in range(40)} > {3, 12}


def test_the_paper_s_lengths():
  """The original's: 218-264 tokens of edges, mean 240; in training mean 85."""
  test = list(records(DepoConfig(), "hops_8", 60))
  edges = [fields["edges_tokens"] for fields in test]
  assert abs(np.mean(edges) - 240) < 4 and min(edges) > 210 and max(edges) < 270
  assert max(fields["qa_tokens"] for fields in test) <= 60
  assert {query["k"] for fields in test for query in fields["queries"]} == {8}
  train = list(records(DepoConfig(), "train", 400))
  assert abs(np.mean([fields["n_nodes"] for fields in train]) - 27.5) < 5
  assert abs(np.mean([fields["edges_tokens"] for fields in train]) - 85) < 16


def test_tokens_of_names_are_uniform():
  task = Depo(DepoConfig(nodes=3, mini_vocab=6, name_length=(2, 3)), seed=0)
  lengths, first, last = (collections.Counter() for _ in range(3))
  for i in range(2000):
    for name, _ in task.problem("hops_1", i).edges:
      lengths[len(name)] += 1
      first[name[0]] += 1
      last[name[-1]] += 1
  # Names in use are drawn anew: of 36 there are a little fewer than of 216.
  assert abs(lengths[2] / lengths.total() - 0.5) < 0.04
  assert chi_square_holds([first[i] for i in range(1, 7)], [1 / 6] * 6)
  assert chi_square_holds([last[i] for i in range(7, 13)], [1 / 6] * 6)


def test_examples_depend_on_seed_split_and_index():
  config = CONFIGS[0]
  example = Depo(config, seed=0).example("train", 7)
  assert Depo(config, seed=0).example("train", 7) == example
  assert Depo(config, seed=1).example("train", 7) != example
  assert Depo(config, seed=0).example("hops_1", 7) != example
  assert Depo(config, seed=0).example("train", 8) != example


def test_splits():
  assert Depo(DepoConfig(hops=12), 0).eval_splits == (
    *("hops_1", "hops_2", "hops_4", "hops_8", "hops_12"),
  )
  assert Depo(DepoConfig(), 0).eval_splits[-1] == "hops_16"
  with pytest.raises(ValueError, match="'test': use one of"):
    Depo(DepoConfig(), 0).size("test")


@pytest.mark.parametrize(
  "settings",
  [
    {"nodes": 2},
    {"hops": 0},
    {"hops": 500},
    {"train_hops": (1, 0)},
    {"train_hops": (1, 17)},
    {"train_hops": (1.0,)},
    {"full_cycles": -0.1},
    {"full_cycles": 1.1},
    {"full_cycles": math.nan},
    {"curriculum": ((10, 0.5), (0, 1.0))},
    {"curriculum": ((10, 1.5),)},
    {"curriculum": ((10, True),)},
    {"curriculum": ((10.0, 0.5),)},
    {"curriculum": (10, 0.5)},
    {"queries": 0},
    {"mini_vocab": 0},
    {"mini_vocab": 4501},
    {"name_length": (0, 1)},
    {"name_length": (3, 2)},
    {"name_length": (1,)},
    {"name_length": (1, "2")},
  ],
)
def test_bad_settings_are_named(settings):
  ((field, value),) = settings.items()
  with pytest.raises(ValueError) as error:
    DepoConfig(**settings)
  assert f"task.{field} = {value!r}: use" in str(error.value)


def test_names_of_any_length_are_counted_at_once():
  DepoConfig(name_length=(1, 10**9))


def test_too_few_names():
  with pytest.raises(ValueError, match="there are 12 names"):
    DepoConfig(nodes=13, mini_vocab=3)
  assert len(
    Depo(DepoConfig(nodes=12, mini_vocab=3), 0).problem("hops_1", 0)[0]
  )


def damage_answer(fields):
  at = fields["queries"][2]["ans_pos"] + 1
  other = fields["queries"][3]["ans_pos"] + 1
  ids = fields["ids"]
  ids[at], ids[other] = ids[other], ids[at]


def damage_edges(fields):
  # The successors of two edges change places: two cycles.
  fields["ids"][2], fields["ids"][4] = fields["ids"][4], fields["ids"][2]


def set_id(place, value):
  def damage(fields):
    fields["ids"][place] = value

  return damage


def set_field(name, value):
  def damage(fields):
    fields[name] = value

  return damage


def flip_mask(fields):
  fields["loss_mask"][fields["queries"][0]["ans_pos"]] = 0


def flip_mask_of_a_prompt(fields):
  fields["loss_mask"][fields["queries"][0]["pos"]] = 1


def twice_asked(fields):
  first, second = fields["queries"][:2]
  for before, after in ((first, second),):
    ids = fields["ids"]
    ids[after["pos"] : after["pos"] + 4] = ids[
      before["pos"] : before["pos"] + 4
    ]


def state_another(fields):
  fields["queries"][1]["k"] += 1


def drop_a_query(fields):
  fields["ids"] = fields["ids"][:-4]
  fields["qa_tokens"] -= 4


@pytest.mark.parametrize(("place", "value"), [(1, 2), (4, 9000), (4, 9701)])
def test_a_separator_that_is_none_is_found(place, value):
  config = DepoConfig(name_length=(1, 1), mini_vocab=80, separator=True)
  (fields,) = records(config, "train", 1)
  assert fields["ids"][place] == 9700
  check(fields)
  fields["ids"][place] = value
  with pytest.raises(Wrong, match=f"token {place}: no separator"):
    check(fields)


@pytest.mark.parametrize(
  ("damage", "reason"),
  [
    (damage_answer, r"token \d+: 4 hops from \[\d+\] are \[\d+\], not \[\d+\]"),
    (damage_edges, "not one cycle"),
    (set_id(0, 7), "ids\\[0\\], the bos: 7, not 0"),
    (set_id(2, 0), "token 2: the name from token 2 on does not end"),
    (set_id(2, 1), "token 2: a name of 2 tokens"),
    (set_field("n_nodes", 6), "nodes: 8, not 6"),
    (set_field("edges_tokens", 15), "tokens of the edges: 16, not 15"),
    (set_field("qa_tokens", 15), "tokens of the queries: 24, not 15"),
    (flip_mask, r"loss_mask\[\d+\]: 0, not 1"),
    (flip_mask_of_a_prompt, r"loss_mask\[\d+\]: 1, not 0"),
    (set_field("loss_mask", [0]), "length of loss_mask: 1, not 41"),
    (twice_asked, "a node is asked about twice"),
    (state_another, "query 1: .*, not "),
    (drop_a_query, "queries: 5, not 6"),
    (set_id(19, 3), "token 19: no answer marker"),
    (set_id(17, 9005), "9005 is no query of 1..K hops"),
    (set_id(18, 100), "does not end"),
  ],
)
def test_damaged_problems_are_found(
  damage, reason, tmp_path, monkeypatch, capsys
):
  config = DepoConfig(
    nodes=8, hops=4, queries=6, name_length=(1, 1), mini_vocab=10
  )
  good, fields, *_ = records(config, "hops_4", 2)
  check(fields)
  damage(fields)
  with pytest.raises(Wrong, match=reason):
    check(fields)
  path = tmp_path / "problems.jsonl"
  path.write_text("\n".join(map(json.dumps, (good, fields, good))))
  assert run(monkeypatch, "check", path) == 1
  first, last = capsys.readouterr().out.splitlines()
  assert first.startswith("line 2: ") and last == "2 right, 1 wrong"


def test_the_test_s_law_is_checked():
  config = DepoConfig(nodes=20, hops=4)
  fields = next(f for f in records(config, "train", 9) if f["n_nodes"] < 20)
  fields["params"]["QA"] = True
  with pytest.raises(Wrong, match="nodes with N = 20"):
    check(fields)
  fields["params"] |= {"QA": False, "N": fields["n_nodes"] - 1}
  with pytest.raises(Wrong, match="nodes with N = "):
    check(fields)


@pytest.mark.parametrize(
  ("text", "message"),
  [
    ("", "no problem in it"),
    ("\n\n", "no problem in it"),
    ("{", "line 1"),
    ("[1]", "line 1: not a JSON object"),
    ("{}", "line 1: field 'params' is missing or no object"),
    ('{"params": {}, "ids": ["1"]}', "line 1: field 'ids' is missing or no"),
    ("[" * 100_000, "line 1"),
  ],
)
def test_unreadable_files_take_one_line(
  text, message, tmp_path, monkeypatch, capsys
):
  path = tmp_path / "problems.jsonl"
  path.write_text(text)
  assert run(monkeypatch, "check", path) == 2
  error = capsys.readouterr().err
  assert message in error and error.count("\n") == 1


def test_every_missing_field_is_named(tmp_path):
  (fields,) = records(CONFIGS[2], "train", 1)
  path = tmp_path / "problems.jsonl"
  for name in set(fields) - {"config", "index"}:
    path.write_text(json.dumps({k: v for k, v in fields.items() if k != name}))
    with pytest.raises(ValueError, match=f"line 1: field '{name}'"):
      list(read_records(path))


def test_what_is_written_is_right(tmp_path, monkeypatch, capsys):
  path = tmp_path / "problems.jsonl"
  options = "--count=20 --nodes=9 --name_length=5,7 --mini_vocab=3".split()
  assert run(monkeypatch, "write", path, *options, "--split=hops_2") == 0
  assert run(monkeypatch, "check", path) == 0
  assert capsys.readouterr().out.endswith("20 right, 0 wrong\n")
  for option, separators in (("--separator", 18), ("--no-separator", 0)):
    one = "--count=1", "--nodes=18", "--split=hops_1", option
    assert run(monkeypatch, "write", path, *one) == 0
    ((_, fields),) = read_records(path)
    assert fields["ids"].count(9700) == separators
    assert fields["params"]["separator"] is (separators > 0)
    check(fields)
  fields["params"]["separator"] = "false"
  path.write_text(json.dumps(fields))
  with pytest.raises(ValueError, match="'separator' is neither true nor"):
    list(read_records(path))
  powers = "--count=20", "--nodes=12", "--hops=8", "--train_hops=2,8"
  assert run(monkeypatch, "write", path, *powers) == 0
  asked = {
    q["k"] for _, fields in read_records(path) for q in fields["queries"]
  }
  assert asked == {2, 8}
  assert run(monkeypatch, "write", path, "--nodes=2") == 2
  assert run(monkeypatch, "write", path, "--split=hops_3") == 2
  assert run(monkeypatch, "check", tmp_path / "none.jsonl") == 2
  assert capsys.readouterr().err.count("\n") == 3
  with pytest.raises(SystemExit, match="2"):
    run(monkeypatch, "write", path, "--train_hops=1;2")
  said = capsys.readouterr().err
  assert said.endswith("'1;2' is no list of int with commas between\n")
  assert said.count("\n") == 1


@pytest.mark.parametrize("size", depo.SIZES)
def test_rows_of_the_experiments_fit(size):
  config = depo.SIZES[size]()
  task, tokenizer = task_and_tokenizer(config)
  for split in ("train", task.eval_splits[-1]):
    (batch,) = eval_batches(
      task,
      tokenizer,
      split,
      8,
      length=config.data.length,
      window_length=config.sleep.window_length,
      align_answer=True,
      batch_size=8,
    )
    # The longest that can be drawn fits, too.
    longest = max(config.task.name_length)
    edges = 2 * longest * config.task.nodes
    part = (2 + 2 * longest) * config.task.queries - 1
    length = config.sleep.window_length
    assert part <= length
    assert -(-edges // length) * length + part <= config.data.length
    assert batch.loss_mask.any(axis=1).all()


def test_the_paper_s_rows():
  config = depo.paper()
  assert config.data.length == 360 and config.sleep.window_length == 75
  task, tokenizer = task_and_tokenizer(config)
  assert tokenizer.vocab_size == 100 + 16 + 3


def test_the_command_line():
  result = subprocess.run(
    [sys.executable, "-m", "sleep_jax.tasks.depo", "check", "/no/such/file"],
    capture_output=True,
    text=True,
  )
  assert result.returncode == 2
  assert result.stderr.count("\n") == 1
