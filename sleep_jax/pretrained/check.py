"""Holds a converted model against what the original computed.

  python -m sleep_jax.pretrained.check --workdir=W --expected=FILE.npz

FILE.npz, written where the original runs, has `ids` [B, T] and `logits`
[B, T, W]; it may have `S.<layer>` [B, H, K, V], the fast weights after the last
token, and of a looped model `exit_pdf` [B, T, R] and `expected_logits`, the
logits of each loop weighted by it. The largest errors are printed, relative to
the largest value of each. Exit code 1 if one is above --tolerance.
"""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from sleep_jax.config import ModelConfig
from sleep_jax.model.fast_weights import init_fast_weights
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.pretrained import convert, export, hf
from sleep_jax.training import checkpoints
from sleep_jax.training.step import init_params


def check(
  workdir: str | Path, expected: str | Path, dtype: str = "float32"
) -> dict[str, float]:
  """The largest relative error of each array of the file `expected`.

  The model runs as the original: its own loops, one pass, nothing evicted.

  Args:
    dtype: to compute in; "float64" needs `jax.enable_x64`.

  Raises:
    ValueError: the model or the file cannot be used, or do not fit.
  """
  config, _, numbers = export.converted(Path(workdir))
  shape = convert.architecture_of(numbers).shape(numbers)
  model_config = dataclasses.replace(
    config.model, loops=shape.loops, compute_dtype=dtype
  )
  arrays = _read(expected, shape.vocab_size)
  model = HybridLM(model_config, config.model.vocab_size)
  like = jax.eval_shape(lambda: init_params(model, 0))
  params = checkpoints.restore_params(workdir, like)
  computed = run(model, params, arrays["ids"], shape.vocab_size)
  errors = {}
  for name in arrays.keys() - {"ids"}:
    if name not in computed:
      raise ValueError(f"{expected}: {name} is none of {sorted(computed)}")
    mine, theirs = np.asarray(computed[name]), arrays[name]
    if mine.shape != theirs.shape:
      raise ValueError(
        f"{expected}: {name} is {list(theirs.shape)}, here {list(mine.shape)}"
      )
    errors[name] = float(np.abs(mine - theirs).max() / np.abs(theirs).max())
  return errors


def run(model: HybridLM, params, ids, vocab_size: int) -> dict[str, Any]:
  """What a model computes of whole rows, by the names of `check`'s file."""
  config = model.config
  arguments = (
    jnp.asarray(ids, jnp.int32),
    init_fast_weights(config, len(ids)),
    jnp.ones(ids.shape, bool),
  )
  apply = jax.jit(model.apply, static_argnames="method")
  logits, state = apply({"params": params}, *arguments)
  computed = {"logits": logits[..., :vocab_size]} | _fast_weights(config, state)
  if config.exit_gate:
    each, stops = apply({"params": params}, *arguments, method="exits")
    logits = jax.vmap(lambda h: apply({"params": params}, h, method="logits"))(
      each
    )
    expected = jnp.sum(stops[..., None] * logits, axis=0)
    computed["exit_pdf"] = jnp.moveaxis(stops, 0, -1)
    computed["expected_logits"] = expected[..., :vocab_size]
  return computed


def _fast_weights(config: ModelConfig, state) -> dict[str, Any]:
  """S.<layer> of the original's own layers, after the last loop."""
  own = [layer for layer in hf.layers(config) if layer.kind != "inserted_jet"]
  return {
    f"S.{number}": s[(config.loops - 1) * len(s) // config.loops + layer.repeat]
    for number, layer in enumerate(own)
    if (s := state[layer.group][layer.place]) is not None
  }


def _read(path: str | Path, vocab_size: int) -> dict[str, np.ndarray]:
  try:
    with np.load(path) as file:
      arrays = {
        name: file[name]
        for name in file.files
        if name in ("ids", "logits", "exit_pdf", "expected_logits")
        or name.startswith("S.")
      }
  except Exception as error:  # whatever numpy raises on bad bytes
    raise ValueError(f"{path} is no readable .npz: {error}") from error
  ids = arrays.get("ids")
  if ids is None or "logits" not in arrays:
    raise ValueError(f"{path} has no ids and logits: write both")
  if (
    ids.ndim != 2
    or ids.dtype.kind not in "iu"
    or not np.all((0 <= ids) & (ids < vocab_size))
  ):
    raise ValueError(
      f"{path}: ids must be whole numbers in 0..{vocab_size - 1}, [B, T]"
    )
  return arrays


def main(_):
  from experiments import main as command

  given = flags.FLAGS
  if command.WORKDIR.value is None:
    command.fail("give --workdir=W, what sleep_jax.pretrained.convert wrote")
  try:
    with jax.enable_x64(given.dtype == "float64"):
      errors = check(command.WORKDIR.value, given.expected, given.dtype)
  except (ValueError, OSError) as error:
    command.fail(error)
  for name, error in sorted(errors.items()):
    print(f"{name}: {error:.1e}")
  # Not `any(error > ...)`: NaN is no agreement.
  return 0 if all(x <= given.tolerance for x in errors.values()) else 1


if __name__ == "__main__":
  import functools

  from experiments import main as command

  flags.DEFINE_string("expected", None, "a .npz file", required=True)
  flags.DEFINE_float("tolerance", 1e-3, "largest relative error")
  flags.DEFINE_enum(
    "dtype", "float32", ["float32", "bfloat16", "float64"], "to compute in"
  )
  parse = functools.partial(command.parse, needs_config=False)
  app.run(main, flags_parser=parse)
