"""Folders out: what came in, to the bit."""

import dataclasses
import json

import numpy as np
import pytest

from sleep_jax.pretrained import convert, export, hf
from sleep_jax.training import checkpoints
from tests.test_convert import restore, with_jet_layers, write


def bits(folder):
  read = hf.Folder(folder)
  return {
    name: (read.dtypes[name], read.shapes[name], read.read(name).tobytes())
    for name in read.shapes
  }


@pytest.mark.parametrize(
  "kind, dtype, files", [("ouro", "float32", 3), ("jet", "bfloat16", 1)]
)
def test_a_round_trip_gives_the_same_bits(
  tmp_path, monkeypatch, kind, dtype, files
):
  folder = write(tmp_path / "hf", kind, dtype, files)
  convert.convert(folder, tmp_path / "w")
  monkeypatch.setattr(hf, "_SHARD_BYTES", 20_000 if files > 1 else 2**30)
  export.export(tmp_path / "w", tmp_path / "again")
  assert bits(tmp_path / "again") == bits(folder)
  for name in ("config.json", "tokenizer.json"):
    assert (tmp_path / "again" / name).read_text() == (
      folder / name
    ).read_text()
  shards = list((tmp_path / "again").glob("*.safetensors"))
  assert (len(shards) > 1) == (files > 1)
  with pytest.raises(ValueError, match="again exists"):
    export.export(tmp_path / "w", tmp_path / "again")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_was_trained_is_exported_with_its_inserted_layers(tmp_path, dtype):
  """And can be read again; a run trains in float32 what is kept in bfloat16."""
  folder = write(tmp_path / "hf", dtype=dtype)
  convert.convert(folder, tmp_path / "w", with_jet_layers())
  config, _, params = restore(tmp_path / "w")
  params["group_0"]["inserted_jet_1"]["mixer"]["o_proj"]["kernel"] += 1.0
  run = dataclasses.replace(config.run, init_from=str(tmp_path / "w"))
  config = dataclasses.replace(config, run=run)
  checkpoints.export_params(tmp_path / "run" / "params", params)
  (tmp_path / "run" / "commit_success.txt").touch()
  (tmp_path / "run" / "config.json").write_text(
    json.dumps(dataclasses.asdict(config))
  )
  export.export(tmp_path / "run", tmp_path / "trained")
  before, after = bits(folder), bits(tmp_path / "trained")
  own = {x: y for x, y in after.items() if "inserted" not in x}
  assert own == before
  name = "model.inserted_layers.1.self_attn.o_proj.weight"
  np.testing.assert_array_equal(hf.Folder(tmp_path / "trained").read(name), 1)
  convert.convert(tmp_path / "trained", tmp_path / "w2", with_jet_layers())
  export.export(tmp_path / "w2", tmp_path / "again")
  assert bits(tmp_path / "again") == after


def test_a_folder_that_is_no_converted_model_is_named(tmp_path):
  with pytest.raises(ValueError, match="is no converted model"):
    export.export(tmp_path, tmp_path / "out")
