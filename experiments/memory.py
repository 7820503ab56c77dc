"""What the gradient of a rollout keeps, by passes and by windows.

  python -m experiments.memory --config=experiments/automaton.py
  python -m experiments.memory --config=experiments/automaton.py:paper \
      --config.model.implementation=pallas_tpu --target=v5e \
      --windows= --savers=passes

Nothing is run: the figures are the compiler's temporaries (MiB) of the loss
and its gradient on this machine, or on a `--target` TPU that need not be there
(extra `compile`). The columns: rematerialization of blocks alone; of passes
too; of windows too; and with it truncation to the last pass and two windows.
Beside them stands what has to be kept: the token ids and the fast weights at
each window's start, and (h, S) at the start of each pass of one window.
"""

import dataclasses
import os

from absl import app, flags

from experiments import main as command

SAVERS = {
  "blocks": {},
  "passes": dict(remat_passes=True),
  "windows": dict(remat_passes=True, remat_windows=True),
  "truncated": dict(
    remat_passes=True, remat_windows=True, gradient_passes=1, gradient_windows=2
  ),
}


def main(_):
  given = flags.FLAGS
  # Before JAX is imported: compiling for another machine needs the CPU alone.
  if given.target:
    os.environ["JAX_PLATFORMS"] = "cpu"
  from sleep_jax.config import from_config_dict

  try:
    config = from_config_dict(command.CONFIG.value)
    if config.sleep.eviction == "none":
      raise ValueError(
        "sleep.eviction = 'none' has one window and one pass: set it to "
        "'hard' or 'sliding'"
      )
    if config.sleep.pass_loss:
      raise ValueError(
        f"sleep.pass_loss = {config.sleep.pass_loss}: what is measured here is "
        "the loss of answers; set it to 0"
      )
    passes, windows = (
      [_count(name, value) for value in given[name].value]
      for name in ("passes", "windows")
    )
    device = _device(given.target)
  except (ValueError, ImportError, RuntimeError) as error:
    command.fail(error)
  savers = {name: SAVERS[name] for name in given.savers}
  if passes:
    length = config.sleep.window_length
    print(f"One window of {length} tokens before the last.\n")
    _table("N", [(n, n, 1) for n in passes], config, device, savers)
  if windows:
    print(f"\nN = {config.sleep.passes}.\n")
    rows = [(n, config.sleep.passes, n) for n in windows]
    _table("windows", rows, config, device, savers)


def _count(name, value):
  if not value.isdigit() or int(value) < 1:
    raise ValueError(f"--{name}: {value!r} is not a number of at least 1")
  return int(value)


def _device(target):
  import jax

  from pallas_kernels.chips import CHIPS, compile_only_devices

  if not target:
    return jax.devices()[0]
  if target not in CHIPS:
    raise ValueError(f"--target={target}: one of {sorted(CHIPS)}")
  return compile_only_devices(target)[0]


def _table(name, rows, config, device, savers):
  print("| " + " | ".join([name, *savers, "ids and S", "(h, S)"]) + " |")
  print("|---" * (len(savers) + 3) + "|")
  for value, passes, windows in rows:
    kept, carried = _floor(config, passes, windows)
    cells = [
      temporaries(config, device, passes, windows, saver)
      for saver in savers.values()
    ]
    print(
      "| "
      + " | ".join(
        [str(value), *(f"{x / 2**20:.1f}" for x in (*cells, kept, carried))]
      )
      + " |",
      flush=True,
    )


def _floor(config, passes, windows):
  """(bytes of ids and S of all windows, bytes of (h, S) of all passes)."""
  import jax

  from sleep_jax.model.fast_weights import init_fast_weights

  batch, length = config.data.batch_size, config.sleep.window_length
  state = jax.eval_shape(lambda: init_fast_weights(config.model, batch))
  size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
  low = 2 if config.model.compute_dtype == "bfloat16" else 4
  h = batch * length * config.model.width * low
  # Inputs, targets, and two masks.
  ids = batch * length * (4 + 4 + 1 + 1)
  return windows * (ids + size), passes * (h + size)


def temporaries(config, device, passes, windows, saver) -> int:
  """Bytes of the compiler's temporaries of loss and gradient."""
  import jax
  import jax.numpy as jnp

  from sleep_jax.model.hybrid_lm import HybridLM
  from sleep_jax.rollout import rollout
  from sleep_jax.training.step import init_params

  sleep = dataclasses.replace(config.sleep, passes=passes, **saver)
  # The vocabulary matters little here: a task's own.
  model = HybridLM(config.model, 16)
  sharding = jax.sharding.SingleDeviceSharding(device)

  def on_device(x):
    return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)

  shape = config.data.batch_size, windows * sleep.window_length + 1
  ids, mask = (
    on_device(jax.ShapeDtypeStruct(shape, dtype))
    for dtype in (jnp.int32, jnp.bool_)
  )
  params = jax.tree.map(
    on_device, jax.eval_shape(lambda: init_params(model, 0))
  )

  def loss(params, *arrays):
    return rollout(model, params, *arrays, sleep).loss_sum

  gradient = jax.jit(jax.value_and_grad(loss))
  compiled = gradient.lower(params, ids, ids, mask, mask).compile()
  return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
  flags.DEFINE_string("target", "", "v4, v5e, v5p, v6e, tpu7x; '': here")
  flags.DEFINE_list("passes", "1,2,4,8", "N of the first table")
  flags.DEFINE_list("windows", "1,4,16", "before the last, second table")
  flags.DEFINE_multi_enum("savers", [*SAVERS], [*SAVERS], "columns")
  app.run(main, flags_parser=command.parse)
