"""The hybrid language model: embedding, blocks, head."""

import flax.linen as nn
import jax.numpy as jnp

from sleep_jax.array_types import Hidden, Logits, Mask, Tokens
from sleep_jax.config import ModelConfig
from sleep_jax.model import blocks, layers
from sleep_jax.model.places import Places, init_cache, window
from sleep_jax.parallel.sharding import constrain


class HybridLM(nn.Module):
  """Attention and fast-weight blocks in any stated pattern.

  The state (see `fast_weights.init_fast_weights`) and the cache (see
  `places.init_cache`) go in and come out of `blocks`; parameters never hold
  them. Sleep calls the three parts apart, and `__call__` is the ordinary
  forward pass over one window.
  """

  config: ModelConfig
  vocabulary_size: int

  def setup(self):
    compute, parameters = layers.dtypes(self.config)
    self.embedding = nn.Embed(
      self.vocabulary_size,
      self.config.width,
      dtype=compute,
      param_dtype=parameters,
      # Tokens as large as what blocks add to them; Flax's default, 1/sqrt(D),
      # drowns them, and pocket math learns to look up much later.
      embedding_init=nn.initializers.normal(1.0),
    )
    self.groups = [
      blocks.repeated(self.config, kinds, repeats, f"group_{i}")
      for i, (kinds, repeats) in enumerate(self.config.pattern)
    ]
    self.final_norm = layers.norm(self.config)
    self.head = layers.dense(self.config, self.vocabulary_size, "head")

  def embed(self, tokens: Tokens) -> Hidden:
    """Token embeddings."""
    compute, _ = layers.dtypes(self.config)
    # Looked up in parts, rows of the batch would have to come to the table.
    table = constrain(self.embedding.embedding.astype(compute), None, "tensor")
    return jnp.take(table, tokens, axis=0)

  def blocks(
    self,
    h: Hidden,
    state: tuple,
    cache: tuple,
    places: Places,
    groups: slice = slice(None),
  ):
    """(h, state, cache) after one pass; nothing reads padding.

    Args:
      h: [B, T, D].
      state, cache: of those groups of the pattern that `groups` takes.
      places: where the tokens stand.
      groups: which of the pattern's groups run; all of them.
    """
    after = []
    for group, states, caches in zip(
      self.groups[groups], state, cache, strict=True
    ):
      h, new = group(h, states, caches, places)
      after.append(new)
    return h, *zip(*after, strict=True)

  def logits(self, h: Hidden) -> Logits:
    """OutProj of equation (6), in the parameters' dtype."""
    _, parameters = layers.dtypes(self.config)
    return self.head(self.final_norm(h)).astype(parameters)

  def __call__(self, tokens: Tokens, state: tuple, valid: Mask):
    cache = init_cache(self.config, tokens.shape[0], 0, history=False)
    here = window(valid, tokens.shape[1])
    h, state, _ = self.blocks(self.embed(tokens), state, cache, here)
    return self.logits(h), state
