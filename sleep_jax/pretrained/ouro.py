"""Ouro: a looped transformer, into which Jet layers may be inserted.

Names and numbers as in the released code (arXiv:2510.25741); the 1.4B model is
24 layers of width 2048, run four times. Its norms named `_2` stand on what a
mixer or an MLP adds.
"""

from sleep_jax.pretrained.hf import Architecture, Numbers, Shape
from sleep_jax.pretrained.jet_nemotron import (
  ATTENTION,
  JET,
  MLP,
  WHOLE,
  transformer_leaves,
)


def shape(config: Numbers) -> Shape:
  """The model of a config.json; a ValueError where there is none."""
  config.only(use_sliding_window=False)
  leaves = transformer_leaves(config) | dict(
    rope_theta=config("rope_theta", float),
    attention_bias=False,
    sandwich_norms=True,
    norm_in_loop=True,
    exit_gate=True,
  )
  kinds = ("attn",) * config("num_hidden_layers")
  loops = config("total_ut_steps")
  return Shape(kinds, leaves, loops, config("vocab_size"))


LAYERS = {
  "attn": ATTENTION
  | MLP
  | {
    "mixer_output_norm/scale": "input_layernorm_2.weight",
    "mlp_output_norm/scale": "post_attention_layernorm_2.weight",
  },
  "inserted_jet": JET,
}
GATE = {
  "exit_gate/kernel": "model.early_exit_gate.weight",
  "exit_gate/bias": "model.early_exit_gate.bias",
}
ARCHITECTURE = Architecture("OuroForCausalLM", shape, WHOLE | GATE, LAYERS)
