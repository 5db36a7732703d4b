"""The report of made-up searches, built with the real lineage classes: what it must say, and its pictures."""

import io
import json
import math
import random
import re
import shutil
from html.parser import HTMLParser

import numpy as np
import pytest
from matplotlib.image import imread
from rich.console import Console

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.models.errors import InputError
from autoprune.models.perplexity import perplexity
from autoprune.pipeline import plots
from autoprune.pipeline.cli import main
from autoprune.pipeline.lineage import Candidate, Lineage, noise_bound
from autoprune.pipeline.plots import gain_band
from autoprune.pipeline.population import read_score
from autoprune.pipeline.report import print_report, table, write_report
from autoprune.pipeline.report_page import formula_svg

SDSA = Allocation("sdsa", {"tau": 0.5, "m": 0.3, "depth": 0.0})
OPERATORS = ("explore", "crossover", "mutate", "tune", "simplify", "repair")


def evaluation(nll, rng, blocks=30):
    windows = tuple(nll + rng.gauss(0, 0.05) for _ in range(16))
    sparsities = tuple(0.6 + 0.08 * math.sin(b / 5 + nll) for b in range(blocks))
    errors = tuple(0.1 + 0.01 * b + rng.gauss(0, 0.01) for b in range(blocks))
    return Evaluation(sum(windows) / 16, 16 * 511, windows, sparsities, errors, 0.6, 12.5)


def made_up_lineage(generations, width, seed=0):
    """Seeds, then `width` answers in each generation, a third of them unusable; fitness drifts down, with outliers."""
    rng, lineage = random.Random(seed), Lineage()
    seeds = {"magnitude": (7.1, Allocation()), "wanda": (5.42, Allocation()), "wanda+sdsa": (5.09, SDSA)}
    for index, (name, (nll, allocation)) in enumerate(seeds.items()):
        score = f"def score(W, x_norm):\n    return W.abs() * x_norm + {index}"
        mask = f"{rng.getrandbits(64):016x}"
        algorithm = Algorithm(score, "row", allocation)
        given = {"algorithm": algorithm, "mask": mask, "mask_hash": mask, "status": "evaluated"}
        lineage.add(Candidate(f"seed-{name}", 0, "seed", evaluation=evaluation(nll, rng), **given))
    for generation in range(1, generations + 1):
        elite = lineage.evaluated()[:4]
        for index in range(width):
            operator, mask = OPERATORS[rng.randrange(6)], f"{rng.getrandbits(64):016x}"
            parents = tuple(c.id for c in rng.sample(elite, 2 if operator == "crossover" else 1))
            status = rng.choices(("evaluated", "invalid", "repeat", "failed"), (13, 3, 4, 1))[0]
            nll = lineage[parents[0]].fitness + (rng.gauss(0.03, 0.08) if rng.random() > 0.12 else rng.uniform(1, 6))
            lineage.add(
                Candidate(
                    f"g{generation}-c{index}",
                    generation,
                    operator,
                    parents,
                    Algorithm(f"def score(W, x_norm):\n    return W.abs() * x_norm ** {nll:.4f}", "row", SDSA),
                    diagnosis="Block 0 carries outliers.\nThe score ignores *them*.",
                    hypothesis="A <b>softer</b> norm keeps [them](x).",
                    status=status,
                    mask=mask,
                    mask_hash=mask,
                    evaluation=evaluation(nll, rng) if status == "evaluated" else None,
                )
            )
    return lineage


def made_up_summary(lineage):
    best = lineage.evaluated()[0]
    rows = [("wanda", 0.6, "seed-wanda"), ("wanda+sdsa", 0.6, "seed-wanda+sdsa"), ("best found", 0.6, best.id)]
    pruned = [
        {
            "method": method,
            "sparsity": sparsity,
            "fitness_nll": lineage[name].fitness,
            "report_nll": 5.5,
            "candidate": name,
        }
        for method, sparsity, name in rows
    ]
    dense = {"method": "dense", "sparsity": 0.0, "fitness_nll": 3.1, "report_nll": 3.0, "candidate": None}
    dense["above_best"] = [-2.5, 0.125]
    return {
        "name": "demo",
        "config": {"seed": 0},
        "target": "SmolLM2-135M-Instruct",
        "generator": "Qwen2.5-Coder-1.5B-Instruct",
        "sparsity": 0.6,
        "dtype": "float32",
        "context": 512,
        "corpora": {"calibration": "prose:0-48", "fitness": "prose:100-116", "report": "wikitext-2/test"},
        "table": [*pruned, dense],
        "mlflow": "python -m mlflow ui",
        "counts": {
            "answers": 96,
            "usable": 86,
            "invalid": 10,
            "repeated": 6,
            "surplus": 16,
            "evaluated": 60,
            "failed": 4,
        },
        "tokens": {"prompt": 120_000, "completion": 34_567},
        "seconds": {"generating": 200.0, "evaluating": 700.4, "waiting": 59.6, "total": 3960.0},
        "best": best.id,
        "model": "runs/demo/[model]",
        "command": "autoprune search configs/demo.yaml",
    }


@pytest.fixture(scope="module")
def lineage():
    return made_up_lineage(4, 8, seed=7)


@pytest.fixture(scope="module")
def report(lineage, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    return folder, write_report(folder, lineage, made_up_summary(lineage))


def test_files_and_pictures(report):
    folder, paths = report
    pages, pictures = {"report.html", "lineage.html"}, {"lineage.png", "fitness.png", "sparsity.png"}
    names = {"report.json", "report.md", "best.py"} | pages | pictures
    assert {path.name for path in paths} == names == {path.name for path in folder.iterdir()}
    for path in paths:
        if path.suffix == ".png":
            picture = imread(path)
            assert min(picture.shape[:2]) > 400 and picture.std() > 0.02  # something is drawn


def test_markdown_table_has_dense_first_and_right_perplexities(report, lineage):
    text = (report[0] / "report.md").read_text()
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line[:1] == "|"]
    assert [row[0] for row in rows[2:]] == ["dense", "wanda", "wanda+sdsa", "best found"]
    assert rows[2][2:] == ["0.0%", "22.20", "20.09", "-2.500 ± 0.125"]  # exp(3.1), exp(3.0)
    assert rows[0][5] == "above the best found, nats" and rows[-1][5] == "–"
    for row in rows[3:]:
        name = f"seed-{row[0]}" if row[1] == "seed" else row[1]
        assert float(row[3]) == pytest.approx(math.exp(lineage[name].fitness), abs=0.005)
    assert rows[0][3] == "ppl_token@512, fitness split"


def test_markdown_tells_the_chain_that_led_to_the_best(report, lineage):
    text = (report[0] / "report.md").read_text()
    path = lineage.ancestors_path(made_up_summary(lineage)["best"])
    assert len(path) > 2  # else this test says nothing
    assert re.findall(r"^\*\*(\S+)\*\*", text, re.MULTILINE) == [c.id for c in path]
    for parent, child in zip(path, path[1:], strict=False):
        edge = lineage.edge(parent.id, child.id)
        assert f"{child.fitness - parent.fitness:+.4f} ± {edge['effect_error']:.4f} nats" in text
        assert f"- Verdict: {edge['verdict']}" in text
    assert path[-1].algorithm.score in text and "# allocation: sdsa depth=0 m=0.3 tau=0.5" in text


def test_the_chain_goes_through_a_repaired_candidate(tmp_path):
    lineage, rng = made_up_lineage(0, 0), random.Random(0)
    broken = {"status": "invalid", "error": "name 'm9' is not defined", "hypothesis": "Columns matter."}
    lineage.add(Candidate("g1-c0", 1, "explore", **broken))
    algorithm = Algorithm("def score(W):\n    return W.abs()")
    fixed = {"algorithm": algorithm, "status": "evaluated", "evaluation": evaluation(4.0, rng)}
    lineage.add(Candidate("g1-c1", 1, "repair", ("g1-c0",), **fixed))
    write_report(tmp_path, lineage, made_up_summary(lineage))
    text = (tmp_path / "report.md").read_text()
    assert "**g1-c0** (explore)" in text and "nothing; invalid: name 'm9' is not defined" in text
    assert "**g1-c1** (repair of g1-c0)" in text


def test_the_models_words_cannot_act_as_markup(report):
    text = (report[0] / "report.md").read_text()
    assert "<b>" not in text and "[them](x)" not in text and "ignores *them*" not in text
    assert r"ignores \*them\*" in text


def test_the_best_algorithm_is_a_file_that_can_be_read_back(report, lineage):
    file, best = report[0] / "best.py", lineage.evaluated()[0]
    text, (algorithm, spread) = file.read_text(), read_score(file)
    assert algorithm.allocation == SDSA and algorithm.group == best.algorithm.group and spread
    for candidate in lineage.ancestors_path(best.id):
        assert f"#   {candidate.id} ({candidate.operator}" in text
    assert "\n#   wanda: " in text and "# Again: autoprune search" in text
    code = [line for line in text.splitlines() if not line.startswith("#")]
    assert code[0].startswith("def score("), "the model's words stay in comments"


def test_markdown_says_what_a_reader_must_know(report):
    text = (report[0] / "report.md").read_text()
    words = (
        "our reconstruction",
        "float32",
        "wikitext-2/test",
        "mask only",
        "standard error over 16 windows",
        "paired",
    )
    assert [word for word in words if word not in text] == []
    assert "autoprune search configs/demo.yaml" in text and "96 answers, 86 usable" in text


@pytest.mark.parametrize("change", ["only seeds", "no baseline", "no blocks"])
def test_small_searches_have_a_report_too(tmp_path, change):
    lineage = Lineage()
    shares = () if change == "no blocks" else (0.5, 0.7)
    algorithm = Algorithm("def score(W):\n    return W.abs()")
    measured = Evaluation(4.0, 511, (4.0,), shares)
    lineage.add(Candidate("seed-wanda", 0, "seed", (), algorithm, status="evaluated", evaluation=measured))
    lineage.add(Candidate("seed-wanda+sdsa", 0, "seed", (), algorithm, status="evaluated", evaluation=measured))
    summary = made_up_summary(lineage)
    if change == "no baseline":
        summary["table"] = []
    paths = write_report(tmp_path, lineage, summary)
    assert ("sparsity.png" in {path.name for path in paths}) == (change != "no blocks")
    assert ("sparsity.png" in (tmp_path / "report.md").read_text()) == (change != "no blocks")


def with_more(lineage, **more):
    costs = [0.3, *[0.02] * 28, 0.15]
    gain = {"rival": "wanda+sdsa", "nats": math.log(0.8), "error": 0.012, "windows": 128}
    return made_up_summary(lineage) | {"sensitivity": costs, "gain": gain, "gpu_seconds": 1234.5} | more


def test_the_first_sentence_says_what_was_gained_and_how_sure_that_is(lineage, tmp_path):
    texts = {}
    for name, gain in {
        "clear": {},
        "noise": {"gain": {"rival": "wanda", "nats": 0.01, "error": 0.02, "windows": 4}},
        "nobody": {"gain": {"rival": None}},
        "few": {"gain": {"rival": "wanda", "nats": -0.1, "error": 0.04, "windows": 2}},
        "more": {"gain": {"rival": "wanda", "nats": -0.1, "error": 0.04, "windows": 16}},
        "one window": {"gain": {"rival": "wanda", "nats": -0.1, "error": None, "windows": 1}},
        "the same": {"gain": {"rival": "wanda", "nats": 0.0, "error": 0.0, "windows": 4}, "best": "seed-wanda"},
    }.items():
        write_report(tmp_path / name, lineage, with_more(lineage, **gain))
        texts[name] = (tmp_path / name / "report.md").read_text()
    best = made_up_summary(lineage)["best"]
    assert f"**{best}** is **20.0% below wanda+sdsa**" in texts["clear"] and "128 windows).\n" in texts["clear"]
    assert "1.0% above wanda**" in texts["noise"] and "**That is within the noise.**" in texts["noise"]
    assert "On text that no search saw" not in texts["nobody"]
    assert "**That is within the noise.**" in texts["few"] and "noise" not in texts["more"].split("\n\n")[1]
    assert (
        "9.5% below wanda**" in texts["one window"] and "One window says nothing of the noise." in texts["one window"]
    )
    assert "No candidate was better than **wanda**" in texts["the same"]
    said = printed(lambda console: print_report(tmp_path / "clear", console))
    assert f"the perplexity of {best} is 20.0% below wanda+sdsa, the best" in " ".join(said.split())


@pytest.mark.parametrize("windows", [2, 4, 16, 128])
def test_the_bound_of_the_noise_is_passed_once_in_twenty(windows):
    """Of means that differ by chance alone."""
    found = np.random.default_rng(windows).normal(size=(20_000, windows))
    errors = found.std(axis=1, ddof=1) / math.sqrt(windows)
    passed = abs(found.mean(axis=1)) > [noise_bound(error, windows) for error in errors]
    assert passed.mean() == pytest.approx(0.05, abs=0.006)
    assert noise_bound(0.1, 1) == math.inf


def test_a_report_split_that_was_looked_at_again_says_so(lineage, tmp_path):
    write_report(tmp_path, lineage, with_more(lineage, looks=3))
    assert "The report split was looked at 3 times" in (tmp_path / "report.md").read_text()


def test_the_json_is_json_whatever_is_infinite(lineage, tmp_path):
    write_report(tmp_path, lineage, with_more(lineage, gpu_seconds=math.inf))
    assert json.loads((tmp_path / "report.json").read_text(), parse_constant=pytest.fail)["gpu_seconds"] is None


def test_the_band_about_the_best_is_two_paired_errors_of_its_gain(lineage):
    measured = lineage.evaluated()
    rival = min((c for c in measured if c.operator == "seed"), key=lambda c: c.fitness)
    best = min(measured, key=lambda c: c.fitness)
    gains = np.subtract(best.evaluation.window_nlls, rival.evaluation.window_nlls)
    error = gains.std(ddof=1) / math.sqrt(len(gains))
    low, high = gain_band(measured)[-1]
    assert low == pytest.approx(math.exp(best.fitness - 2 * error))
    assert high == pytest.approx(math.exp(best.fitness + 2 * error)) and high > low
    alone = perplexity(rival.fitness)
    assert gain_band([rival]) == [(alone, alone)], "a seed against itself"


def test_pictures_say_what_fitness_is_of_several_cases(lineage, tmp_path, monkeypatch):
    labels = []

    def look(figure):
        labels.extend(axes.get_ylabel() for axes in figure.axes)
        labels.extend(line.get_label() for axes in figure.axes for line in axes.get_lines())
        for axes in figure.axes:
            named = dict(zip((text.get_text() for text in axes.get_yticklabels()), axes.get_yticks(), strict=True))
            if "poison" in named:
                low, high = axes.get_ylim()
                assert {"screened", "surplus", "repeat"} <= set(named)
                assert all(low < height < high for height in named.values())
                labels.append("strip")
        return b""

    monkeypatch.setattr(plots, "_png", look)
    cases = {"cases": [{"name": "a to 50%", "report_nll": {"dense": 3.0}}]}
    cases |= {"config": {"seed": 0, "target": {"combine": "worst"}}}
    for more, measure in (
        ({}, "perplexity on"),
        (cases, "perplexity × dense, worst of all cases, window by window, on"),
    ):
        labels.clear()
        write_report(tmp_path, lineage, with_more(lineage, **more))
        assert labels.count(f"{measure} the fitness split (log scale)") == 2 and "strip" in labels
        assert {label.partition(" (")[0] for label in labels} >= {"dense", "wanda", "wanda+sdsa"}


def test_what_blocks_cost_and_what_was_refuted_is_told(lineage, tmp_path):
    paths = write_report(tmp_path, lineage, with_more(lineage))
    text = (tmp_path / "report.md").read_text()
    assert "sensitivity.png" in {path.name for path in paths} and "![What pruning each block costs]" in text
    assert "Pruned alone, these cost most: block 0 (+0.300 nats), block 29 (+0.150 nats)" in text
    shares = lineage.evaluated()[0].evaluation.block_sparsities
    assert f"Kept densest: block {min(range(30), key=shares.__getitem__)} (" in text
    edges = [lineage.edge(c.parents[0], c.id) for c in lineage if c.parents and c.operator != "tune"]
    refuted = [edge for edge in edges if edge["verdict"] == "refuted"]
    assert f"{len(refuted)} refuted" in text and f"{max(e['effect'] for e in refuted):+.4f}" in text
    assert "Invalid answers took 10.4% of the answers" in text and "Evaluators computed for 1,234 s" in text


class Page(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.words = [], ""
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.words += data


def test_the_page_holds_everything_and_reaches_for_nothing(lineage, tmp_path):
    write_report(tmp_path, lineage, with_more(lineage))
    page = Page((tmp_path / "report.html").read_text())
    pictures = [attributes["src"] for tag, attributes in page.tags if tag == "img"]
    assert len(pictures) == 4 and all(source.startswith("data:image/png;base64,") for source in pictures)
    # A picture of a formula refers to its own parts.
    addresses = [v for tag, a in page.tags for k, v in a.items() if k in ("src", "href", "xlink:href", "srcset")]
    assert all(address.startswith(("data:", "#")) for address in addresses)
    assert [a["aria-label"] for tag, a in page.tags if tag == "svg"][0].startswith("S_{ij} = ")
    assert "#ffffff" not in formula_svg("x^2").lower(), "it has to be read on a dark page, too"
    assert "best found" in page.words and "Kept densest" in page.words and "$" not in page.words
    assert not [tag for tag, _ in page.tags if tag in ("script", "iframe", "link", "object", "form")]


def test_what_a_model_wrote_is_text_on_the_page(tmp_path):
    lineage = made_up_lineage(3, 6)
    hostile = (
        "</p><script>alert(1)</script> <img src=x onerror=alert(1)> [a](javascript:alert(1)) $`x`$ ```math\u202e x"
    )
    for candidate in lineage:
        candidate.hypothesis = candidate.diagnosis = hostile
    write_report(tmp_path, lineage, with_more(lineage))
    page = Page((tmp_path / "report.html").read_text())
    assert "<script>alert(1)</script> <img src=x onerror=alert(1)>" in page.words and "[a](javascript:" in page.words
    assert "$`x`$" in page.words, "no formula of the model's" and "\u202e" not in page.words
    assert not [tag for tag, a in page.tags if tag in ("script", "a") or any(key.startswith("on") for key in a)]


def printed(action):
    console = Console(width=120, record=True, file=io.StringIO())
    action(console)
    return console.export_text()


def test_table_in_the_terminal(lineage):
    summary = made_up_summary(lineage)
    text = printed(lambda console: console.print(table(summary)))
    order = [text.index(f"{method} ") for method in ("dense", "wanda", "best found")]
    assert order == sorted(order)
    assert "22.20" in text and "pruned to 60%" in text


def test_the_table_loses_no_letter_of_a_long_name_and_takes_brackets_for_text(lineage):
    summary = made_up_summary(lineage) | {"target": "models [/old]/tiny"}
    summary["table"][1]["method"] = "wanda+sdsa:depth=0,m=0.54,tau=3.2,taylor=0.5625"
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(table(summary))
    text = console.export_text()
    assert "models [/old]/tiny pruned to 60%" in text and "…" not in text


def test_the_report_in_a_pipe_is_plain_and_as_json_what_the_file_holds(report, capsys):
    folder = report[0]
    (folder / "config.yaml").touch()
    assert main(["report", str(folder), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads((folder / "report.json").read_text())
    assert main(["report", str(folder)]) == 0
    assert "\x1b" not in capsys.readouterr().out


def test_colours_are_left_out_where_nobody_wants_them(report, monkeypatch):
    for no_colour, coloured in (("", True), ("1", False)):
        monkeypatch.setenv("NO_COLOR", no_colour)
        console = Console(file=io.StringIO(), force_terminal=True, color_system="standard")
        print_report(report[0], console)
        codes = re.findall(r"\x1b\[([\d;]+)m", console.file.getvalue())
        assert any(30 <= int(code) < 50 for one in codes for code in one.split(";")) == coloured


def test_print_report_says_where_everything_is(report, monkeypatch):
    folder = report[0]
    monkeypatch.chdir(folder.parent)
    text = printed(lambda console: print_report(folder, console))
    summary = json.loads((folder / "report.json").read_text())
    assert f"Best: {summary['best']}" in text and "1 h 06 min (3 min 20 s generating" in text
    assert f"Report: {folder / 'report.html'}\n" in text
    assert f"Model: {folder.parent}/runs/demo/[model]\n" in text
    assert "# allocation: sdsa" in text


def test_a_run_that_was_moved_names_its_own_model(report, tmp_path):
    moved = shutil.copytree(report[0], tmp_path / "moved")
    (moved / "model").mkdir()
    assert f"Model: {moved / 'model'}\n" in printed(lambda console: print_report(moved, console))


@pytest.mark.parametrize("content", [None, "{half"])
def test_a_run_without_a_readable_report_is_one_clear_line(tmp_path, content):
    if content:
        (tmp_path / "report.json").write_text(content)
    with pytest.raises(InputError, match="report.json") as caught:
        print_report(tmp_path, Console())
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)


def test_perplexity_of_a_broken_model_is_infinite_not_an_error():
    assert perplexity(1e6) == math.inf == perplexity(math.inf)
    assert perplexity(math.log(20)) == pytest.approx(20)
