import collections
import dataclasses
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile

import pytest

from sleep_jax.tasks.draws import Draws
from sleep_jax.tasks.gsm_infinite import (
  GsmInfinite,
  GsmInfiniteConfig,
  GsmInfiniteFile,
  Problem,
  split_words,
)
from sleep_jax.tasks.gsm_infinite import __main__ as command_line
from sleep_jax.tasks.gsm_infinite import task as task_module
from sleep_jax.tasks.gsm_infinite.graph import Definition, Parameter
from sleep_jax.tasks.gsm_infinite.solver import (
  Unsolvable,
  count_operations,
  solve,
)
from sleep_jax.tasks.gsm_infinite.text import Prose
from sleep_jax.tasks.gsm_infinite.themes import THEMES

OPS = tuple(range(1, 9))
POCKET = GsmInfiniteConfig(
  style="terse",
  ops=(1, 2, 3, 4),
  max_places=3,
  max_things=3,
  max_value=20,
  distractors=4,
)
KINDS = [
  pytest.param(style, layers, mode, id=f"{style}-{layers}-{mode}")
  for style in ("prose", "terse")
  for layers in (2, 3)
  for mode in ("forward", "reverse")
]


def kind(style, layers, mode, **settings):
  return GsmInfiniteConfig(
    style=style, layers=(layers,), modes=(mode,), **settings
  )


def sentences(problem):
  """The statements of a text in either style."""
  end = r"(?<= \.) " if problem.endswith(" .") else r"(?<=\.) (?=The )"
  return re.split(end, problem)


def left_side(sentence):
  return re.split(r" (?:equals|=|>|is|exists)[ ,]", sentence)[0]


def canonical(problem):
  return (problem.question, *sorted(sentences(problem.problem)))


def command(*arguments):
  module = [sys.executable, "-m", "sleep_jax.tasks.gsm_infinite"]
  return subprocess.run(
    [*module, *map(str, arguments)], capture_output=True, text=True
  )


def draw(config, count, seed=0, split="train"):
  task = GsmInfinite(config, seed)
  return [task.problem(split, index) for index in range(count)]


def draw_many(config, count, seed=0, split="train"):
  """The same from the command line, where no type check slows it down."""
  options = [f"--count={count}", f"--seed={seed}", f"--split={split}"]
  for field, value in dataclasses.asdict(config).items():
    items = value if isinstance(value, tuple) else (value,)
    options.append(f"--{field}={','.join(map(str, items))}")
  with tempfile.NamedTemporaryFile() as file:
    done = command("write", file.name, *options)
    assert done.returncode == 0, done.stderr
    records = [json.loads(line) for line in file]
  assert len(records) == count
  return [
    Problem(
      problem=record["problem"],
      question=record["question"],
      answer=int(record["answer"]),
      solution=record["solution"],
      op=record["op"],
      mode={"normalforward": "forward", "forwardreverse": "reverse"}[
        record["mode"]
      ],
      theme=record["template"],
      layers=record["d"],
      id=record["id"],
    )
    for record in records
  ]


def length(problem):
  return len(f"{problem.question} {problem.problem}".split())


def confirm(config, problems):
  for problem in problems:
    text = problem.problem, problem.question
    assert solve(*text) == problem.answer, problem
    assert count_operations(*text) == problem.op, problem
    assert 0 <= problem.answer <= config.max_value
    assert problem.solution.endswith(f"Answer: {problem.answer}.")


# --- answers and operations ---


@pytest.mark.parametrize("style, layers, mode", KINDS)
def test_solver_confirms_answers_and_operations(style, layers, mode):
  config = kind(style, layers, mode)
  confirm(config, draw(config, 100, seed=1))


@pytest.mark.parametrize(
  "settings",
  [
    {"max_value": 4},
    {"max_value": 20, "distractors": 3},
    {"max_value": 20, "max_leaf": 9},
    {"max_leaf": 1},
    {"max_places": 1, "max_things": 5},
    {"max_places": 5, "max_things": 1},
    {"min_tokens": 400, "max_tokens": 900},
    {"style": "terse", "min_tokens": 100, "max_tokens": 300},
    {"style": "terse", "max_tokens": 60},
  ],
)
def test_solver_confirms_special_settings(settings):
  config = GsmInfiniteConfig(**{"layers": (2, 3), "ops": (1, 2, 5), **settings})
  confirm(config, draw(config, 40, seed=2))
  confirm(config, draw(config, 5, seed=2, split="heldout"))


@pytest.mark.parametrize("max_leaf", [4, 9])
def test_leaves_take_every_value_up_to_the_largest(max_leaf):
  config = GsmInfiniteConfig(style="terse", max_leaf=max_leaf)
  text = " ".join(problem.problem for problem in draw(config, 200, seed=1))
  leaves = {int(value) for value in re.findall(r" = (\d+) \.", text)}
  # What is given in a reverse problem looks like a leaf, and may be larger.
  assert set(range(1, max_leaf + 1)) <= leaves
  forward = dataclasses.replace(config, modes=("forward",))
  text = " ".join(problem.problem for problem in draw(forward, 200, seed=1))
  leaves = {int(value) for value in re.findall(r" = (\d+) \.", text)}
  assert leaves == set(range(1, max_leaf + 1))
  # What the answer does not need is as large, or its size would tell it apart.
  lookups = dataclasses.replace(forward, ops=(1,))
  others = [
    int(value)
    for problem in draw(lookups, 200, seed=1)
    for statement in sentences(problem.problem)
    if not statement.startswith(problem.question.strip("? ."))
    for value in re.findall(r" = (\d+) \.", statement)
  ]
  assert set(others) == set(range(1, max_leaf + 1))


@pytest.mark.slow
@pytest.mark.parametrize("style, layers, mode", KINDS)
def test_solver_confirms_ten_thousand(style, layers, mode):
  config = kind(style, layers, mode)
  confirm(config, draw_many(config, 1000, seed=3))
  long = dataclasses.replace(config, min_tokens=500, max_tokens=2500)
  confirm(long, draw_many(long, 250, seed=4))


@pytest.mark.parametrize("style, layers, mode", KINDS)
def test_without_distractors_every_statement_is_needed(style, layers, mode):
  config = kind(style, layers, mode, ops=OPS[1:], distractors=0)
  for problem in draw(config, 40, seed=5):
    everything = sentences(problem.problem)
    for left_out in range(len(everything)):
      rest = everything[:left_out] + everything[left_out + 1 :]
      try:
        assert solve(" ".join(rest), problem.question) != problem.answer
      except Unsolvable:
        continue


def test_operations_modes_and_worlds_are_uniform():
  drawn = draw_many(GsmInfiniteConfig(layers=(2, 3)), 2000)
  for field, values in {
    "op": OPS,
    "mode": ("forward", "reverse"),
    "theme": tuple(THEMES["prose"]),
    "layers": (2, 3),
  }.items():
    counts = collections.Counter(getattr(problem, field) for problem in drawn)
    assert set(counts) == set(values)
    expected = len(drawn) / len(values)
    for count in counts.values():
      assert abs(count - expected) < 4.5 * expected**0.5


def chain(problem):
  """Length of the longest chain of sentences from the asked one."""
  operands = {}
  for sentence in sentences(problem.problem):
    left, _, right = sentence.removesuffix(" .").partition(" = ")
    operands[left] = [name.strip(" ()") for name in re.split(r" [-+*] ", right)]

  def depth(name):
    if name.startswith("total "):
      inputs = [n for n in operands if n.endswith(name.removeprefix("total"))]
    else:
      inputs = operands.get(name, [])
    return 1 + max(map(depth, inputs), default=-1)

  return depth(problem.question.removeprefix("? ").removesuffix(" ."))


def test_graphs_of_one_number_of_operations_differ():
  config = kind("terse", 2, "forward", ops=(8,), distractors=0)
  drawn = draw_many(config, 400)
  chains = collections.Counter(chain(problem) for problem in drawn)
  assert {2, 3, 4, 5, 6} <= set(chains)
  assert max(chains.values()) < 0.5 * len(drawn)
  statements = collections.Counter(
    len(sentences(problem.problem)) for problem in drawn
  )
  assert len(statements) >= 4
  text = " ".join(problem.problem for problem in drawn)
  for sign in ("= 2 * ", "= 2 + ", " - ", "( ", "total"):
    assert sign in text
  assert any("total" in problem.question for problem in drawn)


def test_three_layers_ask_for_averages_and_totals_of_them():
  config = kind("terse", 3, "forward", ops=(6,), distractors=0)
  words = [set(problem.question.split()) for problem in draw_many(config, 300)]
  asked = collections.Counter(
    ("total" in some, "per" in some) for some in words
  )
  assert len(asked) == 4 and min(asked.values()) > 5


def test_one_operation_looks_up_a_constant():
  for problem in draw(kind("terse", 2, "forward", ops=(1,)), 50):
    name = problem.question.removeprefix("? ").removesuffix(" .")
    assert f"{name} = {problem.answer} ." in sentences(problem.problem)


@pytest.mark.parametrize("layers", [2, 3])
def test_the_best_constant_is_seldom_right(layers):
  # The like of 0.25 at four operations and 0.15 at eight is wanted; reverse
  # problems ask for one of four leaf constants at every number.
  floors = {
    ("forward", 2): 0.35,
    ("forward", 4): 0.27,
    ("forward", 8): 0.17,
    ("reverse", 2): 0.35,
    ("reverse", 8): 0.35,
  }
  config = GsmInfiniteConfig(style="terse", layers=(layers,), ops=(2, 4, 8))
  answers = collections.defaultdict(collections.Counter)
  for problem in draw_many(config, 4000):
    answers[problem.mode, problem.op][problem.answer] += 1
  for key, floor in floors.items():
    counts = answers[key]
    assert counts.most_common(1)[0][1] < floor * counts.total()
    if key[0] == "reverse":
      assert set(counts) == {1, 2, 3, 4}


# --- splits and determinism ---


def test_splits_never_share_a_problem():
  # So small a world that most problems are drawn again and again.
  config = kind(
    "terse",
    2,
    "forward",
    ops=(1, 2),
    themes=("zoo",),
    max_places=1,
    max_things=2,
    heldout_fraction=0.25,
  )
  drawn = {
    (seed, split): set(map(canonical, draw_many(config, 2000, seed, split)))
    for seed in (0, 1)
    for split in ("train", "heldout")
  }
  assert len(drawn[0, "train"] & drawn[1, "train"]) > 400
  assert len(drawn[0, "heldout"] & drawn[1, "heldout"]) > 150
  for a, b in itertools.product((0, 1), repeat=2):
    assert not drawn[a, "train"] & drawn[b, "heldout"]


def test_noise_does_not_move_a_problem_to_the_other_split():
  config = kind(
    "prose", 2, "forward", ops=(1,), themes=("zoo",), max_places=1, max_things=1
  )
  config = dataclasses.replace(config, heldout_fraction=0.25)
  quiet = {
    split: {problem.problem for problem in draw_many(config, 1500, split=split)}
    for split in ("train", "heldout")
  }
  assert len(quiet["train"] | quiet["heldout"]) > 0.9 * 4 * 10 * 10
  noisy = dataclasses.replace(config, min_tokens=100, max_tokens=200)
  for problem in draw(noisy, 40, seed=1, split="heldout"):
    text = set(sentences(problem.problem))
    assert len(text) > 2 and text & quiet["heldout"]
    assert not text & quiet["train"]


def test_examples_depend_on_seed_split_and_index_alone():
  task = GsmInfinite(POCKET, seed=0)
  example = task.example("train", 7)
  assert GsmInfinite(POCKET, seed=0).example("train", 7) == example
  assert GsmInfinite(POCKET, seed=1).example("train", 7) != example
  assert task.example("heldout", 7) != example
  assert task.example("train", 8) != example


PRINTED = """
from sleep_jax.tasks.gsm_infinite import GsmInfinite, GsmInfiniteConfig
for settings in ({"style": "terse"}, {"min_tokens": 500, "max_tokens": 600}):
  task = GsmInfinite(GsmInfiniteConfig(layers=(2, 3), **settings), seed=5)
  for split in ("train", "heldout"):
    for index in range(20):
      print(task.problem(split, index))
  print(task.vocabulary)
"""


def test_problems_are_the_same_whatever_the_hash_seed():
  printed = {
    subprocess.run(
      [sys.executable, "-c", PRINTED],
      env={**os.environ, "PYTHONHASHSEED": hash_seed},
      check=True,
      capture_output=True,
    ).stdout
    for hash_seed in ("1", "2")
  }
  assert len(printed) == 1 and len(printed.pop()) > 10_000


def test_problems_stay_the_same_between_releases():
  task = GsmInfinite(POCKET, seed=0)
  assert [task.example("train", i).context for i in range(3)] == GOLDEN


GOLDEN = [
  "? gymnasium harbor . gymnasium harbor > 0 . lyceum bridge = 4 . lyceum"
  " bridge = 4 * lyceum harbor . seminary bridge = 4 . lyceum harbor = "
  "gymnasium harbor . gymnasium bridge = total harbor .",
  "? thriller curtain . thriller curtain = musical moon + opera curtain ."
  " musical moon = opera curtain . opera curtain = 3 .",
  "? heron barn . owl barn = 2 . hawk barn = 4 . hawk zoo = 1 . heron "
  "barn = hawk barn .",
]


def test_draws_are_fair():
  draws = Draws("fair")
  samples = [tuple(draws.sample(range(4), 2)) for _ in range(12_000)]
  counts = collections.Counter(samples)
  assert len(counts) == 12
  assert all(abs(count - 1000) < 150 for count in counts.values())
  streaks = collections.Counter(draws.streak(2) for _ in range(8000))
  assert abs(streaks[0] - 4000) < 250 and abs(streaks[2] - 2000) < 250


# --- text, length and noise ---


def test_sentences_have_the_original_shapes():
  theme = THEMES["prose"]["zoo"]
  prose = Prose(theme, ["Pine Ridge", "Otter Lake"], ["adult owl", "adult elk"])
  owl, elk = Parameter("count", 0, 0), Parameter("count", 1, 1)
  young, total = Parameter("average", 0, 0), Parameter("total", 0)
  children = Parameter("attribute_total", 1)
  assert [prose.question(p) for p in (owl, young, total, children)] == [
    "How many adult owl does Pine Ridge have?",
    "What is the average number of newborn children per adult owl in Pine"
    " Ridge?",
    "What is the total number of adult animals in Pine Ridge?",
    "What is the total number of newborn animal children in Otter Lake?",
  ]
  assert [prose.existence(p) for p in (owl, young)] == [
    "The number of adult owl in Pine Ridge exists, and its number is greater"
    " than 0.",
    "The average number of newborn children per adult owl in Pine Ridge is"
    " greater than 0.",
  ]
  names = [
    "the number of adult elk in Otter Lake",
    "the total number of adult animals in Pine Ridge",
    "the average number of newborn children per adult owl in Pine Ridge",
  ]
  three = (elk, total, young)
  for definition, expression in (
    (Definition((), 3), "3"),
    (Definition(three[:1]), names[0]),
    (Definition(three[:1], 4, "+"), f"4 plus {names[0]}"),
    (
      Definition(three[:2], 2, "*"),
      f"2 times the sum of {names[0]} and {names[1]}",
    ),
    (
      Definition(three[:2], 2, "+", difference=True),
      f"2 plus the difference between {names[0]} and {names[1]}",
    ),
    (
      Definition(three),
      f"the sum of {names[0]}, {names[1]}, and {names[2]}",
    ),
  ):
    assert prose.statement(owl, definition) == (
      f"The number of adult owl in Pine Ridge equals {expression}."
    )


@pytest.mark.parametrize("layers", [2, 3])
def test_solutions_hold_for_any_hidden_value(layers):
  config = kind("terse", layers, "reverse", distractors=0)
  for problem in draw(config, 60):
    *steps, given, found = problem.solution.partition(".")[0].split("; ")
    assert found == f"x = {problem.answer}"
    hidden = problem.question.removeprefix("? ").removesuffix(" .")
    assert f"{given} ." in problem.problem
    rest = problem.problem.replace(f"{given} .", "")
    for x in (problem.answer, problem.answer + 3):
      text = rest.replace(f"{hidden} > 0 .", f"{hidden} = {x} .")
      for step in steps:
        name, _, form = step.partition(" = ")
        slope, _, offset = form.rpartition(" * x + ")
        value = int(slope or 0) * x + int(offset)
        assert solve(text, f"? {name} .") == value
      if x == problem.answer:
        assert given == f"{name} = {value}"


def test_context_is_the_question_and_then_the_statements():
  for style in ("prose", "terse"):
    task = GsmInfinite(GsmInfiniteConfig(style=style), seed=0)
    for index, problem in enumerate(draw_many(task.config, 5, split="heldout")):
      assert task.problem("heldout", index) == problem
      example = task.example("heldout", index)
      assert example.context == f"{problem.question} {problem.problem}"
      assert example.questions[0].answer == str(problem.answer)
      assert (example.depth, example.mode) == (problem.op, problem.mode)
  assert task.size("train") is None
  with pytest.raises(ValueError, match="'test'"):
    task.example("test", 0)


@pytest.mark.parametrize("style", ["prose", "terse"])
@pytest.mark.parametrize("layers", [(2,), (3,)])
def test_vocabulary_has_every_word(style, layers):
  config = GsmInfiniteConfig(style=style, layers=layers, max_value=60)
  for noise in ({}, {"min_tokens": 200, "max_tokens": 300}):
    noisy = dataclasses.replace(config, **noise)
    vocabulary = GsmInfinite(noisy, seed=0).vocabulary
    assert len(set(vocabulary)) == len(vocabulary)
    words = set()
    for problem in draw_many(noisy, 400):
      words.update(split_words(f"{problem.question} {problem.problem}"))
      words.add(str(problem.answer))
    assert words <= set(vocabulary)
    if not noise:
      assert all(word.isdigit() for word in set(vocabulary) - words)


def test_the_pocket_vocabulary_is_small():
  config = dataclasses.replace(POCKET, themes=("zoo",))
  task = GsmInfinite(config, seed=0)
  signs = set("?.=+-*()>") | {"total"}
  numbers = set(map(str, range(21)))
  assert signs | numbers < set(task.vocabulary)
  assert len(task.vocabulary) == len(signs | numbers) + 20
  for problem in draw(config, 50):
    assert split_words(problem.problem) == problem.problem.split(" ")


def test_words_end_before_their_punctuation():
  assert split_words("Pine Ridge. How many (owl's) 3.5 sci-fi, and?") == (
    "Pine Ridge . How many (owl's) 3.5 sci-fi , and ?".split()
  )


@pytest.mark.parametrize("style", ["prose", "terse"])
def test_lengths_are_spread_over_the_bounds(style):
  config = GsmInfiniteConfig(
    style=style, layers=(2, 3), min_tokens=600, max_tokens=1000
  )
  lengths = []
  for problem in draw_many(config, 200):
    lengths.append(length(problem))
    # Noise stops at the first statement without room.
    longest = 20 if style == "terse" else 80
    assert 600 - longest <= lengths[-1] <= 1000
  assert 760 < sum(lengths) / len(lengths) < 840
  assert min(lengths) < 680 and max(lengths) > 920


def test_max_tokens_alone_bounds_without_noise():
  free = GsmInfiniteConfig(style="terse", ops=(3, 8), distractors=2)
  bounded = dataclasses.replace(free, max_tokens=36)
  assert max(map(length, draw_many(free, 300))) > 50
  assert max(map(length, draw_many(bounded, 300))) == 36


def test_lengths_are_counted_as_told():
  config = GsmInfiniteConfig(min_tokens=2000, max_tokens=3000)
  task = GsmInfinite(config, seed=0, count_tokens=len)
  for index in range(10):
    assert 1700 < len(task.example("train", index).context) <= 3000


def test_distractors_are_at_most_as_many_as_told():
  counts = {0: set(), 2: set()}
  for most, met in counts.items():
    config = kind("terse", 2, "forward", ops=(1,), distractors=most)
    for problem in draw(config, 40):
      met.add(len(sentences(problem.problem)) - 1)
  assert counts[0] == {0} and max(counts[2]) == 2


@pytest.mark.parametrize("style, layers, mode", KINDS)
def test_noise_is_about_other_places_and_never_needed(style, layers, mode):
  theme = THEMES[style]["zoo"]
  config = kind(
    style, layers, mode, themes=("zoo",), min_tokens=1500, max_tokens=1600
  )
  noise_words = {*theme.noise_places, *theme.noise_things}
  found = collections.Counter()
  for problem in draw(config, 10):
    core, noise = [], []
    for sentence in sentences(problem.problem):
      place = left_side(sentence)
      place = place.split()[-1] if style == "terse" else place.split(" in ")[1]
      (noise if place in theme.noise_places else core).append(sentence)
    assert len(noise) >= 5
    assert solve(" ".join(core), problem.question) == problem.answer
    for text in core:
      assert not any(word in text for word in noise_words)
    for text in noise:
      assert not re.search(r"\d", text)
      found["average"] += "per" in left_side(text).split()
    found["all"] += len(noise)
    assert len(set(map(left_side, noise))) == len(noise)
  share = found["average"] / found["all"]
  assert share == 0 if layers == 2 else 0.4 < share < 0.6


def test_names_of_a_world_are_distinct():
  for style, themes in THEMES.items():
    for theme in themes.values():
      core = sum((*theme.places, *theme.things), ())
      names = (*core, *theme.noise_places, *theme.noise_things)
      assert len(set(names)) == len(names)
      assert len(core) == 20
      assert len(theme.noise_places) == (640 if style == "prose" else 32)
      assert len(theme.noise_things) == (640 if style == "prose" else 32)
      assert not {"total", "per"} & set(names)


def test_running_out_of_noise_is_an_error():
  config = kind("terse", 2, "forward", min_tokens=9000, max_tokens=9000)
  with pytest.raises(ValueError, match="noise ends after 640 statements"):
    GsmInfinite(config, seed=0).example("train", 0)


# --- settings ---


@pytest.mark.parametrize(
  "field, value",
  [
    ("ops", ()),
    ("ops", (0, 1)),
    ("ops", (9,)),
    ("modes", ("backward",)),
    ("themes", ("farm",)),
    ("layers", (4,)),
    ("style", "verse"),
    ("max_places", 0),
    ("max_things", 6),
    ("max_value", 3),
    ("max_leaf", 0),
    ("max_leaf", 1001),
    ("distractors", -2),
    ("min_tokens", -1),
    ("max_tokens", -1),
    ("heldout_fraction", 0.0),
    ("heldout_fraction", 0.6),
  ],
)
def test_bad_settings_are_named(field, value):
  with pytest.raises(ValueError, match=f"task.{field} = ") as error:
    GsmInfiniteConfig(**{field: value})
  assert repr(value) in str(error.value) and ": use " in str(error.value)


def test_all_bad_settings_are_named_at_once():
  with pytest.raises(ValueError, match="style.*max_tokens"):
    GsmInfiniteConfig(style="verse", min_tokens=10, max_tokens=5)


def test_a_world_too_small_for_its_problems_is_an_error(monkeypatch):
  config = kind("terse", 2, "forward", ops=(8,), max_places=1, max_things=1)
  monkeypatch.setattr(task_module, "_MOST_ATTEMPTS", 50)
  with pytest.raises(ValueError, match="op=8.*raise max_places"):
    GsmInfinite(config, seed=0).example("train", 0)


# --- files ---


def written(tmp_path, records):
  path = tmp_path / "problems.jsonl"
  lines = (r if isinstance(r, str) else json.dumps(r) for r in records)
  path.write_text("\n".join(lines) + "\n")
  return path


def record(number, **fields):
  return {
    "problem": f"The number of owl in Pine equals {number}. The number of fox"
    " in Pine equals 2.",
    "question": "How many owl does Pine have?",
    "answer": number,
    "op": 1,
    **fields,
  }


def test_file_is_read_as_a_task(tmp_path):
  records = [
    record(n, mode="forwardreverse" if n % 2 else "normalforward")
    for n in range(1, 41)
  ]
  task = GsmInfiniteFile(written(tmp_path, records), heldout_fraction=0.3)
  assert task.modes == ("forward", "reverse")
  assert task.eval_splits == ("heldout",) and task.text_separator == " "
  assert task.size("train") + task.size("heldout") == 40
  assert 4 <= task.size("heldout") <= 20
  examples = [
    task.example(split, index)
    for split in ("train", "heldout")
    for index in range(task.size(split))
  ]
  assert {int(e.questions[0].answer) for e in examples} == set(range(1, 41))
  for example in examples:
    (question,) = example.questions
    assert example.context == (
      "How many owl does Pine have? The number of owl in Pine equals"
      f" {question.answer}. The number of fox in Pine equals 2."
    )
    assert example.mode == (
      "reverse" if int(question.answer) % 2 else "forward"
    )
    assert example.depth == 1
    words = split_words(example.context) + split_words(
      example.questions[0].answer
    )
    assert set(words) <= set(task.vocabulary)
  assert list(task.vocabulary) == sorted(set(task.vocabulary))
  with pytest.raises(ValueError, match="'test'"):
    task.size("test")


def test_copies_of_a_problem_stay_in_one_split(tmp_path):
  swapped = []
  for number in range(1, 41):
    first, second = record(number)["problem"].removesuffix(".").split(". ")
    swapped.append(record(number, problem=f"{second}. {first}."))
  path = written(tmp_path, [record(n) for n in range(1, 41)] + swapped)
  task = GsmInfiniteFile(path, heldout_fraction=0.3)
  answers = [
    {task.example(split, i).questions for i in range(task.size(split))}
    for split in ("train", "heldout")
  ]
  assert not answers[0] & answers[1]
  assert len(answers[0]) + len(answers[1]) == 40


def test_answer_is_read_from_the_solution_where_need_be(tmp_path):
  records = [record(n, solution=f"So. Answer: {n}.") for n in range(1, 41)]
  for fields in records:
    del fields["answer"]
  task = GsmInfiniteFile(written(tmp_path, records))
  example = task.example("train", 0)
  assert f"owl in Pine equals {example.questions[0].answer}." in example.context


BAD_LINES = [
  (["{"], "line 1: "),
  ([record(1), "", "[1]"], "line 3: not a JSON object"),
  ([record(1), {"question": "?", "answer": 1, "op": 1}], "line 2: .*'problem'"),
  ([{"problem": "x", "answer": 1, "op": 1}], "line 1: .*'question'"),
  ([record(1, answer="two")], "line 1: answer 'two' is no integer"),
  ([record(1, answer=2.5)], "line 1: answer 2.5 is no integer"),
  ([record(1, op=None)], "line 1: op None is no integer"),
  ([record(1, answer="1_000")], "line 1: answer '1_000' is no integer"),
  ([record(1, op=3_000_000_000)], "line 1: op 3000000000: must be in"),
  ([record(1, mode="sideways")], "line 1: mode 'sideways'"),
  ([record(1, mode=[])], "line 1: mode "),
  ([record(1, question="\ud800")], "line 1: .*surrogate"),
  (["[" * 200_000], "line 1: .*recursion"),
  ([{"problem": "x", "question": "?", "op": 1}], "line 1: no field 'answer'"),
  ([{"problem": "x", "question": "?", "answer": 1}], "line 1: .*'op'"),
  ([], "no problem in it"),
]


@pytest.mark.parametrize("records, message", BAD_LINES)
def test_bad_lines_are_named(tmp_path, records, message):
  path = written(tmp_path, records)
  with pytest.raises(ValueError, match=message) as error:
    GsmInfiniteFile(path)
  assert str(path) in str(error.value)


def test_a_file_without_a_heldout_problem_is_an_error(tmp_path):
  with pytest.raises(ValueError, match="no problem in the split"):
    GsmInfiniteFile(written(tmp_path, [record(1), record(1)]))


# --- command line ---


def test_written_files_are_confirmed_and_read(tmp_path):
  path = tmp_path / "problems.jsonl"
  done = command(
    "write", path, "--count=150", "--seed=3", "--ops=2,4", "--style=terse",
    "--layers=2,3", "--split=heldout", "--heldout_fraction=0.25",
  )  # fmt: skip
  assert done.returncode == 0, done.stderr
  done = command("check", path)
  assert done.returncode == 0
  assert done.stdout == "150 confirmed, 0 refuted, 0 unsolvable\n"
  records = [json.loads(line) for line in path.read_text().splitlines()]
  assert {r["op"] for r in records} == {2, 4}
  assert {r["mode"] for r in records} == {"normalforward", "forwardreverse"}
  assert {r["d"] for r in records} == {2, 3}
  config = GsmInfiniteConfig(
    ops=(2, 4), style="terse", layers=(2, 3), heldout_fraction=0.25
  )
  task = GsmInfinite(config, seed=3)
  assert records[9]["problem"] == task.problem("heldout", 9).problem
  read = GsmInfiniteFile(path)
  assert read.size("train") + read.size("heldout") == 150


def test_wrong_answers_are_refuted(tmp_path):
  path = written(
    tmp_path, [record(1), record(2, answer=3), record(4, problem="Owls.")]
  )
  done = command("check", path)
  assert done.returncode == 1
  assert "problem 2 refuted: stated 3, solved 2\n" in done.stdout
  assert "problem 3 unsolvable: " in done.stdout
  assert done.stdout.endswith("1 confirmed, 1 refuted, 1 unsolvable\n")


def test_bad_input_is_one_line(tmp_path):
  bad = written(tmp_path, [record(1), record(1, answer="x")])
  for arguments, named in (
    (("check", bad), f"{bad}, line 2"),
    (("check", tmp_path / "missing.jsonl"), "missing.jsonl"),
    (("write", tmp_path / "none" / "a.jsonl", "--count=1"), "a.jsonl"),
    (("write", tmp_path / "a.jsonl", "--ops=9"), "task.ops = (9,)"),
    (("write", tmp_path / "a.jsonl", "--count=0"), "count=0"),
  ):
    done = command(*arguments)
    assert done.returncode == 2
    assert done.stdout == "" and done.stderr.count("\n") == 1
    assert named in done.stderr


def test_floors_of_a_file_by_hand(tmp_path, monkeypatch, capsys):
  """Commonest stated constants: 3 (right), 4 (wrong), 2 (right)."""
  problems = [
    ("owl a = 3 . owl b = 3 . owl c = 2 .", "? owl a .", 3, 1),
    ("The number of owl in A equals 4. The number of owl in B equals 1 plus "
     "the number of owl in A.", "How many owl does B have?", 5, 3),
    ("owl a = 2 * owl b . owl b = 2 .", "? owl b .", 2, 1),
  ]  # fmt: skip
  path = tmp_path / "problems.jsonl"
  names = "problem", "question", "answer", "op"
  path.write_text(
    "".join(
      json.dumps(dict(zip(names, x, strict=True))) + "\n" for x in problems
    )
  )
  monkeypatch.setattr(sys, "argv", ["gsm_infinite", "floors", str(path)])
  assert command_line.main() == 0
  assert capsys.readouterr().out.splitlines() == [
    "op 1: 2 problems, best constant 0.500, commonest stated constant 1.000",
    "op 3: 1 problems, best constant 1.000, commonest stated constant 0.000",
  ]
