"""The task: problems made from (split, index) alone."""

import dataclasses
import math
from collections.abc import Callable, Iterable

from sleep_jax.tasks.base import Example, Question
from sleep_jax.tasks.draws import Draws
from sleep_jax.tasks.gsm_infinite.config import GsmInfiniteConfig
from sleep_jax.tasks.gsm_infinite.graph import Definition, Parameter, draw_graph
from sleep_jax.tasks.gsm_infinite.noise import draw_noise
from sleep_jax.tasks.gsm_infinite.text import (
  WRITERS,
  Writer,
  core_statements,
  in_heldout,
  solution,
  vocabulary,
)
from sleep_jax.tasks.gsm_infinite.themes import THEMES

_MOST_ATTEMPTS = 10_000


def count_words(text: str) -> int:
  """Number of words between spaces."""
  return len(text.split())


@dataclasses.dataclass(frozen=True)
class Problem:
  """A problem, in parts.

  Attributes:
    problem: the statements, in random order.
    question: what is asked.
    answer: a positive integer; an average or a total of it may be 0.
    solution: the necessary values in order, ending in "Answer: N.".
    op: number of operations.
    mode: "forward" or "reverse".
    theme: the name of the world.
    layers: 2, or 3 with averages.
    id: seed, split and index.
  """

  problem: str
  question: str
  answer: int
  solution: str
  op: int
  mode: str
  theme: str
  layers: int
  id: str


class GsmInfinite:
  """Grade-school math about small worlds: a `Task` without end.

  Paper: section 6 takes problems of 1 to 8 operations from GSM-Infinite
  (arXiv:2502.05252). Ours are drawn anew from the same family. One operation,
  the lookup of a stated constant, is our extension: the original's medium
  problems begin at two. The hash of a problem (its question and the statements
  about its world, without noise, in any order) decides which split may draw it:
  no seed and no index brings a held-out problem into training.

  Args:
    config: which problems.
    seed: of the whole stream.
    count_tokens: the length of a text, in the unit of `config.max_tokens`.
  """

  eval_splits = ("heldout",)
  text_separator = " "

  def __init__(
    self,
    config: GsmInfiniteConfig,
    seed: int,
    count_tokens: Callable[[str], int] = count_words,
  ):
    self.config = config
    self.seed = seed
    self.count_tokens = count_tokens
    self.modes = config.modes
    self.vocabulary = vocabulary(config)

  def size(self, split: str) -> None:
    """None: the splits never end."""
    del split

  def example(self, split: str, index: int) -> Example:
    """The problem at `index` of "train" or "heldout", question first."""
    problem = self.problem(split, index)
    return Example(
      context=f"{problem.question} {problem.problem}",
      questions=(Question(str(problem.answer)),),
      depth=problem.op,
      mode=problem.mode,
    )

  def problem(self, split: str, index: int) -> Problem:
    """The problem of `example`, in parts.

    Raises:
      ValueError: the split is unknown, or the config leaves no such problem.
    """
    if split not in ("train", *self.eval_splits):
      raise ValueError(f"split {split!r}: use 'train' or 'heldout'")
    config = self.config
    draws = Draws(self.seed, split, index)
    # Drawn once, so that no choice is thinned out by its failed attempts.
    op = draws.choice(config.ops)
    mode = draws.choice(config.modes)
    theme = draws.choice(config.themes)
    layers = draws.choice(config.layers)
    target = draws.between(config.min_tokens, config.max_tokens)
    for _ in range(_MOST_ATTEMPTS):
      parts = self._attempt(draws, split, op, mode, theme, layers, target)
      if parts:
        name = f"{self.seed}/{split}/{index}"
        return Problem(*parts, op, mode, theme, layers, name)
    raise ValueError(
      f"op={op}, mode={mode!r}, layers={layers}: no such problem in"
      f" {_MOST_ATTEMPTS} attempts; raise max_places, max_things, max_value or"
      " max_tokens"
    )

  def _attempt(self, draws, split, op, mode, theme, layers, target):
    """Problem, question, answer, solution; None if the attempt failed."""
    config = self.config
    graph = draw_graph(draws, config, op, mode, layers)
    if graph is None:
      return None
    words = THEMES[config.style][theme]
    places = draws.sample(draws.choice(words.places), config.max_places)
    things = draws.sample(draws.choice(words.things), config.max_things)
    writer = WRITERS[config.style](
      words, (*places, *words.noise_places), (*things, *words.noise_things)
    )
    question = writer.question(graph.asked)
    statements = core_statements(writer, graph)
    limit = config.max_tokens or math.inf
    room = limit - self._length([question, *statements])
    distractors = self._fitting(writer, graph.distractors.items(), room)
    for parameter in list(graph.distractors)[len(distractors) :]:
      del graph.distractors[parameter]
    statements += distractors
    heldout = in_heldout(question, statements, config.heldout_fraction)
    if heldout != (split == "heldout"):
      return None
    if config.min_tokens:
      noise = draw_noise(
        draws,
        graph,
        layers,
        range(len(places), len(writer.places)),
        range(len(things), len(writer.things)),
      )
      room = target - self._length([question, *statements])
      statements += self._fitting(writer, noise, room)
    text = " ".join(draws.sample(statements, len(statements)))
    if self._length([question, text]) > limit:
      return None
    answer = graph.values[graph.asked]
    return text, question, answer, solution(writer, graph)

  def _length(self, texts: Iterable[str]) -> int:
    # With the space before it, a text costs what it costs inside a longer one.
    return sum(self.count_tokens(f" {text}") for text in texts)

  def _fitting(
    self,
    writer: Writer,
    definitions: Iterable[tuple[Parameter, Definition]],
    room: int | float,
  ) -> list[str]:
    """The statements of the definitions, up to the first without room."""
    statements = []
    for parameter, definition in definitions:
      statement = writer.statement(parameter, definition)
      room -= self._length([statement])
      if room < 0:
        break
      statements.append(statement)
    return statements
