"""The figures show the numbers they were given, and end up as PNGs."""

import builtins
import json
import sys

import numpy as np
import pytest

from experiments import automaton, figures, studies
from sleep_jax.config import from_config_dict
from sleep_jax.tasks.depo import Depo, DepoConfig

pytest.importorskip("matplotlib")
from matplotlib.image import imread  # noqa: E402

# Of scores, what these tests do not look at.
REST = {"count": 8, "label_floor": 0.5}


def scores(accuracy, interval, floor):
  return REST | {"accuracy": accuracy, "interval": interval, "floor": floor}


def results(shift=0.0):
  return {
    "heldout": {
      "overall": scores(0.4 + shift, [0.3, 0.5], 0.2),
      "depth": {
        "2": scores(0.8 + shift, [0.7 + shift, 0.9 + shift], 0.3),
        "10": scores(0.0, [0.0, 0.2], 0.1),
      },
    },
    "deeper": {
      "overall": scores(0.5, [0.45, 0.6], 0.25),
      "depth": {"16": scores(0.5, [0.45, 0.6], 0.25)},
    },
  }


def write_metrics(path, losses, every=10):
  lines = [
    {"step": every * (i + 1), "loss": loss, "accuracy": loss}
    for i, loss in enumerate(losses)
  ]
  judged = {"eval/heldout/loss": 9.0, "eval/heldout/accuracy": 0.25}
  lines.insert(1, {"step": every} | judged)
  path.write_text("".join(json.dumps(line) + "\n" for line in lines))
  return path


@pytest.fixture
def drawn(monkeypatch):
  """The figures that are drawn, also saved as always."""
  saved = []
  save = figures._save

  def keep(figure, path):
    saved.append(figure)
    save(figure, path)

  monkeypatch.setattr(figures, "_save", keep)
  return saved


def legend(figure):
  return [text.get_text() for text in figure.legends[0].get_texts()]


def test_accuracy_by_depth_shows_points_intervals_and_floors(drawn, tmp_path):
  figures.accuracy_by_depth(
    {"N=1": [results()], "N=2": [results(0.05), results(0.1)]},
    tmp_path / "a.png",
  )
  heldout, deeper = drawn[0].axes
  assert heldout.get_title(loc="left") == "heldout"
  assert deeper.get_title(loc="left") == "deeper"
  assert heldout.get_xlabel() == "depth"
  assert heldout.get_ylabel() == "exact accuracy"
  # 10 is right of 2, not between 1 and 2 as text would have it.
  assert [t.get_text() for t in heldout.get_xticklabels()] == ["2", "10"]
  points = [bars.lines[0].get_xydata() for bars in heldout.containers]
  assert [run[:, 1].tolist() for run in points] == [
    pytest.approx([0.8, 0.0]),
    pytest.approx([0.85, 0.0]),
    pytest.approx([0.9, 0.0]),
  ]
  # Beside each other and nearer to their own depth than to the next.
  beside = [run[0, 0] for run in points]
  assert -0.5 < beside[0] < beside[1] < beside[2] < 0.5
  bars = heldout.containers[0].lines[2][0].get_segments()
  np.testing.assert_allclose(bars[0][:, 1], [0.7, 0.9])
  np.testing.assert_allclose(bars[1][:, 1], [0.0, 0.2])
  floors = [
    line.get_segments()
    for line in heldout.collections
    if line.get_label() == "best constant answer"
  ]
  assert [line[0, 1] for line in floors[0]] == [0.3, 0.1]
  seeds = [bars.lines[0].get_color() for bars in heldout.containers]
  assert seeds[0] != seeds[1] == seeds[2]
  assert legend(drawn[0]) == ["N=1", "N=2", "best constant answer"]


def test_training_curves_show_each_seed_and_their_mean(drawn, tmp_path):
  seeds = [
    write_metrics(tmp_path / "0", [0.9, 0.6, 0.3]),
    write_metrics(tmp_path / "1", [0.7, 0.2]),  # not as far yet
  ]
  other = write_metrics(tmp_path / "2", [0.5, None, 0.1])
  figures.training_curves(
    {"N=1": seeds, "N=2": [other]}, tmp_path / "curves.png"
  )
  loss, accuracy, heldout = drawn[0].axes
  assert loss.get_ylabel() == "training loss"
  assert accuracy.get_ylabel() == "training accuracy"
  assert heldout.get_ylabel() == "heldout accuracy"
  for line in heldout.lines:
    np.testing.assert_allclose(line.get_xydata(), [(10, 0.25)])
  first, second, mean, alone = [line.get_xydata() for line in loss.lines]
  np.testing.assert_allclose(first, [(10, 0.9), (20, 0.6), (30, 0.3)])
  np.testing.assert_allclose(second, [(10, 0.7), (20, 0.2)])
  np.testing.assert_allclose(mean, [(10, 0.8), (20, 0.4)])
  np.testing.assert_allclose(alone, [(10, 0.5), (20, np.nan), (30, 0.1)])
  np.testing.assert_allclose(accuracy.lines[2].get_ydata(), [0.8, 0.4])
  assert legend(drawn[0]) == ["N=1", "N=2"]


def test_the_command_draws_both_figures(tmp_path, monkeypatch, capsys):
  for name in ("a", "b"):
    (tmp_path / name).mkdir()
    (tmp_path / name / "results.json").write_text(json.dumps(results()))
    write_metrics(tmp_path / name / "metrics.jsonl", [0.9, 0.6, 0.3])
  monkeypatch.setattr(
    sys,
    "argv",
    [
      "figures",
      f"--workdirs={tmp_path}/a,{tmp_path}/b",
      "--labels=N=1,N=2",
      f"--out={tmp_path}/out",
    ],
  )
  figures.main()
  paths = capsys.readouterr().out.split()
  assert [path.rsplit("/", 1)[1] for path in paths] == [
    "accuracy_by_depth.png",
    "training_curves.png",
  ]
  for path in paths:
    image = imread(path)[..., :3]
    assert image.shape[0] > 400 and image.shape[1] > 800
    blue = np.abs(image - [0, 0x72 / 255, 0xB2 / 255]).max(axis=-1) < 0.02
    assert blue.any()


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    (["--from=nowhere", "--out=o"], "error: nowhere: no folder in it has a"),
    (["--workdirs=a,b", "--labels=x", "--out=o"], "2 --workdirs but 1"),
    (["--workdirs=nowhere", "--out=o"], "nowhere has no results.json"),
  ],
)
def test_the_command_says_what_is_missing(
  monkeypatch, capsys, tmp_path, arguments, message
):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(sys, "argv", ["figures", *arguments])
  with pytest.raises(SystemExit):
    figures.main()
  assert message in capsys.readouterr().err
  assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
  "option, name, text, message",
  [
    ("workdirs", "results.json", "{", "Expecting"),
    ("workdirs", "results.json", "{}", "does not hold splits"),
    ("workdirs", "results.json", '{"heldout": 1}', "does not hold splits"),
    ("workdirs", "results.json", "[1]", "does not hold splits"),
    *(
      ("from", f"{name}.json", text, f"{name}.json is no such report")
      for name in ("latency", "throughput")
      for text in ("{", "{}", "[]", '{"cells": [1]}', '{"cells": []}')
    ),
  ],
)
def test_the_command_says_what_cannot_be_read(
  tmp_path, monkeypatch, capsys, option, name, text, message
):
  (tmp_path / name).write_text(text)
  write_metrics(tmp_path / "metrics.jsonl", [1.0])
  out = tmp_path / "x"
  monkeypatch.setattr(
    sys, "argv", ["figures", f"--{option}={tmp_path}", f"--out={out}"]
  )
  with pytest.raises(SystemExit) as ended:
    figures.main()
  (line,) = capsys.readouterr().err.splitlines()
  assert ended.value.code == 2 and message in line
  assert str(tmp_path) in line and not out.exists()


def test_more_labels_than_colours_are_refused(tmp_path):
  many = {f"N={n}": [results()] for n in range(13)}
  with pytest.raises(ValueError, match="13 labels"):
    figures.accuracy_by_depth(many, tmp_path / "a.png")


def test_without_matplotlib_there_is_a_clear_error(tmp_path, monkeypatch):
  real_import = builtins.__import__

  def refuse(name, *args, **kwargs):
    if name.startswith("matplotlib"):
      raise ImportError(name)
    return real_import(name, *args, **kwargs)

  monkeypatch.setattr(builtins, "__import__", refuse)
  with pytest.raises(ValueError, match="matplotlib: pip install"):
    figures.accuracy_by_depth({"N=1": [results()]}, tmp_path / "a.png")


def test_draw_run_leaves_both_figures_in_the_workdir(tmp_path):
  write_metrics(tmp_path / "metrics.jsonl", [2.0, 1.0])
  figures.draw_run("a", results(), tmp_path)
  for name in ("accuracy_by_depth.png", "training_curves.png"):
    assert imread(tmp_path / name).std() > 0


def write_run(folder, steps, passes, seed, accuracy, loss=0.5):
  """A finished Rule 110 run of 20 steps, judged at 10 and 20."""
  config = automaton.get_config("tiny").to_dict()
  config["task"]["steps"], config["sleep"]["passes"] = steps, passes
  config["run"]["seed"] = config["data"]["seed"] = seed
  folder.mkdir(parents=True)
  (folder / "config.json").write_text(json.dumps(config))
  lines = [
    {"step": step, "eval/heldout/loss": loss, "eval/heldout/accuracy": x}
    for step, x in ((10, accuracy / 2), (20, accuracy))
  ]
  (folder / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
  score = REST | {"accuracy": accuracy, "floor": 0.1 * steps}
  found = {"heldout": {"overall": score, "depth": {str(steps): score}}}
  (folder / "results.json").write_text(json.dumps(found))


@pytest.fixture
def study(tmp_path):
  for i, steps in enumerate((2, 8)):
    for j, passes in enumerate((1, 4)):
      for seed in range(3):
        write_run(
          *(tmp_path / f"study/{i}{j}{seed}", steps, passes, seed),
          0.2 + 0.1 * i + 0.3 * j + 0.05 * seed,
        )
  return tmp_path / "study"


def test_a_study_is_drawn(drawn, study, tmp_path):
  paths = figures.draw_folder(study, tmp_path)
  assert all(path.stat().st_size for path in paths)
  depths, tokens, flops, transposed = drawn
  # Paper, figure 2b: a panel for each t, a line for each N; 2a the other way.
  assert [x.get_title(loc="left") for x in tokens.axes] == ["t = 2", "t = 8"]
  assert legend(tokens) == ["N = 1", "N = 4", "best constant answer"]
  assert [x.get_title(loc="left") for x in transposed.axes] == [
    "N = 1",
    "N = 4",
  ]
  assert legend(transposed) == ["t = 2", "t = 8"]
  assert depths.axes[0].get_xlabel() == "t (steps of the rule)"
  config = from_config_dict(automaton.get_config("tiny"))
  per_step = config.data.batch_size * config.data.length
  thick = [x for x in tokens.axes[1].lines if x.get_label() == "N = 4"][0]
  np.testing.assert_allclose(thick.get_xdata(), [10 * per_step, 20 * per_step])
  np.testing.assert_allclose(thick.get_ydata(), [0.325, 0.65])
  *curves, floor = tokens.axes[1].lines
  assert len(curves) == 2 * (3 + 1)
  np.testing.assert_allclose(floor.get_ydata(), 0.8)
  # More passes cost more, per step, than fewer.
  ends = {x.get_label(): x.get_xdata()[-1] for x in flops.axes[0].lines}
  assert ends["N = 4"] > 1.3 * ends["N = 1"] > 0
  panel, printed = depths.axes
  # The paper's t = 32 beside ours, each N in its colour.
  assert legend(depths)[:2] == ["N = 1", "N = 4"]
  assert [x.get_ydata().tolist() for x in printed.lines][:2] == [[0.1], [0.2]]
  one, four = printed.lines[0], printed.lines[-1]
  assert one.get_color() == panel.containers[0].lines[0].get_color()
  assert four.get_color() == panel.containers[1].lines[0].get_color()
  bars = panel.containers[1]
  np.testing.assert_allclose(bars.lines[0].get_ydata(), [0.55, 0.65])
  # Three seeds 0.05 apart: Student's 4.303 x 0.05 / sqrt(3).
  (low, high), *_ = bars.lines[2][0].get_segments()
  assert high[1] - low[1] == pytest.approx(2 * 4.303 * 0.05 / 3**0.5, rel=1e-3)
  (floors,) = (x for x in panel.collections if x.get_label() == floor._label)
  heights = [segment[:, 1].tolist() for segment in floors.get_segments()]
  assert heights == [[0.2, 0.2], [0.8, 0.8]]


def test_lines_of_one_depth_stand_side_by_side(drawn, tmp_path):
  for passes in (1, 2):
    for rule in ("delta", "kda"):
      folder = tmp_path / f"study/{rule}{passes}"
      write_run(folder, 4, passes, 0, 0.5)
      config = json.loads((folder / "config.json").read_text())
      config["model"]["update_rule"] = rule
      (folder / "config.json").write_text(json.dumps(config))
  lines = studies.by_setting(studies.read_study(tmp_path / "study"))
  figures.study_by_depth(lines, tmp_path / "a.png")
  (panel,) = drawn[0].axes
  names = [x.get_text() for x in panel.get_xticklabels()]
  assert names == ["delta, N = 1", "delta, N = 2", "kda, N = 1", "kda, N = 2"]
  at = [x.lines[0].get_xdata()[0] for x in panel.containers]
  np.testing.assert_allclose(at, panel.get_xticks())
  assert legend(drawn[0]) == ["best constant answer"]


def test_n_has_one_colour_in_all_figures():
  few = figures._styles(dict.fromkeys(["deeper", "N = 4", "N = 1", "N = 90"]))
  many = figures._styles(dict.fromkeys([f"N = {n}" for n in range(1, 9)]))
  assert (few["N = 1"], few["N = 4"]) == (many["N = 1"], many["N = 4"])
  assert len(set(few.values())) == 4 and len(set(many.values())) == 8


def test_what_is_no_study_is_refused(study, tmp_path):
  with pytest.raises(ValueError, match="no folder in it has a results.json"):
    figures.draw_folder(tmp_path / "nowhere", tmp_path)
  for odd in (
    "{}",
    "[1]",
    '{"heldout": 5}',
    '{"heldout": {"overall": {"accuracy": 1, "floor": 0}}}',
    '{"heldout": {"overall": {"accuracy": 1}, "depth": {}}}',
    '{"heldout": {"overall": {"accuracy": 1, "floor": 0}, "depth": {"4": 1}}}',
  ):
    (study / "012/results.json").write_text(odd)
    with pytest.raises(ValueError, match="012: results.json does not hold spl"):
      figures.draw_folder(study, tmp_path)
  (study / "000/config.json").write_text('{"task": 5}')
  with pytest.raises(ValueError, match="000: bad config"):
    figures.draw_folder(study, tmp_path)
  (study / "000/config.json").unlink()
  with pytest.raises(ValueError, match="000 has no config.json"):
    figures.draw_folder(study, tmp_path)


def test_a_step_of_more_rows_costs_more(study):
  run = studies.read_study(study)[0]
  data = run.config["data"]
  more = dict(run.config, data=dict(data, batch_size=4 * data["batch_size"]))
  counted = {}
  one = studies.step_flops(run, counted)
  assert studies.step_flops(run._replace(config=more), counted) > 2 * one
  started = dict(run.config, run=dict(run.config["run"], init_from="x"))
  runs = [run, run._replace(config=started)]
  assert len(studies.by_setting(runs)) == 2


def test_depo_and_math_have_several_depths_in_a_run(study):
  run = studies.read_study(study)[0]
  config = dict(run.config, task={"name": "depo"})
  scores = {"overall": {"accuracy": 0.5, "floor": 0.1}}
  depo = studies.Run(config, [], {"hops_1": scores, "hops_4": scores})
  for found, metric in (
    (studies.panels([depo]), "accuracy"),
    (studies.loss_panels([depo]), "loss"),
  ):
    assert [x.title for x in found] == ["hops = 1", "hops = 4"]
    names = [f"eval/hops_{k}/{metric}" for k in (1, 4)]
    assert [x.metric for x in found] == names
    floor = 0.1 if metric == "accuracy" else None
    assert [x.floor for x in found] == [floor] * 2
  assert list(studies.scores_by_depth(depo)) == [1, 4]
  config = dict(run.config, task={"name": "gsm_infinite"})
  ops = {"depth": {"10": scores["overall"], "2": scores["overall"]}}
  math = studies.Run(config, [], {"train": {}, "heldout": ops})
  found = studies.panels([math])
  assert [x.metric for x in found] == [
    "eval/heldout/depth_2",
    "eval/heldout/depth_10",
  ]


def test_chance_of_depo_is_a_guess_among_the_other_nodes():
  config = DepoConfig(
    nodes=5, hops=4, name_length=(1, 1), mini_vocab=5, queries=5
  )
  task = Depo(config, seed=0)
  right, asked = 0, 0
  for split in task.eval_splits:
    for index in range(200):
      problem = task.problem(split, index)
      nodes = sorted(u for u, _ in problem.edges)
      for _, start, end in problem.queries:
        guesses = [node for node in nodes if node != start]
        right += guesses[index % len(guesses)] == end
        asked += 1
  run = studies.Run({"task": {"name": "depo", "nodes": 5, "hops": 4}}, [], {})
  assert studies.chance(run) == 0.25
  assert right / asked == pytest.approx(0.25, abs=0.03)
  # As many hops as nodes lead back.
  run.config["task"]["hops"] = 5
  assert studies.chance(run) is None


def test_variants_are_labelled_by_their_folder(study, tmp_path):
  for path in list(study.iterdir()):
    variant = "deeper" if path.name.startswith("00") else "hybrid"
    (study / variant).mkdir(exist_ok=True)
    path.rename(study / variant / path.name)
  runs = studies.read_study(study)
  # Of "deeper" there is one setting; what differs elsewhere is not its label.
  assert list(studies.by_setting(runs, ["task.steps"])) == [
    "deeper",
    "hybrid, N = 1",
    "hybrid, N = 4",
  ]


def test_passes_when_judged_are_drawn(drawn, study, tmp_path):
  for seed in range(3):
    path = study / f"01{seed}/results.json"
    found = json.loads(path.read_text())
    found["heldout"]["by_passes"] = {
      n: {"depth": {"2": scores(0.1 * int(n) + 0.1 * seed, None, 0.2)}}
      for n in ("1", "8")
    }
    path.write_text(json.dumps(found))
  runs = studies.read_study(study)
  assert "by_test_passes.png" in figures.study_figures(runs, {})
  lines = studies.by_setting(runs, ["task.steps"])
  figures.study_by_test_passes(lines, tmp_path / "a.png")
  (panel,) = drawn[0].axes
  assert panel.get_title(loc="left") == "t = 2"
  assert legend(drawn[0]) == ["N = 4", "best constant answer"]
  (bars,) = panel.containers
  np.testing.assert_allclose(bars.lines[0].get_xydata(), [(1, 0.2), (8, 0.9)])


def test_tolerances_are_drawn(drawn, study, tmp_path):
  for i, path in enumerate(sorted(study.glob("*/config.json"))):
    config = json.loads(path.read_text())
    config["sleep"]["tolerance"] = 0.1 * (i % 2)
    config["run"]["steps"] = 0
    config["run"]["init_from"] = f"a model {i}"
    path.write_text(json.dumps(config))
    found = json.loads(path.with_name("results.json").read_text())
    found["heldout"]["sleep"] = {"passes": 4.0 - i % 2}
    path.with_name("results.json").write_text(json.dumps(found))
  (path,) = figures.draw_folder(study, tmp_path)
  used, accuracy = drawn[0].axes
  assert path.name == "by_tolerance.png"
  assert [x.get_text() for x in used.get_xticklabels()] == ["0", "0.1"]
  # The models that they were trained to are seeds.
  assert legend(drawn[0]) == ["N = 1", "N = 4"]
  for bars in used.containers:
    np.testing.assert_allclose(bars.lines[0].get_ydata(), [4, 3])
  np.testing.assert_allclose(
    accuracy.containers[0].lines[0].get_ydata(), [0.3, 0.3], atol=0.1
  )


def test_many_panels_take_several_rows(drawn, tmp_path):
  many = {f"split {i}": results()["heldout"] for i in range(6)}
  figures.accuracy_by_depth({"N=1": [many]}, tmp_path / "a.png")
  rows = {round(x.get_position().y0, 2) for x in drawn[0].axes}
  assert len(drawn[0].axes) == 6 and len(rows) == 2
