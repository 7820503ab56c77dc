"""Checks and writes problem files.

python -m sleep_jax.tasks.depo check FILE.jsonl
  says how many problems are right, and of each wrong one the line and why;
  exit status 0 if all are right, 1 if not.
python -m sleep_jax.tasks.depo write FILE.jsonl --count=1000 --split=hops_4
  writes problems; nodes, hops, ... of `DepoConfig` are options.
Bad input ends each with one line and exit status 2.
"""

import argparse
import dataclasses
import json
import sys

from sleep_jax.tasks.depo.checker import Wrong, check, read_records
from sleep_jax.tasks.depo.task import HOPS, MARKER, Depo, DepoConfig, Problem

_BOS = 0


def record(
  config: DepoConfig, split: str, index: int, problem: Problem
) -> dict:
  """A problem with the fields of the original's samples."""
  shortest, longest = config.name_length
  ids = [_BOS]
  for edge in problem.edges:
    for name in edge:
      ids += name
  edges_tokens = len(ids) - 1
  mask, queries = [0] * len(ids), []
  for k, start, end in problem.queries:
    place, at = len(ids), len(ids) + 1 + len(start)
    ids += [HOPS + k, *start, MARKER, *end]
    mask += [0] * (at - place) + [1] * (1 + len(end))
    queries.append(
      dict(k=k, query=[*start], answer=[*end], pos=place, ans_pos=at)
    )
  return dict(
    config=split,
    params=dict(
      N=config.nodes,
      K=config.hops,
      M=config.queries,
      mini_vocab=config.mini_vocab,
      min_tlen=shortest,
      max_tlen=longest,
      QA=split != "train",
    ),
    index=index,
    n_nodes=len(problem.edges),
    bos=_BOS,
    ids=ids,
    loss_mask=mask,
    edges_tokens=edges_tokens,
    qa_tokens=len(ids) - 1 - edges_tokens,
    queries=queries,
  )


def _check(arguments: argparse.Namespace) -> int:
  right = wrong = 0
  for number, fields in read_records(arguments.file):
    try:
      check(fields)
      right += 1
    except Wrong as reason:
      wrong += 1
      print(f"line {number}: {reason}")
  print(f"{right} right, {wrong} wrong")
  return int(wrong > 0)


def _write(arguments: argparse.Namespace) -> int:
  if arguments.count < 1:
    raise ValueError(f"count={arguments.count} is below 1: write one or more")
  given = vars(arguments)
  config = DepoConfig(
    **{
      field.name: given[field.name]
      for field in dataclasses.fields(DepoConfig)
      if field.name in given
    }
  )
  task = Depo(config, arguments.seed)
  task.size(arguments.split)
  with open(arguments.file, "w", encoding="utf-8") as lines:
    for i in range(arguments.count):
      problem = task.problem(arguments.split, i)
      fields = record(config, arguments.split, i, problem)
      lines.write(json.dumps(fields) + "\n")
  print(f"{arguments.count} problems written to {arguments.file}")
  return 0


def _parser() -> argparse.ArgumentParser:
  parser = argparse.ArgumentParser(
    prog="python -m sleep_jax.tasks.depo",
    description=__doc__,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  commands = parser.add_subparsers(required=True)
  check = commands.add_parser("check", help="check the problems of a file")
  check.set_defaults(run=_check)
  write = commands.add_parser("write", help="write problems to a file")
  write.set_defaults(run=_write)
  for command in (check, write):
    command.add_argument("file", metavar="FILE.jsonl")
  write.add_argument("--count", type=int, default=1000)
  write.add_argument("--seed", type=int, default=0)
  write.add_argument("--split", default="train")
  for name in ("nodes", "hops", "queries", "mini_vocab"):
    write.add_argument(f"--{name}", type=int, default=getattr(DepoConfig, name))
  write.add_argument(
    "--name_length",
    type=lambda text: tuple(map(int, text.split(","))),
    default=DepoConfig.name_length,
    help="shortest,longest",
  )
  return parser


def main() -> int:
  """The exit status of the command line."""
  arguments = _parser().parse_args()
  try:
    return arguments.run(arguments)
  except (OSError, ValueError) as error:
    print(str(error), file=sys.stderr)
    return 2


if __name__ == "__main__":
  sys.exit(main())
