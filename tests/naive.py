"""The method written a second time, slowly: what the tests compare with.

One row and one token at a time, without padding, scans, chunks, row masks or
stacked parameters; every formula from its source (paper, Algorithm 1; the Gated
DeltaNet and Jet layers; Ouro's blocks and loops), nothing shared with the code
under test.
"""

import functools

import jax
import jax.numpy as jnp


def rms_norm(x, scale, eps):
  return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale


def rope(x, theta, position):
  """x [T, H, d]: pairs (i, i + d/2) as complex numbers, turned by position."""
  d = x.shape[-1]
  pairs = x[..., : d // 2] + 1j * x[..., d // 2 :]
  angle = jnp.outer(position, theta ** (-2 * jnp.arange(d // 2) / d))
  turned = pairs * jnp.exp(1j * angle)[:, None]
  return jnp.concatenate([turned.real, turned.imag], -1)


def attention(config, p, x, kept, window_length):
  """(y [T, D], unturned (k, v)): causal, shared heads copied.

  kept: unturned (k, v) of tokens just before, or None; a token sees those less
  than a window before it.
  """
  length, heads = x.shape[0], config.attention_heads

  def projected(name):
    y = x @ p[f"{name}_proj"]["kernel"] + p[f"{name}_proj"].get("bias", 0.0)
    if f"{name}_norm" in p:
      y = rms_norm(y, p[f"{name}_norm"]["scale"], config.norm_eps)
    return y.reshape(length, -1, config.width // heads)

  q, k, v = (projected(name) for name in "qkv")
  own = k, v
  if kept is not None:
    k, v = (jnp.concatenate(pair) for pair in zip(kept, own, strict=True))
  shared = heads // config.key_value_heads
  position = jnp.arange(length)
  seen = jnp.arange(length - len(k), length)
  if config.rope_theta:
    q = rope(q, config.rope_theta, position)
    k = rope(k, config.rope_theta, seen)
  k, v = jnp.repeat(k, shared, 1), jnp.repeat(v, shared, 1)
  weights = jnp.exp(jnp.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5)
  distance = position[:, None] - seen
  weights = jnp.where((distance >= 0) & (distance < window_length), weights, 0)
  weights = weights / weights.sum(-1, keepdims=True)
  y = jnp.einsum("hts,shd->thd", weights, v).reshape(length, -1)
  return y @ p["o_proj"]["kernel"], own


def silu(z):
  return z / (1 + jnp.exp(-z))


def fast_weights(config, kind, p, x, state, history):
  """(y [T, D], S [H, K, V], all that was convolved): a token at a time.

  history: what was convolved before x [tokens, channels].
  """
  length, heads = x.shape[0], config.fast_weight_heads
  key_width = heads * config.key_dim
  channels = {
    "q": slice(0, key_width),
    "k": slice(key_width, 2 * key_width),
    "v": slice(2 * key_width, None),
  }

  before = {} if history is None else history
  projected = {}

  def convolved(name):
    y = x @ p[f"{name}_proj"]["kernel"]
    if before:
      y = jnp.concatenate([before[name], y])
    projected[name] = y
    taps = p["qkv_conv"]["kernel"][:, channels[name]]
    # A matrix that moves the sequence back by one token.
    later = jnp.eye(len(y), k=-1)
    z, moved = 0.0, y
    for tap in taps[::-1]:
      z, moved = z + tap * moved, later @ moved
    return silu(z)[len(y) - length :].reshape(length, heads, -1)

  def plain(name):
    return silu(x @ p[f"{name}_proj"]["kernel"]).reshape(length, heads, -1)

  def dynamic(name):
    u = x @ p[f"{name}_proj"]["kernel"]
    if before:
      u = jnp.concatenate([before[name], u])
    projected[name] = u
    made = p["v_conv"]
    made = (
      silu(x @ made["w1_proj"]["kernel"]) @ made["w2_proj"]["kernel"]
      + made["w2_proj"]["bias"]
    )
    rows = []
    for t in range(length):
      taps = made[t].reshape(-1, config.convolution_size)
      last = len(u) - length + t
      rows.append(
        sum(
          taps[:, -1 - back] * u[last - back]
          for back in range(min(config.convolution_size, last + 1))
        )
      )
    return silu(jnp.stack(rows)).reshape(length, heads, -1)

  if kind == "gdn":
    q, k, v = convolved("q"), convolved("k"), convolved("v")
  else:
    q, k, v = plain("q"), plain("k"), dynamic("v")
  q = q / jnp.sqrt(jnp.sum(q**2, -1, keepdims=True) + 1e-6)
  k = k / jnp.sqrt(jnp.sum(k**2, -1, keepdims=True) + 1e-6)
  beta = config.beta_range / (1 + jnp.exp(-(x @ p["b_proj"]["kernel"])))
  dt = jnp.log1p(jnp.exp(x @ p["a_proj"]["kernel"] + p["dt_bias"]))
  decay = jnp.exp(-jnp.exp(p["A_log"]) * dt)
  outputs = []
  for t in range(length):
    # S <- a (I - b k k^T) S + b k v^T, for all heads at once.
    erase = jnp.eye(config.key_dim) - beta[t][:, None, None] * (
      k[t][:, :, None] * k[t][:, None, :]
    )
    write = beta[t][:, None, None] * k[t][:, :, None] * v[t][:, None, :]
    state = decay[t][:, None, None] * (erase @ state) + write
    outputs.append((q[t][:, None, :] @ state)[:, 0])
  o = jnp.stack(outputs) / config.key_dim**0.5
  o = rms_norm(o, p["o_norm"]["scale"], 1e-5).reshape(length, -1)
  y = o * silu(x @ p["g_proj"]["kernel"])
  return y @ p["o_proj"]["kernel"], state, projected


@functools.partial(jax.jit, static_argnums=(0, 1, 2))  # small, compiled once
def block(config, window_length, kind, p, h, state, kept):
  """(h [T, D], S, what a later window may keep) after one block."""

  def norm(name, x):
    return rms_norm(x, p[name]["scale"], config.norm_eps)

  post = kind == "post_attn"
  after = config.sandwich_norms or post
  x = h if post else norm("mixer_norm", h)
  if kind in ("attn", "post_attn"):
    y, own = attention(config, p["mixer"], x, kept, window_length)
  elif kind == "swa":
    near = min(window_length, config.sliding_window)
    y, own = attention(config, p["mixer"], x, kept, near)
  else:
    y, state, own = fast_weights(config, kind, p["mixer"], x, state, kept)
  if kind == "inserted_jet":
    return h + y, state, own
  h = h + (norm("mixer_output_norm", y) if after else y)
  x = h if post else norm("mlp_norm", h)
  z = silu(x @ p["mlp"]["gate_proj"]["kernel"])
  y = (z * (x @ p["mlp"]["up_proj"]["kernel"])) @ p["mlp"]["down_proj"][
    "kernel"
  ]
  h = h + (norm("mlp_output_norm", y) if after else y)
  return h, state, own


def blocks(config, params, h, states, kept, groups, window_length):
  """(h, S, own) after one pass of some groups over h [T, D].

  states, kept, own: dicts from (group, repeat, place in the group, loop).
  """
  states, own = dict(states), {}
  for u in range(config.loops):
    for g in groups:
      kinds, repeats = config.pattern[g]
      for r in range(repeats):
        for j, kind in enumerate(kinds):
          p = params[f"group_{g}"][f"{kind}_{j}"]
          p = jax.tree.map(lambda x, r=r: x[r], p)
          i = g, r, j, u
          h, states[i], own[i] = block(
            config, window_length, kind, p, h, states[i], kept.get(i)
          )
    if config.norm_in_loop and len(config.pattern) - 1 in groups:
      h = rms_norm(h, params["final_norm"]["scale"], config.norm_eps)
  return h, states, own


def cross_entropy(config, params, h, targets):
  """Of each place, from its h before the last norm."""
  if not config.norm_in_loop:
    h = rms_norm(h, params["final_norm"]["scale"], config.norm_eps)
  if config.tied_head:
    logits = h @ params["embedding"]["embedding"].T
  else:
    logits = h @ params["head"]["kernel"]
  return [
    jnp.log(jnp.sum(jnp.exp(row))) - row[target]
    for row, target in zip(logits, targets, strict=True)
  ]


def loss_sum(config, params, windows, sleep, held=None):
  """(summed loss, S of each block) of one row by Algorithm 1.

  windows: list of (inputs, targets, mask) without padding, None for a window
  that is all padding; sleep: a `SleepConfig`; held: (window, pass) -> what its
  places are to say after it, each of which adds to the loss, but for -1.
  """
  zeros = jnp.zeros(
    (config.fast_weight_heads, config.key_dim, config.value_dim)
  )
  kinds = {
    (g, r, j, u): kind
    for g, (group, repeats) in enumerate(config.pattern)
    for r in range(repeats)
    for j, kind in enumerate(group)
    for u in range(config.loops)
  }
  states, kept, total = dict.fromkeys(kinds, zeros), {}, 0.0
  first, last = sleep.looped_groups or (0, len(config.pattern))
  still = jax.lax.stop_gradient
  learnt = params
  for w, window in enumerate(windows):
    params = learnt
    if sleep.gradient_windows and len(windows) - w > sleep.gradient_windows:
      params = still(learnt)
    elif len(windows) - w == sleep.gradient_windows:
      states, kept = still((states, kept))
    if window is None:
      continue
    inputs, targets, mask = window
    h = params["embedding"]["embedding"][jnp.asarray(inputs)]

    def run(params, h, states, groups, kept=kept):
      return blocks(
        config, params, h, states, kept, groups, sleep.window_length
      )

    h, states, own = run(params, h, states, range(first))
    passes = 1 if any(mask) else sleep.passes
    truncated = 0
    if sleep.gradient_passes:
      truncated = max(0, passes - sleep.gradient_passes)
    made = []
    if truncated:
      # What these passes add counts as a constant.
      before = h, states
      for _ in range(truncated):
        h, states, looped = run(
          still(params), *still((h, states)), range(first, last), still(kept)
        )
        made.append(looped)
      h, states = jax.tree.map(
        lambda old, new: old + still(new - old), before, (h, states)
      )
    for n in range(truncated, passes):
      h, states, looped = run(params, h, states, range(first, last))
      made.append(looped)
      said = (held or {}).get((w, n), [-1] * len(inputs))
      nats = cross_entropy(config, params, h, said)
      total += sum(x for x, y in zip(nats, said, strict=True) if y >= 0)
    own |= made[0 if sleep.kept_pass == "first" else -1]
    h, states, late = run(params, h, states, range(last, len(config.pattern)))
    kept = {
      i: x
      for i, x in (own | late).items()
      if (
        sleep.eviction == "sliding"
        if kinds[i] in ("attn", "swa")
        else sleep.carry_convolution
      )
    }
    if not any(mask):
      continue
    nats = cross_entropy(config, params, h, targets)
    total += sum(x for x, counts in zip(nats, mask, strict=True) if counts)
  return total, states
