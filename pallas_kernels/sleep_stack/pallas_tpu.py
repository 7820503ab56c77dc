"""N passes of all blocks over a window, as one Mosaic kernel for TPUs.

The grid walks over tiles of batch rows. All weights wait in VMEM, fetched once;
a tile's h and S come in, live there through all passes and blocks, and go out.
The equations are those of `sleep_jax.model`, the delta rule is that of
`pallas_kernels.gated_delta.pallas_tpu`, called on what lies in VMEM.

Activations are [M, *] matrices of a tile's M = rows x L tokens, so that each
projection is one product. Attention takes a group of rows, at most 128 tokens,
as one sequence under a block-diagonal causal mask; the rule takes the same
rows, heads packed. Groups, repeats of the pattern and passes are rolled loops:
the code has one body for each kind of block in the pattern.

Products have operands in the compute dtype and the precision that JAX is set
to (`jax_default_matmul_precision`), as the modules' own have; sums, norms,
gates and, within a pass, h are float32, as is S. Where the modules round in
between, the kernel does not.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.gated_delta import pallas_tpu as rule
from sleep_jax.config import ModelConfig
from sleep_jax.model import layers
from sleep_jax.model.fast_weights import KEY_NORM_EPS, OUTPUT_NORM_EPS

MAX_WIDTH = 256
MAX_LENGTH = 128
# Tokens of a group: a tile of the smaller matrix units. And of a step of the
# grid: enough that loading weights into the matrix units does not count.
GROUP = 128
STEP = 256
# Tiles of the rule side by side, as in its own kernel.
RULE_TILES = 4
# Columns of a SwiGLU layer's middle at a time.
MLP_CHUNK = 256
# Of the VMEM of v5e and v6e, 128 MiB: what inputs, outputs and scratch may
# take, and what is granted to the compiler for its own use beyond them.
VMEM_BYTES = 64 * 2**20
COMPILER_BYTES = 24 * 2**20
LANES = 128
KINDS = {"attn", "gdn"}
# The update rules served: a decay for each head, or none.
DECAYING = {"gated_delta": True, "delta": False}


@dataclasses.dataclass(frozen=True)
class Stack:
  """What the kernel is compiled for.

  Attributes:
    config: the model's.
    batch: B.
    passes: N.
    length: L, a multiple of 8.
    group: rows that attention and the rule work on at once.
    groups: of a step of the grid.
  """

  config: ModelConfig
  batch: int
  passes: int
  length: int
  group: int
  groups: int

  @classmethod
  def of(cls, config, batch, length, passes):
    """For [batch, length] tokens; the length is made a multiple of 8."""
    length = pl.cdiv(length, 8) * 8
    heads = config.fast_weight_heads
    rule_rows = max(1, RULE_TILES * _packed(heads, length) // heads)
    group = max(1, min(GROUP // length, rule_rows, batch))
    groups = max(1, min(STEP // (group * length), batch // group))
    return cls(config, batch, passes, length, group, groups)

  @property
  def rows(self):
    return self.group * self.groups

  @property
  def tokens(self):
    """M, of a step."""
    return self.rows * self.length

  @property
  def dtype(self):
    return jnp.dtype(self.config.compute_dtype)

  @property
  def head_dim(self):
    return self.config.width // self.config.attention_heads

  @property
  def keys(self):
    return self.config.fast_weight_heads * self.config.key_dim

  @property
  def values(self):
    return self.config.fast_weight_heads * self.config.value_dim

  @property
  def layout(self):
    """Of the rule on a group of rows."""
    heads = self.config.fast_weight_heads
    return rule.Layout(
      rows=self.group,
      chunk=self.length,
      heads=heads,
      packed=_packed(heads, self.length),
      length=self.length,
      key_dim=self.config.key_dim,
      value_dim=self.config.value_dim,
      exact=self.dtype == jnp.float32,
    )

  @property
  def kinds(self):
    """Each block in order of a pass, one for each repeat."""
    return [
      kind
      for kinds, repeats in self.config.pattern
      for _ in range(repeats)
      for kind in kinds
    ]


def _packed(heads, length):
  """Heads a tile of the rule."""
  return max(
    i
    for i in range(1, heads + 1)
    if heads % i == 0 and (i == 1 or i * length <= rule.MAX_TILE)
  )


class _Scratch(NamedTuple):
  """What a step keeps in VMEM besides weights and S, all float32.

  q, k, v and o serve attention and the rule in turn, [rows, L, *].
  """

  h: Any  # [M, D]
  active: Any  # 1 or 0 by token, in all lanes [M, LANES]
  unseen: Any  # 0 or -1e30, by query and key of a group [groups, T, T]
  q: Any
  k: Any
  v: Any
  o: Any
  strengths: Any  # g | beta by token [rows, L, 2 H]
  gates: Any  # the same as the rule wants them
  rule: Any  # of the rule itself

  @classmethod
  def shapes(cls, stack):
    config, layout = stack.config, stack.layout

    def array(*shape):
      return pltpu.VMEM(shape, jnp.float32)

    tokens = functools.partial(array, stack.rows, stack.length)
    shared = config.key_value_heads * stack.head_dim
    return cls(
      h=array(stack.tokens, config.width),
      active=array(stack.tokens, LANES),
      unseen=array(stack.groups, *[stack.group * stack.length] * 2),
      q=tokens(max(config.width, stack.keys)),
      k=tokens(max(shared, stack.keys)),
      v=tokens(max(shared, stack.values)),
      o=tokens(max(config.width, stack.values)),
      strengths=tokens(2 * config.fast_weight_heads),
      gates=array(stack.rows, 1, layout.groups, rule.GATES, layout.tile),
      rule=tuple(rule.scratch_shapes(layout)),
    )


def _wide(column, width):
  """A column that fills LANES lanes, [M, width]."""
  copies = [column] * pl.cdiv(width, LANES)
  return jnp.concatenate(copies, axis=1)[:, :width]


def _root_mean_square(x, scale, eps):
  square = jnp.mean(x * x, axis=1, keepdims=True)
  return x * jax.lax.rsqrt(square + eps) * scale


def _by_head(x, dim, eps, count):
  """x [M, H dim] / sqrt(sum over a head's lanes of x^2 / count + eps)."""
  lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
  inverse = jnp.zeros_like(x)
  for start in range(0, x.shape[1], dim):
    own = (lane >= start) & (lane < start + dim)
    square = jnp.sum(jnp.where(own, x * x, 0.0), axis=1, keepdims=True)
    root = jax.lax.rsqrt(square / count + eps)
    inverse = jnp.where(own, root, inverse)
  return x * inverse


def _dot(x, y, contract=(1, 0)):
  """x y in float32, at the precision that JAX is set to."""
  # One pass multiplies bfloat16 exactly; the compiler knows no other.
  low = x.dtype == jnp.bfloat16
  return jax.lax.dot_general(
    x,
    y,
    (((contract[0],), (contract[1],)), ((), ())),
    jax.lax.Precision.DEFAULT if low else None,
    preferred_element_type=jnp.float32,
  )


class _Pass:
  """The blocks of one step of the grid, on refs; `r` is a group's repeat."""

  def __init__(self, stack, scratch, cos_ref, sin_ref):
    self.stack, self.scratch = stack, scratch
    self.cos_ref, self.sin_ref = cos_ref, sin_ref

  def product(self, x, weights, r):
    kernel = weights["kernel"][r]
    return _dot(x.astype(kernel.dtype), kernel)

  def by_row(self, x):
    """[M, *] -> [rows, L, *]."""
    return x.reshape(self.stack.rows, self.stack.length, -1)

  def by_token(self, x):
    """[rows, L, *] -> [rows x L, *]."""
    return x.reshape(-1, x.shape[-1])

  def norm(self, weights, r):
    eps = self.stack.config.norm_eps
    return _root_mean_square(self.scratch.h[...], weights["scale"][r], eps)

  def attention(self, weights, r, x):
    """Multi-head attention: x [M, D] -> [M, D], before the residual."""
    stack, scratch = self.stack, self.scratch
    shared = stack.config.key_value_heads * stack.head_dim
    x = x.astype(stack.dtype)
    for ref, name in ((scratch.q, "q_proj"), (scratch.k, "k_proj")):
      y = self.rotate(self.product(x, weights[name], r))
      ref[:, :, : y.shape[1]] = self.by_row(y)
    scratch.v[:, :, :shared] = self.by_row(
      self.product(x, weights["v_proj"], r)
    )

    def one_group(group, _):
      rows = pl.ds(group * stack.group, stack.group)
      q, k, v = (
        self.by_token(ref[rows, :, :width]).astype(stack.dtype)
        for ref, width in (
          (scratch.q, stack.config.width),
          (scratch.k, shared),
          (scratch.v, shared),
        )
      )
      heads = [
        self.head(group, q, k, v, i)
        for i in range(stack.config.attention_heads)
      ]
      y = jnp.concatenate(heads, axis=1)
      scratch.o[rows, :, : stack.config.width] = y.reshape(
        stack.group, stack.length, -1
      )

    jax.lax.fori_loop(0, stack.groups, one_group, None)
    y = self.by_token(scratch.o[:, :, : stack.config.width])
    return self.product(y, weights["o_proj"], r)

  def head(self, group, q, k, v, i):
    """softmax(q k^T / sqrt(d)) v of head i, for a group's rows [T, d]."""
    stack, dim = self.stack, self.stack.head_dim
    j = i // (stack.config.attention_heads // stack.config.key_value_heads)
    mine, shared = (slice(x * dim, (x + 1) * dim) for x in (i, j))
    logits = _dot(q[:, mine], k[:, shared], (1, 1))
    logits = dim**-0.5 * logits + self.scratch.unseen[group]
    weights = jnp.exp(logits - jnp.max(logits, axis=1, keepdims=True))
    total = jnp.sum(weights, axis=1, keepdims=True)
    return _dot(weights.astype(stack.dtype), v[:, shared]) / total

  def rotate(self, x):
    """Rotary positions on heads [M, H d]: the halves of each head turn."""
    half, width = self.stack.head_dim // 2, x.shape[1]
    lane = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    in_first = functools.reduce(
      jnp.logical_or,
      [
        (lane >= start) & (lane < start + half)
        for start in range(0, width, 2 * half)
      ],
    )
    other = jnp.where(in_first, jnp.roll(x, -half, 1), jnp.roll(x, half, 1))
    return x * self.cos_ref[:, :width] + other * self.sin_ref[:, :width]

  def fast_weights(self, weights, r, x, state_ref):
    """Gated DeltaNet: x [M, D] -> [M, D]; writes S [R, rows, H K, V]."""
    stack, scratch, layout = self.stack, self.scratch, self.stack.layout
    config, heads = stack.config, stack.config.fast_weight_heads
    active = functools.partial(_wide, scratch.active[...])
    # Zeros here are zeros in q, k and v before the convolution.
    x = (x * active(config.width)).astype(stack.dtype)
    at = 0
    for ref, name, width in (
      (scratch.q, "q_proj", stack.keys),
      (scratch.k, "k_proj", stack.keys),
      (scratch.v, "v_proj", stack.values),
    ):
      taps = weights["qkv_conv"]["kernel"][r, :, at : at + width]
      y = self.convolve(self.product(x, weights[name], r), taps)
      if name != "v_proj":
        y = _by_head(y, config.key_dim, KEY_NORM_EPS, 1)
      ref[:, :, :width] = self.by_row(y)
      at += width
    beta = jax.nn.sigmoid(self.product(x, weights["b_proj"], r))
    if DECAYING[config.update_rule]:
      time = self.product(x, weights["a_proj"], r) + weights["dt_bias"][r]
      # softplus
      time = jnp.maximum(time, 0.0) + jnp.log1p(jnp.exp(-jnp.abs(time)))
      g = -jnp.exp(weights["A_log"][r]) * time
    else:
      g = jnp.zeros_like(beta)
    strengths = jnp.concatenate([g, beta], axis=1) * active(2 * heads)
    scratch.strengths[...] = self.by_row(strengths)

    def one_group(group, _):
      for i in range(stack.group):
        self.spread(group * stack.group + i)
      rows = pl.ds(group * stack.group, stack.group)
      rule.one_chunk(
        layout,
        scratch.rule,
        scratch.q.at[rows],
        scratch.k.at[rows],
        scratch.v.at[rows],
        scratch.gates.at[rows],
        state_ref.at[r, rows],
        scratch.o.at[rows],
        state_ref.at[r, rows],
        at=0,
      )

    jax.lax.fori_loop(0, stack.groups, one_group, None)
    o = self.by_token(scratch.o[:, :, : stack.values])
    o = _by_head(o, config.value_dim, OUTPUT_NORM_EPS, config.value_dim)
    gate = self.product(x, weights["g_proj"], r)
    o = o * weights["o_norm"]["scale"][r] * jax.nn.silu(gate)
    return self.product(o, weights["o_proj"], r)

  def convolve(self, x, taps):
    """The causal depthwise convolution within each row, then SiLU."""
    count = taps.shape[0]
    x = self.by_row(x)
    place = jax.lax.broadcasted_iota(jnp.int32, x.shape, 1)
    y = taps[count - 1 :][None] * x
    for back in range(1, min(count, self.stack.length)):
      earlier = jnp.where(place >= back, jnp.roll(x, back, 1), 0.0)
      y += taps[count - 1 - back : count - back][None] * earlier
    return jax.nn.silu(self.by_token(y))

  def spread(self, row):
    """A row's g and beta as the rule's gates: tokens, head by head, in lanes.

    In the lanes of a head all columns hold its g; summed under a causal mask,
    they are the running total, and so on.
    """
    layout, heads = self.stack.layout, self.stack.config.fast_weight_heads
    chunk, shape = layout.chunk, (layout.chunk, layout.tile)
    token, lane = (
      jax.lax.broadcasted_iota(jnp.int32, shape, i) for i in (0, 1)
    )
    head = functools.reduce(
      lambda x, i: jnp.where(lane >= i * chunk, i, x),
      range(1, layout.packed),
      jnp.zeros_like(lane),
    )
    own = lane - chunk * head
    columns = self.scratch.strengths[row]
    total = functools.partial(jnp.sum, axis=0, keepdims=True)
    for group in range(layout.groups):

      def fill(first):
        x = jnp.zeros(shape, jnp.float32)
        for i in range(layout.packed):
          column = columns[:, first + i : first + i + 1]
          x = jnp.where(head == i, column, x)
        return x

      g = fill(group * layout.packed)
      beta = fill(heads + group * layout.packed)
      gates = [
        total(jnp.where(token <= own, g, 0.0)),
        total(jnp.where(token == own, beta, 0.0)),
        total(g),
        jnp.zeros((rule.GATES - 3, layout.tile), jnp.float32),
      ]
      self.scratch.gates[row, 0, group] = jnp.concatenate(gates, axis=0)

  def mlp(self, weights, r, x):
    """SwiGLU: x [M, D] -> [M, D], some of the middle's columns at a time."""
    x = x.astype(self.stack.dtype)
    width = self.stack.config.mlp_width
    chunk = MLP_CHUNK if width % MLP_CHUNK == 0 else width
    y = jnp.zeros(self.scratch.h.shape, jnp.float32)
    for at in range(0, width, chunk):
      columns = pl.ds(at, chunk)
      gate, up = (
        _dot(x, weights[name]["kernel"][r, :, columns])
        for name in ("gate_proj", "up_proj")
      )
      middle = (jax.nn.silu(gate) * up).astype(x.dtype)
      y += _dot(middle, weights["down_proj"]["kernel"][r, columns])
    return y

  def block(self, kind, weights, r, state_ref):
    x = self.norm(weights["mixer_norm"], r)
    if kind == "attn":
      y = self.attention(weights["mixer"], r, x)
    else:
      y = self.fast_weights(weights["mixer"], r, x, state_ref)
    self.scratch.h[...] += y
    x = self.norm(weights["mlp_norm"], r)
    self.scratch.h[...] += self.mlp(weights["mlp"], r, x)


def _kernel(
  places_ref,
  cos_ref,
  sin_ref,
  weights,
  start_ref,
  start_states,
  h_ref,
  states,
  scratch,
  *,
  stack,
):
  """One step of the grid; arguments as `sleep` hands them over."""
  blocks = _Pass(stack, scratch, cos_ref, sin_ref)
  h_ref[...] = start_ref[...]
  jax.tree.map(_copy, start_states, states)
  if stack.batch % stack.rows:
    _clear_beyond(stack, h_ref, states)

  def one_pass(n, _):
    _activate(stack, scratch, places_ref, n)
    scratch.h[...] = h_ref[...].astype(jnp.float32)
    for (kinds, repeats), group, group_states in zip(
      stack.config.pattern, weights, states, strict=True
    ):

      def one_repeat(r, _, kinds=kinds, group=group, states=group_states):
        for kind, block, state in zip(kinds, group, states, strict=True):
          blocks.block(kind, block, r, state)

      jax.lax.fori_loop(0, repeats, one_repeat, None)
    active = _wide(scratch.active[...], stack.config.width) > 0
    h_ref[...] = jnp.where(
      active, scratch.h[...], h_ref[...].astype(jnp.float32)
    ).astype(stack.dtype)

  # A row takes the last of N passes: none that no row of the tile takes is run.
  most = jnp.max(places_ref[0, 1:2]).astype(jnp.int32)
  jax.lax.fori_loop(stack.passes - most, stack.passes, one_pass, None)


def _copy(source, target):
  target[...] = source[...]


def _clear_beyond(stack, h_ref, states):
  """Zeros for rows beyond the batch, where h and S hold anything.

  A product with 0 makes NaN of NaN, and rows share products.
  """
  left = stack.batch - pl.program_id(0) * stack.rows
  token = jax.lax.broadcasted_iota(jnp.int32, h_ref.shape, 0)
  h = jnp.where(
    token < left * stack.length, h_ref[...].astype(jnp.float32), 0.0
  )
  h_ref[...] = h.astype(h_ref.dtype)
  for row in range(stack.rows):

    @pl.when(row >= left)
    def _(row=row):
      for ref in jax.tree.leaves(states):
        ref[:, row] = jnp.zeros_like(ref[:, row])


def _activate(stack, scratch, places_ref, n):
  """The masks of pass n: its active places, and who sees whom."""
  left = (stack.passes - n).astype(jnp.float32)
  row = jnp.where(places_ref[0, 1:2] >= left, places_ref[0, :1], 0.0)
  columns = jnp.broadcast_to(row, (8, stack.tokens)).T
  scratch.active[...] = jnp.broadcast_to(columns[:, :1], scratch.active.shape)
  tile = stack.group * stack.length
  query, key = (
    jax.lax.broadcasted_iota(jnp.int32, (tile, tile), i) for i in (0, 1)
  )
  first = jnp.zeros_like(query)
  for start in range(stack.length, tile, stack.length):
    first = jnp.where(query >= start, start, first)
  causal = (key <= query) & (key >= first)
  for group in range(stack.groups):
    active = row[:, group * tile : (group + 1) * tile] > 0
    scratch.unseen[group] = jnp.where(causal & active, 0.0, -1e30)


def _groups(config, params):
  """The parameters by group and block."""
  return [
    [params[f"group_{i}"][f"{kind}_{j}"] for j, kind in enumerate(kinds)]
    for i, (kinds, _) in enumerate(config.pattern)
  ]


def _weights(config, params):
  """A tuple by group of tuples by block of parameters [R, *, *].

  Projections are in the compute dtype, vectors are rows [R, 1, *], and the
  scale of the fast weights' output is repeated for each head.
  """

  def prepare(path, x):
    names = [entry.key for entry in path]
    if names[-2].endswith("_proj"):
      return x.astype(config.compute_dtype)
    if names[-2] == "o_norm":
      x = jnp.tile(x, (1, config.fast_weight_heads))
    return x if x.ndim == 3 else x[:, None]

  return tuple(
    tuple(jax.tree_util.tree_map_with_path(prepare, block) for block in group)
    for group in _groups(config, params)
  )


def _rotary(stack):
  """cos and signed sin of a step's tokens [M, D], each head alike."""
  config, dim = stack.config, stack.head_dim
  # The module's own turns of (1, 0) are (cos, sin).
  one = jnp.concatenate([jnp.ones(dim // 2), jnp.zeros(dim // 2)])
  one = jnp.broadcast_to(one, (1, stack.length, 1, dim)).astype(stack.dtype)
  position = jnp.arange(stack.length)[None]
  cos, sin = jnp.split(
    layers.rotary(one, position, config.rope_theta)[0, :, 0], 2, -1
  )
  return [
    jnp.tile(
      jnp.concatenate(halves, -1).astype(jnp.float32),
      (stack.rows, config.attention_heads),
    )
    for halves in ((cos, cos), (-sin, sin))
  ]


def _like(x):
  """x's shape and dtype; under shard_map it varies over the mesh as x does."""
  return jax.ShapeDtypeStruct(
    x.shape, x.dtype, manual_axis_type=jax.typeof(x).manual_axis_type
  )


def _whole(x):
  """All of x at every step, fetched once."""
  return pl.BlockSpec(
    x.shape, lambda i: (0,) * x.ndim, pipeline_mode=pl.Buffered(1)
  )


def _padded_bytes(shape, dtype):
  """In VMEM, where the last two axes fill tiles."""
  size = jnp.dtype(dtype).itemsize
  *outer, rows, lanes = shape
  rows = pl.cdiv(rows, 32 // size) * 32 // size
  return math.prod(outer) * rows * pl.cdiv(lanes, LANES) * LANES * size


def _tile_specs(stack):
  """BlockSpecs of h and of each state, a step's rows of them."""
  h = pl.BlockSpec((stack.tokens, stack.config.width), lambda i: (i, 0))

  def state(kind, repeats):
    if kind == "attn":
      return None
    shape = repeats, stack.rows, stack.keys, stack.config.value_dim
    return pl.BlockSpec(shape, lambda i: (0, i, 0, 0))

  return h, tuple(
    tuple(state(kind, repeats) for kind in kinds)
    for kinds, repeats in stack.config.pattern
  )


def vmem_bytes(stack, params):
  """What the kernel's inputs, outputs and scratch take of VMEM."""
  tile = stack.tokens, stack.config.width
  once = [
    *jax.tree.leaves(
      jax.eval_shape(functools.partial(_weights, stack.config), params)
    ),
    *jax.tree.leaves(_Scratch.shapes(stack)),
    *[jax.ShapeDtypeStruct(tile, jnp.float32)] * 2,  # cos and sin
  ]
  h, states = _tile_specs(stack)
  # h and S come in and go out while the next and the last tile's travel.
  tiles = [(h.block_shape, stack.dtype)]
  tiles += [(x.block_shape, jnp.float32) for x in jax.tree.leaves(states)]
  tiles = [_padded_bytes(*tile) for tile in tiles]
  places = _padded_bytes((8, stack.tokens), jnp.float32)
  return (
    sum(_padded_bytes(x.shape, x.dtype) for x in once)
    + 4 * sum(tiles)
    + 2 * places
  )


def flops(stack, params):
  """Of all passes over all rows, by the products of the algorithm."""
  config, length = stack.config, stack.length
  heads, key, value = config.fast_weight_heads, config.key_dim, config.value_dim
  projections = sum(
    x.size
    for path, x in jax.tree_util.tree_leaves_with_path(_groups(config, params))
    if path[-2].key.endswith("_proj")
  )
  attention = 4 * length**2 * config.width
  fast_weights = heads * (
    4 * length**2 * (key + value)
    + 6 * length * key * value
    + 2 * length**3 // 3
  )
  row = (
    2 * length * projections
    + stack.kinds.count("attn") * attention
    + stack.kinds.count("gdn") * fast_weights
  )
  return stack.passes * stack.batch * row


def transcendentals(stack):
  """Of all passes over all rows: exponentials, in the main."""
  config, length = stack.config, stack.length
  attention = length**2 * config.attention_heads
  fast_weights = length * (
    2 * (stack.keys + stack.values) + config.fast_weight_heads * (length + 2)
  )
  row = (
    len(stack.kinds) * length * config.mlp_width
    + stack.kinds.count("attn") * attention
    + stack.kinds.count("gdn") * fast_weights
  )
  return stack.passes * stack.batch * row


def cannot_serve(config: ModelConfig, params, batch, length) -> str | None:
  """Why the kernel does not serve this model and window; None if it does."""
  if config.compute_dtype not in ("float32", "bfloat16"):
    return f"the compute dtype is {config.compute_dtype}"
  if others := {k for kinds, _ in config.pattern for k in kinds} - KINDS:
    return f"the pattern has {sorted(others)}: the kernel has {sorted(KINDS)}"
  for name in ("attention_bias", "sandwich_norms", "norm_in_loop"):
    if getattr(config, name):
      return f"model.{name} is set"
  if config.loops > 1:
    return f"model.loops is {config.loops}"
  if config.beta_range != 1 or not config.rope_theta:
    return (
      f"model.beta_range and rope_theta are {config.beta_range} and "
      f"{config.rope_theta}"
    )
  if config.width > MAX_WIDTH or length > MAX_LENGTH:
    return (
      f"D = {config.width} and L = {length}: at most {MAX_WIDTH} and "
      f"{MAX_LENGTH}"
    )
  if config.update_rule not in DECAYING:
    return f"the update rule is {config.update_rule}: one of {list(DECAYING)}"
  needed = vmem_bytes(Stack.of(config, batch, length, 1), params)
  if needed > VMEM_BYTES:
    return (
      f"weights, a tile's h and S, and scratch take {needed / 2**20:.0f} MiB "
      f"of VMEM: at most {VMEM_BYTES / 2**20:.0f} MiB fit"
    )
  return None


def sleep(
  config: ModelConfig,
  params,
  h,
  state,
  valid,
  row_passes,
  passes: int,
  interpret: Any = False,
):
  """(h, state) after `passes` passes, as `sleep_jax.sleep.scanned`.

  Args:
    config: of the `HybridLM` whose blocks run.
    params: its parameters, or those of its groups alone.
    h: embedded window [B, L, D] in the compute dtype.
    state: fast weights [R, B, H, K, V] in float32, None for attention, in the
      nesting of `init_fast_weights`.
    valid: False where a place is padding [B, L].
    row_passes: passes of each row [B], the last ones of the N.
    passes: N.
    interpret: False, or `pltpu.InterpretParams()` to run on a CPU.

  Raises:
    ValueError: the kernel cannot serve these; see `cannot_serve`.
  """
  if reason := cannot_serve(config, params, *h.shape[:2]):
    raise ValueError(f"sleep_stack cannot serve: {reason}")
  batch, given, width = h.shape
  stack = Stack.of(config, batch, given, passes)
  padding = stack.length - given
  h = jnp.pad(h, ((0, 0), (0, padding), (0, 0))).reshape(-1, width)
  steps = pl.cdiv(batch, stack.rows)
  # Valid places and their rows' passes by step, in lanes; rows to fill a tile.
  row_passes = jnp.broadcast_to(row_passes[:, None], valid.shape)
  places = jnp.stack([valid, row_passes]).astype(jnp.float32)
  beyond = steps * stack.rows - batch
  places = jnp.pad(places, ((0, 6), (0, beyond), (0, padding)))
  places = jnp.swapaxes(places.reshape(8, steps, -1), 0, 1)
  shapes = [x.shape for x in jax.tree.leaves(state)]
  states = jax.tree.map(
    lambda x: x.reshape(*x.shape[:2], -1, x.shape[-1]), state
  )
  inputs = places, *_rotary(stack), _weights(config, params), h, states
  outputs = jax.tree.map(_like, (h, states))
  h_spec, state_specs = _tile_specs(stack)
  call = pl.pallas_call(
    functools.partial(_kernel, stack=stack),
    grid=(steps,),
    in_specs=(
      pl.BlockSpec((1, *places.shape[1:]), lambda i: (i, 0, 0)),
      *jax.tree.map(_whole, inputs[1:4]),
      h_spec,
      state_specs,
    ),
    out_specs=(h_spec, state_specs),
    out_shape=outputs,
    scratch_shapes=[_Scratch.shapes(stack)],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=("parallel",),
      vmem_limit_bytes=vmem_bytes(stack, params) + COMPILER_BYTES,
    ),
    cost_estimate=pl.CostEstimate(
      flops=flops(stack, params),
      transcendentals=transcendentals(stack),
      bytes_accessed=sum(
        x.size * x.dtype.itemsize for x in jax.tree.leaves((inputs, outputs))
      ),
    ),
    interpret=interpret,
    name="sleep_stack",
  )
  h, states = call(*inputs)
  h = h.reshape(batch, stack.length, width)[:, :given]
  return h, jax.tree.unflatten(
    jax.tree.structure(state),
    [
      x.reshape(shape)
      for x, shape in zip(jax.tree.leaves(states), shapes, strict=True)
    ],
  )
