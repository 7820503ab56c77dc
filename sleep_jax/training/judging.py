"""Judging answers: exact accuracy by depth and mode, intervals and floors.

An answer is exact when every place of it, the end token included, is right.
Beside each accuracy stands its floor: what the best constant answer would
score on those very examples.
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
  answers: Sequence[Sequence[Hashable]],
  depth: Int[np.ndarray, "n"],
  modes: Sequence[str],
) -> dict[str, Any]:
  """Returns {split: scores}, ready for JSON; splits are joined with `|`.

  The scores of a set of examples are its "count", the exact "accuracy", its
  95% Wilson "interval" and its "floor", and "label_accuracy" and
  "label_floor": the share of right places, the end token left out, and what
  the best constant label of each place would reach. They are given
  "overall", by "depth" and, in each depth, by "mode".

  Args:
    split: the name of the split.
    tokens_right: whether the token at each answer place is the right one.
    answer_mask: the answer places; the last of an example is its end token.
    answers: the right labels of each example, without the end token.
    depth: how deep the computation of each example is.
    modes: the second grouping of each example.

  Raises:
    ValueError: there is no example, the lengths differ, or an answer has
      other places than its mask.
  """
  _check(tokens_right, answer_mask, answers, depth, modes)

  def score(chosen: Bool[np.ndarray, "n"]) -> dict[str, Any]:
    return _score(
      tokens_right[chosen],
      answer_mask[chosen],
      [tuple(answers[int(i)]) for i in np.flatnonzero(chosen)],
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


def wilson_interval(right: int, count: int) -> tuple[float, float]:
  """Returns the 95% Wilson score interval of `right` successes of `count`."""
  z2 = _NORMAL_QUANTILE**2
  share = right / count
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


def _score(
  tokens_right: Bool[np.ndarray, "n A"],
  answer_mask: Bool[np.ndarray, "n A"],
  answers: list[tuple],
) -> dict[str, Any]:
  count = len(answers)
  right = int((tokens_right | ~answer_mask).all(axis=1).sum())
  labels = answer_mask & ~_end_places(answer_mask)
  constant_right = sum(
    max(Counter(answer[i] for answer in answers if i < len(answer)).values())
    for i in range(max(map(len, answers)))
  )
  return {
    "count": count,
    "accuracy": right / count,
    "interval": list(wilson_interval(right, count)),
    "floor": max(Counter(answers).values()) / count,
    "label_accuracy": float(tokens_right[labels].mean()),
    "label_floor": constant_right / int(labels.sum()),
  }


def _end_places(
  answer_mask: Bool[np.ndarray, "n A"],
) -> Bool[np.ndarray, "n A"]:
  rank = answer_mask.cumsum(axis=1)
  return answer_mask & (rank == rank[:, -1:])


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


def _check(tokens_right, answer_mask, answers, depth, modes) -> None:
  lengths = [len(tokens_right), len(answer_mask), len(answers), len(depth)]
  lengths.append(len(modes))
  if len(set(lengths)) > 1 or not lengths[0]:
    raise ValueError(
      "tokens_right, answer_mask, answers, depth and modes need one and the"
      f" same number of examples, at least 1: got {lengths}"
    )
  places = answer_mask.sum(axis=1)
  for i, answer in enumerate(answers):
    if len(answer) + 1 != places[i] or not len(answer):
      raise ValueError(
        f"example {i} has {places[i]} answer places, but its answer"
        f" {answer!r} has {len(answer)} labels: an answer needs a place for"
        " each label (at least 1) and one for the end token"
      )
