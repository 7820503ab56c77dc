"""Text to token ids and back: whole words, characters, or a tokenizer.json."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Integer

from sleep_jax.tasks.gsm_infinite.text import split_words

SPECIAL_TOKENS = 3

_Ids: TypeAlias = Sequence[int] | Integer[np.ndarray, "T"]


@runtime_checkable
class Tokenizer(Protocol):
  """What turns text into ids.

  Attributes:
    vocab_size: number of ids, the three special ones included.
    pad_id: fills a row's unused places.
    marker_id: asks for the answer.
    end_id: ends the answer.
  """

  vocab_size: int
  pad_id: int
  marker_id: int
  end_id: int

  def encode(self, text: str) -> list[int]:
    """The ids of a text; a ValueError names a symbol that has none."""
    ...

  def decode(self, ids: _Ids) -> str:
    """The text of some ids; special tokens have none."""
    ...


class WordTokenizer:
  """Ids of whole symbols: special tokens first, then the vocabulary.

  Args:
    vocabulary: every symbol, each once.
    separator: " " between words (punctuation at a word's end is a word of its
      own), or "" between symbols of one character.

  Example:
    >>> tokenizer = WordTokenizer(["How", "many", "owl", "?"])
    >>> tokenizer.encode("How many owl?")
    [3, 4, 5, 6]
    >>> tokenizer.decode([3, 4, 5, 6, tokenizer.end_id])
    'How many owl ?'
  """

  pad_id, marker_id, end_id = range(SPECIAL_TOKENS)

  def __init__(self, vocabulary: Sequence[str], separator: str = " "):
    self._words = list(vocabulary)
    self._split = split_words if separator else list
    self._separator = separator
    self._ids = {word: i for i, word in enumerate(vocabulary, SPECIAL_TOKENS)}
    for word in vocabulary:
      if self._split(word) != [word]:
        raise ValueError(
          f"{word!r} in the vocabulary is not one symbol: with separator"
          f" {separator!r} it reads as {self._split(word)}"
        )
    if len(self._ids) < len(self._words):
      raise ValueError("a word stands in the vocabulary twice: name each once")
    self.vocab_size = len(self._words) + SPECIAL_TOKENS

  def encode(self, text: str) -> list[int]:
    """The ids of a text.

    Raises:
      ValueError: a symbol is not in the vocabulary.
    """
    try:
      return [self._ids[word] for word in self._split(text)]
    except KeyError as error:
      raise ValueError(
        f"{error.args[0]!r} is not in the vocabulary of {len(self._words)}"
        " symbols"
      ) from None

  def decode(self, ids: _Ids) -> str:
    """The text of some ids; special tokens have none."""
    words = [self._words[i - SPECIAL_TOKENS] for i in ids if i > self.end_id]
    return self._separator.join(words)


class FileTokenizer:
  """The tokenizer of a tokenizer.json; special tokens after its vocabulary.

  The file's own special tokens are never added to a text.
  """

  def __init__(self, path: str | Path):
    """Reads the file; needs `pip install 'sleep_jax[hf]'`.

    Raises:
      ValueError: the file is missing or not a tokenizer.json, or the package
        `tokenizers` is not installed.
    """
    try:
      import tokenizers
    except ImportError as error:
      raise ValueError(
        f"reading {path} needs the package tokenizers: install sleep_jax[hf]"
      ) from error
    try:
      self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises nothing narrower
      raise ValueError(
        f"{path} is no readable tokenizer.json: {error}"
      ) from error
    vocabulary = self._tokenizer.get_vocab()
    unknown = getattr(self._tokenizer.model, "unk_token", None)
    self._known = vocabulary.keys() - {unknown}
    self._size = 1 + max(vocabulary.values())
    self.pad_id, self.marker_id, self.end_id = range(
      self._size, self._size + SPECIAL_TOKENS
    )
    self.vocab_size = self._size + SPECIAL_TOKENS

  def encode(self, text: str) -> list[int]:
    """The ids of a text.

    Raises:
      ValueError: a part of it, not a space, is unknown to the tokenizer; many
        tokenizers would leave it out in silence.
    """
    encoding = self._tokenizer.encode(text, add_special_tokens=False)
    known = [
      place
      for token, place in zip(encoding.tokens, encoding.offsets, strict=True)
      if token in self._known
    ]
    end = 0
    for start, stop in [*known, (len(text), len(text))]:
      if start > end and not text[end:start].isspace():
        raise ValueError(
          f"{text[end:start].strip()!r} is unknown to the tokenizer"
        )
      end = stop
    return encoding.ids

  def decode(self, ids: _Ids) -> str:
    """The text of some ids; the three special tokens have none."""
    return self._tokenizer.decode(
      [int(i) for i in ids if i < self._size], skip_special_tokens=False
    )


def make_tokenizer(
  kind: str, vocabulary: Sequence[str], separator: str
) -> Tokenizer:
  """The tokenizer that a config names, for a task's vocabulary.

  Args:
    kind: "words" (an id for each symbol of the vocabulary), "characters" (an
      id for each character that occurs in it), or the path of a tokenizer.json.
    vocabulary: `Task.vocabulary`.
    separator: `Task.text_separator`.
  """
  if kind == "words":
    return WordTokenizer(vocabulary, separator)
  if kind == "characters":
    return WordTokenizer(sorted({*"".join(vocabulary), *separator}), "")
  return FileTokenizer(kind)
