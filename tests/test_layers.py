"""The Gated DeltaNet layer against stored answers of independent code."""

import dataclasses
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sleep_jax.config import ModelConfig
from sleep_jax.model import layers
from sleep_jax.model.fast_weights import GatedDeltaNet
from sleep_jax.model.places import window

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
  mine, final, history = jax.jit(layer.apply)(
    {"params": params},
    x,
    jnp.zeros((2, 4, 6, 12)),
    jnp.zeros((2, 3, 96)),
    window(np.ones(x.shape[:2], bool), x.shape[1]),
  )
  np.testing.assert_allclose(mine, y, atol=5e-6)
  np.testing.assert_allclose(final, state, atol=5e-6)


def test_rules_whose_layers_are_special_cases_of_others():
  """Equal channels make kda gated_delta; no decay makes that delta; a decay
  without its projection makes hebbian fixed_decay."""
  rng = np.random.default_rng(0)
  x = jnp.asarray(rng.normal(size=(2, 10, 8)), jnp.float32)
  places = window(jnp.asarray(np.arange(10) < [[10], [7]]), 10)
  config = ModelConfig(
    width=8, fast_weight_heads=2, key_dim=4, value_dim=6, attention_heads=2
  )
  state = jnp.asarray(rng.normal(size=(2, 2, 4, 6)), jnp.float32)

  def layer(rule):
    return GatedDeltaNet(dataclasses.replace(config, update_rule=rule))

  def run(rule, params):
    apply = jax.jit(layer(rule).apply)
    return apply({"params": params}, x, state, None, places)[:2]

  def assert_equal(one, other):
    for mine, theirs in zip(one, other, strict=True):
      np.testing.assert_allclose(mine, theirs, atol=1e-5)

  init = jax.jit(layer("gated_delta").init)
  params = init(jax.random.key(0), x, state, None, places)["params"]
  expected = run("gated_delta", params)

  per_channel = params | {
    "a_proj": {"kernel": jnp.repeat(params["a_proj"]["kernel"], 4, axis=1)},
    "dt_bias": jnp.repeat(params["dt_bias"][:, None], 4, axis=1),
  }
  assert_equal(run("kda", per_channel), expected)

  without = params | {"A_log": jnp.full(2, -jnp.inf)}
  rest = {k: v for k, v in params.items() if k not in "A_log dt_bias a_proj"}
  assert_equal(run("delta", rest), run("gated_delta", without))

  fixed = {k: v for k, v in params.items() if k != "a_proj"}
  zero = params | {"a_proj": {"kernel": jnp.zeros((8, 2))}}
  assert_equal(run("fixed_decay", fixed), run("hebbian", zero))
  difference = jnp.abs(run("hebbian", params)[1] - expected[1])
  assert jnp.max(difference) > 0.1


def test_convolution_starts_with_the_variance_of_its_taps():
  """A sum over the taps keeps the size of its input, however many channels."""
  layer = layers.ShortConvolution(4, jnp.dtype("float32"))
  params = jax.jit(layer.init)(
    jax.random.key(0), jnp.zeros((1, 8, 512)), None, jnp.ones((1, 8), bool)
  )
  kernel = params["params"]["kernel"]
  assert kernel.shape == (4, 512)
  np.testing.assert_allclose(np.std(kernel), 0.5, rtol=0.05)


def test_rotary_positions_in_bfloat16_are_those_of_float64():
  """At the paper's window of 2,000 tokens, where bfloat16 cannot count."""
  x = np.random.default_rng(0).normal(size=(1, 2000, 1, 8))
  low = jax.jit(layers.rotary, static_argnums=2)(
    jnp.asarray(x, jnp.bfloat16), jnp.arange(2000)[None], 1e4
  )
  pairs = x[..., :4] + 1j * x[..., 4:]
  angle = np.outer(np.arange(2000), 1e4 ** (-np.arange(4) / 4))
  turned = pairs * np.exp(1j * angle)[None, :, None]
  expected = np.concatenate([turned.real, turned.imag], -1)
  np.testing.assert_allclose(low.astype(np.float32), expected, atol=0.06)


def test_a_kernels_gradient_is_that_of_a_plain_product():
  rng = np.random.default_rng(0)
  x, dy = rng.normal(size=(2, 3, 4)), rng.normal(size=(2, 3, 5))
  config = ModelConfig()
  layer = layers.dense(config, 5, "layer")
  kernel = rng.normal(size=(4, 5))
  with jax.enable_x64(True):
    layer = layer.copy(dtype=jnp.float64, param_dtype=jnp.float64)
    d_kernel, d_x = jax.grad(
      lambda k, x: jnp.sum(layer.apply({"params": {"kernel": k}}, x) * dy),
      argnums=(0, 1),
    )(jnp.asarray(kernel), jnp.asarray(x))
  np.testing.assert_allclose(d_kernel, np.einsum("btd,btf->df", x, dy))
  np.testing.assert_allclose(d_x, np.einsum("btf,df->btd", dy, kernel))
