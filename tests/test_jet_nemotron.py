"""The Jet layer and Jet-Nemotron against stored answers of independent code."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import traverse_util

from sleep_jax.config import ModelConfig, SleepConfig
from sleep_jax.model.fast_weights import JetLayer
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.model.places import window
from sleep_jax.pretrained import convert, hf, jet_nemotron
from sleep_jax.session import Session
from sleep_jax.training.step import init_params
from tests import hf_folders

LAYER = ModelConfig(
  width=24,
  fast_weight_heads=3,
  key_dim=6,
  value_dim=16,
  generator_reduction=8,
)


@pytest.fixture(scope="module")
def layer():
  """(parameters, x, y, S) of the stored layer."""
  weights, arrays = hf_folders.stored("jet_block")
  names = {
    path.removeprefix("mixer/"): name.removeprefix("self_attn.")
    for path, name in jet_nemotron.JET.items()
    if path.startswith("mixer/")
  }
  assert set(names.values()) == weights.keys()
  params = {
    path: weights[name].T if path.endswith("kernel") else weights[name]
    for path, name in names.items()
  }
  return traverse_util.unflatten_dict(params, sep="/"), *(
    arrays[name] for name in ("x", "y", "S")
  )


def test_the_jet_layer_computes_what_independent_code_computes(layer):
  """Whole, and in two pieces whose second has S and the history."""
  params, x, y, state = layer
  apply = jax.jit(JetLayer(LAYER).apply)

  def run(x, state, history):
    places = window(np.ones(x.shape[:2], bool), x.shape[1])
    return apply({"params": params}, x, state, history, places)

  zeros = jnp.zeros((2, 3, 6, 16)), jnp.zeros((2, 3, 48))
  mine, final, _ = run(x, *zeros)
  np.testing.assert_allclose(mine, y, atol=1e-5)
  np.testing.assert_allclose(final, state, atol=1e-5)
  first, *carried = run(x[:, :17], *zeros)
  second, final, _ = run(x[:, 17:], *carried)
  np.testing.assert_allclose(np.concatenate([first, second], 1), y, atol=1e-5)
  np.testing.assert_allclose(final, state, atol=1e-5)


def test_a_jet_layer_starts_as_a_plain_convolution_that_learns(layer):
  """The generator's output is its bias at first; both its layers then learn."""
  _, x, _, _ = layer
  module, state = JetLayer(LAYER), jnp.zeros((2, 3, 6, 16))
  places = window(np.ones(x.shape[:2], bool), x.shape[1])
  arguments = jnp.asarray(x), state, None, places
  params = jax.jit(module.init)(jax.random.key(0), *arguments)["params"]
  taps = params["v_conv"]["w2_proj"]["bias"]
  np.testing.assert_allclose(np.std(taps), 0.5, rtol=0.2)

  @jax.jit
  @jax.grad
  def gradient(params):
    y, *_ = module.apply({"params": params}, *arguments)
    return jnp.sum(jnp.sin(y))

  first = gradient(params)["v_conv"]
  assert np.any(first["w2_proj"]["kernel"]) and np.any(first["w2_proj"]["bias"])
  params["v_conv"]["w2_proj"]["kernel"] -= 0.1 * first["w2_proj"]["kernel"]
  assert np.any(gradient(params)["v_conv"]["w1_proj"]["kernel"])


def stored_model():
  """(model, parameters, stored arrays) in float64."""
  weights, arrays = hf_folders.stored("jet_nemotron_tiny_f64")
  numbers = hf.Numbers(hf_folders.JET_NEMOTRON, "config.json")
  shape = jet_nemotron.shape(numbers)
  config = convert.model_config(shape, compute_dtype="float64")
  model = HybridLM(config, shape.vocab_size)
  like = traverse_util.flatten_dict(
    jax.eval_shape(lambda: init_params(model, 0)), sep="/"
  )
  params = {path: np.zeros(leaf.shape) for path, leaf in like.items()}
  shapes = {path: leaf.shape for path, leaf in like.items()}
  places = hf.tensors(
    jet_nemotron.ARCHITECTURE, config, shapes, shape.vocab_size
  )
  for name, tensor in places.items():
    convert._fill(params[tensor.path], tensor, weights[name])
  return model, traverse_util.unflatten_dict(params, sep="/"), arrays


def test_only_the_fast_weights_and_histories_go_on_to_a_second_window():
  """As in a session under hard eviction with a carried convolution, N = 1."""
  with jax.enable_x64(True):
    model, params, arrays = stored_model()
    ids = arrays["ids"].astype(np.int32)
    sleep = SleepConfig(passes=1, window_length=20, carry_convolution=True)
    session = Session(model, sleep)
    state = session.start(2)
    for piece, name in (
      (ids[:, :20], "logits"),
      (ids[:, 20:], "logits_chunk2"),
    ):
      state = session.feed(params, state, piece)
      np.testing.assert_allclose(state.logits, arrays[name][:, 19], atol=1e-5)
    own = [layer for layer in hf.layers(model.config) if layer.kind == "jet"]
    for number, layer in zip((0, 1, 4), own, strict=True):
      np.testing.assert_allclose(
        state.fast_weights[layer.group][layer.place][layer.repeat],
        arrays[f"S_chunk2.{number}"],
        atol=1e-7,
      )
