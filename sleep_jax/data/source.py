"""The task of a config, with the tokenizer that reads it."""

from sleep_jax.config import ExperimentConfig
from sleep_jax.data.tokenizers import Tokenizer, make_tokenizer
from sleep_jax.tasks import Task, make_task


def task_and_tokenizer(config: ExperimentConfig) -> tuple[Task, Tokenizer]:
  """Where a config's examples come from, and what makes them tokens.

  Raises:
    ValueError: the file of problems, the task or the tokenizer cannot be used.
  """
  task = make_task(
    config.task,
    config.data.path,
    config.data.seed,
    # The tokenizer may need the task's vocabulary: made next, called later.
    lambda text: len(tokenizer.encode(text)),
  )
  tokenizer = make_tokenizer(
    config.data.tokenizer, task.vocabulary, task.text_separator
  )
  return task, tokenizer
