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


def vocabulary_size(config: ExperimentConfig, tokenizer: Tokenizer) -> int:
  """Rows of the embedding.

  Raises:
    ValueError: `model.vocab_size` does not hold the tokenizer's tokens.
  """
  size = config.model.vocab_size or tokenizer.vocab_size
  if size < tokenizer.vocab_size:
    raise ValueError(
      f"model.vocab_size = {size}: the tokenizer has {tokenizer.vocab_size} "
      "tokens; set it to at least that, or to 0"
    )
  return size
