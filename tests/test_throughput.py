"""The benchmark of training: its numbers on a tiny model, what they say."""

import pytest

from experiments import throughput
from tests.test_loop import CONFIG


def cell(kind, window, n, seconds, flops=1e9):
  """Seconds of three rounds: the second is twice as slow, whatever the cell."""
  return {
    "kind": kind,
    "window": window,
    "passes": n,
    "tokens": 1000,
    "flops": flops,
    "seconds": [seconds, 2 * seconds, seconds],
  }


def report(long=1.05):
  """L = 64 loses half, 256 what is asked; a step takes 1 s + 0.5 s x N."""
  return {
    "cells": [
      cell("windowed", 64, 1, 2.0),
      cell("parallel", 64, 1, 1.0),
      cell("windowed", 256, 1, long),
      cell("parallel", 256, 1, 1.0, flops=0.999e9),
      *(cell("sleeping", 256, n, 1 + 0.5 * n) for n in (1, 2, 4)),
    ]
  }


def test_what_the_numbers_say():
  said = throughput.verdicts(report())
  assert said[0].startswith("L = 64: +50.0% lost against the parallel step")
  assert said[1].startswith("L = 256: +4.8% lost")
  # Of each round by itself: they differ by a factor of 2, their ratio not.
  assert "quartiles +4.8% to +4.8%; 1.0010 of its FLOPs" in said[1]
  assert said[2] == "under 10% lost at every L >= 256: yes"
  assert said[3] == "a step of L = 256: 1000 ms + 500 ms x N, within 0.0%"
  assert said[4] == (
    "N = 4 trains 0.50 of the tokens a second of N = 1 (median of 3 rounds,"
    " quartiles 0.50 to 0.50)"
  )


def test_numbers_that_are_not_as_claimed_are_told():
  bent = report(long=1.2)
  for x in bent["cells"]:
    if x["kind"] == "sleeping":
      x["seconds"] = [float(x["passes"] ** 2)] * 3
  said = throughput.verdicts(bent)
  assert said[2].endswith("NO")
  assert float(said[3].split("within ")[1].rstrip("%")) > 10


def test_the_table_has_a_line_for_each_cell():
  header, *lines = throughput.table(report()).splitlines()
  assert len(lines) == 7
  assert lines[0].split() == (
    ["windowed", "64", "1", "2.000", "2.000-3.000", "500.0", "1.00", "0.50"]
  )
  assert {len(line) for line in lines} == {len(header)}


def test_the_figure_is_drawn(tmp_path):
  pytest.importorskip("matplotlib")
  from experiments import figures

  figures.throughput(report(), tmp_path / "throughput.png")
  assert (tmp_path / "throughput.png").stat().st_size > 10_000


def test_cells_have_the_same_tokens():
  """Rows of 35 tokens grow to four windows of 32, and so eight of 16."""
  cells = throughput.cells(CONFIG, [16, 32], [1, 3])
  rows = CONFIG.data.batch_size
  shapes = {
    (x["kind"], x["window"], x["passes"]): (
      x["config"].data.batch_size,
      x["config"].data.length,
    )
    for x in cells
  }
  assert shapes == {
    ("windowed", 16, 1): (rows, 128),
    ("parallel", 16, 1): (8 * rows, 16),
    ("windowed", 32, 1): (rows, 128),
    ("parallel", 32, 1): (4 * rows, 32),
    ("sleeping", 32, 1): (rows, 128),
    ("sleeping", 32, 3): (rows, 128),
  }
  assert all(x["config"].sleep.passes == x["passes"] for x in cells)


@pytest.mark.slow
def test_cells_of_a_tiny_model():
  measured = throughput.measure(CONFIG, [8, 16], [1, 2, 4], rounds=4)
  cells = measured["cells"]
  assert len({x["tokens"] for x in cells}) == 1
  assert all(len(x["seconds"]) == 4 and min(x["seconds"]) > 0 for x in cells)
  windowed, parallel = (
    [x["flops"] for x in cells if x["kind"] == kind]
    for kind in ("windowed", "parallel")
  )
  assert windowed == pytest.approx(parallel, rel=0.02)
  one, two, four = (x["flops"] for x in cells if x["kind"] == "sleeping")
  assert four - two == pytest.approx(2 * (two - one), rel=1e-3)
  assert throughput.verdicts(measured) and throughput.table(measured)
