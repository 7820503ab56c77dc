"""The axis letters of this project, and the arrays that carry names.

B batch, T tokens, L window, D model width, H heads, K key dim, V value dim,
C chunk, N passes, F feed-forward width, W vocabulary, R repeats of a pattern,
M cache slots.
"""

from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

# On devices, or on the host before a jitted function takes it.
Array = jax.Array | np.ndarray

Tokens = Int[Array, "B T"]
PassTargets = Int[Array, "B N T"]
Mask = Bool[Array, "B T"]
Rows = Bool[Array, "B"]
Counts = Int[Array, "B"]
Positions = Int[Array, "#B T"]
Slots = Int[Array, "B M"]
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T W"]
FastWeights = Float[Array, "B H K V"]


def by_name(tree: Any) -> dict[str, Any]:
  """A tree's leaves by path, such as "blocks/0/kernel", in their order."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf
    for path, leaf in jax.tree.leaves_with_path(tree)
  }
