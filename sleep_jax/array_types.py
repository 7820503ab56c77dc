"""The axis letters of this project, and the arrays that carry names.

B batch, T tokens, L window, D model width, H heads, K key dim, V value dim,
C chunk, N passes, F feed-forward width, W vocabulary, R repeats of a pattern.
"""

from jaxtyping import Array, Bool, Float, Int

Tokens = Int[Array, "B T"]
Mask = Bool[Array, "B T"]
Rows = Bool[Array, "B"]
Hidden = Float[Array, "B T D"]
Logits = Float[Array, "B T W"]
FastWeights = Float[Array, "B H K V"]
