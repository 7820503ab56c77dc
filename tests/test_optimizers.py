"""Who updates what, and by how much, against numpy."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from sleep_jax.config import (
  ExperimentConfig,
  FirstStageConfig,
  ModelConfig,
  OptimizerConfig,
)
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.training import optimizers
from sleep_jax.training.step import init_params

MODEL = ModelConfig(
  width=8,
  attention_heads=2,
  key_value_heads=2,
  key_dim=4,
  value_dim=4,
  mlp_width=12,
)


def params():
  return init_params(HybridLM(MODEL, 11), 0)


def test_label_tree():
  by_label = {"muon": set(), "adamw": set()}
  for path, label in jax.tree_util.tree_leaves_with_path(
    optimizers.labels(params())
  ):
    by_label[label].add("/".join(entry.key for entry in path))
  attn, gdn = "group_0/attn_0/", "group_0/gdn_1/"
  linear = [f"mlp/{x}_proj/kernel" for x in ("gate", "up", "down")]
  attention = [f"mixer/{x}_proj/kernel" for x in "qkvo"]
  delta = [f"mixer/{x}_proj/kernel" for x in "qkvgbao"]
  norms = ["mixer_norm/scale", "mlp_norm/scale"]
  extras = [
    "mixer/qkv_conv/kernel",
    "mixer/A_log",
    "mixer/dt_bias",
    "mixer/o_norm/scale",
  ]
  assert by_label["muon"] == {
    *(attn + x for x in attention + linear),
    *(gdn + x for x in delta + linear),
  }
  assert by_label["adamw"] == {
    *(attn + x for x in norms),
    *(gdn + x for x in norms + extras),
    "embedding/embedding",
    "head/kernel",
    "final_norm/scale",
  }


def test_only_matrices_and_embeddings_decay():
  kept = {
    path[-1].key
    for path, decays in jax.tree_util.tree_leaves_with_path(
      optimizers.decayed(params())
    )
    if not decays
  }
  assert kept == {"scale", "A_log", "dt_bias"}


def test_schedule_warms_up_holds_and_decays():
  config = dataclasses.replace(
    OptimizerConfig(), warmup_fraction=0.1, decay_fraction=0.4
  )
  schedule = optimizers.schedule(config, 100)
  values = np.array([schedule(step) for step in range(101)])
  assert 0 < values[0] < 0.1
  assert np.all(np.diff(values[:11]) > 0)
  np.testing.assert_allclose(values[10:61], 1.0)
  np.testing.assert_allclose(values[80], (1 + 1e-3) / 2, rtol=1e-5)
  np.testing.assert_allclose(values[100], 1e-3, rtol=1e-5)


def newton_schulz(x):
  """Muon's five quintic steps on one matrix, in numpy float64."""
  x = x / np.linalg.norm(x)
  wide = x if x.shape[0] <= x.shape[1] else x.T
  for _ in range(5):
    gram = wide @ wide.T
    wide = 3.4445 * wide + (-4.7750 * gram + 2.0315 * gram @ gram) @ wide
  return wide if x.shape[0] <= x.shape[1] else wide.T


def test_first_update_equals_muon_by_hand():
  """One step from zero momentum, for every stacked matrix by itself."""
  config = dataclasses.replace(
    OptimizerConfig(),
    muon_learning_rate=0.1,
    weight_decay=0.5,
    warmup_fraction=0.0,
    decay_fraction=0.0,
    clip_norm=1e9,
  )
  rng = np.random.default_rng(0)
  start = params()
  gradients = jax.tree.map(
    lambda x: jnp.asarray(rng.normal(size=x.shape), x.dtype), start
  )
  optimizer = optimizers.optimizer(config, 10)
  updates, _ = jax.jit(optimizer.update)(
    gradients, optimizer.init(start), start
  )
  checked = 0
  for (path, label), update, gradient, value in zip(
    jax.tree_util.tree_leaves_with_path(optimizers.labels(start)),
    jax.tree.leaves(updates),
    jax.tree.leaves(gradients),
    jax.tree.leaves(start),
    strict=True,
  ):
    if label != "muon":
      continue
    for repeat in range(gradient.shape[0]):
      matrix = np.asarray(gradient[repeat], np.float64)
      rows, columns = matrix.shape
      # The direction of momentum is the gradient's own at the first step.
      expected = -0.1 * (
        max(1, columns / rows) ** 0.5 * newton_schulz(matrix)
        + 0.5 * np.asarray(value[repeat])
      )
      np.testing.assert_allclose(
        update[repeat], expected, atol=1e-4, err_msg=str(path)
      )
      checked += 1
  assert checked == 2 * (4 + 3 + 7 + 3)


def test_gradients_are_clipped_together():
  config = dataclasses.replace(
    OptimizerConfig(),
    adamw_learning_rate=1.0,
    warmup_fraction=0.0,
    weight_decay=0.0,
    clip_norm=1e-6,
  )
  start = params()
  optimizer = optimizers.optimizer(config, 10)
  gradients = jax.tree.map(jnp.ones_like, start)
  _, state = jax.jit(optimizer.update)(gradients, optimizer.init(start), start)
  moments = optax.tree.get(
    state, "mu", filtering=lambda path, _: "adamw" in str(path)
  )
  size = sum(x.size for x in jax.tree.leaves(start))
  np.testing.assert_allclose(
    moments["head"]["kernel"], 0.1 * 1e-6 / size**0.5, rtol=1e-4
  )


def test_what_is_not_trained_stays_and_has_no_state():
  """Not even weight decay or a share of the clipped norm."""
  config = dataclasses.replace(
    OptimizerConfig(), weight_decay=0.5, trainable="gdn_1/mixer/|head"
  )
  start = params()
  optimizer = optimizers.optimizer(config, 10)
  gradients = jax.tree.map(jnp.ones_like, start)
  state = optimizer.init(start)
  updates, _ = jax.jit(optimizer.update)(gradients, state, start)
  moved = {
    "/".join(entry.key for entry in path)
    for path, update in jax.tree_util.tree_leaves_with_path(updates)
    if np.any(update)
  }
  assert "group_0/gdn_1/mixer/A_log" in moved and "head/kernel" in moved
  assert all("gdn_1/mixer/" in name or "head/" in name for name in moved)
  whole = optimizers.optimizer(OptimizerConfig(), 10).init(start)
  sizes = [sum(x.size for x in jax.tree.leaves(s)) for s in (state, whole)]
  assert sizes[0] < 0.6 * sizes[1]
  only = optimizers.only(gradients, config.trainable)
  assert {bool(np.any(x)) for x in jax.tree.leaves(only)} == {True, False}
  assert np.all(only["head"]["kernel"] == 1)
  with pytest.raises(ValueError, match="'jet'.*finds no parameter"):
    optimizers.learns(start, "jet")


def test_biases_are_no_matrices():
  config = dataclasses.replace(MODEL, attention_bias=True)
  shapes = jax.eval_shape(lambda: init_params(HybridLM(config, 11), 0))
  labels = optimizers.labels(shapes)["group_0"]["attn_0"]["mixer"]["q_proj"]
  assert labels == {"kernel": "muon", "bias": "adamw"}


@pytest.mark.parametrize(
  "always, first, message",
  [
    ("", "inserted_jet", "'inserted_jet': it finds no parameter"),
    ("embedding", "head", "'head': nothing that it finds is found by opt"),
  ],
)
def test_a_stage_in_which_nothing_learns_is_refused(always, first, message):
  config = ExperimentConfig(
    optimizer=OptimizerConfig(trainable=always),
    first_stage=FirstStageConfig(steps=1, trainable=first),
  )
  with pytest.raises(ValueError, match=message):
    optimizers.check_stages(params(), config)
