"""RESULTS.md says what the runs say, and no more."""

import importlib
import json

import numpy as np
import pytest
from scipy import stats

from experiments import automaton, plan, report, studies, sweep

RESULTS = report._HERE / "results"


def write_run(folder, passes, seed, accuracy, steps=4, by_passes=None):
  """A finished Rule 110 run of 20 steps, judged at 10 and 20."""
  config = automaton.get_config("tiny").to_dict()
  config["task"]["steps"], config["sleep"]["passes"] = steps, passes
  config["run"]["seed"] = seed
  folder = folder / f"{steps}-{passes}-{seed}"
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config))
  lines = [
    {"step": 10, "loss": 1.0, "steps_per_second": 2.0},
    {"step": 10, f"eval/heldout/depth_{steps}": accuracy / 2},
    {"step": 20, "loss": 1.0, "steps_per_second": 1.0},
    {"step": 20, f"eval/heldout/depth_{steps}": accuracy}
    | {"eval/heldout/loss": 0.5},
  ]
  (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))

  def scores(accuracy):
    score = {"accuracy": accuracy, "floor": 0.125}
    score |= {"count": 8, "label_floor": 0.25}
    return {"overall": score, "depth": {str(steps): score}}

  heldout = scores(accuracy)
  heldout["by_passes"] = {n: scores(x) for n, x in (by_passes or {}).items()}
  (folder / "results.json").write_text(json.dumps({"heldout": heldout}))
  (folder / "surroundings.json").write_text(
    json.dumps(
      dict(commit="abc1234", device="cpu", devices=1, cores=2, jax="0.10.2")
    )
  )


@pytest.fixture
def counted(monkeypatch):
  """A step of N passes costs N."""
  monkeypatch.setattr(
    studies, "step_flops", lambda run, _: run.settings["sleep.passes"]
  )
  return {}


def row(text, *cells):
  """The only line of a table that has these cells."""
  (found,) = [
    line
    for line in text.splitlines()
    if line.startswith("|") and set(cells) <= set(line[2:-2].split(" | "))
  ]
  return found[2:-2].split(" | ")


def test_the_committed_text_is_what_the_runs_give():
  """If not: python -m experiments.report, and commit what it writes."""
  known = json.loads((RESULTS / "flops.json").read_text())
  counted = dict(known)
  assert report.report(RESULTS, counted) == (
    report._HERE / "RESULTS.md"
  ).read_text("utf-8")
  assert counted == known


def test_the_committed_flops_are_those_of_the_step():
  known = json.loads((RESULTS / "flops.json").read_text())
  run = studies.read_study(RESULTS / "rule110")[0]
  counted = {}
  studies.step_flops(run, counted)
  ((key, flops),) = counted.items()
  assert known[key] == flops


def test_the_printed_commands_skip_the_committed_runs():
  read = report._reader(RESULTS)
  for one in (one for study in plan.STUDIES for one in study.sweeps):
    if "," in one.config:  # a baseline is sized by FLOPs, which take long
      continue
    name, _, size = one.config.partition(".py")
    module = importlib.import_module(f"experiments.{name}")
    base = module.get_config(size.removeprefix(":") or "pocket")
    base = sweep._overridden(base, one.overrides)
    points = sweep.make_points(
      one.config, base, one.overrides, one.grids, RESULTS / one.folder
    )
    done = sum(map(sweep.is_done, points))  # refuses runs of another config
    assert (done, len(points)) == report._progress(read, one), one.folder


def test_what_is_missing_is_not_run(tmp_path, counted):
  text = report.report(tmp_path, counted)
  assert text.count("\nNot run.\n") == len(plan.STUDIES) + 2
  assert "shown**" not in text and "| not run |" in text
  assert report.draw(tmp_path, counted) == []


def test_a_study_is_a_table_of_its_seeds(tmp_path, counted):
  for seed, accuracy in enumerate((0.2, 0.3, 0.4)):
    write_run(tmp_path / "rule110", 1, seed, accuracy)
    write_run(tmp_path / "rule110", 4, seed, accuracy + 0.5)
  text = report.report(tmp_path, counted)
  half_width = 4.302653 * 0.1 / 3**0.5
  interval = f"[{0.8 - half_width:.3f}, {0.8 + half_width:.3f}]"
  found = row(text, "N = 4", "4", "0.700 0.800 0.900")
  assert found[2] == f"0.800 {interval}"
  assert found[4:6] == ["0.125", "0.250"]  # two strings
  # N = 1 ends after 20 steps of 1: 5 steps of 4, before the first evaluation.
  assert found[8] == ""
  assert row(text, "N = 1", "4", "0.200 0.300 0.400")[8].startswith("0.300 ")
  tiny = automaton.tiny()
  tokens = 20 * tiny.data.batch_size * tiny.data.length
  assert found[6:8] == [f"{tokens:.3g}", "80"]
  assert "6 runs: commit abc1234, 1 x cpu of 2 cores" in text
  assert "took 15 to 15 s each" in text
  assert "6 of 62 points are done" in text
  assert "![by_depth.png](results/rule110/by_depth.png)" in text
  left = report.commands_left(tmp_path)
  assert left[0][1:] == (6, 62)
  assert "--workdir=experiments/results/rule110 " in left[0][0]


def test_runs_beside_a_study_do_not_make_it_run(tmp_path, counted):
  for passes in (1, 2, 4):
    write_run(tmp_path / "rule110", passes, 0, 0.5)
  write_run(tmp_path / "rule110", 4, 0, 0.5, steps=2)
  assert "rule110-matched/by_depth.png" not in report.report(tmp_path, counted)
  write_run(tmp_path / "rule110-matched/longer", 1, 0, 0.625)
  text = report.report(tmp_path, counted)
  _, _, matched = text.partition("## Rule 110 at equal training FLOPs")
  matched, _, _ = matched.partition("\n## ")
  lines = [x for x in matched.splitlines() if x.startswith("|")][2:]
  assert [x.split(" | ")[0] for x in lines] == [
    "| N = 1",
    "| N = 4",
    "| longer",
  ]
  assert row(matched, "longer")[3] == "0.625"
  assert "1 of 15 points are done" in matched
  # Variants may be matched by their whole training.
  assert "at equal FLOPs |" not in matched and "at equal FLOPs |" in text


@pytest.mark.parametrize(
  "more, said",
  [
    ((0.80, 0.82, 0.84), "**shown**"),
    ((0.10, 0.12, 0.14), "**opposite**"),
    ((0.30, 0.90, 0.50), "not shown"),
    ((0.90,), "too few seeds"),
  ],
)
def test_a_verdict_is_computed(tmp_path, counted, more, said):
  fewer = (0.40, 0.41, 0.45)
  for n, accuracies in ((1, fewer), (4, more)):
    for seed, accuracy in enumerate(accuracies):
      write_run(tmp_path / "rule110", n, seed, accuracy)
  found = row(
    report.report(tmp_path, counted), "rule110, depth 4: N = 4 over 1"
  )
  assert found[-1] == said
  difference = np.mean(more) - np.mean(fewer)
  assert found[-2].split(" [")[0] == f"{difference:+.3f}"


@pytest.mark.parametrize(
  "fewer, more, said",
  [
    (0.125, 0.17, "**shown**, at the floor"),
    (0.17, 0.125, "**opposite**, at the floor"),
    (0.125, 0.18, "**shown**"),
    (0.18, 0.125, "**opposite**"),
  ],
)
def test_what_no_side_learned_is_said_to_be_at_the_floor(
  tmp_path, counted, fewer, more, said
):
  for n, accuracy in ((1, fewer), (4, more)):
    for seed in range(3):
      # The constant, 0.125, is of every run.
      noise = 0.001 * (seed if n == 1 else -seed)
      write_run(tmp_path / "rule110", n, seed, accuracy + noise)
      # At t = 2 all is learned.
      write_run(tmp_path / "rule110", n, seed, 0.9, steps=2)
  text = report.report(tmp_path, counted)
  assert row(text, "rule110, depth 4: N = 4 over 1")[-1] == said
  gains = row(text, "rule110: what N = 4 gains at 4 over what at 2")
  assert gains[-1] == said
  # That one depth is at the floor is what this contrast finds.
  falls = row(text, "rule110, N = 1: depth 2 over 4")
  assert falls[-1] == "**shown**"


def seeds(values):
  return dict(enumerate(values))


def test_differences_of_other_seeds_are_welchs():
  a, b = [0.1, 0.5, 0.4, 0.2], [0.9, 0.7, 0.3]
  expected = stats.ttest_ind(a, b, equal_var=False).confidence_interval()
  found = studies.difference_and_interval([seeds(a)], [seeds(b)])
  assert found == pytest.approx((0.3 - 1.9 / 3, *expected))
  # Gains of gains, by the same formula written out.
  groups = [a, b, b[::-1], [0.0, 0.2]]
  variances = np.array([np.var(x, ddof=1) / len(x) for x in groups])
  freedom = variances.sum() ** 2 / sum(
    v**2 / (len(x) - 1) for v, x in zip(variances, groups, strict=True)
  )
  half = stats.t.ppf(0.975, freedom) * variances.sum() ** 0.5
  middle = 0.3 + 1.9 / 3 - 1.9 / 3 - 0.1
  groups = list(map(seeds, groups))
  assert studies.difference_and_interval(groups[:2], groups[2:]) == (
    pytest.approx((middle, middle - half, middle + half))
  )


def test_differences_of_the_same_seeds_are_pairs():
  a, b = [0.9, 0.6, 0.3], [0.795, 0.5, 0.205]
  expected = stats.ttest_rel(a, b).confidence_interval()
  found = studies.difference_and_interval([seeds(a)], [seeds(b)])
  assert found == pytest.approx((0.1, *expected))
  assert report.verdict(*found) == "**shown**"
  # All alike: three seeds do not show that there is no other.
  exact = studies.difference_and_interval([seeds([1] * 3)], [seeds([0.9] * 3)])
  assert exact == pytest.approx((0.1, 0.1, 0.1))
  assert report.verdict(*exact) == "no spread"


def test_what_was_judged_after_other_passes_is_told(tmp_path, counted):
  for seed in range(2):
    woken = {"4": 0.5 + seed / 8, "8": 0.75 + seed / 8}
    write_run(tmp_path / "rule110-passes", 4, seed, 0.5, by_passes=woken)
  text = report.report(tmp_path, counted)
  assert "| judged at N = 4 | judged at N = 8 |" in text
  found = row(text, "rule110, fixed N: 8 over 4 when judged")
  assert found[-2].startswith("+0.250 ")


@pytest.mark.parametrize(
  "factors, said, range_",
  [
    ((1.05, 1.0, 1.0, 1.05), "shown", "1.02 (1.00 to 1.05)"),
    ((1.0, 1.0, 1.0, 1.2), "not shown", "1.00 (1.00 to 1.20)"),
    ((1.5,) * 4, "not shown", "1.50 (1.50 to 1.50)"),
  ],
)
def test_what_was_measured_has_rules_too(
  tmp_path, counted, factors, said, range_
):
  report_of = json.loads((RESULTS / "latency/latency.json").read_text())
  left = list(factors)
  for cell in report_of["cells"]:
    cell["seconds_per_token"] = left.pop() if cell["passes"] == 8 else 1.0
  assert not left
  (tmp_path / "latency").mkdir()
  (tmp_path / "latency/latency.json").write_text(json.dumps(report_of))
  text = report.report(tmp_path, counted)
  found = row(text, "A token awake costs the same whatever N")
  assert found[-1].strip("*") == said and found[-2] == range_


@pytest.mark.parametrize(
  "many, said, share",
  [
    ((4.0, 4.0, 4.0), "shown", "0.25 (0.25 to 0.25)"),
    # The middle keeps the rule, a quartile does not.
    ((4.0, 4.0, 2.0), "not shown", "0.25 (0.25 to 0.38)"),
  ],
)
def test_a_throughput_is_told_with_its_quartiles(
  tmp_path, counted, many, said, share
):
  report_of = json.loads((RESULTS / "throughput/throughput.json").read_text())
  for cell in report_of["cells"]:
    cell["seconds"] = [1.0] * 3
    if cell["kind"] == "sleeping" and cell["passes"] == 4:
      cell["seconds"] = list(many)
  (tmp_path / "throughput").mkdir()
  path = tmp_path / "throughput/throughput.json"
  path.write_text(json.dumps(report_of))
  found = row(report.report(tmp_path, counted), "paper, figure 6b")
  assert found[-1].strip("*") == said and found[-2] == share
