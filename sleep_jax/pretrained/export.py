"""Writes a model that came from a Hugging Face folder as one again.

  python -m sleep_jax.pretrained.export --workdir=RUN --to=DIR

RUN is what `convert` wrote, or a run that was trained from it. Tensors get the
original's names, shapes and dtypes; inserted layers, which it does not have,
names of their own. Our special tokens are left out where the original has no
rows for them.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from absl import app, flags

from sleep_jax.config import ExperimentConfig, completed, from_config_dict
from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.pretrained import convert, hf
from sleep_jax.training import checkpoints
from sleep_jax.training.workdir import new_folder


def export(workdir: str | Path, target: str | Path) -> None:
  """Writes the model of `workdir` to the new folder `target`.

  Raises:
    ValueError: it is no converted model, nor trained from one.
  """
  workdir, target = Path(workdir), Path(target)
  if target.exists():
    raise ValueError(f"{target} exists: choose another --to, or delete it")
  config, source, numbers = converted(workdir)
  architecture = convert.architecture_of(numbers)
  model = HybridLM(config.model, config.model.vocab_size)
  wanted = convert.shapes(model)
  names = hf.tensors(
    architecture,
    config.model,
    {path: leaf.shape for path, leaf in wanted.items()},
    architecture.shape(numbers).vocab_size,
  )
  dtypes = checkpoints.stored_dtypes(source)
  here = checkpoints.stored_dtypes(workdir)
  like = {
    path: jax.ShapeDtypeStruct(leaf.shape, here.get(path, leaf.dtype))
    for path, leaf in wanted.items()
  }
  params = flax.traverse_util.flatten_dict(
    checkpoints.restore_params(
      workdir, flax.traverse_util.unflatten_dict(like, sep="/")
    ),
    sep="/",
  )

  def read(tensor: hf.Tensor) -> np.ndarray:
    rows = tensor.rows(np.asarray(params[tensor.path]))
    own = rows[tensor.start :][: tensor.shape[0]]
    return own.reshape(tensor.shape).astype(dtypes[tensor.path])

  with new_folder(target) as made:
    made.mkdir()
    hf.write_shards(made, names, read)
    shutil.copy(source / convert.SOURCE_CONFIG, made / "config.json")
    shutil.copy(source / "tokenizer.json", made / "tokenizer.json")


def converted(workdir: Path) -> tuple[ExperimentConfig, Path, hf.Numbers]:
  """(config, folder of the converted model, its original's config.json).

  Args:
    workdir: what `convert` wrote, or a run that started from it.

  Raises:
    ValueError: it is neither.
  """
  try:
    config = from_config_dict(
      completed(json.loads((workdir / "config.json").read_text()))
    )
    source = Path(config.run.init_from or workdir)
    entries: Any = json.loads((source / convert.SOURCE_CONFIG).read_text())
  except (OSError, json.JSONDecodeError) as error:
    raise ValueError(
      f"{workdir} is no converted model, nor a run that started from one "
      f"({error}): give what sleep_jax.pretrained.convert wrote"
    ) from error
  return (
    config,
    source,
    hf.Numbers(entries, f"{source}/{convert.SOURCE_CONFIG}"),
  )


def main(_):
  from experiments import main as command

  given = flags.FLAGS
  if command.WORKDIR.value is None:
    command.fail("give --workdir=RUN, a converted model or a run from one")
  try:
    export(command.WORKDIR.value, given.to)
  except (ValueError, OSError) as error:
    command.fail(error)
  print(f"written: {given.to}")


if __name__ == "__main__":
  import functools

  from experiments import main as command

  flags.DEFINE_string("to", None, "the new folder", required=True)
  parse = functools.partial(command.parse, needs_config=False)
  app.run(main, flags_parser=parse)
