"""The pretrained models' configs: whole runs in small, and what they say."""

import dataclasses
import json

import jax
import pytest
import tokenizers

from experiments import math
from sleep_jax.config import from_config_dict
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.pretrained import convert
from sleep_jax.tasks import make_task
from sleep_jax.training import loop
from sleep_jax.training.step import init_params
from tests import hf_folders
from tests.test_convert import names_and_shapes

SHRUNK = (
  "ouro_1_4b,shrink",
  "jet_nemotron_2b,shrink",
  "ouro_1_4b,sliding,shrink",
)


def parameters(config):
  model = HybridLM(config.model, config.model.vocab_size)
  shapes = jax.eval_shape(lambda: init_params(model, 0))
  return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_the_inserted_layers_are_under_a_tenth_of_ouro():
  """Six Jet layers; the three rows of our tokens count too."""
  config = math.ouro_1_4b()
  kinds = [
    kind for group, repeats in config.model.pattern for kind in group * repeats
  ]
  assert kinds.count("attn") == 24 and kinds.count("inserted_jet") == 6
  assert parameters(config) == pytest.approx(1.077 * 1_434_652_673, rel=1e-3)


def test_the_middle_half_of_jet_nemotron_is_looped():
  config = math.jet_nemotron_2b()
  assert parameters(config) == 1_964_806_208
  blocks = [len(kinds) * repeats for kinds, repeats in config.model.pattern]
  first, last = config.sleep.looped_groups
  assert sum(blocks[:first]) == 7 and sum(blocks[first:last]) == 14
  kinds = [kind for group, n in config.model.pattern for kind in group * n]
  assert [i for i, x in enumerate(kinds) if x == "attn"] == [14, 19]
  assert [i for i, x in enumerate(kinds) if x == "swa"] == [20, 21]


def train_tokenizer(config, path):
  """A tokenizer.json of byte pairs, trained on the config's problems."""
  task = make_task(config.task, "", 0, lambda text: len(text.split()))
  texts = [task.example("train", i).context for i in range(200)]
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel()
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  tokenizer.train_from_iterator(
    texts,
    tokenizers.trainers.BpeTrainer(
      vocab_size=500,
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  tokenizer.save(str(path))
  return tokenizer.get_vocab_size()


def hf_config(config, vocab_size):
  """The config.json of the model that a config was shrunk to."""
  model = config.model
  kinds = [kind for group, n in model.pattern for kind in group * n]
  ouro = model.norm_in_loop
  own = [kind for kind in kinds if kind != "inserted_jet"]
  changes = dict(
    hidden_size=model.width,
    intermediate_size=model.mlp_width,
    num_hidden_layers=len(own),
    num_attention_heads=model.attention_heads,
    num_key_value_heads=model.key_value_heads,
    rope_theta=model.rope_theta,
    vocab_size=vocab_size,
  )
  if ouro:
    head_dim = model.width // model.attention_heads
    return hf_folders.OURO | changes | dict(head_dim=head_dim)
  jet = hf_folders.JET_NEMOTRON["efficient_attention_config"]["jet"] | dict(
    num_heads=model.fast_weight_heads,
    head_dim=model.key_dim,
    expand_v=model.value_dim / model.key_dim,
  )
  attention = {"swa": {"window_size": model.sliding_window}, "jet": jet}
  return (
    hf_folders.JET_NEMOTRON
    | changes
    | dict(layer_types=own, efficient_attention_config=attention)
  )


@pytest.mark.slow
@pytest.mark.parametrize("name", SHRUNK)
def test_a_shrunken_run_from_a_converted_folder_learns(name, tmp_path):
  """Folder, tokenizer, conversion, (stages,) training, judging."""
  config = from_config_dict(math.get_config(name))
  folder = tmp_path / "hf"
  folder.mkdir()
  size = train_tokenizer(config, folder / "tokenizer.json")
  text = (folder / "tokenizer.json").read_text()
  # Byte pairs are shorter than words.
  data = dataclasses.replace(config.data, length=3 * config.data.length)
  sleep = dataclasses.replace(
    config.sleep, window_length=3 * config.sleep.window_length
  )
  config = dataclasses.replace(config, data=data, sleep=sleep)
  original = hf_config(config, size + 3)
  weights = hf_folders.random_like(names_and_shapes(original))
  hf_folders.write(folder, original, weights)
  (folder / "tokenizer.json").write_text(text)
  convert.convert(folder, tmp_path / "w", config)
  config = from_config_dict(
    json.loads((tmp_path / "w" / "config.json").read_text())
  )
  run = dataclasses.replace(config.run, init_from=str(tmp_path / "w"))
  loop.train(dataclasses.replace(config, run=run), tmp_path / "run")
  lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
  losses = [x["loss"] for x in map(json.loads, lines) if "loss" in x]
  assert losses[-1] < 0.8 * losses[0], losses
