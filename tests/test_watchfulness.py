"""What a run notices: numbers that are not finite, memory that is not there."""

import dataclasses
import types

import jax
import numpy as np
import pytest

from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.training import checkpoints, loop, optimizers
from sleep_jax.training.step import (
  TrainState,
  init_params,
  make_train_step,
  model_flops,
  run,
)
from tests import test_loop, test_step

SKIPPING = dataclasses.replace(
  test_step.CONFIG,
  optimizer=dataclasses.replace(test_step.CONFIG.optimizer, skipped_steps=2),
)
MODEL = HybridLM(SKIPPING.model, test_step.VOCABULARY)


def poisoned(batch):
  """Without a place that counts the mean loss, and its gradient, are 0 / 0."""
  return batch._replace(loss_mask=batch.loss_mask & False)


@pytest.fixture(scope="module")
def step():
  """(a step that skips, a state from which it may start)."""
  optimizer = optimizers.optimizer(SKIPPING.optimizer, 10)
  take = make_train_step(MODEL, optimizer, SKIPPING)
  params = init_params(MODEL, 0)

  def state():
    mine = jax.tree.map(np.array, params)
    return TrainState(mine, optimizer.init(mine))

  return take, state


def norm(tree):
  squares = [np.sum(np.square(np.float64(x))) for x in jax.tree.leaves(tree)]
  return np.sqrt(np.sum(squares))


def test_norms_of_a_step(step):
  take, state = step
  start, batch = state(), test_step.make_batch()
  memory = run(MODEL, SKIPPING, jax.device_put(start.params), batch).memory
  rows = [
    norm([x[:, row] for x in jax.tree.leaves(memory.state)])
    for row in range(len(batch.inputs))
  ]
  after, metrics = take(start, batch, np.int32(2))
  np.testing.assert_allclose(metrics["state_norm"], np.mean(rows), rtol=1e-5)
  np.testing.assert_allclose(
    metrics["param_norm"], norm(after.params), rtol=1e-5
  )
  assert metrics["bad_leaf"] == -1


def test_a_step_without_a_finite_gradient_is_skipped_and_counted(step):
  take, state = step
  batch, passes = test_step.make_batch(), np.int32(2)
  bad, said = poisoned(batch), []
  current = state()
  for some in (batch, bad, bad, batch, bad):
    before = jax.tree.map(np.array, current)
    current, metrics = take(current, some, passes)
    said.append((metrics["skipped_steps"], metrics["skipped_in_a_row"]))
    moments = before.optimizer.inner_state, current.optimizer.inner_state
    same = [
      all(
        np.array_equal(x, y)
        for x, y in zip(*map(jax.tree.leaves, pair), strict=True)
      )
      for pair in (moments, (before.params, current.params))
    ]
    assert same == [some is bad] * 2
    assert np.isnan(metrics["loss"]) == (some is bad)
  assert said == [(0, 0), (1, 1), (2, 2), (2, 0), (3, 1)]


def test_the_first_bad_leaf_is_told(step):
  """Of the gradient, and where that is finite of the new parameters."""
  take, state = step
  batch, start = test_step.make_batch(), state()
  params = start.params
  _, metrics = take(state(), poisoned(batch), np.int32(2))
  assert metrics["bad_leaf"] == 0
  # A token that no row has: nothing but weight decay touches its row.
  unused = np.setdiff1d(np.arange(test_step.VOCABULARY), batch.inputs)[0]
  params["embedding"]["embedding"][unused] = np.nan
  _, metrics = take(start, batch, np.int32(2))
  assert np.isfinite(metrics["loss"]) and np.isnan(metrics["param_norm"])
  names = [
    jax.tree_util.keystr(x) for x, _ in jax.tree.leaves_with_path(params)
  ]
  bad = int(metrics["bad_leaf"]) - len(names)
  assert names[bad] == "['embedding']['embedding']"


def lines(skipped=0, flops=None):
  """`_Lines` over parameters a and b, and where what they write goes."""
  config = dataclasses.replace(
    test_loop.CONFIG,
    optimizer=dataclasses.replace(
      test_loop.CONFIG.optimizer, skipped_steps=skipped
    ),
  )
  written = []
  writer = types.SimpleNamespace(write=lambda *line: written.append(line))
  made = loop._Lines(config, {"a": 0, "b": 0}, writer)
  made.flops = flops
  return made, written


def metrics(loss=1.0, bad=-1, in_a_row=None, **others):
  skips = {}
  if in_a_row is not None:
    skips = {"skipped_steps": 7, "skipped_in_a_row": in_a_row}
  return {
    "loss": np.float32(loss),
    "grad_norm": np.float32(loss),
    "param_norm": np.float32(1),
    "bad_leaf": np.int32(bad),
    **skips,
    **others,
  }


@pytest.mark.parametrize(
  "step, message",
  [
    (metrics(np.nan, 0), "the gradient of a is not finite at step 5"),
    (metrics(np.nan, 1), "the gradient of b is not"),
    (metrics(1, 2, param_norm=np.float32(np.inf)), "^a is not"),
    (metrics(np.nan), "the loss is not finite at step 5"),
  ],
)
def test_the_first_step_and_leaf_are_named(step, message):
  """Steps 4 to 6 in a line that is written first."""
  watched, written = lines()
  for some in (metrics(), step, metrics(np.nan, 3)):
    watched.add(some)
  watched.end(6)
  with pytest.raises(ValueError, match=message):
    watched.flush()
  ((number, line),) = written
  assert number == 6 and line["loss"] == 1.0
  assert "bad_leaf" not in line and "model_flops_per_second" not in line


def test_skipped_steps_count_in_no_mean_until_they_are_too_many():
  watched, written = lines(skipped=2, flops=1000)
  for row in (metrics(2.0, in_a_row=0), metrics(np.nan, 0, in_a_row=1)):
    watched.add(row)
  watched.end(2)
  watched.flush()
  ((_, line),) = written
  assert line["loss"] == 2.0 and line["skipped_steps"] == 7
  flops = 1000 * line["steps_per_second"]
  assert line["model_flops_per_second"] == pytest.approx(flops)
  for in_a_row in (2, 3):
    watched.add(metrics(np.nan, 0, in_a_row=in_a_row))
  watched.end(4)
  with pytest.raises(ValueError, match="the gradient of a .* at step 4"):
    watched.flush()


def test_model_flops_of_matrices():
  """No more than thrice 2 x tokens x weights and what has no weights."""
  params = jax.eval_shape(lambda: init_params(MODEL, 0))
  batch, sleep = test_step.make_batch(), SKIPPING.sleep
  flops = model_flops(MODEL, SKIPPING, params, batch)
  kernels = jax.tree.leaves_with_path(params)
  blocks = sum(x.size for path, x in kernels if "_proj" in str(path))
  tokens = batch.inputs.size // 2 * (sleep.passes + 1)
  head = batch.inputs.size * params["head"]["kernel"].size
  least = 3 * 2 * (tokens * blocks + head)
  assert least < flops < 2 * least


def test_out_of_memory_takes_one_line(tmp_path, monkeypatch):
  sizes = "argument output temp generated_code".split()
  memory = {f"{name}_size_in_bytes": 2**20 * i for i, name in enumerate(sizes)}

  class Compiled:
    def memory_analysis(self):
      return types.SimpleNamespace(**memory)

    def __call__(self, *_):
      raise jax.errors.JaxRuntimeError(
        "RESOURCE_EXHAUSTED: Out of memory while trying to allocate 9 bytes\n"
        "and much more"
      )

  lowered = types.SimpleNamespace(compile=Compiled)
  step = types.SimpleNamespace(lower=lambda *_: lowered)
  monkeypatch.setattr(loop, "make_train_step", lambda *_: step)
  with pytest.raises(ValueError) as error:
    loop.train(test_loop.CONFIG, tmp_path)
  said = str(error.value)
  assert "\n" not in said and "much more" not in said
  for part in (
    *("trying to allocate 9 bytes", "temp 2.0 MiB", "accumulation_steps"),
    *("sleep.remat_windows", "mesh.fsdp"),
  ):
    assert part in said, part


def test_a_metric_that_no_evaluation_gives_is_told_before_a_folder_is_made(
  tmp_path,
):
  run = dataclasses.replace(
    test_loop.CONFIG.run, checkpoint_every=3, keep_best="eval/heldout/loss"
  )
  config = dataclasses.replace(test_loop.CONFIG, run=run)
  with pytest.raises(ValueError, match="give eval/seen/accuracy"):
    loop.train(config, tmp_path / "run")
  assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_a_run_skips_and_ends_when_too_many_follow_each_other(
  tmp_path, monkeypatch
):
  config = dataclasses.replace(
    test_loop.CONFIG,
    optimizer=dataclasses.replace(test_loop.CONFIG.optimizer, skipped_steps=1),
    run=dataclasses.replace(
      test_loop.CONFIG.run, steps=6, log_every=1, evaluate_every=9
    ),
  )
  bad, place, placed = {2, 5, 6}, loop.sharding.place, []

  def place_some_poisoned(batch):
    placed.append(batch)
    return place(poisoned(batch) if len(placed) in bad else batch)

  monkeypatch.setattr(loop.sharding, "place", place_some_poisoned)
  message = r"the gradient of embedding/embedding is not finite at step 6"
  with pytest.raises(ValueError, match=message):
    loop.train(config, tmp_path)
  written = test_loop.lines(tmp_path)
  assert [line["skipped_steps"] for line in written] == [0, 1, 1, 1, 2, 3]
  assert written[1]["loss"] is None and written[2]["loss"] > 0
  saved = {int(x.name) for x in (tmp_path / "checkpoints").iterdir()}
  assert saved == {2, 4}
  params = test_loop.final_params(tmp_path)
  assert all(np.all(np.isfinite(x)) for x in jax.tree.leaves(params))
  # The same command goes on from there, and ends at the same step.
  placed[:] = [None] * 4
  with pytest.raises(ValueError, match=message):
    loop.train(config, tmp_path)
  assert checkpoints.is_started(tmp_path)
