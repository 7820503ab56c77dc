"""Cycles of named nodes, and questions about them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

from sleep_jax.tasks.base import Example, Question, in_curriculum, is_stage
from sleep_jax.tasks.draws import Draws

# Symbols are the original's numbers: those of names, then from 9001 on the
# hops of a query, the answer marker, and what may stand before an edge.
HOPS = 9000
MARKER = 9500
SEPARATOR = 9700
FEWEST_NODES = 3

Name: TypeAlias = tuple[int, ...]


@dataclass(frozen=True)
class DepoConfig:
  """How long the cycles are, how far is asked, and what nodes are called.

  Raises:
    ValueError: a value is outside its limits; one line names them all.
  """

  # Name of the task in experiments.
  name: str = "depo"
  # N: nodes of the longest cycle in training, and of each in a test.
  nodes: int = 75
  # K: the most hops that are asked for.
  hops: int = 16
  # The hops that questions of training ask for, each as often; () is 1..K.
  train_hops: tuple = ()
  # Share of training's cycles that are given N nodes, as those of a test; the
  # others follow the original's law, which gives some of them N nodes too.
  full_cycles: float = 0.0
  # Training begins with other shares, ((how many examples, share), ...), one
  # after the other: ((96_000, 0.5),). Other run.steps or batch sizes do not
  # stretch it.
  curriculum: tuple = ()
  # M: the most questions about a cycle; a shorter one has one for each node.
  queries: int = 10
  # Tokens of the shortest and of the longest name.
  name_length: tuple = (1, 2)
  # V: a name's last token is one of V, those before it are of V others.
  mini_vocab: int = 50
  # Whether a separator stands before each edge. Without one nothing tells where
  # an edge begins but a count from the start.
  separator: bool = False
  # Whether the answer marker, too, must be predicted.
  marker_counts: bool = True

  def __post_init__(self):
    problems = [
      f"task.{field} = {getattr(self, field)!r}: {rule}"
      for field, holds, rule in (
        ("nodes", self.nodes >= FEWEST_NODES, f"use {FEWEST_NODES} or more"),
        ("hops", 1 <= self.hops < MARKER - HOPS, "use 1..499"),
        (
          "train_hops",
          all(type(k) is int and 1 <= k <= self.hops for k in self.train_hops),
          f"use whole numbers from 1 to task.hops = {self.hops}, like (1, 2)",
        ),
        ("full_cycles", 0 <= self.full_cycles <= 1, "use 0..1"),
        (
          "curriculum",
          all(is_stage(stage, _is_share) for stage in self.curriculum),
          "use pairs (1 or more examples, a share of 0..1), like "
          "((96000, 0.5),)",
        ),
        ("queries", self.queries >= 1, "use 1 or more"),
        ("mini_vocab", 1 <= self.mini_vocab <= HOPS // 2, "use 1..4500"),
        (
          "name_length",
          [type(n) for n in self.name_length] == [int, int]
          and 1 <= self.name_length[0] <= self.name_length[1],
          "use two numbers, the shortest's and the longest's, like (1, 2)",
        ),
      )
      if not holds
    ]
    if problems:
      raise ValueError("; ".join(problems))
    shortest, longest = self.name_length
    names = 0
    for length in range(shortest, longest + 1):
      names += self.mini_vocab**length
      if names >= self.nodes:  # numbers of any size
        break
    else:
      raise ValueError(
        f"task.nodes = {self.nodes}: there are {names} names of "
        f"task.name_length = {self.name_length} with task.mini_vocab = "
        f"{self.mini_vocab}; raise one of these"
      )


class Problem(NamedTuple):
  """A cycle and what is asked about it.

  Attributes:
    edges: (node, the next one) in the order of the text.
    queries: (hops, first node, the node so many hops on).
  """

  edges: list[tuple[Name, Name]]
  queries: list[tuple[int, Name, Name]]


class Depo:
  """The task; an example depends on (seed, split, index) alone.

  In "train" a cycle has n = 3..N nodes with probability proportional to
  1 / (n + sqrt(N)), but for a share of n = N that `curriculum` and then
  `full_cycles` say, and each question asks for a number of hops of its own,
  1..K or of `train_hops`. The other splits have n = N, and one number of hops
  each: the powers of two up to K, and K.
  """

  modes: Sequence[str] = ("cycle",)
  text_separator: str = " "

  def __init__(self, config: DepoConfig, seed: int):
    self._config = config
    self._seed = seed
    powers = {2**i for i in range(config.hops.bit_length())}
    self._hops = {f"hops_{k}": k for k in sorted({*powers, config.hops})}
    self.eval_splits: Sequence[str] = tuple(self._hops)
    self._train_hops = config.train_hops or range(1, config.hops + 1)
    size = config.mini_vocab
    self._ends = tuple(map(str, range(size + 1, 2 * size + 1)))
    self.vocabulary: Sequence[str] = (
      *map(str, range(1, size + 1)),
      *self._ends,
      *(str(HOPS + k) for k in range(1, config.hops + 1)),
      *([str(SEPARATOR)] if config.separator else []),
    )
    root = math.sqrt(config.nodes)
    law = [1 / (n + root) for n in range(FEWEST_NODES, config.nodes + 1)]
    self._weights = {}  # of n = 3..N, by the share of full cycles
    for share in (config.full_cycles, *(x for _, x in config.curriculum)):
      weights = [(1 - share) * weight for weight in law]
      weights[-1] += share * sum(law)
      self._weights[share] = weights

  def size(self, split: str) -> None:
    """None: a split never ends."""
    self._check(split)

  def example(self, split: str, index: int) -> Example:
    """The example at `index`: edges, and questions "9000 + k, name"."""
    problem = self.problem(split, index)
    before = f"{SEPARATOR} " if self._config.separator else ""
    return Example(
      context=" ".join(
        before + _text(u) + " " + _text(v) for u, v in problem.edges
      ),
      questions=tuple(
        Question(prompt=f"{HOPS + k} {_text(start)}", answer=_text(end))
        for k, start, end in problem.queries
      ),
      depth=max(k for k, _, _ in problem.queries),
      mode="cycle",
      answer_ends=self._ends,
      marker_counts=self._config.marker_counts,
    )

  def problem(self, split: str, index: int) -> Problem:
    """The cycle and its questions at `index` of `split`."""
    self._check(split)
    config = self._config
    draws = Draws(self._seed, split, index)
    size = config.nodes
    if split == "train":
      share, _ = in_curriculum(config.curriculum, index, config.full_cycles)
      size = FEWEST_NODES + draws.weighted(self._weights[share])
    names: dict[Name, None] = {}  # the order counts, as a set's does not
    while len(names) < size:
      names[self._name(draws)] = None
    cycle = list(names)
    edges = [(name, cycle[(i + 1) % size]) for i, name in enumerate(cycle)]
    starts = draws.sample(range(size), min(size, config.queries))
    hops = [
      self._hops.get(split) or draws.choice(self._train_hops) for _ in starts
    ]
    return Problem(
      draws.sample(edges, size),
      [
        (k, cycle[start], cycle[(start + k) % size])
        for k, start in zip(hops, starts, strict=True)
      ],
    )

  def _name(self, draws: Draws) -> Name:
    size = self._config.mini_vocab
    before = draws.between(*self._config.name_length) - 1
    return (
      *(draws.between(1, size) for _ in range(before)),
      draws.between(size + 1, 2 * size),
    )

  def _check(self, split: str) -> None:
    splits = ("train", *self.eval_splits)
    if split not in splits:
      raise ValueError(f"split {split!r}: use one of {splits}")


def _is_share(value: Any) -> bool:
  return type(value) in (int, float) and 0 <= value <= 1


def _text(name: Name) -> str:
  return " ".join(map(str, name))
