"""The method written a second time, slowly: what the tests compare with.

One row and one token at a time, without padding, scans, chunks, row masks or
stacked parameters; every formula from its source (paper, Algorithm 1; the Gated
DeltaNet layer), nothing shared with the code under test.
"""

import functools

import jax
import jax.numpy as jnp


def rms_norm(x, scale, eps):
  return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + eps) * scale


def rope(x, theta):
  """x [T, H, d]: pairs (i, i + d/2) as complex numbers, turned by position."""
  length, _, d = x.shape
  pairs = x[..., : d // 2] + 1j * x[..., d // 2 :]
  angle = jnp.outer(jnp.arange(length), theta ** (-2 * jnp.arange(d // 2) / d))
  turned = pairs * jnp.exp(1j * angle)[:, None]
  return jnp.concatenate([turned.real, turned.imag], -1)


def attention(config, p, x):
  """Causal grouped-query attention over x [T, D]: shared heads copied."""
  length, heads = x.shape[0], config.attention_heads
  q, k, v = (
    (x @ p[f"{name}_proj"]["kernel"]).reshape(length, -1, config.width // heads)
    for name in "qkv"
  )
  shared = heads // config.key_value_heads
  q, k = rope(q, config.rope_theta), rope(k, config.rope_theta)
  k, v = jnp.repeat(k, shared, 1), jnp.repeat(v, shared, 1)
  weights = jnp.exp(jnp.einsum("thd,shd->hts", q, k) / q.shape[-1] ** 0.5)
  weights = jnp.tril(weights)
  weights = weights / weights.sum(-1, keepdims=True)
  y = jnp.einsum("hts,shd->thd", weights, v).reshape(length, -1)
  return y @ p["o_proj"]["kernel"]


def gated_delta_net(config, p, x, state):
  """(y [T, D], S [H, K, V]): a token at a time."""
  length, heads = x.shape[0], config.fast_weight_heads

  def silu(z):
    return z / (1 + jnp.exp(-z))

  key_width = heads * config.key_dim
  channels = {
    "q": slice(0, key_width),
    "k": slice(key_width, 2 * key_width),
    "v": slice(2 * key_width, None),
  }

  def convolved(name):
    y = x @ p[f"{name}_proj"]["kernel"]
    taps = p["qkv_conv"]["kernel"][:, channels[name]]
    # A matrix that moves the sequence back by one token.
    later = jnp.eye(length, k=-1)
    z, moved = 0.0, y
    for tap in taps[::-1]:
      z, moved = z + tap * moved, later @ moved
    return silu(z).reshape(length, heads, -1)

  q, k, v = convolved("q"), convolved("k"), convolved("v")
  q = q / jnp.sqrt(jnp.sum(q**2, -1, keepdims=True) + 1e-6)
  k = k / jnp.sqrt(jnp.sum(k**2, -1, keepdims=True) + 1e-6)
  beta = 1 / (1 + jnp.exp(-(x @ p["b_proj"]["kernel"])))
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
  return y @ p["o_proj"]["kernel"], state


@functools.partial(jax.jit, static_argnums=(0, 1))  # small, compiled once
def block(config, kind, p, h, state):
  """(h [T, D], S) after one block."""
  x = rms_norm(h, p["mixer_norm"]["scale"], config.norm_eps)
  if kind == "attn":
    y = attention(config, p["mixer"], x)
  else:
    y, state = gated_delta_net(config, p["mixer"], x, state)
  h = h + y
  x = rms_norm(h, p["mlp_norm"]["scale"], config.norm_eps)
  z = x @ p["mlp"]["gate_proj"]["kernel"]
  z = z / (1 + jnp.exp(-z)) * (x @ p["mlp"]["up_proj"]["kernel"])
  return h + z @ p["mlp"]["down_proj"]["kernel"], state


def blocks(config, params, h, states):
  """One pass over h [T, D]; states: a list, one entry for each block."""
  states, i = list(states), 0
  for g, (kinds, repeats) in enumerate(config.pattern):
    for r in range(repeats):
      for j, kind in enumerate(kinds):
        p = params[f"group_{g}"][f"{kind}_{j}"]
        p = jax.tree.map(lambda x, r=r: x[r], p)
        h, states[i] = block(config, kind, p, h, states[i])
        i += 1
  return h, states


def loss_sum(config, params, windows, passes):
  """(summed loss, S of each block) of one row by Algorithm 1.

  windows: list of (inputs, targets, mask) without padding.
  """
  count = sum(len(kinds) * repeats for kinds, repeats in config.pattern)
  zeros = jnp.zeros(
    (config.fast_weight_heads, config.key_dim, config.value_dim)
  )
  states, total = [zeros] * count, 0.0
  for inputs, targets, mask in windows:
    h = params["embedding"]["embedding"][jnp.asarray(inputs)]
    if not any(mask):
      for _ in range(passes):
        h, states = blocks(config, params, h, states)
      continue
    h, states = blocks(config, params, h, states)
    x = rms_norm(h, params["final_norm"]["scale"], config.norm_eps)
    logits = x @ params["head"]["kernel"]
    for row, target, counts in zip(logits, targets, mask, strict=True):
      if counts:
        total += jnp.log(jnp.sum(jnp.exp(row))) - row[target]
  return total, states
