"""Runs an experiment: `python -m experiments.main --config=FILE[:SIZE]`.

`FILE:SIZE,BASELINE` runs one of `sleep_jax/baselines.py` in its place.
Any leaf of the config can be overridden: `--config.sleep.passes=4`. Exit code
2, with one line, when the config, the data or the workdir cannot be used.
"""

import sys
from pathlib import Path

from absl import app, flags, logging
from ml_collections import config_flags

CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="config file, e.g. experiments/math.py:tiny"
)
WORKDIR = flags.DEFINE_string(
  "workdir",
  None,
  "folder of the run (default: runs/<config>[-<size>][-<baseline>])",
)


def fail(message: object):
  """Ends with one line on stderr and exit code 2."""
  sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
  sys.exit(2)


def parse(argv: list[str], needs_config: bool = True) -> list[str]:
  """Parses the flags; whatever is wrong with them takes one line."""
  try:
    arguments = flags.FLAGS(argv)
  except Exception as error:  # a config file may raise anything
    # What it raised comes with its traceback, the message last.
    lines = str(error).strip().splitlines()
    fail(lines[-1] if lines else type(error).__name__)
  if needs_config and CONFIG.value is None:
    fail("--config is missing: give a file, as --config=experiments/math.py")
  if len(arguments) > 1:
    fail(f"unknown argument {arguments[1]!r}: use --config.LEAF=VALUE")
  return arguments


def main(_):
  # After the flags: a mistyped one should not wait for JAX.
  from experiments import figures
  from sleep_jax.config import from_config_dict
  from sleep_jax.training import judging, loop

  logging.set_verbosity(logging.INFO)
  # The libraries below log every file of a checkpoint, and the traceback of
  # what they then raise, which ends in one line here.
  ours = str(Path(loop.__file__).parents[1])
  logging.get_absl_handler().addFilter(
    lambda record: (
      record.pathname.startswith(ours)
      or (record.levelno > 20 and not record.exc_info)
    )
  )
  name, _, size = config_flags.get_config_filename(
    flags.FLAGS["config"]
  ).partition(":")
  # No comma: `experiments.figures` parts folders by it.
  name = "-".join([Path(name).stem, *filter(None, size.split(","))])
  folder = Path(WORKDIR.value or f"runs/{name}")
  try:
    results = loop.train(from_config_dict(CONFIG.value), folder)
    print(judging.format_table(results))
  except (ValueError, OSError) as error:
    fail(error)
  try:
    figures.draw_run(name, results, folder)
  except ValueError as error:  # no matplotlib
    logging.warning("no figures: %s", error)
  except OSError as error:
    fail(error)


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
