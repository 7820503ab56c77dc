"""Problems in files: one JSON object a line, with the original's fields."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Iterable, Iterator
from hashlib import sha256

from sleep_jax.tasks import problem_files
from sleep_jax.tasks.base import Example, Question
from sleep_jax.tasks.gsm_infinite.task import Problem
from sleep_jax.tasks.gsm_infinite.text import in_heldout, split_words

# The original's words for the modes.
_MODES = {"normalforward": "forward", "forwardreverse": "reverse"}
_ORIGINAL_MODES = {mode: word for word, mode in _MODES.items()}
_INTEGER = re.compile(r"\s*-?[0-9]{1,18}\s*")
_LARGEST_OP = 1000
_ANSWER = re.compile(r"Answer: (-?[0-9]+)\.?\s*$")


@dataclasses.dataclass(frozen=True)
class Record:
  """A line of a file: the attributes of `Problem`, and which line."""

  problem: str
  question: str
  answer: int
  op: int
  mode: str
  line: int


def read_records(path: str | pathlib.Path) -> Iterator[Record]:
  """The problems of a file, in order.

  A line has the fields problem, question, op, and answer or a solution that
  ends in "Answer: N"; also mode, normalforward (or missing) or forwardreverse.
  Other fields are passed over, as are blank lines.

  Raises:
    ValueError: the file has no problem, or a line is not as said; names file
      and line.
    OSError: the file cannot be read.
  """
  return problem_files.read_lines(path, _record)


def _record(text: str, line: int) -> Record:
  fields = json.loads(text)
  if not isinstance(fields, dict):
    raise ValueError("not a JSON object")
  for name in ("problem", "question"):
    if not isinstance(fields.get(name), str):
      raise ValueError(f"field {name!r} is missing or no text")
    fields[name].encode()  # half of a surrogate pair is no text
  if "answer" in fields:
    answer = _integer(fields, "answer")
  else:
    found = _ANSWER.search(str(fields.get("solution", "")))
    if not found:
      raise ValueError("no field 'answer', and no solution ending 'Answer: N'")
    answer = int(found[1])
  mode = fields.get("mode", "normalforward")
  if not isinstance(mode, str) or mode not in _MODES:
    raise ValueError(f"mode {repr(mode)[:40]} is none of {', '.join(_MODES)}")
  op = _integer(fields, "op")
  if not 0 <= op <= _LARGEST_OP:
    raise ValueError(f"op {op}: must be in 0..{_LARGEST_OP}")
  return Record(
    problem=fields["problem"],
    question=fields["question"],
    answer=answer,
    op=op,
    mode=_MODES[mode],
    line=line,
  )


def _integer(fields: dict, name: str) -> int:
  if name not in fields:
    raise ValueError(f"field {name!r} is missing")
  if not _INTEGER.fullmatch(str(fields[name])):
    raise ValueError(f"{name} {repr(fields[name])[:40]} is no integer")
  return int(str(fields[name]))


def write_problems(
  path: str | pathlib.Path, problems: Iterable[Problem]
) -> None:
  """Writes problems with the original's fields, in its words."""
  with open(path, "w", encoding="utf-8", errors="replace") as lines:
    for problem in problems:
      fields = {
        "id": problem.id,
        "problem": problem.problem,
        "question": problem.question,
        "answer": str(problem.answer),
        "solution": problem.solution,
        "op": problem.op,
        "mode": _ORIGINAL_MODES[problem.mode],
        "template": problem.theme,
        "d": problem.layers,
      }
      lines.write(json.dumps(fields, ensure_ascii=False) + "\n")


class GsmInfiniteFile:
  """The problems of a file as a `Task`; its splits are finite.

  The hash of a problem (its question and sentences, in no order) decides its
  split, so copies of a problem stay together.

  Args:
    path: the file.
    heldout_fraction: share of the problems in the split "heldout".

  Raises:
    ValueError: as `read_records`; or one of the splits has no problem.
    OSError: the file cannot be read.
  """

  eval_splits = ("heldout",)
  text_separator = " "

  def __init__(
    self, path: str | pathlib.Path, heldout_fraction: float = 1 / 16
  ):
    self._examples = {"train": [], "heldout": []}
    words = set()
    for record in read_records(path):
      example = Example(
        context=f"{record.question} {record.problem}",
        questions=(Question(str(record.answer)),),
        depth=record.op,
        mode=record.mode,
        source=f"{path}, line {record.line}",
      )
      sentences = record.problem.strip().removesuffix(".").split(". ")
      heldout = in_heldout(record.question, sentences, heldout_fraction)
      self._examples["heldout" if heldout else "train"].append(example)
      words.update(
        split_words(example.context), split_words(str(record.answer))
      )
    # Evaluations on the way take the first few: of a file sorted by
    # operations they would see the shallow ones alone.
    self._examples["heldout"].sort(
      key=lambda e: sha256(e.context.encode()).digest()
    )
    for split, examples in self._examples.items():
      if not examples:
        raise ValueError(
          f"{path}: no problem in the split {split!r} with"
          f" heldout_fraction={heldout_fraction}; use a larger file, or another"
          " fraction"
        )
    self.vocabulary = tuple(sorted(words))
    modes = {e.mode for some in self._examples.values() for e in some}
    self.modes = tuple(sorted(modes))

  def size(self, split: str) -> int:
    """Number of problems in "train" or "heldout"."""
    return len(self._split(split))

  def example(self, split: str, index: int) -> Example:
    """The problem at `index` of "train" or "heldout", question first."""
    return self._split(split)[index]

  def _split(self, split: str) -> list[Example]:
    if split not in self._examples:
      raise ValueError(f"split {split!r}: use 'train' or 'heldout'")
    return self._examples[split]
