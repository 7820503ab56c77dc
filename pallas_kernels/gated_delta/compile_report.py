"""Compiles the kernels for accelerators that are not there, and reports.

  python -m pallas_kernels.gated_delta.compile_report --target=v5e
  python -m pallas_kernels.gated_delta.compile_report --target=h100

Nothing is run. Needs the extra `compile` (libtpu for TPUs, JAX's CUDA plug-in
and ptxas for the H100).

For a TPU, a row for each kernel: bundles of a step of the grid, the steps, the
time of both at the clock below if no bundle stalls (of the backward kernel over
several chunks an upper bound: its two walks share the code, and all of it is
counted at each step), and two floors: HBM, for inputs and outputs once, and
matrix units, for the products of the algorithm in one bfloat16 pass, where a
product (M, K) x (K, N) takes ceil(K / A) ceil(N / A) max(M, A) A^2 multiplies
of units of side A. Then spills, by vector registers stored and loaded in a
step, and XLA's temporaries outside of the kernel. For the H100: registers,
bytes spilled, the shared memory of a program as the compiled launch asks for it
and the most that there is, and tensor-core instructions.
"""

import argparse
import collections
import glob
import importlib
import itertools
import math
import os
import re
import shutil
import subprocess
import tempfile

from pallas_kernels.chips import (
  CHIPS,
  H100,
  check_compiler,
  compile_only_devices,
)


def matrix_floor(shape, direction, chip):
  """Microseconds of the matrix units for the algorithm's products."""
  chunk = min(shape.length, 128)
  packed = max(
    i
    for i in range(1, shape.heads + 1)
    if shape.heads % i == 0 and (i == 1 or i * chunk <= chip.side)
  )
  rows, keys, values = packed * chunk, packed * shape.key_dim, shape.value_dim
  inside = (rows, rows, values)
  gram, state = (rows, keys, rows), (rows, keys, values)
  update, back = (keys, rows, values), (rows, values, keys)
  joins = [(rows, rows, rows)] * 2 * math.ceil(math.log2(max(chunk / 8, 1)))
  products = [*joins, gram, gram, state, inside]
  if direction == "forward":
    products += [state, inside, update]
  else:
    products += [inside, inside, state, update, update]
    products += [(rows, values, rows)] * 2 + [back] * 3
    products += [(rows, rows, keys)] * 4
  side = chip.side
  multiplies = sum(
    math.ceil(k / side) * math.ceil(n / side) * max(m, side) * side**2
    for m, k, n in products
  )
  tiles = shape.batch * shape.heads // packed * math.ceil(shape.length / chunk)
  each = chip.units * chip.cores * side**2 * chip.gigahertz * 1e3
  return tiles * multiplies / each


def tpu_kernel(dump, name="gated_delta_"):
  """(bundles by loop depth, grid steps, spill stores, fills) from a dump."""
  (table,) = glob.glob(
    f"{dump}/*{name}*final_hlo-static-per-bundle-utilization.txt"
  )
  with open(table) as file:
    lines = file.read().splitlines()
  names = [name.strip() for name in lines[1].split(",")]
  # The first row of numbers is the capacity.
  rows = [
    [int(x) for x in line.split()]
    for line in lines[2:]
    if line.strip() and line.split()[0].isdigit()
  ][1:]
  totals = dict(zip(names, map(sum, zip(*rows, strict=True)), strict=True))
  code = ""
  for path in glob.glob(
    re.sub(r"-\d+-final_hlo.*", "-*-final_bundles.txt", table)
  ):
    if "schedule-analysis" not in path:
      with open(path) as file:
        code += file.read()
  bundle = r"^\s*0x[0-9a-f]+\s+(?:[A-Z]{2})?\s*:\s*(>*)\s*\{"
  depths = collections.Counter(map(len, re.findall(bundle, code, re.M)))
  exits = re.findall(
    r"scmp\.\w+\.s32\.totalorder \S+ (\d+) /\* loop exit", code
  )
  # The pipeline of copies runs two steps ahead of the grid.
  steps = max((int(x) for x in exits), default=3) - 2
  return depths, steps, totals["VSTORE:SPILL"], totals["VLOAD:FILL"]


def gpu_kernels(dump):
  """Of each: name, registers, bytes spilled, KiB of shared memory, products.

  Products are tensor-core instructions.
  """
  (limit,) = re.findall(r"shared_memory_per_block_optin: (\d+)", H100)
  for path in sorted(glob.glob(f"{dump}/*.ptx")):
    said = subprocess.run(
      ["ptxas", "-v", "-arch=sm_90a", path, "-o", os.devnull],
      capture_output=True,
      text=True,
    ).stderr
    with open(path) as file:
      products = len(re.findall(r"wgmma\.mma_async", file.read()))
    # The host's launch: sizes of grid, cluster and block, then the memory.
    launch = r"@mosaic_gpu_\w+\(ptr \S+(?:, i32 \d+){9}, i32 (\d+)"
    with open(f"{path.removesuffix('.ptx')}.ll") as file:
      (shared,) = re.findall(launch, file.read())
    shared = f"{int(shared) / 1024:.1f} of {int(limit) / 1024:.0f}"
    pattern = (
      r"entry function '(\w+)_mosaic_gpu_kernel'.*?(\d+) bytes spill stores, "
      r"(\d+) bytes spill loads.*?Used (\d+) registers"
    )
    for name, stores, loads, used in re.findall(pattern, said, re.S):
      yield name, int(used), int(stores) + int(loads), shared, products


def command_line(module, description, targets):
  """(target, pattern of case names); what is missing or wrong ends it.

  Args:
    module: its name, as `python -m` takes it.
    targets: what --target may be; the compiler of each must be there.
  """
  parser = argparse.ArgumentParser(
    prog=f"python -m {module}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--target", choices=targets, default="v5e")
  parser.add_argument("--only", default="", help="a pattern of case names")
  arguments = parser.parse_args()
  try:
    check_compiler(arguments.target)
  except ValueError as error:
    parser.error(str(error))
  if arguments.target == "h100" and shutil.which("ptxas") is None:
    parser.error("ptxas is not on the PATH: it comes with CUDA's nvcc")
  try:
    re.compile(arguments.only)
  except re.error as error:
    parser.error(f"--only={arguments.only}: {error}")
  return arguments.target, arguments.only


def main() -> None:
  target, only = command_line(
    "pallas_kernels.gated_delta.compile_report", __doc__, [*CHIPS, "h100"]
  )
  with tempfile.TemporaryDirectory() as dump:
    # Read when jax and the compilers are loaded, so jax comes after.
    os.environ.update(
      JAX_PLATFORMS="cpu",
      TPU_SKIP_MDS_QUERY="1",
      LIBTPU_INIT_ARGS=f"--xla_jf_dump_to={dump} --xla_jf_dump_llo_text=true",
      MOSAIC_GPU_DUMP_TO=dump,
      MOSAIC_GPU_DUMP_PTX="1",
      MOSAIC_GPU_DUMP_HOST_LLVM="1",
    )
    if target == "h100":
      os.environ["XLA_FLAGS"] = "--xla_gpu_autotune_level=0"
    report(target, only, dump)


def report(target, only, dump):
  """Prints a row of a Markdown table for each case."""
  jax = importlib.import_module("jax")
  cases = importlib.import_module("pallas_kernels.gated_delta.compile_cases")
  devices = compile_only_devices(target)
  if target == "h100":
    implementation, platform = "pallas_gpu", "cuda"
    print(
      "| case | kernel | registers | spilled bytes | shared memory, KiB "
      "| wgmma | temporaries |"
    )
    print("|---|---|---|---|---|---|---|")
  else:
    implementation, platform = "pallas_tpu", "tpu"
    print(
      "| case | bundles a step | steps | us | floor: units, HBM us | of floor "
      "| spill stores, fills | temporaries |"
    )
    print("|---|---|---|---|---|---|---|---|")
  for name, direction in itertools.product(cases.SHAPES, cases.DIRECTIONS):
    shape, case = cases.SHAPES[name], f"{name} {direction}"
    if not re.search(only, case):
      continue
    for path in glob.glob(f"{dump}/*"):
      os.remove(path)
    make = cases.CASES[f"{implementation}_{name}_{direction}"]
    function, structs = make(devices)
    lowered = (
      jax.jit(function).trace(*structs).lower(lowering_platforms=(platform,))
    )
    memory = lowered.compile().memory_analysis()
    temporaries = f"{memory.temp_size_in_bytes / 2**20:.1f} MiB"
    if target == "h100":
      for kernel in gpu_kernels(dump):
        print("|", case, "|", *(f"{x} |" for x in kernel), temporaries, "|")
      continue
    chip = CHIPS[target]
    depths, steps, stores, fills = tpu_kernel(dump)
    # Of one core: where a chip has two, the compiled loop is for its share.
    microseconds = depths[1] * steps / chip.gigahertz / 1e3
    units = matrix_floor(shape, direction, chip)
    traffic = memory.argument_size_in_bytes + memory.output_size_in_bytes
    hbm = traffic / chip.gigabytes_per_second / 1e3
    print(
      f"| {case} | {depths[1]} | {steps} | {microseconds:.0f} | {units:.0f}, "
      f"{hbm:.0f} | {microseconds / max(units, hbm):.2f} | {stores}, {fills} "
      f"| {temporaries} |",
      flush=True,
    )


if __name__ == "__main__":
  main()
