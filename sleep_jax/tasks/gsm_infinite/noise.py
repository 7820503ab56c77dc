"""Statements about other places and things, which no answer needs."""

from collections.abc import Iterator

from sleep_jax.tasks.draws import Draws
from sleep_jax.tasks.gsm_infinite.graph import (
  AVERAGE,
  COUNT,
  TOTAL,
  Definition,
  Graph,
  Parameter,
)

_THINGS_OF_PLACE = 20
_SECOND_TOTAL = 0.25


def draw_noise(
  draws: Draws, graph: Graph, layers: int, places: range, things: range
) -> Iterator[tuple[Parameter, Definition]]:
  """Definitions of noise parameters, one after the other.

  Each takes one or two parameters of the graph; some of those with one also
  take the total of an earlier noise place. Nothing of the graph follows from
  them.

  Args:
    draws: the source of randomness.
    graph: the problem.
    layers: 2, or 3 with as many averages as numbers.
    places: the indices of the noise places.
    things: the indices of the noise things.

  Raises:
    ValueError: more is asked for than there are noise places.
  """
  known = [*graph.order, *graph.distractors]
  totals = []
  for place in draws.sample(places, len(places)):
    for thing in draws.sample(things, _THINGS_OF_PLACE):
      kind = AVERAGE if layers == 3 and draws.chance(0.5) else COUNT
      operands = [draws.choice(known)]
      if draws.chance(0.5):
        second = draws.choice(known)
        if second != operands[0]:
          operands.append(second)
      elif totals and draws.chance(_SECOND_TOTAL):
        operands.insert(draws.below(2), draws.choice(totals))
      difference = len(operands) == 2 and draws.chance(0.5)
      yield (
        Parameter(kind, place, thing),
        Definition(tuple(operands), difference=difference),
      )
    totals.append(Parameter(TOTAL, place))
  raise ValueError(
    f"noise ends after {len(places) * _THINGS_OF_PLACE} statements: lower"
    " max_tokens, or use style='prose'"
  )
