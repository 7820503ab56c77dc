"""The settings of the GSM-Infinite task."""

import dataclasses

from sleep_jax.tasks.gsm_infinite.themes import THEMES

_STYLES = tuple(THEMES)
# Each value is a word of the vocabulary.
_MOST_VALUES = 100_000
_CHOICES = {
  "ops": (1, 2, 3, 4, 5, 6, 7, 8),
  "modes": ("forward", "reverse"),
  "themes": tuple(THEMES["prose"]),
  "layers": (2, 3),
}


@dataclasses.dataclass(frozen=True)
class GsmInfiniteConfig:
  """Which problems are drawn, and how they are written.

  Raises:
    ValueError: a value is outside its limits; one line names them all.
  """

  # Name of the task in experiments.
  name: str = "gsm_infinite"
  # Numbers of operations, 1..8, drawn uniformly.
  ops: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8)
  # "forward" asks for the last value, "reverse" gives it and asks for a leaf;
  # drawn uniformly.
  modes: tuple[str, ...] = ("forward", "reverse")
  # Worlds, drawn uniformly: "zoo", "schools", "festivals".
  themes: tuple[str, ...] = ("zoo", "schools", "festivals")
  # "prose": English sentences; "terse": one word per name, as in
  # "owl pine = 2 * fox lake ."
  style: str = "prose"
  # 2: numbers and totals (medium); 3: averages too (hard); drawn uniformly.
  layers: tuple[int, ...] = (2,)
  # Largest number of places in a world, 1..5.
  max_places: int = 5
  # Largest number of kinds of things in a world, 1..5.
  max_things: int = 5
  # Largest value of a leaf: a quantity stated as a constant. The original's is
  # 4; the more values there are, the less a guess among them is worth.
  max_leaf: int = 4
  # Largest value of a necessary quantity, and so of an answer, 4..100,000.
  max_value: int = 1000
  # Largest number of statements about the world that the answer does not need;
  # -1: everything in the world is stated.
  distractors: int = -1
  # The length of a context (question and statements) is drawn uniformly between
  # these two, in tokens, and approached from below with noise statements.
  # min_tokens 0: no noise; max_tokens 0: no limit either.
  min_tokens: int = 0
  max_tokens: int = 0
  # Share of all problems, by hash, that only the "heldout" split draws.
  heldout_fraction: float = 1 / 16

  def __post_init__(self):
    problems = [
      f"task.{field} = {getattr(self, field)!r}: {rule}"
      for field, holds, rule in self._rules()
      if not holds
    ]
    if problems:
      raise ValueError("; ".join(problems))

  def _rules(self):
    """(field, whether its value is allowed, what to use instead)."""
    for field, allowed in _CHOICES.items():
      values = getattr(self, field)
      fits = len(values) > 0 and all(value in allowed for value in values)
      yield field, fits, f"use one or more of {allowed}"
    yield "style", self.style in _STYLES, f"use one of {_STYLES}"
    for field in ("max_places", "max_things"):
      yield field, 1 <= getattr(self, field) <= 5, "use 1..5"
    fits = 4 <= self.max_value <= _MOST_VALUES
    yield "max_value", fits, f"use 4 (the largest factor)..{_MOST_VALUES}"
    fits = 1 <= self.max_leaf <= self.max_value
    yield "max_leaf", fits, f"use 1..max_value={self.max_value}"
    yield "distractors", self.distractors >= -1, "use -1 (all), 0 or more"
    yield "min_tokens", self.min_tokens >= 0, "use 0 (no noise) or more"
    fits = self.max_tokens >= self.min_tokens
    yield "max_tokens", fits, f"use min_tokens={self.min_tokens} or more"
    fits = 0.01 <= self.heldout_fraction <= 0.5
    yield "heldout_fraction", fits, "use a share in 0.01..0.5"
