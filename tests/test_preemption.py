"""Told to end, a run saves what it has and goes on from there, to the bit."""

import os
import signal

import pytest

from sleep_jax.training import loop
from sleep_jax.training.preemption import Preempted
from tests.test_loop import CONFIG, equal, final_params, lines


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory):
  workdir = tmp_path_factory.mktemp("unbroken")
  return workdir, loop.train(CONFIG, workdir)


def evaluations(workdir):
  return [line for line in lines(workdir) if "loss" not in line]


@pytest.mark.parametrize(
  "moment, step",
  [("draw_passes", 1), ("evaluate_sets", 3), ("write_results", None)],
)
def test_a_signal_at_any_moment(unbroken, tmp_path, monkeypatch, moment, step):
  """In the first step, in the evaluation after the third, and too late."""
  module = loop.judging if moment == "write_results" else loop
  original = getattr(module, moment)

  def and_signal(*arguments):
    os.kill(os.getpid(), signal.SIGTERM)
    return original(*arguments)

  before = signal.getsignal(signal.SIGTERM)
  with monkeypatch.context() as patch:
    patch.setattr(module, moment, and_signal)
    if step:
      with pytest.raises(Preempted, match=f"step {step} is saved"):
        loop.train(CONFIG, tmp_path)
    else:
      assert loop.train(CONFIG, tmp_path) == unbroken[1]
  assert signal.getsignal(signal.SIGTERM) == before
  if step:
    assert (tmp_path / "checkpoints" / str(step)).is_dir()
    assert loop.train(CONFIG, tmp_path) == unbroken[1]
  assert equal(final_params(tmp_path), final_params(unbroken[0]))
  # An evaluation that was cut short is made up for.
  assert evaluations(tmp_path) == evaluations(unbroken[0])
