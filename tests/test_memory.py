"""The compiler's memory figures: what each saver leaves to keep."""

import dataclasses

import jax
import pytest

from experiments import automaton, memory

MIB = 2**20


@pytest.mark.slow
def test_what_a_pass_and_a_window_add():
  """With savers: (h, S) a pass, ids and S a window, and nothing beyond the
  horizon; S is large here so that it tells."""
  config = automaton.tiny()
  config = dataclasses.replace(
    config,
    model=dataclasses.replace(config.model, key_dim=64, value_dim=64),
    data=dataclasses.replace(config.data, batch_size=128),
  )

  def used(saver, passes, windows):
    return memory.temporaries(
      *(config, jax.devices()[0], passes, windows, memory.SAVERS[saver])
    )

  def floors(passes, windows):
    return memory._floor(config, passes, windows)

  _, one_pass = floors(1, 1)
  assert one_pass > 4 * MIB
  added = used("windows", 8, 1) - used("windows", 4, 1)
  assert added == pytest.approx(4 * one_pass, rel=0.05)
  one_window, _ = floors(1, 1)
  added = used("windows", 1, 16) - used("windows", 1, 4)
  assert added == pytest.approx(12 * one_window, rel=0.05)
  # All of it again without savers, where each pass keeps more.
  assert used("blocks", 8, 1) - used("blocks", 4, 1) > 4.2 * one_pass
  added = used("truncated", 8, 16) - used("truncated", 4, 4)
  # 12 windows more, of which ids alone are there, and their copy by windows.
  ids = 10 * config.data.batch_size * config.sleep.window_length
  assert added < 12 * 2 * ids < 0.2 * one_window
