"""The Gated DeltaNet layer against stored answers of independent code."""

import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.config import ModelConfig
from sleep_jax.model.fast_weights import GatedDeltaNet

GOLDENS = pathlib.Path(__file__).parents[2] / "shared" / "goldens"


def test_gated_delta_net_layer_equals_stored_answers():
  path = GOLDENS / "gdn_layer.npz"
  if not path.exists():
    pytest.skip("no stored answers here")
  with np.load(path) as golden:
    w = {x[2:]: golden[x] for x in golden.files if x.startswith("w.")}
    x, y, state = golden["x"], golden["y"], golden["S"]
  config = ModelConfig(
    width=32,
    fast_weight_heads=4,
    key_dim=6,
    value_dim=12,
  )
  params = {
    f"{name}_proj": {"kernel": w[f"{name}_proj.weight"].T} for name in "qkvgbao"
  } | {
    "qkv_conv": {"kernel": w["conv1d.weight"][:, 0].T},
    "A_log": w["A_log"],
    "dt_bias": w["dt_bias"],
    "o_norm": {"scale": w["o_norm.weight"]},
  }
  layer = GatedDeltaNet(config)
  mine, final = jax.jit(layer.apply)(
    {"params": params},
    x,
    jnp.zeros((2, 4, 6, 12)),
    np.ones(x.shape[:2], bool),
  )
  np.testing.assert_allclose(mine, y, atol=5e-6)
  np.testing.assert_allclose(final, state, atol=5e-6)
