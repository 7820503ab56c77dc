"""OLMo-Hybrid against what transformers computes with the same folder.

`make_olmo_hybrid.py` stored it.
"""

import os
from pathlib import Path

import jax
import numpy as np
import pytest

from sleep_jax.pretrained import check, convert, export
from tests import hf_folders
from tests.test_export import bits

GOLDEN = Path(__file__).parent / "golden"
CASES = {
  "olmo_hybrid_tiny": hf_folders.OLMO_HYBRID,
  "olmo_hybrid_turned_tiny": hf_folders.OLMO_HYBRID_TURNED,
}


def write(folder, name="olmo_hybrid_tiny", **changes):
  """The folder of stored weights; `changes` are those of its config.json."""
  weights, _ = hf_folders.stored(name, GOLDEN)
  return hf_folders.write(folder, CASES[name] | changes, weights)


@pytest.mark.parametrize("name", CASES)
def test_logits_and_fast_weights_are_theirs_and_a_round_trip_the_same_bits(
  tmp_path, name
):
  """Of all layers, over more than one chunk of theirs and of ours."""
  folder = write(tmp_path / "hf", name)
  convert.convert(folder, tmp_path / "w")
  _, arrays = hf_folders.stored(name, GOLDEN)
  np.savez(tmp_path / "expected.npz", **arrays)
  with jax.enable_x64(True):
    errors = check.check(tmp_path / "w", tmp_path / "expected.npz", "float64")
  assert errors.pop("logits") < 1e-7  # stored in float32
  assert errors.keys() == {"S.0", "S.1", "S.3"}
  assert max(errors.values()) < 1e-12, errors
  export.export(tmp_path / "w", tmp_path / "again")
  assert bits(tmp_path / "again") == bits(folder)


@pytest.mark.parametrize(
  "changes, message",
  [
    (dict(linear_num_key_heads=1), "key_heads = 1, but only 2 is known"),
    (dict(attention_bias=True), "attention_bias = True, but only False"),
    (dict(hidden_act="gelu"), "hidden_act = 'gelu', but only 'silu'"),
    (
      dict(layer_types=["linear_attention"] * 3 + ["sliding_attention"]),
      "layer_types has .'sliding_attention'.: not .'linear_attention', 'full",
    ),
    (
      dict(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}),
      "rope_parameters: rope_type = 'yarn', but only 'default'",
    ),
    (dict(rope_parameters="none"), "rope_parameters = 'none' is no object"),
    (dict(rope_parameters=None), "rope_theta is missing"),
    (dict(linear_allow_neg_eigval=None), "neg_eigval = None is no bool"),
    (dict(linear_key_head_dim=5), r"k_conv1d.weight is \[8, 1, 4\].*\[10, 1,"),
  ],
)
def test_what_is_not_computed_here_is_one_line(tmp_path, changes, message):
  folder = write(tmp_path / "hf", **changes)
  with pytest.raises(ValueError, match=message) as caught:
    convert.convert(folder, tmp_path / "w")
  assert len(str(caught.value).splitlines()) == 1
  assert os.listdir(tmp_path) == ["hf"]
