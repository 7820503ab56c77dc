"""Checkpoints: model parameters, training state and data position by step.

A step's folder holds three items: `params` (the model parameters alone, so
that they can be shipped), `train` (the optimizer state) and `data`
(where the grain iterator stands; it counts batches, so that of one process
serves any number of them). A step counts once its commit_success.txt
is written, last of all; a run killed while saving leaves a folder without it.
"""

import functools
import hashlib
import json
import math
import os
import shutil
from collections.abc import Callable
from typing import Any, TypeAlias

import grain
import grain.checkpoint
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint.options import AtomicityMode, AtomicityOptions

from sleep_jax.array_types import by_name

PyTree: TypeAlias = Any

_COMMIT_FILE = "commit_success.txt"
_EXPORTED_FILE_BYTES = 100_000_000


class Checkpoints:
  """The checkpoints of one run, in `workdir`/checkpoints.

  Arrays are copied before `save` returns and written in the background. What
  goes wrong there is raised by the next `save`, `wait` or `close`.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    keep_last: int = 2,
    keep_every: int = 0,
    keep_best: str = "",
  ):
    """Opens the folder, in which these steps are kept.

    Args:
      workdir: the run's folder.
      keep_last: so many newest.
      keep_every: multiples of this, if it is not 0.
      keep_best: the one with the highest metric of this name, if any.
    """
    policies = ocp.checkpoint_managers

    def best(metrics):
      return metrics.get(keep_best, -math.inf)

    kept: list[Any] = [policies.LatestN(keep_last)]
    if keep_every:
      kept.append(policies.EveryNSteps(keep_every))
    if keep_best:
      kept.append(
        policies.BestN(
          get_metric_fn=best,
          n=1,
          keep_checkpoints_without_metrics=False,
        )
      )
    self._directory = epath.Path(workdir).absolute() / "checkpoints"
    self._manager = ocp.CheckpointManager(
      self._directory,
      options=ocp.CheckpointManagerOptions(
        preservation_policy=policies.AnyPreservationPolicy(kept),
        # Without it metrics would not be written, and be forgotten on resuming.
        best_fn=best if keep_best else None,
        # By the default protocol an empty folder can be the latest step.
        atomicity_options=AtomicityOptions(AtomicityMode.COMMIT_FILE),
      ),
    )
    self._unreadable: list[int] = []

  def save(
    self,
    step: int,
    params: PyTree,
    train: PyTree,
    iterator: grain.DatasetIterator,
    metrics: dict[str, float] | None = None,
  ) -> None:
    """Saves a step; does nothing when that step is the latest already.

    Args:
      step: how many optimizer steps have been taken.
      params: the model parameters, arrays.
      train: all else that training resumes from, arrays; a PRNG key as
        `jax.random.key_data`.
      iterator: has handed out the batches of exactly `step` steps.
      metrics: of this step, by which the best is kept.

    Raises:
      ValueError: a later step is there, not restored from.
      OSError: this step or the one before it could not be written (the disk
        is full); earlier steps are unharmed.
    """
    self.wait()
    self._discard_unfinished()
    for unreadable in self._unreadable:
      self._manager.delete(unreadable)
    self._unreadable = []
    latest = self._manager.latest_step()
    if latest is not None and latest > step:
      raise ValueError(
        f"step {step} cannot be saved: {self._directory} holds the later step"
        f" {latest}; resume from it or choose another --workdir"
      )
    items = ocp.args.Composite(
      params=_save_arguments(params),
      train=_save_arguments(train, position=_position(iterator)),
      data=grain.checkpoint.CheckpointSave(iterator),
    )
    try:
      self._manager.save(step, args=items, metrics=metrics)
    except Exception as error:
      raise self._not_written(error) from error

  def restore_latest(
    self,
    params_like: PyTree,
    train_like: PyTree,
    iterator: grain.DatasetIterator,
  ) -> tuple[int, PyTree, PyTree] | None:
    """Returns (step, params, train) of the newest readable step, if any.

    Steps that are unfinished, truncated or corrupt, be it for one process
    alone, are passed over with a warning, and the next save replaces them.

    Args:
      params_like: arrays or `jax.ShapeDtypeStruct`s of the same names, shapes
        and dtypes; what is restored gets their shardings.
      train_like: likewise.
      iterator: is set to where it stood at that step.

    Raises:
      ValueError: there are finished steps and none can be read.
    """
    self.wait()
    self._unreadable = []
    self._manager.reload()
    finished = self._manager.all_steps()
    reasons = []
    for step in reversed(_step_folders(self._directory)):
      folder = self._directory / str(step)
      if step not in finished:
        logging.warning("%s was never finished: passed over", folder)
        continue
      try:
        params, _ = _read(folder / "params", params_like)
        train, metadata = _read(folder / "train", train_like)
        _on_all(functools.partial(_set_position, folder, iterator, metadata))
      except Exception as error:  # whatever the libraries raise on bad bytes
        reasons.append(f"step {step}: {_first_line(error)}")
        self._unreadable.append(step)
        logging.warning(
          "%s cannot be read, falling back to an earlier step: %s",
          folder,
          _first_line(error),
        )
      else:
        return step, params, train
    if reasons:
      raise ValueError(
        f"no step in {self._directory} can be restored"
        f" ({'; '.join(reasons)}): choose another --workdir, or delete it"
      )
    return None

  def wait(self) -> None:
    """Waits until the last save is on disk.

    Raises:
      OSError: it could not be written.
    """
    try:
      self._manager.wait_until_finished()
    except Exception as error:
      raise self._not_written(error) from error

  def close(self) -> None:
    """Waits for the last save, then lets go of the folder.

    Raises:
      OSError: the last save could not be written.
    """
    try:
      self.wait()
    finally:
      self._manager.close()

  def __enter__(self) -> "Checkpoints":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()

  def _not_written(self, error: Exception) -> OSError:
    self._manager.reload()
    return OSError(
      f"a checkpoint could not be written in {self._directory}; steps"
      f" {sorted(self._manager.all_steps())} are complete:"
      f" {_first_line(error)}"
    )

  def _discard_unfinished(self) -> None:
    """Frees the room that saves cut short by a crash or a full disk take."""
    finished = self._manager.all_steps()
    for step in _step_folders(self._directory):
      if step not in finished and jax.process_index() == 0:
        shutil.rmtree(self._directory / str(step), ignore_errors=True)


def is_started(workdir: str | os.PathLike) -> bool:
  """Whether the workdir holds a finished step, to resume from."""
  folder = epath.Path(workdir).absolute() / "checkpoints"
  return bool(_finished_steps(folder))


def restore_params(path: str | os.PathLike, params_like: PyTree) -> PyTree:
  """Returns the model parameters at `path`, shaped and sharded as the like.

  Args:
    path: what `export_params` wrote, one step's folder, a checkpoints folder
      or a workdir (the last two: their newest finished step).
    params_like: arrays or `jax.ShapeDtypeStruct`s. What is stored in a
      narrower dtype, as pretrained models are in bfloat16, is widened.

  Raises:
    ValueError: nothing finished and readable is there, or names, shapes or
      dtypes are not those of `params_like`.
  """
  folder = _params_folder(epath.Path(path).absolute())
  try:
    return _read(folder, params_like)[0]
  except Exception as error:  # whatever the libraries raise on bad bytes
    raise ValueError(
      f"parameters in {folder} cannot be used: {_first_line(error)}"
    ) from error


def stored_dtypes(path: str | os.PathLike) -> dict[str, np.dtype]:
  """Dtypes of the parameters at `path` (as `restore_params`), by their paths.

  Raises:
    ValueError: nothing finished and readable is there.
  """
  folder = _params_folder(epath.Path(path).absolute())
  metadata = ocp.StandardCheckpointHandler().metadata(folder)
  return {name: np.dtype(x.dtype) for name, x in metadata.tree.items()}


def export_params(path: str | os.PathLike, params: PyTree) -> None:
  """Writes the parameters alone to a new folder, for `restore_params`.

  Raises:
    ValueError: `path` exists.
    OSError: it cannot be written.
  """
  folder = epath.Path(path).absolute()
  if folder.exists():
    raise ValueError(f"{path} exists: choose another path, or delete it")
  saved = _save_arguments(params)
  # Else all that is written, compressed, is held in memory until the end.
  items = ocp.args.PyTreeSave(
    saved.item,
    custom_metadata=saved.custom_metadata,
    ocdbt_target_data_file_size=_EXPORTED_FILE_BYTES,
  )
  few_at_a_time: Any = {
    "save_device_host_concurrent_gb": 1,
    "is_prioritized_key_fn": lambda _: False,
  }
  handler = ocp.PyTreeCheckpointHandler(**few_at_a_time)
  try:
    with ocp.Checkpointer(handler) as checkpointer:
      checkpointer.save(folder, args=items)
  except Exception as error:
    raise OSError(
      f"parameters could not be written to {path}: {_first_line(error)}"
    ) from error
  if jax.process_index() == 0:
    # It says where the folder was written, which is no one else's business.
    (folder / _COMMIT_FILE).unlink()


def _save_arguments(tree: PyTree, **metadata: Any) -> ocp.args.StandardSave:
  arrays = _arrays_by_name(tree)
  return ocp.args.StandardSave(
    arrays, custom_metadata={"checksums": _checksums(arrays)} | metadata
  )


def _position(iterator: grain.DatasetIterator) -> str:
  """A digest of where the iterator stands: the format keeps no checksum."""
  state = json.dumps(iterator.get_state(), sort_keys=True, default=repr)
  return hashlib.sha256(state.encode()).hexdigest()


def _set_position(
  folder: epath.Path, iterator: grain.DatasetIterator, metadata: dict[str, Any]
) -> None:
  (position,) = (folder / "data").glob("process_0-of-*.json")
  iterator.set_state(json.loads(position.read_text()))
  if metadata["position"] != _position(iterator):
    raise ValueError("its data position is corrupt")


def _on_all(read: Callable[[], Any]) -> Any:
  """What `read` returns; where it fails for one process, it does for all.

  Else the others would go on alone, to another step or to a computation that
  the one never joins.
  """
  try:
    result, error = read(), None
  except Exception as caught:  # whatever the libraries raise on bad bytes
    result, error = None, caught
  if not np.all(multihost_utils.process_allgather(np.array(error is None))):
    raise error or ValueError("another process cannot read it")
  return result


def _read(folder: epath.Path, like: PyTree) -> tuple[PyTree, dict[str, Any]]:
  """(arrays shaped as `like`, what `_save_arguments` added to them).

  Raises:
    ValueError: the arrays are others, or corrupt.
  """
  like_by_name = _arrays_by_name(like)

  def read():
    handler = ocp.StandardCheckpointHandler()
    metadata = handler.metadata(folder)
    # Restoring would cast dtypes silently.
    _check_same_arrays(metadata.tree, like_by_name)
    arrays = handler.restore(
      folder,
      args=ocp.args.StandardRestore(
        {
          name: _with_sharding(leaf, metadata.tree[name].dtype)
          for name, leaf in like_by_name.items()
        }
      ),
    )
    return arrays, metadata.custom_metadata

  arrays, saved = _on_all(read)
  if saved is None:
    raise ValueError("its checksums are missing")
  for name, checksum in _checksums(arrays).items():
    if checksum != saved["checksums"][name]:
      raise ValueError(f"{name} is corrupt: its checksum is not the saved one")
  leaves = [
    arrays.pop(name).astype(leaf.dtype) for name, leaf in like_by_name.items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves), saved


def _arrays_by_name(tree: PyTree) -> dict[str, Any]:
  return {
    name: (
      leaf
      if isinstance(leaf, jax.Array | jax.ShapeDtypeStruct)
      else np.asarray(leaf)
    )
    for name, leaf in by_name(tree).items()
  }


def _check_same_arrays(there: dict[str, Any], like: dict[str, Any]) -> None:
  def describe(arrays: dict[str, Any], name: str) -> str:
    if name not in arrays:
      return "absent"
    array = arrays[name]
    return f"{np.dtype(array.dtype).name}{list(array.shape)}"

  def widened(name: str) -> bool:
    was, wanted = there[name], like[name]
    wider = jnp.promote_types(was.dtype, wanted.dtype) == wanted.dtype
    floats = jnp.issubdtype(was.dtype, jnp.floating)
    return was.shape == wanted.shape and wider and floats

  for name in sorted(there | like):
    was, wanted = describe(there, name), describe(like, name)
    if was != wanted and not (name in there and name in like and widened(name)):
      raise ValueError(f"{name} is {was} there, but the model's is {wanted}")


def _with_sharding(leaf: Any, dtype: Any) -> Any:
  """What to restore for `leaf`, in the dtype that is stored."""
  if isinstance(leaf, np.ndarray):
    return np.empty(leaf.shape, dtype)
  sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(
    jax.local_devices()[0]
  )
  return jax.ShapeDtypeStruct(leaf.shape, dtype, sharding=sharding)


def _checksums(arrays: dict[str, Any]) -> dict[str, Any]:
  # One at a time: each may take as much memory again as its array.
  return {name: int(_checksum(array)) for name, array in arrays.items()}


@jax.jit
def _checksum(array: jax.Array) -> jax.Array:
  """A uint32 of the array's bits and their places, however it is sharded.

  The format keeps no checksum of numbers: a flipped bit on disk would come
  back as another weight. Each word is mixed with its place (invertibly, so
  that a change of one word never goes unseen) and the sum wraps, so that its
  order is free.
  """
  if array.dtype == bool:
    array = array.astype(jnp.uint8)
  word = jnp.dtype(f"uint{8 * min(array.dtype.itemsize, 4)}")
  words = jax.lax.bitcast_convert_type(array, word).astype(jnp.uint32)
  place = jnp.zeros((), jnp.uint32)
  for axis, size in enumerate(words.shape):
    along = jax.lax.broadcasted_iota(jnp.uint32, words.shape, axis)
    place = place * np.uint32(size) + along
  mixed = words ^ (place * np.uint32(0x9E3779B1))
  for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35), (16, 1)):
    mixed = (mixed ^ (mixed >> shift)) * np.uint32(factor)
  return jnp.sum(mixed, dtype=jnp.uint32)


def _params_folder(path: epath.Path) -> epath.Path:
  """The folder of the `params` item that `path` stands for."""
  if (path / "_METADATA").exists():
    return path
  if (path / "params").exists():
    if not (path / _COMMIT_FILE).exists():
      raise ValueError(f"{path} was never finished: choose another step")
    return path / "params"
  for folder in (path / "checkpoints", path):
    if finished := _finished_steps(folder):
      return folder / str(finished[-1]) / "params"
  raise ValueError(
    f"{path} holds no parameters: give a workdir with a finished step, its"
    " checkpoints folder, a step's folder or an exported one"
  )


def _step_folders(folder: epath.Path) -> list[int]:
  if not folder.is_dir():
    return []
  return sorted(int(p.name) for p in folder.iterdir() if p.name.isdecimal())


def _finished_steps(folder: epath.Path) -> list[int]:
  return [
    step
    for step in _step_folders(folder)
    if (folder / str(step) / _COMMIT_FILE).exists()
  ]


def _first_line(error: Exception) -> str:
  return (str(error).splitlines() or [type(error).__name__])[0]
