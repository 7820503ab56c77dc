"""Runs an experiment: `python -m experiments.main --config=FILE[:SIZE]`.

`FILE:SIZE,BASELINE` runs one of `sleep_jax/baselines.py` in its place.
Any leaf of the config can be overridden: `--config.sleep.passes=4`. Exit code
2, with one line, when the config, the data or the workdir cannot be used.
"""

import json
import re
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


def said(error: Exception) -> str:
  """In one line, what is wrong by an exception of the flags' parser."""
  if isinstance(cause := next(iter(error.args), None), KeyError):
    asked = " ".join(" ".join(map(str, cause.args)).split())
    return f"the config has no {asked}; sleep_jax/config.py has all settings"
  # What a config file raised comes with its traceback, the message last.
  lines = str(error).strip().splitlines()
  return lines[-1] if lines else type(error).__name__


def config_name() -> str:
  """What runs of --config are called: <config>[-<size>][-<baseline>]."""
  name, _, size = config_flags.get_config_filename(
    flags.FLAGS["config"]
  ).partition(":")
  # No comma: `experiments.figures` parts folders by it.
  return "-".join([Path(name).stem, *filter(None, size.split(","))])


def join_processes():
  """Joins the other processes of the run, if the flags say that there are."""
  from sleep_jax.parallel import distributed

  given = flags.FLAGS
  by_hand = given.coordinator, given.processes, given.process
  if None in by_hand and by_hand != (None, None, None):
    fail("--coordinator, --processes and --process belong together")
  if None in by_hand and not given.cluster:
    return
  if given.coordinator and not re.fullmatch(r".+:\d+", given.coordinator):
    fail(f"--coordinator={given.coordinator}: give it as HOST:PORT")
  try:
    distributed.start(given.timeout, *by_hand)
  except ValueError as error:
    fail(error)


def parse(argv: list[str], needs_config: bool = True) -> list[str]:
  """Parses the flags; whatever is wrong with them takes one line."""
  try:
    arguments = flags.FLAGS(argv)
  except Exception as error:  # a config file may raise anything
    fail(said(error))
  if needs_config and CONFIG.value is None:
    fail("--config is missing: give a file, as --config=experiments/math.py")
  if len(arguments) > 1:
    fail(f"unknown argument {arguments[1]!r}: use --config.LEAF=VALUE")
  return arguments


def main(_):
  # After the flags: a mistyped one should not wait for JAX.
  import jax

  from experiments import figures
  from experiments.surroundings import surroundings
  from sleep_jax.config import from_config_dict
  from sleep_jax.parallel import distributed
  from sleep_jax.training import judging, loop, preemption
  from sleep_jax.training.workdir import write_atomically

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
  join_processes()
  if jax.process_index() > 0:
    logging.set_verbosity(logging.WARNING)
  name = config_name()
  folder = Path(WORKDIR.value or f"runs/{name}")
  try:
    config = from_config_dict(CONFIG.value)
    # Before the run: the code may change while it trains.
    made_by = surroundings()
    results = loop.train(config, folder)
  except preemption.Preempted as reason:
    logging.warning("%s; the same command goes on from there", reason)
    sys.exit(preemption.EXIT_CODE)
  except (ValueError, OSError) as error:
    if jax.process_count() > 1:
      distributed.end(str(error))
    fail(error)
  if jax.process_index() > 0:
    return
  print(judging.format_table(results))
  try:
    # Not of a run that is only judged again.
    if not (folder / "surroundings.json").exists():
      text = json.dumps(made_by, indent=2) + "\n"
      write_atomically(folder / "surroundings.json", text)
    figures.draw_run(name, results, folder)
  except ValueError as error:  # no matplotlib
    logging.warning("no figures: %s", error)
  except OSError as error:
    fail(error)


if __name__ == "__main__":
  flags.DEFINE_bool(
    "cluster", False, "one of several processes that a cluster has started"
  )
  flags.DEFINE_string(
    "coordinator", None, "of processes started by hand: host:port of process 0"
  )
  flags.DEFINE_integer("processes", None, "how many there are", 1)
  flags.DEFINE_integer("process", None, "which one this is, from 0", 0)
  flags.DEFINE_integer(
    "timeout", 300, "seconds to wait for a process that is missing", 1
  )
  app.run(main, flags_parser=parse)
