"""The door to the gated delta rule."""

from pallas_kernels.gated_delta import chunked_xla, reference

IMPLEMENTATIONS = {
  "reference": reference.gated_delta_rule,
  "chunked_xla": chunked_xla.gated_delta_rule,
}


def gated_delta_rule(
  q, k, v, g, beta, initial_state, *, implementation="chunked_xla"
):
  """Returns (o [B,T,H,V], final_state [B,H,K,V]) of the gated delta rule.

  S_t = exp(g_t) (I - beta_t k_t k_t^T) S_{t-1} + beta_t k_t v_t^T,
  o_t = S_t^T (K^-0.5 q_t): the transpose of the paper's S (section 3), decay
  before the prediction error, read-out after the update.

  Args:
    q: queries [B, T, H, K], already l2-normalised; scaled by K^-0.5 here.
    k: keys [B, T, H, K], already l2-normalised.
    v: values [B, T, H, V].
    g: log decay [B, T, H], at most 0.
    beta: writing strength [B, T, H]; a token with beta = 0 and g = 0 leaves
      the state alone.
    initial_state: [B, H, K, V]; its dtype (float32, or float64 in tests) is
      that of the computation.
    implementation: "chunked_xla" or "reference".

  Returns:
    o in v's dtype, final_state in initial_state's dtype.

  Raises:
    ValueError: unknown implementation, or shapes that do not fit together.
  """
  if implementation not in IMPLEMENTATIONS:
    raise ValueError(
      f"unknown implementation {implementation!r}: one of "
      f"{sorted(IMPLEMENTATIONS)}"
    )
  batch, length, heads, key_dim = q.shape
  value_dim = v.shape[-1]
  expected = {
    "k": (k, (batch, length, heads, key_dim)),
    "v": (v, (batch, length, heads, value_dim)),
    "g": (g, (batch, length, heads)),
    "beta": (beta, (batch, length, heads)),
    "initial_state": (initial_state, (batch, heads, key_dim, value_dim)),
  }
  for name, (array, shape) in expected.items():
    if array.shape != shape:
      raise ValueError(
        f"{name} has shape {array.shape}; {shape} fits q {q.shape}"
      )
  return IMPLEMENTATIONS[implementation](q, k, v, g, beta, initial_state)
