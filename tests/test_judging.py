"""Judged by hand: exact accuracy, floors and intervals of small sets."""

import json

import numpy as np
import pytest

from sleep_jax.training.judging import (
  format_table,
  independent_count,
  judge,
  wilson_interval,
  write_results,
)


def by_hand(split="heldout"):
  """Six examples, their labels in the first one or two of four places."""
  #   answer  depth  mode       labels right   end right
  examples = [
    ("7", 2, "forward", [1], 1),
    ("7", 2, "forward", [1], 0),
    ("12", 2, "reverse", [1, 0], 1),
    ("7", 4, "forward", [0], 1),
    ("13", 4, "forward", [1, 1], 1),
    ("12", 4, "forward", [1, 1], 1),
  ]
  right = np.zeros((6, 4), bool)
  mask = np.zeros((6, 4), bool)
  label_mask = np.zeros((6, 4), bool)
  for i, (answer, _, _, labels, end) in enumerate(examples):
    mask[i, : len(answer) + 1] = True
    label_mask[i, : len(answer)] = True
    right[i, : len(answer) + 1] = [*labels, end]
  answers, depth, modes, _, _ = zip(*examples, strict=True)
  masks = mask, label_mask
  return split, right, *masks, answers, np.array(depth), modes, np.arange(6)


def test_scores_are_those_counted_by_hand():
  scores = judge(*by_hand())["heldout"]
  overall = scores["overall"]
  assert overall["count"] == 6
  assert overall["accuracy"] == pytest.approx(3 / 6)
  assert overall["floor"] == pytest.approx(3 / 6)  # "7"
  assert overall["label_accuracy"] == pytest.approx(7 / 9)
  # "7" is first three times and "1" too; "2" is second twice.
  assert overall["label_floor"] == pytest.approx((3 + 2) / 9)

  assert list(scores["depth"]) == ["2", "4"]
  shallow, deep = scores["depth"]["2"], scores["depth"]["4"]
  assert (shallow["count"], deep["count"]) == (3, 3)
  assert shallow["accuracy"] == pytest.approx(1 / 3)
  assert shallow["floor"] == pytest.approx(2 / 3)
  assert shallow["label_accuracy"] == pytest.approx(3 / 4)
  assert deep["accuracy"] == pytest.approx(2 / 3)
  assert deep["floor"] == pytest.approx(1 / 3)
  assert deep["label_floor"] == pytest.approx((2 + 1) / 5)

  assert list(shallow["mode"]) == ["forward", "reverse"]
  assert shallow["mode"]["forward"]["accuracy"] == pytest.approx(1 / 2)
  assert shallow["mode"]["forward"]["floor"] == 1
  assert shallow["mode"]["reverse"]["accuracy"] == 0
  assert list(deep["mode"]) == ["forward"]


def test_what_stands_outside_the_mask_does_not_count():
  split, right, mask, *rest = by_hand()
  assert judge(split, right | ~mask, mask, *rest) == judge(
    split, right & mask, mask, *rest
  )


def test_answer_places_need_not_stand_first():
  split, *arrays = by_hand()
  later = [np.roll(x, 1, axis=1) for x in arrays[:3]]
  assert judge(split, *later, *arrays[3:]) == judge(split, *arrays)


def test_four_labels_of_rule_110_have_the_paper_s_chance():
  """All 16 answers once: 1/16 by the best constant, 1/2 for each label."""
  answers = [tuple(map(int, f"{i:04b}")) for i in range(16)]
  mask = np.ones((16, 5), bool)
  always_zero = np.array([[not bit for bit in a] + [True] for a in answers])
  label_mask = np.arange(5) < mask.sum(axis=1, keepdims=True) - 1
  depth, modes, rows = np.full(16, 32), ["strings"] * 16, np.arange(16)
  scores = judge(
    "test", always_zero, mask, label_mask, answers, depth, modes, rows
  )["test"]["overall"]
  assert scores["accuracy"] == scores["floor"] == 0.0625
  assert scores["label_accuracy"] == scores["label_floor"] == 0.5


@pytest.mark.parametrize(
  ("right", "count", "low", "high"),
  [
    (8, 10, 0.4902, 0.9433),
    (81, 263, 0.2553, 0.3662),  # Newcombe 1998, table I, method 3
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0, 0.1611),
    (1, 29, 0.0061, 0.1718),
    (20, 20, 0.8389, 1.0),
  ],
)
def test_the_interval_is_the_published_one(right, count, low, high):
  interval = wilson_interval(right / count, count)
  assert interval == pytest.approx((low, high), abs=6e-5)


def test_both_ends_of_the_interval_solve_the_score_equation():
  """|share - end| is 1.96 standard errors *at the end*: Wilson's definition."""
  for right, count in [(3, 7), (50, 400), (399, 400)]:
    for end in wilson_interval(right / count, count):
      deviation = abs(right / count - end)
      assert deviation == pytest.approx(
        1.959964 * np.sqrt(end * (1 - end) / count)
      )


def test_results_survive_json_and_join(tmp_path):
  results = judge(*by_hand()) | judge(*by_hand("deeper"))
  assert list(results) == ["heldout", "deeper"]
  write_results(tmp_path, results)
  assert json.loads((tmp_path / "results.json").read_text()) == results


def test_the_table_has_a_row_for_each_set_and_straight_columns():
  table = format_table(judge(*by_hand())).splitlines()
  assert [row.split()[:4] for row in table[1:]] == [
    ["heldout", "all", "all", "6"],
    ["heldout", "2", "all", "3"],
    ["heldout", "2", "forward", "2"],
    ["heldout", "2", "reverse", "1"],
    ["heldout", "4", "all", "3"],  # one mode alone gets no row of its own
  ]
  assert table[1].split()[4:] == (
    ["0.500", "[0.188,", "0.812]", "0.500", "0.778", "0.556"]
  )
  assert len({len(row) for row in table}) == 1


@pytest.mark.parametrize(
  ("argument", "value", "message"),
  [
    (4, ["7"] * 5, "same number of answers"),
    (6, ["forward"] * 7, "same number of answers"),
    (4, ["7", "77", "12", "7", "13", "12"], "answer 1 has 1 places"),
    (4, ["7", "7", "12", "7", "13", ""], "answer 5 has 2 places"),
  ],
)
def test_input_that_does_not_fit_together_is_refused(argument, value, message):
  arguments = list(by_hand())
  arguments[argument] = value
  with pytest.raises(ValueError, match=message):
    judge(*arguments)


def test_an_answer_of_nothing_but_the_end_token_is_refused():
  one, depth, row = np.ones((1, 1), bool), np.array([2]), np.array([0])
  with pytest.raises(ValueError, match="answer 0 has 0 places"):
    judge("heldout", one, one, ~one, [""], depth, ["forward"], row)


def test_no_example_is_refused():
  split, *arguments = by_hand()
  with pytest.raises(ValueError, match="at least 1"):
    judge(split, *(argument[:0] for argument in arguments))


def test_intervals_know_that_answers_of_a_row_go_together():
  rng = np.random.default_rng(0)
  rows = np.repeat(np.arange(50), 4)
  alone = rng.random(200) < 0.6
  # One answer a row: as many draws as answers.
  assert independent_count(alone, np.arange(200)) == pytest.approx(200)
  # Four answers that are always alike: as many as rows.
  alike = alone[:50].repeat(4)
  assert independent_count(alike, rows) == pytest.approx(50)
  # Answers that have nothing to do with each other: about as many as answers,
  # and never more.
  assert 150 < independent_count(alone, rows) <= 200
  opposite = np.tile([True, False], 100)
  assert independent_count(opposite, rows) == 200
  # Of answers that are all right nobody can tell.
  assert independent_count(np.ones(200, bool), rows) == 50


def test_the_effect_of_rows_is_the_spread_of_many_repetitions():
  """Rows half alike: the share's true spread is that of the count."""
  rng = np.random.default_rng(1)
  rows = np.repeat(np.arange(80), 5)

  def draw():
    easy = rng.random(80)[:, None] < 0.5
    return (rng.random((80, 5)) < np.where(easy, 0.9, 0.3)).ravel()

  draws = [draw() for _ in range(2000)]
  counts = [independent_count(right, rows) for right in draws]
  spread = np.var([right.mean() for right in draws])
  assert np.mean(counts) == pytest.approx(0.6 * 0.4 / spread, rel=0.1)
