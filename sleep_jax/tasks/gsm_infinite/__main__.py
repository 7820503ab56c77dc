"""Checks and writes problem files.

python -m sleep_jax.tasks.gsm_infinite check FILE.jsonl
  says how many answers the solver confirms; exit status 0 if all, 1 if not.
python -m sleep_jax.tasks.gsm_infinite write FILE.jsonl --count=10000 --ops=2,4
  writes problems; each field of `GsmInfiniteConfig` is an option.
python -m sleep_jax.tasks.gsm_infinite floors FILE.jsonl
  says, by operations, what two answers score that need no reasoning: the best
  constant, and of each problem the constant that it states most often.
Bad input ends each with one line and exit status 2.
"""

import argparse
import collections
import dataclasses
import re
import sys

from sleep_jax.tasks import problem_files
from sleep_jax.tasks.gsm_infinite.config import GsmInfiniteConfig
from sleep_jax.tasks.gsm_infinite.jsonl import read_records, write_problems
from sleep_jax.tasks.gsm_infinite.solver import Unsolvable, solve
from sleep_jax.tasks.gsm_infinite.task import GsmInfinite

_MOST_SHOWN = 10
_STATED_CONSTANT = re.compile(r"(?:equals|=) (\d+) ?\.")


def _check(arguments: argparse.Namespace) -> int:
  counts = collections.Counter(confirmed=0, refuted=0, unsolvable=0)
  for number, record in enumerate(read_records(arguments.file), start=1):
    try:
      answer = solve(record.problem, record.question)
      verdict = "confirmed" if answer == record.answer else "refuted"
      detail = f"stated {record.answer}, solved {answer}"
    except Unsolvable as error:
      verdict, detail = "unsolvable", str(error)
    counts[verdict] += 1
    failed = counts["refuted"] + counts["unsolvable"]
    if verdict != "confirmed" and failed <= _MOST_SHOWN:
      print(f"problem {number} {verdict}: {detail}")
  print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
  return int(counts["confirmed"] < counts.total())


def _floors(arguments: argparse.Namespace) -> int:
  by_op = collections.defaultdict(list)
  for record in read_records(arguments.file):
    # A text's last sentence may stand without its full stop.
    stated = _STATED_CONSTANT.findall(record.problem.rstrip(".") + ".")
    commonest = collections.Counter(stated).most_common(1)
    hit = bool(commonest) and int(commonest[0][0]) == record.answer
    by_op[record.op].append((record.answer, hit))
  for op, answers_and_hits in sorted(by_op.items()):
    answers, hits = zip(*answers_and_hits, strict=True)
    constant = collections.Counter(answers).most_common(1)[0][1]
    print(
      f"op {op}: {len(answers)} problems, best constant "
      f"{constant / len(answers):.3f}, commonest stated constant "
      f"{sum(hits) / len(hits):.3f}"
    )
  return 0


def _write(arguments: argparse.Namespace) -> int:
  config = problem_files.config_of(arguments, GsmInfiniteConfig)
  task = GsmInfinite(config, arguments.seed)
  write_problems(
    arguments.file,
    (task.problem(arguments.split, i) for i in range(arguments.count)),
  )
  print(f"{arguments.count} problems written to {arguments.file}")
  return 0


def main() -> int:
  """The exit status of the command line."""
  parser, commands = problem_files.parsers(
    "gsm_infinite",
    __doc__,
    {
      "check": ("check the answers of a file", _check),
      "floors": ("score without reasoning", _floors),
      "write": ("write problems to a file", _write),
    },
  )
  write = commands["write"]
  names = [field.name for field in dataclasses.fields(GsmInfiniteConfig)]
  problem_files.add_options(write, GsmInfiniteConfig, names, count=10_000)
  write.add_argument("--split", default="train", choices=("train", "heldout"))
  return problem_files.main(parser)


if __name__ == "__main__":
  sys.exit(main())
