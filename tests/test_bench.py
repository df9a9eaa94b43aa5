"""Benchmarks: what is asked, that slow calls are ended, and what is written; never how fast."""

import csv
import json
import math
import time
from pathlib import Path

import pytest
import torch

from convnn_geo import search
from convnn_geo.bench import calibrate, graph, inputs, layers, measure, peer, plots, style, tables
from convnn_geo.bench.cells import NOT_ASKED, run
from convnn_geo.bench.worker import CALLED, READY, Failed, Worker
from convnn_geo.cli import main
from convnn_geo.search import costs

TINY = ["--n", "64", "--dim", "3", "--batch", "1"]


def result(engine="dense", note="", median=0.01, recall=1.0, **question):
    return graph.Result(
        graph.Cell(engine, **question),
        note,
        *(median, median, median, 3, 100.0, 1.0, recall) if not note else (),
    )


def last(messages):
    return list(messages)[-1]


def echo(question):
    """What a worker can be asked here: to answer, refuse, hang, fail or die."""
    if question == "refuse":
        yield "refused"
        return
    yield READY
    if question == "hang":
        time.sleep(60)
    if question == "fail":
        raise RuntimeError("no\nluck")
    if question == "die":
        import os

        os._exit(1)
    yield CALLED
    yield f"answer to {question}"


def test_a_worker_answers_and_outlives_what_goes_wrong():
    with Worker(echo, limit=0.5) as worker:
        assert worker.ask("a") == "answer to a"
        assert worker.ask("refuse") == "refused"
        assert worker.ask("hang") == Failed("> 0.5 s")
        assert worker.ask("fail") == Failed("RuntimeError: no luck")
        assert worker.ask("die") == Failed("its process died: out of memory?")
        assert worker.ask("b") == "answer to b"


def test_what_is_larger_than_what_took_too_long_is_not_asked():
    asked = []

    def ask(cell):
        asked.append(cell)
        return Failed("> 1 s") if cell.engine == "dense" and cell.n == 20 else graph.Result(cell)

    todo = graph.cells(["dense", "kd_tree"], ["cosine"], ["random"], [40, 10, 20], [3], [4], [1])
    assert [cell.n for cell in todo] == [10, 10, 20, 20, 40, 40]
    results = run(todo, ask, graph.Result)
    notes = {(r.cell.engine, r.cell.n): r.note for r in results}
    assert notes["dense", 20] == "> 1 s" and notes["dense", 40] == "> 1 s, skipped"
    assert notes["kd_tree", 40] == ""
    assert len(asked) == 5
    assert all(r.ended == r.note.startswith(">") for r in results)


def test_nothing_is_asked_once_the_budget_is_spent():
    todo = graph.cells(["dense"], ["cosine"], ["random"], [10], [3], [4], [1])
    assert [r.note for r in run(todo, pytest.fail, graph.Result, budget=-1.0)] == [NOT_ASKED]


@pytest.mark.parametrize(
    ("name", "n", "dimension"),
    [
        *(("random", 50, 2), ("random", 50, 64), ("lattice", 60, 2), ("photograph", 60, 3)),
        *(("photograph", 60, 64), ("photograph", 60, 192), ("stereo", 50, 3), ("digits", 50, 64)),
    ],
)
def test_inputs_have_the_shape_asked_for_and_are_the_same_each_time(name, n, dimension):
    points = inputs.points(name, n, dimension, batch=2)
    assert points.x.shape == (2, n, dimension) and points.x.is_contiguous()
    assert points.position.shape[-2] == n
    assert torch.equal(points.x, inputs.points(name, n, dimension, batch=2).x)
    if name != "lattice":
        assert not torch.equal(points.x[0], points.x[1])


def test_a_patch_has_its_pixel_in_the_middle():
    colors = inputs.points("photograph", 64, 3).x
    patches = inputs.points("photograph", 64, 192).x
    assert torch.equal(patches.unflatten(-1, (3, 8, 8))[..., 3, 3], colors)


def test_inputs_say_what_they_lack():
    with pytest.raises(ValueError, match="digits has no 4000 points of 64 dimensions"):
        inputs.points("digits", 4000, 64)
    with pytest.raises(ValueError, match="input"):
        inputs.points("nothing", 4, 2)


@pytest.mark.parametrize("metric", ["euclidean", "cosine", "mixed"])
@pytest.mark.parametrize("engine", ["dense", "auto", "torch_cluster", peer.NAME])
def test_a_cell_is_measured_or_refused(engine, metric):
    cell = graph.Cell(engine, metric, n=80, k=5, batch=2, seconds=0.001)
    found = last(graph.measure(cell))
    if found.note:
        assert metric == "mixed" or search.ENGINES["torch_cluster"].missing()
        return
    assert 0 < found.p10 <= found.median <= found.p90
    assert found.points == pytest.approx(160 / found.median)
    assert found.recall == 1.0 and found.samples >= 1
    assert math.isnan(found.host) and math.isnan(found.syncs)


def test_recall_counts_each_right_neighbour_once():
    cell = graph.Cell("dense", n=40, k=4)
    right = search.knn(inputs.points("random", 40, 3), k=4).index
    assert graph.recall(cell, right) == 1.0
    assert graph.recall(cell, right.flip(-1)) == 1.0
    assert graph.recall(cell, right[..., :1].expand(-1, -1, 4)) == 0.25
    far = search.knn(inputs.points("random", 40, 3), k=40).index[..., -4:]
    assert graph.recall(cell, far) == 0.0


def test_recall_takes_any_of_the_neighbours_at_one_distance():
    cell = graph.Cell("grid", "spatial", "lattice", n=36, dimension=2, k=2)
    right = search.knn(inputs.points("lattice", 36, 2), k=3, metric="spatial").index
    middle = right[14]
    other = right.clone()
    other[14] = middle[[0, 2, 1]]
    assert middle[1] != middle[2]
    assert graph.recall(cell, other[None, :, :2]) == 1.0


@pytest.mark.parametrize("cell", layers.cells(layers.families(), ["random"], [16], [8], [2]))
def test_a_layer_is_measured(cell):
    if cell.layer.startswith("PyG"):
        pytest.importorskip("torch_cluster")
    found = last(layers.measure(layers.replace(cell, seconds=0.001)))
    assert not found.note and found.forward > 0 and found.both > 0


def test_memory_of_a_call_is_what_it_allocates():
    with measure.watch_memory() as memory:
        big = torch.ones(2**24)
    del big
    assert math.isnan(memory.added) or 60 <= memory.added <= 80


def test_a_slow_call_is_sampled_once():
    calls = []
    assert len(measure.sample(lambda: calls.append(time.sleep(0.05)), 0.01)) == 1
    assert len(calls) == 2  # one to see how often, one to measure
    assert len(measure.sample(lambda: time.sleep(0.001), 0.2)) > 1
    assert measure.percentiles([1.0, 2.0, 3.0]) == pytest.approx((2.0, 1.2, 2.8))


@pytest.mark.parametrize("load", [0.4, 9.0])
def test_other_work_is_named(tmp_path, capsys, monkeypatch, load):
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    options = ["--engines", "dense", "--metric", "euclidean", "--input", "random", *TINY]
    assert main(["bench", "graph", *options, "--k", "4", "--quick", "--out", str(tmp_path)]) == 0
    assert ("load 9.0 on 2 cores" in capsys.readouterr().err) == (load == 9.0)


def test_it_says_why_there_are_no_ratios(capsys, monkeypatch):
    from convnn_geo.bench import commands, peer

    monkeypatch.setattr(peer, "installed", lambda: False)
    assert peer.NAME not in commands._engines("all")
    assert "without torch_cluster there are no ratios" in capsys.readouterr().err


def test_graph_from_the_command_line(tmp_path, capsys):
    options = ["--engines", "dense,auto", "--metric", "euclidean,mixed", "--input", "random"]
    out = tmp_path / "out"
    arguments = ["bench", "graph", *options, *TINY, "--k", "4", "--quick", "--out", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    assert "euclidean on random, 3 dimensions, k = 4, 1 example, cpu" in printed
    written = json.loads((out / "results.json").read_text())
    assert {"machine", "versions", "commit", "date", "settings"} <= set(written)
    assert [entry["engine"] for entry in written["results"]] == ["dense", "auto"] * 2
    with (out / "results.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 4 and all(float(row["median"]) > 0 and row["host"] == "" for row in rows)
    assert {file.name for file in out.glob("*.png")} == {
        "scaling_random_k4_batch1.png",
        "recall_random_k4_batch1.png",
        "winners_random_euclidean.png",
        "winners_random_mixed.png",
    }


def test_what_was_measured_before_it_was_interrupted_is_kept(tmp_path, monkeypatch, capsys):
    ask, answers = Worker.ask, []

    def interrupted(self, cell):
        if len(answers) == 2:
            raise KeyboardInterrupt
        answers.append(ask(self, cell))
        return answers[-1]

    monkeypatch.setattr(Worker, "ask", interrupted)
    options = ["--engines", "dense,auto", "--metric", "euclidean,mixed", "--input", "random"]
    command = ["bench", "graph", *options, *TINY, "--k", "4", "--quick", "--out", str(tmp_path)]
    assert main(command) == 130
    assert "interrupted after 2 of 4" in capsys.readouterr().err
    assert len(json.loads((tmp_path / "results.json").read_text())["results"]) == 2
    assert (tmp_path / "winners_random_euclidean.png").is_file()
    assert main([*command[:-1], str(tmp_path / "other")]) == 130  # nothing to keep
    assert not list((tmp_path / "other").iterdir())


def test_layers_from_the_command_line(tmp_path, capsys):
    options = ["--layers", "convolution", "--input", "random", "--quick", "--out", str(tmp_path)]
    assert main(["bench", "layers", *options, *TINY]) == 0
    assert "ratios to nn.Conv2d" in capsys.readouterr().out
    entries = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [e["layer"] for e in entries][:2] == ["nn.Conv2d", "ConvNN2d"]
    assert (tmp_path / "layers_random_c3_batch1.png").is_file()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["graph", "--engines", "nothing"], "unknown engine 'nothing'"),
        (["graph", "--metric", "nothing"], "unknown metric"),
        (["graph", "--n", "0"], "expected counts"),
        (["graph", "--k", "four"], "expected counts"),
        (["layers", "--layers", "nothing"], "unknown family"),
        ([], "expected what to measure, graph or layers, or --calibrate"),
    ],
)
def test_what_can_not_be_measured_is_one_line(options, message, capsys):
    with pytest.raises(SystemExit) as caught:
        main(["bench", *options])
    assert caught.value.code == 2
    assert message in capsys.readouterr().err


def test_there_is_no_gpu_to_measure(capsys):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(SystemExit):
        main(["bench", "graph", "--device", "cuda"])
    assert "take --device cpu" in capsys.readouterr().err


def test_calibration_measures_exact_engines_and_gives_a_cost_table(tmp_path, monkeypatch):
    cells = calibrate.cells()
    assert {cell.engine for cell in cells} <= set(search.engines())
    assert not any(graph.is_approximate(cell.engine) for cell in cells)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    todo = [graph.Cell("dense", n=n, k=4, seconds=0.001) for n in (32, 64)]
    small, large = calibrate.calibrate(todo=todo)
    assert small.pop("seconds") > 0
    assert small == {
        **{"engine": "dense", "device": "cpu", "dimension": 3},
        **{"n": 32, "m": 32, "k": 4, "batch": 1},
    }
    file = costs.save([large])
    assert tmp_path in file.parents and json.loads(file.read_text()) == [large]


@pytest.mark.parametrize("options", [["--calibrate"], ["graph", "--calibrate"]])
def test_calibration_from_the_command_line(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    todo = [graph.Cell("dense", n=32, k=4, seconds=0.001)]
    monkeypatch.setattr(calibrate, "cells", lambda device: todo)
    assert main(["bench", *options, "--budget", "30"]) == 0
    assert "1 of 1 cells measured" in capsys.readouterr().out
    assert [row["engine"] for row in json.loads(costs.user_table().read_text())] == ["dense"]
    costs.table.cache_clear()


def test_calibration_drops_a_case_that_time_was_over_in():
    todo = [graph.Cell(name, n=n) for n in (32, 64) for name in ("dense", "kd_tree")]
    results = [graph.Result(cell, median=1.0) for cell in todo[:3]]
    results.append(graph.Result(todo[3], NOT_ASKED))
    assert [row["m"] for row in calibrate.rows(results)] == [32, 32]


def test_a_picture_shows_winners_and_marks_cells_without_a_result():
    some = [
        *(result("dense", n=10), result("kd_tree", median=0.002, n=10)),
        *(result("faiss_ivf", median=0.001, recall=0.5, n=10), result("dense", "> 5 s", n=20)),
        *(result("kd_tree", n=30), result("dense", NOT_ASKED, n=30)),
        *(result("dense", n=40), result("faiss_ivf", NOT_ASKED, n=40)),
    ]
    texts = [text.get_text() for text in plots.plot_winners(some, "title").axes[0].texts]
    assert texts == [
        "kd_tree\n2.00 ms\nthen dense, 5.0 ×",
        "no result",
        "not all asked",
        "dense\n10.0 ms",
    ]


def test_scaling_has_a_panel_for_each_metric_and_dimension_and_a_mark_for_what_was_ended():
    some = [
        *(result(n=10), result(n=100, median=0.1), result("keops", "> 5 s", n=100)),
        *(result(n=10, dimension=64, metric="cosine"), result("grid", "refused", n=10)),
    ]
    figure = plots.plot_scaling(some, "title", 5.0)
    titles = [axis.get_title() for axis in figure.axes]
    assert titles[0] == "euclidean, 3 dimensions" and len(titles) == 4
    assert figure.axes[0].get_xscale() == figure.axes[0].get_yscale() == "log"
    assert [t.get_text() for t in figure.legends[0].get_texts()] == ["dense", "keops"]
    assert [t.get_text() for t in figure.axes[0].texts] == ["ended after 5 s (arrows)"]


def test_every_engine_has_a_look_of_its_own():
    looks = [style.style(name) for name in (*search.ENGINES, peer.NAME)]
    assert len(set(looks)) == len(looks)


def test_tables_have_ratios_to_torch_cluster_and_say_what_was_ended(capsys):
    some = [
        *(result("dense", median=0.02), result(peer.NAME, median=0.01)),
        *(result("kd_tree", "> 5 s"), result("grid", "no grid"), result("cells", NOT_ASKED)),
    ]
    tables.print_graph(some)
    printed = capsys.readouterr().out
    line = next(line for line in printed.splitlines() if "dense" in line)
    assert "20.0 ms" in line and "2.00" in line
    assert "> 5 s" in printed and "grid: no grid" in printed
    assert f"1 of 5 {NOT_ASKED}" in printed


def test_scripts_of_claims_stand_on_this_package():
    for script in (Path(__file__).parents[1] / "benchmarks").glob("*_*.py"):
        assert "from convnn_geo.bench import" in script.read_text()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        (["--calibrate", "--budget", "nan"], "expected seconds above 0"),
        (["--calibrate", "--budget", "0"], "expected seconds above 0"),
        (["--device", "tpu"], "expected cpu or cuda"),
        (["--n", "64", "--dim", "5", "--input", "photograph"], "nothing to measure"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, match, tmp_path, capsys):
    with pytest.raises(SystemExit) as error:
        main(["bench", "graph", *options, "--out", str(tmp_path)])
    assert match in capsys.readouterr().err + str(error.value)
