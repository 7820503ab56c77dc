"""The door to the gated delta rule."""

import functools

import jax
import jax.numpy as jnp
from absl import logging

from pallas_kernels.gated_delta import (
  chunked_xla,
  pallas_gpu,
  pallas_tpu,
  reference,
  trial,
)
from pallas_kernels.target import target

IMPLEMENTATIONS = {
  "reference": reference.gated_delta_rule,
  "chunked_xla": functools.partial(chunked_xla.chunked_rule, delta=True),
  "pallas_tpu": pallas_tpu.gated_delta_rule,
  "pallas_gpu": pallas_gpu.gated_delta_rule,
}
# Why a kernel does not serve given arrays, or None.
CANNOT_SERVE = {
  "pallas_tpu": pallas_tpu.cannot_serve,
  "pallas_gpu": pallas_gpu.cannot_serve,
}

# Decoding a token is all state and no products. The kernels take so few only
# when forced: on a TPU 12 heads of 96 x 256 at once exceed its VMEM.
_LEAST_TOKENS = 8


def gated_delta_rule(
  q, k, v, g, beta, initial_state, *, implementation: str | None = None
):
  """Returns (o [B,T,H,V], final_state [B,H,K,V]) of the gated delta rule.

  S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,
  o_t = S_t^T (K^-0.5 q_t): the transpose of the paper's S (section 3), decay
  before the prediction error, read-out after the update. Differentiable in all
  six inputs, through both outputs.

  Args:
    q: queries [B, T, G, K], already l2-normalised; scaled by K^-0.5 here. G
      divides H: H / G neighbouring heads share a query and a key.
    k: keys [B, T, G, K], already l2-normalised.
    v: values [B, T, H, V].
    g: log decay [B, T, H], at most 0; above 0 the result is undefined.
    beta: writing strength [B, T, H]; a token with beta = 0 and g = 0 leaves
      the state alone.
    initial_state: [B, H, K, V]; its dtype (float32, or float64 in tests) is
      that of the computation.
    implementation: "reference" (a token at a time), "chunked_xla" (anywhere),
      "pallas_tpu" or "pallas_gpu" (Hopper). None picks the kernel of the
      `target` if it serves these shapes and dtypes and has passed its `trial`
      on this device, else "chunked_xla"; a debug log says why. Where the target
      is not here there is no trial: what is compiled for it has the kernel.

  Returns:
    o in v's dtype, final_state in initial_state's dtype.

  Raises:
    ValueError: unknown implementation, or one that cannot serve; shapes that
      do not fit together or are empty, dtypes that are no floating point, or
      a positive g (where its values are known: not under jit). A kernel that is
      forced on another kind of device is refused by Pallas when it is compiled.
  """
  if implementation not in (None, *IMPLEMENTATIONS):
    raise ValueError(
      f"unknown implementation {implementation!r}: one of "
      f"{sorted(IMPLEMENTATIONS)}"
    )
  q, k = check_and_group(q, k, v, g, beta, initial_state)
  arrays = (q, k, v, g, beta, initial_state)
  if implementation is None:
    implementation, why = choose(*arrays)
    logging.debug("gated_delta_rule: %s, because %s", implementation, why)
  elif implementation in CANNOT_SERVE:
    if reason := CANNOT_SERVE[implementation](*arrays):
      raise ValueError(f"{implementation} cannot serve: {reason}")
  return IMPLEMENTATIONS[implementation](*arrays)


def available() -> list[str]:
  """The implementations that run on the default backend."""
  own = f"pallas_{jax.default_backend()}"
  return [
    name for name in IMPLEMENTATIONS if name not in CANNOT_SERVE or name == own
  ]


def choose(q, k, v, g, beta, initial_state) -> tuple[str, str]:
  """(implementation, why) for arrays as `gated_delta_rule`'s, heads grouped."""
  platform, kind, here = target()
  name, fallback = f"pallas_{platform}", "chunked_xla"
  if name not in CANNOT_SERVE:
    return fallback, f"there is no kernel for {platform}"
  if platform == "gpu" and not _is_hopper(kind, here):
    return fallback, f"the kernel is for Hopper GPUs, not {kind}"
  if (length := q.shape[1]) < _LEAST_TOKENS:
    return fallback, f"{length} tokens do not fill the rows of a kernel's tile"
  if reason := CANNOT_SERVE[name](q, k, v, g, beta, initial_state):
    return fallback, reason
  if not here:
    return name, f"it serves {kind}, where its trial is yet to come"
  dtypes = {x.dtype for x in (q, k, v)}
  dtype = "bfloat16" if dtypes == {jnp.dtype("bfloat16")} else "float32"
  kernel, trusted = IMPLEMENTATIONS[name], IMPLEMENTATIONS[fallback]
  if reason := trial.verdict(kernel, trusted, dtype):
    return fallback, f"the kernel failed its trial: {reason}"
  return name, f"it serves {platform} and has passed its trial here"


def _is_hopper(kind: str, here: bool) -> bool:
  if not here:
    return "H100" in kind
  return jax.local_devices()[0].compute_capability.startswith("9.")


def check_and_group(q, k, v, g, beta, initial_state):
  """q and k with a head for each of v's; ValueError as `gated_delta_rule`.

  g may be per head [B,T,H] or per channel [B,T,H,K].
  """
  arrays = dict(q=q, k=k, v=v, g=g, beta=beta, initial_state=initial_state)
  for name, array in arrays.items():
    if not jnp.issubdtype(array.dtype, jnp.floating):
      raise ValueError(f"{name} is {array.dtype}: must be floating point")
  if q.ndim != 4 or v.ndim != 4:
    raise ValueError(
      f"q and v have shapes {q.shape} and {v.shape}: must be [B, T, heads, dim]"
    )
  batch, length, groups, key_dim = q.shape
  heads, value_dim = v.shape[2:]
  if 0 in (*q.shape, *v.shape):
    raise ValueError(
      f"q and v have shapes {q.shape} and {v.shape}: no axis may be empty"
    )
  if heads % groups:
    raise ValueError(
      f"q has {groups} heads and v {heads}: v's must be a multiple of q's"
    )
  per_head = (batch, length, heads)
  expected = {
    "k": q.shape,
    "v": (*per_head, value_dim),
    "g": per_head if g.ndim == 3 else (*per_head, key_dim),
    "beta": per_head,
    "initial_state": (batch, heads, key_dim, value_dim),
  }
  for name, shape in expected.items():
    if arrays[name].shape != shape:
      raise ValueError(
        f"{name} has shape {arrays[name].shape}; {shape} fits q {q.shape} and "
        f"v {v.shape}"
      )
  if not isinstance(g, jax.core.Tracer) and (largest := jnp.max(g)) > 0:
    raise ValueError(f"g reaches {largest}: a log decay is at most 0")
  if groups < heads:
    q, k = (jnp.repeat(x, heads // groups, axis=2) for x in (q, k))
  return q, k
