"""The hybrid language model: embedding, blocks, head."""

import flax.linen as nn
import jax
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

  One pass is `model.loops` runs of all blocks with the same parameters. Each
  run has S, keys and values of its own, as if it were blocks of its own: were S
  handed on, a token would read in the second run what later tokens wrote in
  the first.
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
      # drowns them, and pocket math learns to look up much later. But a tied
      # head makes logits from it, of sqrt(D) times its size.
      embedding_init=nn.initializers.normal(
        self.config.width**-0.5 if self.config.tied_head else 1.0
      ),
    )
    self.groups = [
      blocks.repeated(self.config, kinds, repeats, f"group_{i}")
      for i, (kinds, repeats) in enumerate(self.config.pattern)
    ]
    self.final_norm = layers.norm(self.config)
    if not self.config.tied_head:
      self.head = layers.dense(self.config, self.vocabulary_size, "head")
    if self.config.exit_gate:
      self.exit_gate = layers.dense(self.config, 1, "exit_gate", use_bias=True)

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

    With `model.norm_in_loop` h is normed after the last group.

    Args:
      h: [B, T, D].
      state, cache: of those groups of the pattern that `groups` takes.
      places: where the tokens stand.
      groups: which of the pattern's groups run; all of them.
    """
    if self.config.loops == 1:
      h, memory = self._run(h, (state, cache), places, groups)
      return h, *memory
    h, _, memory = self._loop(h, (state, cache), places)
    return h, *memory

  def _run(self, h: Hidden, memory: tuple, places: Places, groups: slice):
    """(h, (state, cache)) after one run of some groups."""
    after = []
    for group, states, caches in zip(self.groups[groups], *memory, strict=True):
      h, new = group(h, states, caches, places)
      after.append(new)
    count = len(self.groups)
    if self.config.norm_in_loop and groups.indices(count)[1] == count:
      h = self.final_norm(h)
    return h, tuple(zip(*after, strict=True))

  def _loop(self, h: Hidden, memory: tuple, places: Places):
    """(h, h of each loop [R, B, T, D], (state, cache)) after all loops."""
    loops = self.config.loops

    def body(self, h, memory):
      h, memory = self._run(h, memory, places, slice(None))
      return h, (h, memory)

    scanned = nn.scan(
      body,
      variable_broadcast="params",
      split_rngs={"params": False},
      length=loops,
    )
    memory = jax.tree.map(lambda x: x.reshape(loops, -1, *x.shape[1:]), memory)
    h, (each, memory) = scanned(self, h, memory)
    return h, each, jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), memory)

  def logits(self, h: Hidden) -> Logits:
    """OutProj of equation (6), in the parameters' dtype."""
    _, parameters = layers.dtypes(self.config)
    if not self.config.norm_in_loop:
      h = self.final_norm(h)
    head = self.embedding.attend if self.config.tied_head else self.head
    return head(h).astype(parameters)

  def exits(self, tokens: Tokens, state: tuple, valid: Mask):
    """(h of each loop [R, B, T, D], probability to stop there [R, B, T]).

    The gate of loop r stops what no earlier one has stopped; the last loop
    takes what remains. Nothing that the model computes depends on it.
    """
    cache = init_cache(self.config, tokens.shape[0], 0, history=False)
    here = window(valid, tokens.shape[1])
    _, each, _ = self._loop(self.embed(tokens), (state, cache), here)
    _, parameters = layers.dtypes(self.config)
    stops = jax.nn.sigmoid(self.exit_gate(each)[..., 0].astype(parameters))
    stops = stops.at[-1].set(1)
    goes_on = jnp.cumprod(1 - stops[:-1], axis=0)
    return each, stops.at[1:].multiply(goes_on)

  def __call__(self, tokens: Tokens, state: tuple, valid: Mask):
    cache = init_cache(self.config, tokens.shape[0], 0, history=False)
    here = window(valid, tokens.shape[1])
    h, state, _ = self.blocks(self.embed(tokens), state, cache, here)
    if self.config.exit_gate and self.is_initializing():
      self.exit_gate(h)
    return self.logits(h), state
