"""Tasks: sources of examples as text."""

from sleep_jax.tasks.base import Task
from sleep_jax.tasks.gsm_infinite import (
  GsmInfinite,
  GsmInfiniteConfig,
  GsmInfiniteFile,
)
from sleep_jax.tasks.rule110 import Rule110, Rule110Config

# Name in a config -> (class of its settings, class of the task).
TASKS = {
  "gsm_infinite": (GsmInfiniteConfig, GsmInfinite),
  "rule110": (Rule110Config, Rule110),
}


def make_task(config: GsmInfiniteConfig | Rule110Config, path: str, seed: int):
  """The task of a config: read from the JSONL file at `path`, or generated.

  Raises:
    ValueError: the file cannot be used, or the task is none that has files.
  """
  if not path:
    _, task = TASKS[config.name]
    return task(config, seed)
  if not isinstance(config, GsmInfiniteConfig):
    raise ValueError(
      f"data.path = {path!r}: only gsm_infinite reads files; leave it empty "
      f"for {config.name}"
    )
  return GsmInfiniteFile(path, config.heldout_fraction)


__all__ = ["TASKS", "Task", "make_task"]
