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
products hide the latency of another's. A phase is a region of its own for the
compiler: without borders it mixes phases until registers spill. Between phases
values lie in VMEM, in float32, for the tiles of bfloat16 in memory are not
those of the matrix unit before v6e.

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

from pallas_kernels.target import target

# Rows of a tile: what the smaller matrix units hold.
MAX_TILE = 128
# Tiles a step of the grid, as many as fit: one hides another's latency.
TILES = (4, 2, 1)
# For the scratch of a kernel: of the 16 MiB that compilers grant by default,
# all of v4's, and of what they grant if asked, 64 MiB or more on others.
VMEM_BYTES = 13 * 2**20
MOST_VMEM_BYTES = 40 * 2**20
# What a kernel that asks for more than the default gets for its blocks.
BLOCKS_BYTES = 8 * 2**20
# Blocks of the inverse by substitution have at most this many rows.
SUBSTITUTED = 24
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

  def until_end(self, gates, total):
    """exp(G_C - G) [M, *] of G in all lanes."""
    ends = [
      jnp.broadcast_to(gates[2:3, i : i + 1], (self.chunk, total.shape[1]))
      for i in range(0, self.tile, self.chunk)
    ]
    return jnp.exp(jnp.concatenate(ends, axis=0) - total)

  def parts(self, x, count):
    """x as a sum of `count` arrays for `dot`, or as it is for exact products.

    The upper 16 bits of a float32 are a bfloat16; what is left fits another.
    """
    if self.exact or count == 1:
      return (x,)
    high = _upper(x)
    return high, x - high

  def dot(self, xs, ys, contract=(1, 0)):
    """Product of two sums of parts in float32, without low times low.

    A part of ys is loaded into the matrix unit once, for all parts of xs.
    Operands are float32 and rounded here, where nothing but the product uses
    them: else the compiler takes them through tiles of another shape.
    """
    dimensions = (((contract[0],), (contract[1],)), ((), ()))
    precision = (
      jax.lax.Precision.HIGHEST if self.exact else jax.lax.Precision.DEFAULT
    )
    products = []
    for j, y in enumerate(ys):
      used = xs[: max(len(xs), len(ys)) - j]
      both = jax.lax.dot_general(
        jnp.concatenate(used, axis=1 - contract[0]).astype(self.dtype),
        y.astype(self.dtype),
        dimensions,
        precision,
        preferred_element_type=jnp.float32,
      )
      products += jnp.split(both, len(used), axis=0)
    return functools.reduce(jnp.add, reversed(products))


def _iotas(shape):
  return [jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1)]


class _Phases:
  """Runs functions of all tiles, each in a region of its own, if `wanted`.

  Each has one more condition that always holds and that the compiler does not
  see through: it neither moves work across nor keeps values in registers.
  """

  def __init__(self, layout, tiles):
    self.layout, self.tiles = layout, tiles
    self.wanted, self.count = True, 0

  def run(self, function, *args, **kwargs):
    self.count += 1
    opaque = pl.program_id(0) > -self.count

    @pl.when(self.wanted & opaque)
    def _():
      function(self.layout, self.tiles, *args, **kwargs)

  def each(self, function, *args, **kwargs):
    def every(layout, tiles):
      for tile in tiles:
        function(layout, tile, *args, **kwargs)

    self.run(every)


def _upper(x):
  """x rounded to its upper 16 bits, a bfloat16, still as float32."""
  bits = jax.lax.bitcast_convert_type(x, jnp.int32)
  return jax.lax.bitcast_convert_type(
    bits + (1 << 15) & -(1 << 16), jnp.float32
  )


def _columns(gates):
  """The first two rows of gates [GATES, M] as columns in all lanes.

  A product with ones, exact in three parts, where the matrix unit has time:
  spreading columns over lanes would take the permute units longer.
  """
  high = _upper(gates)
  middle = _upper(gates - high)
  parts = jnp.concatenate([high, middle, gates - high - middle], axis=0)
  row, lane = _iotas((3 * GATES, 2 * LANES))
  ones = (row & GATES - 1) == (lane >= LANES).astype(jnp.int32)
  both = jax.lax.dot_general(
    parts.astype(jnp.bfloat16),
    ones.astype(jnp.float32).astype(jnp.bfloat16),
    (((0,), (0,)), ((), ())),
    preferred_element_type=jnp.float32,
  )
  return jnp.split(both, 2, axis=1)


def _start(index, size):
  """index // size * size, by comparisons: vector units do not divide."""
  start = jnp.zeros_like(index)
  for i in range(size, max(index.shape), size):
    start = jnp.where(index >= i, i, start)
  return start


class _Scratch(NamedTuple):
  """What a step keeps of its tiles between phases, in VMEM, by tile.

  The backward walk puts gradients in place of what it needs no more.
  """

  keys: Any  # K above Q [2 M, m K]
  columns: Any  # G, beta by token, in all of 128 lanes [2, M, LANES]
  decay: Any  # D [M, M]
  similarity: Any  # D * K K^T below the diagonal [M, M]
  attention: Any  # P = c D * Q K^T [M, M]
  inverse: Any  # T [M, M]
  corrected: Any  # E [M, V]
  read: Any  # c gamma * Q S [M, V]; backward dE, then dX
  # Backward alone: what reaches K S above Q S [2 M, V], dK as reader above dQ
  # [2 M, m K].
  onto_state: Any = None
  onto_keys: Any = None

  @classmethod
  def shapes(cls, layout, chunks=None):
    """The arrays to allocate; of `chunks`, what the backward walk keeps."""
    tiles, tile = layout.rows * layout.groups, layout.tile

    def array(*shape, kept=()):
      return pltpu.VMEM((*kept, tiles, *shape), jnp.float32)

    kept, backward = (), {}
    if chunks:
      kept = (chunks,)
      backward = {
        "onto_state": array(2 * tile, layout.value_dim),
        "onto_keys": array(2 * tile, layout.packed * layout.key_dim),
      }

    shapes = cls(
      keys=array(2 * tile, layout.packed * layout.key_dim),
      columns=array(2, tile, LANES),
      decay=array(tile, tile),
      similarity=array(tile, tile),
      attention=array(tile, tile),
      inverse=array(tile, tile, kept=kept),
      corrected=array(tile, layout.value_dim, kept=kept),
      read=array(tile, layout.value_dim),
      **backward,
    )
    return [x for x in shapes if x is not None]

  def column(self, t, i, width, rows=slice(None)):
    """Gate i of a tile's tokens, [M, width], or of some rows."""
    whole = self.columns[t, i, rows]
    copies = [whole] * pl.cdiv(width, LANES)
    return jnp.concatenate(copies, axis=1)[:, :width]


def scratch_shapes(layout):
  """What `one_chunk` keeps in VMEM between its phases."""
  return _Scratch.shapes(layout)


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


def _compare(layout, tile, scratch, q_ref, k_ref, gates_ref, at):
  """Keys with keys and with queries, decayed."""
  t = tile.number
  q, k = (
    layout.pack(_load(layout, ref, tile, tile.keys, at))
    for ref in (q_ref, k_ref)
  )
  keys = jnp.concatenate([k, q], axis=0)
  scratch.keys[t] = keys
  gates = gates_ref[tile.row, 0, tile.group]
  for i, column in enumerate(_columns(gates)):
    scratch.columns[t, i] = column
  # Masked before exp: elsewhere the difference may be large.
  decay = jnp.exp(
    jnp.where(
      layout.causal(), scratch.column(t, 0, layout.tile) - gates[:1], -jnp.inf
    )
  )
  scratch.decay[t] = decay
  products = layout.dot((keys,), (k,), (1, 1))
  scratch.similarity[t] = layout.strict(decay * products[: layout.tile])
  scratch.attention[t] = layout.key_dim**-0.5 * decay * products[layout.tile :]


def _substitute(layout, tiles, scratch, size):
  """Blocks of `size` rows of T = (I + L)^-1, L = diag(beta) similarity.

  All blocks lie side by side in the lanes of one [size, M] array.
  """
  tile = layout.tile
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
    scratch.inverse[t.number] = jnp.where(same, inverse, 0.0)


def _join(layout, tiles, scratch, size):
  """X <- X - X L_b X joins each second block of `size` rows to that before.

  What the products are taken of lies side by side in the lanes of [size, M].
  """
  _, lane = _iotas((8, layout.tile))
  # (row of a strip, its place in the block, start of the block before).
  strips = [
    (head + start + at, at, head + start - size)
    for head in range(0, layout.tile, layout.chunk)
    for start in range(size, layout.chunk, 2 * size)
    for at in range(0, min(size, layout.chunk - start), 8)
  ]

  def at(start):
    return (lane >= start) & (lane < start + size)

  def side_by_side(x, offset):
    rows = [jnp.zeros((8, layout.tile), jnp.float32)] * (size // 8)
    for strip, place, before in strips:
      rows[place // 8] = jnp.where(
        at(before + offset), x(strip), rows[place // 8]
      )
    return layout.parts(jnp.concatenate(rows, axis=0), 2)

  def lower(t, strip):
    rows = slice(strip, strip + 8)
    beta = scratch.column(t, 1, layout.tile, rows)
    return beta * scratch.similarity[t, rows]

  def spread(strips):
    """Parts of [M, M] from {row: strip}; other rows, not needed, are zeros."""
    zeros = jnp.zeros((8, layout.tile), jnp.float32)
    parts = [
      layout.parts(strips.get(i, zeros), 2) for i in range(0, layout.tile, 8)
    ]
    return [jnp.concatenate(x, axis=0) for x in zip(*parts, strict=True)]

  def inverse(t, strip):
    return scratch.inverse[t, strip : strip + 8]

  # Stage by stage: the compiler keeps the order where it may choose.
  numbers = [tile.number for tile in tiles]
  steps = [
    layout.dot(
      side_by_side(functools.partial(lower, t), 0),
      spread(
        {
          before + i: inverse(t, before + i)
          for _, place, before in strips
          if not place
          for i in range(0, size, 8)
        }
      ),
    )
    for t in numbers
  ]
  steps = [
    layout.dot(
      side_by_side(functools.partial(inverse, t), size),
      spread(
        {
          strip: jnp.where(at(before), step[place : place + 8], 0.0)
          for strip, place, before in strips
        }
      ),
    )
    for t, step in zip(numbers, steps, strict=True)
  ]
  for t, step in zip(numbers, steps, strict=True):
    for strip, place, before in strips:
      rows = slice(strip, strip + 8)
      scratch.inverse[t, rows] = jnp.where(
        at(before), -step[place : place + 8], inverse(t, strip)
      )


def _corrected(phases, scratch, v_ref, before_ref, at, reading):
  """E: T by blocks, joined until one is a head's chunk, then T X."""
  chunk = phases.layout.chunk
  size = next(b for b in range(SUBSTITUTED, 0, -8) if chunk % b == 0)
  phases.run(_substitute, scratch, size)
  while size < chunk:
    phases.run(_join, scratch, size)
    size *= 2
  phases.each(_predict, scratch, v_ref, before_ref, at, reading=reading)
  phases.each(_solve, scratch)


def _predict(layout, tile, scratch, v_ref, before_ref, at, reading):
  """X = beta * (V - gamma * K S), in place of E; with `reading`, Q S."""
  t, size = tile.number, layout.tile
  wide = functools.partial(scratch.column, t, width=layout.value_dim)
  high, *low = layout.parts(before_ref[tile.row, tile.keys], 2)
  since_start = jnp.exp(wide(0))
  if reading:
    # Q S is only read; K S, which is learnt from, gets the low part too.
    from_state = layout.dot((scratch.keys[t],), (high,))
    scratch.read[t] = layout.key_dim**-0.5 * since_start * from_state[size:]
  else:
    from_state = layout.dot((scratch.keys[t, :size],), (high,))
  predicted = from_state[:size]
  if low:
    predicted += layout.dot((scratch.keys[t, :size],), low)
  v = layout.stack(_load(layout, v_ref, tile, tile.values, at))
  scratch.corrected[t] = wide(1) * (v - since_start * predicted)


def _solve(layout, tile, scratch):
  """E = T X."""
  t = tile.number
  inverse = layout.parts(scratch.inverse[t], 2)
  x = layout.parts(scratch.corrected[t], 2)
  scratch.corrected[t] = layout.dot(inverse, x)


def _read(layout, tile, scratch, o_ref):
  """O = c gamma * Q S + P E."""
  t = tile.number
  o = scratch.read[t] + layout.dot(
    (scratch.attention[t],), (scratch.corrected[t],)
  )
  o_ref[tile.row, :, tile.values] = layout.unstack(o).astype(o_ref.dtype)


def _write(layout, tile, scratch, gates_ref, before_ref, after_ref):
  """S' = exp(G_C) S + K^T (delta * E)."""
  t = tile.number
  gates = gates_ref[tile.row, 0, tile.group]
  total = scratch.column(t, 0, layout.value_dim)
  written = layout.until_end(gates, total) * scratch.corrected[t]
  state = before_ref[tile.row, tile.keys]
  after_ref[tile.row, tile.keys] = layout.decayed(gates, state) + layout.dot(
    (scratch.keys[t, : layout.tile],), layout.parts(written, 2), (0, 0)
  )


def _forward_kernel(
  q_ref, k_ref, v_ref, gates_ref, start_ref, o_ref, state_ref, *scratch, layout
):
  at = pl.program_id(2)
  before_ref = state_ref
  if layout.chunks == 1:
    before_ref = start_ref
  else:

    @pl.when(at == 0)
    def _():
      state_ref[...] = start_ref[...]

  inputs = q_ref, k_ref, v_ref, gates_ref, before_ref
  one_chunk(layout, scratch, *inputs, o_ref, state_ref, at)


def one_chunk(
  layout,
  scratch,
  q_ref,
  k_ref,
  v_ref,
  gates_ref,
  before_ref,
  o_ref,
  state_ref,
  at,
):
  """Writes o and the state after chunk number `at` of a block.

  Args:
    scratch: refs of `scratch_shapes(layout)`.
    q_ref, k_ref: [rows, C, heads K] of the block; v_ref, o_ref: [rows, C,
      heads V]; gates_ref: as `_gates` makes them.
    before_ref, state_ref: the states before and after [rows, heads K, V]; they
      may be one.
  """
  scratch = _Scratch(*scratch)
  phases = _Phases(layout, _tiles(layout))
  phases.each(_compare, scratch, q_ref, k_ref, gates_ref, at)
  _corrected(phases, scratch, v_ref, before_ref, at, reading=True)
  phases.each(_read, scratch, o_ref)
  phases.each(_write, scratch, gates_ref, before_ref, state_ref)


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
  before_ref, d_after_ref = states_ref.at[at], d_state_ref
  if layout.chunks == 1:
    before_ref, d_after_ref = start_ref, d_end_ref
  else:

    @pl.when(step == 0)
    def _():
      states_ref[0] = start_ref[...]

    @pl.when(step == last)
    def _():
      d_state_ref[...] = d_end_ref[...]

  phases = _Phases(layout, tiles)
  phases.each(_compare, scratch, q_ref, k_ref, gates_ref, at)
  phases.wanted = step <= last
  _corrected(phases, scratch, v_ref, before_ref, at, reading=False)
  if last:
    phases.wanted = step < last
    after_ref = states_ref.at[jnp.minimum(at + 1, last)]
    phases.each(_write, scratch, gates_ref, before_ref, after_ref)
  phases.wanted = step >= last
  phases.each(_transpose_uses, scratch, gates_ref, d_o_ref, d_after_ref, at)
  phases.each(_transpose_solve, scratch)
  phases.each(_transpose_products, scratch, d_o_ref, at)
  phases.each(
    _transpose_values, scratch, v_ref, before_ref, d_o_ref, d_v_ref, at
  )
  phases.each(_transpose_reads, scratch, before_ref, d_q_ref)
  phases.each(_transpose_writes, scratch, gates_ref, d_after_ref, d_k_ref)

  phases.each(
    _transpose_ends,
    *(scratch, gates_ref, before_ref, d_after_ref, d_gates_ref, d_state_ref),
  )


def _transpose_uses(layout, tile, scratch, gates_ref, d_o_ref, d_after_ref, at):
  """dE = P^T dO + delta * K dS', kept in place of Q S."""
  t = tile.number
  total = scratch.column(t, 0, layout.value_dim)
  d_o = layout.stack(_load(layout, d_o_ref, tile, tile.values, at))
  d_after = layout.parts(d_after_ref[tile.row, tile.keys], 2)
  scratch.read[t] = layout.dot(
    (scratch.attention[t],), (d_o,), (0, 0)
  ) + layout.until_end(gates_ref[tile.row, 0, tile.group], total) * layout.dot(
    (scratch.keys[t, : layout.tile],), d_after
  )


def _transpose_solve(layout, tile, scratch):
  """dX = T^T dE."""
  t = tile.number
  scratch.read[t] = layout.dot(
    layout.parts(scratch.inverse[t], 2),
    layout.parts(scratch.read[t], 2),
    (0, 0),
  )


def _transpose_values(
  layout, tile, scratch, v_ref, before_ref, d_o_ref, d_v_ref, at
):
  """dV, what reaches reads of S, and dX * (V - gamma K S) in place of dX."""
  t, size = tile.number, layout.tile
  wide = functools.partial(scratch.column, t, width=layout.value_dim)
  v = layout.stack(_load(layout, v_ref, tile, tile.values, at))
  d_o = layout.stack(_load(layout, d_o_ref, tile, tile.values, at))
  d_x = scratch.read[t]
  d_v = wide(1) * d_x
  d_v_ref[tile.row, :, tile.values] = layout.unstack(d_v).astype(d_v_ref.dtype)
  since_start = jnp.exp(wide(0))
  scratch.onto_state[t, :size] = -since_start * d_v
  scratch.onto_state[t, size:] = layout.key_dim**-0.5 * since_start * d_o
  state = before_ref[tile.row, tile.keys]
  predicted = layout.dot((scratch.keys[t, :size],), (state,))
  scratch.read[t] = d_x * (v - since_start * predicted)


def _transpose_products(layout, tile, scratch, d_o_ref, at):
  """What reaches the products of keys, in place of these."""
  t, size = tile.number, layout.tile
  d_o = layout.stack(_load(layout, d_o_ref, tile, tile.values, at))
  onto_values = layout.dot(
    (jnp.concatenate([scratch.read[t], d_o], axis=0),),
    (scratch.corrected[t],),
    (1, 1),
  )
  d_lower = layout.strict(-onto_values[:size])
  decay, similarity = scratch.decay[t], scratch.similarity[t]
  scratch.decay[t] = d_lower * similarity
  scratch.similarity[t] = decay * scratch.column(t, 1, size) * d_lower
  scratch.attention[t] = layout.key_dim**-0.5 * decay * onto_values[size:]


def _transpose_reads(layout, tile, scratch, before_ref, d_q_ref):
  """dQ, and dK as reader."""
  t, size = tile.number, layout.tile
  d_products = jnp.concatenate([scratch.similarity[t], scratch.attention[t]], 0)
  state = before_ref[tile.row, tile.keys]
  onto_keys = layout.dot((d_products,), (scratch.keys[t, :size],)) + layout.dot(
    (scratch.onto_state[t],), (state,), (1, 1)
  )
  scratch.onto_keys[t] = onto_keys
  d_q = layout.unpack(onto_keys[size:])
  d_q_ref[tile.row, :, tile.keys] = d_q.astype(d_q_ref.dtype)


def _transpose_writes(layout, tile, scratch, gates_ref, d_after_ref, d_k_ref):
  """dK; in place of dK as reader and dQ, what of them reaches the decays."""
  t, size = tile.number, layout.tile
  keys, onto_keys = scratch.keys[t], scratch.onto_keys[t]
  gates = gates_ref[tile.row, 0, tile.group]
  d_after = d_after_ref[tile.row, tile.keys]
  d_products = jnp.concatenate([scratch.similarity[t], scratch.attention[t]], 0)
  total = scratch.column(t, 0, layout.packed * layout.key_dim)
  at_end = layout.until_end(gates, total) * layout.dot(
    (scratch.corrected[t],), (d_after,), (1, 1)
  )
  written = layout.dot((d_products,), (keys,), (0, 0)) + at_end
  d_k = layout.unpack(onto_keys[:size] + written)
  d_k_ref[tile.row, :, tile.keys] = d_k.astype(d_k_ref.dtype)
  # G multiplies what k and q read, and divides what k wrote.
  scratch.onto_keys[t] = jnp.concatenate(
    [
      keys[size:] * onto_keys[size:]
      + keys[:size] * (onto_keys[:size] - written),
      keys[:size] * at_end,
    ],
    axis=0,
  )


def _transpose_ends(
  layout,
  tile,
  scratch,
  gates_ref,
  before_ref,
  d_after_ref,
  d_gates_ref,
  d_state_ref,
):
  """dG, dbeta, d G_C; dS = exp(G_C) dS' + K^T d(K S) + Q^T d(Q S)."""
  t, size = tile.number, layout.tile
  gates = gates_ref[tile.row, 0, tile.group]
  onto_keys = scratch.onto_keys[t]
  decayed = layout.decayed(gates, d_after_ref[tile.row, tile.keys])
  # The whole chunk's decay belongs to a head, whose first token has it.
  kept = decayed * before_ref[tile.row, tile.keys]
  gate, token = _iotas((GATES, size))
  ends = jnp.zeros((GATES, size), jnp.float32)
  for i in range(layout.packed):
    key = slice(i * layout.key_dim, (i + 1) * layout.key_dim)
    rows = slice(size + i * layout.chunk, size + (i + 1) * layout.chunk)
    whole = jnp.sum(kept[key]) + jnp.sum(onto_keys[rows])
    ends += jnp.where((gate == 2) & (token == i * layout.chunk), whole, 0.0)
  # This may be where dS' lies.
  d_state_ref[tile.row, tile.keys] = decayed + layout.dot(
    (scratch.keys[t],), layout.parts(scratch.onto_state[t], 2), (0, 0)
  )
  # Sums of rows by a product, which makes them rows of gates.
  summed = jnp.concatenate(
    [scratch.read[t], scratch.decay[t], onto_keys[:size]], axis=1
  )
  gate, lane = _iotas((GATES, summed.shape[1]))
  ones = gate == (lane < layout.value_dim + size).astype(jnp.int32)
  d_gates_ref[tile.row, 0, tile.group] = ends + layout.dot(
    (ones.astype(jnp.float32),), layout.parts(summed, 2), (1, 1)
  )


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
  """The first layout whose scratch fits the default, or else the smallest.

  Raises:
    ValueError: not even that fits.
  """
  layouts = list(layouts)
  sizes = [_bytes(scratch(layout)) for layout in layouts]
  for layout, size in zip(layouts, sizes, strict=True):
    if size <= VMEM_BYTES:
      return layout
  least = min(sizes)
  most = VMEM_BYTES if target().kind == "TPU v4" else MOST_VMEM_BYTES
  layout = layouts[sizes.index(least)]
  if least <= most:
    return layout
  raise ValueError(
    f"a kernel would keep {least / 2**20:.0f} MiB in VMEM for T = "
    f"{layout.length}, K = {layout.key_dim}, V = {layout.value_dim}: at most "
    f"{most / 2**20:.0f} MiB fit"
  )


def _bytes(scratch) -> int:
  return sum(math.prod(x.shape) * jnp.dtype(x.dtype).itemsize for x in scratch)


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
    kept = _bytes(options["scratch_shapes"])
    run = pl.pallas_call(
      functools.partial(kernel, layout=layout),
      grid=(
        pl.cdiv(batch, layout.rows),
        width // (layout.heads * layout.key_dim),
        steps,
      ),
      out_shape=outputs,
      compiler_params=pltpu.CompilerParams(
        dimension_semantics=("parallel", "parallel", "arbitrary"),
        vmem_limit_bytes=kept + BLOCKS_BYTES if kept > VMEM_BYTES else None,
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
