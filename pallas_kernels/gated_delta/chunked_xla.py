"""The gated delta rule by chunks, in plain XLA: the portable path.

Within a chunk of C tokens, with G = cumsum(g), D_ij = exp(G_i - G_j) for
i >= j, and the start state S (one head, one row of the batch):

  L = stril(diag(beta) (K K^T * D))
  X = diag(beta) (V - diag(exp G) K S)
  E = (I + L)^-1 X                       the corrected values
  O = diag(exp G) Q S + tril(Q K^T * D) E
  S' = exp(G_C) S + (diag(exp(G_C - G)) K)^T E

The backward pass of a chunk keeps the chunk's inputs and its start state and
recomputes the rest: with dX = (I + L)^-T dE, dL = -stril(dX E^T), so that the
inverse itself is never differentiated.
"""

import jax
import jax.numpy as jnp

# Longer windows than this are cut into chunks of CHUNK tokens: the products
# inside a chunk grow as C^2, and one chunk needs no scan.
MAX_SINGLE_CHUNK = 64
CHUNK = 32


def gated_delta_rule(q, k, v, g, beta, initial_state):
  """Returns (o, final_state) by chunks; see `api`."""
  length = q.shape[1]
  dtype = initial_state.dtype
  scale = jnp.asarray(q.shape[-1] ** -0.5, dtype)
  # Heads beside the batch, tokens inside: [B, T, H, *] -> [B, H, T, *].
  heads_first = [
    jnp.moveaxis(x.astype(dtype), 2, 1) for x in (q * scale, k, v, g, beta)
  ]
  if length <= MAX_SINGLE_CHUNK:
    o, state = _chunk(*heads_first, initial_state)
  else:
    padding = -length % CHUNK

    def cut(x):  # [B, H, T, *] -> [T / C, B, H, C, *]; zeros leave S alone
      x = jnp.pad(x, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 3))
      x = x.reshape(*x.shape[:2], -1, CHUNK, *x.shape[3:])
      return jnp.moveaxis(x, 2, 0)

    def step(state, inputs):
      o, state = _chunk(*inputs, state)
      return state, o

    state, o = jax.lax.scan(step, initial_state, [cut(x) for x in heads_first])
    o = jnp.moveaxis(o, 0, 2)
    o = o.reshape(*o.shape[:2], -1, o.shape[-1])[:, :, :length]
  return jnp.moveaxis(o, 1, 2).astype(v.dtype), state


def _inverse(lower):
  """(I + lower)^-1 for strictly lower triangular `lower` [..., C, C].

  Forward substitution, a row a step: exact where power doubling overflows
  (repeated keys with beta near 1).
  """
  size = lower.shape[-1]
  lower = lower.reshape(-1, size, size)
  identity = jnp.eye(size, dtype=lower.dtype)

  def row(i, inverse):
    coefficients = jax.lax.dynamic_index_in_dim(lower, i, 1, keepdims=False)
    new = identity[i][None] - jnp.einsum("NC,NCD->ND", coefficients, inverse)
    return jax.lax.dynamic_update_index_in_dim(inverse, new, i, 1)

  start = jnp.broadcast_to(identity[None], lower.shape)
  return jax.lax.fori_loop(1, size, row, start)


def _intermediates(q, k, v, g, beta, state):
  """What forward and backward share, for one chunk [B, H, C, *]."""
  size = q.shape[2]
  total = jnp.cumsum(g, axis=-1)
  causal = jnp.tril(jnp.ones((size, size), bool))[None, None]
  # Masked before exp: above the diagonal the difference may be large.
  difference = total[..., :, None] - total[..., None, :]
  decay = jnp.where(causal, jnp.exp(jnp.where(causal, difference, 0.0)), 0.0)
  stacked = jnp.concatenate([k, q], axis=2)
  keys_keys, queries_keys = jnp.split(
    jnp.einsum("BHCK,BHDK->BHCD", stacked, k), 2, axis=2
  )
  keys_state, queries_state = jnp.split(
    jnp.einsum("BHCK,BHKV->BHCV", stacked, state), 2, axis=2
  )
  strict = causal & ~jnp.eye(size, dtype=bool)[None, None]
  lower = jnp.where(strict, beta[..., None] * decay * keys_keys, 0.0)
  inverse = _inverse(lower).reshape(lower.shape)
  gamma = jnp.exp(total)[..., None]
  residual = v - gamma * keys_state
  corrected = jnp.einsum("BHCD,BHDV->BHCV", inverse, beta[..., None] * residual)
  to_end = jnp.exp(total[..., -1:] - total)[..., None]
  return dict(
    decay=decay,
    strict=strict,
    keys_keys=keys_keys,
    queries_keys=queries_keys,
    keys_state=keys_state,
    queries_state=queries_state,
    inverse=inverse,
    gamma=gamma,
    residual=residual,
    corrected=corrected,
    to_end=to_end,
  )


@jax.custom_vjp
def _chunk(q, k, v, g, beta, state):
  """One chunk: q, k [B,H,C,K], v [B,H,C,V], g, beta [B,H,C], S [B,H,K,V]."""
  m = _intermediates(q, k, v, g, beta, state)
  attention = m["decay"] * m["queries_keys"]
  o = m["gamma"] * m["queries_state"] + jnp.einsum(
    "BHCD,BHDV->BHCV", attention, m["corrected"]
  )
  state = m["gamma"][:, :, -1:] * state + jnp.einsum(
    "BHCK,BHCV->BHKV", m["to_end"] * k, m["corrected"]
  )
  return o, state


def _chunk_forward(*inputs):
  return _chunk(*inputs), inputs


def _chunk_backward(inputs, cotangents):
  q, k, v, g, beta, state = inputs
  d_o, d_state = cotangents
  m = _intermediates(q, k, v, g, beta, state)
  beta = beta[..., None]
  attention = m["decay"] * m["queries_keys"]
  keys_to_end = m["to_end"] * k
  d_corrected = jnp.einsum("BHCD,BHCV->BHDV", attention, d_o) + jnp.einsum(
    "BHCK,BHKV->BHCV", keys_to_end, d_state
  )
  d_scaled = jnp.einsum("BHCD,BHCV->BHDV", m["inverse"], d_corrected)
  # Two products with E^T in one: rows of d_o and of dX.
  d_attention, d_lower = jnp.split(
    jnp.einsum(
      "BHCV,BHDV->BHCD",
      jnp.concatenate([d_o, -d_scaled], axis=2),
      m["corrected"],
    ),
    2,
    axis=2,
  )
  d_lower = jnp.where(m["strict"], d_lower, 0.0)
  d_queries_keys = d_attention * m["decay"]
  d_keys_keys = d_lower * beta * m["decay"]
  d_difference = (
    d_queries_keys * m["queries_keys"] + d_keys_keys * m["keys_keys"]
  )
  d_residual = beta * d_scaled
  d_keys_state = -m["gamma"] * d_residual
  d_queries_state = m["gamma"] * d_o
  d_keys_to_end = jnp.einsum("BHCV,BHKV->BHCK", m["corrected"], d_state)
  d_stacked = jnp.einsum(
    "BHCV,BHKV->BHCK",
    jnp.concatenate([d_keys_state, d_queries_state], axis=2),
    state,
  ) + jnp.einsum(
    "BHCD,BHDK->BHCK",
    jnp.concatenate(
      [d_keys_keys + jnp.swapaxes(d_keys_keys, -1, -2), d_queries_keys], axis=2
    ),
    k,
  )
  d_k, d_q = jnp.split(d_stacked, 2, axis=2)
  d_k = (
    d_k
    + jnp.einsum("BHCD,BHCK->BHDK", d_queries_keys, q)
    + m["to_end"] * d_keys_to_end
  )
  end = m["gamma"][:, :, -1:]
  d_start = end * d_state + jnp.einsum(
    "BHCK,BHCV->BHKV",
    jnp.concatenate([k, q], axis=2),
    jnp.concatenate([d_keys_state, d_queries_state], axis=2),
  )
  d_beta = jnp.sum(d_scaled * m["residual"], -1) + jnp.sum(
    d_lower * m["decay"] * m["keys_keys"], -1
  )
  # Every place where the running total G stands in an exponent.
  d_to_end = jnp.sum(d_keys_to_end * keys_to_end, -1)
  d_total = (
    jnp.sum(d_queries_state * m["queries_state"], -1)
    + jnp.sum(d_keys_state * m["keys_state"], -1)
    + jnp.sum(d_difference, -1)
    - jnp.sum(d_difference, -2)
    - d_to_end
  )
  d_end = jnp.sum(d_to_end, -1) + jnp.sum(end * state * d_state, (-1, -2))
  d_total = d_total.at[..., -1].add(d_end)
  d_g = jnp.flip(jnp.cumsum(jnp.flip(d_total, -1), -1), -1)
  return d_q, d_k, d_residual, d_g, d_beta, d_start


_chunk.defvjp(_chunk_forward, _chunk_backward)
