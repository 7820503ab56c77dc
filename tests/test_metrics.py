"""The metrics file: one valid line per write, nothing twice after a resume."""

import importlib
import json
import logging
import os
import pty
import sys
import termios

import numpy as np
import pytest

from sleep_jax.training.metrics import MetricsWriter, read_metrics
from tests.test_workdir import full_disk


def lines(workdir):
  def refuse(constant):
    raise AssertionError(f"{constant} is not JSON")

  text = (workdir / "metrics.jsonl").read_text()
  assert text.endswith("\n")
  return [json.loads(x, parse_constant=refuse) for x in text.splitlines()]


def test_each_line_is_an_object_on_disk_at_once(tmp_path):
  with MetricsWriter(tmp_path, total_steps=20) as writer:
    writer.write(10, {"loss": np.float32(1.5), "accuracy": np.array(0.25)})
    assert lines(tmp_path) == [{"step": 10, "loss": 1.5, "accuracy": 0.25}]
    writer.write(20, {"eval/heldout/depth_4": 1})
    assert lines(tmp_path)[1] == {"step": 20, "eval/heldout/depth_4": 1.0}


def test_a_value_that_is_not_finite_is_null(tmp_path):
  with MetricsWriter(tmp_path, total_steps=1) as writer:
    writer.write(1, {"loss": float("nan"), "grad_norm": np.inf, "seconds": 2})
  assert lines(tmp_path) == [
    {"step": 1, "loss": None, "grad_norm": None, "seconds": 2.0}
  ]


def test_a_resumed_run_has_every_step_once(tmp_path):
  def run(start, stop):
    with MetricsWriter(tmp_path, total_steps=9, start_step=start) as writer:
      if start == 0:
        writer.write(0, {"loss": 0})
      for step in range(start + 1, stop + 1):
        writer.write(step, {"loss": 10 * start + step})

  run(0, 6)
  with open(tmp_path / "metrics.jsonl", "a") as file:
    file.write('{"step": 7, "lo')  # killed while writing
  run(4, 9)
  assert [(x["step"], x["loss"]) for x in lines(tmp_path)] == [
    *((step, step) for step in (0, 1, 2, 3, 4)),
    *((step, 40 + step) for step in (5, 6, 7, 8, 9)),
  ]
  run(0, 2)
  assert [x["step"] for x in lines(tmp_path)] == [0, 1, 2]


def test_a_line_cut_short_is_passed_over_in_reading(tmp_path):
  (tmp_path / "m").write_text('{"step": 1, "loss": null}\n{"step": 2, "l')
  assert read_metrics(tmp_path / "m") == [{"step": 1, "loss": None}]


def test_a_full_disk_is_an_oserror_and_the_file_goes_on_after_it(tmp_path):
  with full_disk(500), pytest.raises(OSError):
    with MetricsWriter(tmp_path, total_steps=99) as writer:
      for step in range(1, 99):
        writer.write(step, {"loss": 0.0})
  survived = len(read_metrics(tmp_path / "metrics.jsonl"))
  assert 15 <= survived <= 25  # lines of about 25 bytes
  with MetricsWriter(tmp_path, total_steps=99, start_step=survived) as writer:
    writer.write(survived + 1, {"loss": 0.0})
  assert [x["step"] for x in lines(tmp_path)] == [*range(1, survived + 2)]


def test_only_process_0_writes(tmp_path):
  with MetricsWriter(tmp_path, total_steps=1, process_index=1) as writer:
    writer.write(1, {"loss": 0.0})
  assert os.listdir(tmp_path) == []


def test_without_a_terminal_each_write_is_a_logged_line(tmp_path, caplog):
  with caplog.at_level(logging.INFO):
    with MetricsWriter(tmp_path, total_steps=100) as writer:
      writer.write(40, {"loss": 1.23456, "steps_per_second": 0.5})
  (record,) = caplog.records
  assert record.getMessage() == (
    # 60 steps at half a step a second are two minutes.
    "step 40/100  loss 1.235  steps_per_second 0.5  02:00 left"
  )


def test_on_a_terminal_a_bar_shows_the_run(tmp_path, monkeypatch):
  controller, terminal = pty.openpty()
  termios.tcsetwinsize(terminal, (24, 120))
  with open(terminal, "w") as stderr:
    monkeypatch.setattr(sys, "stderr", stderr)
    with MetricsWriter(tmp_path, total_steps=100, start_step=20) as writer:
      writer.write(40, {"loss": 1.5, "accuracy": 0.25})
      writer.write(40, {"eval/heldout/accuracy": 0.125})
    monkeypatch.undo()
    os.set_blocking(controller, False)
    shown = os.read(controller, 10_000).decode()
  os.close(controller)
  assert "20/100 [" in shown and "40/100 [" in shown
  assert "loss=1.5" in shown and "accuracy=0.25" in shown
  assert "step 40/100  eval/heldout/accuracy 0.125\r\n" in shown


def test_tensorboard_gets_the_same_values(tmp_path):
  pytest.importorskip("tensorboardX")
  with MetricsWriter(tmp_path, total_steps=9, tensorboard=True) as writer:
    writer.write(7, {"loss": 1.5})
  (events,) = (tmp_path / "tensorboard").iterdir()
  event_pb2 = importlib.import_module("tensorboardX.proto.event_pb2")
  values = []
  data = events.read_bytes()
  while data:  # a TFRecord: length, its checksum, the event, its checksum
    length = int.from_bytes(data[:8], "little")
    event = event_pb2.Event.FromString(data[12 : 12 + length])
    values += [(event.step, v.tag, v.simple_value) for v in event.summary.value]
    data = data[16 + length :]
  assert values == [(7, "loss", 1.5)]


def test_tensorboard_that_is_not_installed_is_a_clear_error(
  tmp_path, monkeypatch
):
  monkeypatch.setitem(sys.modules, "tensorboardX", None)
  with pytest.raises(ValueError, match="pip install"):
    MetricsWriter(tmp_path, total_steps=1, tensorboard=True)
