"""What a compiled program moves: read from its optimized HLO, loops by trips.

XLA's own `cost_analysis` counts the body of a loop once; here it counts as
often as it runs.
"""

import math
import re
from collections.abc import Mapping
from typing import NamedTuple

COLLECTIVES = (
  "all-reduce",
  "all-gather",
  "reduce-scatter",
  "all-to-all",
  "collective-permute",
)
# Bits of an element, by XLA's name for its type; those of 8 are in the name.
_BITS = dict(pred=8, c64=64, c128=128, token=0, opaque=0)
# Operations that move nothing, or are counted where they start.
_FREE = frozenset(
  """add-dependency after-all bitcast constant get-tuple-element iota
  opt-barrier parameter partition-id replica-id tuple""".split()
)
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_HEADER = re.compile(r"(ENTRY )?%?(\S+) \(.*\) -> .* \{")
_INSTRUCTION = re.compile(
  r"\s+(ROOT )?%?(\S+) = (.*?) ([\w-]+)\((.*?)\)(?:, (.*))?"
)


class Traffic(NamedTuple):
  """Bytes of one device in one call of a program.

  Attributes:
    hbm: read and written by its operations; what stays in VMEM is left out. An
      operation reads each of its operands once, of sliced ones the slice.
    collectives: sent to other devices, by kind. A ring of n devices sends of an
      array that is gathered, scattered or exchanged (n - 1) / n, and of one
      that is reduced on all twice that.
    guessed: loops whose trips depend on data; they count as told.
  """

  hbm: int = 0
  collectives: Mapping[str, float] = {}
  guessed: int = 0

  def plus(self, other: "Traffic", times: int = 1) -> "Traffic":
    """Self, and the other `times` over."""
    return Traffic(
      self.hbm + times * other.hbm,
      {
        kind: self.collectives.get(kind, 0)
        + times * other.collectives.get(kind, 0)
        for kind in {**self.collectives, **other.collectives}
      },
      self.guessed + other.guessed,
    )


class _Instruction(NamedTuple):
  name: str
  shape: str
  kind: str
  operands: tuple[str, ...]
  inside: str  # what stands between the parentheses
  rest: str  # what follows them

  def called(self, *attributes) -> list[str]:
    """The computations that these attributes name."""
    found = []
    for attribute in attributes:
      if match := re.search(
        rf"{attribute}=(\{{[^}}]*\}}|%?[\w.-]+)", self.rest
      ):
        found += re.findall(r"%?([\w.-]+)", match[1])
    return found


class _Computation(dict):
  """Instructions by name, in order; the last but for its name is `root`."""

  root: _Instruction


def traffic(text: str, devices: int = 1, unknown_trips: int = 1) -> Traffic:
  """What `jax.stages.Compiled.as_text()` moves.

  Args:
    text: optimized HLO.
    devices: of the program, where a collective names none.
    unknown_trips: of loops whose number of trips depends on data.

  Raises:
    ValueError: the text has no entry computation.
  """
  computations, entry = _parse(text)
  return _Walk(computations, devices, unknown_trips).of(entry)


def _parse(text: str) -> tuple[dict[str, _Computation], str]:
  computations: dict[str, _Computation] = {}
  entry, current = None, _Computation()
  for line in text.splitlines():
    if header := _HEADER.match(line):
      current = computations[header[2]] = _Computation()
      entry = header[2] if header[1] else entry
    elif match := _INSTRUCTION.match(line):
      root, name, shape, kind, inside, rest = match.groups()
      operands = tuple(re.findall(r"%([\w.-]+)", inside))
      instruction = _Instruction(
        name, shape, kind, operands, inside, rest or ""
      )
      current[name] = instruction
      if root:
        current.root = instruction
  if entry is None:
    raise ValueError("the text is no HLO module: it has no ENTRY computation")
  return computations, entry


def _parts(shape: str) -> list[tuple[int, bool]]:
  """(bytes, whether it lies in HBM) of each array of a shape."""
  parts = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    bits = _BITS.get(dtype)
    if bits is None:
      bits = int(re.findall(r"\d+", dtype)[0])
    count = math.prod(int(n) for n in dims.split(",") if n)
    # S(1) is VMEM, S(2) scalar memory.
    parts.append((bits * count // 8, "S(" not in layout))
  return parts


def _bytes(shape: str) -> int:
  return sum(size for size, _ in _parts(shape))


def _in_hbm(shape: str) -> int:
  return sum(size for size, there in _parts(shape) if there)


class _Walk:
  """Adds up computations, each once."""

  def __init__(self, computations, devices, unknown_trips):
    self.computations = computations
    self.devices, self.unknown_trips = devices, unknown_trips
    self.known: dict[str, Traffic] = {}

  def of(self, name: str) -> Traffic:
    if name not in self.known:
      total, channels = Traffic(), set()
      for instruction in self.computations[name].values():
        total = total.plus(
          self._instruction(self.computations[name], instruction, channels)
        )
      self.known[name] = total
    return self.known[name]

  def _instruction(self, around, instruction, channels) -> Traffic:
    kind = instruction.kind
    if kind in _FREE or kind.endswith(("-done", "-update")):
      return Traffic()
    if kind == "while":
      return self._loop(around, instruction)
    if kind == "conditional":
      branches = [
        self.of(name)
        for name in instruction.called(
          "branch_computations", "true_computation", "false_computation"
        )
      ]
      return max(branches, key=lambda x: (sum(x.collectives.values()), x.hbm))
    if kind in ("call", "async-start"):
      inner = Traffic()
      for name in instruction.called("to_apply", "calls"):
        inner = inner.plus(self.of(name))
      return inner
    if kind in ("copy-start", "slice-start"):
      # Between HBM and VMEM, of a whole or a slice: it names both ends.
      return Traffic(min(size for size, _ in _parts(instruction.shape)[:2]))
    moved = self._moved(around, instruction)
    if (name := kind.removesuffix("-start")) in COLLECTIVES:
      return Traffic(moved, {name: self._sent(around, instruction)})
    sent = Traffic()
    if kind == "fusion":
      (body,) = instruction.called("calls")
      sent = self._sent_by_fusion(body, channels)
    return sent.plus(Traffic(moved))

  # Loops.

  def _loop(self, around, loop) -> Traffic:
    (condition,), (body,) = loop.called("condition"), loop.called("body")
    trips = self._trips(around, loop, self.computations[condition])
    once = self.of(body)
    if trips is None:
      once = once._replace(guessed=once.guessed + 1)
      trips = self.unknown_trips
    return Traffic().plus(once, trips)

  def _trips(self, around, loop, condition) -> int | None:
    """Of a loop that counts up to what its start knows; None of another."""
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest):
      return int(known[1])
    compare, ends = condition.root, condition.root.operands
    if compare.kind in ("fusion", "call"):
      (name,) = compare.called("calls", "to_apply")
      inner = self.computations[name]
      compare = inner.root
      ends = [
        ends[int(inner[x].inside)] if inner[x].kind == "parameter" else None
        for x in compare.operands
      ]
    if compare.kind != "compare" or "direction=LT" not in compare.rest:
      return None

    def value(name):
      instruction = condition.get(name)
      if instruction is not None and instruction.kind == "get-tuple-element":
        (index,) = re.findall(r"index=(\d+)", instruction.rest)
        start = around[loop.operands[0]].operands
        return _constant(around, start[int(index)])
      return _constant(condition, name)

    first, last = map(value, ends)
    if first is None or last is None:
      return None
    return max(0, last - first)

  # Collectives.

  def _sent_by_fusion(self, body, channels) -> Traffic:
    """Of collectives inside a fusion.

    A TPU cuts one that runs beside other work into several fusions, all of one
    channel. A reduce-scatter is an all-reduce of which a slice is taken.
    """
    total = Traffic()
    computation = self.computations[body]
    for instruction in computation.values():
      kind = instruction.kind.removesuffix("-start")
      if kind in COLLECTIVES:
        channel = re.search(r"channel_id=(\d+)", instruction.rest)
        if channel and channel[1] in channels:
          continue
        channels.add(channel and channel[1])
        scatters = kind == "all-reduce" and body.startswith(
          "all-reduce-scatter"
        )
        sent = self._sent(computation, instruction)
        if scatters:
          kind, sent = "reduce-scatter", sent / 2
        total = total.plus(Traffic(0, {kind: sent}))
      elif instruction.kind == "fusion":
        (inner,) = instruction.called("calls")
        total = total.plus(self._sent_by_fusion(inner, channels))
    return total

  def _sent(self, around, instruction) -> float:
    kind = instruction.kind.removesuffix("-start")
    given = sum(_bytes(around[x].shape) for x in instruction.operands)
    if kind == "collective-permute":
      return float(given)
    n = self._group(instruction.rest)
    if kind == "all-gather":
      return float(given * (n - 1))
    return given * (n - 1) / n * (2 if kind == "all-reduce" else 1)

  def _group(self, rest) -> int:
    """Devices that take part in one collective."""
    if match := re.search(r"replica_groups=\[\d+,(\d+)\]", rest):
      return int(match[1])
    if match := re.search(r"replica_groups=\{\{([\d,]+)\}", rest):
      return len(match[1].split(","))
    if match := re.search(r"replica_groups=mesh\[(.*?)\] \{(.*?)\}", rest):
      sizes = dict(re.findall(r"'(\w+)'=(\d+)", match[1]))
      axes = re.findall(r"'(\w+)'", match[2])
      return math.prod(int(sizes[axis]) for axis in axes)
    return self.devices

  # Memory.

  def _moved(self, around, instruction) -> int:
    """Bytes of HBM that an instruction reads and writes."""
    shapes = [around[x].shape for x in instruction.operands if x in around]
    kind = instruction.kind
    if kind in ("dynamic-slice", "slice", "gather"):
      return _in_hbm(instruction.shape) * (2 if _in_hbm(shapes[0]) else 1)
    if kind in ("dynamic-update-slice", "scatter"):
      update = shapes[1 if kind == "dynamic-update-slice" else 2]
      return 2 * min(_bytes(update), _in_hbm(instruction.shape))
    if kind == "fusion":
      (body,) = instruction.called("calls")
      return self._moved_by_fusion(self.computations[body], shapes, instruction)
    return _in_hbm(instruction.shape) + sum(map(_in_hbm, shapes))

  def _moved_by_fusion(self, body, shapes, instruction) -> int:
    """Of operands that are only sliced, the slices; in place, the update."""
    users: dict[str, list[_Instruction]] = {}
    for inner in body.values():
      for name in inner.operands:
        users.setdefault(name, []).append(inner)

    def origin(name):
      while body[name].kind in ("bitcast", "copy", "convert", "reshape"):
        name = body[name].operands[0]
      return name

    def used(name):
      """Bytes of a parameter that its users ask for; None for all."""
      asked = 0
      for user in users.get(name, ()):
        if user.kind in ("dynamic-slice", "slice", "gather") and (
          user.operands[0] == name
        ):
          asked += _bytes(user.shape)
        elif user.kind == "bitcast":
          inner = used(user.name)
          if inner is None:
            return None
          asked += inner
        elif user.kind == "dynamic-update-slice" and user.operands[0] == name:
          asked += 0  # written in place
        else:
          return None
      return asked

    total = 0
    for inner in body.values():
      if inner.kind == "parameter":
        whole = _in_hbm(shapes[int(inner.inside)])
        asked = used(inner.name)
        total += whole if asked is None else min(whole, asked)
    root = body.root
    outputs = (
      [body[x] for x in root.operands] if root.kind == "tuple" else [root]
    )
    results = _parts(instruction.shape)
    for output, (size, there) in zip(outputs, results, strict=False):
      output = body[origin(output.name)]
      if output.kind == "dynamic-update-slice":
        size = min(size, _bytes(body[output.operands[1]].shape))
      total += size * there
    return total


def _constant(computation, name) -> int | None:
  """The integer that an instruction is known to be."""
  while (instruction := computation.get(name)) is not None:
    if instruction.kind == "constant":
      found = re.fullmatch(r"-?\d+", instruction.inside)
      return int(found[0]) if found else None
    if instruction.kind not in ("copy", "bitcast", "copy-done", "copy-start"):
      return None
    name = instruction.operands[0]
  return None
