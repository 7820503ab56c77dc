"""Times the implementations of the gated delta rule, and the peers beside us.

  python -m pallas_kernels.gated_delta.benchmark --shapes=tiny,mid,long

Milliseconds of the forward pass, and of the forward and backward pass with
gradients of all six inputs: the median over the rounds, and the shortest. In
each round every implementation has its turn, so that a busy machine is busy for
all. Peers: the PyTorch functions of `transformers` (qwen3_next), if installed;
the error is the largest in o and S against "reference" in the same precision.
"""

import argparse
import functools
import importlib
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.gated_delta.api import available, gated_delta_rule
from pallas_kernels.gated_delta.shapes import SHAPES, Shape, random_inputs

# A token at a time, its backward pass keeps every state.
_SLOW_LENGTH = 64


def ours(name: str, arrays: list[np.ndarray]) -> dict[str, Callable]:
  """What to time, as functions without arguments that end when it is done."""
  rule = functools.partial(gated_delta_rule, implementation=name)
  arguments = [jnp.asarray(x) for x in arrays]

  def loss(*arguments):
    o, state = rule(*arguments)
    return jnp.sum(o) + jnp.sum(state)

  forward = jax.jit(rule)
  both = jax.jit(jax.value_and_grad(loss, argnums=range(6)))
  return {
    "forward": lambda: jax.block_until_ready(forward(*arguments)),
    "forward + backward": lambda: jax.block_until_ready(both(*arguments)),
  }


def torch_peer(arrays: list[np.ndarray]) -> dict[str, Callable] | None:
  """The same for transformers' chunked function; None if it is not there."""
  try:
    torch = importlib.import_module("torch")
    peer = importlib.import_module(
      "transformers.models.qwen3_next.modeling_qwen3_next"
    )
  except ImportError:
    return None
  rule = peer.torch_chunk_gated_delta_rule
  rule = getattr(rule, "__wrapped__", rule)  # without a hub kernel's dispatch

  def run(q, k, v, g, beta, state):
    return rule(q, k, v, g, beta, initial_state=state, output_final_state=True)

  leaves = [torch.from_numpy(x).requires_grad_(True) for x in arrays]

  def forward():
    with torch.no_grad():
      return [x.numpy() for x in run(*leaves)]

  def both():
    for leaf in leaves:
      leaf.grad = None
    o, state = run(*leaves)
    (o.sum() + state.sum()).backward()

  return {"forward": forward, "forward + backward": both}


def benchmark(shape: Shape, rounds: int) -> list[tuple]:
  """Rows of (implementation, what, median ms, least ms, largest error)."""
  arrays = random_inputs(shape)
  runs = {name: ours(name, arrays) for name in available()}
  if peer := torch_peer(arrays):
    runs["transformers torch_chunk"] = peer
  if shape.length > _SLOW_LENGTH:
    del runs["reference"]["forward + backward"]
  expected = runs["reference"]["forward"]()
  errors = {
    name: max(
      np.abs(np.asarray(x) - np.asarray(y)).max()
      for x, y in zip(run["forward"](), expected, strict=True)
    )
    for name, run in runs.items()
  }
  rows = []
  for what in ("forward", "forward + backward"):
    timed = {name: run[what] for name, run in runs.items() if what in run}
    times: dict[str, list[float]] = {name: [] for name in timed}
    for round_ in range(-1, rounds):  # one to compile and to warm up
      for name, function in timed.items():
        start = time.perf_counter()
        function()
        if round_ >= 0:
          times[name].append(1e3 * (time.perf_counter() - start))
    rows += [
      (name, what, statistics.median(ms), min(ms), errors[name])
      for name, ms in times.items()
    ]
  return rows


def report(names, rounds: int) -> None:
  """Prints the times at the named shapes."""
  for name in names:
    print(f"{name}: {SHAPES[name]}")
    for row in benchmark(SHAPES[name], rounds):
      print("  {:26} {:19} {:9.2f} ms (least {:9.2f}) {:8.1e}".format(*row))


def main() -> None:
  parser = argparse.ArgumentParser(
    prog="python -m pallas_kernels.gated_delta.benchmark",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  parser.add_argument("--shapes", default=",".join(SHAPES))
  parser.add_argument("--rounds", type=int, default=10)
  arguments = parser.parse_args()
  names = arguments.shapes.split(",")
  if unknown := set(names) - SHAPES.keys():
    parser.error(f"--shapes: {sorted(unknown)} not among {sorted(SHAPES)}")
  if arguments.rounds < 1:
    parser.error(f"--rounds={arguments.rounds}: must be at least 1")
  device = jax.devices()[0]
  print(f"{device.platform} {device.device_kind}, float32")
  report(names, arguments.rounds)


if __name__ == "__main__":
  main()
