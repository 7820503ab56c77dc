"""The graph of a problem: which quantities depend on which, and their values.

A structure says which things occur in which places. Its parameters are the
number of a thing in a place and, with three layers, the average of an attribute
per thing in a place; the totals of a place are implied by these and never
stated. A core of necessary parameters is drawn backwards from the asked one so
that its in-edges are exactly the wanted operations; distractors follow from the
core and from one another, and the core never from them.

Differences from the original construction, which hits a number of operations
by rejection: the number is exact by construction, one operation (the lookup of
a stated constant) is possible, and no name occurs twice in one expression.
"""

import dataclasses
import math
from typing import NamedTuple

from sleep_jax.tasks.draws import Draws
from sleep_jax.tasks.gsm_infinite.config import GsmInfiniteConfig

COUNT = "count"
AVERAGE = "average"
TOTAL = "total"
ATTRIBUTE_TOTAL = "attribute_total"

# Of the constants that are added or multiplied; leaves have `max_leaf`.
_LARGEST_CONSTANT = 4
_MOST_EXTRA_EDGES = 3
# Probabilities: that the last value is a total, that a new operand is one, that
# an operand is new, that a necessary parameter with one in-edge is a leaf, that
# a distractor is a leaf, that another distractor has a constant. Leaves keep a
# lookup honest: where few constants are stated, the commonest one is often the
# answer.
_LAST_TOTAL = 0.6
_NEW_TOTAL = 0.35
_NEW_OPERAND = 0.5
_LEAF = 0.4
_DISTRACTOR_LEAF = 0.45
_DISTRACTOR_CONSTANT = 0.3


class Parameter(NamedTuple):
  """A quantity of the world; `thing` is -1 for the totals of a place."""

  kind: str
  place: int
  thing: int = -1


class Definition(NamedTuple):
  """What a statement says: a constant joined to a sum or a difference.

  Attributes:
    operands: the parameters; none for a leaf, which is a constant.
    constant: the leaf's value, or what `sign` applies; 0 for none.
    sign: "", "+" (constant plus the rest) or "*" (constant times the rest).
    difference: whether two operands are subtracted instead of added.
  """

  operands: tuple[Parameter, ...]
  constant: int = 0
  sign: str = ""
  difference: bool = False


@dataclasses.dataclass
class Graph:
  """A problem without words.

  Attributes:
    order: the necessary parameters, the last value first, each before all that
      it depends on.
    parts: the summands of each necessary total, each as its factors.
    definitions: of the other necessary parameters.
    values: of the necessary parameters.
    distractors: definitions of unnecessary parameters, each after the
      parameters that it depends on.
    hidden: the leaf to be found in a reverse problem, else None.
    slopes: how each necessary value of a reverse problem grows with the hidden
      one (all are linear in it).
  """

  order: list[Parameter]
  parts: dict[Parameter, list[tuple[Parameter, ...]]]
  definitions: dict[Parameter, Definition]
  values: dict[Parameter, int]
  distractors: dict[Parameter, Definition]
  hidden: Parameter | None = None
  slopes: dict[Parameter, int] = dataclasses.field(default_factory=dict)

  @property
  def last(self) -> Parameter:
    """What everything necessary leads to."""
    return self.order[0]

  @property
  def asked(self) -> Parameter:
    """What the question asks for."""
    return self.hidden or self.last


def draw_graph(
  draws: Draws, config: GsmInfiniteConfig, op: int, mode: str, layers: int
) -> Graph | None:
  """A random graph of exactly `op` operations; None if the attempt failed."""
  things_of = _draw_structure(draws, config.max_places, config.max_things)
  core = _Core(draws, things_of, layers, op)
  if not core.draw():
    return None
  graph = Graph(core.order, core.parts, {}, {}, {})
  if not _draw_values(draws, graph, core.inputs, config):
    return None
  if mode == "reverse" and not _hide_leaf(graph):
    return None
  rest = [p for p in core.free if p not in core.introduced]
  if config.distractors >= 0:
    rest = rest[: config.distractors]
  graph.distractors = _draw_distractors(draws, graph, rest, config.max_leaf)
  return graph


def _draw_structure(
  draws: Draws, most_places: int, most_things: int
) -> list[list[int]]:
  """The things of each place: every thing in one place at least."""
  places = draws.between(min(2, most_places), most_places)
  things = draws.between(min(2, most_things), most_things)
  homes = [draws.below(places) for _ in range(things)]
  cells = [
    (place, thing)
    for place in range(places)
    for thing in range(things)
    if homes[thing] != place
  ]
  things_of = [[] for _ in range(places)]
  for thing, place in enumerate(homes):
    things_of[place].append(thing)
  for place, thing in draws.sample(cells, draws.below(len(cells) + 1)):
    things_of[place].append(thing)
  return things_of


class _Core:
  """Necessary parameters, drawn from the last value back to the leaves.

  A parameter is introduced when something is to depend on it, and defined
  later by drawing its own operands among those not yet defined: so no cycle
  can arise. `spare` is what is left of the operations after one in-edge for
  each parameter still to be defined. The summands of a total are introduced
  with it; it can be an operand until the first of its place is defined.
  """

  def __init__(self, draws, things_of, layers, op):
    self.draws = draws
    self.things_of = things_of
    self.kinds = (COUNT, AVERAGE) if layers == 3 else (COUNT,)
    self.totals_of_kind = (TOTAL, ATTRIBUTE_TOTAL)[: len(self.kinds)]
    cells = [
      Parameter(kind, place, thing)
      for place, things in enumerate(things_of)
      for thing in things
      for kind in self.kinds
    ]
    self.free = draws.sample(cells, len(cells))
    self.spare = op
    self.introduced: set[Parameter] = set()
    self.undefined: list[Parameter] = []
    self.open_totals: list[Parameter] = []
    self.started: set[int] = set()  # places with a defined parameter
    self.order: list[Parameter] = []
    self.parts: dict[Parameter, list[tuple[Parameter, ...]]] = {}
    # Whether a constant is among the inputs, and the operands.
    self.inputs: dict[Parameter, tuple[bool, list[Parameter]]] = {}

  def draw(self) -> bool:
    """Whether the operations came out exactly."""
    draws = self.draws
    if draws.chance(_LAST_TOTAL) and self._introduce_total():
      self.order.append(self.open_totals.pop())
    else:
      self._introduce_cell()
    while self.undefined:
      parameter = self.undefined.pop(draws.below(len(self.undefined)))
      for total in self.open_totals[:]:
        if total.place == parameter.place:
          self.open_totals.remove(total)
          self.order.append(total)
      self.started.add(parameter.place)
      self.order.append(parameter)
      self._define(parameter)
    return self.spare == 0

  def _define(self, parameter):
    draws = self.draws
    others = self.undefined + self.open_totals
    # Nothing but a leaf can be defined last, and then nothing must be spare.
    extra = draws.streak(
      min(_MOST_EXTRA_EDGES, self.spare if others else self.spare - 1)
    )
    if extra:
      constant = draws.chance(0.5)
    else:
      constant = draws.chance(_LEAF) if others else not self.spare
    self.spare -= extra
    operands = []
    for _ in range(1 + extra - constant):
      new = None
      if self.spare and (not others or draws.chance(_NEW_OPERAND)):
        new = self._introduce()
      if new:
        operands.append(new)
      elif others:
        operands.append(others.pop(draws.below(len(others))))
      else:
        self.spare += 1
    if not operands and not constant:
      constant = True
      self.spare -= 1
    self.inputs[parameter] = constant, operands

  def _introduce(self) -> Parameter | None:
    total = self.draws.chance(_NEW_TOTAL) and self._introduce_total()
    return total or self._introduce_cell()

  def _introduce_cell(self) -> Parameter | None:
    for parameter in self.free:
      if parameter not in self.introduced:
        self.introduced.add(parameter)
        self.undefined.append(parameter)
        self.spare -= 1
        return parameter
    return None

  def _introduce_total(self) -> Parameter | None:
    place = self.draws.below(len(self.things_of))
    total = Parameter(self.draws.choice(self.totals_of_kind), place)
    things = self.things_of[place]
    if not things or place in self.started or total in self.parts:
      return None
    kinds = (COUNT,) if total.kind == TOTAL else (COUNT, AVERAGE)
    parts = [
      tuple([Parameter(kind, place, thing) for kind in kinds])
      for thing in things
    ]
    new = [p for part in parts for p in part if p not in self.introduced]
    cost = len(parts) * len(kinds) + len(new)
    if cost > self.spare:
      return None
    self.spare -= cost
    self.introduced.update(new)
    self.undefined += new
    self.parts[total] = parts
    self.open_totals.append(total)
    return total


def _draw_values(draws, graph, inputs, config) -> bool:
  """Fills in definitions and values; whether all values are allowed."""
  values = graph.values
  for parameter in reversed(graph.order):
    if parameter in graph.parts:
      value = sum(
        math.prod([values[p] for p in part]) for part in graph.parts[parameter]
      )
    else:
      constant, operands = inputs[parameter]
      graph.definitions[parameter], value = _draw_definition(
        draws, parameter, constant, operands, values, config
      )
    if value > config.max_value or (value <= 0 and parameter.kind == COUNT):
      return False
    values[parameter] = value
  return True


def _draw_definition(draws, parameter, constant, operands, values, config):
  """A definition from its inputs, and its value."""
  largest = config.max_value
  if not operands:
    value = draws.between(1, config.max_leaf)
    return Definition((), value), value
  value = sum([values[p] for p in operands])
  difference = False
  if len(operands) == 2:
    first, second = operands
    gap = values[first] - values[second]
    difference = draws.chance(0.5) and (gap != 0 or parameter.kind == AVERAGE)
    if difference:
      value = abs(gap)
      if gap < 0:
        operands = [second, first]
  if not constant:
    return Definition(tuple(operands), 0, "", difference), value
  if draws.chance(0.5) and 2 * value <= largest:
    sign = "*"
    room = largest // value if value else _LARGEST_CONSTANT
    constant = draws.between(2, min(_LARGEST_CONSTANT, room))
    value *= constant
  else:
    sign = "+"
    room = max(1, largest - value)
    constant = draws.between(1, min(_LARGEST_CONSTANT, room))
    value += constant
  return Definition(tuple(operands), constant, sign, difference), value


def _hide_leaf(graph: Graph) -> bool:
  """Hides the last leaf that the last value is linear in; whether any is."""
  for leaf, definition in reversed(graph.definitions.items()):
    if not definition.operands:
      slopes = _slopes(graph, leaf)
      if slopes.get(graph.last):
        graph.hidden, graph.slopes = leaf, slopes
        return True
  return False


def _slopes(graph: Graph, leaf: Parameter) -> dict[Parameter, int]:
  """How each necessary value grows with the leaf; empty if not linearly."""
  slopes = {}
  for parameter in reversed(graph.order):
    slope = int(parameter == leaf)
    if parameter in graph.parts:
      for part in graph.parts[parameter]:
        growing = [p for p in part if slopes[p]]
        if len(growing) > 1:
          return {}
        for p in growing:
          fixed = math.prod([graph.values[q] for q in part if q != p])
          slope += slopes[p] * fixed
    elif operands := graph.definitions[parameter].operands:
      definition = graph.definitions[parameter]
      signs = (1, -1) if definition.difference else (1,) * len(operands)
      for sign, p in zip(signs, operands, strict=True):
        slope += sign * slopes[p]
      if definition.sign == "*":
        slope *= definition.constant
    slopes[parameter] = slope
  return slopes


def _draw_distractors(draws, graph, parameters, max_leaf):
  """Definitions of the parameters, from the core and from one another.

  A total that the core leaves alone can be an operand as soon as everything
  of its place is defined.
  """
  core, others, definitions = graph.order, [], {}
  things = {}  # by place, of each kind
  waiting = [p.place for p in parameters]
  for kind, place, thing in [*core, *parameters]:
    if kind in (COUNT, AVERAGE):
      things.setdefault(place, {COUNT: set(), AVERAGE: set()})[kind].add(thing)

  def add_totals(place):
    counts, averages = things[place].values()
    total = Parameter(TOTAL, place)
    if counts and averages <= counts and total not in graph.parts:
      others.append(total)
    total = Parameter(ATTRIBUTE_TOTAL, place)
    if counts == averages and total not in graph.parts:
      others.append(total)

  for place in things:
    if place not in waiting:
      add_totals(place)
  for parameter in parameters:
    leaf = draws.chance(_DISTRACTOR_LEAF)
    extra = 0 if leaf else draws.streak(_MOST_EXTRA_EDGES)
    constant = leaf or draws.chance(_DISTRACTOR_CONSTANT)
    operands = []
    for _ in range(1 + extra - constant):
      operand = draws.choice(others if others and draws.chance(0.5) else core)
      if operand not in operands:
        operands.append(operand)
    sign = ""
    if constant:
      sign = draws.choice("+*") if operands else ""
      limit = _LARGEST_CONSTANT if operands else max_leaf
      constant = draws.between(1 + (sign == "*"), limit)
    difference = len(operands) == 2 and draws.chance(0.5)
    definitions[parameter] = Definition(
      tuple(operands), int(constant), sign, difference
    )
    others.append(parameter)
    waiting.remove(parameter.place)
    if parameter.place not in waiting:
      add_totals(parameter.place)
  return definitions
