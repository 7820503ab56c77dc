"""Hugging Face folders with random or stored weights, for tests."""

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import tokenizers

GOLDENS = Path(__file__).parents[2] / "shared" / "goldens"

OURO = dict(
  architectures=["OuroForCausalLM"],
  model_type="ouro",
  hidden_size=32,
  intermediate_size=48,
  num_hidden_layers=3,
  num_attention_heads=4,
  num_key_value_heads=4,
  head_dim=8,
  hidden_act="silu",
  rms_norm_eps=1e-6,
  rope_theta=1e6,
  tie_word_embeddings=False,
  vocab_size=61,
  max_position_embeddings=65536,
  total_ut_steps=4,
  early_exit_threshold=1.0,
  torch_dtype="float32",
)
JET_NEMOTRON = dict(
  architectures=["JetNemotronForCausalLM"],
  model_type="jet_nemotron",
  hidden_size=24,
  intermediate_size=40,
  num_hidden_layers=5,
  num_attention_heads=3,
  num_key_value_heads=1,
  hidden_act="silu",
  rms_norm_eps=1e-6,
  rope_theta=1e6,
  rope_scaling=None,
  tie_word_embeddings=True,
  vocab_size=61,
  max_position_embeddings=4096,
  layer_types=["jet", "jet", "attn", "swa", "jet"],
  efficient_attention_config={
    "swa": {"window_size": 7},
    "jet": {
      "num_heads": 3,
      "head_dim": 6,
      "expand_v": 2.6666666667,
      "conv_size": 4,
      "dconv_generator_reduction": 8,
      "norm_eps": "1e-5",
      "mode": "chunk",
      "dconv_implementation": "triton",
    },
  },
  torch_dtype="float32",
)
# Widths of q, k and v that differ, and two sorts of attention heads.
OLMO_HYBRID = dict(
  architectures=["OlmoHybridForCausalLM"],
  model_type="olmo_hybrid",
  hidden_size=16,
  intermediate_size=24,
  num_hidden_layers=4,
  layer_types=["linear_attention"] * 2 + ["full_attention", "linear_attention"],
  num_attention_heads=4,
  num_key_value_heads=2,
  attention_bias=False,
  hidden_act="silu",
  rms_norm_eps=1e-6,
  rope_parameters={"rope_theta": None, "rope_type": "default"},
  tie_word_embeddings=False,
  vocab_size=61,
  max_position_embeddings=4096,
  linear_num_key_heads=2,
  linear_num_value_heads=2,
  linear_key_head_dim=4,
  linear_value_head_dim=6,
  linear_conv_kernel_dim=4,
  linear_allow_neg_eigval=True,
  pad_token_id=None,
  eos_token_id=None,
  dtype="float32",
)
# What the released models leave out.
OLMO_HYBRID_TURNED = OLMO_HYBRID | dict(
  rope_parameters={"rope_theta": 500.0, "rope_type": "default"},
  linear_allow_neg_eigval=False,
)
OURO_1_4B = OURO | dict(
  hidden_size=2048,
  intermediate_size=5632,
  num_hidden_layers=24,
  num_attention_heads=16,
  num_key_value_heads=16,
  head_dim=128,
  vocab_size=49152,
)
_LAYERS = ["jet"] * 14 + ["attn"] + ["jet"] * 4 + ["attn", "swa", "swa"]
JET_NEMOTRON_2B = JET_NEMOTRON | dict(
  hidden_size=1536,
  intermediate_size=8960,
  num_hidden_layers=28,
  num_attention_heads=12,
  num_key_value_heads=2,
  vocab_size=151936,
  layer_types=_LAYERS + ["jet"] * 6,
  efficient_attention_config={
    "swa": {"window_size": 1152},
    "jet": JET_NEMOTRON["efficient_attention_config"]["jet"]
    | {"num_heads": 12, "head_dim": 96},
  },
)
OLMO_HYBRID_7B = OLMO_HYBRID | dict(
  hidden_size=3840,
  intermediate_size=11008,
  num_hidden_layers=32,
  layer_types=(["linear_attention"] * 3 + ["full_attention"]) * 8,
  num_attention_heads=30,
  num_key_value_heads=30,
  vocab_size=100352,
  linear_num_key_heads=30,
  linear_num_value_heads=30,
  linear_key_head_dim=96,
  linear_value_head_dim=192,
)


def stored(name, folder=GOLDENS):
  """(weights by name, everything else) of a file of independent answers."""
  path = folder / f"{name}.npz"
  if not path.exists():
    pytest.skip("no stored answers here")
  with np.load(path) as file:
    arrays = {x: file[x] for x in file.files}
  weights = {x[2:]: arrays.pop(x) for x in [*arrays] if x.startswith("w.")}
  return weights, arrays


def write_tokenizer(path, words):
  """A tokenizer.json of whole words."""
  vocabulary = {word: i for i, word in enumerate(words)}
  model = tokenizers.models.WordLevel(vocabulary, unk_token=words[0])
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
  tokenizer.save(str(path))


def write(folder, config, weights, files=1, words=("?", "one", "two", "three")):
  """A folder as Hugging Face has it, its tensors in one or several files."""
  folder.mkdir(parents=True, exist_ok=True)
  (folder / "config.json").write_text(json.dumps(config))
  write_tokenizer(folder / "tokenizer.json", words)
  names = sorted(weights)
  index = {}
  for n in range(files):
    file = f"model-{n + 1:05d}-of-{files:05d}.safetensors"
    file = "model.safetensors" if files == 1 else file
    shard = {x: np.ascontiguousarray(weights[x]) for x in names[n::files]}
    safetensors.numpy.save_file(shard, folder / file, {"format": "pt"})
    index |= dict.fromkeys(shard, file)
  if files > 1:
    text = json.dumps({"metadata": {}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
  return folder


def random_like(shapes, dtype="float32", seed=0):
  """Random weights of the given shapes; norms near 1."""
  rng = np.random.default_rng(seed)
  return {
    name: (("norm" in name) + 0.2 * rng.normal(size=shape)).astype(dtype)
    for name, shape in shapes.items()
  }
