"""The main job on real models: vLLM writes under the grammar, Ray prunes SmolLM2, MLflow shows it, vLLM serves it.

One search (the fixture `walk`) is looked at from every side: its table, its lineage in MLflow, its checkpoint.
"""

import json
import math
import os
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from ports import free_port
from searches import command, no_process_of, run, search_command

from autoprune.actors.generator import OpenAIGenerator
from autoprune.actors.messages import Request
from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.answers import parse_answer
from autoprune.algorithms.grammar import answer_grammar
from autoprune.algorithms.probe import probe
from autoprune.models.errors import InputError
from autoprune.pipeline.lineage import Lineage

SMALL = [
    "data.context=128",
    "data.calibration_windows=8",
    "data.fitness_windows=3",
    "data.report_windows=4",
    "search.cheap_windows=1",
    "search.fresh_windows=2",
    "search.tuning=2",
]


@pytest.fixture(scope="module")
def walk(tmp_path_factory) -> Path:
    """Two generations of two candidates, written by SmolLM2 for itself: real engine, real evaluators, little text."""
    runs = tmp_path_factory.mktemp("runs")
    settings = [
        *SMALL,
        "name=walk",
        "generator.model=smollm2-135m-instruct",
        "generator.max_model_len=3072",
        "search.seeds=[magnitude, wanda, wanda+owl, wanda+sdsa]",
        "search.generations=2",
        "search.candidates=2",
        "search.prompts=2",
        "search.answers=6",
        "search.elites=1",
        "search.rounds=1",
    ]
    done = run(search_command("demo.yaml", runs, *settings), env=os.environ | {"AUTOPRUNE_TEST": str(runs)})
    assert done.returncode == 0, done.stderr[-2000:]
    assert no_process_of(runs), "a process outlived the search"
    folder = runs / "walk"
    (folder / "stdout.txt").write_text(done.stdout)
    return folder


def test_the_run_folder_holds_everything(walk):
    names = {entry.name for entry in walk.iterdir()}
    expected = {
        "config.yaml",
        "journal.jsonl",
        "checkpoint",
        "lineage.json",
        "report.md",
        "report.html",
        "sensitivity.png",
        "report.json",
        "best.py",
        "model",
    }
    assert expected <= names
    summary = json.loads((walk / "report.json").read_text())
    methods = [row["method"] for row in summary["table"]]
    assert methods == ["dense", "magnitude", "wanda", "wanda+owl", "wanda+sdsa", "best found"]
    counts = summary["counts"]
    assert counts["answers"] >= 12, "of a broken answer there is a second one"
    kinds = ("invalid", "repeated", "screened", "surplus", "evaluated", "failed")
    assert sum(counts[kind] for kind in kinds) == counts["answers"], "an answer was not accounted for"
    assert counts["usable"] >= 0.9 * counts["answers"], "the grammar lets through what cannot be used"
    assert summary["tokens"]["completion"] > 0
    assert summary["seconds"]["generating"] > 0 and summary["seconds"]["evaluating"] > 0
    rows = {row["method"]: row for row in summary["table"]}
    # Not always the lowest: the fresh text has a say.
    assert rows["best found"]["fitness_nll"] < rows["magnitude"]["fitness_nll"]
    assert rows["dense"]["report_nll"] < rows["best found"]["report_nll"]
    assert "best found" in (walk / "stdout.txt").read_text()


def test_mlflow_holds_the_lineage(walk):
    from mlflow import MlflowClient

    client = MlflowClient(f"sqlite:///{walk.parent / 'mlflow.db'}")
    experiment = client.get_experiment_by_name("autoprune/smollm2-135m-instruct@60%")
    runs = client.search_runs([experiment.experiment_id], max_results=200)
    children = {r.info.run_name: r for r in runs if "mlflow.parentRunId" in r.data.tags}
    lineage = Lineage.from_dict(json.loads((walk / "lineage.json").read_text()))
    assert set(children) == {c.id for c in lineage.evaluated()}
    for candidate in lineage.evaluated():
        child = children[candidate.id]
        assert child.data.metrics["fitness_nll"] == pytest.approx(candidate.fitness)
        assert child.data.tags.get("autoprune.parents", "") == ",".join(candidate.parents)
        assert "algorithm.py" in {file.path for file in client.list_artifacts(child.info.run_id)}
    (parent,) = [r for r in runs if "mlflow.parentRunId" not in r.data.tags]
    assert parent.info.status == "FINISHED"
    assert len(client.get_metric_history(parent.info.run_id, "best_fitness_nll")) == 3


def test_the_mlflow_ui_leads_to_a_candidates_thought(walk, browser, tmp_path):
    """A person's way in a real browser: experiment, the search's run, its children, the page among its artifacts, a
    click on a candidate there."""
    summary = json.loads((walk / "report.json").read_text())
    lineage = Lineage.from_dict(json.loads((walk / "lineage.json").read_text()))
    port = free_port()
    with open(tmp_path / "ui.log", "w") as log:
        command = [*shlex.split(summary["mlflow"]), "--port", str(port)]
        server = subprocess.Popen(command, stdout=log, stderr=log, start_new_session=True)
    page = browser.new_page(viewport={"width": 1500, "height": 950})
    page.set_default_timeout(120_000)  # MLflow's own script is large
    try:
        deadline = time.monotonic() + 120
        while True:
            try:
                page.goto(f"http://127.0.0.1:{port}/#/experiments")
                break
            except Exception:
                assert server.poll() is None and time.monotonic() < deadline, (tmp_path / "ui.log").read_text()
                time.sleep(0.5)
        page.get_by_text("Model training").first.click()  # of MLflow's two views the one with runs
        page.get_by_role("link", name="autoprune/smollm2-135m-instruct@60%").first.click()
        page.get_by_role("link", name="walk", exact=True).first.click()
        page.get_by_text("Child runs").first.wait_for()
        best, child = lineage.best(), next(c for c in lineage.evaluated() if c.operator != "seed")
        page.get_by_role("link", name=child.id).first.wait_for()
        assert page.url.endswith(summary["mlflow_run"].partition("#")[2])
        page.get_by_role("tab", name="Artifacts").or_(page.get_by_role("link", name="Artifacts")).first.click()
        page.get_by_text("lineage.html").first.click()
        frame = page.locator("iframe").first.element_handle().content_frame()
        frame.wait_for_function("window.lineage && window.lineage.frames().count > 0")
        assert best.id in frame.inner_text("h2")
        x, y = frame.evaluate("id => window.lineage.position(id)", child.id)
        box = page.locator("iframe").first.bounding_box()
        page.mouse.click(box["x"] + x, box["y"] + y)
        frame.get_by_role("heading", name=child.id).wait_for()
        words = " ".join(child.hypothesis.split())
        assert words[:60] in " ".join(frame.inner_text("body").split())
    finally:
        page.close()
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def test_the_checkpoint_loads_and_measures_as_the_search_said(walk):
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(walk / "model", dtype=torch.bfloat16)
    sidecar = json.loads((walk / "model" / "autoprune.json").read_text())
    modules = dict(model.named_modules())
    for name, entry in sidecar["layers"].items():
        zeros = int((modules[name].weight == 0).sum())
        assert zeros >= entry["pruned"], f"{name} has fewer zeros than the sidecar says"
        assert zeros <= entry["pruned"] + 0.001 * entry["numel"], f"{name} has more zeros than were pruned"
    assert sidecar["sparsity"]["achieved"] == pytest.approx(0.6, abs=1 / 576)
    # Every scored row loses floor(s·in): below the target by less than one weight per comparison group.
    assert sidecar["sparsity"]["achieved"] <= 0.6

    summary = json.loads((walk / "report.json").read_text())
    said = next(row["report_nll"] for row in summary["table"] if row["method"] == "best found")
    data = summary["config"]["data"]
    arguments = ["--corpus", data["report"], "--context", data["context"], "--windows", data["report_windows"]]
    dtype = summary["config"]["target"]["dtype"]
    done = run(command("evaluate", "--model", walk / "model", *arguments, "--dtype", dtype, "--json"))
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout)
    assert measured["perplexity"] == pytest.approx(math.exp(said), rel=1e-3)
    assert measured["nll"] == pytest.approx(said, rel=1e-5)


def test_vllm_serves_the_checkpoint_to_the_openai_generator(walk):
    """The pruned model behind vLLM's own server answers under the grammar; a wrong model or port is one clear line."""
    port = free_port()
    url = f"http://127.0.0.1:{port}/v1"
    with pytest.raises(InputError, match="no answer from"):
        OpenAIGenerator(url, "pruned")
    vllm = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(walk / "model")]
    options = ["--served-model-name", "pruned", "--port", str(port), "--host", "127.0.0.1", "--max-model-len", "2048"]
    log = (walk / "server.log").open("w")
    server = subprocess.Popen(
        [*vllm, *options, "--enforce-eager"],
        stdout=log,
        stderr=subprocess.STDOUT,
        env=os.environ | {"VLLM_CPU_KVCACHE_SPACE": "1"},
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 300
        while True:
            try:
                generator = OpenAIGenerator(url, "pruned")
                break
            except InputError:
                assert server.poll() is None, (walk / "server.log").read_text()[-2000:]
                assert time.monotonic() < deadline, "the server did not start"
                time.sleep(1)
        with pytest.raises(InputError, match="serves pruned"):
            OpenAIGenerator(url, "prunde")
        request = Request((("user", "Write a pruning algorithm."),), 4, 0.9, 400, answer_grammar())
        (answers,) = generator.generate([request])
        assert generator.grammar, "the server refused the grammar"
        assert len(answers) == 4
        finished = [answer for answer in answers if answer.finish_reason == "stop"]
        for answer in finished:
            assert isinstance(parse_answer(answer.text).algorithm, Algorithm)
            probe(parse_answer(answer.text).algorithm, 0.6)
        assert finished
        generator.stop()
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(60)
