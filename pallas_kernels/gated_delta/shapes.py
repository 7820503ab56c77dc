"""Named shapes of the gated delta rule, for tests and benchmarks alike."""

from typing import NamedTuple

import numpy as np

from pallas_kernels.gated_delta.contract import normalise


class Shape(NamedTuple):
  """Rows B, tokens T, heads H, key and value dim K and V."""

  batch: int
  length: int
  heads: int
  key_dim: int
  value_dim: int


SHAPES = {
  # A sleeping window with a large batch; longer contexts; one long context.
  "tiny": Shape(64, 24, 4, 64, 128),
  "mid": Shape(8, 512, 4, 64, 128),
  "long": Shape(1, 2048, 8, 128, 256),
}


def random_inputs(shape: Shape, seed: int = 0) -> list[np.ndarray]:
  """(q, k, v, g, beta, initial_state) in float32, q and k of unit length.

  Decays are those of a fresh layer, exp(g) mostly above 0.8; half of the
  betas are above 0.5; the state is that of a few writes.
  """
  rng = np.random.default_rng(seed)
  tokens = (shape.batch, shape.length, shape.heads)

  q = normalise(rng.normal(size=(*tokens, shape.key_dim)))
  k = normalise(rng.normal(size=(*tokens, shape.key_dim)))
  v = rng.normal(size=(*tokens, shape.value_dim))
  rate = rng.uniform(0.01, 1.0, shape.heads)
  g = -rate * np.log1p(np.exp(rng.normal(size=tokens) - 2))
  beta = 1 / (1 + np.exp(-rng.normal(size=tokens)))
  state = 0.1 * rng.normal(
    size=(shape.batch, shape.heads, shape.key_dim, shape.value_dim)
  )
  return [x.astype(np.float32) for x in (q, k, v, g, beta, state)]
