"""Random draws that depend on a key alone."""

import bisect
import hashlib
import itertools
import random
from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


class Draws:
  """A stream of draws, the same for the same key in every process.

  Only `random.Random.random` is used: of the standard generator, its sequence
  is what stays the same between versions of Python.
  """

  def __init__(self, *key: int | str):
    digest = hashlib.blake2b(repr(key).encode(), digest_size=8).digest()
    self._random = random.Random(int.from_bytes(digest, "big")).random

  def chance(self, probability: float) -> bool:
    """True with the given probability."""
    return self._random() < probability

  def below(self, stop: int) -> int:
    """An integer in 0..stop-1."""
    return int(self._random() * stop)

  def between(self, first: int, last: int) -> int:
    """An integer in first..last."""
    return first + int(self._random() * (last - first + 1))

  def weighted(self, weights: Sequence[float]) -> int:
    """An index into `weights`, each with a probability proportional to its."""
    below = list(itertools.accumulate(weights))
    place = bisect.bisect(below, self._random() * below[-1])
    return min(place, len(below) - 1)

  def streak(self, most: int) -> int:
    """How often a fair coin falls heads in a row: 0..most."""
    length = 0
    while length < most and self._random() < 0.5:
      length += 1
    return length

  def choice(self, items: Sequence[_T]) -> _T:
    """One of the items."""
    return items[int(self._random() * len(items))]

  def sample(self, items: Sequence[_T], count: int) -> list[_T]:
    """`count` of the items, in random order."""
    items = list(items)
    rand = self._random
    size = len(items)
    for i in range(count):
      j = i + int(rand() * (size - i))
      items[i], items[j] = items[j], items[i]
    return items[:count]
