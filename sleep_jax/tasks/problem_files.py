"""Files of problems, a JSON object a line, and command lines over them."""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

_T = TypeVar("_T")


class _Parser(argparse.ArgumentParser):
  def error(self, message: str):
    self.exit(2, f"{self.prog}: {message}\n")


def read_lines(
  path: str | pathlib.Path, parse: Callable[[str, int], _T]
) -> Iterator[_T]:
  """What `parse` makes of each line and its number; blank ones are passed over.

  Raises:
    ValueError: the file has no problem, or `parse` refuses a line; names file
      and line.
    OSError: the file cannot be read.
  """
  empty = True
  with open(path, encoding="utf-8", errors="replace") as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        empty = False
        try:
          parsed = parse(line, number)
        except (ValueError, RecursionError) as error:
          raise ValueError(f"{path}, line {number}: {error}") from error
        yield parsed
  if empty:
    raise ValueError(f"{path}: no problem in it; a line is one JSON object")


def parsers(
  task: str, description: str | None, commands: Mapping[str, tuple]
) -> tuple[argparse.ArgumentParser, Mapping[str, argparse.ArgumentParser]]:
  """(the parser of a task's command line, that of each command by name).

  Args:
    task: the package, as in `python -m sleep_jax.tasks.<task>`.
    commands: (help, arguments -> exit status) by name; each takes a file.
  """
  parser = _Parser(
    prog=f"python -m sleep_jax.tasks.{task}",
    description=description,
    formatter_class=argparse.RawDescriptionHelpFormatter,
  )
  subparsers = parser.add_subparsers(required=True)
  found = {}
  for name, (help_string, run) in commands.items():
    found[name] = subparsers.add_parser(name, help=help_string)
    found[name].set_defaults(run=run)
    found[name].add_argument("file", metavar="FILE.jsonl")
  return parser, found


def add_options(
  command: argparse.ArgumentParser,
  config_class: Any,
  names: Sequence[str],
  count: int,
) -> None:
  """Options of a command that writes: --count, --seed, and some of a config."""
  command.add_argument("--count", type=int, default=count)
  command.add_argument("--seed", type=int, default=0)
  for name in names:
    default = getattr(config_class, name)
    if isinstance(default, bool):
      command.add_argument(
        f"--{name}", action=argparse.BooleanOptionalAction, default=default
      )
    else:
      command.add_argument(f"--{name}", type=_reader(default), default=default)


def config_of(arguments: argparse.Namespace, config_class: Any) -> Any:
  """The config that the options of `add_options` say, defaults elsewhere.

  Raises:
    ValueError: it is out of bounds, or so is --count.
  """
  if arguments.count < 1:
    raise ValueError(f"count={arguments.count} is below 1: write one or more")
  given = vars(arguments)
  names = [field.name for field in dataclasses.fields(config_class)]
  return config_class(**{name: given[name] for name in names if name in given})


def main(parser: argparse.ArgumentParser) -> int:
  """The exit status of a command line: bad input is one line and 2."""
  arguments = parser.parse_args()
  try:
    return arguments.run(arguments)
  except (OSError, ValueError) as error:
    print(str(error), file=sys.stderr)
    return 2


def _reader(default: Any) -> Callable[[str], object]:
  """What makes a value like the default from an option's text."""
  if not isinstance(default, tuple):
    return type(default)
  # One that is empty by default holds whole numbers.
  item = type(default[0]) if default else int

  def read(text: str) -> tuple:
    try:
      return tuple(item(part) for part in text.split(","))
    except ValueError:
      raise argparse.ArgumentTypeError(
        f"{text!r} is no list of {item.__name__} with commas between"
      ) from None

  return read
