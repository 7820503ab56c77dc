"""Over any mesh a run computes what one device computes."""

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh
from jax.sharding import PartitionSpec as P

from experiments import automaton
from sleep_jax.config import ExperimentConfig, MeshConfig, ModelConfig
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.parallel import sharding
from sleep_jax.training import optimizers
from sleep_jax.training.step import TrainState, init_params


def abstract_mesh(*sizes):
  return AbstractMesh(sizes, ("data", "fsdp", "tensor"))


def laid_out(mesh, tree, rules=()):
  """Path -> PartitionSpec."""
  return {
    jax.tree_util.keystr(path, simple=True, separator="/"): leaf.spec
    for path, leaf in jax.tree.leaves_with_path(
      sharding.shardings(mesh, tree, rules)
    )
  }


@pytest.fixture(scope="module")
def state():
  """Two groups of (attn, gdn): width 64, heads 2 x 32 x 32, 10 tokens."""

  def make():
    params = init_params(HybridLM(ModelConfig(), 10), 0)
    optimizer = optimizers.optimizer(ExperimentConfig().optimizer, 10)
    return TrainState(params, optimizer.init(params))

  return jax.eval_shape(make)


def test_who_holds_what(state):
  specs = laid_out(abstract_mesh(2, 2, 2), state)
  group = "params/group_0/"
  expected = {
    "params/embedding/embedding": P("fsdp", "tensor"),
    "params/head/kernel": P("fsdp", "tensor"),
    group + "attn_0/mixer/q_proj/kernel": P(None, "fsdp", "tensor"),
    group + "attn_0/mixer/o_proj/kernel": P(None, "tensor", "fsdp"),
    group + "gdn_1/mixer/b_proj/kernel": P(None, "fsdp", "tensor"),
    group + "gdn_1/mixer/A_log": P(),
    group + "gdn_1/mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
    group + "gdn_1/mlp_norm/scale": P(),
  }
  assert {name: specs[name] for name in expected} == expected
  # The optimizer's state like the parameters.
  muon = {
    k.split("/mu/")[1]: v
    for k, v in specs.items()
    if "muon" in k and "/mu/" in k
  }
  assert muon == {
    "to (64, 64)": P(None, "fsdp", "tensor"),
    "to (64, 2)": P(None, "fsdp", "tensor"),
    "to (64, 128)": P(None, "fsdp", "tensor"),
    "from (64, 64)": P(None, "tensor", "fsdp"),
    "from (128, 64)": P(None, "tensor", "fsdp"),
  }
  adamw = [
    v for k, v in specs.items() if "adamw" in k and k.endswith("embedding")
  ]
  assert adamw == [P("fsdp", "tensor")] * 2


def test_what_does_not_divide_is_left_whole(state):
  specs = laid_out(abstract_mesh(1, 4, 2), state)
  assert specs["params/embedding/embedding"] == P(None, "tensor")  # 10 tokens


def test_rules_of_ones_own_come_first(state):
  rules = ((r"^head/kernel$", (None, "fsdp")),)
  specs = laid_out(abstract_mesh(2, 2, 2), state, rules)
  assert specs["params/head/kernel"] == P(None, "fsdp")
  assert specs["params/embedding/embedding"] == P("fsdp", "tensor")
  with pytest.raises(ValueError, match="'haed' matches no parameter; they are"):
    sharding.check_rules(state.params, (("haed", ("fsdp",)),))


@pytest.mark.parametrize(
  "change, message",
  [
    (dict(mesh=MeshConfig(data=3)), "= 3 x 1 x 1: there are 1 devices"),
    (dict(mesh=MeshConfig(fsdp=2)), "= 1 x 2 x 1: there are 1 devices"),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(change, message):
  config = dataclasses.replace(ExperimentConfig(), **change)
  with pytest.raises(ValueError, match=message):
    sharding.make_mesh(config)


def test_a_mesh_that_does_not_divide_heads_is_refused():
  with pytest.raises(ValueError, match="mesh.tensor = 3: must divide"):
    ExperimentConfig(mesh=MeshConfig(tensor=3))
  with pytest.raises(ValueError, match="mesh.rules"):
    ExperimentConfig(mesh=MeshConfig(rules=(("head", ("fdsp",)),)))
  with pytest.raises(ValueError, match="each once"):
    ExperimentConfig(mesh=MeshConfig(rules=(("head", ("fsdp", "fsdp")),)))


def test_without_a_mesh_nothing_is_touched():
  x = jnp.ones((3, 2, 2))
  assert sharding.constrain(x, "data") is x
  stacks = {"to (2, 2)": x}
  assert sharding.spread(stacks) is stacks
  rule = test_who_holds_what
  assert sharding.over_heads(rule, (), ()) is rule


# Prints the losses of some steps for each of the meshes in argv.
LOSSES = """
import dataclasses, json, sys
import jax, numpy as np
from tests.test_sharding import config_of
from sleep_jax.data import pipeline
from sleep_jax.data.source import task_and_tokenizer
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.parallel import sharding
from sleep_jax.training import optimizers
from sleep_jax.training.step import init_state, make_train_step

meshes, sleep, steps = json.loads(sys.argv[1])
for sizes in meshes:
  config = config_of(sizes, sleep)
  devices = jax.devices()[: int(np.prod(sizes))]
  mesh = sharding.make_mesh(config, devices)
  task, tokenizer = task_and_tokenizer(config)
  # In float32 what is rounded in another order grows over the steps: after 20
  # of them losses differ by up to 2e-5.
  exact = dataclasses.replace(config.model, compute_dtype="float64")
  model = HybridLM(exact, tokenizer.vocab_size)
  optimizer = optimizers.optimizer(config.optimizer, 20)
  state = init_state(model, optimizer, config, mesh)
  batches = pipeline.train_iterator(
    task, tokenizer, length=config.data.length, seed=0, align_answer=True,
    window_length=config.sleep.window_length,
    batch_size=config.data.batch_size,
  )
  step, losses = make_train_step(model, optimizer, config), []
  with jax.set_mesh(mesh):
    for _ in range(steps):
      batch = sharding.place(next(batches))
      state, metrics = step(state, batch, np.int32(config.sleep.passes))
      losses.append(float(metrics["loss"]))
  print(json.dumps(losses))
"""


def config_of(sizes, sleep):
  """A hybrid with eight heads of everything, over a mesh of these sizes."""
  config = automaton.tiny()
  return dataclasses.replace(
    config,
    model=dataclasses.replace(
      config.model,
      width=32,
      attention_heads=8,
      key_value_heads=8,
      fast_weight_heads=8,
      key_dim=4,
      value_dim=8,
    ),
    sleep=dataclasses.replace(config.sleep, **sleep),
    optimizer=dataclasses.replace(config.optimizer, accumulation_steps=2),
    mesh=MeshConfig(*sizes),
  )


def losses_of(meshes, sleep, steps):
  printed = subprocess.run(
    [sys.executable, "-c", LOSSES, json.dumps([meshes, sleep, steps])],
    env=os.environ
    | {
      "JAX_PLATFORMS": "cpu",
      "JAX_NUM_CPU_DEVICES": "8",
      "JAX_ENABLE_X64": "1",
    },
    cwd=Path(__file__).parents[1],
    check=True,
    stdout=subprocess.PIPE,
    text=True,
  ).stdout
  return np.array([json.loads(line) for line in printed.splitlines()])


def test_a_mesh_gives_the_losses_of_one_device():
  one, many = losses_of([(1, 1, 1), (2, 2, 2)], dict(passes=2), 3)
  assert len(set(one)) == 3
  np.testing.assert_allclose(many, one, rtol=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("passes", [1, 4])
@pytest.mark.parametrize("eviction", ["hard", "sliding"])
def test_every_mesh_gives_the_losses_of_one_device(eviction, passes):
  sizes = [
    (data, fsdp, 8 // data // fsdp)
    for data in (1, 2, 4, 8)
    for fsdp in (1, 2, 4, 8)
    if data * fsdp <= 8
  ]
  assert len(sizes) == 10
  sleep = dict(passes=passes, eviction=eviction)
  one, *others = losses_of([(1, 1, 1), *sizes], sleep, 20)
  assert one[-1] < one[0]
  for mesh, losses in zip(sizes, others, strict=True):
    np.testing.assert_allclose(losses, one, rtol=1e-5, err_msg=str(mesh))
