"""What a run or a measurement records of the code and of the machine."""

import os
import subprocess
from pathlib import Path
from typing import Any


def surroundings() -> dict[str, Any]:
  """The commit, the devices, the load and the version of JAX, for JSON."""
  import jax

  return {
    "commit": _commit(),
    "device": str(jax.devices()[0].device_kind),
    "devices": jax.device_count(),
    "cores": os.cpu_count(),
    "load_average": os.getloadavg()[0],
    "jax": jax.__version__,
  }


def _commit() -> str | None:
  """The code's commit, with a + if it has been changed; None if unknown."""

  def git(*arguments):
    return subprocess.run(
      ["git", "-C", Path(__file__).parent, *arguments],
      capture_output=True,
      text=True,
    )

  try:
    found = git("rev-parse", "--short", "HEAD").stdout.strip()
    changed = git("diff", "--quiet", "HEAD", "--", ":/*.py").returncode
  except OSError:  # no git
    return None
  return found + "+" * bool(changed) if found else None
