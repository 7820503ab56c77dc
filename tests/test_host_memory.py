"""Large buffers are paged in once."""

import platform
import subprocess
import sys

import pytest

# Minor page faults of 8 buffers of 40 MB, one after the other.
_FAULTS = """
import resource
import numpy as np
from sleep_jax.training.host_memory import keep_freed_memory

for keeps in (False, True):
  if keeps:
    keep_freed_memory()
  np.ones(10_000_000, np.float32)
  before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
  for _ in range(8):
    np.ones(10_000_000, np.float32)
  print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(
  platform.libc_ver()[0] != "glibc", reason="mallopt is glibc's"
)
def test_freed_memory_is_kept():
  # In a process of its own: the setting stays.
  said = subprocess.run(
    [sys.executable, "-c", _FAULTS], capture_output=True, text=True, check=True
  )
  returned, kept = map(int, said.stdout.split())
  assert returned >= 8  # of huge pages at least one each
  assert kept < returned / 4
