"""The gated delta rule, one token at a time: the definition of the others."""

import jax
import jax.numpy as jnp


def gated_delta_rule(q, k, v, g, beta, initial_state):
  """Returns (o, final_state) by the token recurrence; see `api`."""
  scale = q.shape[-1] ** -0.5

  def token(state, inputs):
    q, k, v, g, beta = inputs
    state = jnp.exp(g)[..., None, None] * state
    error = v - jnp.einsum("BHKV,BHK->BHV", state, k)
    state = state + jnp.einsum("BHK,BHV->BHKV", k, beta[..., None] * error)
    return state, jnp.einsum("BHKV,BHK->BHV", state, scale * q)

  dtype = initial_state.dtype
  inputs = [jnp.moveaxis(x.astype(dtype), 1, 0) for x in (q, k, v, g, beta)]
  state, o = jax.lax.scan(token, initial_state, inputs)
  return jnp.moveaxis(o, 0, 1).astype(v.dtype), state
