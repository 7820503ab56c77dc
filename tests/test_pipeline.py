import dataclasses

import jax
import numpy as np
import pytest

from sleep_jax.data.pipeline import (
  eval_batches,
  lay_out,
  prediction_part,
  train_iterator,
)
from sleep_jax.data.tokenizers import WordTokenizer
from sleep_jax.tasks.base import Example, Question

PAD, MARKER, END = 0, 1, 2
DIGITS = WordTokenizer("0123456789", separator="")


@dataclasses.dataclass
class Numbers:
  """Example i reads i in three digits, and asks for its last digit."""

  finite_size: int | None = None
  eval_splits = ("test",)
  modes = ("even", "odd")
  vocabulary = tuple("0123456789")
  text_separator = ""

  def size(self, split):
    return self.finite_size

  def example(self, split, index):
    text = f"{index:03d}"
    questions = (Question(text[-1]),)
    return Example(text, questions, depth=index, mode=self.modes[index % 2])


def part(*answer):
  """(ids, counts) of a prediction part with one answer."""
  ids = [MARKER, *answer, END]
  return ids, [False] + [True] * (len(ids) - 1)


LAYOUT = dict(length=6, window_length=4, align_answer=True)


def train(task, **overrides):
  arguments = LAYOUT | dict(batch_size=4, seed=0) | overrides
  return train_iterator(task, DIGITS, **arguments)


def assert_equal(batch, other):
  for x, y in zip(batch, other, strict=True):
    np.testing.assert_array_equal(x, y)


def joined(*batches):
  return jax.tree.map(lambda *x: np.concatenate(x), *batches)


def test_aligned_answers_start_a_window():
  inputs, targets, loss_mask, valid = lay_out(
    [11, 12, 13, 14, 15], *part(21, 22), PAD, 12, 4, align_answer=True
  )
  pad = PAD
  assert inputs.tolist() == [pad] * 3 + [11, 12, 13, 14, 15] + [
    MARKER,
    21,
    22,
    pad,
  ]
  assert targets.tolist() == [pad] * 8 + [21, 22, END, pad]
  assert loss_mask.tolist() == [False] * 8 + [True] * 3 + [False]
  assert valid.tolist() == [False] * 3 + [True] * 8 + [False]


def test_the_answer_starts_the_last_window_that_leaves_room():
  # 8 places are two windows, yet the second must hold the answer.
  inputs, *_ = lay_out([11], *part(21, 22), PAD, 8, 4, align_answer=True)
  assert inputs.tolist() == [PAD, PAD, PAD, 11, MARKER, 21, 22, PAD]
  inputs, *_ = lay_out([11], *part(), PAD, 9, 4, align_answer=True)
  assert inputs.tolist() == [PAD] * 7 + [11, MARKER]


def test_packed_answers_follow_the_context():
  inputs, targets, loss_mask, valid = lay_out(
    [11, 12, 13, 14, 15], *part(21, 22), PAD, 10, 4, align_answer=False
  )
  assert inputs.tolist() == [11, 12, 13, 14, 15, MARKER, 21, 22, PAD, PAD]
  assert targets.tolist() == [PAD] * 5 + [21, 22, END, PAD, PAD]
  assert loss_mask.tolist() == [False] * 5 + [True] * 3 + [False] * 2
  assert valid.tolist() == [True] * 8 + [False] * 2


def test_prompts_are_read_and_answers_predicted():
  example = Example(
    "67",
    (Question("4", prompt="1"), Question("59", prompt="12")),
    depth=1,
    mode="even",
  )
  one, two, four, five, nine = (DIGITS.encode(x)[0] for x in "12459")
  rows = {}
  for marker_counts in (True, False):
    for ends in ((), ("4", "9")):
      this = dataclasses.replace(
        example, marker_counts=marker_counts, answer_ends=ends
      )
      ids, counts = prediction_part(this, DIGITS)
      rows[marker_counts, ends] = lay_out([11], ids, counts, PAD, 14, 12, False)
      assert ids == (
        [one, MARKER, four, *([] if ends else [END])]
        + [one, two, MARKER, five, nine, *([] if ends else [END])]
      )
  inputs, targets, mask, valid = rows[True, ("4", "9")]
  pads = [PAD] * 6
  assert inputs.tolist() == (
    [11, one, MARKER, four, one, two, MARKER, five] + pads
  )
  assert targets.tolist() == (
    [PAD, MARKER, four, one, two, MARKER, five, nine] + pads
  )
  as_text = {
    key: "".join(np.where(loss_mask, "x", "-"))
    for key, (_, _, loss_mask, _) in rows.items()
  }
  assert as_text[True, ("4", "9")] == "-xx--xxx------"
  assert as_text[False, ("4", "9")] == "--x---xx------"
  assert as_text[True, ()] == "-xxx--xxxx----"
  assert as_text[False, ()] == "--xx---xxx----"
  assert valid.tolist() == [True] * 8 + [False] * 6


@pytest.mark.parametrize(
  ("context", "answer", "length", "align_answer", "fix"),
  [
    # The context needs 2 windows, the row has room for 1 before the answer.
    (5, 2, 8, True, "length to at least 11"),
    # The answer needs 3 places, the row has 1 after whole windows.
    (4, 2, 9, True, "length to at least 11"),
    (5, 2, 7, False, "length to at least 8"),
    (1, 4, 100, False, "window_length = 4: set it to at least 5"),
    (1, 4, 100, True, "window_length = 4: set it to at least 5"),
  ],
)
def test_what_does_not_fit_is_refused_with_the_fix(
  context, answer, length, align_answer, fix
):
  ids = [11] * context, *part(*[12] * answer), PAD
  with pytest.raises(ValueError, match=fix):
    lay_out(*ids, length, 4, align_answer)
  # The fix is a fix, and the smallest.
  if "length to" in fix:
    least = int(fix.split()[-1])
    lay_out(*ids, least, 4, align_answer)
    with pytest.raises(ValueError):
      lay_out(*ids, least - 1, 4, align_answer)


def test_an_answer_beyond_its_length_is_refused_with_the_fix():
  ids = [11], *part(21, 22), PAD
  with pytest.raises(ValueError, match="answer_length = 2: set it to at least"):
    lay_out(*ids, 8, 4, True, answer_length=2)
  for enough in (0, 3):
    lay_out(*ids, 8, 4, True, answer_length=enough)


@dataclasses.dataclass
class Passes(Numbers):
  """Says that a pass reverses the number, and the next one squares it."""

  texts: int = 2

  def example(self, split, index):
    example = super().example(split, index)
    reverse = example.context[::-1]
    texts = [reverse, f"{index**2:03d}"][: self.texts]
    return dataclasses.replace(example, pass_targets=texts)


def test_what_passes_should_hold_stands_at_the_context():
  """Padded on the left; open in the answer's window, and where none are."""
  aligned = next(train(Passes(), passes=2))
  assert aligned.pass_targets.shape == (4, 2, 6)
  code = {digit: DIGITS.encode(digit)[0] for digit in "0123456789"}
  for row in range(4):
    for said, text in zip(
      aligned.pass_targets[row],
      (f"00{row}"[::-1], f"{row**2:03d}"),
      strict=True,
    ):
      assert said.tolist() == [-1, *(code[x] for x in text), -1, -1]
  packed = next(train(Passes(), passes=2, window_length=2, align_answer=False))
  assert (packed.pass_targets[:, :, 2:] == -1).all()
  assert (packed.pass_targets[:, :, :2] > -1).all()
  assert next(train(Passes())).pass_targets is None


def test_passes_that_a_row_does_not_take_are_left_open():
  class Fewer(Passes):
    def example(self, split, index):
      example = super().example(split, index)
      first, second = example.pass_targets
      texts = [first, second] if index % 2 else ["", second]
      return dataclasses.replace(example, pass_targets=texts)

  every = next(train(Passes(), passes=2)).pass_targets
  some = next(train(Fewer(), passes=2)).pass_targets
  assert (some[::2, 0] == -1).all() and (every[::2, 0] > -1).any()
  assert (some[:, 1] == every[:, 1]).all() and (some[1::2] == every[1::2]).all()


@pytest.mark.parametrize("texts", [["012", ""], ["", ""]])
def test_passes_that_a_row_does_not_take_come_first(texts):
  class Odd(Passes):
    def example(self, split, index):
      return dataclasses.replace(
        super().example(split, index), pass_targets=texts
      )

  with pytest.raises(ValueError, match="not take come first"):
    train(Odd(), passes=2)


@pytest.mark.parametrize(
  ("passes", "texts", "reason"),
  [
    (3, 2, "what 2 passes .* sleep.passes = 3: set that to 2"),
    (1, 2, "what 2 passes .* sleep.passes = 1: set that to 2"),
    (2, 0, "nothing is said .*: set sleep.pass_loss to 0"),
  ],
)
def test_what_does_not_fit_the_passes_is_refused(passes, texts, reason):
  with pytest.raises(ValueError, match=reason):
    train(Passes(texts=texts), passes=passes)


def test_what_a_pass_holds_is_as_long_as_the_context():
  class Longer(Passes):
    def example(self, split, index):
      return dataclasses.replace(
        super().example(split, index), pass_targets=["0123", "012"]
      )

  with pytest.raises(ValueError, match="is 4 tokens, and the context 3"):
    train(Longer(), passes=2)


def test_row_r_of_batch_s_is_example_s_times_batch_size_plus_r():
  iterator = train(Numbers())
  for step in range(5):
    batch = next(iterator)
    indices = range(4 * step, 4 * step + 4)
    assert batch.depth.tolist() == list(indices)
    assert batch.mode.tolist() == [0, 1, 0, 1]
    for row, index in enumerate(indices):
      digits = [3 + int(digit) for digit in f"{index:03d}"]
      assert batch.inputs[row].tolist() == [PAD, *digits, MARKER, digits[-1]]
      assert batch.targets[row].tolist() == [PAD] * 4 + [digits[-1], END]
    assert batch.loss_mask.tolist() == [[False] * 4 + [True] * 2] * 4
    assert batch.valid.tolist() == [[False] + [True] * 5] * 4
  *arrays, held = batch
  assert held is None
  dtypes = [x.dtype.name for x in arrays]
  assert dtypes == ["int32", "int32", "bool", "bool", "int32", "int32"]


@pytest.mark.parametrize("finite_size", [None, 7])
def test_processes_share_the_same_global_batch(finite_size):
  task = Numbers(finite_size)
  whole = train(task)
  parts = [train(task, process_index=i, process_count=2) for i in range(2)]
  for _ in range(6):
    assert_equal(next(whole), joined(*map(next, parts)))


@pytest.mark.parametrize("finite_size", [None, 7])
@pytest.mark.parametrize("consumed", [0, 3])
def test_a_restored_iterator_goes_on_where_it_stood(finite_size, consumed):
  task = Numbers(finite_size)
  first = train(task)
  for _ in range(consumed):
    next(first)
  state = first.get_state()
  expected = [next(first) for _ in range(4)]
  second = train(task)
  for _ in range(5):
    next(second)
  second.set_state(state)
  for batch in expected:
    assert_equal(next(second), batch)
  assert expected[0].depth.tolist() != expected[1].depth.tolist()


def test_every_round_of_a_finite_split_is_a_new_order():
  def rounds(seed):
    iterator = train(Numbers(40), seed=seed)
    depths = np.concatenate([next(iterator).depth for _ in range(30)])
    return depths.reshape(3, 40).tolist()

  orders = rounds(seed=0)
  for order in orders:
    assert sorted(order) == list(range(40))
  assert orders[0] != orders[1] != orders[2]
  assert orders[0] != list(range(40))
  assert rounds(seed=0) == orders
  assert rounds(seed=9)[0] not in orders


def test_eval_batches_are_the_first_examples_and_padding():
  batches = list(
    eval_batches(Numbers(), DIGITS, "test", 6, **LAYOUT, batch_size=4)
  )
  depths = [batch.depth.tolist() for batch in batches]
  assert depths == [[0, 1, 2, 3], [4, 5, 0, 0]]
  last = batches[-1]
  assert last.valid[:2].any(axis=1).all() and not last.valid[2:].any()
  assert last.loss_mask[:2].any(axis=1).all() and not last.loss_mask[2:].any()
  assert (last.inputs[2:] == PAD).all() and (last.targets[2:] == PAD).all()
  assert {batch.inputs.shape for batch in batches} == {(4, 6)}


def test_processes_share_the_eval_batches():
  def batches(**processes):
    return eval_batches(
      Numbers(9), DIGITS, "test", 9, **LAYOUT, batch_size=4, **processes
    )

  parts = [batches(process_index=i, process_count=2) for i in range(2)]
  count = 0
  for batch, *shared in zip(batches(), *parts, strict=True):
    assert_equal(batch, joined(*shared))
    count += 1
  assert count == 3


def test_what_does_not_fit_stops_the_iterators():
  with pytest.raises(ValueError, match="set length to at least 6"):
    next(train(Numbers(), length=5))
  with pytest.raises(ValueError, match="set length to at least 6"):
    next(
      eval_batches(
        Numbers(), DIGITS, "test", 1, **LAYOUT | dict(length=5), batch_size=1
      )
    )


def test_bad_sizes_are_refused_at_once():
  with pytest.raises(ValueError, match="batch_size = 4 .* 3 processes"):
    train(Numbers(), process_count=3)
  with pytest.raises(ValueError, match="batch_size = 4 .* 3 processes"):
    eval_batches(
      Numbers(), DIGITS, "test", 4, **LAYOUT, batch_size=4, process_count=3
    )
  with pytest.raises(ValueError, match="ask for at most 9"):
    eval_batches(Numbers(9), DIGITS, "test", 10, **LAYOUT, batch_size=4)
