"""The benchmark of sessions: its numbers on a tiny model, and what they say."""

import dataclasses

import pytest

from experiments import latency, math


def cell(n, history, seconds, stall=0.0, size=1000, noise=0.01):
  return {
    "passes": n,
    "history": history,
    "seconds_per_token": seconds,
    "p95_seconds_per_token": 2 * seconds,
    "noise": noise,
    "tokens_per_second": 0.9 / seconds,
    "stall_seconds": stall,
    "state_bytes": size,
    "kv_bytes": size // 2,
  }


def report():
  """A sleep of 2 ms + N ms; 1 ms a token, and 2% more after 8 windows."""
  cells = [
    cell(n, history, 0.001 * (1.02 if history == 8 else 1), 0.002 + 0.001 * n)
    for n in (1, 2, 4)
    for history in (1, 8)
  ]
  cells += [cell(0, 1, 0.002, size=10), cell(0, 8, 0.00408, size=80)]
  return {"cells": cells, "parameters": 10, "full_cache_parameters": 20}


def test_what_the_numbers_say():
  said = latency.verdicts(report())
  assert said[0].startswith("a token at N = 4 against N = 1: +0.0%")
  assert said[1].startswith("a token after 8 windows against 1: +2.0%")
  assert "noise of a cell 1.0%" in said[1]
  assert said[2] == "a sleep: 2.0 ms + 1.0 ms x N, within 0.0%"
  assert said[3] == "the state: 1000 bytes"
  # 4 * 20 + 80 / 2 bytes against 4 * 10 + 1000 / 2.
  assert said[4] == (
    "the full cache after 8 windows: 4.0 times as slow; parameters, keys and "
    "values are 0.2 times the bytes"
  )


def test_numbers_that_are_not_as_claimed_are_told():
  bent = report()
  for x in bent["cells"]:
    x["state_bytes"] += x["history"]
    x["stall_seconds"] = 0.001 * x["passes"] ** 2
  said = latency.verdicts(bent)
  assert said[3] == "the state: 1001 bytes to 1008: not constant"
  off = float(said[2].split("within ")[1].rstrip("%"))
  assert off > 10


def test_the_table_has_a_line_for_each_cell():
  header, *lines = latency.table(report()).splitlines()
  assert len(lines) == 8
  assert lines[1].split()[:5] == ["N", "=", "1", "8x", "1.020"]
  assert lines[-1].startswith("full cache")
  assert len({len(line) for line in lines}) == 1
  assert len(header) == len(lines[0])


def test_the_figure_is_drawn(tmp_path):
  pytest.importorskip("matplotlib")
  from experiments import figures

  figures.latency(report(), tmp_path / "latency.png")
  assert (tmp_path / "latency.png").stat().st_size > 10_000


def test_the_figure_tells_all_n_apart(tmp_path, monkeypatch):
  pytest.importorskip("matplotlib")
  from experiments import figures

  saved = []
  monkeypatch.setattr(figures, "_save", lambda figure, _: saved.append(figure))
  cells = [
    x | {"passes": n} for n in range(1, 9) for x in report()["cells"][:2]
  ]
  figures.latency({"cells": cells}, tmp_path / "latency.png")
  looks = {
    (line.get_color(), line.get_marker(), line.get_markerfacecolor())
    for line in saved[0].axes[0].lines
  }
  assert len(looks) == 8


@pytest.mark.slow
def test_cells_of_a_tiny_model():
  config = math.tiny()
  config = dataclasses.replace(
    config, sleep=dataclasses.replace(config.sleep, window_length=16)
  )
  measured = latency.measure(config, [1, 2, 4], [1, 3], rounds=4)
  cells = {(x["passes"], x["history"]): x for x in measured["cells"]}
  assert len(cells) == 8
  own = [x for (n, _), x in cells.items() if n]
  assert len({(x["state_bytes"], x["kv_bytes"]) for x in own}) == 1
  # One attention layer of 16 slots, keys and values of width 32, in float32.
  assert own[0]["kv_bytes"] == 16 * 2 * 32 * 4
  # Two attention layers, and no window.
  capacity = 3 * 16 + 15 + 1
  assert cells[0, 3]["kv_bytes"] == 2 * capacity * 2 * 32 * 4
  for x in own:
    assert 0 < x["seconds_per_token"] <= x["p95_seconds_per_token"]
    assert x["stall_seconds"] > 0
    assert x["tokens_per_second"] > 0
  assert latency.verdicts(measured)
