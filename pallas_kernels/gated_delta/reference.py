"""Update rules one token at a time: the definition of all other forms."""

import jax
import jax.numpy as jnp


def scan_tokens(update, q, k, v, g, beta, initial_state):
  """Returns (o, final_state) of a rule given as the update of a token.

  o_t = S_t^T (K^-0.5 q_t), read after the update.

  Args:
    update: (S [B,H,K,V], k [B,H,K], v [B,H,V], g [B,H] or [B,H,K], beta [B,H])
      -> S.
    q, k, v, g, beta, initial_state: as in `api.gated_delta_rule`; g may have a
      last axis K.
  """
  scale = q.shape[-1] ** -0.5

  def token(state, inputs):
    q, *inputs = inputs
    state = update(state, *inputs)
    return state, jnp.einsum("BHKV,BHK->BHV", state, scale * q)

  dtype = initial_state.dtype
  inputs = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, g, beta)]
  state, o = jax.lax.scan(token, initial_state, inputs)
  return jnp.moveaxis(o, 0, 1).astype(v.dtype), state


def decayed(state, g):
  """exp(g) S, with g per head [B,H] or per channel [B,H,K]."""
  decay = jnp.exp(g)
  return (decay[..., None, None] if g.ndim == 2 else decay[..., None]) * state


def hebbian(state, k, v, g, beta):
  """S <- exp(g) S + beta k v^T (paper, equation 3)."""
  written = jnp.einsum("BHK,BHV->BHKV", k, beta[..., None] * v)
  return decayed(state, g) + written


def gated_delta(state, k, v, g, beta):
  """S <- exp(g) S, then S + beta k (v - S^T k)^T."""
  state = decayed(state, g)
  error = v - jnp.einsum("BHKV,BHK->BHV", state, k)
  return state + jnp.einsum("BHK,BHV->BHKV", k, beta[..., None] * error)


def gated_delta_rule(q, k, v, g, beta, initial_state):
  """Returns (o, final_state) by the token recurrence; see `api`."""
  return scan_tokens(gated_delta, q, k, v, g, beta, initial_state)
