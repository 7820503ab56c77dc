"""Starting a run of several processes, and ending it when one is missing."""

import os
import sys
import threading

import jax
from absl import logging
from jax.experimental import multihost_utils


def start(
  timeout_seconds: int,
  coordinator: str | None = None,
  processes: int | None = None,
  process: int | None = None,
) -> None:
  """Joins the processes of a run; nothing may have used a device before.

  Args:
    timeout_seconds: to wait for those that do not come, and later for one that
      no longer answers; then this process ends.
    coordinator: "host:port" of process 0; None: TPU VMs, SLURM, GKE and what
      else `jax.distributed.initialize` knows tell this and the next two.
    processes: how many there are.
    process: which one this is.

  Raises:
    ValueError: nothing tells who the others are.
  """
  # The runtime would abort with a stack trace that does not say what lacks.
  alarm = threading.Timer(
    timeout_seconds,
    end,
    [
      f"not all processes came within {timeout_seconds} seconds"
      f" ({_who(coordinator, processes, process)}): start every one of them "
      "with the same --coordinator and --processes, and each with its own "
      "--process"
    ],
  )
  alarm.daemon = True
  alarm.start()
  try:
    jax.distributed.initialize(
      coordinator,
      processes,
      process,
      initialization_timeout=timeout_seconds + 60,
      heartbeat_timeout_seconds=timeout_seconds,
      shutdown_timeout_seconds=timeout_seconds,
    )
    # Connections between hosts are made by the first collective, for which
    # Gloo waits 30 seconds only; later ones wait for who still compiles.
    multihost_utils.sync_global_devices("joined")
  except (RuntimeError, ValueError) as error:
    raise ValueError(
      f"the processes of this run could not be joined ({error}): give "
      "--coordinator=HOST:PORT, --processes and --process"
    ) from error
  finally:
    alarm.cancel()
  logging.info(
    "process %d of %d, %d of %d devices",
    *(jax.process_index(), jax.process_count()),
    *(jax.local_device_count(), jax.device_count()),
  )


def end(message: str) -> None:
  """Ends this process at once, with one line and exit code 2.

  An ordinary end would wait for the others, who may be gone.
  """
  sys.stderr.write(f"error: {' '.join(message.split())}\n")
  sys.stderr.flush()
  os._exit(2)


def _who(coordinator, processes, process) -> str:
  if coordinator is None:
    return "found by the cluster's settings"
  return f"this is process {process} of {processes}, by {coordinator}"
