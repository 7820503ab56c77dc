"""Every test runs on the CPU with shapes checked and ranks never promoted."""

import atexit
import os
import shutil
import tempfile

# The workers of a run in parallel inherit this from its first process.
if "PYTEST_XDIST_WORKER" not in os.environ:
  os.environ.setdefault("JAX_PLATFORMS", "cpu")
  # Many tests, and the processes that they start, compile the same programs.
  cache = tempfile.mkdtemp()
  atexit.register(shutil.rmtree, cache, ignore_errors=True)
  os.environ["JAX_COMPILATION_CACHE_DIR"] = cache
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0.5"

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("sleep_jax", "beartype.beartype")
