"""Judging answers: exact accuracy by depth and mode, intervals and floors.

An answer is exact when every place of it, the end token included, is right.
Beside each accuracy stands its floor: what the best constant answer would
score on those very examples. Answers about one and the same context are not
independent: the intervals take the rows, not the answers, as drawn at random.
"""

import json
import math
import os
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Int

from sleep_jax.training.workdir import write_atomically

_NORMAL_QUANTILE = 1.959964  # of 97.5%: two-sided 95% intervals
_COLUMNS: tuple[str, ...] = (
  "split",
  "depth",
  "mode",
  "count",
  "accuracy",
  "interval",
  "floor",
  "label",
  "label-floor",
)


def judge(
  split: str,
  tokens_right: Bool[np.ndarray, "n A"],
  answer_mask: Bool[np.ndarray, "n A"],
  label_mask: Bool[np.ndarray, "n A"],
  answers: Sequence[Sequence[Hashable]],
  depth: Int[np.ndarray, "n"],
  modes: Sequence[str],
  rows: Int[np.ndarray, "n"],
) -> dict[str, Any]:
  """Returns {split: scores}, ready for JSON; splits are joined with `|`.

  The scores of a set of answers are its "count", the exact "accuracy", its
  95% Wilson "interval" and its "floor", and "label_accuracy" and
  "label_floor": the share of right labels, and what the best constant label of
  each place would reach. They are given "overall", by "depth" and, in each
  depth, by "mode".

  Args:
    split: the name of the split.
    tokens_right: whether the token at each place is the right one.
    answer_mask: the places of each answer.
    label_mask: those of them that hold its labels, not a marker or end token.
    answers: the right labels of each answer.
    depth: how deep the computation of each answer is.
    modes: the second grouping of each answer.
    rows: which row each answer is from; those of a row may go together.

  Raises:
    ValueError: there is no answer, the lengths differ, or an answer has other
      places than its masks.
  """
  _check(tokens_right, answer_mask, label_mask, answers, depth, modes, rows)

  def score(chosen: Bool[np.ndarray, "n"]) -> dict[str, Any]:
    return _score(
      tokens_right[chosen],
      answer_mask[chosen],
      label_mask[chosen],
      [tuple(answers[int(i)]) for i in np.flatnonzero(chosen)],
      rows[chosen],
    )

  mode = np.asarray(modes)
  by_depth = {}
  for d in np.unique(depth):
    by_depth[str(d)] = score(depth == d) | {
      "mode": {
        str(m): score((depth == d) & (mode == m))
        for m in np.unique(mode[depth == d])
      }
    }
  overall = score(np.ones(len(depth), bool))
  return {split: {"overall": overall, "depth": by_depth}}


def wilson_interval(share: float, count: int | float) -> tuple[float, float]:
  """Returns the 95% Wilson score interval of a share of `count` draws."""
  z2 = _NORMAL_QUANTILE**2
  centre = (share + z2 / (2 * count)) / (1 + z2 / count)
  half_width = (
    _NORMAL_QUANTILE
    * math.sqrt(share * (1 - share) / count + z2 / (4 * count**2))
    / (1 + z2 / count)
  )
  return max(0.0, centre - half_width), min(1.0, centre + half_width)


def format_table(results: Mapping[str, Any]) -> str:
  """Returns the results as aligned plain text, a row for each set."""
  rows = [[*_COLUMNS]]
  for split, scores in results.items():
    rows.append([split, "all", "all"] + _cells(scores["overall"]))
    for depth, at_depth in scores["depth"].items():
      rows.append([split, depth, "all"] + _cells(at_depth))
      if len(at_depth["mode"]) > 1:
        for mode, in_mode in at_depth["mode"].items():
          rows.append([split, depth, mode] + _cells(in_mode))
  widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
  return "\n".join(
    "  ".join(
      # Names to the left, numbers to the right.
      cell.ljust(width) if i in (0, 2) else cell.rjust(width)
      for i, (cell, width) in enumerate(zip(row, widths, strict=True))
    )
    for row in rows
  )


def write_results(
  workdir: str | os.PathLike, results: Mapping[str, Any]
) -> None:
  """Writes the results to `workdir`/results.json; OSError: the disk is full."""
  text = json.dumps(results, indent=2, allow_nan=False) + "\n"
  write_atomically(Path(workdir) / "results.json", text)


def independent_count(
  right: Bool[np.ndarray, "n"], rows: Int[np.ndarray, "n"]
) -> float:
  """How many independent answers would tell as much as these.

  n over the design effect (Kish): the variance of the share of right answers
  with whole rows drawn at random, over that with single answers; at least 1.
  Where all are right, or none, or of one row, nothing tells how alike those of
  a row are: the number of rows.
  """
  _, row = np.unique(rows, return_inverse=True)
  share, count = float(right.mean()), len(right)
  if share in (0, 1) or row.max() == 0:
    return float(row.max() + 1)
  deviations = np.bincount(row, right - share)
  effect = float(np.sum(deviations**2)) / (count * share * (1 - share))
  return count / max(effect, 1.0)


def _score(
  tokens_right: Bool[np.ndarray, "n A"],
  answer_mask: Bool[np.ndarray, "n A"],
  label_mask: Bool[np.ndarray, "n A"],
  answers: list[tuple],
  rows: Int[np.ndarray, "n"],
) -> dict[str, Any]:
  count = len(answers)
  right = np.all(tokens_right | ~answer_mask, axis=1)
  accuracy = float(right.mean())
  constant_right = sum(
    max(Counter(answer[i] for answer in answers if i < len(answer)).values())
    for i in range(max(map(len, answers)))
  )
  return {
    "count": count,
    "accuracy": accuracy,
    "interval": list(wilson_interval(accuracy, independent_count(right, rows))),
    "floor": max(Counter(answers).values()) / count,
    "label_accuracy": float(tokens_right[label_mask].mean()),
    "label_floor": constant_right / int(label_mask.sum()),
  }


def _cells(scores: Mapping[str, Any]) -> list[str]:
  low, high = scores["interval"]
  return [
    str(scores["count"]),
    f"{scores['accuracy']:.3f}",
    f"[{low:.3f}, {high:.3f}]",
    f"{scores['floor']:.3f}",
    f"{scores['label_accuracy']:.3f}",
    f"{scores['label_floor']:.3f}",
  ]


def _check(
  tokens_right, answer_mask, label_mask, answers, depth, modes, rows
) -> None:
  arguments = tokens_right, answer_mask, label_mask, answers, depth, modes, rows
  lengths = [len(argument) for argument in arguments]
  if len(set(lengths)) > 1 or not lengths[0]:
    raise ValueError(
      "all arguments of judge need one and the same number of answers, at"
      f" least 1: got {lengths}"
    )
  places = (answer_mask & label_mask).sum(axis=1)
  for i, answer in enumerate(answers):
    if len(answer) != places[i] or not len(answer):
      raise ValueError(
        f"answer {i} has {places[i]} places for labels, but its answer"
        f" {answer!r} has {len(answer)} labels: it needs a place for each, and"
        " at least 1"
      )
