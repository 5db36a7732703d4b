"""A comparison over a bench that only counts, and one on a real tiny model: cells, order, resuming, tables, MLflow."""

import csv
import io
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from autoprune.algorithms.tuning import tune
from autoprune.models.errors import InputError
from autoprune.models.measuring import Measurement, Workbench
from autoprune.pipeline import checkpoint
from autoprune.pipeline.cli import main
from autoprune.pipeline.compare import ComparisonRun, prepare, settled
from autoprune.pipeline.comparison import (
    Comparison,
    Method,
    Methods,
    Result,
    Target,
    cells,
    check_comparison,
    load_comparison,
)
from autoprune.pipeline.comparison_report import Findings, results_csv, results_markdown, write_plots
from autoprune.pipeline.config import Data

DOCUMENT = "The quick brown fox jumps over the lazy dog while the sun goes down behind the hills. " * 4

ALLOCATE = "def allocate(profile, sparsity):\n    return profile.numel / profile.numel\n"


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    file = tmp_path_factory.mktemp("text") / "text.txt"
    file.write_text("\n\n".join(f"{number}. {DOCUMENT}" for number in range(12)))
    slices = {"calibration": f"{file}[0:4]", "fitness": f"{file}[4:8]", "report": f"{file}[8:12]"}
    return Data(context=32, calibration_windows=4, fitness_windows=2, report_windows=3, **slices)


@pytest.fixture(autouse=True)
def _no_waiting_for_the_disk(monkeypatch):
    """Many small files: waiting until each is on the disk would take most of the time of these tests."""
    monkeypatch.setattr(checkpoint.os, "fsync", lambda _: None)


@pytest.fixture
def config(tmp_path, tiny_model, data) -> Comparison:
    """Ten methods at two sparsities; four of the methods need Gram matrices, and two are tuned."""
    plain = Methods(("magnitude", "wanda"), ("none",), ("uniform", "sdsa", "owl:tuned"))
    updated = Methods(("sparsegpt", "wanda"), ("sparsegpt", "cg"), ("uniform",))
    config = Comparison(
        "run", str(tmp_path), (str(tiny_model),), "float32", False, (plain, updated), (0.5, "2:4"), data
    )
    return settled(replace(config, evaluations=3, side_by_side=3))


def number(algorithm, sparsity: float) -> float:
    """An NLL that depends on all of a job and on nothing else."""
    return 3 + int(algorithm.key, 16) / 2**64 + 4 * sparsity**4


class Bench:
    """Counts. asked: every batch of (algorithm, sparsity, split), over all benches of a test."""

    def __init__(self, die_after: float = math.inf, fails=lambda algorithm: None) -> None:
        self.asked, self.opened, self.starts, self.done = [], [], [], 0
        self.die_after, self.fails = die_after, fails

    def open(self, subject, statistics, features, offload, say):
        self.opened.append((statistics, features))
        return self

    def _begin(self) -> None:
        if self.done >= self.die_after:
            raise KeyboardInterrupt
        self.starts.append(self.done)

    def _found(self, nll: float, sparsity: float) -> Measurement:
        self.done += 1
        return Measurement(nll, math.exp(nll), 0.01, nll - 3, 0.02, 93, sparsity, (sparsity,) * 4, (), 0, 0, 0.5, 1.5)

    def measure_dense(self, split):
        self._begin()
        self.asked.append(["dense"])
        return self._found(3.0, 0.0)

    def measure(self, jobs, split):
        self._begin()
        for algorithm, _ in jobs:
            if self.fails(algorithm):
                raise ValueError(self.fails(algorithm))
        self.asked.append([(algorithm, sparsity, split) for algorithm, sparsity in jobs])
        return [self._found(number(*job), job[1]) for job in jobs]

    def tune(self, algorithm, name, sparsity, evaluations, split):
        def measure(allocations):
            jobs = [(replace(algorithm, allocation=allocation), sparsity) for allocation in allocations]
            return [found.nll for found in self.measure(jobs, split)]

        return tune(name, measure, evaluations, algorithm.allocation.per, 4)


class Tracker:
    def __init__(self) -> None:
        self.told = []

    def cell(self, cell, result):
        self.told.append((cell.key, result.error))


def sitting(config: Comparison, bench: Bench, said: list | None = None) -> ComparisonRun:
    (config.folder / "cells").mkdir(parents=True, exist_ok=True)
    say = said.append if said is not None else lambda _: None
    return ComparisonRun(config, prepare(config), Tracker(), say, bench.open)


def measured(config: Comparison, bench: Bench) -> ComparisonRun:
    run = sitting(config, bench)
    run.measure()
    return run


def table_of(run: ComparisonRun) -> list[dict]:
    return list(csv.DictReader(io.StringIO((run.config.folder / "results.csv").read_text())))


def test_cells_are_measured_in_order_and_side_by_side(config):
    bench = Bench()
    run = measured(config, bench)
    assert len(run.results) == len(run.tracker.told) == 1 + 10 * 2
    assert bench.asked[0] == ["dense"]
    report = [[(a, s) for a, s, split in batch] for batch in bench.asked[1:] if batch[0][2] == "report"]
    assert [len(batch) for batch in report] == [1] * 12 + [3, 3, 2]
    singles = [batch[0][0] for batch in report[:12]]
    assert all(algorithm.update == "none" for algorithm in singles)
    assert [a.allocation.name for a in singles] == ["uniform"] * 2 + ["sdsa"] * 2 + ["uniform"] * 2 + ["sdsa"] * 2 + [
        "owl"
    ] * 4, "tuned cells come after the others"
    for algorithm, sparsity in (job for batch in report for job in batch):
        assert sparsity == 0.5 and algorithm.group in ("row", "matrix", "2:4")
    assert {(a.score, a.update) for batch in report[12:] for a, _ in batch} == {
        (score, update) for score in ("sparsegpt", singles[4].score) for update in ("sparsegpt", "cg")
    }
    ((statistics, features),) = bench.opened
    assert (statistics, features) == ({"x_norm", "gram"}, frozenset())


def test_a_tuned_cell_says_what_was_tried_and_only_its_report_figure_is_published(config):
    run = measured(config, Bench())
    (row,) = [r for r in table_of(run) if (r["score"], r["allocation"], r["group"]) == ("wanda", "owl:tuned", "row")]
    (cell,) = [c for c in run._all if str(c) == "wanda+owl:tuned at 50%"]
    result = run.results[cell.key]
    assert len(result.trace) == 3 and result.fitness_nll == min(nll for _, nll in result.trace)
    (best,) = [name for name, nll in result.trace if nll == result.fitness_nll]
    assert best == f"owl {row['parameters']}" and float(row["fitness_perplexity"]) == math.exp(result.fitness_nll)
    stored = json.loads((config.folder / "cells" / f"{cell.key}.json").read_text())
    assert stored["result"]["algorithm"]["allocation"]["parameters"] == {"lam": float(best.split("=")[1])}
    assert all(r["fitness_perplexity"] == "" for r in table_of(run) if ":tuned" not in r["allocation"])


def test_what_a_reader_must_know_stands_below_the_table(config):
    class Odd(Bench):
        def _found(self, nll, sparsity):
            found = super()._found(nll, sparsity)
            return replace(found, dead_inputs=3, damped=2, fallbacks=("x",), block_sparsities=(0.25, 0.75))

    run = measured(replace(config, sparsities=("2:4",)), Odd())
    text = (config.folder / "results.md").read_text()
    for part in ("not 2:4 everywhere", "own n of 4", "1 experts saw", "3 inputs were zero", "Hessian of 2 layers"):
        assert part in text
    updated = [row for row in table_of(run) if row["update"] not in ("", "none") and not row["error"]]
    plain = [row for row in table_of(run) if row["update"] in ("", "none") and not row["error"]]
    assert updated and all(row["perplexity"] == "" and float(row["perplexity_updated"]) > 0 for row in updated)
    assert plain and all(row["perplexity_updated"] == "" and float(row["perplexity"]) > 0 for row in plain)
    assert {row["dead_inputs"] for row in plain + updated} == {"3"}


def test_killed_anywhere_and_run_again_nothing_is_measured_twice(config):
    config, whole = replace(config, sparsities=(0.5,)), Bench()
    measured(config, whole)
    table = (config.folder / "results.csv").read_text()
    for death in whole.starts:
        shutil.rmtree(config.folder)
        first, second = Bench(die_after=death), Bench()
        with pytest.raises(KeyboardInterrupt):
            measured(config, first)
        kept = {path.stem for path in (config.folder / "cells").iterdir()}
        run = sitting(config, second)
        assert set(run.results) == kept
        run.measure()
        assert (config.folder / "results.csv").read_text() == table
        assert {key for key, _ in run.tracker.told} == set(run.results), "the tracker hears of the old ones, too"
        lost = first.done + second.done - whole.done
        assert 0 <= lost <= 3, "only what the tuned cell in flight had measured on the fitness split"
    again = Bench()
    measured(config, again)
    assert again.asked == again.opened == []


def test_only_what_is_missing_is_asked_of_the_model(config):
    small = replace(config, methods=(Methods(("wanda",), ("none",), ("uniform",)),))
    measured(small, Bench())
    more = Methods(("wanda", "obs-diag"), ("none",), ("uniform", "alphapruning"))
    bench = Bench()
    run = measured(replace(small, methods=(more,), side_by_side=1, offload=True), bench)
    assert len(run.results) == 1 + 8 and bench.done == 6
    assert bench.opened == [({"x_norm", "h_inv_diag"}, {"tail_exponent"})]
    assert len(table_of(run)) == 9
    measured(small, Bench(die_after=0)).write()
    assert len(table_of(run)) == 3, "the tables hold what the present configuration names"


def keys(config: Comparison) -> dict[str, str]:
    (subject,) = prepare(settled(config))
    return {str(cell): cell.key for cell in cells(config, subject)}


def changed(config: Comparison, **changes) -> set[str]:
    """Which cells get another key."""
    before, after = keys(config), keys(replace(config, **changes))
    assert before.keys() == after.keys()
    return {name for name in before if before[name] != after[name]}


def test_what_is_tuned_sees_the_whole_fitness_text(config):
    data = replace(config.data, fitness_windows=999)
    (every,) = (subject.windows["fitness"] for subject in prepare(replace(config, data=data)))
    (subject,) = prepare(config)
    assert subject.windows["fitness"].equal(every[[0, len(every) // 2]]) and len(every) > 10


def test_a_cell_s_key_changes_with_what_decides_its_figures_and_with_nothing_else(config, tmp_path, tiny_model):
    names = set(keys(config))
    tuned = {name for name in names if "tuned" in name}
    assert len(set(keys(config).values())) == len(names) == 21 and len(tuned) == 4
    data = config.data
    assert changed(config, dtype="bfloat16") == names
    assert changed(config, data=replace(data, context=16)) == names
    assert changed(config, data=replace(data, report=data.report.replace("[8:12]", "[9:12]"))) == names
    assert changed(config, data=replace(data, calibration_windows=3)) == names - {"dense"}
    assert changed(config, data=replace(data, fitness_windows=1)) == tuned == changed(config, evaluations=4)
    assert changed(config, name="other", offload=True, side_by_side=1, runs=str(tmp_path / "elsewhere")) == set()
    assert changed(config, data=replace(data, calibration_windows=99)) == names - {"dense"}

    folder = shutil.copytree(tiny_model, tmp_path / "copy")
    copied = replace(config, models=(str(folder),))
    before = keys(copied)
    weights = load_file(folder / "model.safetensors")
    save_file({**weights, "more": torch.zeros(1)}, folder / "model.safetensors")
    heavier = keys(copied)
    (folder / "config.json").write_text((folder / "config.json").read_text() + "\n")
    assert all(len({before[name], heavier[name], key}) == 3 for name, key in keys(copied).items())


def test_a_method_that_fails_is_a_cell_with_an_error_and_the_others_are_measured(config):
    bench = Bench(fails=lambda a: "mlp: 4 does not | divide 6" if (a.group, a.update) == ("2:4", "cg") else None)
    run = measured(config, bench)
    failed = [row for row in table_of(run) if row["error"]]
    assert {(row["score"], row["update"], row["group"]) for row in failed} == {
        ("wanda", "cg", "2:4"),
        ("sparsegpt", "cg", "2:4"),
    }
    assert all(row["perplexity"] == row["nll"] == "" for row in failed)
    assert len(table_of(run)) == 21 and len(run.results) == 21
    text = (config.folder / "results.md").read_text()
    assert text.count("| error 1 |") == 2 or text.count(" error 1 |") == 2
    assert "- error 1: mlp: 4 does not \\| divide 6" in text
    assert [error for _, error in run.tracker.told if error] == ["mlp: 4 does not | divide 6"] * 2
    assert measured(config, again := Bench()) and again.done == 0, "an error is a result, too"


def test_a_likelihood_that_is_not_finite_is_an_error_and_of_the_dense_model_unusable(config):
    bench = Bench()
    bench._found = lambda nll, s: Measurement(math.nan if s else 3.0, 1, None, 0, None, 93, s, (0.0,), (), 0, 0, 1, 1)
    run = measured(replace(config, methods=(Methods(("wanda",), ("none",), ("uniform",)),)), bench)
    assert [row["error"][:14] for row in table_of(run)] == ["", *["the likelihood"] * 2]
    bench._found = lambda nll, s: Measurement(math.nan, 1, None, 0, None, 93, s, (0.0,), (), 0, 0, 1, 1)
    with pytest.raises(InputError, match="float32 overflows on"):
        measured(replace(config, name="other"), bench)


def test_a_damaged_cell_is_measured_again(config):
    run = measured(config, Bench())
    cell, other = run._all[3], run._all[4]
    path = config.folder / "cells" / f"{cell.key}.json"
    path.write_bytes(path.read_bytes()[:50])
    (config.folder / "cells" / f"{other.key}.json").write_text("{}")
    said, bench = [], Bench()
    sitting(config, bench, said).measure()
    assert bench.done == 2 and sum("is damaged" in line for line in said) == 2


def findings(config: Comparison, nlls: dict[str, float]) -> Findings:
    """Findings in which the named cells have these NLLs, and a KL of the NLL − 3."""
    (subject,) = prepare(config)
    own = cells(config, subject)
    names = {str(cell): cell.key for cell in own}
    results = {
        names[name]: Result(1.0, "cpu", None, None, nll, 0.1, nll - 3, 0.1, 93, 0.5) for name, nll in nlls.items()
    }
    return Findings(subject, own, results)


def test_tables_keep_masks_and_updates_apart_and_say_how_sdsa_stands(config):
    methods = (
        Methods(("wanda",), ("none",), ("uniform", "owl", "sdsa", "sdsa@layer")),
        Methods(("sparsegpt",), ("sparsegpt",), ("uniform", "sdsa")),
    )
    config = replace(config, methods=methods, sparsities=(0.5, 0.7))
    nlls = {"wanda at 50%": math.log(40), "wanda+owl at 50%": math.log(30), "wanda+sdsa at 50%": math.log(36)}
    nlls |= {"wanda+sdsa@layer at 50%": math.log(33), "dense": 3.0, "wanda at 70%": 8.0, "wanda+sdsa at 70%": 12.0}
    nlls |= {"sparsegpt/sparsegpt at 50%": math.log(29.7), "sparsegpt/sparsegpt+sdsa at 50%": math.log(27)}
    text = results_markdown(config, [findings(config, nlls)])
    masks, updates = text.partition("### With weight update")[::2]
    assert "ppl_token@32" in text and "float32" in text and "dense perplexity 20.09." in text
    assert all(getattr(config.data, name) in text for name in ("calibration", "report"))
    assert "tuned on" not in text
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in masks.splitlines() if line[:1] == "|"]
    assert rows == [
        ["method", "50%", "70%"],
        ["-" * len(rows[1][0]), "-" * (len(rows[1][1]) - 1) + ":", "-" * (len(rows[1][2]) - 1) + ":"],
        ["dense", "20.09 ± 2.01", "20.09 ± 2.01"],
        ["wanda", "40.00 ± 4.00 (0.689)", "**2,981 ± 298.10 (5.000)**"],
        ["wanda+owl", "**30.00 ± 3.00 (0.401)**", "–"],
        ["wanda+sdsa", "36.00 ± 3.60 (0.584)", "162,755 ± 16,275 (9.000)"],
        ["wanda+sdsa@layer", "33.00 ± 3.30 (0.497)", "–"],
    ]
    assert "sparsegpt" not in masks and "wanda" not in updates
    assert "- 50%: wanda: best owl (30.00), sdsa@layer 10.0% above.\n" in masks
    assert "- 70%: wanda: best uniform (2,981), sdsa 55 times as high.\n" in masks
    assert "- 50%: sparsegpt/sparsegpt: best sdsa (27.00), uniform 10.0% above.\n" in updates
    assert len({len(line) for line in masks.splitlines() if line[:1] == "|"}) == 1, "columns are aligned"

    del nlls["dense"]
    nameless = results_markdown(config, [findings(config, nlls)])
    assert "|" not in nameless and "The dense model is not measured" in nameless
    assert results_csv([findings(config, {})]).count("\n") == 1


def test_methods_are_set_against_the_best_of_a_column_window_by_window(config):
    methods = (Methods(("wanda",), ("none",), ("uniform", "owl", "sdsa", "dlp")),)
    config = replace(config, methods=methods, sparsities=(0.5,))
    windows = {"wanda": (3.0, 5.0, 4.6), "wanda+owl": (2.9, 4.8, 4.3), "wanda+sdsa": ()}  # the last of an old version
    found = findings(config, {"dense": 3.0} | {f"{name} at 50%": 4.0 for name in windows})
    for (method, target), result in list(found._results.items()):
        if method is not None:
            own = windows[str(method)]
            nll = sum(own) / 3 if own else 4.3
            found._results[method, target] = replace(result, nll=nll, window_nlls=own, standard_error=None)
    text = results_markdown(config, [found])
    paired = text.partition("paired over the windows:")[2]
    rows = [[part.strip() for part in line.strip("|").split("|")] for line in paired.splitlines() if line[:1] == "|"]
    error = math.sqrt(((0.1 - 0.2) ** 2 + (0.3 - 0.2) ** 2) / 2 / 3)
    assert rows[2:] == [
        ["wanda", f"+0.2000 ± {error:.4f}"], ["wanda+owl", "best"], ["wanda+sdsa", "–"], ["wanda+dlp", "–"]
    ]  # fmt: skip
    assert "| 66.69 (1.000) |" in text.replace("  ", ""), "without an error where there is none"
    for (method, target), result in list(found._results.items()):
        if str(method) == "wanda+sdsa":
            found._results[method, target] = replace(result, nll=4.0 - 0.1)
    text = results_markdown(config, [found])
    assert "+0.2" not in text.partition("paired")[2] and "| best |" not in text.replace("  ", ""), (
        "nothing to pair with"
    )


def test_a_picture_for_each_model_with_a_curve(config, tmp_path):
    config = replace(config, sparsities=(0.5, 0.7, "2:4"))
    given = "sdsa:tau=1,m=0.6,depth=0.5"
    config = replace(config, methods=(*config.methods, Methods(allocations=(given, "explicit@layer:0.5,0.6"))))
    own = str(tmp_path / "my own.py")
    Path(own).write_text(ALLOCATE)
    config = replace(config, methods=(*config.methods, Methods(allocations=(own, f"{own}@layer"))))
    drawn = (
        "wanda",
        "wanda+my own.py",
        "wanda+my own.py@layer",
        "wanda/cg",
        "wanda+sdsa",
        "wanda+owl:tuned",
        f"wanda+{given}",
        "wanda+explicit@layer:0.5,0.6",
    )
    nlls = {f"{method} at {share}": 4.0 + i for method in drawn for i, share in enumerate(("50%", "70%"))}
    assert write_plots(tmp_path, [findings(config, nlls)]) == [], "no dense row, no picture"
    drawn = findings(config, nlls | {"dense": 3.0, "wanda at 70%": 800.0})
    paths = write_plots(tmp_path, [drawn, drawn])
    assert [path.name for path in paths] == ["perplexity-tiny.png", "perplexity-tiny-2.png"]
    assert all(path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 10_000 for path in paths)
    assert write_plots(tmp_path, [findings(config, {"dense": 3.0, "wanda at 50%": 4.0})]) == []


def test_names():
    method = Method("wanda", "cg", "sdsa@layer:tuned")
    assert str(method) == "wanda/cg+sdsa@layer:tuned" and str(Method("ria", "none", "uniform")) == "ria"
    algorithm = method.algorithm(Target.read("4:8"))
    assert (algorithm.group, algorithm.update, algorithm.allocation.per) == ("4:8", "cg", "layer")
    assert Target.read("1:4") == Target(0.75, "1:4") and str(Target.read(0.6)) == "60%"
    given = Method("wanda", "none", "sdsa:tau=1,m=0.25,depth=0.5")
    assert given.algorithm(Target.read(0.5)).allocation.parameters == {"tau": 1.0, "m": 0.25, "depth": 0.5}
    assert str(given) == "wanda+sdsa:tau=1,m=0.25,depth=0.5" and not given.tuned
    double = Comparison(methods=(Methods(("wanda", "wanda")), Methods(("wanda",))), sparsities=(0.5, 0.5))
    assert len(double.all_methods()) == 3 and len(double.targets()) == 1


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("methods=[{scores: [wnada]}]", "wanda"),
        ("methods=[{scores: [wanda/cg]}]", "methods.scores is 'wanda/cg'"),
        ("methods=[{updates: [gptq]}]", "none or sparsegpt or cg"),
        ("methods=[{allocations: [sdas]}]", "sdsa"),
        ("methods=[{allocations: [uniform:tuned]}]", "uniform has no parameters to tune"),
        ("methods=[{allocations: ['sdsa:tau=1:tuned']}]", "tune them or give them"),
        ("methods=[{allocations: ['sdsa:taylor=0.5,tau=1:tuned']}]", "tune them or give them"),
        ("methods=[{allocations: ['sdsa:tau=x']}]", "expected numbers"),
        ("methods=[{score: [wanda]}]", "did you mean methods.scores?"),
        ("methods=[]", "methods is empty"),
        ("methods=[{scores: []}]", "methods.scores is empty"),
        ("sparsities=['16x16']", "'16x16'"),
        ("sparsities=[4:2]", "or patterns such as 2:4"),
        ("sparsities=[0.5, 60]", "sparsities holds 60"),
        ("sparsities=[true]", "expected a number"),
        ("evaluations=0", "expected 1 to"),
        ("side_by_side=0", "1 or more"),
        ("dtype=fp8", "float32"),
        ("data.context=1", "at least 2"),
        ("data.report_windows=0", "more than 0"),
        ("name=../x", "without slashes"),
        ("modells=[x]", "did you mean models?"),
    ],
)
def test_an_unusable_configuration_is_one_line(tmp_path, setting, expected):
    file = tmp_path / "compare.yaml"
    file.write_text("name: run\n")
    with pytest.raises(InputError) as caught:
        load_comparison(file, [setting])
    assert expected in str(caught.value) and "\n" not in str(caught.value)


def test_the_default_configuration_can_be_read_and_written(tmp_path):
    shipped = load_comparison(Path(__file__).parents[2] / "configs" / "compare.yaml")
    file = tmp_path / "again.yaml"
    file.write_text(shipped.to_yaml())
    assert load_comparison(file) == shipped


@pytest.fixture
def command(tmp_path, tiny_model, data) -> list[str]:
    """A real comparison: one method fails, since its scores are no numbers, and one is tuned."""
    broken = tmp_path / "broken.py"
    broken.write_text("def score(W):\n    return W / (W * 0)\n")
    methods = [
        {"scores": ["wanda"], "updates": ["none"], "allocations": ["uniform", "sdsa:tuned"]},
        {"scores": ["sparsegpt"], "updates": ["sparsegpt"], "allocations": ["uniform"]},
        {"scores": [str(broken)], "updates": ["none"], "allocations": ["uniform"]},
    ]
    settings = {
        "name": "real",
        "runs": str(tmp_path / "runs"),
        "models": [str(tiny_model)],
        "dtype": "float32",
        "methods": methods,
        "sparsities": [0.5, "2:4"],
        "data": vars(data),
        "evaluations": 2,
    }
    file = tmp_path / "compare.yaml"
    file.write_text(yaml.safe_dump(settings))
    return ["compare", str(file)]


def test_a_real_comparison_is_stopped_and_goes_on(capsys, monkeypatch, tmp_path, command, tiny_model, data):
    from mlflow import MlflowClient

    from autoprune.models.pruning import evaluate, prune
    from autoprune.pipeline.population import baseline

    assert main([*command, "--set", "data.report=/no/such.txt"]) == 2
    capsys.readouterr()
    assert main([*command, "--set", "sparsities=[0.5, '3:7']"]) == 2
    assert "has layers of 32 inputs, which 3:7 cannot cut" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()
    folder, done, measure = tmp_path / "runs" / "real", [], Workbench.measure

    def dying(self, jobs, split):
        if len(done) == 2:
            raise KeyboardInterrupt
        done.append(jobs)
        return measure(self, jobs, split)

    monkeypatch.setattr(Workbench, "measure", dying)
    assert main(command) == 130
    assert f"go on with: autoprune compare {folder / 'config.yaml'}" in capsys.readouterr().err
    assert len(list((folder / "cells").iterdir())) == 3
    monkeypatch.setattr(Workbench, "measure", measure)
    assert main(["compare", str(folder / "config.yaml")]) == 1
    printed = capsys.readouterr()
    assert printed.out == (folder / "results.md").read_text() and "3 of 9 cells are there already" in printed.err
    assert "2 of 9 cells failed" in printed.err
    rows = list(csv.DictReader((folder / "results.csv").open()))
    assert len(rows) == 9 and rows[0]["score"] == "dense"

    pruned = tmp_path / "pruned"
    prune(str(tiny_model), baseline("wanda"), 0.5, data.calibration, pruned, 32, data.calibration_windows)
    oracle = evaluate(str(pruned), data.report, 32, data.report_windows, reference=str(tiny_model))
    (row,) = [r for r in rows if (r["score"], r["allocation"], r["group"]) == ("wanda", "uniform", "row")]
    assert float(row["nll"]) == pytest.approx(oracle.nll, abs=1e-5)
    assert float(row["kl"]) == pytest.approx(oracle.kl, abs=1e-5)
    assert float(row["standard_error"]) == pytest.approx(oracle.standard_error, abs=1e-5)
    assert row["corpus_sha256"] == oracle.corpus_sha256 and int(row["tokens"]) == oracle.tokens == 93
    failed = [r for r in rows if r["error"]]
    assert {Path(r["score"]).name for r in failed} == {"broken.py"} and len(failed) == 2
    assert all(abs(float(r["sparsity_achieved"]) - 0.5) < 0.02 for r in rows[1:] if not r["error"])
    assert "### With weight update" in printed.out and "error 1" in printed.out
    assert printed.out.count("Nats above the best of the column, paired over the windows:") == 1, "for two, not for one"

    client = MlflowClient(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}")
    parent_id = json.loads((folder / "mlflow.json").read_text())["run_id"]

    def children() -> list:
        runs = client.search_runs([client.get_run(parent_id).info.experiment_id])
        return [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent_id]

    parent, own = client.get_run(parent_id), children()
    assert (parent.info.status, parent.data.tags["autoprune.kind"]) == ("FINISHED", "comparison")
    assert {"cells": 9, "errors": 2}.items() <= parent.data.metrics.items()  # beside those of the machine
    assert {"results.csv", "results.md", "config.yaml"} <= {file.path for file in client.list_artifacts(parent_id)}
    assert {run.data.tags["autoprune.cell"] for run in own} == {p.stem for p in (folder / "cells").iterdir()}
    names = {"model", "score", "update", "group", "allocation", "sparsity"}
    assert all(set(run.data.params) == names and run.data.tags["autoprune.kind"] == "comparison" for run in own)
    (run,) = [run for run in own if run.info.run_name == "wanda at 50%"]
    assert run.data.metrics["nll"] == float(row["nll"]) and set(run.data.metrics) == {
        "perplexity", "nll", "kl", "sparsity_achieved", "pruning_seconds"
    }  # fmt: skip
    assert sorted(run.info.status for run in own) == ["FAILED"] * 2 + ["FINISHED"] * 7

    monkeypatch.setattr(Workbench, "__init__", lambda *_: pytest.fail("a finished comparison was measured again"))
    assert main(command) == 1
    assert len(children()) == 9
    assert main([*command, "--set", "name=text", "--set", f"runs={tmp_path / 'copy'}", "--set", "models=[x]"]) == 2
    (tmp_path / "runs" / "taken").mkdir()
    (tmp_path / "runs" / "taken" / "journal.jsonl").write_text("")
    assert main([*command, "--set", "name=taken"]) == 2
    assert "holds something else than a comparison" in capsys.readouterr().err


def test_algorithms_from_files_are_compared_too(config, tmp_path):
    file = tmp_path / "found.py"
    file.write_text("# group: matrix\n# allocation: sdsa tau=1 m=0.3 depth=0.5\ndef score(W):\n    return W.abs()\n")
    config = settled(replace(config, methods=(Methods((str(file),), ("none", "cg"), ("own", "uniform", "owl:tuned")),)))
    check_comparison(config)
    methods = config.all_methods()
    assert [str(method) for method in methods] == [
        "found+own", "found", "found+owl:tuned", "found/cg+own", "found/cg", "found/cg+owl:tuned",
    ]  # fmt: skip
    algorithm = methods[3].algorithm(Target(0.6))
    assert (algorithm.group, algorithm.update, algorithm.allocation.parameters["m"]) == ("matrix", "cg", 0.3)
    assert methods[1].algorithm(Target(0.5, "2:4")).group == "2:4"
    assert methods[1].algorithm(Target(0.6)).allocation.name == "uniform"
    sparse = tmp_path / "sparse.py"
    sparse.write_text("# group: 2:4\ndef score(W):\n    return W.abs()\n")
    check_comparison(replace(config, methods=(Methods((str(sparse),)),), sparsities=(0.5, "1:4")))
    config = replace(config, sparsities=(0.6,))
    for methods, message in (
        (Methods((str(sparse),)), "sparsities holds 60%, and .*sparse.py is for 2:4, which means 50%"),
        (Methods(("wanda",), ("none",), ("own",)), "methods.allocations holds 'own' beside the score wanda"),
        (Methods((str(tmp_path / "no.py"),)), "cannot read"),
        (Methods((str(file),), ("none",), ("own:tuned",)), "what a file says itself cannot be tuned"),
    ):
        with pytest.raises(InputError, match=message):
            check_comparison(replace(config, methods=(methods,)))


def test_an_allocation_from_a_file_is_found_from_anywhere(config, tmp_path, monkeypatch):
    (tmp_path / "ours.py").write_text(ALLOCATE)
    monkeypatch.chdir(tmp_path)
    methods = (Methods(("wanda",), ("none",), ("ours.py", "ours.py@layer", "sdsa@layer:tuned")),)
    (group,) = settled(replace(config, methods=methods)).methods
    assert group.allocations == (f"{tmp_path}/ours.py", f"{tmp_path}/ours.py@layer", "sdsa@layer:tuned")
    assert [str(Method("wanda", "none", a)) for a in group.allocations[:2]] == ["wanda+ours.py", "wanda+ours.py@layer"]
    (tmp_path / "wanda").mkdir()
    assert settled(replace(config, methods=methods)).methods[0].scores == ("wanda",), "not the folder"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "ours.py").write_text(ALLOCATE)
    with pytest.raises(InputError, match="b/ours.py and ours.py: give them different names"):
        check_comparison(replace(config, methods=(Methods(allocations=("ours.py", "b/ours.py")),)))
    with pytest.raises(InputError, match="'ours.py:tuned': ours.py has no parameters to tune"):
        check_comparison(replace(config, methods=(Methods(allocations=("ours.py:tuned",)),)))
