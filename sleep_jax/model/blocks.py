"""A block: a sequence mixer and an MLP, each with norm and residual (4)(5)."""

import functools

import flax.linen as nn

from sleep_jax.array_types import Hidden
from sleep_jax.config import ModelConfig
from sleep_jax.model import layers
from sleep_jax.model.attention import Attention
from sleep_jax.model.fast_weights import GatedDeltaNet, JetLayer
from sleep_jax.model.places import Places

MIXERS = {
  "attn": Attention,
  "swa": functools.partial(Attention, sliding=True),
  "post_attn": functools.partial(Attention, qk_norm=True),
  "gdn": GatedDeltaNet,
  "jet": JetLayer,
  # What it adds is zero before the first step. A norm of that zero would have
  # a gradient of norm_eps**-0.5, so it has none.
  "inserted_jet": functools.partial(
    JetLayer, output_init=nn.initializers.zeros
  ),
}


class Block(nn.Module):
  """(h, state, cache) -> (h, state, cache) for one kind of mixer.

  With `model.sandwich_norms` what is added to h is normed too; in a "post_attn"
  block it alone. An inserted layer is a mixer alone.
  """

  config: ModelConfig
  kind: str

  @nn.compact
  def __call__(self, h: Hidden, state, cache, places: Places):
    before = self.kind != "post_attn"
    after = self.config.sandwich_norms or not before

    def norm(name, x, wanted):
      return layers.norm(self.config, name)(x) if wanted else x

    mixer = MIXERS[self.kind](self.config, name="mixer")
    x = norm("mixer_norm", h, before)
    y, state, cache = mixer(x, state, cache, places)
    if self.kind == "inserted_jet":
      return h + y, state, cache
    h = h + norm("mixer_output_norm", y, after)
    x = norm("mlp_norm", h, before)
    y = layers.SwiGLU(self.config, name="mlp")(x)
    return h + norm("mlp_output_norm", y, after), state, cache


class Group(nn.Module):
  """One repeat of a pattern's group: its blocks in order."""

  config: ModelConfig
  kinds: tuple[str, ...]

  @nn.compact
  def __call__(self, h: Hidden, states: tuple, caches: tuple, places: Places):
    # Scans over repeats, passes and windows would otherwise keep, and copy on
    # each trip, every intermediate of every block: recomputing from a block's
    # inputs is several times faster on a CPU, and compiles faster. Inside a
    # scan nothing can be merged with the forward pass (prevent_cse).
    block = nn.remat(Block, prevent_cse=False)
    after = []
    for i, (kind, state, cache) in enumerate(
      zip(self.kinds, states, caches, strict=True)
    ):
      layer = block(self.config, kind, name=f"{kind}_{i}")
      h, *new = layer(h, state, cache, places)
      after.append(new)
    states, caches = zip(*after, strict=True)
    return h, (states, caches)


def repeated(config: ModelConfig, kinds, repeats: int, name: str):
  """`repeats` Groups with stacked parameters, run by one `lax.scan`.

  States and caches come in and go out stacked on a leading axis R.
  """
  scanned = nn.scan(
    Group,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0, 0, nn.broadcast),
    out_axes=0,
    length=repeats,
  )
  return scanned(config, tuple(kinds), name=name)
