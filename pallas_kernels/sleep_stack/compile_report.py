"""Compiles a sleep, in one kernel and scanned, for TPUs that are not there.

  python -m pallas_kernels.sleep_stack.compile_report --target=v5e

Nothing is run. Needs the extra `compile`. The case is `automaton:paper`'s: 512
rows of 24 tokens. A row for each dtype, N and form: the kernel, or the scan
over passes with the rule's own kernel. The kernel is compiled once, its loop
over passes counted N times; so is the scan's pass, compiled by itself and each
repeat of the pattern too.

HBM MB: what each operation reads and writes there, the kernel among them;
arrays that XLA keeps in VMEM from one operation to the next are left out.

Cycles: of the kernel its bundles, each level of loops by its trips, if none
stalls. Of the scan XLA's own estimates for its operations, and the bundles of
the rule's kernel by its steps. us: the cycles at the clock; the time of HBM at
its peak rate; that of the matrix units for the FLOPs in one bfloat16 pass.

Spills: vector registers stored and loaded, as listed in the code of the kernel,
or of the rule's. Temporaries: XLA's, outside of kernels.

JAX_DEFAULT_MATMUL_PRECISION=highest in the environment compiles products of
float32 for full precision; else they take one bfloat16 pass, as XLA's do.
"""

import dataclasses
import functools
import glob
import importlib
import importlib.util
import itertools
import math
import os
import re
import tempfile
from typing import NamedTuple

from pallas_kernels.chips import CHIPS, compile_only_devices
from pallas_kernels.gated_delta.compile_report import (
  command_line,
  tpu_kernel,
)

BATCH = 512
PASSES = (1, 4)
DTYPES = ("float32", "bfloat16")
# Bytes of an element, by XLA's name for its type.
ITEM_SIZES = dict(f32=4, bf16=2, s32=4, u32=4, s8=1, u8=1, pred=1)
# Operations that move nothing, or whose end is counted at their start.
FREE = (
  *("parameter", "constant", "bitcast", "tuple", "get-tuple-element"),
  *("copy-done", "slice-done"),
)


def main() -> None:
  target, only = command_line(
    "pallas_kernels.sleep_stack.compile_report", __doc__, list(CHIPS)
  )
  with tempfile.TemporaryDirectory() as dump:
    # Read when jax and the compiler are loaded, so jax comes after.
    os.environ.update(
      JAX_PLATFORMS="cpu",
      TPU_SKIP_MDS_QUERY="1",
      LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
    )
    report(target, only, dump)


def window_length():
  automaton = importlib.import_module("experiments.automaton")
  return automaton.paper().sleep.window_length


def compile_case(device, dump, config, passes, kernel):
  """The compiled sleep of a window; the dump is of this compilation alone.

  Args:
    kernel: all passes in one kernel, or scanned with the rule's.
  """
  jax = importlib.import_module("jax")
  layout = importlib.import_module("jax.experimental.layout")
  fast_weights = importlib.import_module("sleep_jax.model.fast_weights")
  model = importlib.import_module("sleep_jax.model.hybrid_lm").HybridLM
  settings = importlib.import_module("sleep_jax.config")
  sleep = importlib.import_module("sleep_jax.sleep")
  trial = importlib.import_module("pallas_kernels.sleep_stack.trial")
  for path in glob.glob(f"{dump}/*"):
    os.remove(path)
  tokens = BATCH, window_length()
  sharding = jax.sharding.SingleDeviceSharding(device)

  def array(x):
    # In the order of its axes: XLA would put the batch of S last here, where S
    # begins, and copy it for kernels.
    order = layout.Format(layout.Layout(tuple(range(x.ndim))), sharding)
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=order)

  h = jax.ShapeDtypeStruct((*tokens, config.width), config.compute_dtype)
  state = jax.eval_shape(
    functools.partial(fast_weights.init_fast_weights, config, BATCH)
  )
  valid = jax.ShapeDtypeStruct(tokens, bool)
  row_passes = jax.ShapeDtypeStruct(tokens[:1], "int32")
  params = trial.parameter_shapes(config)
  arguments = params, h, state, valid, row_passes
  arguments = jax.tree.map(array, arguments)
  # On this machine's own backend the door would choose plain XLA.
  served = dataclasses.replace(config, implementation="pallas_tpu")
  options = model(served, 1), passes, settings.SleepConfig(passes=passes)
  if kernel:
    function = functools.partial(sleep.one_kernel, *options, False)
  else:
    function = functools.partial(sleep.scanned, *options)
  outputs = jax.tree.map(lambda x: x.format, arguments[1:3])
  lowered = (
    jax.jit(function, out_shardings=outputs)
    .trace(*arguments)
    .lower(lowering_platforms=("tpu",))
  )
  return lowered.compile()


def hbm_bytes(compiled):
  """What the operations of a compiled function read and write in HBM.

  Those of its entry computation: it has no loops.
  """
  entry = compiled.as_text().split("\nENTRY ")[1].split("\n}")[0]
  sizes, total = {}, 0
  pattern = r"\s*(?:ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*?)\)(?:,|$)"
  array = r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?"
  for name, shape, kind, operands in re.findall(pattern, entry, re.M):
    parts = [
      (ITEM_SIZES[dtype] * math.prod(int(n) for n in dims.split(",") if n), at)
      for dtype, dims, at in re.findall(array, shape)
    ]
    # S(1) is VMEM, S(2) scalar memory.
    sizes[name] = sum(size for size, at in parts if "S(" not in at)
    if kind.endswith("-start"):
      # Between HBM and VMEM, of a whole or a slice: it names both ends, and a
      # word to wait for.
      total += min(size for size, _ in parts[:2])
    elif kind not in FREE:
      read = re.findall(r"%([\w.-]+)", operands)
      total += sizes[name] + sum(sizes.get(x, 0) for x in read)
  return total


class Row(NamedTuple):
  """What is known of a sleep: HBM bytes, cycles, (stores, fills), bytes."""

  traffic: float
  cycles: float
  spills: tuple[int, int]
  temporaries: int


def kernel_rows(device, dump, config) -> dict[int, Row]:
  """By N. The passes are a rolled loop: N > 1 changes nothing but its trips."""
  kernels = importlib.import_module("pallas_kernels.sleep_stack.pallas_tpu")
  compiled = compile_case(device, dump, config, max(PASSES), kernel=True)
  depths, steps, stores, fills = tpu_kernel(dump, "sleep_stack")
  stack = kernels.Stack.of(config, BATCH, window_length(), max(PASSES))
  ((_, repeats),) = config.pattern
  # Loops of one trip are none.
  inside = [i for i in (repeats, stack.groups) if i > 1]
  return {
    passes: Row(
      hbm_bytes(compiled),
      sum(
        bundles * math.prod([steps, passes, *inside][:depth])
        for depth, bundles in depths.items()
      ),
      (stores, fills),
      compiled.memory_analysis().temp_size_in_bytes,
    )
    for passes in PASSES
  }


def scan_row(device, dump, config) -> Row:
  """Of one pass."""
  # Each repeat by itself: what is said of a loop is for one trip.
  ((kinds, repeats),) = config.pattern
  flat = dataclasses.replace(config, pattern=((kinds, 1),) * repeats)
  compiled = compile_case(device, dump, flat, 1, kernel=False)
  depths, steps, stores, fills = tpu_kernel(dump)
  # Those of computations inside fusions are in the fusions' own.
  entry = compiled.as_text().split("\nENTRY ")[1]
  estimates = re.findall(r'"estimated_cycles":"(\d+)"', entry)
  rules = kinds.count("gdn") * repeats
  return Row(
    hbm_bytes(compiled),
    sum(map(int, estimates)) + rules * (depths[0] + depths[1] * steps),
    (stores, fills),
    compiled.memory_analysis().temp_size_in_bytes,
  )


def report(target, only, dump):
  """Prints a row of a Markdown table for each case."""
  automaton = importlib.import_module("experiments.automaton")
  kernels = importlib.import_module("pallas_kernels.sleep_stack.pallas_tpu")
  trial = importlib.import_module("pallas_kernels.sleep_stack.trial")
  chip = CHIPS[target]
  device = compile_only_devices(target)[0]
  units = 1e6 * chip.teraflops  # FLOPs a microsecond
  print(
    "| case | HBM MB | cycles, thousands | us | HBM us | units us | spill "
    "stores, fills | temporaries |"
  )
  print("|---|---|---|---|---|---|---|---|")
  for dtype, form in itertools.product(DTYPES, ("kernel", "scan")):
    if not re.search(only, f"{dtype} {form}"):
      continue
    config = dataclasses.replace(automaton.paper().model, compute_dtype=dtype)
    if form == "kernel":
      rows = kernel_rows(device, dump, config)
    else:
      one = scan_row(device, dump, config)
      rows = {
        n: one._replace(traffic=n * one.traffic, cycles=n * one.cycles)
        for n in PASSES
      }
    for passes, row in rows.items():
      stack = kernels.Stack.of(config, BATCH, window_length(), passes)
      flops = kernels.flops(stack, trial.parameter_shapes(config))
      print(
        f"| {dtype}, N = {passes}, {form} | {row.traffic / 1e6:.0f} "
        f"| {row.cycles / 1e3:.0f} | {row.cycles / chip.gigahertz / 1e3:.0f} "
        f"| {row.traffic / chip.gigabytes_per_second / 1e3:.0f} "
        f"| {flops / units:.0f} | {row.spills[0]}, {row.spills[1]} "
        f"| {row.temporaries / 2**20:.1f} MiB |",
        flush=True,
      )


if __name__ == "__main__":
  main()
