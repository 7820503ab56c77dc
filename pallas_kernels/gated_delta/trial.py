"""Whether a kernel gives the right answers on this very device.

The kernels were interpreted on CPUs and compiled for accelerators by those who
wrote them, but run on none. So before one is chosen, it has a trial.
"""

import concurrent.futures
import functools

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

from pallas_kernels.gated_delta import contract

# Largest difference, relative to the largest entry: products of bfloat16
# inputs round differently, float32 differs by the order of sums.
TOLERANCES = {"bfloat16": 0.03, "float32": 1e-3}


@functools.cache
def verdict(kernel, trusted, dtype: str) -> str | None:
  """Why not to use `kernel` on this device; None if it may be used.

  Values and gradients are compared with those of `trusted`, for short windows
  with packed heads and for several chunks. The answer is kept, and one for all
  processes: they must run the same program. A refusal is logged once.

  Args:
    kernel, trusted: (q, k, v, g, beta, initial_state) -> (o, final_state).
    dtype: of q, k and v, a name in TOLERANCES.
  """
  reason = everywhere(
    functools.partial(_compare, kernel, trusted, jnp.dtype(dtype))
  )
  if reason is not None:
    logging.warning(
      "gated_delta_rule: no kernel on %s, chunked_xla instead: %s",
      jax.local_devices()[0].device_kind,
      reason,
    )
  return reason


def everywhere(compare):
  """What `compare` finds, None or a reason, as one answer of all processes."""
  # The caller may be in the midst of a trace, which is a thread's own.
  with concurrent.futures.ThreadPoolExecutor(1) as thread:
    return thread.submit(_agree, compare).result()


def _agree(compare):
  reason = compare()
  if jax.process_count() > 1:
    failed = multihost_utils.process_allgather(np.array(reason is not None))
    if failed.any() and reason is None:
      reason = "it failed its trial in another process"
  return reason


def _compare(kernel, trusted, dtype):
  for length in (24, 200):
    arrays = contract.inputs(length, key=64, value=128)
    low = contract.rounded(arrays, dtype)

    @functools.partial(jax.jit, static_argnums=0)
    def run(rule, *arrays):
      outputs, vjp = jax.vjp(rule, *arrays)
      return *outputs, *vjp(jax.tree.map(jnp.ones_like, outputs))

    try:
      mine = jax.device_get(run(kernel, *low))
    except Exception as error:  # whatever a compiler or driver may say
      return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    theirs = jax.device_get(run(trusted, *low))
    for name, difference in contract.differences(mine, theirs).items():
      # Not `>`: NaN fails too.
      if not difference <= TOLERANCES[dtype.name]:
        return f"{name} differs by {difference:.1e} for T = {length}"
  return None
