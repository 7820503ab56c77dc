"""Answers read from the text of a problem alone.

The judge of the generator and of files: it reads sentences, knows nothing of
how they were made and shares no code with the modules that make them. Both
styles are read into the same statements; quantities are then resolved lazily
from the asked one, so that contradictions among irrelevant statements are
harmless. In a reverse problem every quantity is a linear form a * x + b of the
hidden one.

A total ranges over the things whose number in the place is mentioned; what is
not mentioned counts as zero. A total of an attribute (children, teachers,
nominations) is the sum of number times average.
"""

import re
from typing import NamedTuple

_CONSTANT = re.compile(r"-?\d+")
_SENTENCE_END = re.compile(r"\.(?:\s+(?=The )|\s*$)")
_NEXT_NAME = re.compile(
  r"(?:, and |, | and )(?=the (?:number|total number|average number) of )"
)
_ATTRIBUTES = ("newborn", "teachers", "movie nominations")
_SIGNS = {"+": "plus", "*": "times"}


class Unsolvable(ValueError):
  """The text does not determine the answer; the message says why."""


class Name(NamedTuple):
  """A quantity; `thing` is empty for a total over the things of a place."""

  kind: str  # "number" or "attribute" (an average, or a total of it)
  thing: str
  place: str


class Equation(NamedTuple):
  """A signed sum of operands that `constant` is added to or multiplied with.

  Without operands it is the constant; without sign it has none.
  """

  constant: int
  sign: str  # "", "plus" or "times"
  operands: tuple[tuple[int, Name], ...]  # (+1 or -1, name)

  @property
  def edges(self) -> int:
    return len(self.operands) + (bool(self.sign) or not self.operands)


Form = tuple[int, int]  # (a, b) stands for a * x + b
# A name with what it equals; None for a hidden one.
Statement = tuple[Name, Equation | None]


class _World:
  """The statements of one problem, and the question."""

  def __init__(self, problem: str, question: str):
    read = _read_terse if question.lstrip().startswith("?") else _read_prose
    self.asked, statements = read(problem, question)
    self.equations: dict[Name, list[Equation]] = {}
    self.hidden: set[Name] = set()
    self.mentioned = {self.asked: None}
    for name, equation in statements:
      self.mentioned[name] = None
      if equation is None:
        self.hidden.add(name)
        continue
      for _, operand in equation.operands:
        self.mentioned[operand] = None
      known = self.equations.setdefault(name, [])
      if equation not in known:
        known.append(equation)
    self.reverse = self.asked in self.hidden
    self.forms: dict[Name, Form] = {}
    self.pending: set[Name] = set()

  def form(self, name: Name) -> Form:
    """The quantity as a linear form of the hidden one."""
    if name not in self.forms:
      if name in self.pending:
        raise Unsolvable(f"{name} depends on itself")
      self.pending.add(name)
      self.forms[name] = self._resolve(name)
      self.pending.remove(name)
    return self.forms[name]

  def definitions(self, name: Name) -> list[Equation]:
    """The equations that define the quantity: given values set apart."""
    equations = self.equations.get(name, [])
    if self.reverse and len(equations) > 1:
      return [equation for equation in equations if equation.operands]
    return equations

  def _resolve(self, name: Name) -> Form:
    if name in self.hidden:
      if name != self.asked:
        raise Unsolvable(f"{name} is hidden too")
      return 1, 0
    if not name.thing:
      return self._total(name)
    definitions = self.definitions(name)
    if not definitions:
      raise Unsolvable(f"{name} is not stated")
    forms = {self.evaluate(equation) for equation in definitions}
    if len(forms) > 1:
      raise Unsolvable(f"{name} is stated in contradictory ways")
    return forms.pop()

  def _total(self, name: Name) -> Form:
    slope = offset = 0
    for part in self.parts(name):
      a, b = _product([self.form(factor) for factor in part])
      slope, offset = slope + a, offset + b
    return slope, offset

  def parts(self, total: Name) -> list[list[Name]]:
    """The summands of a total, each as its stated factors."""
    numbers = [
      name
      for name in self.mentioned
      if name.place == total.place and name.thing and name.kind == "number"
    ]
    if total.kind == "number":
      return [[number] for number in numbers]
    averages = [number._replace(kind="attribute") for number in numbers]
    return [
      [number, average]
      for number, average in zip(numbers, averages, strict=True)
      if average in self.mentioned
    ]

  def evaluate(self, equation: Equation) -> Form:
    if not equation.operands:
      return 0, equation.constant
    slope = offset = 0
    for sign, operand in equation.operands:
      a, b = self.form(operand)
      slope, offset = slope + sign * a, offset + sign * b
    if equation.sign == "times":
      return slope * equation.constant, offset * equation.constant
    return slope, offset + equation.constant

  def given(self) -> list[tuple[Name, int]]:
    """The quantities of a reverse problem that are defined and given."""
    return [
      (name, equation.constant)
      for name, equations in self.equations.items()
      for equation in equations
      if not equation.operands
      and (not name.thing or name in self.hidden or len(equations) > 1)
    ]


def solve(problem: str, question: str) -> int:
  """The answer, from the text of a problem in either style.

  Args:
    problem: the statements, in any order, without preamble.
    question: the question.

  Raises:
    Unsolvable: the text cannot be read, or does not determine the answer.
  """
  try:
    return _solve(_World(problem, question))
  except RecursionError:
    raise Unsolvable("its chain of statements is too long") from None


def _solve(world: _World) -> int:
  if not world.reverse:
    return world.form(world.asked)[1]
  answers = set()
  for name, value in world.given():
    slope, offset = world.form(name)
    if slope == 0 and offset != value:
      raise Unsolvable(f"{name} is {offset}, but given as {value}")
    if slope:
      answer, rest = divmod(value - offset, slope)
      if rest:
        raise Unsolvable(f"{world.asked} would be no integer")
      answers.add(answer)
  if len(answers) != 1:
    found = f"{len(answers)} values" if answers else "no value"
    raise Unsolvable(f"the given values leave {found} for {world.asked}")
  return answers.pop()


def count_operations(problem: str, question: str) -> int:
  """The operations of a problem: in-edges of its necessary quantities.

  Each operand and each constant of a necessary statement is one, and so is
  each number and each average that a necessary total ranges over. The hidden
  quantity of a reverse problem is a constant.

  Raises:
    Unsolvable: as `solve` does.
  """
  world = _World(problem, question)
  waiting = [world.asked]
  if world.reverse:
    waiting = [name for name, _ in world.given() if world.form(name)[0]]
  necessary: set[Name] = set()
  operations = 0
  while waiting:
    name = waiting.pop()
    if name in necessary:
      continue
    necessary.add(name)
    if name in world.hidden:
      operations += 1
      continue
    if name.thing:
      equation = world.definitions(name)[0]
      operations += equation.edges
      waiting += [operand for _, operand in equation.operands]
    else:
      factors = sum(world.parts(name), [])
      operations += len(factors)
      waiting += factors
  return operations


def _product(forms: list[Form]) -> Form:
  (a, b), *others = forms
  for c, d in others:
    if a and c:
      raise Unsolvable("not linear in the hidden quantity")
    a, b = a * d + c * b, b * d
  return a, b


# --- prose ---


def _read_prose(problem: str, question: str) -> tuple[Name, list[Statement]]:
  statements: list[Statement] = []
  for sentence in _SENTENCE_END.split(problem.strip()):
    if not sentence:
      continue
    if sentence.endswith(" greater than 0"):
      left = re.sub(
        r"( exists, and its number)? is greater than 0$", "", sentence
      )
      statements.append((_prose_name(left), None))
      continue
    left, equals, right = sentence.partition(" equals ")
    if not equals:
      raise Unsolvable(f"no statement: {sentence!r}")
    statements.append((_prose_name(left), _prose_equation(right)))
  asked = re.fullmatch(r"How many (.+) does (.+) have\?", question.strip())
  if asked:
    return Name("number", *asked.groups()), statements
  asked = re.fullmatch(r"What is (the .+)\?", question.strip())
  if not asked:
    raise Unsolvable(f"no question: {question!r}")
  return _prose_name(asked[1]), statements


def _prose_name(text: str) -> Name:
  match = re.fullmatch(
    r"[Tt]he (?:(total|average) )?number of (.+?) in (.+)", text
  )
  if not match:
    raise Unsolvable(f"no name: {text!r}")
  qualifier, things, place = match.groups()
  if qualifier == "average":
    return Name("attribute", things.partition(" per ")[2], place)
  if qualifier == "total":
    kind = "attribute" if things.startswith(_ATTRIBUTES) else "number"
    return Name(kind, "", place)
  return Name("number", things, place)


def _prose_equation(text: str) -> Equation:
  if _CONSTANT.fullmatch(text):
    return Equation(int(text), "", ())
  constant, sign = 0, ""
  match = re.fullmatch(r"(\d+) (plus|times) (.+)", text)
  if match:
    constant, sign, text = int(match[1]), match[2], match[3]
  last_sign = 1
  if text.startswith("the sum of "):
    text = text.removeprefix("the sum of ")
  elif text.startswith("the difference between "):
    text = text.removeprefix("the difference between ")
    last_sign = -1
  names = [_prose_name(name) for name in _NEXT_NAME.split(text)]
  if last_sign == -1 and len(names) != 2:
    raise Unsolvable(f"no difference of two: {text!r}")
  signs = [1] * (len(names) - 1) + [last_sign]
  return Equation(constant, sign, tuple(zip(signs, names, strict=True)))


# --- terse ---


def _read_terse(problem: str, question: str) -> tuple[Name, list[Statement]]:
  statements: list[Statement] = []
  for sentence in problem.split(" ."):
    if not sentence.strip():
      continue
    left, equals, right = sentence.partition(" = ")
    if equals:
      statements.append((_terse_name(left), _terse_equation(right)))
    elif left.endswith(" > 0"):
      statements.append((_terse_name(left.removesuffix(" > 0")), None))
    else:
      raise Unsolvable(f"no statement: {sentence!r}")
  return _terse_name(question.replace("?", "").replace(".", "")), statements


def _terse_name(text: str) -> Name:
  match text.split():
    case ["total", "per", place]:
      return Name("attribute", "", place)
    case ["total", place]:
      return Name("number", "", place)
    case ["per", thing, place]:
      return Name("attribute", thing, place)
    case [thing, place]:
      return Name("number", thing, place)
  raise Unsolvable(f"no name: {text!r}")


def _terse_equation(text: str) -> Equation:
  if _CONSTANT.fullmatch(text):
    return Equation(int(text), "", ())
  constant, sign = 0, ""
  match = re.fullmatch(r"(\d+) ([+*]) (.+)", text)
  if match:
    constant, sign, text = int(match[1]), _SIGNS[match[2]], match[3]
    if re.search(r" [+-] ", text):
      bracketed = re.fullmatch(r"\( (.+) \)", text)
      if not bracketed:
        raise Unsolvable(f"no brackets: {text!r}")
      text = bracketed[1]
  first, *others = re.split(r" ([+-]) ", text)
  operands = [(1, _terse_name(first))]
  for operator, name in zip(others[::2], others[1::2], strict=True):
    operands.append((1 if operator == "+" else -1, _terse_name(name)))
  return Equation(constant, sign, tuple(operands))
