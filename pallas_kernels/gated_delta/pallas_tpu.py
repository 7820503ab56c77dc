"""The gated delta rule on TPUs: one Mosaic kernel forward, one backward.

The grid walks over blocks of batch rows, blocks of heads, and chunks of tokens
one after the other; the state waits in VMEM. Within a chunk the equations are
those of `chunked_xla`.

Matrix units multiply tiles of 128 or 256 rows, a window of 24 tokens fills few
of them. So the heads of a row are packed: the C tokens of m heads become the
m C rows of one tile, with keys [m C, m K] that are zero outside their own
head's lanes. Their Gram matrix is then block-diagonal of itself, one product
with the stacked states [m K, V] serves all m heads, and the layout [B, T, H K]
in which projections write needs no transpose. Long chunks have m = 1.

The backward kernel walks over the chunks twice: forward to rebuild the start
states of all of them in VMEM, then backward. HBM sees inputs, outputs and the
start state alone.

Products of bfloat16 inputs take one pass of the matrix unit with float32
accumulation. Whatever passes through the inverse or the state is split into two
bfloat16 parts (three passes, 16 bits); float32 inputs take full precision.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows of a tile: what the smaller matrix units hold.
MAX_TILE = 128
# Blocks of the inverse by substitution have at most this many rows.
SUBSTITUTED = 32
# Rows of `gates`: the running total of g, beta, the chunk's whole total; a
# tile of float32 has 8.
GATES = 8


@dataclasses.dataclass(frozen=True)
class Layout:
  """How a kernel cuts [B, T, H, *] into blocks, and blocks into tiles.

  Attributes:
    rows, chunk, heads: a block's batch rows, tokens and heads.
    packed: heads a tile.
    length: T; rows of the last chunk beyond it are cleared.
    key_dim, value_dim: K and V.
    exact: inputs are float32, and so are all products.
  """

  rows: int
  chunk: int
  heads: int
  packed: int
  length: int
  key_dim: int
  value_dim: int
  exact: bool

  @property
  def chunks(self):
    return pl.cdiv(self.length, self.chunk)

  @property
  def tile(self):
    return self.packed * self.chunk

  def pack(self, x):
    """[C, m K] -> [m C, m K], zero outside a head's own lanes."""
    if self.packed == 1:
      return x
    x = jnp.concatenate([x.astype(jnp.float32)] * self.packed, axis=0)
    own = self._head(x.shape, 0, self.chunk) == self._head(
      x.shape, 1, self.key_dim
    )
    return jnp.where(own, x, 0.0)

  def unpack(self, x):
    """[m C, m K] -> [C, m K]: of each head its own lanes."""
    if self.packed == 1:
      return x
    lane = self._head((self.chunk, x.shape[1]), 1, self.key_dim)
    out = x[: self.chunk]
    for i in range(1, self.packed):
      out = jnp.where(lane == i, x[i * self.chunk : (i + 1) * self.chunk], out)
    return out

  def stack(self, x):
    """[C, m V] -> [m C, V]."""
    x = x.astype(jnp.float32)
    return jnp.concatenate(
      [
        x[:, i * self.value_dim : (i + 1) * self.value_dim]
        for i in range(self.packed)
      ],
      axis=0,
    )

  def unstack(self, x):
    """[m C, V] -> [C, m V]."""
    return jnp.concatenate(
      [x[i * self.chunk : (i + 1) * self.chunk] for i in range(self.packed)],
      axis=1,
    )

  def causal(self):
    """Which token of a tile [m C, m C] sees which: its head's past and self."""
    shape = (self.tile, self.tile)
    row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
    column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    same = self._head(shape, 0, self.chunk) == self._head(shape, 1, self.chunk)
    return same & (row >= column), same & (row > column)

  def _head(self, shape, axis, size):
    return _block(jax.lax.broadcasted_iota(jnp.int32, shape, axis), size, shape)


def _block(index, size, shape):
  """index // size, by comparisons: vector units do not divide."""
  return sum(
    (
      (index >= start).astype(jnp.int32)
      for start in range(size, max(shape), size)
    ),
    jnp.zeros_like(index),
  )


def _parts(layout, x, count):
  """x as a sum of bfloat16 arrays, or as it is where products are exact."""
  if layout.exact:
    return (x.astype(jnp.float32),)
  high = x.astype(jnp.bfloat16)
  if count == 1 or x.dtype == jnp.bfloat16:
    return (high,)
  return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _dot(xs, ys, contract=(1, 0)):
  """Product of two sums of parts in float32, without low times low."""
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  exact = xs[0].dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
  products = [
    jax.lax.dot_general(
      x, y, dimensions, precision, preferred_element_type=jnp.float32
    )
    for i, x in enumerate(xs)
    for j, y in enumerate(ys)
    if i + j < max(len(xs), len(ys))
  ]
  return functools.reduce(jnp.add, reversed(products))


def _inverse(layout, lower):
  """(I + lower)^-1 [m C, m C] of strictly lower triangular blocks.

  Substitution in blocks of b rows, all of them side by side in the lanes of
  one [b, m C] array; then X <- X - X L_b X joins neighbours until a block is a
  head's chunk.
  """
  tile, chunk = layout.tile, layout.chunk
  size = next(b for b in range(SUBSTITUTED, 0, -8) if chunk % b == 0)
  lane = jax.lax.broadcasted_iota(jnp.int32, (size, tile), 1)
  block = _block(lane, size, (tile,))
  diagonal = lower[:size]
  for i in range(1, tile // size):
    diagonal = jnp.where(
      block == i, lower[i * size : (i + 1) * size], diagonal
    )
  first = block * size
  row = jax.lax.broadcasted_iota(jnp.int32, (size, tile), 0)
  inverse = (row == lane - first).astype(jnp.float32)
  for j in range(size - 1):
    column = jnp.take_along_axis(
      diagonal, first + j, axis=1, mode="promise_in_bounds"
    )
    inverse = inverse - column * inverse[j : j + 1]
  if size == tile:
    return inverse
  shape = (tile, tile)
  row = jax.lax.broadcasted_iota(jnp.int32, shape, 0)
  column = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
  same = _block(row, size, shape) == _block(column, size, shape)
  inverse = jnp.concatenate([inverse] * (tile // size), axis=0)
  inverse = jnp.where(same, inverse, 0.0)
  while size < chunk:
    size *= 2
    # `lower` has no entries between heads; a chunk that is no power of two
    # times b lets blocks begin anew with each head.
    local = [x - layout.chunk * _block(x, chunk, shape) for x in (row, column)]
    joined = _block(local[0], size, shape) == _block(local[1], size, shape)
    between = jnp.where(joined & ~same, lower, 0.0)
    same = joined
    split = _parts(layout, inverse, 2)
    step = _dot(split, _parts(layout, between, 2))
    inverse = inverse - _dot(_parts(layout, step, 2), split)
  return inverse


@dataclasses.dataclass(frozen=True)
class _Chunk:
  """What both directions need of a tile: gates, products, corrected values."""

  beta: jax.Array  # [M, 1]
  since_start: jax.Array  # gamma [M, 1]
  until_end: jax.Array  # delta [M, 1]
  decay: jax.Array  # D [M, M]
  keys_keys: jax.Array  # K K^T [M, M]
  lower: jax.Array  # L [M, M]
  attention: jax.Array  # P = c D * Q K^T [M, M]
  queries_state: jax.Array  # Q S [M, V]
  inverse: jax.Array  # T [M, M]
  error: jax.Array  # V - gamma * K S [M, V]
  corrected: jax.Array  # E [M, V]


def _correct(layout, q, k, v, gates, state):
  tile = layout.tile
  columns = gates.T
  total, beta, end = (columns[:, i : i + 1] for i in range(3))
  causal, strict = layout.causal()
  # Masked before exp: elsewhere the difference may be large.
  decay = jnp.exp(jnp.where(causal, total - gates[:1], -jnp.inf))
  queries_keys = jnp.concatenate([k, q], axis=0)
  products = _dot((queries_keys,), (k,), (1, 1))
  keys_keys, attention = products[:tile], products[tile:]
  lower = jnp.where(strict, beta * decay * keys_keys, 0.0)
  inverse = _inverse(layout, lower)
  from_state = _dot((queries_keys,), _parts(layout, state, 2))
  since_start = jnp.exp(total)
  error = v - since_start * from_state[:tile]
  corrected = _dot(
    _parts(layout, inverse, 2), _parts(layout, beta * error, 2)
  )
  return _Chunk(
    beta=beta,
    since_start=since_start,
    until_end=jnp.exp(end - total),
    decay=decay,
    keys_keys=keys_keys,
    lower=lower,
    attention=layout.key_dim**-0.5 * decay * attention,
    queries_state=from_state[tile:],
    inverse=inverse,
    error=error,
    corrected=corrected,
  )


def _whole_decay(layout, gates, x):
  """exp(G_C) of each head times its rows of x [m K, V]."""
  return jnp.concatenate(
    [
      jnp.exp(gates[2:3, i * layout.chunk : i * layout.chunk + 1])
      * x[i * layout.key_dim : (i + 1) * layout.key_dim]
      for i in range(layout.packed)
    ],
    axis=0,
  )


def _next_state(layout, k, gates, chunk, state):
  """S' = exp(G_C) S + (delta * K)^T E."""
  written = _dot(
    (k,), _parts(layout, chunk.until_end * chunk.corrected, 2), (0, 0)
  )
  return _whole_decay(layout, gates, state) + written


def _tiles(layout):
  """(row, tile, slice of key lanes, of value lanes, of state rows) of each."""
  key, value = (
    layout.packed * dim for dim in (layout.key_dim, layout.value_dim)
  )
  for row in range(layout.rows):
    for i in range(layout.heads // layout.packed):
      keys = slice(i * key, (i + 1) * key)
      yield row, i, keys, slice(i * value, (i + 1) * value)


def _clear(layout, x, chunk):
  """x [C, *] with zeros in the rows beyond T, which hold anything."""
  if layout.length % layout.chunk == 0:
    return x
  row = jax.lax.broadcasted_iota(jnp.int32, x.shape, 0)
  return jnp.where(row < layout.length - chunk * layout.chunk, x, 0)


def _load(layout, q_ref, k_ref, v_ref, gates_ref, row, tile, keys, values, at):
  dtype = jnp.float32 if layout.exact else jnp.bfloat16
  q, k = (
    layout.pack(_clear(layout, ref[row, :, keys], at)).astype(dtype)
    for ref in (q_ref, k_ref)
  )
  v = layout.stack(_clear(layout, v_ref[row, :, values], at))
  return q, k, v, gates_ref[row, 0, tile]


def _forward_kernel(
  q_ref, k_ref, v_ref, gates_ref, start_ref, o_ref, state_ref, *, layout
):
  at = pl.program_id(2)

  @pl.when(at == 0)
  def _():
    state_ref[...] = start_ref[...]

  for row, tile, keys, values in _tiles(layout):
    q, k, v, gates = _load(
      layout, q_ref, k_ref, v_ref, gates_ref, row, tile, keys, values, at
    )
    state = state_ref[row, keys]
    chunk = _correct(layout, q, k, v, gates, state)
    scale = layout.key_dim**-0.5
    o = scale * chunk.since_start * chunk.queries_state + _dot(
      _parts(layout, chunk.attention, 1), _parts(layout, chunk.corrected, 1)
    )
    o_ref[row, :, values] = layout.unstack(o).astype(o_ref.dtype)
    state_ref[row, keys] = _next_state(layout, k, gates, chunk, state)


def _backward_kernel(
  q_ref,
  k_ref,
  v_ref,
  gates_ref,
  start_ref,
  d_o_ref,
  d_end_ref,
  d_q_ref,
  d_k_ref,
  d_v_ref,
  d_gates_ref,
  d_state_ref,
  states_ref,
  *,
  layout,
):
  step = pl.program_id(2)
  last = layout.chunks - 1
  at = jnp.where(step < last, step, 2 * last - step)

  @pl.when(step == 0)
  def _():
    states_ref[0] = start_ref[...]

  @pl.when(step == last)
  def _():
    d_state_ref[...] = d_end_ref[...]

  if last:

    @pl.when(step < last)
    def _():
      for row, tile, keys, values in _tiles(layout):
        q, k, v, gates = _load(
          layout, q_ref, k_ref, v_ref, gates_ref, row, tile, keys, values, at
        )
        state = states_ref[step, row, keys]
        chunk = _correct(layout, q, k, v, gates, state)
        states_ref[step + 1, row, keys] = _next_state(
          layout, k, gates, chunk, state
        )

  @pl.when(step >= last)
  def _():
    for row, tile, keys, values in _tiles(layout):
      q, k, v, gates = _load(
        layout, q_ref, k_ref, v_ref, gates_ref, row, tile, keys, values, at
      )
      d_o = layout.stack(_clear(layout, d_o_ref[row, :, values], at))
      d_q, d_k, d_v, d_gates, d_state = _transpose(
        layout,
        *(q, k, v, gates, states_ref[at, row, keys]),
        *(d_o, d_state_ref[row, keys]),
      )
      d_q_ref[row, :, keys] = layout.unpack(d_q).astype(d_q_ref.dtype)
      d_k_ref[row, :, keys] = layout.unpack(d_k).astype(d_k_ref.dtype)
      d_v_ref[row, :, values] = layout.unstack(d_v).astype(d_v_ref.dtype)
      d_gates_ref[row, 0, tile] = d_gates
      d_state_ref[row, keys] = d_state


def _transpose(layout, q, k, v, gates, state, d_o, d_end):
  """Cotangents of (q, k, v, gates, state) of a tile from those of (o, S')."""
  tile, scale = layout.tile, layout.key_dim**-0.5
  parts = functools.partial(_parts, layout)
  chunk = _correct(layout, q, k, v, gates, state)
  beta, gamma, delta = chunk.beta, chunk.since_start, chunk.until_end
  (low_o,), (low_e,) = parts(d_o, 1), parts(chunk.corrected, 1)
  # E feeds the read-out and the write.
  d_corrected = _dot(parts(chunk.attention, 1), (low_o,), (0, 0)) + delta * _dot(
    (k,), parts(d_end, 2)
  )
  d_x = _dot(parts(chunk.inverse, 2), parts(d_corrected, 2), (0, 0))
  (low_x,) = parts(d_x, 1)
  onto_values = _dot((jnp.concatenate([low_x, low_o], axis=0),), (low_e,), (1, 1))
  causal, strict = layout.causal()
  d_lower = jnp.where(strict, -onto_values[:tile], 0.0)
  d_attention = jnp.where(causal, onto_values[tile:], 0.0)
  d_keys_keys = beta * chunk.decay * d_lower
  d_queries_keys = scale * chunk.decay * d_attention
  d_keys_state = -beta * gamma * d_x
  d_queries_state = scale * gamma * d_o
  (low_s,), (low_end,) = parts(state, 1), parts(d_end, 1)
  onto_state = _dot(
    parts(jnp.concatenate([d_keys_state, d_queries_state], axis=0), 1),
    (low_s,),
    (1, 1),
  )
  k_onto_state, q_onto_state = onto_state[:tile], onto_state[tile:]
  k_onto_end = delta * _dot((low_e,), (low_end,), (1, 1))
  (low_qk,) = parts(d_queries_keys, 1)
  onto_keys = _dot(
    (
      jnp.concatenate(
        [parts(d_keys_keys + d_keys_keys.T, 1)[0], low_qk], axis=0
      ),
    ),
    (k,),
  )
  d_q = onto_keys[tile:] + q_onto_state
  d_k = (
    onto_keys[:tile]
    + _dot((low_qk,), (q,), (0, 0))
    + k_onto_state
    + k_onto_end
  )
  d_state = (
    _whole_decay(layout, gates, d_end)
    + _dot((k,), parts(d_keys_state, 2), (0, 0))
    + _dot((q,), parts(d_queries_state, 2), (0, 0))
  )
  # Gates, as columns [M, 1], then transposed into rows.
  row_sum = functools.partial(jnp.sum, axis=1, keepdims=True)
  through_decay = d_attention * chunk.attention + d_lower * chunk.lower
  d_beta = row_sum(d_x * chunk.error) + row_sum(
    d_lower * chunk.decay * chunk.keys_keys
  )
  d_write = row_sum(k * k_onto_end)
  d_total = (
    row_sum(through_decay)
    + row_sum(k * k_onto_state)
    + row_sum(q * q_onto_state)
    - d_write
  )
  columns = jnp.concatenate([d_total, d_beta, d_write], axis=1)
  columns = jnp.pad(columns, ((0, 0), (0, GATES - 3)))
  index = jax.lax.broadcasted_iota(jnp.int32, (1, tile), 1)
  kept = _whole_decay(layout, gates, d_end) * state
  whole = sum(
    jnp.where(
      index == i * layout.chunk,
      jnp.sum(kept[i * layout.key_dim : (i + 1) * layout.key_dim]),
      0.0,
    )
    for i in range(layout.packed)
  )
  through_rows = jnp.concatenate(
    [
      -jnp.sum(through_decay, axis=0, keepdims=True),
      jnp.zeros_like(whole),
      whole,
      jnp.zeros((GATES - 3, tile), jnp.float32),
    ],
    axis=0,
  )
  return d_q, d_k, beta * d_x, columns.T + through_rows, d_state


def _layout(q, v):
  batch, length, heads, key_dim = q.shape
  value_dim = v.shape[-1]
  chunk = min(-(-length // 8) * 8, MAX_TILE)
  divisors = [i for i in range(1, heads + 1) if heads % i == 0]
  # Blocks of lanes are multiples of 128, or everything.
  aligned = [
    i
    for i in divisors
    if i == heads or i * key_dim % 128 == 0 and i * value_dim % 128 == 0
  ]
  packed = max(i for i in divisors if i * chunk <= MAX_TILE)
  block = next(i for i in aligned if i % packed == 0)
  rows = 4 if length <= chunk else 1
  return Layout(
    rows=min(rows, batch),
    chunk=chunk,
    heads=block,
    packed=packed,
    length=length,
    key_dim=key_dim,
    value_dim=value_dim,
    exact=q.dtype != jnp.bfloat16,
  )


def gated_delta_rule(
  q, k, v, g, beta, initial_state, *, interpret: bool = False
):
  """Returns (o, final_state); see `api`."""
  layout = _layout(q, v)
  batch, length, heads, _ = q.shape
  flat = [x.reshape(batch, length, -1) for x in (q, k, v)]
  gates = _gates(layout, g, beta)
  state = initial_state.reshape(batch, -1, layout.value_dim)
  o, final = _rule(layout, interpret, *flat, gates, state)
  return o.reshape(v.shape), final.reshape(initial_state.shape)


def _gates(layout, g, beta):
  """[B, chunks, H / m, GATES, m C]: the total of g, beta, the whole total."""
  padding = layout.chunks * layout.chunk - layout.length

  def cut(x):  # [B, T, H] -> [B, chunks, H, C]; zeros leave the state alone
    x = jnp.pad(x.astype(jnp.float32), ((0, 0), (0, padding), (0, 0)))
    x = x.reshape(x.shape[0], layout.chunks, layout.chunk, -1)
    return jnp.swapaxes(x, 2, 3)

  total = jnp.cumsum(cut(g), axis=3)
  end = jnp.broadcast_to(total[..., -1:], total.shape)
  gates = jnp.stack([total, cut(beta), end], axis=2)
  gates = gates.reshape(*gates.shape[:3], -1, layout.tile)
  gates = jnp.swapaxes(gates, 2, 3)
  return jnp.pad(gates, [(0, 0)] * 3 + [(0, GATES - 3), (0, 0)])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _rule(layout, interpret, q, k, v, gates, state):
  return _forward(layout, interpret, q, k, v, gates, state)[0]


def _specs(layout, chunk_of):
  """BlockSpecs of (keys, values, gates, state)."""
  tiles = layout.heads // layout.packed

  def tokens(width):
    return pl.BlockSpec(
      (layout.rows, layout.chunk, layout.heads * width),
      lambda i, j, s: (i, chunk_of(s), j),
    )

  gates = pl.BlockSpec(
    (layout.rows, 1, tiles, GATES, layout.tile),
    lambda i, j, s: (i, chunk_of(s), j, 0, 0),
  )
  state = pl.BlockSpec(
    (layout.rows, layout.heads * layout.key_dim, layout.value_dim),
    lambda i, j, s: (i, j, 0),
  )
  return tokens(layout.key_dim), tokens(layout.value_dim), gates, state


def _forward(layout, interpret, q, k, v, gates, state):
  keys, values, gates_spec, states = _specs(layout, lambda s: s)
  out = pl.pallas_call(
    functools.partial(_forward_kernel, layout=layout),
    grid=(
      pl.cdiv(q.shape[0], layout.rows),
      q.shape[2] // (layout.heads * layout.key_dim),
      layout.chunks,
    ),
    in_specs=[keys, keys, values, gates_spec, states],
    out_specs=[values, states],
    out_shape=[
      jax.ShapeDtypeStruct(v.shape, v.dtype),
      jax.ShapeDtypeStruct(state.shape, jnp.float32),
    ],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel", "parallel", "arbitrary")
    ),
    interpret=interpret,
    name="gated_delta_forward",
  )(q, k, v, gates, state)
  return out, (q, k, v, gates, state)


def _backward(layout, interpret, residuals, cotangents):
  q, k, v, gates, state = residuals
  d_o, d_end = cotangents
  last = layout.chunks - 1
  walk = _specs(layout, lambda s: jnp.where(s < last, s, 2 * last - s))
  # Not needed, or not yet written, on the way forward.
  back = _specs(layout, lambda s: jnp.minimum(last, 2 * last - s))
  keys, values, gates_spec, states = walk
  return tuple(
    pl.pallas_call(
      functools.partial(_backward_kernel, layout=layout),
      grid=(
        pl.cdiv(q.shape[0], layout.rows),
        q.shape[2] // (layout.heads * layout.key_dim),
        2 * layout.chunks - 1,
      ),
      in_specs=[back[0], keys, values, gates_spec, states, back[1], states],
      out_specs=[back[0], back[0], back[1], back[2], states],
      out_shape=[
        jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v, gates, state)
      ],
      scratch_shapes=[
        pltpu.VMEM(
          (
            layout.chunks,
            layout.rows,
            layout.heads * layout.key_dim,
            layout.value_dim,
          ),
          jnp.float32,
        )
      ],
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      interpret=interpret,
      name="gated_delta_backward",
    )(q, k, v, gates, state, d_o, d_end)
  )


_rule.defvjp(_forward, _backward)
