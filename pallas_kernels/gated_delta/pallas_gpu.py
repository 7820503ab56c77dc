"""The gated delta rule as Pallas kernels for Hopper GPUs (Mosaic GPU).

For large batches of windows and for long contexts, where plain XLA's chain of
small products is bound by launches and by the traffic between them: here a
chunk's intermediate values never leave the chip. Interpreted on CPUs and
compiled for the H100; it has never run on silicon, so no speed is claimed.

The equations of a chunk of C = 64 tokens, for one row of the batch and one
head, are those of `chunked_xla` (D_ij = exp(G_i - G_j) for i >= j, else 0;
c = K^-0.5; * is elementwise, scaling rows where a factor is a vector):

  L = strict_tril(beta * D * K K^T)       P = c D * Q K^T
  X = beta * (V - exp(G) * K S)           E = (I + L)^-1 X
  O = c exp(G) * Q S + P E
  S' = exp(G_C) S + K^T (exp(G_C - G) * E)

A program is one warpgroup, for one row, head and 64 columns of V; it walks the
chunks in order with its columns of S in shared memory. Every matrix is cut into
tiles of 64 x 64: K in blocks, loaded as needed. The backward pass first repeats
the walk for the chunks' start states, then walks back with dS. What the tiles
of V add to dq, dk, dG and dbeta is summed outside.

Products run on the tensor cores with float32 accumulation. Inputs in bfloat16
enter as they are, and E, P and their cotangents are rounded to bfloat16. The
inverse, X and S keep float32's precision (and so does everything for inputs in
float32): each is split into a high and a low bfloat16 part, and A B is
A_high B_high + A_high B_low + A_low B_high.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

# Tokens of a chunk and the side of every tile: a warpgroup's product has a
# multiple of 64 rows, and 64 bfloat16 fill a swizzled row of 128 bytes.
TILE = 64
MAX_KEY_DIM = 256
# In float32 every operand takes two tiles; with more keys they do not fit
# beside dS in the shared memory of a multiprocessor.
MAX_KEY_DIM_FLOAT32 = 128


def cannot_serve(q, k, v, g, beta, initial_state) -> str | None:
  """Why these inputs of `api.gated_delta_rule` are not served, or None."""
  key_dim = q.shape[-1]
  served = (jnp.bfloat16, jnp.float32)
  for name, x in dict(q=q, k=k, v=v, g=g, beta=beta).items():
    if x.dtype not in served:
      return f"{name} is {x.dtype}: only bfloat16 and float32 are served"
  if initial_state.dtype != jnp.float32:
    return f"initial_state is {initial_state.dtype}: it must be float32"
  if g.ndim != 3:
    return "a decay per channel is not served: g must be [B, T, H]"
  if key_dim > MAX_KEY_DIM:
    return f"K is {key_dim}: at most {MAX_KEY_DIM} fit"
  if jnp.result_type(q, k, v) == jnp.float32 and key_dim > MAX_KEY_DIM_FLOAT32:
    return f"K is {key_dim}: at most {MAX_KEY_DIM_FLOAT32} fit in float32"
  return None


def gated_delta_rule(q, k, v, g, beta, initial_state, *, interpret=None):
  """Returns (o, final_state); see `api`.

  Args:
    q, k: [B, T, H, K], with a head for each of v's; K is padded to 64s.
    v: [B, T, H, V]; V is padded to 64s, and T too.
    g, beta: [B, T, H].
    initial_state: [B, H, K, V] float32.
    interpret: parameters of the Mosaic GPU interpreter, to run on a CPU.

  Returns:
    o in v's dtype, final_state in float32.
  """
  length, value_dim = v.shape[1], v.shape[3]
  key_dim = q.shape[3]
  dtype = jnp.result_type(q, k, v)  # bfloat16 if all three are
  padded_qkv = (_padded(x.astype(dtype), axes=(1, 3)) for x in (q, k, v))
  # [B, T, H] -> [B, H, T / C, C]; a padded token, 0 in both, leaves S alone.
  g, beta = (
    jnp.moveaxis(_padded(x.astype(jnp.float32), axes=(1,)), 1, 2)
    for x in (g, beta)
  )
  g, beta = (x.reshape(*x.shape[:2], -1, TILE) for x in (g, beta))
  o, state = _chunked_rule(
    key_dim**-0.5,
    interpret,
    *padded_qkv,
    jnp.cumsum(g, axis=-1),
    beta,
    _padded(initial_state, axes=(2, 3)),
  )
  o = o[:, :length, :, :value_dim].astype(v.dtype)
  return o, state[:, :, :key_dim, :value_dim]


def _padded(x, axes):
  """x with zeros at the end of `axes`, up to multiples of TILE."""
  padding = [
    (0, -size % TILE if axis in axes else 0)
    for axis, size in enumerate(x.shape)
  ]
  return jnp.pad(x, padding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _chunked_rule(scale, interpret, q, k, v, total, beta, state):
  """(o, final state) for whole tiles.

  Args:
    scale: c.
    interpret: as in `gated_delta_rule`.
    q, k: [B, T, H, K], in one dtype with v [B, T, H, V].
    total: G [B, H, T / C, C] float32, the decay since the chunk's start.
    beta: [B, H, T / C, C] float32.
    state: [B, H, K, V] float32.
  """
  return _forward(scale, interpret, False, q, k, v, total, beta, state)


def _chunked_rule_forward(scale, interpret, *inputs):
  return _chunked_rule(scale, interpret, *inputs), inputs


def _chunked_rule_backward(scale, interpret, inputs, cotangents):
  q, k, v, total, beta, state = inputs
  d_o, d_final = cotangents
  if total.shape[2] == 1:
    states = state
  else:
    (states,) = _forward(scale, interpret, True, *inputs)
  d_q, d_k, d_v, d_total, d_beta, at_end, d_state = _backward(
    scale, interpret, q, k, v, total, beta, states, d_o, d_final
  )

  def summed(x, size):  # [..., tiles * size] -> [..., size]
    return jnp.sum(x.reshape(*x.shape[:-1], -1, size), axis=-2)

  d_total, d_beta = summed(d_total, TILE), summed(d_beta, TILE)
  d_total = d_total.at[..., -1].add(jnp.sum(at_end, axis=-1))
  d_q, d_k = (summed(x, q.shape[-1]).astype(q.dtype) for x in (d_q, d_k))
  return d_q, d_k, d_v, d_total, d_beta, d_state


_chunked_rule.defvjp(_chunked_rule_forward, _chunked_rule_backward)


def _forward(scale, interpret, only_states, q, k, v, total, beta, state):
  """(o, final state), or the chunks' start states [B, H, T / C * K, V]."""
  batch, heads, chunks, _ = total.shape
  key_dim, value_dim = state.shape[2:]
  blocks = key_dim // TILE
  if only_states:
    outputs = [
      jax.ShapeDtypeStruct(
        (batch, heads, chunks * key_dim, value_dim), state.dtype
      )
    ]
  else:
    outputs = [
      jax.ShapeDtypeStruct(v.shape, v.dtype),
      jax.ShapeDtypeStruct(state.shape, state.dtype),
    ]
  return _launch(
    functools.partial(_forward_kernel, scale, only_states),
    "gated_delta_forward",
    interpret,
    3 * blocks + 11 if only_states else 5 * blocks + 12,
    outputs,
    (q, k, v, total, beta, state),
    state=_tile(jnp.float32, blocks),
    target=_operand(2),
  )


def _launch(kernel, name, interpret, products, outputs, inputs, **scratch):
  """Runs a kernel with a program for each 64 columns of V, head and row.

  Args:
    products: of tiles, by a program for a chunk; for XLA's count of FLOPs.
    outputs: their shapes and dtypes.
    inputs: q, k, v, total and beta, then what is the kernel's own.
    scratch: the same of its scratch, beside what both kernels have.
  """
  q, k, v, total, beta, *others = inputs
  batch, _, heads, value_dim = v.shape
  parts = 1 if q.dtype == jnp.bfloat16 else 2
  options: dict[str, Any] = {}
  if jax.__version_info__ >= (0, 12):
    chunks = total.size // TILE * value_dim // TILE
    options["cost_estimate"] = pl.CostEstimate(
      flops=2 * TILE**3 * chunks * products,
      transcendentals=TILE * (TILE + 2) * chunks,
      bytes_accessed=sum(
        x.size * x.dtype.itemsize for x in (*inputs, *outputs)
      ),
    )
  elif interpret is not None:
    scratch["transposed"] = _tile(jnp.bfloat16)
  outputs = plgpu.kernel(
    kernel,
    out_type=outputs,
    scratch_types=dict(
      query=_operand(parts),
      key=_operand(parts),
      value=_tile(v.dtype),
      stage=_tile(jnp.float32),
      state_parts=_operand(2),
      inverse=_operand(2),
      work=_operand(2),
      scores=_operand(parts),
      written=_operand(parts),
      index=_vector(jnp.int32),
      since_start=_vector(),
      strength=_vector(),
      barrier=plgpu.Barrier(num_barriers=2 * parts + 4),
      **scratch,
    ),
    grid=(value_dim // TILE, heads, batch),
    grid_names=("tile", "head", "row"),
    kernel_name=name,
    interpret=interpret,
    # jax 0.12 else infers layouts itself, and is at it for over nine minutes.
    compiler_params=plgpu.CompilerParams(
      lowering_semantics=plgpu.LoweringSemantics.Lane
    ),
    **options,
  )(
    _split(q),
    _split(k),
    v,
    total,
    beta,
    jnp.arange(TILE, dtype=jnp.int32),
    *others,
  )
  return _varying_as(v, outputs)


def _forward_kernel(
  scale,
  only_states,
  q,
  k,
  v,
  total,
  beta,
  indices,
  start,
  *outputs,
  query,
  key,
  value,
  stage,
  state,
  state_parts,
  target,
  inverse,
  work,
  scores,
  written,
  index,
  since_start,
  strength,
  barrier,
  transposed=None,
):
  """A walk over the chunks; the arguments after `outputs` are scratch."""
  tiles = _Tiles(index, transposed)
  row, head, columns = _program()
  query, key, state_parts, target, inverse, work, scores, written = map(
    _Operand,
    (query, key, state_parts, target, inverse, work, scores, written),
  )
  _load(barrier, (indices, index))
  blocks = state.shape[0]

  @pl.loop(0, blocks)
  def _(i):
    _load(barrier, (start.at[row, head, _block(i), columns], state.at[i]))

  @pl.loop(0, total.shape[2])
  def _(chunk):
    tokens = _block(chunk)
    if only_states:
      (states,) = outputs

      @pl.loop(0, blocks)
      def _(i):
        here = _block(chunk * blocks + i)
        _copy_out(state.at[i], states.at[row, head, here, columns])

    _load(
      barrier,
      (total.at[row, head, chunk], since_start),
      (beta.at[row, head, chunk], strength),
      (v.at[row, tokens, head, columns], value),
    )

    def of_keys(i, sums):
      _load(barrier, *_parts_of(k, row, tokens, head, i, key))
      tiles.write(state_parts, state[i])
      return (
        sums[0] + tiles.product((key, key.T)),
        sums[1] + tiles.product((key, state_parts)),
      )

    zero = tiles.zero()
    keys_keys, keys_state = lax.fori_loop(0, blocks, of_keys, (zero, zero))
    decay = tiles.decay(since_start, strength)
    stage[...] = tiles.strictly_lower(decay.pairwise * keys_keys)
    error = value[...].astype(jnp.float32) - decay.since_start * keys_state
    tiles.write(target, decay.beta * error)
    tiles.invert(stage, strength, inverse, work)
    corrected = tiles.product((inverse, target))

    decay = tiles.decay(since_start, strength)
    tiles.write(written, corrected)
    tiles.write(target, decay.until_end * corrected)

    def of_queries(i, sums):
      _load(
        barrier,
        *_parts_of(k, row, tokens, head, i, key),
        *(() if only_states else _parts_of(q, row, tokens, head, i, query)),
      )
      if not only_states:
        tiles.write(state_parts, state[i])
        sums = (
          sums[0] + tiles.product((query, key.T)),
          sums[1] + tiles.product((query, state_parts)),
        )
      state[i] = decay.whole * state[i] + tiles.product((key.T, target))
      return sums

    queries_keys, queries_state = lax.fori_loop(
      0, blocks, of_queries, (zero, zero)
    )
    if not only_states:
      o, _ = outputs
      decay = tiles.decay(since_start, strength)
      tiles.write(scores, scale * decay.pairwise * queries_keys)
      value[...] = (
        scale * decay.since_start * queries_state
        + tiles.product((scores, written))
      ).astype(value.dtype)
      _copy_out(value, o.at[row, tokens, head, columns])

  if not only_states:
    _, final = outputs

    @pl.loop(0, blocks)
    def _(i):
      _copy_out(state.at[i], final.at[row, head, _block(i), columns])


def _backward(scale, interpret, q, k, v, total, beta, states, d_o, d_final):
  """Cotangents, with an axis of V's tiles in all but those of v and the state.

  Args:
    states: the chunks' start states [B, H, T / C * K, V].
    d_o, d_final: cotangents of o and of the final state.

  Returns:
    d_q, d_k: [B, T, H, V / 64 * K] float32.
    d_v: [B, T, H, V].
    d_total, d_beta: [B, H, T / C, V / 64 * C].
    at_end: [B, H, T / C, V / 64 * C]; its sum over the last axis belongs to the
      cotangent of the chunk's last total.
    d_state: [B, H, K, V].
  """
  batch, heads, chunks, _ = total.shape
  key_dim, value_dim = d_final.shape[2:]
  count, blocks = value_dim // TILE, key_dim // TILE
  per_key = jax.ShapeDtypeStruct((*q.shape[:3], count * key_dim), jnp.float32)
  per_token = jax.ShapeDtypeStruct(
    (batch, heads, chunks, count * TILE), jnp.float32
  )
  parts = 1 if q.dtype == jnp.bfloat16 else 2
  return _launch(
    functools.partial(_backward_kernel, scale),
    "gated_delta_backward",
    interpret,
    13 * blocks + 15,
    [
      per_key,
      per_key,
      jax.ShapeDtypeStruct(v.shape, v.dtype),
      per_token,
      per_token,
      per_token,
      jax.ShapeDtypeStruct(d_final.shape, d_final.dtype),
    ],
    (q, k, v, total, beta, states, _split(d_o), d_final),
    d_out=_operand(parts),
    d_state=_tile(jnp.float32, blocks),
    gram=_operand(2),
    vector=_vector(),
  )


def _backward_kernel(
  scale,
  q,
  k,
  v,
  total,
  beta,
  indices,
  states,
  d_o,
  d_final,
  d_q,
  d_k,
  d_v,
  d_total,
  d_beta,
  at_end,
  d_start,
  *,
  query,
  key,
  value,
  d_out,
  stage,
  d_state,
  state_parts,
  inverse,
  work,
  scores,
  gram,
  written,
  index,
  since_start,
  strength,
  vector,
  barrier,
  transposed=None,
):
  """A walk back over the chunks; the arguments after d_start are scratch.

  With dS' the cotangent of the chunk's end state:

    dE = P^T dO + exp(G_C - G) * K dS'       dX = (I + L)^-T dE
    dL = -strict_tril(dX E^T)                W = c D * dO E^T
    dKS = -beta exp(G) * dX                  A = beta D * dL
    dQ = W K + c exp(G) * dO S^T             dV = beta * dX
    dK = W^T Q + (A + A^T) K + dKS S^T + exp(G_C - G) * E dS'^T
    dS = exp(G_C) dS' + K^T dKS + Q^T (c exp(G) * dO)

  G_i enters as exp(G_i) with q_i, and with k_i where it reads (the rows of L
  and K S), but as exp(-G_i) with k_i where it is written. What k_i.dK_i has of
  reading is r_i = sum_j dL_ij L_ij + dKS_i.(KS)_i, so that within the chunk
  dG_i = q_i.dQ_i - k_i.dK_i + 2 r_i; and dG_C has sum(S' * dS') besides.
  """
  tiles = _Tiles(index, transposed)
  row, head, columns = _program()
  tile = lax.axis_index("tile")
  query, key, d_out, state_parts, inverse, work, scores, gram, written = map(
    _Operand,
    (
      query,
      key,
      d_out,
      state_parts,
      inverse,
      work,
      scores,
      gram,
      written,
    ),
  )
  blocks = d_state.shape[0]
  _load(barrier, (indices, index))

  @pl.loop(0, blocks)
  def _(i):
    _load(barrier, (d_final.at[row, head, _block(i), columns], d_state.at[i]))

  @pl.loop(0, total.shape[2])
  def _(step):
    chunk = total.shape[2] - 1 - step
    tokens = _block(chunk)

    def start_state(i):
      return states.at[row, head, _block(chunk * blocks + i), columns], stage

    _load(
      barrier,
      (total.at[row, head, chunk], since_start),
      (beta.at[row, head, chunk], strength),
      (v.at[row, tokens, head, columns], value),
      *_parts_of(d_o, row, tokens, head, tile, d_out),
    )

    def of_keys(i, sums):
      _load(barrier, *_parts_of(k, row, tokens, head, i, key), start_state(i))
      tiles.write(state_parts, stage[...])
      return (
        sums[0] + tiles.product((key, key.T)),
        sums[1] + tiles.product((key, state_parts)),
      )

    zero = tiles.zero()
    keys_keys, keys_state = lax.fori_loop(0, blocks, of_keys, (zero, zero))
    tiles.write(gram, keys_state)
    decay = tiles.decay(since_start, strength)
    stage[...] = tiles.strictly_lower(decay.pairwise * keys_keys)
    tiles.invert(stage, strength, inverse, work)
    decay = tiles.decay(since_start, strength)
    error = value[...].astype(jnp.float32) - decay.since_start * tiles.read(
      gram
    )
    tiles.write(work, decay.beta * error)
    tiles.write(written, tiles.product((inverse, work)))

    def of_queries(i, sums):
      _load(
        barrier,
        *_parts_of(k, row, tokens, head, i, key),
        *_parts_of(q, row, tokens, head, i, query),
      )
      tiles.write(state_parts, d_state[i])
      return (
        sums[0] + tiles.product((query, key.T)),
        sums[1] + tiles.product((key, state_parts)),
      )

    queries_keys, keys_d_state = lax.fori_loop(
      0, blocks, of_queries, (zero, zero)
    )
    decay = tiles.decay(since_start, strength)
    tiles.write(scores, scale * decay.pairwise * queries_keys)
    d_written = tiles.product((scores.T, d_out))
    tiles.write(work, d_written + decay.until_end * keys_d_state)
    d_x = tiles.product((inverse.T, work))
    keys_state = tiles.read(gram)
    error = value[...].astype(jnp.float32) - decay.since_start * keys_state
    d_strength = jnp.sum(d_x * error, axis=1)
    through_state = -decay.beta * decay.since_start
    d_decay = 2 * jnp.sum(through_state * d_x * keys_state, axis=1)
    value[...] = (decay.beta * d_x).astype(value.dtype)
    _copy_out(value, d_v.at[row, tokens, head, columns])

    tiles.write(work, d_x)
    d_lower = -tiles.strictly_lower(tiles.product((work, written.T)))
    of_lower = d_lower * stage[...]
    d_decay += 2 * jnp.sum(decay.beta * of_lower, axis=1)
    vector[...] = d_strength + jnp.sum(of_lower, axis=1)
    _copy_out(vector, d_beta.at[row, head, chunk, _block(tile)])
    stage[...] = d_lower
    decay = tiles.decay(since_start, strength)
    tiles.write(gram, decay.beta * decay.pairwise * stage[...])
    tiles.write(
      scores, scale * decay.pairwise * tiles.product((d_out, written.T))
    )
    tiles.write(work, through_state * tiles.read(work))
    tiles.write(d_out, scale * decay.since_start * tiles.read(d_out))

    def of_block(i, sums):
      d_decay, d_whole = sums
      _load(
        barrier,
        *_parts_of(k, row, tokens, head, i, key),
        *_parts_of(q, row, tokens, head, i, query),
        start_state(i),
      )
      here = _block(tile * blocks + i)
      tiles.write(state_parts, stage[...])
      d_whole += decay.whole * jnp.sum(stage[...] * d_state[i], axis=1)
      stage[...] = tiles.product((scores, key), (d_out, state_parts.T))
      d_decay += jnp.sum(tiles.read(query) * stage[...], axis=1)
      _copy_out(stage, d_q.at[row, tokens, head, here])
      stage[...] = tiles.product(
        (scores.T, query), (gram, key), (gram.T, key), (work, state_parts.T)
      )
      tiles.write(state_parts, d_state[i])
      as_written = decay.until_end * tiles.product((written, state_parts.T))
      d_whole += jnp.sum(tiles.read(key) * as_written, axis=1)
      stage[...] += as_written
      d_decay -= jnp.sum(tiles.read(key) * stage[...], axis=1)
      _copy_out(stage, d_k.at[row, tokens, head, here])
      d_state[i] = decay.whole * d_state[i] + tiles.product(
        (key.T, work), (query.T, d_out)
      )
      return d_decay, d_whole

    sums = d_decay, jnp.sum(zero, axis=1)
    for i in range(blocks):  # a rolled loop needs more registers than there are
      sums = of_block(index[i], sums)
    for x, where in zip(sums, (d_total, at_end), strict=True):
      vector[...] = x
      _copy_out(vector, where.at[row, head, chunk, _block(tile)])

  @pl.loop(0, blocks)
  def _(i):
    _copy_out(d_state.at[i], d_start.at[row, head, _block(i), columns])


class _Operand(NamedTuple):
  """A matrix of a product: the sum of bfloat16 tiles in shared memory."""

  parts: jax.Ref  # [parts, 64, 64]
  transposed: bool = False

  @property
  def T(self):  # noqa: N802
    return self._replace(transposed=not self.transposed)


class _Decay(NamedTuple):
  """A chunk's decays and strengths as float32 tiles, by rows."""

  pairwise: jax.Array  # D
  since_start: jax.Array  # exp(G)
  until_end: jax.Array  # exp(G_C - G)
  whole: jax.Array  # exp(G_C), a scalar
  beta: jax.Array


@dataclasses.dataclass(frozen=True)
class _Tiles:
  """Arithmetic on tiles in registers.

  What is interpreted is what is compiled, but for two things that the
  interpreter of jax 0.10 lacks and that of 0.12 has. Layouts, which change no
  value: there they are left out ("MLIR translation rule for primitive
  'layout_cast' not found for platform cpu"). And views of transposed operands:
  there products read copies ("'TransposeTransform' object has no attribute
  'indices'").
  """

  # 0, 1, ... 63 in shared memory: indices computed from a thread's number do
  # not change in a loop, and the compiler keeps them all in registers.
  index: jax.Ref
  # Where that interpreter copies a tile to; elsewhere None.
  transposed: jax.Ref | None

  def product(self, *pairs):
    """The sum of A B over pairs of operands [64, 64], in float32."""
    terms = [
      ((a, i), (b, j))
      for a, b in pairs
      for i in range(a.parts.shape[0])
      for j in range(b.parts.shape[0])
      if i + j < 2  # the product of two low parts is below float32's precision
    ]

    def view(operand, part):
      ref = operand.parts.at[self.index[part]]
      if not operand.transposed:
        return ref
      if self.transposed is None:
        return ref.T
      self.transposed[...] = ref[...].T
      return self.transposed

    def accumulate(accumulator):
      for x, y in terms:
        plgpu.wgmma(accumulator, view(*x), view(*y))
      plgpu.wgmma_wait(0)
      return accumulator[...]

    return pl.run_scoped(accumulate, plgpu.ACC((TILE, TILE), jnp.float32))

  def write(self, operand, x):
    """Stores a float32 tile [64, 64] as the sum of the operand's parts."""
    *first, last = self.blocks(operand.parts)
    for part in first:
      part[...] = x.astype(jnp.bfloat16)
      # Read back: a compiler may drop a pair of conversions in registers.
      x = x - part[...].astype(jnp.float32)
    last[...] = x.astype(jnp.bfloat16)
    plgpu.commit_smem()

  def read(self, operand):
    """The float32 tile of an operand."""
    return sum(x[...].astype(jnp.float32) for x in self.blocks(operand.parts))

  def blocks(self, tiles):
    """The tiles of a reference [n, 64, 64], at places read from memory.

    Were they known to the compiler, it would keep the addresses of all tiles in
    registers throughout, and spill.
    """
    return [tiles.at[self.index[i]] for i in range(tiles.shape[0])]

  def decay(self, total, beta):
    """The _Decay of vectors G and beta [C] in shared memory."""
    row, column = self._vector(total, 0), self._vector(total, 1)
    last = total[TILE - 1]
    until = self._spread(row, 0) - self._spread(column, 1)
    causal = self._index(0) >= self._index(1)
    return _Decay(
      # Masked before exp: above the diagonal the difference may be large.
      pairwise=jnp.exp(jnp.where(causal, until, -jnp.inf)),
      since_start=self._spread(jnp.exp(row), 0),
      until_end=self._spread(jnp.exp(last - row), 0),
      whole=jnp.exp(last),
      beta=self._spread(self._vector(beta, 0), 0),
    )

  def zero(self):
    """A tile of zeros, laid out as the sums of products that it starts."""
    return self._laid_out(
      jnp.zeros((TILE, TILE), jnp.float32), plgpu.Layout.WGMMA
    )

  def strictly_lower(self, x):
    return jnp.where(self._index(0) > self._index(1), x, 0.0)

  def invert(self, similar, beta, inverse, work):
    """Writes (I + L)^-1 to `inverse`; L = beta * similar, `work` is scratch.

    With X the inverse of the diagonal blocks of b rows, X - X L_b X is that of
    blocks of 2 b rows, where L_b has what L adds to them. Unlike powers
    of L, which overflow for repeated keys with beta near 1, nothing here
    outgrows the inverse.
    """
    beta = self._spread(self._vector(beta, 0), 0)
    # i ^ j < 2 b where i and j share a block of 2 b rows.
    apart = self._index(0) ^ self._index(1)
    result = jnp.where(
      apart == 0, 1.0, jnp.where(apart < 2, -beta * similar[...], 0.0)
    )
    self.write(inverse, result)
    size = 2
    while size < TILE:
      apart = self._index(0) ^ self._index(1)
      added = (apart >= size) & (apart < 2 * size)
      self.write(work, jnp.where(added, beta * similar[...], 0.0))
      self.write(work, self.product((work, inverse)))
      result -= self.product((inverse, work))
      self.write(inverse, result)
      size *= 2

  def _index(self, axis):
    """i (axis 0) or j (axis 1) of every element [64, 64]."""
    return self._spread(self._vector(self.index, axis), axis)

  def _vector(self, ref, axis):
    """A vector in shared memory as one element for each index of `axis`."""
    return self._laid_out(ref[...], plgpu.Layout.WGMMA.reduce(1 - axis))

  def _spread(self, vector, axis):
    """The tile whose element depends on its index in `axis` alone."""
    tile = lax.broadcast_in_dim(vector, (TILE, TILE), (axis,))
    return self._laid_out(tile, plgpu.Layout.WGMMA)

  def _laid_out(self, x, layout):
    return plgpu.layout_cast(x, layout) if self.transposed is None else x


def _varying_as(x, outputs):
  """Outputs marked to vary over a shard_map's mesh as x does."""
  axes = tuple(jax.typeof(x).manual_axis_type.varying)
  if axes:
    outputs = [lax.pcast(y, axes, to="varying") for y in outputs]
  return tuple(outputs)


def _tile(dtype, *leading):
  """Shared memory [*leading, 64, 64], swizzled for the tensor cores."""
  bytes_of_row = 128
  tiling = (8, bytes_of_row // jnp.dtype(dtype).itemsize)
  return plgpu.SMEM(
    (*leading, TILE, TILE),
    dtype,
    transforms=(
      plgpu.TilingTransform(tiling),
      plgpu.SwizzleTransform(bytes_of_row),
    ),
  )


def _operand(parts):
  return _tile(jnp.bfloat16, parts)


def _vector(dtype=jnp.float32):
  return plgpu.SMEM((TILE,), dtype)


def _program():
  """(row, head, columns of V) of this program."""
  row, head = lax.axis_index("row"), lax.axis_index("head")
  return row, head, _block(lax.axis_index("tile"))


def _block(index):
  return pl.ds(index * TILE, TILE)


def _split(x):
  """[..., K] float32 -> [..., 2 * K] bfloat16, high parts before low ones."""
  if x.dtype == jnp.bfloat16:
    return x
  # Not a pair of conversions, which XLA may drop.
  high = lax.reduce_precision(x, exponent_bits=8, mantissa_bits=7)
  return jnp.concatenate([high, x - high], axis=-1).astype(jnp.bfloat16)


def _parts_of(array, row, tokens, head, block, operand):
  """Copies that load a block of 64 columns of a `_split` array [B,T,H,*]."""
  parts = operand.parts.shape[0]
  blocks = array.shape[-1] // TILE // parts
  return [
    (
      array.at[row, tokens, head, _block(part * blocks + block)],
      operand.parts.at[part],
    )
    for part in range(parts)
  ]


def _load(barrier, *copies):
  """Copies (global, shared) pairs of references, and waits for them."""
  plgpu.commit_smem()  # all threads are done with what is overwritten
  for i, (source, target) in enumerate(copies):
    plgpu.copy_gmem_to_smem(source, target, barrier.at[i])
  for i in range(len(copies)):
    plgpu.barrier_wait(barrier.at[i])


def _copy_out(source, target):
  """Copies shared to global memory; `source` may be overwritten at once."""
  plgpu.commit_smem()
  plgpu.copy_smem_to_gmem(source, target)
  plgpu.wait_smem_to_gmem(0, wait_read_only=True)
