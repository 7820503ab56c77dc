"""What a task is: examples as text, made from (split, index) alone."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable


class Question(NamedTuple):
  """What is asked about a context.

  Attributes:
    answer: what must be written after the answer marker; marker and end token
      are the data pipeline's business.
    prompt: what is read just before the marker, the context being evicted.
  """

  answer: str
  prompt: str = ""


@dataclasses.dataclass(frozen=True)
class Example:
  """Answers to be given about an evicted context, as text.

  Attributes:
    context: what is read before waking (for math the question comes first).
    questions: what is asked, in order; of several, each has a prompt.
    depth: how deep the computation is: operations (math), rollout steps
      (Rule 110), hops (Depo; the most of its questions). Accuracy is reported
      by depth.
    mode: a second grouping of the report: "forward" or "reverse" (math),
      "strings" (Rule 110), "cycle" (Depo).
    source: where it stands, as an error should name it.
    answer_ends: symbols that stand at an answer's end and nowhere else in it;
      with none, an end token follows each answer.
    marker_counts: whether the marker after a prompt must be written, too.
    pass_targets: what the context's places should hold after each pass of a
      sleep: a text as long as the context for every pass, or none at all. Empty
      texts come first: they are passes that this example does not take.
  """

  context: str
  questions: Sequence[Question]
  depth: int
  mode: str
  source: str = ""
  answer_ends: Sequence[str] = ()
  marker_counts: bool = True
  pass_targets: Sequence[str] = ()


@runtime_checkable
class Task(Protocol):
  """A source of examples: a pure function of (split, index).

  Attributes:
    eval_splits: the splits that are judged, e.g. ("heldout",).
    modes: every value that `Example.mode` can take, in a fixed order.
    vocabulary: every symbol that a context or an answer can contain, in a
      fixed order: the words of `data.tokenizers.WordTokenizer`.
    text_separator: what stands between two symbols: " " or "".
  """

  @property
  def eval_splits(self) -> Sequence[str]: ...

  @property
  def modes(self) -> Sequence[str]: ...

  @property
  def vocabulary(self) -> Sequence[str]: ...

  @property
  def text_separator(self) -> str: ...

  def size(self, split: str) -> int | None:
    """Number of examples in a split; None when they never end."""
    ...

  def example(self, split: str, index: int) -> Example:
    """The example at `index` of `split` ("train" or one of eval_splits)."""
    ...


def is_stage(stage: object, holds: Callable[[Any], bool]) -> bool:
  """Whether it is a pair (1 or more examples, what `holds` accepts)."""
  return (
    isinstance(stage, tuple)
    and len(stage) == 2
    and type(stage[0]) is int
    and stage[0] >= 1
    and holds(stage[1])
  )


def in_curriculum(
  curriculum: Sequence[tuple[int, Any]], index: int, last: Any
) -> tuple[Any, int]:
  """What holds for the training example at `index`, and its place in the stage.

  Args:
    curriculum: (how many examples, what holds for them), one after the other.
    last: what holds for all others.
  """
  for examples, value in curriculum:
    if index < examples:
      return value, index
    index -= examples
  return last, index
