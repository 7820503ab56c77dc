"""Jet-Nemotron: attention, sliding-window attention and Jet blocks.

Names and numbers as in the released code (arXiv:2508.15884); the 2B model is 28
layers of width 1536, of which 24 are Jet blocks.
"""

from collections.abc import Mapping

from sleep_jax.model.fast_weights import OUTPUT_NORM_EPS
from sleep_jax.pretrained.hf import HEAD, Architecture, Numbers, Shape

JET = {
  "mixer_norm/scale": "input_layernorm.weight",
  "mixer/q_proj/kernel": "self_attn.q_proj.weight",
  "mixer/k_proj/kernel": "self_attn.k_proj.weight",
  "mixer/v_proj/kernel": "self_attn.v_proj.weight",
  "mixer/b_proj/kernel": "self_attn.b_proj.weight",
  "mixer/a_proj/kernel": "self_attn.a_proj.weight",
  "mixer/g_proj/kernel": "self_attn.g_proj.weight",
  "mixer/o_proj/kernel": "self_attn.o_proj.weight",
  "mixer/o_norm/scale": "self_attn.o_norm.weight",
  "mixer/A_log": "self_attn.A_log",
  "mixer/dt_bias": "self_attn.dt_bias",
  # [channels x taps, hidden] there, channel by channel; the same here.
  "mixer/v_conv/w1_proj/kernel": (
    "self_attn.dynamic_conv1d.kernel_generator.w1.weight"
  ),
  "mixer/v_conv/w2_proj/kernel": (
    "self_attn.dynamic_conv1d.kernel_generator.w2.weight"
  ),
  "mixer/v_conv/w2_proj/bias": (
    "self_attn.dynamic_conv1d.kernel_generator.w2.bias"
  ),
}
ATTENTION = {
  "mixer_norm/scale": "input_layernorm.weight",
  "mixer/q_proj/kernel": "self_attn.q_proj.weight",
  "mixer/q_proj/bias": "self_attn.q_proj.bias",
  "mixer/k_proj/kernel": "self_attn.k_proj.weight",
  "mixer/k_proj/bias": "self_attn.k_proj.bias",
  "mixer/v_proj/kernel": "self_attn.v_proj.weight",
  "mixer/v_proj/bias": "self_attn.v_proj.bias",
  "mixer/o_proj/kernel": "self_attn.o_proj.weight",
}
MLP = {
  "mlp_norm/scale": "post_attention_layernorm.weight",
  "mlp/gate_proj/kernel": "mlp.gate_proj.weight",
  "mlp/up_proj/kernel": "mlp.up_proj.weight",
  "mlp/down_proj/kernel": "mlp.down_proj.weight",
}
WHOLE = {
  "embedding/embedding": "model.embed_tokens.weight",
  "final_norm/scale": "model.norm.weight",
  "head/kernel": HEAD,
}


def transformer_leaves(config: Numbers) -> dict:
  """What Qwen2's and Llama's descendants share: widths and heads."""
  config.only(hidden_act="silu", rope_scaling=None, attention_dropout=0.0)
  width, heads = config("hidden_size"), config("num_attention_heads")
  if width % heads:
    raise ValueError(
      f"hidden_size = {width}: must be a multiple of num_attention_heads = "
      f"{heads}"
    )
  config.only(head_dim=width // heads)
  return dict(
    width=width,
    attention_heads=heads,
    key_value_heads=config("num_key_value_heads"),
    mlp_width=config("intermediate_size"),
    norm_eps=config("rms_norm_eps", float),
    tied_head=config("tie_word_embeddings", bool),
  )


def layer_kinds(config: Numbers, known: Mapping[str, str]) -> tuple[str, ...]:
  """Our kinds of the layers that config.json names."""
  names = list(map(str, config("layer_types", list)))
  if len(names) != config("num_hidden_layers"):
    raise ValueError(
      f"layer_types names {len(names)} layers, num_hidden_layers is "
      f"{config('num_hidden_layers')}"
    )
  if others := set(names) - known.keys():
    raise ValueError(f"layer_types has {sorted(others)}: not {list(known)}")
  return tuple(known[name] for name in names)


def shape(config: Numbers) -> Shape:
  """The model of a config.json; a ValueError where there is none."""
  kinds = layer_kinds(config, {kind: kind for kind in LAYERS})
  leaves = transformer_leaves(config) | dict(
    rope_theta=config("rope_theta", float),
    attention_bias=True,
  )
  if "swa" in kinds:
    leaves["sliding_window"] = config(
      "efficient_attention_config.swa.window_size"
    )
  if "jet" in kinds:
    jet = "efficient_attention_config.jet."
    key_dim, expand_v = (
      config(jet + "head_dim"),
      config(jet + "expand_v", float),
    )
    leaves |= dict(
      fast_weight_heads=config(jet + "num_heads"),
      key_dim=key_dim,
      value_dim=int(key_dim * expand_v),
      convolution_size=config(jet + "conv_size"),
      generator_reduction=config(jet + "dconv_generator_reduction"),
      update_rule="gated_delta",
    )
    if (eps := config(jet + "norm_eps", float)) != OUTPUT_NORM_EPS:
      raise ValueError(
        f"{jet}norm_eps = {eps}: only {OUTPUT_NORM_EPS} is known here"
      )
  return Shape(kinds, leaves, loops=1, vocab_size=config("vocab_size"))


LAYERS = {"attn": ATTENTION | MLP, "swa": ATTENTION | MLP, "jet": JET | MLP}
ARCHITECTURE = Architecture("JetNemotronForCausalLM", shape, WHOLE, LAYERS)
