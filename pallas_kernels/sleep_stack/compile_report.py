"""Compiles a sleep, in one kernel and scanned, for TPUs that are not there.

  python -m pallas_kernels.sleep_stack.compile_report --target=v5e

Nothing is run. Needs the extra `compile`. The case is `automaton:paper`'s: 512
rows of 24 tokens. A row for each form, dtype and N:

HBM: of the kernel what goes in and out, once. Of the scan what XLA counts as
accessed in one pass by all its operations (inputs and outputs of the rule's
kernel among them), times N; what a fusion keeps in VMEM for the next is
counted by XLA where it says so, and is therefore an upper bound of traffic.

Cycles: of the kernel its bundles, each level of loops by its trips. Of the
scan, XLA's own estimate of each operation of a pass, plus the bundles of the
rule's kernel by its steps, times N. us: those at the clock, or HBM at its peak
rate, whichever is longer. Units: the time of the matrix units for the FLOPs at
one bfloat16 pass.

Spills: vector registers stored and loaded, as listed in the code. Temporaries:
XLA's, outside of the kernel; of the scan, in one pass.
"""

import argparse
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

from pallas_kernels.gated_delta.compile_report import CHIPS, tpu_kernel

BATCH = 512
PASSES = (1, 4)
PRECISIONS = {
  "float32": "default",
  "float32, exact products": "highest",
  "bfloat16": "default",
}


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.sleep_stack.compile_report",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--target", choices=list(CHIPS), default="v5e")
  parser.add_argument("--only", default="", help="a pattern of case names")
  arguments = parser.parse_args()
  if importlib.util.find_spec("libtpu") is None:
    parser.error("libtpu is missing: pip install -e '.[compile]'")
  try:
    re.compile(arguments.only)
  except re.error as error:
    parser.error(f"--only={arguments.only}: {error}")
  with tempfile.TemporaryDirectory() as dump:
    # Read when jax and the compiler are loaded, so jax comes after.
    os.environ.update(
      JAX_PLATFORMS="cpu",
      TPU_SKIP_MDS_QUERY="1",
      LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
    )
    report(arguments.target, arguments.only, dump)


def compile_case(topology, config, passes, precision, kernel):
  """The compiled sleep of a window, and its stack.

  Args:
    kernel: all passes in one kernel, or scanned with the rule's.
  """
  jax = importlib.import_module("jax")
  jnp, layout = jax.numpy, importlib.import_module("jax.experimental.layout")
  api = importlib.import_module("pallas_kernels.gated_delta.api")
  automaton = importlib.import_module("experiments.automaton")
  fast_weights = importlib.import_module("sleep_jax.model.fast_weights")
  model = importlib.import_module("sleep_jax.model.hybrid_lm").HybridLM
  rules = importlib.import_module("sleep_jax.model.update_rules").UPDATE_RULES
  sleep = importlib.import_module("sleep_jax.sleep")
  length = automaton.paper().sleep.window_length
  # On this machine's own backend the door would choose plain XLA.
  rules["on_tpu"] = dataclasses.replace(
    rules[config.update_rule],
    chunkwise=functools.partial(
      api.gated_delta_rule, implementation="pallas_tpu"
    ),
  )
  served = (
    config if kernel else dataclasses.replace(config, update_rule="on_tpu")
  )
  sharding = jax.sharding.SingleDeviceSharding(topology.devices[0])

  def array(x, dtype=None):
    # In the order of its axes: else XLA sees fit to put the batch last, here
    # where S begins, and copies it.
    order = layout.Format(layout.Layout(tuple(range(x.ndim))), sharding)
    return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=order)

  state = jax.eval_shape(
    functools.partial(fast_weights.init_fast_weights, config, BATCH)
  )
  one = jax.eval_shape(
    functools.partial(fast_weights.init_fast_weights, config, 1)
  )
  token = jax.ShapeDtypeStruct((1, 1), jnp.int32)
  params = jax.eval_shape(
    model(config, 1).init,
    jax.random.key(0),
    token,
    one,
    jax.ShapeDtypeStruct((1, 1), bool),
  )["params"]
  params = {k: v for k, v in params.items() if k.startswith("group_")}
  h = jax.ShapeDtypeStruct((BATCH, length, config.width), config.compute_dtype)
  masks = [jax.ShapeDtypeStruct(s, bool) for s in ((BATCH, length), (BATCH,))]
  arguments = jax.tree.map(array, (params, h, state, *masks))

  def function(*arguments):
    if kernel:
      return sleep.one_kernel(model(config, 1), passes, False, *arguments)
    return sleep.scanned(model(served, 1), passes, *arguments)

  outputs = jax.tree.map(lambda x: x.sharding, (arguments[1], arguments[2]))
  with jax.default_matmul_precision(precision):
    lowered = (
      jax.jit(function, out_shardings=outputs)
      .trace(*arguments)
      .lower(lowering_platforms=("tpu",))
    )
  return lowered.compile()


def report(target, only, dump):
  """Prints a row of a Markdown table for each case."""
  topologies = importlib.import_module("jax.experimental.topologies")
  automaton = importlib.import_module("experiments.automaton")
  kernels = importlib.import_module("pallas_kernels.sleep_stack.pallas_tpu")
  chip = CHIPS[target]
  topology = topologies.get_topology_desc(chip.topology, platform="tpu")
  paper = automaton.paper()
  length = paper.sleep.window_length
  print(
    "| case | N | form | HBM MB | cycles, thousands | us | units us | spill "
    "stores, fills | temporaries |"
  )
  print("|---|---|---|---|---|---|---|---|---|")
  for (name, precision), passes, form in itertools.product(
    PRECISIONS.items(), PASSES, ("kernel", "scan")
  ):
    if not re.search(only, f"{name} N = {passes} {form}"):
      continue
    for path in glob.glob(f"{dump}/*"):
      os.remove(path)
    config = dataclasses.replace(paper.model, compute_dtype=name.split(",")[0])
    if form == "kernel":
      compiled = compile_case(topology, config, passes, precision, True)
      memory = compiled.memory_analysis()
      traffic = memory.argument_size_in_bytes + memory.output_size_in_bytes
      depths, steps, *spills = tpu_kernel(dump, "sleep_stack")
      stack = kernels.Stack.of(config, BATCH, length, passes)
      ((_, repeats),) = config.pattern
      # Loops of one trip are none.
      trips = [i for i in (passes, repeats, stack.groups) if i > 1]
      cycles = depths[0] + sum(
        depths[i + 1] * steps * math.prod(trips[:i])
        for i in range(len(trips) + 1)
      )
    else:
      # Each repeat by itself: what XLA says of a loop is for one trip.
      ((kinds, repeats),) = config.pattern
      flat = dataclasses.replace(config, pattern=((kinds, 1),) * repeats)
      compiled = compile_case(topology, flat, 1, precision, False)
      memory = compiled.memory_analysis()
      traffic = passes * compiled.cost_analysis()["bytes accessed"]
      depths, steps, *spills = tpu_kernel(dump)
      entry = compiled.as_text().split("\nENTRY ")[1].split("\n}")[0]
      estimates = re.findall(r'"estimated_cycles":"(\d+)"', entry)
      rules = kernels.Stack.of(config, BATCH, length, 1).kinds.count("gdn")
      cycles = passes * (
        sum(map(int, estimates)) + rules * (depths[0] + depths[1] * steps)
      )
    print(
      form, name, passes, traffic, cycles, spills, memory.temp_size_in_bytes
    )


if __name__ == "__main__":
  main()
