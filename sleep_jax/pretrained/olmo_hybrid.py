"""OLMo-Hybrid: Gated DeltaNet, and attention with norms after it.

Names and numbers as in transformers 5.23.0 and in what it reads: its one
convolution over q | k | v is three tensors in a released folder. The 7B model
is 32 layers of width 3840, of which 24 are Gated DeltaNet with b in (0, 2), and
has no rotary positions.
"""

from sleep_jax.pretrained.hf import Architecture, Numbers, Shape
from sleep_jax.pretrained.jet_nemotron import (
  MLP,
  WHOLE,
  layer_kinds,
  transformer_leaves,
)

KINDS = {"linear_attention": "gdn", "full_attention": "post_attn"}
GDN = {
  "mixer_norm/scale": "attention_layer_norm.weight",
  "mixer/q_proj/kernel": "linear_attn.q_proj.weight",
  "mixer/k_proj/kernel": "linear_attn.k_proj.weight",
  "mixer/v_proj/kernel": "linear_attn.v_proj.weight",
  "mixer/qkv_conv/kernel": {
    "mixer/q_proj/kernel": "linear_attn.q_conv1d.weight",
    "mixer/k_proj/kernel": "linear_attn.k_conv1d.weight",
    "mixer/v_proj/kernel": "linear_attn.v_conv1d.weight",
  },
  "mixer/b_proj/kernel": "linear_attn.b_proj.weight",
  "mixer/a_proj/kernel": "linear_attn.a_proj.weight",
  "mixer/g_proj/kernel": "linear_attn.g_proj.weight",
  "mixer/o_proj/kernel": "linear_attn.o_proj.weight",
  "mixer/o_norm/scale": "linear_attn.o_norm.weight",
  "mixer/A_log": "linear_attn.A_log",
  "mixer/dt_bias": "linear_attn.dt_bias",
}
ATTENTION = {
  "mixer/q_proj/kernel": "self_attn.q_proj.weight",
  "mixer/q_norm/scale": "self_attn.q_norm.weight",
  "mixer/k_proj/kernel": "self_attn.k_proj.weight",
  "mixer/k_norm/scale": "self_attn.k_norm.weight",
  "mixer/v_proj/kernel": "self_attn.v_proj.weight",
  "mixer/o_proj/kernel": "self_attn.o_proj.weight",
  "mixer_output_norm/scale": "post_attention_layernorm.weight",
}


def shape(config: Numbers) -> Shape:
  """The model of a config.json; a ValueError where there is none."""
  kinds = layer_kinds(config, KINDS)
  config.only(attention_bias=False)
  heads = config("linear_num_value_heads")
  config.only(linear_num_key_heads=heads)
  negative = config("linear_allow_neg_eigval", bool)
  leaves = transformer_leaves(config) | dict(
    rope_theta=_rope_theta(config),
    attention_bias=False,
    fast_weight_heads=heads,
    key_dim=config("linear_key_head_dim"),
    value_dim=config("linear_value_head_dim"),
    convolution_size=config("linear_conv_kernel_dim"),
    beta_range=2.0 if negative else 1.0,
    update_rule="gated_delta",
  )
  return Shape(kinds, leaves, loops=1, vocab_size=config("vocab_size"))


def _rope_theta(config: Numbers) -> float:
  """The base of the rotary positions; 0 where it is null.

  Where it is missing transformers 5.23.0 takes 10,000, and says that there are
  no rotary positions.
  """
  rope = config.section("rope_parameters")
  rope.only(rope_type="default", partial_rotary_factor=1.0)
  stated = rope if "rope_theta" in rope.entries else config
  if "rope_theta" in stated.entries and stated.entries["rope_theta"] is None:
    return 0.0
  return stated("rope_theta", float)


LAYERS = {
  "gdn": GDN | MLP | {"mlp_norm/scale": "feedforward_layer_norm.weight"},
  "post_attn": ATTENTION
  | MLP
  | {"mlp_output_norm/scale": "post_feedforward_layernorm.weight"},
}
ARCHITECTURE = Architecture("OlmoHybridForCausalLM", shape, WHOLE, LAYERS)
