"""How a run is spread over devices: the mesh, and who holds what.

Rows of a batch lie over `data` x `fsdp`, heads, fast weights and the MLP's
width over `tensor`; parameters and optimizer state over `fsdp` and `tensor`, by
RULES. A program is traced under `jax.set_mesh(mesh)`; what is not said here is
left to XLA's partitioner. Without a mesh every function below leaves its
arguments as they are.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from sleep_jax.array_types import by_name
from sleep_jax.config import MESH_AXES, ExperimentConfig

# Where the rows of a batch go.
ROWS = ("data", "fsdp")
# Arrays [B, T, H, *], fast weights [B, H, K, V], and what has no heads [B, *].
TOKENS = PartitionSpec(ROWS, None, "tensor")
STATE = PartitionSpec(ROWS, "tensor")
BY_ROW = PartitionSpec(ROWS)
# (what a path must hold, axes of the last dimensions). Of the rules that match,
# the first whose axes divide the array's dimensions holds; if none does, the
# last, without the axes that do not. No rule: every device holds all.
RULES = (
  (r"(embedding|head/kernel)$", ("fsdp", "tensor")),
  # From the heads, or the MLP, into the residual stream; and the other way.
  # "from", "to": what Muon keeps of both (`optimizers.stack_equal_shapes`).
  (r"((o|down)_proj/kernel|from \(.*\))$", ("tensor", "fsdp")),
  (r"(_proj/kernel|to \(.*\))$", ("fsdp", "tensor")),
)


def make_mesh(config: ExperimentConfig, devices=None) -> Mesh:
  """The mesh of a config over all devices, or over those given.

  Raises:
    ValueError: it does not fit the devices, or the batch not the mesh.
  """
  devices = jax.devices() if devices is None else devices
  asked, count = config.mesh, len(devices)
  data = asked.data or max(1, count // (asked.fsdp * asked.tensor))
  shape = data, asked.fsdp, asked.tensor
  if np.prod(shape) != count:
    raise ValueError(
      f"mesh.data x fsdp x tensor = {' x '.join(map(str, shape))}: there are "
      f"{count} devices, and the product must be that"
    )
  parts = config.optimizer.accumulation_steps
  rows = data * asked.fsdp
  if config.data.batch_size % (rows * parts):
    raise ValueError(
      f"data.batch_size = {config.data.batch_size}: must be a multiple of "
      f"mesh.data x mesh.fsdp x optimizer.accumulation_steps = {data} x "
      f"{asked.fsdp} x {parts}"
    )
  # Auto axes: `jax.make_mesh` makes explicit ones, which linen cannot trace.
  return jax.make_mesh(
    shape, MESH_AXES, axis_types=(AxisType.Auto,) * 3, devices=devices
  )


def shardings(mesh: Any, tree: Any, rules: tuple = ()) -> Any:
  """A `NamedSharding` for each array of the tree, by its path.

  Args:
    mesh: of `make_mesh`, or the abstract one of a trace.
    tree: arrays or `jax.ShapeDtypeStruct`s: parameters, optimizer state.
    rules: asked before RULES (`mesh.rules`).
  """

  def laid_out(path, leaf):
    path = path.removeprefix("params/")
    spec = _spec(path, leaf.shape, mesh.shape, (*rules, *RULES))
    return NamedSharding(mesh, spec)

  return jax.tree.unflatten(
    jax.tree.structure(tree),
    [laid_out(*named) for named in by_name(tree).items()],
  )


def check_rules(params: Any, rules: tuple) -> None:
  """ValueError where a pattern of `mesh.rules` is found in no parameter."""
  paths = by_name(params)
  for pattern, _ in rules:
    if not any(re.search(pattern, path) for path in paths):
      raise ValueError(
        f"mesh.rules: {pattern!r} matches no parameter; they are "
        f"{', '.join(paths)}"
      )


def _spec(path: str, shape, sizes, rules) -> PartitionSpec:
  spec = PartitionSpec()
  for pattern, axes in rules:
    if not re.search(pattern, path) or len(axes) > len(shape):
      continue
    wanted = (*(None for _ in shape[len(axes) :]), *axes)
    fitting = [
      axis if size % _count(sizes, axis) == 0 else None
      for axis, size in zip(wanted, shape, strict=True)
    ]
    spec = PartitionSpec(*fitting)
    if fitting == list(wanted):
      break
  return spec


def _count(sizes, axis) -> int:
  """Devices along an axis, some axes, or None."""
  names = (axis,) if isinstance(axis, str) else axis or ()
  return int(np.prod([sizes[name] for name in names], dtype=int))


def parts_of_rows(mesh: Mesh) -> int:
  """Parts that a batch is cut into: it has a multiple of so many rows."""
  return _count(mesh.shape, ROWS)


@functools.cache  # asked at every step
def share_of_rows(mesh: Mesh) -> tuple[int, int]:
  """(index, count): this process loads the index-th of count parts of a batch.

  Processes that only share heads load the same rows.

  Raises:
    ValueError: the rows of this process do not lie beside each other.
  """
  total = parts_of_rows(mesh)
  rows = NamedSharding(mesh, BY_ROW)
  local: Any = rows.addressable_devices_indices_map((total,)).values()
  own = sorted({index[0].start or 0 for index in local})
  first, count = own[0], len(own)
  if own != list(range(first, first + count)) or first % count:
    raise ValueError(
      f"mesh {dict(mesh.shape)}: a process would load the rows {own} of "
      f"{total}, which do not lie beside each other; choose another mesh"
    )
  return first // count, total // count


def place(batch: Any) -> Any:
  """Arrays over the mesh that is set, from this process's share of the rows."""
  mesh = jax.sharding.get_mesh()
  if mesh.empty:
    return batch
  sharding = NamedSharding(mesh, BY_ROW)
  _, parts = share_of_rows(mesh)
  return jax.tree.map(
    lambda x: jax.make_array_from_process_local_data(
      sharding, x, (parts * x.shape[0], *x.shape[1:])
    ),
    batch,
  )


def fetch(tree: Any) -> Any:
  """The arrays whole, on the host of every process."""
  return multihost_utils.process_allgather(tree, tiled=True)


def _active() -> bool:
  """Whether a mesh is set and this is no code for one of its devices."""
  mesh = jax.sharding.get_abstract_mesh()
  return mesh.size > 1 and set(mesh.axis_types) == {AxisType.Auto}


def constrain(x: jax.Array, *axes) -> jax.Array:
  """x, its first dimensions laid over these axes of the mesh."""
  if not _active():
    return x
  return jax.lax.with_sharding_constraint(x, PartitionSpec(*axes))


def constrain_like(tree: Any, rules: tuple = ()) -> Any:
  """The tree, laid out as `shardings` has it."""
  if not _active():
    return tree
  laid_out = shardings(jax.sharding.get_abstract_mesh(), tree, rules)
  return jax.lax.with_sharding_constraint(tree, laid_out)


def spread(stacks: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """Stacks [n, in, out] by name, each matrix whole on one device.

  Zeros fill n up to a multiple of the devices. One axis of the mesh at a time
  goes from a matrix to n: an all-to-all. All at once, the partitioner would
  gather everything everywhere.
  """

  def one(name, x):
    devices = jax.sharding.get_abstract_mesh().size
    x = jnp.pad(x, ((0, -x.shape[0] % devices), (0, 0), (0, 0)))
    for axes in _steps(name, x.shape):
      x = constrain(x, *axes)
    return x

  return (
    {name: one(name, x) for name, x in stacks.items()} if _active() else stacks
  )


def unspread(stacks, like: dict[str, jax.Array]) -> dict[str, jax.Array]:
  """What `spread` had been given, shaped as `like`."""

  def one(name, x):
    for axes in reversed(_steps(name, x.shape)):
      x = constrain(x, *axes)
    return x[: like[name].shape[0]]

  return (
    {name: one(name, x) for name, x in stacks.items()} if _active() else stacks
  )


def _steps(name, shape):
  """Layouts of [n, in, out] from that of its rule to whole matrices."""
  sizes = jax.sharding.get_abstract_mesh().shape
  _, first, second = _spec(name, shape, sizes, RULES)
  axes = [axis for axis in (first, second) if axis]
  rest = [axis for axis in MESH_AXES if axis not in axes]
  return [
    (None, first, second),
    (first, None, second),
    (tuple(axes), None, None),
    ((*axes, *rest), None, None),
  ]


def over_heads(function: Callable, arguments: tuple, results: Any) -> Callable:
  """The function, rows and heads apart: each device runs its own.

  For kernels, which are opaque to the partitioner.

  Args:
    arguments, results: PartitionSpecs, such as TOKENS, STATE and BY_ROW.
  """
  if not _active():
    return function
  return jax.shard_map(
    function,
    in_specs=arguments,
    out_specs=results,
    check_vma=False,  # Pallas calls do not say over which axes they vary
  )
