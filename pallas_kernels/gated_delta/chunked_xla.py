"""Gated update rules by chunks, in plain XLA: the portable path.

Within a chunk of C tokens, with G = cumsum(g) over the chunk and the start
state S (one head, one row of the batch; * is elementwise):

  A_ij = sum_c k_ic k_jc exp(G_ic - G_jc) for i > j
  P_ij = sum_c q_ic k_jc exp(G_ic - G_jc) for i >= j
  R = V - (exp(G) * K) S                         the errors of what S predicts
  E = T diag(beta) R, T = (I + diag(beta) A)^-1  the corrected values
  O = (exp(G) * Q) S + P E
  S' = exp(G_C) S + (exp(G_C - G) * K)^T E

A rule without the delta correction has R = V and T = I. A decay per head is one
number for all channels c, and leaves the products: A = D * K K^T.

The backward pass keeps the inputs and, for each chunk, S and T; it recomputes
the rest. From dO and dS', with X = diag(beta) R:

  dE = P^T dO + (exp(G_C - G) * K) dS'
  dX = T^T dE, so the inverse itself is never differentiated
  dV = diag(beta) dX
  dP = dO E^T
  dA = -diag(beta) dX E^T
  dbeta_i = sum_v (dX * R)_iv - sum_j (dX E^T * A)_ij
  dS = exp(G_C) dS' + (exp(G) * Q)^T dO - (exp(G) * K)^T dV

and so on for the decayed Q and K. The decays need no products of their own:
token i's G multiplies whatever k_i and q_i read and divides what k_i wrote, so
dG = q * dq + k * dk (as reader) - k * dk (as written), whatever the chunks, and

  dg_t = sum_v (S_T * dS_T) + sum_{s >= t} dG_s.
"""

import functools
import math

import jax
import jax.numpy as jnp

# Longer windows than this are cut into chunks of CHUNK tokens: the products
# inside a chunk grow as C^2, and one chunk needs no scan.
MAX_SINGLE_CHUNK = 64
CHUNK = 32
# Bytes of S of the rows that a CPU takes at a time.
CACHED = 2**20
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
  tokens = (q, k, v, g, beta)
  if length > MAX_SINGLE_CHUNK:  # zeros leave S alone
    padding = -length % CHUNK
    tokens = [
      jnp.pad(x, [(0, 0), (0, padding)] + [(0, 0)] * (x.ndim - 2))
      for x in tokens
    ]
  o, state = _rule(delta, *tokens, initial_state)
  return o[:, :length], state


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _rule(delta, q, k, v, g, beta, state):
  return _rule_forward(delta, q, k, v, g, beta, state)[0]


def _rule_forward(delta, *inputs):
  o, final, kept = _by_rows(functools.partial(_forward, delta), *inputs)
  return (o, final), (inputs[:-1], final, kept)


def _rule_backward(delta, residuals, cotangents):
  backward = functools.partial(_backward, delta)
  return _by_rows(backward, residuals, cotangents)


_rule.defvjp(_rule_forward, _rule_backward)


def _by_rows(function, *arrays):
  """function(*arrays), all [B, ...]; on CPUs a few rows at a time.

  What such a piece leaves in the caches is still there when it is read. That of
  a whole batch is not, and its pages are fresh ones at every call.
  """
  q, *_, state = jax.tree.leaves(arrays)
  rows = CACHED // (math.prod(state.shape[1:]) * state.dtype.itemsize) or 1
  if q.shape[0] <= rows or q.shape[1] > MAX_SINGLE_CHUNK:
    return function(*arrays)

  def one_row(row):
    outputs = function(*jax.tree.map(lambda x: x[None], row))
    return jax.tree.map(lambda x: x[0], outputs)

  return jax.lax.platform_dependent(
    arrays,
    cpu=lambda arrays: jax.lax.map(one_row, arrays, batch_size=rows),
    default=lambda arrays: function(*arrays),
  )


def _forward(delta, *inputs):
  """(o, S_T, what each chunk keeps)."""
  *tokens, state = inputs

  def chunk(start, state, buffers):
    end, o, inverse = _chunk(state, _read(tokens, start, state.dtype), delta)
    return end, _write(buffers, [o], start), (state, inverse)

  o = [jnp.zeros_like(tokens[2])]
  final, (o,), kept = _over_chunks(chunk, state, o)
  return o, final, kept


def _backward(delta, residuals, cotangents):
  """The gradients by all inputs."""
  tokens, final, kept = residuals
  d_o, d_final = cotangents

  def chunk(start, d_state, buffers, kept):
    *inputs, d_out = _read([*tokens, d_o], start, d_state.dtype)
    start_state, inverse = kept
    d_state, gradients = _chunk_backward(
      d_state, d_out, start_state, inverse, inputs, delta
    )
    return d_state, _write(buffers, gradients, start), None

  g = tokens[3]
  buffers = [jnp.zeros_like(x) for x in tokens]
  # Summed over all later tokens below: not in a low precision.
  buffers[3] = buffers[3].astype(d_final.dtype)
  d_state, buffers, _ = _over_chunks(chunk, d_final, buffers, kept)
  d_q, d_k, d_v, d_total, d_beta = buffers
  at_end = jnp.sum(final * d_final, axis=-1)[:, None]
  if g.ndim == 3:
    at_end = jnp.sum(at_end, axis=-1)
  d_g = jax.lax.cumsum(d_total, axis=1, reverse=True) + at_end
  return d_q, d_k, d_v, d_g.astype(g.dtype), d_beta, d_state


def _over_chunks(chunk, state, buffers, kept=None):
  """Runs `chunk` over all chunks, backwards where it is given what was kept.

  The whole of every array stays where it is, [B, T, H, *]; a chunk reads and
  writes its part. Cutting and turning whole arrays costs memory.
  """
  length = buffers[0].shape[1]
  backward = () if kept is None else (kept,)
  if length <= MAX_SINGLE_CHUNK:
    return chunk(0, state, buffers, *backward)

  def step(carry, inputs):
    *carry, keep = chunk(inputs[0], *carry, *inputs[1:])
    return tuple(carry), keep

  starts = jnp.arange(0, length, CHUNK)
  (state, buffers), kept = jax.lax.scan(
    step, (state, buffers), (starts, *backward), reverse=bool(backward)
  )
  return state, buffers, kept


def _read(arrays, start, dtype):
  """The chunk at `start`, heads first: [B, T, H, *] -> [B, H, C, *]."""
  length = arrays[0].shape[1]
  size = CHUNK if length > MAX_SINGLE_CHUNK else length
  return [
    jnp.moveaxis(
      jax.lax.dynamic_slice_in_dim(x, start, size, 1).astype(dtype), 1, 2
    )
    for x in arrays
  ]


def _write(buffers, chunks, start):
  """The inverse of `_read`, into whole arrays."""
  return [
    jax.lax.dynamic_update_slice_in_dim(
      buffer, jnp.moveaxis(x, 1, 2).astype(buffer.dtype), start, 1
    )
    for buffer, x in zip(buffers, chunks, strict=True)
  ]


def _chunk(state, inputs, delta):
  """(S', O, T) of a chunk: q, k [B,H,C,K], v [B,H,C,V], g, beta [B,H,C]."""
  q, k, v, g, beta = inputs
  scale = q.shape[-1] ** -0.5
  total, since_start, until_end = _decays(g)
  written, inverse = beta[..., None] * v, None
  keys_keys, queries_keys = _products(scale * q, k, k, total)
  if delta:
    errors = v - _rows(since_start * k, state)
    inverse = _inverse(beta[..., None] * keys_keys)
    written = _rows(inverse, beta[..., None] * errors)
  o = _rows(scale * since_start * q, state) + _rows(queries_keys, written)
  state = _last(since_start) * state + _columns(until_end * k, written)
  return state, o, inverse


def _chunk_backward(d_state, d_o, state, inverse, inputs, delta):
  """dS and the gradients by (q, k, v, G, beta), from those by S' and O."""
  q, k, v, g, beta = inputs
  scale = q.shape[-1] ** -0.5
  total, since_start, until_end = _decays(g)
  beta = beta[..., None]
  q = scale * q
  (keys_keys, queries_keys), products_vjp = jax.vjp(
    lambda q, reader, written: _products(q, reader, written, total), q, k, k
  )
  # The forward pass again, as far as the values written.
  errors, written = v, beta * v
  if delta:
    errors = v - _rows(since_start * k, state)
    written = _rows(inverse, beta * errors)

  d_x = _columns(queries_keys, d_o) + _rows(until_end * k, d_state)
  d_keys_keys, d_read_k = jnp.zeros_like(keys_keys), 0.0
  d_state_new = _last(since_start) * d_state + _columns(since_start * q, d_o)
  if delta:
    d_x = _columns(inverse, d_x)
    outer = _outer(d_x, written)
    d_keys_keys = -beta * outer
    d_read_k = -beta * since_start * _outer(d_x, state)
    d_state_new -= _columns(beta * since_start * k, d_x)
    d_beta = _sum(d_x, errors) - _sum(outer, keys_keys)
  else:
    d_beta = _sum(d_x, errors)
  d_q, d_reader, d_written = products_vjp((d_keys_keys, _outer(d_o, written)))
  d_q += since_start * _outer(d_o, state)
  d_reader += d_read_k
  d_written += until_end * _outer(written, d_state)
  if g.ndim == 4:
    d_total = q * d_q + k * (d_reader - d_written)
  else:
    d_total = _sum(q, d_q) + _sum(k, d_reader - d_written)
  gradients = scale * d_q, d_reader + d_written, beta * d_x, d_total, d_beta
  return d_state_new, gradients


# Accelerators would round the operands of float32 products.
_einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
# Products over all heads, named for what is taken of the left operand. None
# transposes an operand in memory, as x @ y.T may.
_rows = functools.partial(_einsum, "BHIJ,BHJK->BHIK")
_columns = functools.partial(_einsum, "BHJI,BHJK->BHIK")
_outer = functools.partial(_einsum, "BHIJ,BHKJ->BHIK")
_sum = functools.partial(_einsum, "BHIJ,BHIJ->BHI")


def _decays(g):
  """G as g, exp(G) and exp(G_C - G) [B,H,C,K or 1]."""
  total = jnp.cumsum(g, axis=2)
  by_row = total if g.ndim == 4 else total[..., None]
  return total, jnp.exp(by_row), jnp.exp(by_row[:, :, -1:] - by_row)


def _last(since_start):
  """exp(G_C) for the rows of S: [B,H,K or 1,1]."""
  return jnp.swapaxes(since_start[:, :, -1:], -1, -2)


def _products(q, reader, written, total):
  """(A, P) [B,H,C,C] of keys as readers and as written; total [B,H,C(,K)]."""
  size = q.shape[2]
  strict = jnp.tril(jnp.ones((size, size), bool), -1)
  if total.ndim == 4:
    keys_keys, queries_keys = _products_per_channel(q, reader, written, total)
  else:
    decay = _pairwise_decay(total[..., None])[..., 0]
    keys_keys = decay * _outer(reader, written)
    queries_keys = decay * _outer(q, written)
  return jnp.where(strict, keys_keys, 0.0), queries_keys


def _pairwise_decay(total):
  """exp(G_i - G_j) for i >= j, else 0: [B,H,C,K] -> [B,H,C,C,K]."""
  size = total.shape[2]
  causal = jnp.tril(jnp.ones((size, size), bool))[:, :, None]
  # Masked before exp: above the diagonal the difference may be large.
  difference = total[:, :, :, None] - total[:, :, None]
  return jnp.exp(jnp.where(causal, difference, -jnp.inf))


def _products_per_channel(q, reader, written, total):
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
    both = jnp.stack([reader[:, :, block], q[:, :, block]], axis=2)
    keys = written[:, :, block]
    row = [_einsum("BHPIK,BHIJK,BHJK->BHPIJ", both, decay, keys)]
    if start:
      reference = total[:, :, start - 1 : start]
      earlier = written[:, :, :start] * jnp.exp(reference - total[:, :, :start])
      later = both * jnp.exp(here - reference)[:, :, None]
      row.insert(0, _einsum("BHPIK,BHJK->BHPIJ", later, earlier))
    row = jnp.concatenate(row, axis=-1)
    rows.append(jnp.pad(row, [(0, 0)] * 4 + [(0, size - block.stop)]))
  products = jnp.concatenate(rows, axis=3)
  return products[:, :, 0], products[:, :, 1]


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
  corner = _einsum(
    "...IJ,...JK,...KL->...IL", -second, lower[..., half:, :half], first
  )
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
    new = identity[i][None] - _einsum("NC,NCD->ND", coefficients, inverse)
    return jax.lax.dynamic_update_index_in_dim(inverse, new, i, 1)

  # As varied over a shard_map's mesh as the rows are.
  start = identity[None] + jnp.zeros_like(rows)
  return jax.lax.fori_loop(1, size, row, start).reshape(lower.shape)
