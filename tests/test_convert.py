"""Folders in: what is read, what is refused, and what inserted layers do."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from sleep_jax.config import ExperimentConfig, from_config_dict
from sleep_jax.model.fast_weights import init_fast_weights
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.pretrained import convert, hf
from sleep_jax.training import checkpoints
from sleep_jax.training.step import init_params
from tests import hf_folders

CONFIGS = {"ouro": hf_folders.OURO, "jet": hf_folders.JET_NEMOTRON}


def names_and_shapes(config):
  """All tensors of a config.json, from the tables."""
  numbers = hf.Numbers(config, "config.json")
  architecture = convert.architecture_of(numbers)
  shape = architecture.shape(numbers)
  model = HybridLM(convert.model_config(shape), shape.vocab_size)
  shapes = {path: x.shape for path, x in convert.shapes(model).items()}
  places = hf.tensors(architecture, model.config, shapes, shape.vocab_size)
  return {name: tensor.shape for name, tensor in places.items()}


def write(folder, kind="ouro", dtype="float32", files=1, **changes):
  """A folder of random weights; `changes` are those of its config.json."""
  weights = hf_folders.random_like(names_and_shapes(CONFIGS[kind]), dtype)
  config = CONFIGS[kind] | changes
  return hf_folders.write(folder, config, weights, files)


def restore(folder):
  """(config, model, parameters) of a converted folder."""
  config = from_config_dict(json.loads((folder / "config.json").read_text()))
  model = HybridLM(config.model, config.model.vocab_size)
  like = jax.eval_shape(lambda: init_params(model, 0))
  return config, model, checkpoints.restore_params(folder, like)


def logits(model, params, ids):
  state = init_fast_weights(model.config, len(ids))
  valid = jnp.ones(ids.shape, bool)
  apply = jax.jit(model.apply)
  return np.asarray(apply({"params": params}, ids, state, valid)[0])


@pytest.mark.parametrize("kind", ["ouro", "jet"])
def test_the_tables_hold_every_tensor_of_the_original(kind):
  """Names and shapes of the stored answers come from the original's classes."""
  stored, _ = hf_folders.stored(
    {"ouro": "ouro_tiny", "jet": "jet_nemotron_tiny_f64"}[kind]
  )
  assert names_and_shapes(CONFIGS[kind]) == {
    name: array.shape for name, array in stored.items()
  }


@pytest.mark.parametrize(
  "config, count",
  [
    (hf_folders.OURO_1_4B, 1_434_652_673),
    (hf_folders.JET_NEMOTRON_2B, 1_964_806_208),
    (hf_folders.OLMO_HYBRID_7B, 7_430_870_688),
  ],
)
def test_full_size_models_have_the_published_numbers_of_parameters(
  config, count
):
  shapes = names_and_shapes(config).values()
  assert sum(int(np.prod(shape)) for shape in shapes) == count


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_a_full_2b_folder_converts_in_under_8_gib(dtype, tmp_path):
  """Random numbers; the time is that of an idle machine."""
  config = hf_folders.JET_NEMOTRON_2B | {"torch_dtype": dtype}
  shapes = names_and_shapes(config)
  names = sorted(shapes)
  random = np.random.default_rng(0).standard_normal(2**24, np.float32)
  random = random.astype(getattr(ml_dtypes, dtype, dtype))

  def weight(shape):
    return np.resize(random, int(np.prod(shape))).reshape(shape)

  for n in range(8):
    part = {name: weight(shapes[name]) for name in names[n::8]}
    hf_folders.write(tmp_path / "hf", config, part)
    (tmp_path / "hf" / "model.safetensors").rename(
      tmp_path / "hf" / f"model-{n}.safetensors"
    )
  # Its own memory: pages of files are the kernel's to take back.
  script = """
import re, sys, threading, time
from sleep_jax.pretrained.convert import convert
most = 0
def watch():
  global most
  while True:
    status = open("/proc/self/status").read()
    most = max(most, int(re.search(r"RssAnon:\\s+(\\d+) kB", status)[1]))
    time.sleep(0.02)
threading.Thread(target=watch, daemon=True).start()
start = time.time()
convert(*sys.argv[1:])
print(most, time.time() - start)
"""
  done = subprocess.run(
    [sys.executable, "-c", script, tmp_path / "hf", tmp_path / "w"],
    capture_output=True,
    text=True,
    check=True,
  )
  kib, seconds = map(float, done.stdout.split())
  print(f"{kib / 2**20:.2f} GiB, {seconds:.0f} s")
  assert kib < 8 * 2**20 and seconds < 300


def test_special_tokens_get_rows_of_mean_embeddings(tmp_path):
  """Ouro's tokenizer fills its embedding: ours need three rows more."""
  words = [f"w{i}" for i in range(61)]
  folder = write(tmp_path / "hf")
  hf_folders.write_tokenizer(folder / "tokenizer.json", words)
  convert.convert(folder, tmp_path / "w")
  config, model, params = restore(tmp_path / "w")
  assert config.model.vocab_size == 64
  table = np.asarray(params["embedding"]["embedding"])
  assert table.shape == (64, 32) and model.config.loops == 4
  np.testing.assert_allclose(
    table[61:], np.broadcast_to(table[:61].mean(0), (3, 32)), atol=1e-6
  )


def with_jet_layers(**model):
  """Ouro of two layers each followed by a Jet layer."""
  leaves = dict(
    pattern=((("attn", "inserted_jet"), 2), (("attn",), 1)),
    fast_weight_heads=2,
    key_dim=8,
    value_dim=16,
    loops=2,
  )
  shape = convert.architecture_of(hf.Numbers(hf_folders.OURO, "")).shape(
    hf.Numbers(hf_folders.OURO, "")
  )
  return dataclasses.replace(
    ExperimentConfig(), model=convert.model_config(shape, **(leaves | model))
  )


def test_inserted_layers_start_as_nothing_and_learn(tmp_path):
  folder = write(tmp_path / "hf")
  convert.convert(folder, tmp_path / "plain")
  convert.convert(folder, tmp_path / "inserted", with_jet_layers())
  _, model, params = restore(tmp_path / "plain")
  model = model.copy(config=dataclasses.replace(model.config, loops=2))
  _, inserted, more = restore(tmp_path / "inserted")
  rng = np.random.default_rng(0)
  ids = jnp.asarray(rng.integers(0, 61, (2, 12)), jnp.int32)
  np.testing.assert_array_equal(
    logits(model, params, ids), logits(inserted, more, ids)
  )

  @jax.jit
  @jax.grad
  def gradient(params):
    state = init_fast_weights(inserted.config, 2)
    out, _ = inserted.apply({"params": params}, ids, state, ids >= 0)
    nats = -jnp.take_along_axis(jax.nn.log_softmax(out), ids[..., None], -1)
    return jnp.mean(nats)

  def norm(tree):
    return float(jnp.sqrt(sum(jnp.sum(x**2) for x in jax.tree.leaves(tree))))

  first = gradient(more)["group_0"]
  attention = norm(first["attn_0"]["mixer"]["o_proj"])
  jet = norm(first["inserted_jet_1"]["mixer"]["o_proj"])
  assert 0.01 < jet / attention < 100
  # A step of it, and all that stands before it learns.
  stepped = jax.tree.map(lambda x: x, more)
  kernel = stepped["group_0"]["inserted_jet_1"]["mixer"]["o_proj"]
  kernel["kernel"] -= 0.1 * first["inserted_jet_1"]["mixer"]["o_proj"]["kernel"]
  second = gradient(stepped)["group_0"]["inserted_jet_1"]
  still = {
    jax.tree_util.keystr(path, simple=True, separator="/")
    for path, x in jax.tree.leaves_with_path(second)
    if not np.any(x)
  }
  # The generator's first layer waits for its second, one step more.
  assert still == {"mixer/v_conv/w1_proj/kernel"}


def test_a_config_of_another_model_is_refused(tmp_path):
  folder = write(tmp_path / "hf")
  for config, message in (
    (with_jet_layers(width=64), "model.width = 64: .* makes it 32"),
    (
      with_jet_layers(pattern=((("attn",), 2),)),
      "without inserted layers, is attn attn: .* has attn attn attn",
    ),
  ):
    with pytest.raises(ValueError, match=message):
      convert.convert(folder, tmp_path / "w", config)
  assert os.listdir(tmp_path) == ["hf"]


def change_tensors(folder, change):
  """Rewrites a folder's file with its tensors changed."""
  read = hf.Folder(folder)
  weights = {name: read.read(name) for name in read.shapes}
  change(weights)
  config = json.loads((folder / "config.json").read_text())
  hf_folders.write(folder, config, weights)


def _drop(name):
  return lambda weights: weights.pop(name)


def _put(name, array):
  return lambda weights: weights.update({name: array})


def _truncate(folder):
  file = folder / "model.safetensors"
  file.write_bytes(file.read_bytes()[:-100])


GATE = "model.early_exit_gate.bias"
BAD = {
  "no config": (
    lambda folder: (folder / "config.json").unlink(),
    "config.json cannot be read",
  ),
  "truncated": (_truncate, "is missing or damaged"),
  "missing": (
    lambda folder: change_tensors(folder, _drop(GATE)),
    rf"{GATE} is missing, in this model it is \[1\]",
  ),
  "surplus": (
    lambda folder: change_tensors(folder, _put("x", np.zeros(2, "float32"))),
    r"x is \[2\], in this model it is of no use",
  ),
  "misshapen": (
    lambda folder: change_tensors(folder, _put(GATE, np.zeros(2, "float32"))),
    rf"{GATE} is \[2\], in this model it is \[1\]",
  ),
  "float16": (
    lambda folder: change_tensors(folder, _put(GATE, np.zeros(1, "float16"))),
    f"{GATE} is F16: give the model in bfloat16 or float32",
  ),
  "two dtypes in a stack": (
    lambda folder: change_tensors(
      folder,
      _put(
        "model.layers.1.input_layernorm.weight",
        np.ones(32, ml_dtypes.bfloat16),
      ),
    ),
    "bfloat16 and float32: give them one dtype",
  ),
  "no tokenizer": (
    lambda folder: (folder / "tokenizer.json").unlink(),
    "has no tokenizer.json",
  ),
  "large tokenizer": (
    lambda folder: hf_folders.write_tokenizer(
      folder / "tokenizer.json", [f"w{i}" for i in range(62)]
    ),
    "has 62 tokens, but the embedding vocab_size = 61 rows",
  ),
}
BAD_CONFIGS = {
  "architecture": (dict(architectures=["GPT2LMHeadModel"]), "not one of"),
  "quantized": (dict(quantization_config={"bits": 4}), "is quantized"),
  "activation": (dict(hidden_act="gelu"), "hidden_act = 'gelu', but only"),
  "scaling": (dict(rope_scaling={"type": "yarn"}), "rope_scaling = "),
  "text": (dict(hidden_size="big"), "hidden_size = 'big' is no int"),
  "head_dim": (dict(head_dim=16), "head_dim = 16, but only 8"),
  "norm": (dict(rms_norm_eps=-1.0), "model.norm_eps = -1.0"),
  "no heads": (dict(num_attention_heads=0), "= 0: must be at least 1"),
  "infinite": (dict(hidden_size=float("inf")), "hidden_size = inf is no int"),
  "nested": (dict(architectures=[[]]), "not one of"),
}


@pytest.mark.parametrize("kind", [*BAD, *BAD_CONFIGS])
def test_a_bad_folder_is_one_line_and_nothing_written(tmp_path, kind):
  if kind in BAD:
    folder = write(tmp_path / "hf")
    spoil, message = BAD[kind]
    spoil(folder)
  else:
    changes, message = BAD_CONFIGS[kind]
    folder = write(tmp_path / "hf", **changes)
  with pytest.raises(ValueError, match=message) as caught:
    convert.convert(folder, tmp_path / "w")
  assert len(str(caught.value).splitlines()) == 1
  assert os.listdir(tmp_path) == ["hf"]


def test_a_tied_head_may_be_there_if_it_is_the_embedding(tmp_path):
  folder = write(tmp_path / "hf", "jet")
  embedding = hf.Folder(folder).read("model.embed_tokens.weight")
  change_tensors(folder, _put(hf.HEAD, embedding))
  convert.convert(folder, tmp_path / "w")
  change_tensors(folder, _put(hf.HEAD, embedding + 1))
  with pytest.raises(ValueError, match="is not the embedding"):
    convert.convert(folder, tmp_path / "w2")


@pytest.mark.slow
def test_the_command_ends_in_one_line(tmp_path):
  folder = write(tmp_path / "hf", hidden_act="gelu")

  def run(*options):
    return subprocess.run(
      [sys.executable, "-m", "sleep_jax.pretrained.convert"]
      + [f"--from={folder}", f"--to={tmp_path / 'w'}", *options],
      capture_output=True,
      text=True,
    )

  done = run()
  assert done.returncode == 2
  (line,) = done.stderr.splitlines()
  assert line.startswith("error: ") and "hidden_act" in line
  assert not (tmp_path / "w").exists()
