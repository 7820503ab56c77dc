"""Rule 110: the first bit of each of several strings after t steps."""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Integer

from sleep_jax.tasks.base import Example, Question, in_curriculum, is_stage

BOUNDARIES = ("periodic", "zero")
# Strings of up to this many bits are few enough to be learnt by heart: some
# are held out.
LARGEST_SPLIT_WIDTH = 16


@dataclass(frozen=True)
class Rule110Config:
  """How many strings, how long, and how far they are rolled out.

  Raises:
    ValueError: a value is outside its limits; one line names them all.
  """

  # Name of the task in experiments.
  name: str = "rule110"
  # Bits of a string, 3..62.
  width: int = 24
  # Independent strings of an example, and labels, 1..1000.
  strings: int = 4
  # t: updates between a string and its label, 0..100,000.
  steps: int = 32
  # Training begins with other t, ((how many examples, t), ...), one after the
  # other, or with several in turn: ((40_000, 4), (20_000, (4, 6))). Other
  # run.steps or batch sizes do not stretch it.
  curriculum: tuple = ()
  # r: updates that each pass but the first should make, for sleep.pass_loss
  # with sleep.passes = 1 + steps / r, rounded up; an example of the curriculum
  # takes as many passes as its own t needs. 0 says nothing of passes.
  pass_steps: int = 0
  # What lies beyond a string's ends: its other end ("periodic") or zeros
  # ("zero"), for which the first bit soon sticks at 1.
  boundary: str = "periodic"
  # Share of all strings, by hash, that only the "heldout" split draws, where
  # width <= 16; 0 holds none out.
  heldout_fraction: float = 1 / 8

  def __post_init__(self):
    problems = [
      f"task.{field} = {getattr(self, field)!r}: {rule}"
      for field, holds, rule in (
        ("width", 3 <= self.width <= 62, "use 3..62"),
        ("strings", 1 <= self.strings <= 1000, "use 1..1000"),
        ("steps", 0 <= self.steps <= 100_000, "use 0..100000"),
        ("pass_steps", 0 <= self.pass_steps <= 100_000, "use 0..100000"),
        ("boundary", self.boundary in BOUNDARIES, f"use one of {BOUNDARIES}"),
        (
          "curriculum",
          all(is_stage(stage, _are_steps) for stage in self.curriculum),
          "use pairs of whole numbers, (1 or more examples, 0..100000 steps or "
          "several such), like ((40000, 4), (20000, (4, 6)))",
        ),
        (
          "heldout_fraction",
          self.heldout_fraction == 0
          or 2**-self.width <= self.heldout_fraction <= 0.5,
          "use 0, or a share from one string of them all to a half",
        ),
      )
      if not holds
    ]
    if problems:
      raise ValueError("; ".join(problems))
    most = max([0, *(max(_in_turn(t)) for _, t in self.curriculum)])
    if self.pass_steps and self.passes_of(most) > self.passes_of(self.steps):
      raise ValueError(
        f"task.curriculum = {self.curriculum!r}: with task.pass_steps = "
        f"{self.pass_steps} a t of {most} takes {self.passes_of(most)} passes, "
        f"more than the {self.passes_of(self.steps)} of task.steps = "
        f"{self.steps}; use smaller t"
      )

  def passes_of(self, steps: int) -> int:
    """The passes that make so many updates, `pass_steps` each but the first."""
    return 1 + math.ceil(steps / self.pass_steps)

  @property
  def splits_strings(self) -> bool:
    """Whether some strings are held out."""
    return self.width <= LARGEST_SPLIT_WIDTH and self.heldout_fraction > 0


class Rule110:
  """The task; an example depends on (seed, split, index) alone.

  Where strings are held out, "train" and "seen" draw the others and "heldout"
  draws these; else "train" and "test" draw from all.
  """

  eval_splits: Sequence[str]
  modes: Sequence[str] = ("strings",)
  vocabulary: Sequence[str] = ("0", "1")
  text_separator: str = ""

  def __init__(self, config: Rule110Config, seed: int):
    self._config = config
    self._seed = seed
    if config.splits_strings:
      seen, heldout = _split_strings(config.width, config.heldout_fraction)
      self._strings = {"train": seen, "seen": seen, "heldout": heldout}
    else:
      everything = range(2**config.width)
      self._strings = {"train": everything, "test": everything}
    self.eval_splits = tuple(self._strings)[1:]

  def size(self, split: str) -> None:
    """None: a split never ends."""
    self._strings_of(split)

  def example(self, split: str, index: int) -> Example:
    """The example at `index`: all strings in a row, and the labels in a row."""
    strings = self._strings_of(split)
    width, count = self._config.width, self._config.strings
    key = f"{self._seed} {split} {index}".encode()
    noise = hashlib.shake_128(key).digest(8 * count)
    lanes = 0
    for i in range(0, 8 * count, 8):
      uniform = int.from_bytes(noise[i : i + 8], "big")
      lanes = lanes << width | strings[uniform * len(strings) >> 64]
    steps = self._steps_of(split, index)
    boundary = self._config.boundary
    labels = _roll_out(lanes, width, count, steps, boundary)
    return Example(
      context=f"{lanes:0{width * count}b}",
      questions=(Question(f"{labels:0{width * count}b}"[::width]),),
      depth=steps,
      mode="strings",
      pass_targets=self._pass_targets(lanes, steps),
    )

  def _pass_targets(self, lanes: int, steps: int) -> list[str]:
    """The strings after each pass, moved on; the first pass only reads.

    An easier example takes fewer passes.
    """
    config = self._config
    if not config.pass_steps:
      return []
    shape = config.width, config.strings
    made, texts = 0, []
    for n in range(config.passes_of(steps)):
      more = min(n * config.pass_steps, steps) - made
      lanes = _roll_out(lanes, *shape, more, config.boundary)
      made += more
      texts.append(
        _rotated(f"{lanes:0{math.prod(shape)}b}", config.width, made)
      )
    return [""] * (config.passes_of(config.steps) - len(texts)) + texts

  def _steps_of(self, split: str, index: int) -> int:
    config = self._config
    if split != "train":
      return config.steps
    steps, index = in_curriculum(config.curriculum, index, config.steps)
    steps = _in_turn(steps)
    return steps[index % len(steps)]

  def _strings_of(self, split: str) -> Sequence[int]:
    if split not in self._strings:
      raise ValueError(f"split {split!r}: use one of {tuple(self._strings)}")
    return self._strings[split]


def _in_turn(steps: Any) -> tuple:
  return steps if isinstance(steps, tuple) else (steps,)


def _are_steps(steps: Any) -> bool:
  return bool(_in_turn(steps)) and all(
    type(t) is int and 0 <= t <= 100_000 for t in _in_turn(steps)
  )


def rollout(
  bits: Integer[np.ndarray, "*strings width"],
  steps: int,
  boundary: str = "periodic",
) -> Integer[np.ndarray, "*strings width"]:
  """The bits of every string after `steps` updates by Rule 110.

  A bit becomes (it or its right neighbour) and not (it and both neighbours);
  bit 0 is the leftmost.

  Raises:
    ValueError: `boundary` is none of BOUNDARIES.
  """
  if boundary not in BOUNDARIES:
    raise ValueError(f"boundary {boundary!r}: use one of {BOUNDARIES}")
  width = bits.shape[-1]
  lanes = int.from_bytes(np.packbits(bits, axis=None).tobytes(), "big")
  spare = -bits.size % 8
  lanes = _roll_out(lanes >> spare, width, bits.size // width, steps, boundary)
  packed = (lanes << spare).to_bytes((bits.size + spare) // 8, "big")
  flat = np.unpackbits(np.frombuffer(packed, np.uint8), count=bits.size)
  return flat.reshape(bits.shape).astype(bits.dtype)


def _roll_out(
  lanes: int, width: int, count: int, steps: int, boundary: str
) -> int:
  """`count` strings of `width` bits, side by side in one integer, updated.

  The first bit of the first string is the most significant.
  """
  everything = 2 ** (width * count) - 1
  last = everything // (2**width - 1)  # the last bit of every string
  first = last << (width - 1)
  not_last, not_first = everything ^ last, everything ^ first
  for _ in range(steps):
    left = lanes >> 1 & not_first
    right = lanes << 1 & not_last
    if boundary == "periodic":
      left |= (lanes & last) << (width - 1)
      right |= (lanes & first) >> (width - 1)
    lanes = (lanes | right) & ~(left & lanes & right)
  return lanes


def _rotated(text: str, width: int, places: int) -> str:
  """Each string moved to the right, its end coming in at its start.

  By a place for each update: so what a bit becomes hangs only on places up to
  where it then stands, which attention sees, and on the string's end, which S
  holds from the pass before, where a window holds the whole string.
  """
  start = -places % width
  strings = [text[i : i + width] for i in range(0, len(text), width)]
  return "".join(string[start:] + string[:start] for string in strings)


def _split_strings(
  width: int, heldout_fraction: float
) -> tuple[list[int], list[int]]:
  """(seen, heldout): all strings, divided by a hash of the string alone."""
  by_hash = sorted(
    range(2**width),
    key=lambda string: hashlib.blake2b(
      f"{string:0{width}b}".encode(), digest_size=8
    ).digest(),
  )
  heldout = round(2**width * heldout_fraction)
  return by_hash[heldout:], by_hash[:heldout]
