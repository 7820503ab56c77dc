"""Metrics of a run: metrics.jsonl always, TensorBoard and progress beside it.

metrics.jsonl has one object per line, {"step": k, "loss": 1.5, ...}; a value
that is not finite is null.
"""

import json
import math
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import SupportsFloat

from absl import logging
from tqdm import tqdm

from sleep_jax.training.workdir import write_atomically


class MetricsWriter:
  """Writes metrics in `workdir`, and shows them: a context manager.

  On a terminal a bar shows the training metrics; elsewhere every line of
  metrics is logged.
  """

  def __init__(
    self,
    workdir: str | os.PathLike,
    *,
    total_steps: int,
    start_step: int = 0,
    tensorboard: bool = False,
    process_index: int = 0,
  ):
    """Opens metrics.jsonl, dropping what a resumed run will write again.

    Args:
      workdir: the run's folder.
      total_steps: where the run ends.
      start_step: the step resumed from; later lines are dropped, and the
        last evaluation, which every run ends with. 0 starts the file afresh.
      tensorboard: also writes event files to `workdir`/tensorboard.
      process_index: only process 0 writes and shows anything.

    Raises:
      ValueError: `tensorboard` without tensorboardX.
      OSError: the files cannot be written.
    """
    self.workdir = workdir = Path(workdir)
    self._writes = process_index == 0
    # Whether the step resumed from was judged; only process 0 knows.
    self.judged = False
    if not self._writes:
      return
    self._tensorboard = None
    if tensorboard:
      self._tensorboard = _summary_writer(workdir / "tensorboard", start_step)
    path = workdir / "metrics.jsonl"
    lines = _lines_until(path, start_step, total_steps)
    self.judged = any(_judges(line, start_step) for line in lines)
    kept = "".join(json.dumps(line) + "\n" for line in lines)
    write_atomically(path, kept)
    self._file = open(path, "a", encoding="utf-8")
    self._total_steps = total_steps
    self._bar = None
    if sys.stderr.isatty():
      self._bar = tqdm(total=total_steps, initial=start_step, unit="step")

  def write(self, step: int, metrics: Mapping[str, SupportsFloat]) -> None:
    """Records the metrics of a step and shows them.

    Raises:
      OSError: the disk is full.
    """
    if not self._writes:
      return
    values = {name: float(value) for name, value in metrics.items()}
    line = {"step": step} | {
      name: value if math.isfinite(value) else None
      for name, value in values.items()
    }
    self._file.write(json.dumps(line, allow_nan=False) + "\n")
    self._file.flush()
    if self._tensorboard is not None:
      for name, value in values.items():
        self._tensorboard.add_scalar(name, value, step)
    self._show(step, values)

  def _show(self, step: int, values: dict[str, float]) -> None:
    if self._bar is None:
      logging.info(_progress_line(step, self._total_steps, values))
      return
    if "loss" in values:
      shown = ("loss", "accuracy", "tokens_per_second")
      self._bar.set_postfix(
        {n.replace("_per_", "/"): values[n] for n in shown if n in values},
        refresh=False,
      )
    else:  # an evaluation: keep it on the screen, above the bar
      self._bar.write(
        _progress_line(step, self._total_steps, values), file=sys.stderr
      )
    self._bar.update(step - self._bar.n)

  def close(self) -> None:
    """Closes the files.

    Raises:
      OSError: the disk is full.
    """
    if not self._writes:
      return
    if self._bar is not None:
      self._bar.close()
    if self._tensorboard is not None:
      self._tensorboard.close()
    self._file.close()

  def __enter__(self) -> "MetricsWriter":
    return self

  def __exit__(self, *exception: object) -> None:
    self.close()


def read_metrics(path: str | os.PathLike) -> list[dict]:
  """Returns the lines of a metrics.jsonl, without one cut short by a crash."""
  lines = []
  for text in Path(path).read_text("utf-8", "replace").splitlines():
    try:
      line = json.loads(text)
      if not (isinstance(line, dict) and type(line.get("step")) is int):
        raise ValueError("no line of metrics")
      lines.append(line)
    except ValueError:
      logging.warning("%s: a line that is no metrics is passed over", path)
  return lines


def _lines_until(path: Path, step: int, total_steps: int) -> list[dict]:
  if step == 0 or not path.exists():
    return []
  return [
    line
    for line in read_metrics(path)
    if line["step"] <= step and not _judges(line, total_steps)
  ]


def _judges(line: dict, step: int) -> bool:
  """Whether a line is an evaluation of the step."""
  return line["step"] == step and "loss" not in line


def _progress_line(
  step: int, total_steps: int, values: dict[str, float]
) -> str:
  shown = [f"step {step}/{total_steps}"]
  shown += [f"{name} {value:.4g}" for name, value in values.items()]
  steps_per_second = values.get("steps_per_second", 0)
  if steps_per_second > 0:
    left = (total_steps - step) / steps_per_second
    shown.append(f"{tqdm.format_interval(left)} left")
  return "  ".join(shown)


def _summary_writer(folder: Path, start_step: int):
  try:
    from tensorboardX import SummaryWriter
  except ImportError as error:
    raise ValueError(
      "tensorboard needs tensorboardX: pip install 'sleep_jax[tensorboard]'"
    ) from error
  return SummaryWriter(str(folder), purge_step=start_step + 1)
