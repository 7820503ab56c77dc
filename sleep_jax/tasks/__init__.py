"""Tasks: sources of examples as text, in one registry.

A task of your own is registered in the file that `--config` names, and is then
a task like ours (docs/adding_a_task.md):

  TASKS["mine"] = TaskKind(MyConfig, MyTask)
"""

from collections.abc import Callable
from typing import NamedTuple, Protocol, runtime_checkable

from sleep_jax.tasks.base import Example, Question, Task
from sleep_jax.tasks.depo import Depo, DepoConfig
from sleep_jax.tasks.gsm_infinite import (
  GsmInfinite,
  GsmInfiniteConfig,
  GsmInfiniteFile,
)
from sleep_jax.tasks.rule110 import Rule110, Rule110Config


@runtime_checkable
class TaskConfig(Protocol):
  """Settings of a task: a frozen dataclass that checks itself.

  Its fields are the leaves of `config.task`; all have defaults.
  """

  @property
  def name(self) -> str: ...


class TaskKind(NamedTuple):
  """How a task of some kind is set, made, and read.

  Attributes:
    config: the dataclass of its settings.
    make: (settings, seed, function that counts a text's tokens) -> `Task`.
    read: (path of a JSONL file, settings) -> `Task`, if it has files.
  """

  config: type
  make: Callable[..., Task]
  read: Callable[..., Task] | None = None


# By the name in a config.
TASKS = {
  "gsm_infinite": TaskKind(
    GsmInfiniteConfig,
    GsmInfinite,
    lambda path, config: GsmInfiniteFile(path, config.heldout_fraction),
  ),
  "rule110": TaskKind(
    Rule110Config, lambda config, seed, _: Rule110(config, seed)
  ),
  "depo": TaskKind(DepoConfig, lambda config, seed, _: Depo(config, seed)),
}


def make_task(
  config: TaskConfig,
  path: str,
  seed: int,
  count_tokens: Callable[[str], int],
) -> Task:
  """The task of a config: read from the JSONL file at `path`, or generated.

  Args:
    config: the task's settings; `config.name` is in TASKS.
    path: a JSONL file of problems; "" generates them.
    seed: of the generated examples.
    count_tokens: length of a text, for the lengths that the config asks for.

  Raises:
    ValueError: the file cannot be used, or the task is none that has files.
  """
  kind = TASKS[config.name]
  if not path:
    return kind.make(config, seed, count_tokens)
  if kind.read is None:
    having = [name for name, kind in TASKS.items() if kind.read]
    raise ValueError(
      f"data.path = {path!r}: only {', '.join(having)} reads files; leave it "
      f"empty for {config.name}"
    )
  return kind.read(path, config)


__all__ = [
  "TASKS",
  "Example",
  "Question",
  "Task",
  "TaskConfig",
  "TaskKind",
  "make_task",
]
