"""Hugging Face folders: what is in one, and where it goes in our parameters.

An `Architecture` holds the name tables of one kind of model. A table has our
paths, as in "mixer/q_proj/kernel", and the tensors' names. Kernels are
transposed ([in, out] here, [out, in] there; [taps, channels] here, [channels,
1, taps] there), all else is as it is; blocks of a group are stacked on a
leading axis.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sleep_jax.config import ModelConfig

# What is read and written, by its name in safetensors files.
DTYPES = {"BF16": "bfloat16", "F32": "float32"}
# The layers that we insert have no name there; this is ours for the n-th.
INSERTED = "model.inserted_layers.{}."
LAYER = "model.layers.{}."
# A tied head may be there all the same.
HEAD = "lm_head.weight"
# Of these we may have more rows than there are.
VOCABULARY = ("embedding/embedding", "head/kernel")
_INDEX = "model.safetensors.index.json"
_SHARD_BYTES = 2**30


class Shape(NamedTuple):
  """What a config.json says of a model.

  Attributes:
    kinds: of its layers, in order.
    leaves: of `ModelConfig`, which must be these.
    loops: of the original; another number makes a model too.
    vocab_size: rows of its embedding; ours may have more.
  """

  kinds: tuple[str, ...]
  leaves: dict[str, Any]
  loops: int
  vocab_size: int


@dataclasses.dataclass(frozen=True)
class Architecture:
  """One kind of model: its config.json and its names.

  Attributes:
    class_name: of `architectures` in config.json.
    shape: config.json -> `Shape`; a ValueError names what it cannot be.
    whole: our paths -> names of tensors.
    layers: for each kind of block, our paths inside it -> names inside a layer.
      One array that is several tensors there, joined along the channels, has a
      name for each, after the path of the kernel whose channels it has.
  """

  class_name: str
  shape: Callable[["Numbers"], Shape]
  whole: Mapping[str, str]
  layers: Mapping[str, Mapping[str, str | Mapping[str, str]]]


class Tensor(NamedTuple):
  """A tensor of a folder, and the place in our parameters that it fills.

  Attributes:
    path: of our array.
    repeat: index on its leading axis; None if it has none.
    shape: in the folder.
    start: its first row in our array, as that would be in the folder.
  """

  path: str
  repeat: int | None
  shape: tuple[int, ...]
  start: int = 0

  def rows(self, array: np.ndarray) -> np.ndarray:
    """A view of our array, or of its repeat, with the rows first."""
    array = array if self.repeat is None else array[self.repeat]
    return array.T if self.path.endswith("kernel") else array


class Numbers:
  """A config.json, whose entries are there and of the right kind."""

  def __init__(self, entries: Mapping[str, Any], source: str):
    self.entries = entries
    self._source = source

  def __call__(self, name: str, kind: Any = int):
    """The entry "a.b.c"; a ValueError where it is missing or no `kind`."""
    value: Any = self.entries
    for part in name.split("."):
      if not isinstance(value, Mapping) or part not in value:
        raise ValueError(f"{self._source}: {name} is missing")
      value = value[part]
    # Numbers may stand there as text ("1e-5").
    try:
      right = kind(value)
    except (OverflowError, TypeError, ValueError):
      right = None
    if kind is int and right is not None and right < 1:
      raise ValueError(
        f"{self._source}: {name} = {value!r}: must be at least 1"
      )
    if right is None or (right != value and kind is not float):
      raise ValueError(
        f"{self._source}: {name} = {value!r} is no {kind.__name__}"
      )
    return right

  def section(self, name: str) -> "Numbers":
    """The object there; an empty one where it is null or missing."""
    entries = self.entries.get(name)
    if not isinstance(entries, Mapping | None):
      raise ValueError(f"{self._source}: {name} = {entries!r} is no object")
    return Numbers(entries or {}, f"{self._source}: {name}")

  def only(self, **entries: Any) -> None:
    """A ValueError where an entry is there and is not what we compute."""
    for name, wanted in entries.items():
      value = self.entries.get(name, wanted)
      if value != wanted:
        raise ValueError(
          f"{self._source}: {name} = {value!r}, but only {wanted!r} is known "
          "here"
        )


class Folder:
  """config.json, tokenizer.json and the tensors of a folder, read one by one.

  Raises:
    ValueError: something is missing, damaged, or of a kind that is not read.
  """

  def __init__(self, path: str | Path):
    self.path = Path(path)
    entries = self._json("config.json")
    self.config = Numbers(entries, f"{path}/config.json")
    if "quantization_config" in entries:
      raise ValueError(
        f"{path} is quantized: give the model in bfloat16 or float32"
      )
    self.tokenizer = self.path / "tokenizer.json"
    if not self.tokenizer.exists():
      raise ValueError(f"{path} has no tokenizer.json")
    self._files: dict[str, str] = {}
    self.shapes: dict[str, tuple[int, ...]] = {}
    self.dtypes: dict[str, str] = {}
    for file in self._shards():
      with self._open(file) as opened:
        for name in opened.keys():
          part = opened.get_slice(name)
          dtype = part.get_dtype()
          if dtype not in DTYPES:
            raise ValueError(
              f"{path}/{file}: {name} is {dtype}: give the model in bfloat16 "
              "or float32"
            )
          self._files[name] = file
          self.shapes[name] = tuple(part.get_shape())
          self.dtypes[name] = DTYPES[dtype]

  def read(self, name: str) -> np.ndarray:
    """A tensor. Its file is mapped only for so long: it stays in no memory."""
    with self._open(self._files[name]) as opened:
      return opened.get_tensor(name)

  def _shards(self) -> list[str]:
    if (self.path / _INDEX).exists():
      files = self._json(_INDEX).get("weight_map")
      if not isinstance(files, dict) or not all(
        isinstance(file, str) for file in files.values()
      ):
        raise ValueError(f"{self.path}/{_INDEX}: weight_map names no files")
      files = list(files.values())
    else:
      files = [file.name for file in self.path.glob("*.safetensors")]
    if not files:
      raise ValueError(f"{self.path} has no safetensors files")
    return sorted(set(files))

  def _json(self, name: str) -> dict[str, Any]:
    try:
      entries = json.loads((self.path / name).read_text())
    except OSError as error:
      raise ValueError(
        f"{self.path}/{name} cannot be read ({error.strerror}): give a Hugging "
        "Face folder"
      ) from error
    except ValueError as error:
      raise ValueError(f"{self.path}/{name} is no JSON: {error}") from error
    if not isinstance(entries, dict):
      raise ValueError(f"{self.path}/{name} is no JSON object")
    return entries

  @contextlib.contextmanager
  def _open(self, file: str):
    safetensors = _safetensors()
    try:
      with safetensors.safe_open(self.path / file, "np") as opened:
        yield opened
    except (OSError, safetensors.SafetensorError) as error:
      raise ValueError(
        f"{self.path}/{file} is missing or damaged ({error}): fetch it again"
      ) from error


def tensors(
  architecture: Architecture,
  config: ModelConfig,
  shapes: Mapping[str, tuple[int, ...]],
  vocab_size: int,
) -> dict[str, Tensor]:
  """Names of all tensors of a model, and where each belongs.

  Args:
    config: of our model.
    shapes: of our parameters, by path.
    vocab_size: rows that the embedding and the head have in the folder.
  """

  def tensor(path, repeat):
    shape = shapes[path] if repeat is None else shapes[path][1:]
    if path.endswith("kernel"):
      shape = shape[::-1]
    if path.endswith("_conv/kernel"):
      shape = (shape[0], 1, shape[1])
    if path in VOCABULARY:
      shape = (vocab_size, *shape[1:])
    return Tensor(path, repeat, shape)

  places = {
    name: tensor(path, None)
    for path, name in architecture.whole.items()
    if path in shapes
  }
  for layer in layers(config):
    for path, name in architecture.layers[layer.kind].items():
      if f"{layer.path}/{path}" not in shapes:
        continue
      whole = tensor(f"{layer.path}/{path}", layer.repeat)
      if isinstance(name, str):
        places[layer.prefix + name] = whole
        continue
      start = 0
      for like, part in name.items():
        rows = shapes[f"{layer.path}/{like}"][-1]
        shape = (rows, *whole.shape[1:])
        places[layer.prefix + part] = whole._replace(shape=shape, start=start)
        start += rows
  return places


class Layer(NamedTuple):
  """A block of a pattern, in the order in which they run.

  Attributes:
    prefix: of its tensors' names.
    group, place: in the pattern.
    repeat: of the group.
  """

  kind: str
  prefix: str
  group: int
  place: int
  repeat: int

  @property
  def path(self) -> str:
    return f"group_{self.group}/{self.kind}_{self.place}"


def layers(config: ModelConfig) -> list[Layer]:
  """All blocks of a model; inserted ones are counted apart."""
  found: list[Layer] = []
  counts = {LAYER: 0, INSERTED: 0}
  for group, (kinds, repeats) in enumerate(config.pattern):
    for repeat in range(repeats):
      for place, kind in enumerate(kinds):
        template = INSERTED if kind == "inserted_jet" else LAYER
        prefix = template.format(counts[template])
        counts[template] += 1
        found.append(Layer(kind, prefix, group, place, repeat))
  return found


def write_shards(
  path: Path, names: Mapping[str, Tensor], read: Callable[[Tensor], np.ndarray]
) -> None:
  """Writes safetensors files of about 1 GiB, with an index if there are more.

  Args:
    names: of the tensors to write.
    read: gives each of them, once.
  """
  files: list[list[str]] = []
  shard: dict[str, np.ndarray] = {}

  def close():
    file = f"model-{len(files) + 1:05d}.safetensors"
    metadata = {"format": "pt"}
    _safetensors().numpy.save_file(shard, path / file, metadata)
    files.append(list(shard))
    shard.clear()

  for name, tensor in names.items():
    shard[name] = np.ascontiguousarray(read(tensor))
    if sum(array.nbytes for array in shard.values()) > _SHARD_BYTES:
      close()
  if shard:
    close()
  if len(files) == 1:
    (path / "model-00001.safetensors").rename(path / "model.safetensors")
    return
  index = {
    name: f"model-{number:05d}.safetensors"
    for number, held in enumerate(files, 1)
    for name in held
  }
  text = json.dumps({"metadata": {}, "weight_map": index}, indent=2)
  (path / _INDEX).write_text(text)


def _safetensors() -> Any:
  try:
    import safetensors.numpy
  except ImportError as error:
    raise ValueError(
      "safetensors files need the package safetensors: install sleep_jax[hf]"
    ) from error
  return safetensors
