"""What every implementation of the rule keeps to, against numpy float64.

The oracle is the recurrence and its adjoint, a token at a time, written from
the equations and apart from `reference`.
"""

import jax
import jax.numpy as jnp
import numpy as np

# T with and without a remainder in every blocking inside a chunk, and beyond.
LENGTHS = (1, 7, 24, 63, 64, 65, 75, 512)
# Ordinary keys; one key for all tokens with beta = 1 and g = 0; keys of
# correlation 0.99; beta up to 2, where the transition has negative eigenvalues;
# decays of exp(-30) a token.
CASES = ("random", "repeated", "correlated", "negative", "strong")
# What a rule gives, and the gradients of what it gets.
RESULTS = (
  *("o", "state"),
  *("d_q", "d_k", "d_v", "d_g", "d_beta", "d_initial_state"),
)


def normalise(x):
  return x / np.sqrt((x * x).sum(-1, keepdims=True) + 1e-6)


def inputs(
  length, case="random", batch=2, heads=2, key=8, value=12, per_channel=False
):
  """(q, k, v, g, beta, initial_state) in float64, as `api` wants them."""
  rng = np.random.default_rng(length)
  shape = (batch, length, heads)
  q = normalise(rng.normal(size=(*shape, key)))
  k = normalise(rng.normal(size=(*shape, key)))
  v = rng.normal(size=(*shape, value))
  g = rng.normal(size=(*shape, key) if per_channel else shape)
  g = -np.log1p(np.exp(g))
  beta = rng.uniform(size=shape)
  if case == "repeated":
    k, g, beta = np.broadcast_to(k[:, :1], k.shape), 0 * g, 1 + 0 * beta
  elif case == "correlated":
    k = normalise(0.1 * normalise(rng.normal(size=k.shape)) + k[:, :1])
    g, beta = 0 * g, 1 + 0 * beta
  elif case == "negative":
    g, beta = 0.1 * g, 2 * beta
  elif case == "strong":
    g = np.where(rng.uniform(size=g.shape) < 0.3, -30.0, g)
  state = rng.normal(size=(batch, heads, key, value))
  return q, k, v, g, beta, state


def oracle(q, k, v, g, beta, state, cotangents=None, delta=True):
  """(o, final state) and, from their cotangents, the six gradients, in float64.

  With D = exp(g) S, e = v - D^T k (or v, without `delta`): S' = D + beta k e^T,
  o = K^-0.5 S'^T q.
  """
  q, k, v, g, beta, state = (
    np.asarray(x, np.float64) for x in (q, k, v, g, beta, state)
  )
  scale = q.shape[-1] ** -0.5
  by_row = (
    (lambda x: x[..., None]) if g.ndim == 4 else (lambda x: x[..., None, None])
  )
  outer = lambda x, y: x[..., :, None] * y[..., None, :]  # noqa: E731
  along_keys = lambda s, x: np.einsum("bhkv,bhk->bhv", s, x)  # noqa: E731
  along_values = lambda s, x: np.einsum("bhkv,bhv->bhk", s, x)  # noqa: E731
  states, o = [state], np.zeros(v.shape)
  for t in range(q.shape[1]):
    decayed = by_row(np.exp(g[:, t])) * states[-1]
    error = v[:, t] - delta * along_keys(decayed, k[:, t])
    states.append(decayed + outer(beta[:, t, :, None] * k[:, t], error))
    o[:, t] = scale * along_keys(states[-1], q[:, t])
  if cotangents is None:
    return o, states[-1]
  d_o, d_state = (np.asarray(x, np.float64) for x in cotangents)
  d_q, d_k, d_v, d_g, d_beta = (np.zeros(x.shape) for x in (q, k, v, g, beta))
  for t in reversed(range(q.shape[1])):
    strength = beta[:, t, :, None]
    decay = by_row(np.exp(g[:, t]))
    decayed = decay * states[t]
    error = v[:, t] - delta * along_keys(decayed, k[:, t])
    d_q[:, t] = scale * along_values(states[t + 1], d_o[:, t])
    d_state = d_state + scale * outer(q[:, t], d_o[:, t])
    written = along_values(d_state, error)
    d_beta[:, t] = np.einsum("bhk,bhk->bh", k[:, t], written)
    d_error = strength * along_keys(d_state, k[:, t])
    d_v[:, t] = d_error
    d_k[:, t] = strength * written - delta * along_values(decayed, d_error)
    d_decayed = d_state - delta * outer(k[:, t], d_error)
    d_rows = np.einsum("bhkv,bhkv->bhk", d_decayed, decayed)
    d_g[:, t] = d_rows if g.ndim == 4 else d_rows.sum(-1)
    d_state = decay * d_decayed
  return (o, states[-1]), (d_q, d_k, d_v, d_g, d_beta, d_state)


def rounded(arrays, dtype):
  """q, k and v in `dtype`, the others in float32, as a rule gets them."""
  low = [jnp.asarray(x, dtype) for x in arrays[:3]]
  return low + [jnp.asarray(x, jnp.float32) for x in arrays[3:]]


def differences(mine, theirs) -> dict[str, float]:
  """The largest of each of RESULTS, relative to theirs or to 1, as `errors`."""
  return {
    name: float(
      np.abs(np.asarray(x, np.float64) - np.asarray(y, np.float64)).max()
      / max(1.0, np.abs(np.asarray(y, np.float64)).max())
    )
    for name, x, y in zip(RESULTS, mine, theirs, strict=True)
  }


def errors(rule, arrays, dtype=jnp.float32) -> dict[str, float]:
  """The largest error of o, the state and six gradients, by name.

  Each relative to the largest entry of the oracle's, or to 1 where that is
  less.

  Args:
    rule: (q, k, v, g, beta, initial_state) -> (o, final_state).
    arrays: as `inputs` makes them.
    dtype: of q, k and v; the others are float32.
  """
  rng = np.random.default_rng(1)
  cotangents = [rng.normal(size=arrays[i].shape) for i in (2, 5)]
  low = rounded(arrays, dtype)

  @jax.jit
  def run(*arrays):
    outputs, vjp = jax.vjp(rule, *arrays)
    back = vjp(
      tuple(
        jnp.asarray(x, y.dtype)
        for x, y in zip(cotangents, outputs, strict=True)
      )
    )
    return *outputs, *back

  # The oracle gets what the rule gets, rounded as it is.
  q, k, v, g, beta, state = (np.asarray(x.astype(jnp.float32)) for x in low)
  expected, gradients = oracle(q, k, v, g, beta, state, cotangents)
  return differences(run(*low), (*expected, *gradients))
