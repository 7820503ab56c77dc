"""Stored answers of OLMo-Hybrid as transformers computes it.

  python -m tests.make_olmo_hybrid

where torch and transformers 5.23.0 are writes golden/olmo_hybrid_*.npz: random
weights by the names of a released folder, from which transformers read them;
ids; logits and the S of each layer after the last token. Its casts to float32
are lifted, so that the answers are those of float64.
"""

import tempfile
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import transformers

from tests import hf_folders

CASES = {
  "olmo_hybrid_tiny": hf_folders.OLMO_HYBRID,
  "olmo_hybrid_turned_tiny": hf_folders.OLMO_HYBRID_TURNED,
}


def shapes(config):
  """Of all tensors of a released folder."""
  model = transformers.OlmoHybridForCausalLM(
    transformers.OlmoHybridConfig(**config)
  )
  found = {name: tuple(x.shape) for name, x in model.state_dict().items()}
  for i, kind in enumerate(config["layer_types"]):
    layer = f"model.layers.{i}."
    if kind == "full_attention":
      continue
    for mine, released in (
      ("input_layernorm", "attention_layer_norm"),
      ("post_attention_layernorm", "feedforward_layer_norm"),
    ):
      shape = found.pop(f"{layer}{mine}.weight")
      found[f"{layer}{released}.weight"] = shape
    _, *kernel = found.pop(f"{layer}linear_attn.conv1d.weight")
    for x in "qkv":
      channels, _ = found[f"{layer}linear_attn.{x}_proj.weight"]
      found[f"{layer}linear_attn.{x}_conv1d.weight"] = (channels, *kernel)
  return found


def answers(folder, ids):
  """(logits, S by name) of the model in a folder, in float64."""
  model = transformers.OlmoHybridForCausalLM.from_pretrained(
    folder, dtype=torch.float64, attn_implementation="eager"
  )
  cache = transformers.DynamicCache(config=model.config)
  with (
    mock.patch.object(torch, "float32", torch.float64),
    mock.patch.object(torch, "float", torch.float64),
    mock.patch.object(torch.Tensor, "float", torch.Tensor.double),
    torch.no_grad(),
  ):
    if rotary := model.model.rotary_emb:
      rotary.inv_freq, _ = rotary.compute_default_rope_parameters(model.config)
    out = model(torch.tensor(ids), past_key_values=cache, use_cache=True)
  states = {
    f"S.{i}": cache.get_recurrent_state(i, 0).numpy()
    for i, kind in enumerate(model.config.layer_types)
    if kind == "linear_attention"
  }
  return out.logits.numpy(), states


def main():
  torch.set_num_threads(1)
  for seed, (name, config) in enumerate(CASES.items()):
    weights = hf_folders.random_like(shapes(config), seed=seed)
    # More than one of their chunks of 64 tokens.
    ids = np.random.default_rng(seed).integers(0, config["vocab_size"], (2, 70))
    with tempfile.TemporaryDirectory() as folder:
      hf_folders.write(Path(folder), config, weights)
      logits, states = answers(folder, ids)
    np.savez_compressed(
      Path(__file__).parent / "golden" / f"{name}.npz",
      **{f"w.{x}": weight for x, weight in weights.items()},
      **states,
      ids=ids.astype(np.int16),
      logits=logits.astype(np.float32),
    )


if __name__ == "__main__":
  main()
