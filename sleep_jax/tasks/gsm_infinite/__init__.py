"""GSM-Infinite: grade-school math of a chosen depth, about small worlds."""

from sleep_jax.tasks.gsm_infinite.config import GsmInfiniteConfig
from sleep_jax.tasks.gsm_infinite.jsonl import GsmInfiniteFile
from sleep_jax.tasks.gsm_infinite.solver import Unsolvable, solve
from sleep_jax.tasks.gsm_infinite.task import GsmInfinite, Problem
from sleep_jax.tasks.gsm_infinite.text import split_words

__all__ = [
  "GsmInfinite",
  "GsmInfiniteConfig",
  "GsmInfiniteFile",
  "Problem",
  "Unsolvable",
  "solve",
  "split_words",
]
