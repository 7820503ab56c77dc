"""Baselines: what they are, that they cost what they say, and that they run."""

import dataclasses
import functools

import pytest

from experiments import automaton, math
from sleep_jax import baselines
from sleep_jax.baselines import BASELINES, train_step_flops
from sleep_jax.config import from_config_dict
from sleep_jax.data.source import task_and_tokenizer
from sleep_jax.training import loop

MATCHED = ("deeper", "wider", "longer")
TINY = automaton.tiny()
# Attention alone sleeps to no avail, but is traced in half the time.
QUICK = dataclasses.replace(
  TINY, model=dataclasses.replace(TINY.model, pattern=((("attn",), 1),))
)


@functools.cache
def baseline(name, config=TINY):
  return BASELINES[name](config)


def changed(config, other):
  """The leaves in which two configs differ, as "section.leaf"."""
  one, other = dataclasses.asdict(config), dataclasses.asdict(other)
  return {
    f"{section}.{leaf}"
    for section, leaves in one.items()
    for leaf, value in leaves.items()
    if value != other[section][leaf]
  }


def run_flops(config):
  vocabulary = task_and_tokenizer(config)[1].vocab_size
  return config.run.steps * train_step_flops(config, vocabulary).total


BOTH = pytest.mark.parametrize(
  "config", [QUICK, pytest.param(TINY, marks=pytest.mark.slow)]
)


@BOTH
@pytest.mark.parametrize("name", MATCHED)
def test_training_costs_the_same_to_within_two_percent(name, config):
  assert config.sleep.passes == 4
  target = run_flops(config)
  assert run_flops(baseline("hybrid", config)) < 0.5 * target
  assert run_flops(baseline(name, config)) == pytest.approx(target, rel=0.02)


@BOTH
def test_each_matched_baseline_grows_in_its_own_way(config):
  deeper, wider, longer = (baseline(name, config) for name in MATCHED)
  assert changed(deeper, config) == {
    "model.pattern",
    "model.mlp_width",
    "sleep.passes",
  }
  ((kinds, repeats),) = deeper.model.pattern
  assert kinds == config.model.pattern[0][0] and repeats > 1
  assert changed(wider, config) == {
    "model.width",
    "model.key_dim",
    "model.value_dim",
    "model.mlp_width",
    "sleep.passes",
  }
  assert wider.model.width > 1.5 * config.model.width
  # Its proportions stay, but for what makes up the cost.
  scale = wider.model.width / config.model.width
  assert wider.model.key_dim == round(scale * config.model.key_dim)
  assert wider.model.mlp_width / config.model.mlp_width == pytest.approx(
    scale, rel=0.35
  )
  assert changed(longer, config) == {"run.steps", "sleep.passes"}
  assert longer.run.steps > 2 * config.run.steps
  for variant in deeper, wider, longer:
    assert variant.sleep.passes == 1


@pytest.mark.parametrize("power", [1, 2, 3])
@pytest.mark.parametrize("start", [1, 7, 500])
def test_the_search_comes_as_near_as_integers_do(power, start):
  """Against trying them all; within 0.2% there is no need to go on."""

  def cost(x):
    return 1000 + x**power

  for target in (900, 1001, 1030, 5000, 123_456):
    found = baselines._nearest(cost, target, start)
    best = min(range(1, 130_000), key=lambda x: abs(cost(x) - target))
    assert found == best or abs(cost(found) / target - 1) < 0.002


def test_the_unmatched_baselines():
  assert changed(baseline("hybrid"), TINY) == {"sleep.passes"}
  transformer = baseline("transformer")
  assert changed(transformer, TINY) == {"sleep.passes", "model.pattern"}
  assert transformer.model.pattern == ((("attn", "attn"), 1),)
  full_cache = baseline("full_cache")
  assert changed(full_cache, transformer) == {"sleep.eviction"}
  for name in ("hybrid", "transformer", "full_cache"):
    assert baseline(name).sleep.passes == 1


def test_a_loss_of_passes_goes_with_the_passes():
  sleep = dataclasses.replace(TINY.sleep, pass_loss=1.0)
  told = dataclasses.replace(TINY, sleep=sleep)
  for name in ("hybrid", "transformer", "full_cache"):
    assert BASELINES[name](told) == baseline(name)


def test_a_model_without_sleep_matches_itself():
  once = BASELINES["hybrid"](QUICK)
  for name in MATCHED:
    assert BASELINES[name](once) == once


def test_what_cannot_be_matched_is_told_with_its_numbers(monkeypatch):
  no_steps = dataclasses.replace(
    TINY, run=dataclasses.replace(TINY.run, steps=0)
  )
  with pytest.raises(ValueError, match="run.steps = 0: .* at least 1"):
    BASELINES["longer"](no_steps)
  monkeypatch.setattr(baselines, "TOLERANCE", 1e-9)
  with pytest.raises(ValueError, match=r"FLOPs.*run.steps = \d+.*e\+\d+: not"):
    BASELINES["longer"](QUICK)


def test_a_comma_names_a_variant():
  selected = from_config_dict(automaton.get_config("tiny,transformer,hybrid"))
  assert selected == BASELINES["transformer"](TINY)
  selected = from_config_dict(math.get_config("tiny,full_cache"))
  assert selected == BASELINES["full_cache"](math.tiny())
  with pytest.raises(ValueError, match="unknown variant 'taller'.*'deeper'"):
    automaton.get_config("tiny,taller")
  with pytest.raises(ValueError, match="unknown size 'deeper'.*'tiny'"):
    automaton.get_config("deeper")
  # A file of sizes may have variants of its own.
  selected = from_config_dict(math.get_config("ouro_1_4b,sliding,hybrid"))
  assert (selected.sleep.passes, selected.sleep.window_length) == (1, 512)


@pytest.mark.slow
@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_trains(name, tmp_path):
  config = baseline(name)
  run = dataclasses.replace(config.run, steps=1, evaluation_examples=32)
  results = loop.train(dataclasses.replace(config, run=run), tmp_path)
  assert set(results) == {"seen", "heldout"}
