"""Tasks: sources of examples as text."""

from collections.abc import Callable

from sleep_jax.tasks.base import Task
from sleep_jax.tasks.depo import Depo, DepoConfig
from sleep_jax.tasks.gsm_infinite import (
  GsmInfinite,
  GsmInfiniteConfig,
  GsmInfiniteFile,
)
from sleep_jax.tasks.rule110 import Rule110, Rule110Config

# Name in a config -> class of that task's settings.
TASKS = {
  "gsm_infinite": GsmInfiniteConfig,
  "rule110": Rule110Config,
  "depo": DepoConfig,
}


def make_task(
  config: GsmInfiniteConfig | Rule110Config | DepoConfig,
  path: str,
  seed: int,
  count_tokens: Callable[[str], int],
) -> Task:
  """The task of a config: read from the JSONL file at `path`, or generated.

  Args:
    config: the task's settings.
    path: a JSONL file of problems; "" generates them.
    seed: of the generated examples.
    count_tokens: length of a text, for the lengths that the config asks for.

  Raises:
    ValueError: the file cannot be used, or the task is none that has files.
  """
  if path and not isinstance(config, GsmInfiniteConfig):
    raise ValueError(
      f"data.path = {path!r}: only gsm_infinite reads files; leave it empty "
      f"for {config.name}"
    )
  if isinstance(config, Rule110Config):
    return Rule110(config, seed)
  if isinstance(config, DepoConfig):
    return Depo(config, seed)
  if path:
    return GsmInfiniteFile(path, config.heldout_fraction)
  return GsmInfinite(config, seed, count_tokens)


__all__ = ["TASKS", "Task", "make_task"]
