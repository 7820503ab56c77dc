"""Holds every implementation that runs here to the contract, and times them.

  python -m pallas_kernels.gated_delta.check

For each implementation, dtype, length and case: the largest error of values
and of six gradients against numpy float64, relative to the largest entry.
Then what an unnamed implementation would be, and milliseconds as in
`benchmark`. Exits with 1 if an error exceeds its tolerance.
"""

import argparse
import functools
import sys

import jax
import jax.numpy as jnp

from pallas_kernels.gated_delta import api, benchmark, contract, shapes

# By dtype of q, k and v. Under strong decay the running total of g reaches
# thousands, whose differences float32 resolves to 1e-4.
TOLERANCES = {"float32": 5e-4, "bfloat16": 0.03}
# A case at each length would take an hour of compiling.
_CASE_LENGTH = 64


def failures(name: str, lengths, cases) -> list[str]:
  """What an implementation gets wrong, a line each; prints all it finds."""
  rule = functools.partial(api.gated_delta_rule, implementation=name)
  found = []
  runs = [(length, "random") for length in lengths]
  runs += [(_CASE_LENGTH, case) for case in cases if case != "random"]
  for dtype, tolerance in TOLERANCES.items():
    for length, case in runs:
      arrays = contract.inputs(length, case, key=64, value=128)
      errors = contract.errors(rule, arrays, jnp.dtype(dtype))
      worst = max(errors, key=lambda x: errors[x])
      line = (
        f"{name} {dtype} T = {length} {case}: {errors[worst]:.1e} in {worst}"
      )
      # Not `>`: NaN is too much.
      if not all(error <= tolerance for error in errors.values()):
        line += f", more than {tolerance}"
        found.append(line)
      print(line, flush=True)
  return found


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.gated_delta.check",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--rounds", type=int, default=10, help="0: no times")
  arguments = parser.parse_args()
  if arguments.rounds < 0:
    parser.error(f"--rounds={arguments.rounds}: must be at least 0")
  device = jax.devices()[0]
  print(f"{device.platform} {device.device_kind}")
  found = []
  for name in api.available():
    found += failures(name, contract.LENGTHS, contract.CASES)
  low = [jnp.asarray(x, jnp.float32) for x in contract.inputs(24)]
  print("unnamed: {}, because {}".format(*api.choose(*low)))
  if arguments.rounds:
    benchmark.report(shapes.SHAPES, arguments.rounds)
  if found:
    sys.exit("\n".join(["Failed:", *found]))


if __name__ == "__main__":
  main()
