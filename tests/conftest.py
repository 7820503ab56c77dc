"""Every test runs on the CPU with shapes checked and ranks never promoted."""

import os

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import jax  # noqa: E402
from jaxtyping import install_import_hook  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")
install_import_hook("sleep_jax", "beartype.beartype")
