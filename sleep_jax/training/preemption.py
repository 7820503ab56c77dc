"""Ending early when told to: SIGTERM, as clusters send it."""

import signal
import threading
from typing import Any

import jax
from jax.experimental import multihost_utils

# EX_TEMPFAIL of sysexits.h: the same command, given again, goes on.
EXIT_CODE = 75


class Preempted(Exception):
  """The run was told to end; what it has done is saved."""


class Preemption:
  """Listens for SIGTERM while a run lasts: a context manager.

  With several processes one signal, to any of them, is for all, and the
  runtime chooses where all of them end.
  """

  def __init__(self):
    self._asked = 0
    self._told = False
    self._before: Any = None

  def __enter__(self) -> "Preemption":
    # The runtime of several processes has a listener of its own; and only the
    # main thread may install one.
    if (
      jax.process_count() == 1
      and threading.current_thread() is threading.main_thread()
    ):
      self._before = signal.signal(signal.SIGTERM, self._hear)
    return self

  def __exit__(self, *exception: object) -> None:
    if self._before is not None:
      signal.signal(signal.SIGTERM, self._before)

  def _hear(self, *_: object) -> None:
    self._told = True

  def noticed(self) -> bool:
    """Whether to end here; all processes must ask equally often."""
    self._asked += 1
    if jax.process_count() > 1 and not self._told:
      self._told = multihost_utils.reached_preemption_sync_point(self._asked)
    return self._told
