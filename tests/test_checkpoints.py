"""Checkpoints come back bit for bit, or say which step does not and why."""

import itertools
import logging
import os
import shutil
import subprocess
import sys
from pathlib import Path

import grain
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest

from sleep_jax.training.checkpoints import (
  Checkpoints,
  _checksum,
  export_params,
  restore_params,
)
from tests.test_workdir import full_disk

# A damaged file leaves the library with unfinished coroutines, of which Python
# complains when they are collected.
pytestmark = pytest.mark.filterwarnings(
  "ignore::pytest.PytestUnraisableExceptionWarning"
)

# Bits that a careless copy would change: a quiet NaN with a payload, -0, a
# subnormal, infinity.
AWKWARD = np.array([0x7FC00123, 0x80000000, 1, 0x7F800000], np.uint32)


def batches():
  """An endless, shuffled, prefetched stream, as training reads it."""
  source = grain.MapDataset.range(40).shuffle(seed=3).repeat().batch(4)
  return iter(source.to_iter_dataset(grain.ReadOptions(4, 4)))


def state(step):
  """Parameters and training state unlike those of any other step."""
  key = jax.random.fold_in(jax.random.key(0), step)
  params = {
    "embed": jax.random.normal(key, (24, 24)),
    "blocks": [
      {"kernel": jax.random.normal(key, (4, 5), jnp.bfloat16)},
      {"bias": jnp.asarray(AWKWARD.view(np.float32))},
    ],
  }
  adam = optax.adam(1e-3)
  train = {
    "optimizer": adam.update(params["embed"], adam.init(params["embed"]))[1],
    "step": jnp.int32(step),
    "key": jax.random.key_data(key),
    "seen": np.full(3, step, np.int32),
    "flags": jnp.array([True, False]),
  }
  return params, train


def bits(tree):
  return [
    (np.asarray(x).dtype, np.asarray(x).shape, np.asarray(x).tobytes())
    for x in jax.tree.leaves(tree)
  ]


def assert_restores(workdir, step):
  """The newest readable step is `step`, bit for bit; returns its iterator."""
  iterator = batches()
  with Checkpoints(workdir) as checkpoints:
    restored = checkpoints.restore_latest(*state(0), iterator)
  assert restored is not None and restored[0] == step
  assert bits(restored[1:]) == bits(state(step))
  assert jax.tree.structure(restored[1:]) == jax.tree.structure(state(0))
  return iterator


def save(workdir, steps, keep=2):
  """Saves these steps; a batch is read before each, and four afterwards."""
  iterator = batches()
  with Checkpoints(workdir, keep) as checkpoints:
    for step in steps:
      next(iterator)
      checkpoints.save(step, *state(step), iterator)
    # While the last save is perhaps still being written.
    return [next(iterator) for _ in range(4)]


def folder(workdir, step):
  return workdir / "checkpoints" / str(step)


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("two_steps")
  save(workdir, [1, 2])
  return workdir


@pytest.fixture
def workdir(two_steps, tmp_path):
  """A run with the finished steps 1 and 2, to be damaged."""
  return shutil.copytree(two_steps, tmp_path / "run")


def test_a_step_comes_back_bit_for_bit_with_its_place_in_the_data(tmp_path):
  coming = save(tmp_path, [1, 2, 3])
  iterator = assert_restores(tmp_path, 3)
  for batch in coming:
    np.testing.assert_array_equal(next(iterator), batch)


def test_no_checkpoint_is_no_step(tmp_path):
  with Checkpoints(tmp_path) as checkpoints:
    assert checkpoints.restore_latest(*state(0), batches()) is None


def test_what_is_saved_is_the_state_of_that_moment(tmp_path):
  """The next step may reuse the buffers of donated arrays while they save."""
  big = jax.random.normal(jax.random.key(0), (600, 1000))
  want = np.array(big)
  step = jax.jit(lambda x: x + 1, donate_argnums=0)
  with Checkpoints(tmp_path) as checkpoints:
    checkpoints.save(1, {"w": big}, {"step": jnp.int32(1)}, batches())
    for _ in range(20):
      big = step(big)
    big.block_until_ready()
  np.testing.assert_array_equal(restore_params(tmp_path, {"w": big})["w"], want)


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_are_kept(tmp_path, keep):
  save(tmp_path, [1, 2, 3, 4, 5], keep)
  kept = sorted(int(p.name) for p in (tmp_path / "checkpoints").iterdir())
  assert kept == [1, 2, 3, 4, 5][-keep:]


def largest(step_folder, item):
  files = [p for p in (step_folder / item).rglob("*") if p.is_file()]
  return max(files, key=lambda p: p.stat().st_size)


def truncate(path):
  os.truncate(path, path.stat().st_size // 2)


def flip_a_bit(path):
  """In the middle of the file: in the numbers, not in their bookkeeping."""
  data = bytearray(path.read_bytes())
  data[len(data) // 2] ^= 16
  path.write_bytes(data)


DAMAGE = {
  "parameters truncated": lambda step: truncate(largest(step, "params")),
  "parameters gone": lambda step: shutil.rmtree(step / "params"),
  "a bit of a parameter": lambda step: flip_a_bit(largest(step, "params")),
  "a bit of a moment": lambda step: flip_a_bit(largest(step, "train")),
  "index emptied": lambda step: os.truncate(step / "train/manifest.ocdbt", 0),
  "names truncated": lambda step: truncate(step / "params/_METADATA"),
  "names gone": lambda step: (step / "train/_METADATA").unlink(),
  "position truncated": lambda step: truncate(
    step / "data/process_0-of-1.json"
  ),
  "position gone": lambda step: shutil.rmtree(step / "data"),
  "never finished": lambda step: (step / "commit_success.txt").unlink(),
  "hardly begun": lambda step: (shutil.rmtree(step), step.mkdir()),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE)
def test_a_damaged_step_is_named_and_the_one_before_it_taken(
  workdir, damage, caplog
):
  damage(folder(workdir, 2))
  iterator = batches()
  with Checkpoints(workdir) as checkpoints:
    with caplog.at_level(logging.WARNING):
      step, *restored = checkpoints.restore_latest(*state(0), iterator)
    assert step == 1 and bits(restored) == bits(state(1))
    warnings = [r.getMessage() for r in caplog.records]
    assert any(str(folder(workdir, 2)) in warning for warning in warnings)
    # The run goes on from there, over the damaged step.
    next(iterator)
    checkpoints.save(2, *state(2), iterator)
  assert_restores(workdir, 2)


def test_what_another_process_cannot_read_is_not_taken(
  workdir, monkeypatch, caplog
):
  others = iter([True, False])  # its parameters of step 2, its train state
  monkeypatch.setattr(
    "jax.experimental.multihost_utils.process_allgather",
    lambda mine: np.array([mine, next(others, True)]),
  )
  with Checkpoints(workdir) as checkpoints:
    step, *restored = checkpoints.restore_latest(*state(0), batches())
  assert step == 1 and bits(restored) == bits(state(1))
  assert "another process cannot read it" in caplog.text


def test_finished_steps_of_which_none_can_be_read_are_an_error(workdir):
  """Starting again in silence would overwrite what might be rescued."""
  for step in (1, 2):
    truncate(largest(folder(workdir, step), "params"))
  with Checkpoints(workdir) as checkpoints:
    with pytest.raises(ValueError, match="step 2: .*step 1: ") as error:
      checkpoints.restore_latest(*state(0), batches())
  assert "\n" not in str(error.value)


def test_only_unfinished_steps_are_as_good_as_none(workdir):
  for step in (1, 2):
    (folder(workdir, step) / "commit_success.txt").unlink()
  with Checkpoints(workdir) as checkpoints:
    assert checkpoints.restore_latest(*state(0), batches()) is None


def test_the_latest_step_is_not_written_again_and_an_earlier_one_refused(
  workdir,
):
  with Checkpoints(workdir) as checkpoints:
    checkpoints.save(2, *state(7), batches())
    with pytest.raises(ValueError, match="later step 2"):
      checkpoints.save(1, *state(1), batches())
  assert_restores(workdir, 2)


@pytest.mark.parametrize(
  "policy, expected",
  [
    (dict(keep_last=1, keep_every=2), [2, 4, 5]),
    (dict(keep_last=1, keep_best="accuracy"), [3, 5]),
    (dict(keep_last=2, keep_every=4, keep_best="accuracy"), [3, 4, 5]),
  ],
)
def test_policies_keep_what_they_name(tmp_path, policy, expected):
  accuracies = {1: 0.1, 2: 0.5, 3: 0.9, 4: 0.9 - 1e-6}
  iterator = batches()
  for steps in ((1, 2, 3), (4, 5)):  # the second as a run that goes on
    with Checkpoints(tmp_path, **policy) as checkpoints:
      checkpoints.restore_latest(*state(0), iterator)
      for step in steps:
        accuracy = accuracies.get(step)
        metrics = None if accuracy is None else {"accuracy": accuracy, "x": 1}
        checkpoints.save(step, *state(step), iterator, metrics)
  kept = sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir())
  assert kept == expected
  assert_restores(tmp_path, 5)


@pytest.mark.parametrize("keep", [1, 2])
def test_a_full_disk_is_an_oserror_and_the_earlier_step_stays(tmp_path, keep):
  save(tmp_path, [1], keep)
  big = {"w": jax.random.normal(jax.random.key(0), (300, 1000))}
  with full_disk(100_000):
    checkpoints = Checkpoints(tmp_path, keep)
    with pytest.raises(OSError, match=r"steps \[1\] are complete"):
      checkpoints.save(2, big, state(2)[1], batches())
      checkpoints.wait()
    checkpoints.close()
  assert_restores(tmp_path, 1)
  # With room again the run goes on, and what was cut short makes way.
  save(tmp_path, [3], keep=1)
  assert os.listdir(tmp_path / "checkpoints") == ["3"]


def test_parameters_are_found_wherever_they_may_lie(workdir, tmp_path):
  params, _ = state(2)
  export_params(tmp_path / "exported", params)
  for place in (
    workdir,
    workdir / "checkpoints",
    folder(workdir, 2),
    folder(workdir, 2) / "params",
    tmp_path / "exported",
  ):
    assert bits(restore_params(str(place), params)) == bits(params)
  earlier = restore_params(folder(workdir, 1), params)
  assert bits(earlier) == bits(state(1)[0])


def test_the_like_may_be_shapes_alone(workdir):
  like = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), state(0)
  )
  with Checkpoints(workdir) as checkpoints:
    step, *restored = checkpoints.restore_latest(*like, batches())
  assert step == 2 and bits(restored) == bits(state(2))


def test_an_exported_folder_is_small_and_carries_no_path(tmp_path):
  params, _ = state(1)
  export_params(tmp_path / "deep" / "exported", params)
  moved = shutil.move(tmp_path / "deep" / "exported", tmp_path / "moved")
  files = [p for p in Path(moved).rglob("*") if p.is_file()]
  assert len(files) < 20
  assert not any(str(tmp_path).encode() in p.read_bytes() for p in files)
  assert bits(restore_params(moved, params)) == bits(params)
  with pytest.raises(ValueError, match="exists"):
    export_params(moved, params)


def test_an_export_that_does_not_fit_on_the_disk_leaves_no_folder(tmp_path):
  big = {"w": jax.random.normal(jax.random.key(0), (300, 1000))}
  with full_disk(100_000), pytest.raises(OSError):
    export_params(tmp_path / "exported", big)
  assert not (tmp_path / "exported").exists()


def test_parameters_of_another_model_are_refused_by_name(workdir):
  params, _ = state(2)
  embed = params["embed"]
  others = {
    "embed is float32[24, 24] there, but the model's is float32[24, 25]": (
      params | {"embed": jnp.zeros((24, 25))}
    ),
    "embed is float32[24, 24] there, but the model's is bfloat16[24, 24]": (
      params | {"embed": embed.astype(jnp.bfloat16)}
    ),
    "extra is absent there, but the model's is float32[3]": (
      params | {"extra": jnp.zeros(3)}
    ),
    "blocks/0/kernel is bfloat16[4, 5] there, but the model's is absent": {
      "embed": embed
    },
  }
  for message, like in others.items():
    with pytest.raises(ValueError) as error:
      restore_params(workdir, like)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_parameters_that_are_not_there_are_refused_in_one_line(workdir):
  params, _ = state(2)
  (folder(workdir, 1) / "commit_success.txt").unlink()
  flip_a_bit(largest(folder(workdir, 2), "params"))
  for place, message in {
    workdir / "nowhere": "holds no parameters",
    workdir.parent: "holds no parameters",
    folder(workdir, 1): "never finished",
    folder(workdir, 2): "embed is corrupt",
  }.items():
    with pytest.raises(ValueError, match=message) as error:
      restore_params(place, params)
    assert str(place) in str(error.value) and "\n" not in str(error.value)


def test_an_unfinished_step_is_no_source_of_parameters(workdir):
  (folder(workdir, 2) / "commit_success.txt").unlink()
  assert bits(restore_params(workdir, state(0)[0])) == bits(state(1)[0])


def test_parameters_without_checksums_are_refused(tmp_path):
  params = {"w": jnp.ones(3)}
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "other", params)
  with pytest.raises(ValueError, match="checksums are missing"):
    restore_params(tmp_path / "other", params)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "bool"])
def test_the_checksum_changes_with_any_bit_and_any_two_places(dtype):
  rng = np.random.default_rng(0)
  array = np.asarray(jnp.asarray(rng.integers(0, 2, (3, 5)), dtype))
  words = array.view(f"uint{8 * array.dtype.itemsize}")

  def checksum(words):
    return int(_checksum(words.view(array.dtype)))

  changed = []
  places = list(np.ndindex(3, 5))
  for place in places:
    for bit in range(1 if dtype == "bool" else 8 * array.dtype.itemsize):
      flipped = words.copy()
      flipped[place] ^= 1 << bit
      changed.append(checksum(flipped))
  for one, other in itertools.combinations(places, 2):
    if words[one] != words[other]:
      swapped = words.copy()
      swapped[one], swapped[other] = words[other], words[one]
      changed.append(checksum(swapped))
  assert len({checksum(words), *changed}) == 1 + len(changed)


SHARDED = """
import sys
import grain, jax, jax.numpy as jnp, numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec as P
from sleep_jax.training.checkpoints import Checkpoints, restore_params

mesh = jax.make_mesh((4,), ("data",), axis_types=(AxisType.Auto,))
values = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
rows = jax.device_put(values, NamedSharding(mesh, P("data")))
columns = jax.device_put(values, NamedSharding(mesh, P(None, "data")))
iterator = iter(grain.MapDataset.range(9).to_iter_dataset())
with Checkpoints(sys.argv[1]) as checkpoints:
  checkpoints.save(1, {"w": rows}, {"step": jnp.int32(1)}, iterator)
  _, params, _ = checkpoints.restore_latest(
    {"w": columns}, {"step": jnp.int32(0)}, iterator
  )
assert params["w"].sharding == columns.sharding, params["w"].sharding
np.testing.assert_array_equal(params["w"], values)
"""


def test_shards_come_back_as_the_like_is_sharded_on_any_device_count(tmp_path):
  flags = "--xla_force_host_platform_device_count=4"
  subprocess.run(
    [sys.executable, "-c", SHARDED, str(tmp_path)],
    env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
    cwd=Path(__file__).parents[1],
    check=True,
  )
  like = {"w": jnp.zeros((8, 12))}
  restored = restore_params(tmp_path, like)["w"]
  assert restored.sharding == like["w"].sharding
  values = np.random.default_rng(0).normal(size=(8, 12)).astype(np.float32)
  np.testing.assert_array_equal(restored, values)
