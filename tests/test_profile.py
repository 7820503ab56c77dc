"""What a profile shows: wake, the passes of a sleep, each block by name."""

import dataclasses
import shutil

import jax
import pytest

from sleep_jax.model.hybrid_lm import HybridLM
from sleep_jax.training import loop, step
from tests import test_loop, test_step


def test_parts_of_a_rollout_are_named():
  config = test_step.CONFIG
  model = HybridLM(config.model, test_step.VOCABULARY)
  params = jax.eval_shape(lambda: step.init_params(model, 0))
  lowered = jax.jit(
    lambda params, batch: step.run(model, config, params, batch).loss_sum
  ).lower(params, test_step.make_batch())
  text = lowered.as_text(debug_info=True)
  # A loop's body has names of its own, which XLA puts behind the loop's.
  for name in (
    *("jit(<lambda>)/wake/", '"sleep/', '"pass/'),
    *("attn_0/mixer/", "gdn_1/mlp/"),
  ):
    assert name in text, name


@pytest.mark.slow
@pytest.mark.parametrize("steps", [(2, 3), (3, 99)])
def test_profiled_steps_leave_a_trace(tmp_path, steps):
  """Also where the run ends, or goes on, between the first and the last."""

  def train():
    run = dataclasses.replace(test_loop.CONFIG.run, profile_steps=steps)
    loop.train(dataclasses.replace(test_loop.CONFIG, run=run), tmp_path)
    (trace,) = (tmp_path / "profile").rglob("*.xplane.pb")
    profile = trace.read_bytes()
    for part in ("sleep/while/body", "pass/HybridLM.blocks", "attn_0/mixer"):
      assert part.encode() in profile, part
    # For Perfetto.
    assert any((tmp_path / "profile").rglob("*.trace.json.gz"))

  train()
  # From step 4 on: where 2 and 3 are past, there is nothing to profile.
  shutil.rmtree(tmp_path / "checkpoints/6")
  shutil.rmtree(tmp_path / "profile")
  if steps[1] > 4:
    train()
