"""Makes a Hugging Face folder a model of ours.

  python -m sleep_jax.pretrained.convert --from=DIR --to=WORKDIR
    [--config=experiments/math.py:ouro_1_4b]

WORKDIR can be talked to (`experiments.chat`), trained from (`run.init_from`),
checked and exported. Without --config the model computes what the original
does; a config says how it sleeps, how often it loops, and where layers are
inserted and how large they are. Exit code 2, one line and nothing written,
where the folder cannot be used.
"""

import dataclasses
import itertools
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import flax
import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from sleep_jax.config import (
  DataConfig,
  ExperimentConfig,
  ModelConfig,
  SleepConfig,
  from_config_dict,
)
from sleep_jax.data.tokenizers import SPECIAL_TOKENS, FileTokenizer
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.pretrained import hf, jet_nemotron, olmo_hybrid, ouro
from sleep_jax.training import checkpoints, workdir
from sleep_jax.training.step import init_params

ARCHITECTURES = {
  architecture.class_name: architecture
  for architecture in (
    jet_nemotron.ARCHITECTURE,
    olmo_hybrid.ARCHITECTURE,
    ouro.ARCHITECTURE,
  )
}
# The original's config.json, beside our own.
SOURCE_CONFIG = "hf_config.json"
# Tokens that a converted model is made for, unless a config says otherwise.
_LENGTH = 2048


def convert(
  source: str | Path, target: str | Path, config: ExperimentConfig | None = None
) -> None:
  """Writes the model of the folder `source` to the new folder `target`.

  Arrays keep the dtypes that they have there: bfloat16 takes half the room, and
  what is restored from it is float32.

  Args:
    config: how the model is to be used; of its `model`, what config.json says
      must be the same. None: as the original.

  Raises:
    ValueError: the folder cannot be used, or is not what the config says.
  """
  target = Path(target)
  if target.exists():
    raise ValueError(f"{target} exists: choose another --to, or delete it")
  folder = hf.Folder(source)
  architecture = architecture_of(folder.config)
  shape = architecture.shape(folder.config)
  config = _experiment(folder, shape, config, target / "tokenizer.json")
  model = HybridLM(config.model, config.model.vocab_size)

  with (
    workdir.new_folder(target) as made,
    tempfile.TemporaryDirectory(dir=made.parent) as scratch,
  ):
    params = _read_params(
      folder, architecture, shape, model, config.run.seed, Path(scratch)
    )
    checkpoints.export_params(made, params)
    shutil.copy(folder.tokenizer, made / "tokenizer.json")
    shutil.copy(folder.path / "config.json", made / SOURCE_CONFIG)
    text = json.dumps(dataclasses.asdict(config), indent=2) + "\n"
    (made / "config.json").write_text(text)


def architecture_of(config: hf.Numbers) -> hf.Architecture:
  """The `Architecture` that a config.json names; else a ValueError."""
  names = config("architectures", list)
  if len(names) != 1 or str(names[0]) not in ARCHITECTURES:
    raise ValueError(
      f"architectures = {names}: not one of {list(ARCHITECTURES)}"
    )
  return ARCHITECTURES[names[0]]


def model_config(shape: hf.Shape, **leaves: Any) -> ModelConfig:
  """The model of a `Shape` as the original has it, and other leaves."""
  pattern = tuple(
    ((kind,), len(list(run))) for kind, run in itertools.groupby(shape.kinds)
  )
  settings: dict[str, Any] = {
    "pattern": pattern,
    "vocab_size": shape.vocab_size,
    "loops": shape.loops,
  }
  return ModelConfig(**(settings | shape.leaves | leaves))


def shapes(model: HybridLM) -> dict[str, Any]:
  """A model's parameters as `jax.ShapeDtypeStruct`s, by path."""
  params = jax.eval_shape(lambda: init_params(model, 0))
  return flax.traverse_util.flatten_dict(params, sep="/")


def _experiment(folder, shape, config, tokenizer_path) -> ExperimentConfig:
  """The config of the converted model: the given one, or the original's."""
  tokenizer = FileTokenizer(folder.tokenizer)
  if (own := tokenizer.vocab_size - SPECIAL_TOKENS) > shape.vocab_size:
    raise ValueError(
      f"{folder.tokenizer} has {own} tokens, but the embedding vocab_size = "
      f"{shape.vocab_size} rows: give the model's own tokenizer"
    )
  # Our special tokens stand after all of its own.
  rows = max(tokenizer.vocab_size, shape.vocab_size)
  if config is None:
    # "torch_dtype" before version 5 of transformers.
    entries = folder.config.entries
    low = entries.get("dtype", entries.get("torch_dtype")) == "bfloat16"
    dtype = "bfloat16" if low else "float32"
    config = ExperimentConfig(
      model=model_config(shape, compute_dtype=dtype),
      sleep=SleepConfig(passes=1, eviction="none", window_length=_LENGTH),
      data=DataConfig(length=_LENGTH, align_answer=False),
    )
  for name, value in shape.leaves.items():
    if (given := getattr(config.model, name)) != value:
      raise ValueError(
        f"model.{name} = {given}: {folder.path} makes it {value}; set it so"
      )
  kinds = [
    kind
    for group, repeats in config.model.pattern
    for kind in group * repeats
    if kind != "inserted_jet"
  ]
  if kinds != list(shape.kinds):
    raise ValueError(
      f"model.pattern, without inserted layers, is {' '.join(kinds)}: "
      f"{folder.path} has {' '.join(shape.kinds)}"
    )
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model, vocab_size=max(rows, config.model.vocab_size)
    ),
    data=dataclasses.replace(config.data, tokenizer=str(tokenizer_path)),
    run=dataclasses.replace(config.run, init_from=""),
  )


def _read_params(folder, architecture, shape, model, seed, scratch) -> Any:
  """The parameters, which lie in files of the folder `scratch`.

  So the kernel can take back what memory they take.

  Raises:
    ValueError: a tensor is missing, misshapen, or has no place.
  """
  wanted = shapes(model)
  places = hf.tensors(
    architecture,
    model.config,
    {path: leaf.shape for path, leaf in wanted.items()},
    shape.vocab_size,
  )
  new = hf.INSERTED.split("{")[0]
  if not any(name.startswith(new) for name in folder.shapes):
    places = {k: v for k, v in places.items() if not k.startswith(new)}
  _check_names(folder, places, tied=model.config.tied_head)
  by_path: dict[str, list[str]] = {}
  for name, tensor in places.items():
    by_path.setdefault(tensor.path, []).append(name)
  read = {}
  for n, (path, names) in enumerate(by_path.items()):
    dtypes = sorted({folder.dtypes[name] for name in names})
    if len(dtypes) > 1:
      raise ValueError(
        f"{folder.path}: {names[0]} and the same of other layers are of "
        f"{' and '.join(dtypes)}: give them one dtype"
      )
    array = np.empty(wanted[path].shape, jnp.dtype(dtypes[0]))
    for name in names:
      _fill(array, places[name], folder.read(name))
    file = scratch / str(n)
    array.tofile(file)
    array = np.memmap(file, array.dtype, "r", shape=array.shape)
    # The checkpoint's writer copies what is no array of JAX.
    read[path] = jax.device_put(array, may_alias=True)
  if missing := wanted.keys() - read.keys():
    fresh = jax.jit(lambda: _some(init_params(model, seed), missing))()
    read |= fresh
  return flax.traverse_util.unflatten_dict(read, sep="/")


def _some(params, paths):
  flat = flax.traverse_util.flatten_dict(params, sep="/")
  return {path: flat[path] for path in paths}


def _fill(array: np.ndarray, tensor: hf.Tensor, value: np.ndarray) -> None:
  """Puts a tensor into its place, and into rows that it lacks their mean."""
  rows = tensor.rows(array)
  own = rows[tensor.start :][: len(value)]
  own[...] = value.reshape(own.shape)
  if tensor.path in hf.VOCABULARY and len(value) < len(rows):
    rows[len(value) :] = value.mean(axis=0, dtype=np.float32)


def _check_names(folder, places, tied: bool) -> None:
  there = dict(folder.shapes)
  if tied and (head := there.pop(hf.HEAD, None)):
    embedding = folder.read("model.embed_tokens.weight")
    if not np.array_equal(folder.read(hf.HEAD), embedding):
      raise ValueError(
        f"{folder.path}: tie_word_embeddings is set, but {hf.HEAD} {head} is "
        "not the embedding"
      )
  for name in sorted(there.keys() | places.keys()):
    was = list(there[name]) if name in there else "missing"
    wanted = list(places[name].shape) if name in places else "of no use"
    if was != wanted:
      raise ValueError(
        f"{folder.path}: {name} is {was}, in this model it is {wanted}"
      )


def main(_):
  from experiments import main as command

  given: Any = flags.FLAGS
  try:
    config = None
    if command.CONFIG.value is not None:
      config = from_config_dict(command.CONFIG.value)
    convert(given["from"].value, given.to, config)
  except (ValueError, OSError) as error:
    command.fail(error)
  print(f"written: {given.to}")


if __name__ == "__main__":
  import functools

  from experiments import main as command

  flags.DEFINE_string("from", None, "a Hugging Face folder", required=True)
  flags.DEFINE_string("to", None, "the new folder", required=True)
  parse = functools.partial(command.parse, needs_config=False)
  app.run(main, flags_parser=parse)
