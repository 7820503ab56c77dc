"""What a task is: examples as text, made from (split, index) alone."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable


@dataclasses.dataclass(frozen=True)
class Example:
  """One answer to be given about an evicted context, as text.

  Attributes:
    context: what is read before waking (for math the question comes first).
    answer: what must be written after the answer marker; the end token is
      the data pipeline's business.
    depth: how deep the computation is: operations (math), rollout steps
      (Rule 110). Accuracy is reported by depth.
    mode: a second grouping of the report: "forward" or "reverse" (math),
      "strings" (Rule 110).
    source: where it stands, as an error should name it.
  """

  context: str
  answer: str
  depth: int
  mode: str
  source: str = ""


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
