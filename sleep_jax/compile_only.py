"""What a compiler says of a config, for accelerators that are not there.

  python -m sleep_jax.compile_only --config=experiments/automaton.py:paper \
      --target=v5e-256 --config.mesh.fsdp=8 --json=report.json

Compiles the train step, the sleep of a session and the step by which it
decodes a token, and runs nothing. Needs the extra `compile`.

--target: v5e-N and v6e-N have N chips, v4-N, v5p-N and tpu7x-N N cores, two a
chip, as clouds name them (v5p-8 has 4 chips); of tpu7x each core is a device of
its own, of v4 and v5p a chip. h100 is one GPU.

The train step has the config's batch, mesh and optimizer; the session has
`run.evaluation_batch_size` rows, N passes. For each program:

GiB of a device: arguments, outputs (without those that take the place of
arguments), temporaries; their sum and the code against the device's HBM.
FLOPs: of the algorithm on all devices, by `sleep_jax.flops`, kernels replaced
by plain code. HBM, sent: bytes of a device by `sleep_jax.hlo`, loops by their
trips. Roofline: the largest of FLOPs, HBM and sent bytes at the makers' peaks
(bfloat16; all links busy), and which one it is. No step can take less.

Exit code: 0, or 1 if a program does not compile or fit, or 2 for bad input.
"""

import dataclasses
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from absl import app, flags
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.chips import (
  CHIPS,
  H100_FLOPS,
  compile_only_devices,
)
from sleep_jax import hlo
from sleep_jax.config import ExperimentConfig
from sleep_jax.data.source import task_and_tokenizer, vocabulary_size
from sleep_jax.flops import count_flops
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.parallel.sharding import ROWS, make_mesh, parts_of_rows
from sleep_jax.session import Session, shapes
from sleep_jax.training import optimizers
from sleep_jax.training.step import (
  abstract_batch,
  abstract_state,
  make_train_step,
)


class Peaks(NamedTuple):
  """Of a device: FLOPs a second in bfloat16, bytes a second, bytes of HBM."""

  flops: float
  hbm: float
  sent: float
  capacity: int


class Target(NamedTuple):
  """Devices to compile for."""

  name: str
  platform: str
  devices: list
  peaks: Peaks


@dataclasses.dataclass(frozen=True)
class Program:
  """A jitted function and what it is compiled for."""

  function: Any
  arguments: tuple


@dataclasses.dataclass(frozen=True)
class Report:
  """What is known of a program; bytes and seconds are those of one device.

  Attributes:
    program: its name.
    problem: why it does not compile or fit, or "".
    arguments, outputs, temporaries, peak: bytes; outputs without those that
      take the place of arguments.
    capacity: bytes of HBM.
    flops: on all devices.
    hbm_bytes, sent_bytes: see `hlo.Traffic`.
    compile_seconds: of tracing, lowering and compiling.
    roofline_seconds: by resource.
  """

  program: str
  problem: str
  capacity: int
  compile_seconds: float
  arguments: int = 0
  outputs: int = 0
  temporaries: int = 0
  peak: int = 0
  flops: int = 0
  hbm_bytes: int = 0
  sent_bytes: Mapping[str, float] = dataclasses.field(default_factory=dict)
  roofline_seconds: Mapping[str, float] = dataclasses.field(
    default_factory=dict
  )


# It sends nothing, being alone.
_H100_PEAKS = Peaks(H100_FLOPS, 3.35e12, math.inf, 84_929_347_584)
_MOST_CHIPS = {"v4": 4096, "v5e": 256, "v5p": 8960, "v6e": 256, "tpu7x": 9216}
_SMALL = {4: (2, 2, 1), 8: (2, 2, 2), 16: (2, 2, 4), 32: (2, 4, 4)}


def find_target(name: str) -> Target:
  """The compile-only devices of a --target.

  Raises:
    ValueError: there is no such target, or its compiler is missing.
  """
  if name == "h100":
    return Target(name, "cuda", compile_only_devices(name), _H100_PEAKS)
  generation, shape = slice_shape(name)
  options: dict[str, Any] = {}
  if math.prod(shape) == 1:
    options["chips_per_host_bounds"] = (1, 1, 1)
  if generation == "v4":
    # Else each of a chip's two cores is a device.
    options["chip_config_name"] = "megacore"
  topology = f"{generation}:{'x'.join(map(str, shape))}"
  devices = compile_only_devices(topology, **options)
  chip = CHIPS[generation]
  peaks = Peaks(
    1e12 * chip.teraflops,
    1e9 * chip.gigabytes_per_second,
    1e9 * chip.links_gigabytes_per_second,
    chip.gibibytes * 2**30,
  )
  return Target(name, "tpu", devices, peaks)


def slice_shape(name: str) -> tuple[str, tuple[int, ...]]:
  """("v5e", (4, 8)) of "v5e-32": chips along each axis of the slice's torus.

  Small slices are those that clouds rent; larger ones whole cubes of 4 chips a
  side (flat ones: powers of two), in as cubic a block as can be.

  Raises:
    ValueError: there is no such target.
  """
  generation, _, count = name.partition("-")
  if generation not in CHIPS or not count.isdecimal():
    raise ValueError(
      f"--target={name}: h100, or one of {', '.join(CHIPS)} and a number, as "
      "v5e-16"
    )
  flat, most = generation in ("v5e", "v6e"), _MOST_CHIPS[generation]
  chips = int(count) if flat else int(count) / 2
  if flat and chips in [2**i for i in (0, *range(2, 9))]:
    side = 2 ** (int(math.log2(chips)) // 2)
    return generation, (side, int(chips) // side)
  if not flat and chips in _SMALL:
    return generation, _SMALL[int(chips)]
  if not flat and chips % 64 == 0 and 0 < chips <= most:
    return generation, _cubes(int(chips) // 64)
  counted = (
    "chips: 1, 4, 8, 16, 32, 64, 128 or 256"
    if flat
    else f"cores: 8, 16, 32, 64, or a multiple of 128 up to {2 * most}"
  )
  raise ValueError(f"--target={name}: {generation} counts {counted}")


def _cubes(count: int) -> tuple[int, ...]:
  """Chips along each side of a block of so many cubes, the longest last."""
  divisors = [i for i in range(1, count + 1) if count % i == 0]
  blocks = [
    (a, b, count // (a * b))
    for a in divisors
    for b in divisors
    if count % (a * b) == 0 and a <= b <= count // (a * b)
  ]
  return tuple(4 * side for side in min(blocks, key=lambda sides: sides[2]))


def programs(config: ExperimentConfig, devices) -> tuple[Any, dict]:
  """(the mesh, each `Program` by name) of a config on these devices.

  Raises:
    ValueError: the config does not fit the devices, or its data cannot be used.
  """
  # A size that is stated needs no tokenizer, which need not be here either.
  vocabulary = config.model.vocab_size or vocabulary_size(
    config, task_and_tokenizer(config)[1]
  )
  model = HybridLM(config.model, vocabulary)
  mesh = make_mesh(config, devices)
  rows = config.run.evaluation_batch_size
  if rows % (parts := parts_of_rows(mesh)):
    raise ValueError(
      f"run.evaluation_batch_size = {rows}: must be a multiple of mesh.data x "
      f"mesh.fsdp = {parts}"
    )

  def arrays(tree, laid_out=None):
    if laid_out is None:
      laid_out = jax.tree.map(
        lambda _: NamedSharding(mesh, PartitionSpec()), tree
      )
    return jax.tree.map(
      lambda x, sharding: jax.ShapeDtypeStruct(
        x.shape, x.dtype, sharding=sharding
      ),
      tree,
      laid_out,
    )

  def by_rows(axis):
    return NamedSharding(mesh, PartitionSpec(*[None] * axis, ROWS))

  optimizer = optimizers.optimizer(config.optimizer, max(config.run.steps, 1))
  state = abstract_state(model, optimizer, config, mesh)
  batch = abstract_batch(config)
  batch = arrays(batch, jax.tree.map(lambda _: by_rows(0), batch))
  session = Session(model, config.sleep)
  seen = shapes(session, rows)
  seen = arrays(
    seen,
    # Arrays of blocks are [R, B, ...], all others [B, ...].
    jax.tree.map_with_path(
      lambda path, _: by_rows(
        any(isinstance(key, jax.tree_util.SequenceKey) for key in path)
      ),
      seen,
    ),
  )
  passes = arrays(jax.ShapeDtypeStruct((), jnp.int32))

  def sleep(params, state, passes):
    return session.sleep_now(params, state, passes, None)

  def decode(params, state):
    """As `Session.generate` takes a token, the likeliest."""
    token = jnp.argmax(state.logits, axis=1).astype(jnp.int32)
    valid = jnp.ones((rows, 1), jnp.bool_)
    return session.read(params, state, token[:, None], valid)

  def jitted(function, *arguments):
    return Program(jax.jit(function, donate_argnums=1), arguments)

  train_step = make_train_step(model, optimizer, config)
  found = {"train step": Program(train_step, (state, batch, passes))}
  if config.sleep.eviction != "none":
    found["sleep step"] = jitted(sleep, state.params, seen, passes)
  return mesh, found | {"decode step": jitted(decode, state.params, seen)}


def report(name: str, program: Program, target: Target, mesh, passes) -> Report:
  """Compiles a program for the mesh and says what came of it.

  Args:
    passes: N, which loops of unknown trips count.
  """
  plain = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), program.arguments
  )
  # Without the mesh: for this machine, which has no kernels.
  flops = count_flops(program.function, *plain, unknown_trips=passes)
  capacity, began = target.peaks.capacity, time.perf_counter()
  try:
    with jax.set_mesh(mesh):
      traced = program.function.trace(*program.arguments)
      lowered = traced.lower(lowering_platforms=(target.platform,))
      compiled = lowered.compile()
  except Exception as error:  # whatever a compiler may say
    return Report(
      program=name,
      problem=_reason(error),
      capacity=capacity,
      compile_seconds=time.perf_counter() - began,
    )
  seconds = time.perf_counter() - began
  memory = compiled.memory_analysis()
  outputs = memory.output_size_in_bytes - memory.alias_size_in_bytes
  peak = (
    memory.argument_size_in_bytes
    + outputs
    + memory.temp_size_in_bytes
    + memory.generated_code_size_in_bytes
  )
  traffic = hlo.traffic(compiled.as_text(), mesh.size, passes)
  used = {
    "compute": flops.products / mesh.size / target.peaks.flops,
    "HBM": traffic.hbm / target.peaks.hbm,
    "interconnect": sum(traffic.collectives.values()) / target.peaks.sent,
  }
  problem = ""
  if peak > capacity:
    problem = f"needs {_gib(peak)} GiB a device, which has {_gib(capacity)}"
  return Report(
    program=name,
    problem=problem,
    capacity=capacity,
    compile_seconds=seconds,
    arguments=memory.argument_size_in_bytes,
    outputs=outputs,
    temporaries=memory.temp_size_in_bytes,
    peak=peak,
    flops=flops.total,
    hbm_bytes=traffic.hbm,
    sent_bytes=traffic.collectives,
    roofline_seconds=used,
  )


def _reason(error: Exception) -> str:
  """The first line of what a compiler says, and how much memory it wanted."""
  text = " ".join(str(error).split())
  if found := re.search(r"Used ([\d.]+\w) of ([\d.]+\w) hbm", text):
    return f"needs {found[1]}iB of HBM, of which {found[2]}iB are there"
  return f"{type(error).__name__}: {text[:300]}"


def _gib(size: int) -> str:
  return f"{size / 2**30:.2f}"


def table_row(found: Report) -> str:
  """A row of a Markdown table, as HEADER has it."""
  if not found.peak:
    cells = [found.problem, *[""] * 8, f"{found.compile_seconds:.0f}", ""]
  else:
    limit = max(
      found.roofline_seconds, key=lambda name: found.roofline_seconds[name]
    )
    sent = ", ".join(
      f"{kind} {size / 1e9:.3g}" for kind, size in found.sent_bytes.items()
    )
    cells = [
      found.problem or "yes",
      *map(_gib, (found.arguments, found.outputs, found.temporaries)),
      f"{_gib(found.peak)} of {_gib(found.capacity)}",
      f"{found.flops:.3g}",
      f"{found.hbm_bytes / 1e9:.4g}",
      sent or "nothing",
      f"{found.compile_seconds:.0f}",
      f"{1e3 * found.roofline_seconds[limit]:.4g}, {limit}",
    ]
  return f"| {found.program} | {' | '.join(cells)} |"


HEADER = (
  "| program | fits | arguments GiB | outputs | temporaries | peak | FLOPs "
  "| HBM GB | sent GB | compile s | roofline ms |\n" + "|---" * 11 + "|"
)


def main(_):
  from experiments import main as command
  from sleep_jax.config import from_config_dict

  given = flags.FLAGS
  try:
    config = from_config_dict(command.CONFIG.value)
    target = find_target(given.target)
    mesh, compiled = programs(config, target.devices)
    if given.json:
      open(given.json, "a").close()  # better known before compiling
  except (ValueError, OSError, RuntimeError) as error:
    command.fail(error)
  sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
  print(
    f"{target.name}: {len(target.devices)} x "
    f"{target.devices[0].device_kind}, mesh {sizes}\n\n{HEADER}",
    flush=True,
  )
  found = []
  for name, program in compiled.items():
    passes = config.sleep.passes
    found.append(report(name, program, target, mesh, passes))
    print(table_row(found[-1]), flush=True)
  if given.json:
    record = {
      "target": target.name,
      "devices": len(target.devices),
      "mesh": dict(mesh.shape),
      "programs": [dataclasses.asdict(x) for x in found],
    }
    with open(given.json, "w") as file:
      json.dump(record, file, indent=1)
  sys.exit(any(x.problem for x in found))


if __name__ == "__main__":
  from experiments import main as command

  # Read when the compilers are loaded. Nothing can be measured on a device that
  # is not there; Triton's products, untuned, may not compile, cuBLAS's do.
  os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
  os.environ["XLA_FLAGS"] = " ".join(
    [
      os.environ.get("XLA_FLAGS", ""),
      "--xla_gpu_autotune_level=0",
      "--xla_gpu_enable_triton_gemm=false",
    ]
  )
  jax.config.update("jax_platforms", "cpu")
  flags.DEFINE_string("target", "v5e-1", "v4-N v5e-N v5p-N v6e-N tpu7x-N h100")
  flags.DEFINE_string("json", "", "also write the report to this file")
  app.run(main, flags_parser=command.parse)
