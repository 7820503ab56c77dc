"""Sessions on disk: to the bit, in another process, and nothing foreign."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax import session_files
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.session import Session
from sleep_jax.training.step import init_params

VOCABULARY = 7
CONFIG = ModelConfig(
  pattern=((("attn", "gdn"), 1),),
  width=8,
  attention_heads=2,
  key_value_heads=1,
  key_dim=3,
  value_dim=5,
  mlp_width=12,
)
HARD = SleepConfig(passes=2, window_length=4)
SLIDING = dataclasses.replace(HARD, eviction="sliding", carry_convolution=True)


def make():
  """(session, parameters): random ones, for what they were is no matter."""
  model = HybridLM(CONFIG, VOCABULARY)
  rng = np.random.default_rng(0)
  return Session(model, HARD), jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype),
    jax.eval_shape(lambda: init_params(model, 0)),
  )


def noise(session, batch=2, seed=0):
  """A state of numbers that no session would hold."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda x: jnp.asarray(10 * rng.normal(size=x.shape)).astype(x.dtype),
    session.start(batch),
  )


@pytest.fixture(scope="module")
def hard():
  return make()


@pytest.fixture(scope="module")
def saved(hard, tmp_path_factory):
  """(path, state)."""
  path = tmp_path_factory.mktemp("session") / "state"
  session, params = hard
  state = noise(session)
  session_files.save(path, session, params, state)
  return path, state


def assert_equal(one, other):
  assert jax.tree.structure(one) == jax.tree.structure(other)
  for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_array_equal(a, b)


def test_a_file_holds_the_whole_state_in_always_the_same_bytes(
  hard, saved, tmp_path
):
  session, params = hard
  path, state = saved
  assert_equal(session_files.load(path, session, params), state)
  later = tmp_path / "later"
  session_files.save(later, session, params, noise(session, seed=1))
  assert later.stat().st_size == path.stat().st_size
  assert [x.name for x in tmp_path.iterdir()] == ["later"]


def test_a_save_that_fails_leaves_the_file_as_it_was(
  hard, saved, tmp_path, monkeypatch
):
  session, params = hard
  path = tmp_path / "state"
  path.write_bytes(saved[0].read_bytes())

  def fails(_):
    raise OSError("disk full")

  monkeypatch.setattr(os, "fsync", fails)
  with pytest.raises(OSError, match="disk full"):
    session_files.save(path, session, params, noise(session, seed=1))
  assert path.read_bytes() == saved[0].read_bytes()
  assert [x.name for x in tmp_path.iterdir()] == ["state"]


@pytest.mark.slow
def test_another_process_goes_on(hard, tmp_path):
  session, params = hard
  tokens = np.arange(20, dtype=np.int32).reshape(2, 10) % VOCABULARY
  start = session.feed(params, session.start(2), tokens, [5, 10])
  session_files.save(tmp_path / "state", session, params, start)
  program = """
import sys
import numpy as np
from sleep_jax import session_files
from tests.test_session_files import make
session, params = make()
state = session_files.load(sys.argv[1], session, params)
tokens = np.ones((2, 10), np.int32)
state = session.feed(params, state, tokens, [7, 6])
session_files.save(sys.argv[2], session, params, state)
"""
  root = Path(__file__).parents[1]
  subprocess.run(
    [sys.executable, "-c", program, tmp_path / "state", tmp_path / "after"],
    check=True,
    env=os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(root)},
  )
  ones = np.ones((2, 10), np.int32)
  expected = session.feed(params, start, ones, [7, 6])
  there = session_files.load(tmp_path / "after", session, params)
  assert_equal(there, expected)


def test_bfloat16_is_kept_to_the_bit(hard, tmp_path):
  _, params = hard
  config = dataclasses.replace(CONFIG, compute_dtype="bfloat16")
  session = Session(HybridLM(config, VOCABULARY), SLIDING)
  state = noise(session)
  assert {str(x.dtype) for x in jax.tree.leaves(state.cache)} == {"bfloat16"}
  session_files.save(tmp_path / "state", session, params, state)
  assert_equal(session_files.load(tmp_path / "state", session, params), state)


def test_every_damage_is_refused_or_harmless(hard, saved, tmp_path):
  session, params = hard
  path, state = saved
  whole, damaged = path.read_bytes(), tmp_path / "damaged"
  for size in (0, 10, len(whole) // 2, len(whole) - 1):
    damaged.write_bytes(whole[:size])
    with pytest.raises(ValueError, match="damaged"):
      session_files.load(damaged, session, params)
  refused = 0
  places = range(7, len(whole), 47)
  for place in places:
    flipped = bytearray(whole)
    flipped[place] ^= 16
    damaged.write_bytes(flipped)
    try:
      assert_equal(session_files.load(damaged, session, params), state)
    except ValueError:  # a date in the archive may change unseen
      refused += 1
  assert refused > 0.8 * len(places)


def rewrite(path, header=None, **arrays):
  """The same file with another header or other arrays."""
  with np.load(path) as file:
    there = {name: file[name] for name in file.files}
  old = json.loads(there["header"].tobytes())
  text = json.dumps(old | (header or {})).encode()
  there["header"] = np.frombuffer(text, np.uint8)
  with open(path, "wb") as file:
    np.savez(file, **(there | arrays))


@pytest.mark.parametrize(
  "header, arrays, message",
  [
    ({"format": "other"}, {}, "not 'sleep_jax.session'"),
    ({"version": 99}, {}, "version 99"),
    ({"batch_size": 0}, {}, "batch_size = 0"),
    ({"batch_size": 3}, {}, "damaged"),
    ({"batch_size": None}, {}, "damaged"),
    ({"model.width": 16}, {}, "model.width = 16, but here it is 8"),
    ({"more": 1}, {}, "more = 1, but here it is absent"),
    ({}, {"length": np.zeros(3, np.int32)}, "damaged"),
    ({}, {"length": np.zeros(2, np.int64)}, "damaged"),
    ({}, {"length": np.array([{}, {}])}, "damaged"),
  ],
)
def test_foreign_files_are_refused(
  hard, saved, tmp_path, header, arrays, message
):
  session, params = hard
  path = tmp_path / "state"
  path.write_bytes(saved[0].read_bytes())
  rewrite(path, header, **arrays)
  with pytest.raises(ValueError, match=message):
    session_files.load(path, session, params)


def test_files_that_are_none(hard, tmp_path):
  session, params = hard
  with pytest.raises(ValueError, match="cannot be read: No such file"):
    session_files.load(tmp_path / "none", session, params)
  with pytest.raises(ValueError, match="cannot be read: Is a directory"):
    session_files.load(tmp_path, session, params)
  (tmp_path / "text").write_text("hello")
  with pytest.raises(ValueError, match="damaged, or no saved session"):
    session_files.load(tmp_path / "text", session, params)
  np.savez(tmp_path / "arrays.npz", x=np.zeros(3))
  with pytest.raises(ValueError, match="damaged, or no saved session"):
    session_files.load(tmp_path / "arrays.npz", session, params)


def test_other_models_are_refused_by_name(hard, saved):
  session, params = hard
  path, _ = saved
  config = dataclasses.replace
  for other, message in (
    (config(session, config=config(HARD, window_length=5)), "window_length"),
    (
      config(session, config=config(HARD, eviction="sliding")),
      "sleep.eviction = hard, but here it is sliding",
    ),
    (
      config(session, model=HybridLM(config(CONFIG, mlp_width=9), VOCABULARY)),
      "model.mlp_width = 12, but here it is 9",
    ),
    (config(session, model=HybridLM(CONFIG, 5)), "vocabulary_size"),
  ):
    with pytest.raises(ValueError, match=message):
      session_files.load(path, other, params)
  with pytest.raises(ValueError, match="parameters' checksum"):
    session_files.load(path, session, jax.tree.map(lambda x: x + 1, params))
  # Another number of passes goes on with the same state.
  more = config(session, config=config(HARD, passes=3))
  session_files.load(path, more, params)


def test_a_foreign_state_is_not_saved(hard, tmp_path):
  session, params = hard
  config = dataclasses.replace(CONFIG, key_dim=4)
  other = Session(HybridLM(config, VOCABULARY), HARD)
  with pytest.raises(ValueError, match="another model"):
    session_files.save(tmp_path / "state", session, params, other.start(2))
  assert not list(tmp_path.iterdir())
