import json
import pathlib

import pytest

from sleep_jax.tasks.gsm_infinite.solver import (
  Unsolvable,
  count_operations,
  solve,
)

SAMPLES = pathlib.Path(__file__).parents[2] / "shared/samples"

# (statements, question, answer, operations), worked out by hand.
BY_HAND = [
  (  # 2 * (7 - 3) = 8, and 3 + 8 + 7 = 18 in Pine Ridge.
    "The number of adult owl in Pine Ridge equals 2 times the difference"
    " between the number of adult fox in Otter Lake and the number of adult elk"
    " in Pine Ridge. The number of adult elk in Pine Ridge equals 3. The number"
    " of adult fox in Otter Lake equals 4 plus the number of adult elk in Pine"
    " Ridge. The number of adult bear in Pine Ridge equals the number of adult"
    " fox in Otter Lake. The number of adult owl in Otter Lake equals the total"
    " number of adult animals in Pine Ridge.",
    "What is the total number of adult animals in Pine Ridge?",
    18,
    10,
  ),
  (  # A name that occurs twice counts twice; children = 2 * 3 + 4 * 0.
    "The number of art college in Bath equals 2. The average number of teachers"
    " per art college in Bath equals 3. The average number of teachers per law"
    " school in Bath equals the difference between the number of art college in"
    " Bath and the number of art college in Bath. The number of law school in"
    " Bath equals the sum of the number of art college in Bath and the number"
    " of art college in Bath.",
    "What is the total number of teachers from all schools in Bath?",
    6,
    10,
  ),
  (  # x + (x + 2) + (2 x + 2) = 16.
    "The number of epic in Gala exists, and its number is greater than 0. The"
    " number of farce in Gala equals 2 plus the number of epic in Gala. The"
    " number of noir in Gala equals the sum of the number of epic in Gala and"
    " the number of farce in Gala. The total number of movies in Gala equals"
    " 16.",
    "How many epic does Gala have?",
    3,
    8,
  ),
  (  # A list of three: 3 * (1 + 2 + x) = 21.
    "The number of epic in Gala equals 1. The number of farce in Gala equals"
    " 2. The number of noir in Gala equals 3 times the sum of the number of"
    " epic in Gala, the number of farce in Gala, and the average number of"
    " nominations per noir in Gala. The average number of nominations per noir"
    " in Gala is greater than 0. The number of noir in Gala equals 21.",
    "What is the average number of nominations per noir in Gala?",
    4,
    7,
  ),
  ("owl pine = 3 .", "? owl pine .", 3, 1),
  (
    "fox lake = 4 * ( owl pine - elk hill ) . elk hill = 1 . total hill = 9 ."
    " owl pine = 2 + elk hill . hen hill = fox lake .",
    "? total hill .",
    9,
    9,
  ),
  (  # What is not mentioned counts as zero: 2 * 0 + 3 * 4.
    "owl pine = 2 . fox pine = 3 . per fox pine = 4 . per elk pine = 1 .",
    "? total per pine .",
    12,
    4,
  ),
  (  # 2 * per + 3 * 1 = 11.
    "owl pine = 2 . fox pine = 3 . per fox pine = 1 . per owl pine > 0 ."
    " elk hill = total per pine . elk hill = 11 .",
    "? per owl pine .",
    4,
    9,
  ),
]


@pytest.mark.parametrize("problem, question, answer, operations", BY_HAND)
def test_solves_problems_worked_out_by_hand(
  problem, question, answer, operations
):
  assert solve(problem, question) == answer
  assert count_operations(problem, question) == operations


def test_confirms_the_original_samples():
  path = SAMPLES / "gsm_infinite.jsonl"
  if not path.exists():
    pytest.skip(f"no {path}")
  samples = [json.loads(line) for line in path.read_text().splitlines()]
  assert len(samples) == 48
  for sample in samples:
    text = sample["problem"], sample["question"]
    assert solve(*text) == int(sample["answer"]), sample["id"]
    assert count_operations(*text) == sample["op"], sample["id"]


@pytest.mark.parametrize(
  "problem, question, reason",
  [
    ("owl pine = 3 .", "? owl lake .", "not stated"),
    ("owl pine = fox lake .", "? owl pine .", "not stated"),
    ("owl pine = fox lake . fox lake = owl pine .", "? owl pine .", "itself"),
    ("owl pine = total pine .", "? total pine .", "itself"),
    ("owl pine = 3 . owl pine = 4 .", "? owl pine .", "contradictory"),
    ("owl pine > 0 . fox pine = 2 .", "? owl pine .", "no value"),
    ("owl pine > 0 . total pine = 5 . fox pine > 0 .", "? owl pine .", "too"),
    (
      "owl pine > 0 . fox pine = 2 * owl pine . fox pine = 5 .",
      "? owl pine .",
      "no integer",
    ),
    (
      "owl pine > 0 . per owl pine = owl pine . total per pine = 9 .",
      "? owl pine .",
      "not linear",
    ),
    (
      "owl pine > 0 . owl pine = 3 . elk hill = 2 + owl pine . elk hill = 4 .",
      "? owl pine .",
      "2 values",
    ),
    (
      "owl pine > 0 . owl pine = 3 . elk hill = fox lake . elk hill = 4 ."
      " fox lake = 5 .",
      "? owl pine .",
      "given as 4",
    ),
    ("owl pine = 2 * fox lake + elk hill .", "? owl pine .", "no brackets"),
    ("owl pine = 2 x .", "? owl pine .", "not stated"),
    ("owl pine is 3 .", "? owl pine .", "no statement"),
    ("Owls like pines.", "How many owl does Pine have?", "no statement"),
    ("The number of owl in Pine equals 3.", "How many owls?", "no question"),
    ("The number of owl equals 3.", "How many owl does Pine have?", "no name"),
  ],
)
def test_says_why_a_text_has_no_answer(problem, question, reason):
  with pytest.raises(Unsolvable, match=reason):
    solve(problem, question)


def test_contradictions_among_irrelevant_statements_are_harmless():
  problem = (
    "elk hill = owl pine . owl pine = 3 . elk hill = owl pine + owl pine ."
    " fox lake = bear lake ."
  )
  assert solve(problem, "? owl pine .") == 3


def test_a_chain_too_long_to_follow_is_unsolvable():
  chain = [f"owl p{i} = owl p{i + 1} ." for i in range(5000)]
  with pytest.raises(Unsolvable, match="too long"):
    solve(" ".join([*chain, "owl p5000 = 1 ."]), "? owl p0 .")
