"""A sleep in one kernel, interpreted, against the scan over passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu

from experiments import automaton
from pallas_kernels.sleep_stack import pallas_tpu, trial
from sleep_jax import sleep
from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.model.places import init_cache, window

# Grouped-query heads, three taps, dimensions that fill no tile.
CONFIG = ModelConfig(
  pattern=((("attn", "gdn"), 1),),
  width=16,
  attention_heads=2,
  key_value_heads=1,
  fast_weight_heads=2,
  key_dim=6,
  value_dim=10,
  convolution_size=3,
  mlp_width=24,
)
SLEEP = SleepConfig()
TWO_GROUPS = dataclasses.replace(
  CONFIG,
  pattern=((("gdn",), 2), (("gdn", "attn"), 1)),
  attention_heads=4,
  key_value_heads=2,
  update_rule="delta",
)


def make(config, batch, length, passes):
  """(model, arrays as `scanned` and `one_kernel` take them)."""
  return HybridLM(config, 2), trial.inputs(config, batch, length, passes)


def scan(model, passes):
  return jax.jit(functools.partial(sleep.scanned, model, passes, SLEEP))


def kernel(model, passes):
  options = model, passes, SLEEP, pltpu.InterpretParams()
  return jax.jit(functools.partial(sleep.one_kernel, *options))


def gap(config, batch, length, passes):
  model, arrays = make(config, batch, length, passes)
  mine = kernel(model, passes)(*arrays)
  theirs = scan(model, passes)(*arrays)
  for x, y in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True):
    assert x.dtype == y.dtype and x.shape == y.shape
  return trial.difference(mine, theirs)


slow = functools.partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.parametrize(
  "config, batch, length, passes",
  [
    # Steps of 4 rows of 8 tokens: the second is half empty.
    (CONFIG, 6, 7, 3),
    slow(CONFIG, 6, 7, 1),
    slow(CONFIG, 11, 24, 3),
    slow(TWO_GROUPS, 6, 7, 3),
    slow(TWO_GROUPS, 9, 24, 1),
    # One row a group; four heads that share no tile.
    slow(dataclasses.replace(CONFIG, fast_weight_heads=4), 3, 100, 2),
  ],
)
def test_equals_the_scan(config, batch, length, passes):
  # Long windows sum more, and in another order.
  tolerance = 1e-5 if length < 100 else 5e-5
  assert gap(config, batch, length, passes) < tolerance


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 3])
def test_bfloat16_is_as_near_to_float32_as_the_scan(passes):
  """Both round, at different places: neither is the other's measure."""
  exact, arrays = make(CONFIG, 6, 7, passes)
  low = HybridLM(dataclasses.replace(CONFIG, compute_dtype="bfloat16"), 2)
  params, h, *others = arrays
  arrays = params, h.astype(jnp.bfloat16), *others
  expected = scan(exact, passes)(params, arrays[1].astype(jnp.float32), *others)
  mine = kernel(low, passes)(*arrays)
  assert mine[0].dtype == jnp.bfloat16
  error, scans = (
    trial.difference(x, expected) for x in (mine, scan(low, passes)(*arrays))
  )
  assert error < 0.01 + scans


def test_passes_that_no_row_takes_are_left_out():
  """As a session asks for: N is what rows may take at most."""
  model, (*arrays, row_passes) = make(CONFIG, 3, 7, 2)
  few = jnp.minimum(row_passes, jnp.asarray([1, 2, 0], jnp.int32))
  mine = kernel(model, 64)(*arrays, few)
  assert trial.difference(mine, scan(model, 2)(*arrays, few)) < 1e-5


def test_places_that_sleep_not_keep_h_and_write_nothing():
  model, (params, h, state, valid, _) = make(CONFIG, 3, 7, 2)
  awake = jnp.ones(3, jnp.int32)
  valid = valid.at[1].set(False)
  new_h, new_state = kernel(model, 2)(params, h, state, valid, awake)
  np.testing.assert_array_equal(
    np.asarray(new_h)[~np.asarray(valid)], np.asarray(h)[~np.asarray(valid)]
  )
  for new, old in zip(
    jax.tree.leaves(new_state), jax.tree.leaves(state), strict=True
  ):
    np.testing.assert_array_equal(new[:, 1], old[:, 1])
    assert np.abs(new[:, 0] - old[:, 0]).max() > 0.01


@pytest.mark.slow
def test_gradients_are_those_of_the_scan():
  model, arrays = make(CONFIG, 3, 7, 2)
  *primals, valid, row_passes = arrays

  def gradients(run):
    def loss(*primals):
      outputs = run(*primals, valid, row_passes)
      return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outputs))

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2)))(*primals)

  mine, theirs = (gradients(form(model, 2)) for form in (kernel, scan))
  assert trial.difference(mine, theirs) < 1e-4
  assert all(np.abs(x).max() > 0 for x in jax.tree.leaves(theirs))


class TestChoice:
  """Where the kernel serves, and where `sleep` takes it."""

  def choose(self, monkeypatch, config=CONFIG, slots=0, groups=slice(None)):
    """What `sleep` hands to the kernel, or `why_not_one_kernel`."""
    model, (params, h, state, valid, row_passes) = make(config, 2, 7, 2)
    cache = init_cache(config, 2, slots, history=False)
    monkeypatch.setattr(sleep, "one_kernel", lambda *arguments: arguments[3:5])
    if reason := sleep.why_not_one_kernel(model, params, h, cache, groups):
      return reason
    places = window(valid, 7)
    return sleep.sleep(
      *(model, params, h, state, cache, places, row_passes, 2, SLEEP)
    )

  def test_on_a_cpu_the_scan_runs(self, monkeypatch):
    assert self.choose(monkeypatch) == "there is no kernel for cpu"

  def test_where_nothing_speaks_against_it_the_kernel_runs(self, monkeypatch):
    monkeypatch.setattr(jax, "default_backend", lambda: "tpu")
    monkeypatch.setattr(trial, "verdict", lambda *_: None)
    assert self.choose(monkeypatch).h is False  # not interpreted
    assert "kept" in self.choose(monkeypatch, slots=7)
    assert "not all groups" in self.choose(monkeypatch, groups=slice(1, 2))
    other = dataclasses.replace(CONFIG, implementation="chunked_xla")
    assert "chunked_xla" in self.choose(monkeypatch, other)
    monkeypatch.setattr(trial, "verdict", lambda *_: "NaN")
    failed = self.choose(monkeypatch)
    assert failed == "the kernel failed its trial: NaN"

  @pytest.mark.parametrize(
    "changes, length, reason",
    [
      (dict(compute_dtype="float64"), 24, "compute dtype is float64"),
      (dict(width=264), 24, "D = 264 and L = 24: at most 256 and 128"),
      (dict(), 129, "D = 16 and L = 129"),
      (dict(update_rule="kda"), 24, "update rule is kda"),
      (dict(beta_range=2.0), 24, "beta_range and rope_theta are 2.0"),
      (dict(pattern=((("attn", "rnn"), 1),)), 24, "pattern has ['rnn']"),
      (dict(mlp_width=2**19), 24, "MiB of VMEM: at most 64"),
      (dict(), 128, None),
    ],
  )
  def test_says_what_it_cannot_serve(self, changes, length, reason):
    config = dataclasses.replace(CONFIG, **changes)
    served = dataclasses.replace(
      config, compute_dtype="float32", pattern=CONFIG.pattern
    )
    params = jax.eval_shape(lambda: make_params(HybridLM(served, 2)))
    found = pallas_tpu.cannot_serve(config, params, 512, length)
    assert found == reason if reason is None else reason in found

  @pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
  def test_serves_the_papers_automaton(self, dtype):
    paper = automaton.paper()
    config = dataclasses.replace(paper.model, compute_dtype=dtype)
    params = jax.eval_shape(lambda: make_params(HybridLM(config, 2)))
    for batch, length in ((512, 24), (1, 128), (512, 128)):
      assert not pallas_tpu.cannot_serve(config, params, batch, length)

  def test_a_wrong_kernel_fails_its_trial(self):
    def trusted(model, passes, config, params, h, state, valid, row_passes):
      return h, state

    def kernel(factor, model, passes, config, interpret, *arrays):
      h, state = trusted(model, passes, config, *arrays)
      return factor * h, state

    def broken(*arguments):
      raise NotImplementedError("no such thing")

    def judge(kernel):
      return trial.verdict(kernel, trusted, CONFIG, 7)

    assert judge(functools.partial(kernel, 1)) is None
    wrong = judge(functools.partial(kernel, 1.01))
    assert wrong == "h or S differs by 1.0e-02 for L = 7"
    assert "differs by nan" in judge(functools.partial(kernel, jnp.nan))
    assert judge(broken) == "NotImplementedError: no such thing"


def make_params(model):
  tokens = jnp.zeros((1, 1), jnp.int32)
  state = trial.init_fast_weights(model.config, 1)
  variables = model.init(jax.random.key(0), tokens, state, tokens == 0)
  return variables["params"]
