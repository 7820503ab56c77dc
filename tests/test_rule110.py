import dataclasses
import re

import numpy as np
import pytest

from experiments import automaton
from sleep_jax.tasks.rule110 import Rule110, Rule110Config, rollout

# (left, centre, right) -> new
TABLE = {
  (1, 1, 1): 0,
  (1, 1, 0): 1,
  (1, 0, 1): 1,
  (1, 0, 0): 0,
  (0, 1, 1): 1,
  (0, 1, 0): 1,
  (0, 0, 1): 1,
  (0, 0, 0): 0,
}
START = "010111010010110111001101"


def to_bits(text):
  return np.array([int(bit) for bit in text])


def to_text(bits):
  return "".join(map(str, bits))


def roll_out_by_table(text, steps, boundary):
  bits = [int(bit) for bit in text]
  for _ in range(steps):
    ends = (bits[-1], bits[0]) if boundary == "periodic" else (0, 0)
    padded = [ends[0], *bits, ends[1]]
    bits = [TABLE[tuple(padded[i : i + 3])] for i in range(len(bits))]
  return to_text(bits)


def test_rollout_of_a_single_one():
  bits = to_bits("0" * 23 + "1")
  for steps, end in enumerate(
    ["1", "011", "0111", "01101", "011111", "0110001"]
  ):
    assert to_text(rollout(bits, steps)) == end.rjust(24, "0")


def test_rollout_of_a_random_string():
  for steps, text in {
    1: "111101110111111101011111",
    4: "011111011100011100110000",
    8: "111100011101000011010111",
    16: "000100110111110001000011",
    32: "011111000111110101110011",
  }.items():
    assert to_text(rollout(to_bits(START), steps)) == text
  firsts = [rollout(to_bits(START), steps)[0] for steps in range(33)]
  assert to_text(firsts) == "010001101000110100010110001011000"


def test_rollout_is_not_that_of_the_mirror_image():
  # Read from right to left the same strings obey rule 124.
  mirrored = [
    rollout(to_bits(START)[::-1], steps)[::-1][0] for steps in range(33)
  ]
  assert to_text(mirrored) != "010001101000110100010110001011000"


@pytest.mark.parametrize("boundary", ["periodic", "zero"])
@pytest.mark.parametrize("width", [3, 7, 24, 61])
def test_rollout_obeys_the_table(width, boundary):
  bits = np.random.default_rng(width).integers(0, 2, (5, 3, width))
  rolled = rollout(bits, 6, boundary)
  assert rolled.shape == bits.shape and rolled.dtype == bits.dtype
  for before, after in zip(
    bits.reshape(-1, width), rolled.reshape(-1, width), strict=True
  ):
    expected = roll_out_by_table(to_text(before), 6, boundary)
    assert to_text(after) == expected


def test_periodic_labels_are_open_and_zero_labels_stick():
  bits = np.random.default_rng(0).integers(0, 2, (100_000, 24))
  for steps, share in {0: 0.500, 1: 0.624, 4: 0.536, 32: 0.562}.items():
    assert abs(rollout(bits, steps)[:, 0].mean() - share) < 0.006
  assert rollout(bits, 14, "zero")[:, 0].mean() > 0.9995


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("boundary", ["periodic", "zero"])
def test_labels_are_the_first_bits_of_the_strings(split, boundary):
  task = Rule110(Rule110Config(steps=9, boundary=boundary), seed=3)
  for index in range(20):
    example = task.example(split, index)
    strings = [example.context[i : i + 24] for i in range(0, 96, 24)]
    assert len(example.context) == 96
    assert example.questions[0].answer == "".join(
      roll_out_by_table(string, 9, boundary)[0] for string in strings
    )
    assert (example.depth, example.mode) == (9, "strings")


def test_training_begins_with_the_curriculum():
  curriculum = ((3, 2), (3, (5, 4)))
  config = Rule110Config(width=12, steps=9, curriculum=curriculum)
  task, plain = (
    Rule110(c, seed=0)
    for c in (config, dataclasses.replace(config, curriculum=()))
  )
  for index, steps in enumerate([2, 2, 2, 5, 4, 5, 9, 9]):
    example = task.example("train", index)
    # The same strings, otherwise asked about.
    assert example.context == plain.example("train", index).context
    strings = [example.context[i : i + 12] for i in range(0, 48, 12)]
    assert example.questions[0].answer == "".join(
      roll_out_by_table(string, steps, "periodic")[0] for string in strings
    )
    assert example.depth == steps
    for split in task.eval_splits:
      assert task.example(split, index) == plain.example(split, index)


@pytest.mark.parametrize("boundary", ["periodic", "zero"])
def test_each_pass_should_make_its_updates_and_move_them(boundary):
  """Place i holds bit i - m of the string after m updates, m = 0, 3, 6, 7.

  An easier example takes the last of the passes, as many as it needs.
  """
  task = Rule110(
    Rule110Config(
      width=5,
      strings=2,
      steps=7,
      pass_steps=3,
      boundary=boundary,
      curriculum=((1, 2),),
    ),
    seed=0,
  )
  for index, made in ((0, (0, 2)), (1, (0, 3, 6, 7))):
    example = task.example("train", index)
    not_taken = [""] * (4 - len(made))
    assert example.pass_targets[: len(not_taken)] == not_taken
    taken = example.pass_targets[len(not_taken) :]
    for steps, text in zip(made, taken, strict=True):
      for start in (0, 5):
        string = example.context[start : start + 5]
        after = roll_out_by_table(string, steps, boundary)
        for i in range(5):
          assert text[start + i] == after[(i - steps) % 5]
  assert not Rule110(Rule110Config(), seed=0).example("train", 0).pass_targets


def test_a_curriculum_takes_no_more_passes_than_the_task():
  at_most = Rule110Config(steps=7, pass_steps=3, curriculum=((1, (2, 9)),))
  assert at_most.passes_of(9) == 4
  with pytest.raises(ValueError, match="t of 10 takes 5 .* the 4 of .* = 7;"):
    dataclasses.replace(at_most, curriculum=((1, 2), (1, (10, 2))))


def test_deep_takes_passes_as_t_needs_them():
  config = automaton.deep()
  task = Rule110(config.task, config.data.seed)
  trained = config.run.steps * config.data.batch_size
  for index, taken in ((0, 2), (22_401, 3), (44_801, 4), (64_000, 5)):
    texts = task.example("train", index).pass_targets
    assert list(map(len, texts)) == [0] * (5 - taken) + [32] * taken
  assert len(texts) == config.sleep.passes
  assert all(task.example("train", trained - 1).pass_targets)


def test_bits_are_fair_and_strings_differ():
  task = Rule110(Rule110Config(), seed=0)
  contexts = [task.example("train", i).context for i in range(2000)]
  bits = np.array([to_bits(context) for context in contexts])
  assert np.abs(bits.mean(axis=0) - 0.5).max() < 0.05
  assert len(set(contexts)) == 2000


def test_examples_depend_on_seed_split_and_index():
  config = Rule110Config(width=12)
  example = Rule110(config, seed=0).example("train", 7)
  assert Rule110(config, seed=0).example("train", 7) == example
  assert Rule110(config, seed=1).example("train", 7) != example
  assert Rule110(config, seed=0).example("seen", 7) != example
  assert Rule110(config, seed=0).example("train", 8) != example


def test_examples_stay_the_same_between_releases():
  task = Rule110(Rule110Config(width=8, strings=2, steps=3), seed=0)
  contexts = [task.example("train", i).context for i in range(2)]
  assert contexts == ["1111001111110011", "1010000101001111"]


def draw_strings(task, split):
  contexts = [task.example(split, i).context for i in range(4000)]
  return {c[i : i + 10] for c in contexts for i in range(0, 40, 10)}


def test_heldout_strings_are_never_trained_on():
  config = Rule110Config(width=10, strings=4)
  task = Rule110(config, seed=0)
  assert task.eval_splits == ("seen", "heldout")
  drawn = {
    split: draw_strings(task, split) for split in ("train", "seen", "heldout")
  }
  assert drawn["train"] == drawn["seen"]
  assert not drawn["train"] & drawn["heldout"]
  assert len(drawn["heldout"]) == 2**10 / 8
  assert len(drawn["train"]) == 2**10 * 7 / 8
  # Another seed holds out the same strings.
  assert draw_strings(Rule110(config, seed=1), "heldout") == drawn["heldout"]


@pytest.mark.parametrize(
  "config", [Rule110Config(width=17), Rule110Config(heldout_fraction=0.0)]
)
def test_nothing_is_held_out_of_long_strings(config):
  task = Rule110(config, seed=0)
  assert task.eval_splits == ("test",)
  assert task.size("train") is None and task.size("test") is None


@pytest.mark.parametrize(
  "settings",
  [
    {"width": 2},
    {"width": 63},
    {"strings": 0},
    {"steps": -1},
    {"curriculum": ((10, 4), (0, 5))},
    {"curriculum": ((10, 4, 4),)},
    {"curriculum": ((10, ()),)},
    {"curriculum": ((10, (4, -1)),)},
    {"boundary": "mirror"},
    {"heldout_fraction": 0.6},
    {"width": 6, "heldout_fraction": 0.01},
  ],
)
def test_bad_settings_are_named(settings):
  (field, value) = list(settings.items())[-1]
  with pytest.raises(
    ValueError, match=re.escape(f"task.{field} = {value!r}: use")
  ):
    Rule110Config(**settings)


def test_unknown_split_and_boundary_are_named():
  task = Rule110(Rule110Config(), seed=0)
  with pytest.raises(ValueError, match="'heldout': use one of"):
    task.example("heldout", 0)
  with pytest.raises(ValueError, match="'mirror': use one of"):
    rollout(to_bits(START), 1, "mirror")
