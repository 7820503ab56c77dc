"""Checks and writes problem files.

python -m sleep_jax.tasks.depo check FILE.jsonl
  says how many problems are right, and of each wrong one the line and why;
  exit status 0 if all are right, 1 if not.
python -m sleep_jax.tasks.depo write FILE.jsonl --count=1000 --split=hops_4
  writes problems; nodes, hops, ... of `DepoConfig` are options.
Bad input ends each with one line and exit status 2.
"""

import argparse
import json
import sys

from sleep_jax.tasks import problem_files
from sleep_jax.tasks.depo.checker import Wrong, check, read_records
from sleep_jax.tasks.depo.task import (
  HOPS,
  MARKER,
  SEPARATOR,
  Depo,
  DepoConfig,
  Problem,
)

_BOS = 0


def record(
  config: DepoConfig, split: str, index: int, problem: Problem
) -> dict:
  """A problem with the fields of the original's samples."""
  shortest, longest = config.name_length
  ids = [_BOS]
  for edge in problem.edges:
    if config.separator:
      ids.append(SEPARATOR)
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
      separator=config.separator,
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
  config = problem_files.config_of(arguments, DepoConfig)
  task = Depo(config, arguments.seed)
  task.size(arguments.split)
  with open(arguments.file, "w", encoding="utf-8") as lines:
    for i in range(arguments.count):
      problem = task.problem(arguments.split, i)
      fields = record(config, arguments.split, i, problem)
      lines.write(json.dumps(fields) + "\n")
  print(f"{arguments.count} problems written to {arguments.file}")
  return 0


def main() -> int:
  """The exit status of the command line."""
  parser, commands = problem_files.parsers(
    "depo",
    __doc__,
    {
      "check": ("check the problems of a file", _check),
      "write": ("write problems to a file", _write),
    },
  )
  names = (
    *("nodes", "hops", "train_hops", "full_cycles", "queries"),
    *("mini_vocab", "name_length", "separator"),
  )
  problem_files.add_options(commands["write"], DepoConfig, names, count=1000)
  commands["write"].add_argument("--split", default="train")
  return problem_files.main(parser)


if __name__ == "__main__":
  sys.exit(main())
