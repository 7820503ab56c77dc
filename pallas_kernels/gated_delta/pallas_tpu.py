"""The gated delta rule on TPUs: one Mosaic kernel forward, one backward.

The grid walks over blocks of batch rows, blocks of heads, and chunks of tokens
one after the other; the state waits in VMEM. Within a chunk the equations are
those of `chunked_xla`.

Matrix units multiply tiles of 128 or 256 rows, a window of 24 tokens fills few
of them. So the heads of a row are packed: the C tokens of m heads become the
M = m C rows of one tile, with keys [M, m K] that are zero outside their own
head's lanes. Their Gram matrix is then block-diagonal of itself, one product
with the stacked states [m K, V] serves all m heads, and the layout [B, T, H K]
in which projections write needs no transpose. Long chunks have m = 1.

A step of the grid works on several tiles, phase by phase, so that one tile's
products hide the latency of another's; between phases values lie in VMEM, not
in registers.

The backward kernel walks over the chunks twice: forward to rebuild the start
state, the inverse and the corrected values of each, which stay in VMEM, then
backward. HBM sees inputs, outputs and the start state alone.

Products of bfloat16 inputs take one pass of the matrix unit with float32
accumulation. Whatever passes through the inverse or the state is split into two
bfloat16 parts (two or three passes, 16 bits); float32 inputs take full
precision throughout.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

# Rows of a tile: what the smaller matrix units hold.
MAX_TILE = 128
# Tiles a step of the grid, as many as fit: one hides another's latency.
TILES = (4, 2, 1)
# For the scratch of a kernel, of the 16 MiB that compilers grant by default.
VMEM_BYTES = 13 * 2**20
# Blocks of the inverse by substitution have at most this many rows.
SUBSTITUTED = 32
# Rows of `gates`: the running total of g, beta, the chunk's whole total; a
# tile of float32 has 8.
GATES = 8
LANES = 128


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

  @property
  def groups(self):
    """Tiles of a batch row of a block."""
    return self.heads // self.packed

  @property
  def dtype(self):
    """Of operands of the matrix unit."""
    return jnp.float32 if self.exact else jnp.bfloat16

  def pack(self, x):
    """[C, m K] -> [m C, m K], zero outside a head's own lanes."""
    if self.packed == 1:
      return x
    x = jnp.concatenate([x.astype(jnp.float32)] * self.packed, axis=0)
    row, lane = _iotas(x.shape)
    for i in range(1, self.packed):
      other = (row >= i * self.chunk) != (lane >= i * self.key_dim)
      x = jnp.where(other, 0.0, x)
    return x

  def unpack(self, x):
    """[m C, m K] -> [C, m K]: of each head its own lanes."""
    out = x[: self.chunk]
    _, lane = _iotas(out.shape)
    for i in range(1, self.packed):
      rows = x[i * self.chunk : (i + 1) * self.chunk]
      out = jnp.where(lane >= i * self.key_dim, rows, out)
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
    """Which token of a tile [M, M] sees which: its head's past and itself."""
    row, column = _iotas((self.tile, self.tile))
    head = _start(row, self.chunk)
    return (row >= column) & (column >= head)

  def strict(self, x):
    """x [M, M] below the diagonal; x is zero between heads already."""
    row, column = _iotas(x.shape)
    return jnp.where(row > column, x, 0.0)

  def decayed(self, gates, x):
    """exp(G_C) of each head times its rows of x [m K, V]."""
    return jnp.concatenate(
      [
        jnp.exp(gates[2:3, i * self.chunk : i * self.chunk + 1])
        * x[i * self.key_dim : (i + 1) * self.key_dim]
        for i in range(self.packed)
      ],
      axis=0,
    )

  def parts(self, x, count):
    """x as a sum of bfloat16 arrays, or as it is where products are exact."""
    if self.exact:
      return (x.astype(jnp.float32),)
    high = x.astype(jnp.bfloat16)
    if count == 1 or x.dtype == jnp.bfloat16:
      return (high,)
    return high, (x - high.astype(jnp.float32)).astype(jnp.bfloat16)


def _iotas(shape):
  return [jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1)]


def _start(index, size):
  """index // size * size, by comparisons: vector units do not divide."""
  start = jnp.zeros_like(index)
  for i in range(size, max(index.shape), size):
    start = jnp.where(index >= i, i, start)
  return start


def _dot(xs, ys, contract=(1, 0)):
  """Product of two sums of parts in float32, without low times low.

  A part of ys is loaded into the matrix unit once, for all parts of xs.
  """
  dimensions = (((contract[0],), (contract[1],)), ((), ()))
  exact = xs[0].dtype == jnp.float32
  precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
  products = []
  for j, y in enumerate(ys):
    used = xs[: max(len(xs), len(ys)) - j]
    both = jax.lax.dot_general(
      jnp.concatenate(used, axis=1 - contract[0]),
      y,
      dimensions,
      precision,
      preferred_element_type=jnp.float32,
    )
    products += jnp.split(both, len(used), axis=0)
  return functools.reduce(jnp.add, reversed(products))


class _Scratch(NamedTuple):
  """What a step keeps of its tiles between phases, in VMEM, by tile.

  P = parts of an operand: 2 of bfloat16, or 1 of float32.
  """

  keys: Any  # K above Q, operands [2 M, m K]
  columns: Any  # G, beta, G_C by token, in all of 128 lanes [3, M, LANES]
  decay: Any  # D [M, M]
  similarity: Any  # D * K K^T below the diagonal [M, M]
  attention: Any  # P = c D * Q K^T, operand [M, M]
  inverse: Any  # T [P, M, M]
  corrected: Any  # E, operand [M, V]
  written: Any  # delta * E [P, M, V]
  read: Any  # c gamma * Q S [M, V]

  @classmethod
  def shapes(cls, layout, chunks=None):
    """The arrays to allocate; of `chunks`, what the backward walk keeps."""
    tiles, tile = layout.rows * layout.groups, layout.tile
    parts = 1 if layout.exact else 2

    def array(*shape, dtype=jnp.float32, kept=()):
      return pltpu.VMEM((*kept, tiles, *shape), dtype)

    operand = functools.partial(array, dtype=layout.dtype)
    kept = (chunks,) if chunks else ()

    return cls(
      keys=operand(2 * tile, layout.packed * layout.key_dim),
      columns=array(3, tile, LANES),
      decay=array(tile, tile),
      similarity=array(tile, tile),
      attention=operand(tile, tile),
      inverse=operand(parts, tile, tile, kept=kept),
      corrected=operand(tile, layout.value_dim, kept=kept),
      written=operand(parts, tile, layout.value_dim),
      read=array(tile, layout.value_dim),
    )

  def column(self, t, i, width):
    """Gate i of a tile's tokens, [M, width]."""
    whole = self.columns[t, i]
    copies = [whole] * pl.cdiv(width, LANES)
    return jnp.concatenate(copies, axis=1)[:, :width]


def scratch_shapes(layout):
  """What `one_chunk` keeps in VMEM between its phases."""
  return _Scratch.shapes(layout)


def _store_parts(layout, ref, x):
  for i, part in enumerate(layout.parts(x, 2)):
    ref[i] = part


def _load_parts(ref):
  return tuple(ref[i] for i in range(ref.shape[0]))


class _Tile(NamedTuple):
  """A tile's number, batch row, group of heads, and lanes in the block."""

  number: int
  row: int
  group: int
  keys: slice
  values: slice


def _tiles(layout):
  key, value = (
    layout.packed * dim for dim in (layout.key_dim, layout.value_dim)
  )
  return [
    _Tile(
      row * layout.groups + i,
      row,
      i,
      slice(i * key, (i + 1) * key),
      slice(i * value, (i + 1) * value),
    )
    for row in range(layout.rows)
    for i in range(layout.groups)
  ]


def _load(layout, ref, tile, lanes, at):
  """A tile's tokens [C, *]; those beyond T, which hold anything, are zeros."""
  x = ref[tile.row, :, lanes]
  if layout.length % layout.chunk == 0:
    return x
  row, _ = _iotas(x.shape)
  return jnp.where(row < layout.length - at * layout.chunk, x, 0)


def _compare(layout, scratch, tile, q_ref, k_ref, gates_ref, at):
  """Phase 1: keys with keys and with queries, decayed."""
  t = tile.number
  q, k = (
    layout.pack(_load(layout, ref, tile, tile.keys, at)).astype(layout.dtype)
    for ref in (q_ref, k_ref)
  )
  keys = jnp.concatenate([k, q], axis=0)
  scratch.keys[t] = keys
  gates = gates_ref[tile.row, 0, tile.group]
  columns = gates.T
  for i in range(2):
    scratch.columns[t, i] = jnp.broadcast_to(
      columns[:, i : i + 1], (layout.tile, LANES)
    )
  for i in range(0, layout.tile, layout.chunk):  # one total a head
    scratch.columns[t, 2, i : i + layout.chunk] = jnp.broadcast_to(
      gates[2:3, i : i + 1], (layout.chunk, LANES)
    )
  # Masked before exp: elsewhere the difference may be large.
  decay = jnp.exp(
    jnp.where(
      layout.causal(), scratch.column(t, 0, layout.tile) - gates[:1], -jnp.inf
    )
  )
  scratch.decay[t] = decay
  products = _dot((keys,), (k,), (1, 1))
  scratch.similarity[t] = layout.strict(decay * products[: layout.tile])
  scratch.attention[t] = (
    layout.key_dim**-0.5 * decay * products[layout.tile :]
  ).astype(layout.dtype)


def _invert(layout, scratch, tiles):
  """Phase 2: T = (I + L)^-1 of L = diag(beta) similarity.

  Substitution in blocks of b rows, all of them side by side in the lanes of
  one [b, M] array; then X <- X - X L_b X joins neighbours until a block is a
  head's chunk.
  """
  tile, chunk = layout.tile, layout.chunk
  size = next(b for b in range(SUBSTITUTED, 0, -8) if chunk % b == 0)
  # In strips of 8 rows, one row of registers: strips above row j are done.
  row, lane = _iotas((8, tile))
  first = _start(lane, size)
  strips = range(0, size, 8)
  diagonals, inverses = [], []
  for t in tiles:
    beta, similarity = (
      scratch.column(t.number, 1, tile),
      scratch.similarity[t.number],
    )
    lower = beta * similarity
    diagonals.append(
      [
        functools.reduce(
          lambda x, i: jnp.where(lane >= i, lower[i + at : i + at + 8], x),
          range(0, tile, size),
          jnp.zeros((8, tile), jnp.float32),
        )
        for at in strips
      ]
    )
    inverses.append(
      [(row + at == lane - first).astype(jnp.float32) for at in strips]
    )
  for j in range(size - 1):
    for diagonal, inverse in zip(diagonals, inverses, strict=True):
      above = inverse[j // 8][j % 8 : j % 8 + 1]
      for i in range((j + 1) // 8, len(strips)):
        column = jnp.take_along_axis(
          diagonal[i], first + j, axis=1, mode="promise_in_bounds"
        )
        inverse[i] = inverse[i] - column * above
  row, column = _iotas((tile, tile))
  same = _start(row, size) == _start(column, size)
  for t, inverse in zip(tiles, inverses, strict=True):
    inverse = jnp.concatenate(inverse * (tile // size), axis=0)
    _store_parts(
      layout, scratch.inverse.at[t.number], jnp.where(same, inverse, 0.0)
    )
  while size < chunk:
    # The second blocks of all pairs; blocks begin anew with each head.
    seconds = [
      slice(head + i, head + min(i + size, chunk))
      for head in range(0, tile, chunk)
      for i in range(size, chunk, 2 * size)
    ]
    for t in tiles:
      _join(layout, scratch, t, seconds, size)
    size *= 2


def _join(layout, scratch, tile, seconds, size):
  """X <- X - X L_b X: only the rows of second blocks change.

  Args:
    seconds: the rows of blocks to be joined with the `size` rows before.
  """
  t = tile.number
  beta = scratch.column(t, 1, layout.tile)
  lower = []
  for rows in seconds:
    _, lane = _iotas((rows.stop - rows.start, layout.tile))
    before = (lane >= rows.start - size) & (lane < rows.start)
    lower.append(
      jnp.where(before, beta[rows] * scratch.similarity[t, rows], 0.0)
    )
  inverse = _load_parts(scratch.inverse.at[t])
  step = _dot(layout.parts(jnp.concatenate(lower, axis=0), 2), inverse)
  # Back among the rows of first blocks, whose part in the product is nothing.
  placed, here, taken = [], 0, 0
  for rows in seconds:
    count = rows.stop - rows.start
    placed.append(jnp.zeros((rows.start - here, layout.tile), jnp.float32))
    placed.append(step[taken : taken + count])
    here, taken = rows.stop, taken + count
  placed.append(jnp.zeros((layout.tile - here, layout.tile), jnp.float32))
  placed = jnp.concatenate([x for x in placed if x.shape[0]], axis=0)
  changed = tuple(
    jnp.concatenate([x[rows] for rows in seconds], axis=0) for x in inverse
  )
  joined = sum(x.astype(jnp.float32) for x in changed)
  joined -= _dot(changed, layout.parts(placed, 2))
  taken = 0
  for rows in seconds:
    count = rows.stop - rows.start
    _store_parts(
      layout,
      scratch.inverse.at[t, :, rows],
      joined[taken : taken + count],
    )
    taken += count


def _correct(layout, scratch, tile, v_ref, state, at, reading):
  """Phase 3: E = T X of X = beta * (V - gamma * K S); with `reading`, Q S."""
  t, size = tile.number, layout.tile
  wide = functools.partial(scratch.column, t, width=layout.value_dim)
  high, *low = layout.parts(state, 2)
  since_start = jnp.exp(wide(0))
  if reading:
    # Q S is only read; K S, which is learnt from, gets the low part too.
    from_state = _dot((scratch.keys[t],), (high,))
    scratch.read[t] = layout.key_dim**-0.5 * since_start * from_state[size:]
  else:
    from_state = _dot((scratch.keys[t, :size],), (high,))
  predicted = from_state[:size]
  if low:
    predicted += _dot((scratch.keys[t, :size],), low)
  v = layout.stack(_load(layout, v_ref, tile, tile.values, at))
  x = wide(1) * (v - since_start * predicted)
  corrected = _dot(_load_parts(scratch.inverse.at[t]), layout.parts(x, 2))
  scratch.corrected[t] = corrected.astype(layout.dtype)
  _store_parts(
    layout, scratch.written.at[t], jnp.exp(wide(2) - wide(0)) * corrected
  )


def _write(layout, scratch, tile, gates_ref, state):
  """S' = exp(G_C) S + K^T (delta * E)."""
  t = tile.number
  return layout.decayed(gates_ref[tile.row, 0, tile.group], state) + _dot(
    (scratch.keys[t, : layout.tile],),
    _load_parts(scratch.written.at[t]),
    (0, 0),
  )


def _forward_kernel(
  q_ref, k_ref, v_ref, gates_ref, start_ref, o_ref, state_ref, *scratch, layout
):
  at = pl.program_id(2)

  @pl.when(at == 0)
  def _():
    state_ref[...] = start_ref[...]

  one_chunk(
    layout, scratch, q_ref, k_ref, v_ref, gates_ref, o_ref, state_ref, at
  )


def one_chunk(
  layout, scratch, q_ref, k_ref, v_ref, gates_ref, o_ref, state_ref, at
):
  """Writes o and, in place, the state after chunk number `at` of a block.

  Args:
    scratch: refs of `scratch_shapes(layout)`.
    q_ref, k_ref: [rows, C, heads K] of the block; v_ref, o_ref: [rows, C,
      heads V]; gates_ref: as `_gates` makes them; state_ref: [rows, heads K,
      V].
  """
  scratch = _Scratch(*scratch)
  tiles = _tiles(layout)
  for tile in tiles:
    _compare(layout, scratch, tile, q_ref, k_ref, gates_ref, at)
  _invert(layout, scratch, tiles)
  for tile in tiles:
    state = state_ref[tile.row, tile.keys]
    _correct(layout, scratch, tile, v_ref, state, at, reading=True)
  for tile in tiles:
    t = tile.number
    o = scratch.read[t] + _dot((scratch.attention[t],), (scratch.corrected[t],))
    o_ref[tile.row, :, tile.values] = layout.unstack(o).astype(o_ref.dtype)
    state = state_ref[tile.row, tile.keys]
    state_ref[tile.row, tile.keys] = _write(
      layout, scratch, tile, gates_ref, state
    )


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
  *scratch,
  layout,
):
  step = pl.program_id(2)
  last = layout.chunks - 1
  at = jnp.where(step <= last, step, 2 * last - step)
  tiles = _tiles(layout)
  scratch = _Scratch(*scratch)
  scratch = scratch._replace(
    inverse=scratch.inverse.at[at], corrected=scratch.corrected.at[at]
  )

  @pl.when(step == 0)
  def _():
    states_ref[0] = start_ref[...]

  for tile in tiles:
    _compare(layout, scratch, tile, q_ref, k_ref, gates_ref, at)

  @pl.when(step <= last)
  def _():
    _invert(layout, scratch, tiles)
    for tile in tiles:
      state = states_ref[at, tile.row, tile.keys]
      _correct(layout, scratch, tile, v_ref, state, at, reading=False)

  if last:

    @pl.when(step < last)
    def _():
      for tile in tiles:
        state = states_ref[at, tile.row, tile.keys]
        states_ref[at + 1, tile.row, tile.keys] = _write(
          layout, scratch, tile, gates_ref, state
        )

  @pl.when(step == last)
  def _():
    d_state_ref[...] = d_end_ref[...]

  @pl.when(step >= last)
  def _():
    for tile in tiles:
      _transpose(
        layout,
        scratch,
        tile,
        *(v_ref, gates_ref, states_ref.at[at], d_o_ref),
        *(d_q_ref, d_k_ref, d_v_ref, d_gates_ref, d_state_ref),
        at,
      )


def _transpose(
  layout,
  scratch,
  tile,
  v_ref,
  gates_ref,
  states_ref,
  d_o_ref,
  d_q_ref,
  d_k_ref,
  d_v_ref,
  d_gates_ref,
  d_state_ref,
  at,
):
  """Phase 4: from the cotangents of o and S' to those of a tile's inputs."""
  t, size, scale = tile.number, layout.tile, layout.key_dim**-0.5
  parts = functools.partial(layout.parts, count=1)
  split = functools.partial(layout.parts, count=2)
  wide = functools.partial(scratch.column, t, width=layout.value_dim)
  keyed = functools.partial(
    scratch.column, t, width=layout.packed * layout.key_dim
  )
  gates = gates_ref[tile.row, 0, tile.group]
  state = states_ref[tile.row, tile.keys]
  d_end = d_state_ref[tile.row, tile.keys]
  d_o = layout.stack(_load(layout, d_o_ref, tile, tile.values, at))
  k, q = scratch.keys[t, :size], scratch.keys[t, size:]
  corrected = scratch.corrected[t]
  # E feeds the read-out and the write.
  d_corrected = _dot((scratch.attention[t],), parts(d_o), (0, 0))
  d_corrected += jnp.exp(wide(2) - wide(0)) * _dot((k,), split(d_end))
  d_x = _dot(_load_parts(scratch.inverse.at[t]), split(d_corrected), (0, 0))
  # What reaches S from X and from the read-out.
  since_start = jnp.exp(wide(0))
  d_keys_state = -wide(1) * since_start * d_x
  d_queries_state = scale * since_start * d_o
  d_state_ref[tile.row, tile.keys] = (
    layout.decayed(gates, d_end)
    + _dot((k,), split(d_keys_state), (0, 0))
    + _dot((q,), split(d_queries_state), (0, 0))
  )
  d_v = wide(1) * d_x
  d_v_ref[tile.row, :, tile.values] = layout.unstack(d_v).astype(d_v_ref.dtype)
  v = layout.stack(_load(layout, v_ref, tile, tile.values, at))
  error = v - since_start * _dot((k,), parts(state))
  # What reaches the products of keys with keys and with queries.
  low_x_and_o = jnp.concatenate([*parts(d_x), *parts(d_o)], axis=0)
  onto_values = _dot((low_x_and_o,), (corrected,), (1, 1))
  d_lower = layout.strict(-onto_values[:size])
  d_attention = onto_values[size:]
  decay, beta = scratch.decay[t], scratch.column(t, 1, size)
  d_similarity = beta * d_lower
  d_keys_keys = decay * d_similarity
  d_queries_keys = parts(scale * decay * d_attention)
  through_decay = (
    d_attention * scratch.attention[t].astype(jnp.float32)
    + d_similarity * scratch.similarity[t]
  )
  low_states = jnp.concatenate(
    [*parts(d_keys_state), *parts(d_queries_state)], axis=0
  )
  onto_state = _dot((low_states,), parts(state), (1, 1))
  onto_end = jnp.exp(keyed(2) - keyed(0)) * _dot(
    (corrected,), parts(d_end), (1, 1)
  )
  low_keys = jnp.concatenate(
    [*parts(d_keys_keys + d_keys_keys.T), *d_queries_keys], axis=0
  )
  onto_keys = _dot((low_keys,), (k,))
  d_q = onto_keys[size:] + onto_state[size:]
  d_k = (
    onto_keys[:size]
    + _dot(d_queries_keys, (q,), (0, 0))
    + onto_state[:size]
    + onto_end
  )
  d_q_ref[tile.row, :, tile.keys] = layout.unpack(d_q).astype(d_q_ref.dtype)
  d_k_ref[tile.row, :, tile.keys] = layout.unpack(d_k).astype(d_k_ref.dtype)
  # Gates: sums over a token's row, as columns, then all as rows.
  row_sum = functools.partial(jnp.sum, axis=1, keepdims=True)
  d_write = row_sum(k * onto_end)
  d_beta = row_sum(d_x * error) + row_sum(d_lower * scratch.similarity[t])
  d_total = (
    row_sum(through_decay)
    + row_sum(k * onto_state[:size] + q * onto_state[size:])
    - d_write
  )
  columns = jnp.concatenate([d_total, d_beta, d_write], axis=1)
  columns = jnp.pad(columns, ((0, 0), (0, GATES - 3)))
  # The whole chunk's decay belongs to a head, whose first token has it.
  kept = layout.decayed(gates, d_end) * state
  gate, token = _iotas((GATES, size))
  by_token = columns.T - jnp.where(
    gate == 0, jnp.sum(through_decay, axis=0, keepdims=True), 0.0
  )
  for i in range(layout.packed):
    whole = jnp.sum(kept[i * layout.key_dim : (i + 1) * layout.key_dim])
    first = (gate == 2) & (token == i * layout.chunk)
    by_token += jnp.where(first, whole, 0.0)
  d_gates_ref[tile.row, 0, tile.group] = by_token


def _layouts(q, k, v):
  """Every way to cut the inputs, the most tiles a step first."""
  batch, length, heads, key_dim = q.shape
  value_dim = v.shape[-1]
  # Chunks of equal length, whole tiles of 8 tokens.
  chunk = pl.cdiv(pl.cdiv(length, pl.cdiv(length, MAX_TILE)), 8) * 8
  divisors = [i for i in range(1, heads + 1) if heads % i == 0]
  packed = max(i for i in divisors if i * chunk <= MAX_TILE)
  # Blocks of lanes are multiples of 128, or everything.
  blocks = [
    i
    for i in divisors
    if i % packed == 0
    and (i == heads or (i * key_dim) % LANES == (i * value_dim) % LANES == 0)
  ]
  for tiles in TILES:
    block = next((i for i in blocks if i >= tiles * packed), heads)
    yield Layout(
      rows=min(batch, max(1, tiles * packed // block)),
      chunk=chunk,
      heads=block,
      packed=packed,
      length=length,
      key_dim=key_dim,
      value_dim=value_dim,
      exact=jnp.result_type(q, k, v) != jnp.bfloat16,
    )


def _fitting(layouts, scratch):
  """The first layout whose scratch fits; ValueError if none does."""
  reason = "no layout"
  for layout in layouts:
    needed = sum(
      math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch(layout)
    )
    if needed <= VMEM_BYTES:
      return layout
    reason = (
      f"a kernel would keep {needed / 2**20:.0f} MiB in VMEM for T = "
      f"{layout.length}, K = {layout.key_dim}, V = {layout.value_dim}: at most "
      f"{VMEM_BYTES / 2**20:.0f} MiB fit"
    )
  raise ValueError(reason)


def _backward_scratch(layout):
  states = (
    *(layout.chunks, layout.rows),
    *(layout.heads * layout.key_dim, layout.value_dim),
  )
  return [
    pltpu.VMEM(states, jnp.float32),
    *_Scratch.shapes(layout, layout.chunks),
  ]


def cannot_serve(q, k, v, g, beta, initial_state) -> str | None:
  """Why the kernels do not serve these arrays; None if they do."""
  del g, beta
  if initial_state.dtype != jnp.float32:
    return f"the state is {initial_state.dtype}: the kernels keep float32"
  try:
    _fitting(_layouts(q, k, v), _backward_scratch)
  except ValueError as error:
    return str(error)
  return None


def gated_delta_rule(q, k, v, g, beta, initial_state, *, interpret=False):
  """Returns (o, final_state); see `api`.

  Args:
    interpret: False, or `pltpu.InterpretParams()` to run on a CPU.

  Raises:
    ValueError: what the backward kernel keeps does not fit into VMEM.
  """
  layouts = (
    _fitting(_layouts(q, k, v), _Scratch.shapes),
    _fitting(_layouts(q, k, v), _backward_scratch),
  )
  batch, length = q.shape[:2]
  flat = [x.reshape(batch, length, -1) for x in (q, k, v)]
  gates = _gates(layouts[0], g, beta)
  state = initial_state.reshape(batch, -1, v.shape[-1])
  o, final = _rule(layouts, interpret, *flat, gates, state)
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
def _rule(layouts, interpret, q, k, v, gates, state):
  """(o, final state) of flat arrays; layouts of the forward and backward."""
  return _forward(layouts, interpret, q, k, v, gates, state)[0]


def _specs(layout, chunk_of):
  """BlockSpecs of (keys, values, gates, state)."""

  def tokens(width):
    return pl.BlockSpec(
      (layout.rows, layout.chunk, layout.heads * width),
      lambda i, j, step: (i, chunk_of(step), j),
    )

  gates = pl.BlockSpec(
    (layout.rows, 1, layout.groups, GATES, layout.tile),
    lambda i, j, step: (i, chunk_of(step), j, 0, 0),
  )
  state = pl.BlockSpec(
    (layout.rows, layout.heads * layout.key_dim, layout.value_dim),
    lambda i, j, step: (i, j, 0),
  )
  return tokens(layout.key_dim), tokens(layout.value_dim), gates, state


def _call(kernel, layout, steps, inputs, like, flops, **options):
  """pallas_call with what both kernels share; vmap makes the batch larger.

  Args:
    steps: of the grid's last axis.
    inputs: arrays with the batch first.
    like: which of them the outputs are like.
    flops: by chunk and head.
  """

  @jax.custom_batching.custom_vmap
  def call(*inputs):
    batch, _, width = inputs[0].shape
    outputs = [
      jax.ShapeDtypeStruct(
        x.shape,
        x.dtype,
        # Under shard_map an output varies over the mesh as its like does.
        manual_axis_type=jax.typeof(x).manual_axis_type,
      )
      for x in (inputs[i] for i in like)
    ]
    items = batch * width // layout.key_dim * layout.chunks
    run = pl.pallas_call(
      functools.partial(kernel, layout=layout),
      grid=(
        pl.cdiv(batch, layout.rows),
        width // (layout.heads * layout.key_dim),
        steps,
      ),
      out_shape=outputs,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary")
      ),
      cost_estimate=pl.CostEstimate(
        flops=items * flops,
        transcendentals=items * layout.chunk * (layout.chunk + 2),
        bytes_accessed=sum(
          x.size * x.dtype.itemsize for x in (*inputs, *outputs)
        ),
      ),
      **options,
    )
    return tuple(run(*inputs))

  @call.def_vmap
  def fold(size, batched, *inputs):
    inputs = [
      x if mapped else jnp.broadcast_to(x, (size, *x.shape))
      for x, mapped in zip(inputs, batched, strict=True)
    ]
    outputs = call(*(x.reshape(-1, *x.shape[2:]) for x in inputs))
    outputs = tuple(x.reshape(size, -1, *x.shape[1:]) for x in outputs)
    return outputs, (True,) * len(outputs)

  return call(*inputs)


def _forward(layouts, interpret, *inputs):
  layout, _ = layouts
  keys, values, gates, states = _specs(layout, lambda step: step)
  chunk, key, value = layout.chunk, layout.key_dim, layout.value_dim
  out = _call(
    _forward_kernel,
    layout,
    layout.chunks,
    inputs,
    (2, 4),
    4 * chunk**2 * (key + value) + 6 * chunk * key * value + 2 * chunk**3 // 3,
    in_specs=[keys, keys, values, gates, states],
    out_specs=[values, states],
    scratch_shapes=_Scratch.shapes(layout),
    interpret=interpret,
    name="gated_delta_forward",
  )
  return out, inputs


def _backward(layouts, interpret, inputs, cotangents):
  _, layout = layouts
  last = layout.chunks - 1
  keys, values, gates, states = _specs(
    layout, lambda step: jnp.where(step < last, step, 2 * last - step)
  )
  # Not needed, or not yet written, on the way forward.
  late_keys, late_values, late_gates, _ = _specs(
    layout, lambda step: jnp.minimum(last, 2 * last - step)
  )
  chunk, key, value = layout.chunk, layout.key_dim, layout.value_dim
  return _call(
    _backward_kernel,
    layout,
    2 * last + 1,
    (*inputs, *cotangents),
    range(5),
    chunk**2 * (12 * key + 10 * value)
    + 14 * chunk * key * value
    + 2 * chunk**3 // 3,
    in_specs=[keys, keys, values, gates, states, late_values, states],
    out_specs=[late_keys, late_keys, late_values, late_gates, states],
    scratch_shapes=_backward_scratch(layout),
    interpret=interpret,
    name="gated_delta_backward",
  )


_rule.defvjp(_forward, _backward)
