import subprocess
import sys

import numpy as np
import pytest

from sleep_jax.data.tokenizers import (
  FileTokenizer,
  WordTokenizer,
  make_tokenizer,
)

WORDS = ["Pine", "Ridge", "equals", "3", ".", "How", "many", "?", "x.5"]


def test_words_are_numbered_after_the_special_tokens():
  tokenizer = WordTokenizer(WORDS)
  assert (tokenizer.pad_id, tokenizer.marker_id, tokenizer.end_id) == (0, 1, 2)
  assert tokenizer.vocab_size == 12
  ids = tokenizer.encode("Pine Ridge equals 3. How many?")
  assert ids == [3, 4, 5, 6, 7, 8, 9, 10]
  assert tokenizer.encode("x.5 .") == [11, 7]
  assert tokenizer.decode([0, 1, *ids, 2]) == "Pine Ridge equals 3 . How many ?"
  assert tokenizer.encode("") == []


def test_symbols_of_one_character_need_no_separator():
  tokenizer = WordTokenizer(("0", "1"), separator="")
  assert tokenizer.encode("0110") == [3, 4, 4, 3]
  assert tokenizer.decode([3, 4, 4, 3, tokenizer.end_id]) == "0110"
  assert tokenizer.vocab_size == 5


def test_a_task_is_read_by_words_or_by_characters():
  words = make_tokenizer("words", ("ab", "ba", "?"), " ")
  assert words.encode("ba ab?") == [4, 3, 5]
  characters = make_tokenizer("characters", ("ab", "ba", "?"), " ")
  assert characters.vocab_size == 3 + len(" ?ab")
  text = "ab ba ?"
  ids = characters.encode(text)
  assert len(ids) == len(text)
  assert characters.decode(ids) == text
  bits = make_tokenizer("characters", ("0", "1"), "")
  assert bits.encode("01") == make_tokenizer("words", ("0", "1"), "").encode(
    "01"
  )


def test_unknown_symbols_are_named():
  with pytest.raises(ValueError, match="'Lake' is not in the vocabulary"):
    WordTokenizer(WORDS).encode("Pine Lake equals 3")
  with pytest.raises(ValueError, match="'2' is not in the vocabulary"):
    WordTokenizer(("0", "1"), "").encode("012")


def test_bad_vocabularies_are_named():
  with pytest.raises(ValueError, match="twice: name each once"):
    WordTokenizer(["a", "b", "a"])
  with pytest.raises(ValueError, match="'3.' in the vocabulary is not one"):
    WordTokenizer(["3."])
  with pytest.raises(ValueError, match="'ab' in the vocabulary is not one"):
    WordTokenizer(["ab"], separator="")


@pytest.fixture
def tokenizers():
  return pytest.importorskip("tokenizers")


def save(tokenizers, path, model):
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
  tokenizer.add_special_tokens(["<start>"])
  tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
    single="<start> $A", special_tokens=[("<start>", 3)]
  )
  tokenizer.save(str(path))
  return path


def test_special_tokens_follow_those_of_a_file(tokenizers, tmp_path):
  model = tokenizers.models.WordLevel({"owl": 0, "fox": 1, "?": 2}, "?")
  path = save(tokenizers, tmp_path / "tokenizer.json", model)
  tokenizer = make_tokenizer(str(path), ("unused",), " ")
  assert tokenizer.encode("fox owl fox") == [1, 0, 1]
  assert (tokenizer.pad_id, tokenizer.marker_id, tokenizer.end_id) == (4, 5, 6)
  assert tokenizer.vocab_size == 7
  ids = np.array([4, 1, 0, 5, 3, 6], np.int32)
  assert tokenizer.decode(ids) == "fox owl <start>"


def test_what_a_file_does_not_know_is_named(tokenizers, tmp_path):
  words = tokenizers.models.WordLevel({"owl": 0, "fox": 1, "?": 2}, "?")
  path = save(tokenizers, tmp_path / "words.json", words)
  with pytest.raises(ValueError, match="'emu' is unknown"):
    FileTokenizer(path).encode("fox emu owl")
  pairs = tokenizers.models.BPE({"a": 0, "b": 1, "ab": 2}, [("a", "b")])
  path = save(tokenizers, tmp_path / "pairs.json", pairs)
  assert FileTokenizer(path).encode("ab ba") == [2, 1, 0]
  for text in ("abq b", "q ab", "ab bq"):
    with pytest.raises(ValueError, match="'q' is unknown"):
      FileTokenizer(path).encode(text)


def test_unreadable_files_are_named(tokenizers, tmp_path):
  with pytest.raises(ValueError, match="missing.json is no readable"):
    FileTokenizer(tmp_path / "missing.json")
  (tmp_path / "cut.json").write_text('{"version": "1.0"')
  with pytest.raises(ValueError, match="cut.json is no readable"):
    FileTokenizer(tmp_path / "cut.json")


def test_the_missing_package_is_named(monkeypatch):
  monkeypatch.setitem(sys.modules, "tokenizers", None)
  with pytest.raises(ValueError, match=r"install sleep_jax\[hf\]"):
    FileTokenizer("tokenizer.json")


def test_text_needs_no_jax():
  command = (
    "import sys, sleep_jax.data.tokenizers; sys.exit('jax' in sys.modules)"
  )
  assert subprocess.run([sys.executable, "-c", command]).returncode == 0
