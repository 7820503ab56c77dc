"""Runs an experiment: `python -m experiments.main --config=FILE[:SIZE]`.

Any leaf of the config can be overridden: `--config.sleep.passes=4`. Exit code
2, with one line, when the config, the data or the workdir cannot be used.
"""

import pathlib
import sys

from absl import app, flags, logging
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file(
  "config", help_string="config file, e.g. experiments/math.py:tiny"
)
_WORKDIR = flags.DEFINE_string(
  "workdir", None, "folder of the run (default: runs/<config>[-<size>])"
)


def default_workdir(config_path: str) -> str:
  """runs/math for experiments/math.py, runs/math-tiny for its size tiny."""
  name, _, size = config_path.partition(":")
  return "runs/" + "-".join(filter(None, [pathlib.Path(name).stem, size]))


def fail(message: object):
  """Ends with one line on stderr and exit code 2."""
  sys.stderr.write(f"error: {' '.join(str(message).split())}\n")
  sys.exit(2)


def parse(argv):
  """Parses the flags; whatever is wrong with them takes one line."""
  try:
    arguments = flags.FLAGS(argv)
    flags.mark_flag_as_required("config")
  except Exception as error:  # a config file may raise anything
    fail(error)
  return arguments


def main(argv):
  from sleep_jax import config as configs
  from sleep_jax.training import judging, loop

  if len(argv) > 1:
    fail(f"unknown argument {argv[1]!r}: settings are --config.LEAF=VALUE")
  logging.set_verbosity(logging.INFO)
  # The libraries below log every file of a checkpoint.
  logging.get_absl_handler().addFilter(
    lambda record: "sleep_jax" in record.pathname or record.levelno > 20
  )
  path = config_flags.get_config_filename(flags.FLAGS["config"])
  try:
    config = configs.from_config_dict(_CONFIG.value)
    results = loop.train(config, _WORKDIR.value or default_workdir(path))
  except (ValueError, OSError) as error:
    fail(error)
  print(judging.format_table(results))


if __name__ == "__main__":
  app.run(main, flags_parser=parse)
