"""A block: a sequence mixer and an MLP, each with norm and residual (4)(5)."""

import flax.linen as nn

from sleep_jax.array_types import Hidden, Mask
from sleep_jax.config import ModelConfig
from sleep_jax.model import layers
from sleep_jax.model.attention import Attention
from sleep_jax.model.fast_weights import GatedDeltaNet

MIXERS = {"attn": Attention, "gdn": GatedDeltaNet}


class Block(nn.Module):
  """(h, state) -> (h, state) for one kind of mixer."""

  config: ModelConfig
  kind: str

  @nn.compact
  def __call__(self, h: Hidden, state, valid: Mask):
    mixer = MIXERS[self.kind](self.config, name="mixer")
    y, state = mixer(layers.norm(self.config, "mixer_norm")(h), state, valid)
    h = h + y
    mlp = layers.SwiGLU(self.config, name="mlp")
    return h + mlp(layers.norm(self.config, "mlp_norm")(h)), state


class Group(nn.Module):
  """One repeat of a pattern's group: its blocks in order."""

  config: ModelConfig
  kinds: tuple[str, ...]

  @nn.compact
  def __call__(self, h: Hidden, states: tuple, valid: Mask):
    # Scans over repeats, passes and windows would otherwise keep, and copy on
    # each trip, every intermediate of every block: recomputing from a block's
    # inputs is several times faster on a CPU, and compiles faster. Inside a
    # scan nothing can be merged with the forward pass (prevent_cse).
    block = nn.remat(Block, prevent_cse=False)
    new_states = []
    for i, (kind, state) in enumerate(zip(self.kinds, states, strict=True)):
      h, state = block(self.config, kind, name=f"{kind}_{i}")(h, state, valid)
      new_states.append(state)
    return h, tuple(new_states)


def repeated(config: ModelConfig, kinds, repeats: int, name: str):
  """`repeats` Groups with stacked parameters, run by one `lax.scan`.

  States come in and go out stacked on a leading axis R.
  """
  scanned = nn.scan(
    Group,
    variable_axes={"params": 0},
    split_rngs={"params": True},
    in_axes=(0, nn.broadcast),
    out_axes=0,
    length=repeats,
  )
  return scanned(config, tuple(kinds), name=name)
