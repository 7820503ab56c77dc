"""The command line of what is measured: `experiments.latency`, `throughput`.

What is measured is a module with these functions:
  default_config() -> the config without --config
  check(config): a ValueError for one that cannot be measured
  measure(config, *lists, rounds) -> the report, as JSON can hold it
  table(report), verdicts(report) -> text, and sentences
"""

import functools
import json
from collections.abc import Mapping
from typing import Any

from absl import app, flags

from experiments import main as command


def run(
  module: Any, lists: Mapping[str, tuple[str, str]], rounds: int, figure: str
) -> None:
  """Measures by the flags, prints, and writes what --json and --plot name.

  Args:
    module: see above.
    lists: flags of whole numbers: (default, help).
    rounds: readings of each cell unless --rounds says otherwise.
    figure: the function of `experiments.figures` that draws the report.
  """
  for name, (default, help_string) in lists.items():
    flags.DEFINE_list(name, default, help_string)
  flags.DEFINE_integer("rounds", rounds, "readings of each cell", 4)
  flags.DEFINE_string("json", None, "file for all numbers")
  flags.DEFINE_string("plot", None, "file for the figure (PNG)")
  app.run(
    functools.partial(_main, module, list(lists), figure),
    flags_parser=functools.partial(command.parse, needs_config=False),
  )


def _main(module, lists, figure, _):
  from experiments import figures
  from sleep_jax.config import from_config_dict
  from sleep_jax.training.workdir import write_atomically

  given = flags.FLAGS
  try:
    texts = [given[name].value for name in lists]
    if not all(texts) or not all(
      x.strip("0").isdecimal() for x in sum(texts, [])
    ):
      names = ", ".join(f"--{name}" for name in lists)
      raise ValueError(f"{names}: give whole numbers from 1 on")
    numbers = [sorted(set(map(int, some))) for some in texts]
    config = module.default_config()
    if command.CONFIG.value is not None:
      config = from_config_dict(command.CONFIG.value)
    module.check(config)
    report = module.measure(config, *numbers, given.rounds)
    said = module.verdicts(report)
    print(module.table(report), *said, sep="\n")
    if given.json:
      text = json.dumps(report | {"verdicts": said}, indent=2) + "\n"
      write_atomically(given.json, text)
    if given.plot:
      getattr(figures, figure)(report, given.plot)
  except (ValueError, OSError) as error:
    command.fail(error)


def affine(numbers, times) -> tuple[float, float, float]:
  """(a, b, how far off, relative) of times = a + b x numbers, nearest so."""
  import numpy as np

  numbers, times = np.array(numbers), np.array(times)
  slope, base = np.polyfit(numbers, times, 1, w=1 / times)
  return base, slope, np.max(np.abs(times / (base + slope * numbers) - 1))
