"""Problems as text: two styles, and the words of a text."""

import hashlib
import re
from collections.abc import Iterable, Sequence

from sleep_jax.tasks.gsm_infinite.config import GsmInfiniteConfig
from sleep_jax.tasks.gsm_infinite.graph import (
  ATTRIBUTE_TOTAL,
  AVERAGE,
  COUNT,
  TOTAL,
  Definition,
  Graph,
  Parameter,
)
from sleep_jax.tasks.gsm_infinite.themes import THEMES, Theme

_WORD = re.compile(r"[^\s.,?!;:]+(?:[.,?!;:]+[^\s.,?!;:]+)*|[.,?!;:]")


def split_words(text: str) -> list[str]:
  """The words of a text, with punctuation at a word's end on its own.

  Example:
    >>> split_words("Pine Ridge equals 3. How many?")
    ['Pine', 'Ridge', 'equals', '3', '.', 'How', 'many', '?']
  """
  return _WORD.findall(text)


def in_heldout(
  question: str, statements: Iterable[str], fraction: float
) -> bool:
  """Whether a problem is held out: the same for any order of statements."""
  text = "\n".join([question, *sorted(statements)])
  digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
  return int.from_bytes(digest, "big") < fraction * 2**64


class Writer:
  """Writes the statements of one world; a subclass for each style.

  Args:
    theme: the words of the world, in this style.
    places: names of places, by index.
    things: names of things, by index.
  """

  def __init__(
    self, theme: Theme, places: Sequence[str], things: Sequence[str]
  ):
    self.theme = theme
    self.places = places
    self.things = things

  def name(self, parameter: Parameter) -> str:
    """What the parameter is called inside a statement."""
    raise NotImplementedError

  def question(self, parameter: Parameter) -> str:
    """The question for the parameter."""
    raise NotImplementedError

  def statement(self, parameter: Parameter, definition: Definition) -> str:
    """The statement of what the parameter equals."""
    raise NotImplementedError

  def existence(self, parameter: Parameter) -> str:
    """The statement that stands in for a hidden parameter's definition."""
    raise NotImplementedError


class Prose(Writer):
  """Writes English sentences."""

  def name(self, parameter: Parameter) -> str:
    kind, place, thing = parameter
    theme = self.theme
    if kind == COUNT:
      what = f"number of {self.things[thing]}"
    elif kind == AVERAGE:
      what = f"average number of {theme.attribute} per {self.things[thing]}"
    elif kind == TOTAL:
      what = f"total number of {theme.total}"
    else:
      what = f"total number of {theme.attribute_total}"
    return f"the {what} in {self.places[place]}"

  def question(self, parameter: Parameter) -> str:
    kind, place, thing = parameter
    if kind == COUNT:
      return f"How many {self.things[thing]} does {self.places[place]} have?"
    return f"What is {self.name(parameter)}?"

  def statement(self, parameter: Parameter, definition: Definition) -> str:
    operands, constant, sign, difference = definition
    names = [self.name(operand) for operand in operands]
    if not names:
      text = f"{constant}"
    elif len(names) == 1:
      text = names[0]
    elif len(names) == 2:
      what = "difference between" if difference else "sum of"
      text = f"the {what} {names[0]} and {names[1]}"
    else:
      text = f"the sum of {', '.join(names[:-1])}, and {names[-1]}"
    if sign:
      text = f"{constant} {'plus' if sign == '+' else 'times'} {text}"
    return f"T{self.name(parameter)[1:]} equals {text}."

  def existence(self, parameter: Parameter) -> str:
    exists = " exists, and its number" if parameter.kind == COUNT else ""
    return f"T{self.name(parameter)[1:]}{exists} is greater than 0."


class Terse(Writer):
  """Writes one word per name and sign, with single spaces.

  `owl pine` is the number of owls in the pine, `per owl pine` the average of
  the attribute, `total pine` and `total per pine` are the totals of the place.
  """

  def name(self, parameter: Parameter) -> str:
    kind, place, thing = parameter
    if kind == COUNT:
      return f"{self.things[thing]} {self.places[place]}"
    if kind == AVERAGE:
      return f"per {self.things[thing]} {self.places[place]}"
    if kind == TOTAL:
      return f"total {self.places[place]}"
    return f"total per {self.places[place]}"

  def question(self, parameter: Parameter) -> str:
    return f"? {self.name(parameter)} ."

  def statement(self, parameter: Parameter, definition: Definition) -> str:
    operands, constant, sign, difference = definition
    joint = " - " if difference else " + "
    text = joint.join([self.name(operand) for operand in operands])
    if not operands:
      text = f"{constant}"
    elif sign and len(operands) > 1:
      text = f"{constant} {sign} ( {text} )"
    elif sign:
      text = f"{constant} {sign} {text}"
    return f"{self.name(parameter)} = {text} ."

  def existence(self, parameter: Parameter) -> str:
    return f"{self.name(parameter)} > 0 ."


# By style.
WRITERS = {"prose": Prose, "terse": Terse}


def core_statements(writer: Writer, graph: Graph) -> list[str]:
  """The statements that the answer needs."""
  statements = [
    writer.statement(parameter, definition)
    for parameter, definition in graph.definitions.items()
    if parameter != graph.hidden
  ]
  if graph.hidden:
    given = Definition((), graph.values[graph.last])
    statements.append(writer.existence(graph.hidden))
    statements.append(writer.statement(graph.last, given))
  return statements


def solution(writer: Writer, graph: Graph) -> str:
  """The necessary values in order, as forms in x where one is hidden."""
  steps = []
  answer = graph.values[graph.asked]
  for parameter in reversed(graph.order):
    slope = graph.slopes.get(parameter, 0)
    rest = graph.values[parameter] - slope * answer
    form = f"{slope} * x + {rest}" if slope else f"{rest}"
    steps.append(f"{writer.name(parameter)} = {form}")
  if graph.hidden:
    steps.append(f"{writer.name(graph.last)} = {graph.values[graph.last]}")
    steps.append(f"x = {answer}")
  return f"{'; '.join(steps)}. Answer: {answer}."


def vocabulary(config: GsmInfiniteConfig) -> tuple[str, ...]:
  """Every word that a context or an answer can contain, names first."""
  kinds = (COUNT, TOTAL, AVERAGE, ATTRIBUTE_TOTAL)[: 2 * max(config.layers) - 2]
  parameters = tuple(Parameter(kind, 0, 0) for kind in kinds)
  texts = []
  for name in config.themes:
    theme = THEMES[config.style][name]
    places, things = sum(theme.places, ()), sum(theme.things, ())
    if config.min_tokens:
      places, things = places + theme.noise_places, things + theme.noise_things
    writer = WRITERS[config.style](theme, places, things)
    texts += [*places, *things]
    for parameter in parameters:
      texts += [writer.question(parameter), writer.existence(parameter)]
      for sign in ("+", "*"):
        for some in (parameters[:2], (parameter,) * 3):
          definition = Definition(some, 1, sign, len(some) == 2)
          texts.append(writer.statement(parameter, definition))
  texts += [str(value) for value in range(config.max_value + 1)]
  return tuple(dict.fromkeys(word for t in texts for word in split_words(t)))
