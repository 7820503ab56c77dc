"""Batches of tokens from a task: examples laid out in rows of equal length."""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, TypeAlias

import grain
import jax
import numpy as np
from jaxtyping import Bool, Int32

from sleep_jax.data.tokenizers import Tokenizer
from sleep_jax.tasks.base import Example, Task

_Array: TypeAlias = np.ndarray | jax.Array


class Batch(NamedTuple):
  """Rows of tokens, on the host or on devices.

  Attributes:
    inputs: token ids.
    targets: in the prediction part, the token that follows there.
    loss_mask: where a target is to be predicted; each run of such places is
      one answer.
    valid: False where a place is padding.
    depth: `Example.depth` of each row.
    mode: `Example.mode` of each row, as an index into `Task.modes`.
    pass_targets: for each pass the token that a place should then hold, -1
      where that is left open, and throughout in passes that a row does not
      take; None where nothing is said of passes.
  """

  inputs: Int32[_Array, "B T"]
  targets: Int32[_Array, "B T"]
  loss_mask: Bool[_Array, "B T"]
  valid: Bool[_Array, "B T"]
  depth: Int32[_Array, "B"]
  mode: Int32[_Array, "B"]
  pass_targets: Int32[_Array, "B N T"] | None = None


def prediction_part(
  example: Example, tokenizer: Tokenizer
) -> tuple[list[int], list[bool]]:
  """(ids, counts): what follows the context, and which of it is predicted.

  That is, of each question, [prompt, marker, answer, end]: the answer and its
  end token, where it has one, are predicted; after a prompt the marker may be.

  Raises:
    ValueError: a symbol has no id.
  """
  ids, counts = [], []
  for question in example.questions:
    prompt = tokenizer.encode(question.prompt)
    answer = tokenizer.encode(question.answer)
    if not example.answer_ends:
      answer = [*answer, tokenizer.end_id]
    ids += [*prompt, tokenizer.marker_id, *answer]
    counts += [False] * len(prompt)
    counts += [bool(prompt) and example.marker_counts] + [True] * len(answer)
  return ids, counts


def lay_out(
  context_ids: Sequence[int],
  part_ids: Sequence[int],
  part_counts: Sequence[bool],
  pad_id: int,
  length: int,
  window_length: int,
  align_answer: bool,
  answer_length: int = 0,
) -> tuple[
  Int32[np.ndarray, "T"],
  Int32[np.ndarray, "T"],
  Bool[np.ndarray, "T"],
  Bool[np.ndarray, "T"],
]:
  """(inputs, targets, loss_mask, valid) of one example.

  The context is followed by the prediction part, shifted by one in itself: its
  inputs are all but its last token, its targets all but its first. With one
  answer y that is [marker, y0, y1, ...] and [y0, y1, ..., end].

  Paper: an ordinary shift would predict y0 from the last token of the context,
  whose window would then not be one without loss, and so never sleep.

  Args:
    context_ids: what is read before waking.
    part_ids: the prediction part, as `prediction_part` gives it.
    part_counts: which of these tokens are predicted.
    pad_id: fills the places that are padding.
    length: T.
    window_length: L.
    align_answer: pad the context on its left to as many whole windows as leave
      room, so that the prediction part starts a window; else the row starts
      with the context. What is left of the row is padding.
    answer_length: most places of the prediction part; 0 is any number.

  Raises:
    ValueError: the example does not fit the row, or its prediction part does
      not fit a window or `answer_length`.
  """
  context, part = len(context_ids), len(part_ids) - 1
  predicted = sum(part_counts[1:])
  if 0 < answer_length < predicted:
    raise ValueError(
      f"an answer of {predicted} places exceeds data.answer_length = "
      f"{answer_length}: set it to at least {predicted}, or to 0"
    )
  if part > window_length:
    raise ValueError(
      f"a prediction part of {part} places exceeds window_length = "
      f"{window_length}: set it to at least {part}"
    )
  start = context
  if align_answer:
    before = (length - 1) // window_length
    start = max(before, math.ceil(context / window_length)) * window_length
  stop = start + part
  if stop > length:
    raise ValueError(
      f"a context of {context} tokens and a prediction part of {part} do not "
      f"fit length = {length} with window_length = {window_length}: set length "
      f"to at least {stop}"
    )
  inputs = np.full(length, pad_id, np.int32)
  inputs[start - context : start] = context_ids
  inputs[start:stop] = part_ids[:-1]
  targets = np.full(length, pad_id, np.int32)
  targets[start:stop] = part_ids[1:]
  loss_mask = np.zeros(length, np.bool_)
  loss_mask[start:stop] = part_counts[1:]
  valid = np.zeros(length, np.bool_)
  valid[start - context : stop] = True
  return inputs, targets, loss_mask, valid


def train_iterator(
  task: Task,
  tokenizer: Tokenizer,
  *,
  length: int,
  window_length: int,
  align_answer: bool,
  answer_length: int = 0,
  batch_size: int,
  seed: int,
  passes: int = 0,
  process_index: int = 0,
  process_count: int = 1,
) -> grain.DatasetIterator[Batch]:
  """This process's rows of the endless sequence of training batches.

  Row r of global batch s is example s * batch_size + r of the split "train",
  whatever the number of processes; each makes its own contiguous rows only. A
  finite split is shuffled anew for each round. `get_state` and `set_state` of
  the iterator tell and set the exact position.

  Args:
    task: gives the examples.
    tokenizer: turns them into tokens.
    length: T.
    window_length: L.
    align_answer, answer_length: see `lay_out`.
    batch_size: rows of a global batch.
    seed: order of a finite split.
    passes: N, where batches have `pass_targets`; 0 where they have none.
    process_index: which rows: those of this process.
    process_count: number of processes that share a batch.

  Raises:
    ValueError: `batch_size` is not a multiple of `process_count`; an example
      does not fit (`lay_out`) or speaks of another number of passes: the first
      one of an endless split, and any of a finite one; later ones are found out
      on iterating.
  """
  rows = _rows_per_process(batch_size, process_count)
  layout = length, window_length, align_answer, answer_length
  make_row = _row_maker(task, "train", tokenizer, passes, *layout)
  size = task.size("train")
  if size is None:
    make_row(0)  # what does not fit is better known at once
    indices = grain.MapDataset.range(sys.maxsize)
  else:
    for index in range(size):
      make_row(index)
    indices = grain.MapDataset.range(size).shuffle(seed).repeat()
  batches = indices.map(make_row).batch(rows, batch_fn=_stack)
  # One thread works ahead: more would only take turns at running Python.
  return iter(
    batches[process_index::process_count].to_iter_dataset(
      grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
    )
  )


def eval_batches(
  task: Task,
  tokenizer: Tokenizer,
  split: str,
  count: int,
  *,
  length: int,
  window_length: int,
  align_answer: bool,
  answer_length: int = 0,
  batch_size: int,
  process_index: int = 0,
  process_count: int = 1,
) -> Iterator[Batch]:
  """This process's rows of the batches of a split's first `count` examples.

  Every batch has `batch_size` rows over all processes. The last one is filled
  up with rows of padding alone: their `valid` and `loss_mask` are False
  throughout, their `depth` and `mode` 0.

  Args: as those of `train_iterator`.

  Raises:
    ValueError: the split has fewer than `count` examples, or as
      `train_iterator`.
  """
  rows = _rows_per_process(batch_size, process_count)
  size = task.size(split)
  if size is not None and count > size:
    raise ValueError(
      f"{count} examples asked of split {split!r}, which has {size}: ask for "
      f"at most {size}"
    )
  layout = length, window_length, align_answer, answer_length
  make_row = _row_maker(task, split, tokenizer, 0, *layout)
  pad = np.full(length, tokenizer.pad_id, np.int32)
  unused, zero = np.zeros(length, np.bool_), np.zeros((), np.int32)
  padding = Batch(pad, pad, unused, unused, zero, zero)

  def make_batch(start):
    indices = range(start, start + rows)
    return _stack([make_row(i) if i < count else padding for i in indices])

  return (
    make_batch(start + rows * process_index)
    for start in range(0, count, batch_size)
  )


def _rows_per_process(batch_size: int, process_count: int) -> int:
  if batch_size % process_count:
    raise ValueError(
      f"batch_size = {batch_size} cannot be shared by {process_count} "
      "processes: make it a multiple"
    )
  return batch_size // process_count


def _row_maker(
  task: Task,
  split: str,
  tokenizer: Tokenizer,
  passes: int,
  *layout: Any,
) -> Callable[[int], Batch]:
  """The function from an index to that example as a row (a batch without B)."""
  modes = list(task.modes)

  def make_row(index):
    example = task.example(split, index)
    try:
      context = tokenizer.encode(example.context)
      arrays = lay_out(
        context,
        *prediction_part(example, tokenizer),
        tokenizer.pad_id,
        *layout,
      )
      held = None
      if passes:
        texts = [tokenizer.encode(text) for text in example.pass_targets]
        held = _lay_out_passes(
          texts, passes, len(context), *arrays[2:], *layout
        )
    except ValueError as error:
      source = example.source or f"example {index} of {split!r}"
      raise ValueError(f"{source}: {error}") from error
    mode = modes.index(example.mode)
    return Batch(
      *arrays, *np.array([example.depth, mode], np.int32), pass_targets=held
    )

  return make_row


def _lay_out_passes(
  texts: Sequence[Sequence[int]],
  passes: int,
  context_length: int,
  loss_mask: Bool[np.ndarray, "T"],
  valid: Bool[np.ndarray, "T"],
  length: int,
  window_length: int,
  *_: Any,
) -> Int32[np.ndarray, "N T"]:
  """`Batch.pass_targets` of a row: of the places in windows without loss.

  Raises:
    ValueError: there is not one text for each pass, those of passes that are
      taken as long as the context, and those of others first and empty.
  """
  if not texts:
    raise ValueError(
      "nothing is said of what passes should hold: set sleep.pass_loss to 0, "
      "or use a task that says it (for Rule 110, set task.pass_steps)"
    )
  if len(texts) != passes:
    raise ValueError(
      f"it is said what {len(texts)} passes should hold, and sleep.passes = "
      f"{passes}: set that to {len(texts)}, or sleep.pass_loss to 0"
    )
  taken = [text for text in texts if text]
  if not taken or any(texts[: passes - len(taken)]):
    raise ValueError(
      f"its passes are to hold {[*map(len, texts)]} tokens: those that it does "
      "not take come first, with empty texts, and at least one is taken"
    )
  for text in taken:
    if len(text) != context_length:
      raise ValueError(
        f"what a pass should hold is {len(text)} tokens, and the context "
        f"{context_length}: sleep.pass_loss needs a tokenizer that makes as "
        "many of both, as data.tokenizer = 'words' does"
      )
  held = np.full((passes, length), -1, np.int32)
  start = int(valid.argmax())
  held[-len(taken) :, start : start + context_length] = taken
  awake = int(loss_mask.argmax()) // window_length * window_length
  held[:, awake:] = -1
  return held


def _stack(rows: Sequence[Batch]) -> Batch:
  columns: Any = jax.tree.map(lambda *column: np.stack(column), *rows)
  return columns
