"""Sessions on disk: one file, of always the same size.

numpy's .npz without pickles, each array under its path in the `State`, and a
JSON header that says what the file belongs to.
"""

import dataclasses
import io
import json
import os
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sleep_jax.array_types import by_name
from sleep_jax.session import Session, State, shapes
from sleep_jax.training.workdir import write_atomically

FORMAT, VERSION = "sleep_jax.session", 1
# Settings of sleep without which a state means something else.
_LASTING = (
  "window_length",
  "eviction",
  "kept_pass",
  "carry_convolution",
  "looped_groups",
)


def save(path: str | os.PathLike, session: Session, params, state: Any) -> None:
  """Writes the state whole, or leaves the file as it was.

  Raises:
    ValueError: the state is of another model.
    OSError: it cannot be written.
  """
  header = _header(session, params, session.check_state(state))
  arrays = {
    name: np.asarray(leaf).view(_storable(leaf.dtype))
    for name, leaf in by_name(state).items()
  }
  text = np.frombuffer(json.dumps(header).encode(), np.uint8)
  file = io.BytesIO()
  np.savez(file, allow_pickle=False, header=text, **arrays)
  write_atomically(path, file.getvalue())


def load(path: str | os.PathLike, session: Session, params) -> State:
  """The state that `save` wrote, in this process or another.

  Raises:
    ValueError: there is no such file, it is damaged, no session, of another
      version, or of another model, other parameters or windows.
  """
  try:
    with np.load(io.BytesIO(Path(path).read_bytes())) as file:
      there = {name: file[name] for name in file.files}
    header = json.loads(there.pop("header").tobytes())
    kind = header["format"], header["version"]
    batch = int(header["batch_size"])
  except OSError as error:
    raise ValueError(f"{path} cannot be read: {error.strerror}") from error
  except Exception as error:  # whatever the libraries raise on bad bytes
    raise ValueError(f"{path} is damaged, or no saved session: {error}") from (
      error
    )
  if kind != (FORMAT, VERSION):
    raise ValueError(
      f"{path} is {kind[0]!r}, version {kind[1]!r}, not {FORMAT!r}, version "
      f"{VERSION}: load it with the sleep_jax that saved it"
    )
  mine = _header(session, params, batch)
  for name in sorted(header | mine):
    was, now = header.get(name, "absent"), mine.get(name, "absent")
    if was != now:
      raise ValueError(
        f"{path} is a session with {name} = {was}, but here it is {now}: "
        "load it with the model and window that saved it"
      )
  like = shapes(session, batch)
  wanted = {
    name: (leaf.shape, _storable(leaf.dtype))
    for name, leaf in by_name(like).items()
  }
  if {name: (x.shape, x.dtype) for name, x in there.items()} != wanted:
    raise ValueError(f"{path} is damaged: its arrays are not its header's")
  leaves = [
    jnp.asarray(there[name].view(leaf.dtype))
    for name, leaf in by_name(like).items()
  ]
  return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _header(session: Session, params, batch_size: int) -> dict[str, Any]:
  """What a file must share with the session, as JSON gives it back."""
  model = dataclasses.asdict(session.model.config)
  sleep = dataclasses.asdict(session.config)
  checksum = 0
  for leaf in jax.tree.leaves(params):
    checksum = zlib.crc32(np.ascontiguousarray(leaf).tobytes(), checksum)
  header = {
    "format": FORMAT,
    "version": VERSION,
    "batch_size": batch_size,
    "vocabulary_size": session.model.vocabulary_size,
    "parameters' checksum": checksum,
  }
  header |= {
    f"model.{name}": value
    for name, value in model.items()
    if name != "implementation"  # the machine's choice
  }
  header |= {f"sleep.{name}": sleep[name] for name in _LASTING}
  return json.loads(json.dumps(header))


def _storable(dtype) -> np.dtype:
  """The dtype itself, or unsigned bits where numpy's format has none."""
  dtype = np.dtype(dtype)
  return dtype if dtype.isbuiltin == 1 else np.dtype(f"u{dtype.itemsize}")
