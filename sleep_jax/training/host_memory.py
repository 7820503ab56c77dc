"""How this process's malloc goes about large buffers."""

import ctypes

# Parameters of mallopt(3).
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
  """Has glibc's malloc keep, from now on, what is freed, for what comes next.

  Else large buffers go back to the system at once, and XLA's CPU backend has
  them paged in and zeroed anew in each step. Other C libraries stay as they
  are.
  """
  mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
  if mallopt:  # not on macOS
    mallopt(_M_MMAP_MAX, 0)
    mallopt(_M_TRIM_THRESHOLD, -1)
