"""The folder of one run: config.json, metrics, results, checkpoints."""

import contextlib
import json
import os
import shutil
from collections.abc import Generator, Mapping
from pathlib import Path
from typing import Any

from sleep_jax.config import completed

_NAMED_DIFFERENCES = 4
# What does not change a run's results: it may go on with other values.
_FREE = ("mesh.", "run.keep_", "run.profile_steps")


def open_workdir(
  path: str | os.PathLike, config: Mapping[str, Any], process_index: int = 0
) -> Path:
  """Returns the folder of a run, created and holding `config` in config.json.

  A folder that already holds the same config is opened again, to resume; the
  mesh, the steps that are kept and those profiled may be others, and leaves
  that are newer than the folder count there as at their defaults.

  Args:
    path: the folder.
    config: the run's whole config as JSON can hold it; tuples are lists.
    process_index: only process 0 writes.

  Raises:
    ValueError: the folder cannot be created or written, or it holds a run
      with another config.
  """
  workdir = Path(path)
  config_path = workdir / "config.json"
  text = json.dumps(config, indent=2) + "\n"
  try:
    workdir.mkdir(parents=True, exist_ok=True)
    check_config(workdir, config)
    # Also when the config is already there: a folder that cannot be written
    # should be found out now, not at the first checkpoint.
    if process_index == 0:
      write_atomically(config_path, text)
  except OSError as error:
    raise ValueError(
      f"--workdir={workdir} cannot be written ({error.strerror}):"
      " choose another --workdir"
    ) from error
  return workdir


def check_config(path: str | os.PathLike, config: Mapping[str, Any]) -> None:
  """Checks that the folder `path`, if it holds a run, holds that of `config`.

  Raises:
    ValueError: it holds a run with another config, or nothing readable.
  """
  workdir = Path(path)
  try:
    old_text = (workdir / "config.json").read_text("utf-8", "replace")
  except FileNotFoundError:
    return
  try:
    stored = json.loads(old_text)
  except ValueError as error:
    raise ValueError(
      f"{workdir}/config.json is not JSON: choose another --workdir, or"
      " delete this one"
    ) from error
  old = _leaves(json.loads(json.dumps(completed(stored))))
  new = _leaves(json.loads(json.dumps(config)))
  differences = [
    f"{name}: {was!r} there, {now!r} now"
    for name in sorted(_leaves(stored) | new)
    if not name.startswith(_FREE)
    and (was := old.get(name, "absent")) != (now := new.get(name, "absent"))
  ]
  if not differences:
    return
  named = "; ".join(differences[:_NAMED_DIFFERENCES])
  if len(differences) > _NAMED_DIFFERENCES:
    named += f"; and {len(differences) - _NAMED_DIFFERENCES} more"
  raise ValueError(
    f"--workdir={workdir} holds a run with another config ({named}):"
    " choose another --workdir, or delete this one"
  )


def write_atomically(path: str | os.PathLike, content: str | bytes) -> None:
  """Writes the file whole, text in UTF-8, or leaves it as it was.

  Raises:
    OSError: the disk is full, or the folder cannot be written.
  """
  path = Path(path)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  try:
    with open(temporary, "wb") as file:
      file.write(content.encode() if isinstance(content, str) else content)
      file.flush()
      os.fsync(file.fileno())
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def new_folder(path: str | os.PathLike) -> Generator[Path, None, None]:
  """Gives the path of a folder to be made, which then becomes `path`, whole.

  Nothing is left of it if an exception ends the `with`.
  """
  path = Path(path)
  temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
  path.parent.mkdir(parents=True, exist_ok=True)
  try:
    yield temporary
    temporary.rename(path)
  finally:
    shutil.rmtree(temporary, ignore_errors=True)


def _leaves(config: Any, prefix: str = "") -> dict[str, Any]:
  """Dotted path -> value; a list is a leaf."""
  if not isinstance(config, dict):
    return {prefix: config}
  leaves: dict[str, Any] = {}
  for name, value in config.items():
    leaves |= _leaves(value, f"{prefix}.{name}" if prefix else name)
  return leaves
