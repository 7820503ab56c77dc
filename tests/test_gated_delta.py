"""The rule against numpy float64, its own recurrence and stored answers."""

import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.gated_delta import api

GOLDENS = pathlib.Path(__file__).parents[2] / "shared" / "goldens"


def numpy_rule(q, k, v, g, beta, state):
  """The recurrence in numpy float64, a row, a head and a token at a time."""
  q, k, v, g, beta, state = (
    np.array(x, np.float64) for x in (q, k, v, g, beta, state)
  )
  o = np.zeros_like(v)
  for b in range(q.shape[0]):
    for h in range(q.shape[2]):
      for t in range(q.shape[1]):
        s = np.exp(g[b, t, h]) * state[b, h]
        key = k[b, t, h]
        s += beta[b, t, h] * np.outer(key, v[b, t, h] - key @ s)
        o[b, t, h] = (q[b, t, h] * q.shape[-1] ** -0.5) @ s
        state[b, h] = s
  return o, state


def normalise(x):
  return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def inputs(length, case="random", seed=0, batch=2, heads=2, key=8, value=12):
  rng = np.random.default_rng(seed)
  shape = (batch, length, heads)
  q = normalise(rng.normal(size=(*shape, key)))
  k = normalise(rng.normal(size=(*shape, key)))
  v = rng.normal(size=(*shape, value))
  g = -np.log1p(np.exp(rng.normal(size=shape)))
  beta = rng.uniform(size=shape)
  if case == "repeated keys":
    k, g, beta = np.broadcast_to(k[:, :1], k.shape), 0 * g, 1 + 0 * beta
  elif case == "correlated keys":
    k = normalise(0.1 * k + k[:, :1])
    g, beta = 0 * g, 1 + 0 * beta
  elif case == "strong decay":
    g = np.where(rng.uniform(size=shape) < 0.3, -30.0, g)
  state = rng.normal(size=(batch, heads, key, value))
  return q, k, v, g, beta, state


CASES = ["random", "repeated keys", "correlated keys", "strong decay"]


@pytest.mark.parametrize("length", [1, 24, 64, 100])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("implementation", sorted(api.IMPLEMENTATIONS))
def test_equals_numpy_float64(implementation, case, length):
  arrays = inputs(length, case)
  expected_o, expected_state = numpy_rule(*arrays)
  rule = jax.jit(
    functools.partial(api.gated_delta_rule, implementation=implementation)
  )
  with jax.enable_x64(True):
    o, state = rule(*map(jnp.asarray, arrays))
    np.testing.assert_allclose(o, expected_o, atol=1e-12)
    np.testing.assert_allclose(state, expected_state, atol=1e-12)
  o, state = rule(*(jnp.asarray(x, jnp.float32) for x in arrays))
  # Under strong decay the running total of g reaches -900, where float32
  # resolves 6e-5: differences of it carry that error into exp.
  tolerance = 2e-4 if case == "strong decay" else 2e-5
  np.testing.assert_allclose(o, expected_o, atol=tolerance)
  np.testing.assert_allclose(state, expected_state, atol=tolerance)


@pytest.mark.parametrize("length", [1, 24, 65])
@pytest.mark.parametrize("case", CASES)
def test_gradients_of_all_inputs_equal_those_of_the_recurrence(case, length):
  arrays = inputs(length, case)
  rng = np.random.default_rng(1)
  weights = rng.normal(size=arrays[2].shape), rng.normal(size=arrays[5].shape)

  def gradients(implementation):
    def loss(*arrays):
      o, state = api.gated_delta_rule(*arrays, implementation=implementation)
      return jnp.sum(o * weights[0]) + jnp.sum(state * weights[1])

    return jax.jit(jax.grad(loss, argnums=range(6)))(*map(jnp.asarray, arrays))

  with jax.enable_x64(True):
    for mine, theirs in zip(
      gradients("chunked_xla"), gradients("reference"), strict=True
    ):
      np.testing.assert_allclose(mine, theirs, atol=1e-11)


def test_bfloat16_keeps_a_float32_state():
  q, k, v, g, beta, state = inputs(24)
  low = [jnp.asarray(x, jnp.bfloat16) for x in (q, k, v)]
  rest = [jnp.asarray(x, jnp.float32) for x in (g, beta, state)]
  o, final = api.gated_delta_rule(*low, *rest)
  assert (o.dtype, final.dtype) == (jnp.bfloat16, jnp.float32)
  expected_o, expected_state = numpy_rule(q, k, v, g, beta, state)
  np.testing.assert_allclose(o.astype(jnp.float32), expected_o, atol=0.05)
  np.testing.assert_allclose(final, expected_state, atol=0.05)


def test_stored_answers():
  path = GOLDENS / "gdn_rule.npz"
  if not path.exists():
    pytest.skip("no stored answers here")
  with np.load(path) as golden:
    o, state = api.gated_delta_rule(
      normalise(golden["q"]),
      normalise(golden["k"]),
      *(jnp.asarray(golden[name]) for name in ("v", "g", "beta", "S0")),
    )
    np.testing.assert_allclose(o, golden["o"], atol=2e-6)
    np.testing.assert_allclose(state, golden["S"], atol=2e-6)


def test_wrong_shapes_and_names_are_named():
  arrays = [jnp.asarray(x) for x in inputs(4)]
  with pytest.raises(ValueError, match=r"beta has shape \(2, 3, 2\)"):
    api.gated_delta_rule(*arrays[:4], arrays[4][:, :3], arrays[5])
  with pytest.raises(ValueError, match="unknown implementation 'fast'"):
    api.gated_delta_rule(*arrays, implementation="fast")
