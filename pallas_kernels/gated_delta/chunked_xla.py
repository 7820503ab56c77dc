"""Gated update rules by chunks, in plain XLA: the portable path.

Within a chunk of C tokens, with G = cumsum(g) over the chunk and the start
state S (one head, one row of the batch; * is elementwise):

  A_ij = sum_c k_ic k_jc exp(G_ic - G_jc) for i > j
  P_ij = sum_c q_ic k_jc exp(G_ic - G_jc) for i >= j
  X = diag(beta) (V - (exp(G) * K) S)
  E = (I + diag(beta) A)^-1 X                    the corrected values
  O = (exp(G) * Q) S + P E
  S' = exp(G_C) S + (exp(G_C - G) * K)^T E

A rule without the delta correction writes E = diag(beta) V. A decay per head is
one number for all channels c, and leaves the products: A = D * K K^T.

The backward pass keeps a chunk's inputs and start state and recomputes the
rest; with dX = (I + L)^-T dE, dL = -dX E^T below the diagonal, so that the
inverse itself is never differentiated.
"""

import functools

import jax
import jax.numpy as jnp

# Longer windows than this are cut into chunks of CHUNK tokens: the products
# inside a chunk grow as C^2, and one chunk needs no scan.
MAX_SINGLE_CHUNK = 64
CHUNK = 32
# Rows that are inverted by substitution; larger blocks are put together.
SUBSTITUTED = 32
# Rows that share a reference in products decayed per channel.
REFERENCED = 16


def chunked_rule(q, k, v, g, beta, initial_state, *, delta: bool):
  """Returns (o, final_state) of a rule; see `api`.

  Args:
    q, k, v, beta, initial_state: as in `api.gated_delta_rule`.
    g: log decay per head [B, T, H] or per channel [B, T, H, K].
    delta: whether what S predicts for a key is taken off its value.
  """
  length = q.shape[1]
  dtype = initial_state.dtype
  scale = jnp.asarray(q.shape[-1] ** -0.5, dtype)
  # Heads beside the batch, tokens inside: [B, T, H, *] -> [B, H, T, *].
  heads_first = [
    jnp.moveaxis(x.astype(dtype), 2, 1) for x in (q * scale, k, v, g, beta)
  ]
  chunk = jax.checkpoint(
    functools.partial(_chunk, delta=delta), prevent_cse=False
  )
  if length <= MAX_SINGLE_CHUNK:
    state, o = chunk(initial_state, heads_first)
  else:
    padding = -length % CHUNK

    def cut(x):  # [B, H, T, *] -> [T / C, B, H, C, *]; zeros leave S alone
      x = jnp.pad(x, [(0, 0), (0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 3))
      x = x.reshape(*x.shape[:2], -1, CHUNK, *x.shape[3:])
      return jnp.moveaxis(x, 2, 0)

    state, o = jax.lax.scan(chunk, initial_state, list(map(cut, heads_first)))
    o = jnp.moveaxis(o, 0, 2)
    o = o.reshape(*o.shape[:2], -1, o.shape[-1])[:, :, :length]
  return jnp.moveaxis(o, 1, 2).astype(v.dtype), state


def _chunk(state, inputs, delta):
  """(S', o) of a chunk: q, k [B,H,C,K], v [B,H,C,V], g, beta [B,H,C]."""
  q, k, v, g, beta = inputs
  size = q.shape[2]
  per_channel = g.ndim == 4
  total = jnp.cumsum(g, axis=2)
  products = _products_per_channel if per_channel else _products_per_head
  keys_keys, queries_keys = products(q, k, total)
  if not per_channel:
    total = total[..., None]
  since_start, until_end = jnp.exp(total), jnp.exp(total[:, :, -1:] - total)
  beta = beta[..., None]
  if delta:
    keys_state, queries_state = jnp.split(
      jnp.concatenate([since_start * k, since_start * q], axis=2) @ state,
      2,
      axis=2,
    )
    strict = jnp.tril(jnp.ones((size, size), bool), -1)[None, None]
    lower = jnp.where(strict, beta * keys_keys, 0.0)
    corrected = _solve(lower, beta * (v - keys_state))
  else:
    queries_state = (since_start * q) @ state
    corrected = beta * v
  o = queries_state + queries_keys @ corrected
  written = jnp.einsum("BHCK,BHCV->BHKV", until_end * k, corrected)
  # [B,H,K or 1,1]: the whole chunk's decay, for the rows of S.
  decay = jnp.swapaxes(since_start[:, :, -1:], -1, -2)
  return decay * state + written, o


def _products_per_head(q, k, total):
  """(A, P) [B,H,C,C], zero above the diagonal; total [B,H,C]."""
  decay = _pairwise_decay(total[..., None])[..., 0]
  both = jnp.concatenate([k, q], axis=2) @ jnp.swapaxes(k, -1, -2)
  keys_keys, queries_keys = jnp.split(both, 2, axis=2)
  return decay * keys_keys, decay * queries_keys


def _pairwise_decay(total):
  """exp(G_i - G_j) for i >= j, else 0: [B,H,C,K] -> [B,H,C,C,K]."""
  size = total.shape[2]
  causal = jnp.tril(jnp.ones((size, size), bool))[None, None, :, :, None]
  # Masked before exp: above the diagonal the difference may be large.
  difference = total[:, :, :, None] - total[:, :, None]
  return jnp.where(causal, jnp.exp(jnp.where(causal, difference, 0.0)), 0.0)


def _products_per_channel(q, k, total):
  """(A, P) [B,H,C,C], zero above the diagonal; total [B,H,C,K].

  exp(G_i - G_j) does not factor into exp(G_i) exp(-G_j) under strong decay:
  the second overflows. For the keys before a block of rows it factors through
  the total R at the block's start, exp(G_i - R) exp(R - G_j), where neither
  exponent is positive; within the block it is taken pair by pair.
  """
  size = q.shape[2]
  rows = []
  for start in range(0, size, REFERENCED):
    block = slice(start, min(start + REFERENCED, size))
    here = total[:, :, block]
    decay = _pairwise_decay(here)
    both = jnp.stack([k[:, :, block], q[:, :, block]], axis=2)
    row = [jnp.einsum("BHPIK,BHIJK,BHJK->BHPIJ", both, decay, k[:, :, block])]
    if start:
      reference = total[:, :, start - 1 : start]
      earlier = k[:, :, :start] * jnp.exp(reference - total[:, :, :start])
      later = both * jnp.exp(here - reference)[:, :, None]
      row.insert(0, jnp.einsum("BHPIK,BHJK->BHPIJ", later, earlier))
    row = jnp.concatenate(row, axis=-1)
    rows.append(jnp.pad(row, [(0, 0)] * 4 + [(0, size - block.stop)]))
  products = jnp.concatenate(rows, axis=3)
  return products[:, :, 0], products[:, :, 1]


@jax.custom_vjp
def _solve(lower, x):
  """(I + lower)^-1 x for strictly lower triangular `lower` [..., C, C]."""
  return _inverse(lower) @ x


def _solve_forward(lower, x):
  inverse = _inverse(lower)
  solution = inverse @ x
  return solution, (inverse, solution)


def _solve_backward(residuals, cotangent):
  inverse, solution = residuals
  d_x = jnp.swapaxes(inverse, -1, -2) @ cotangent
  return -d_x @ jnp.swapaxes(solution, -1, -2), d_x


_solve.defvjp(_solve_forward, _solve_backward)


def _inverse(lower):
  """(I + lower)^-1 by substitution in blocks and products between them.

  Exact where power doubling overflows (repeated keys with beta near 1): the
  entries of the inverse stay near 1 while powers of `lower` do not.
  """
  size = lower.shape[-1]
  if size <= SUBSTITUTED:
    return _substitute(lower)
  half = -(-size // 2)
  first = _inverse(lower[..., :half, :half])
  second = _inverse(lower[..., half:, half:])
  corner = -second @ lower[..., half:, :half] @ first
  above = jnp.zeros((*lower.shape[:-2], half, size - half), lower.dtype)
  return jnp.concatenate(
    [
      jnp.concatenate([first, above], axis=-1),
      jnp.concatenate([corner, second], axis=-1),
    ],
    axis=-2,
  )


def _substitute(lower):
  """(I + lower)^-1 by forward substitution, a row a step."""
  size = lower.shape[-1]
  rows = lower.reshape(-1, size, size)
  identity = jnp.eye(size, dtype=lower.dtype)

  def row(i, inverse):
    coefficients = jax.lax.dynamic_index_in_dim(rows, i, 1, keepdims=False)
    new = identity[i][None] - jnp.einsum("NC,NCD->ND", coefficients, inverse)
    return jax.lax.dynamic_update_index_in_dim(inverse, new, i, 1)

  # As varied over a shard_map's mesh as the rows are.
  start = identity[None] + jnp.zeros_like(rows)
  return jax.lax.fori_loop(1, size, row, start).reshape(lower.shape)
