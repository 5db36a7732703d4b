"""The tracker against real MLflow: a database, and a server started with the tracker's own command."""

import json
import logging
import os
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
import urllib.request
from dataclasses import replace

import pytest
from ports import free_port

import autoprune
from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.models.errors import InputError
from autoprune.pipeline.lineage import Candidate, Lineage
from autoprune.pipeline.tracking import MlflowTracker, flatten
from autoprune.pipeline.tracking_context import MOST_SAMPLES, source_tags
from autoprune.pipeline.wording import algorithm_text

ALGORITHM = Algorithm("def score(W, x_norm):\n    return W.abs() * x_norm", "row", Allocation("sdsa", {"tau": 0.5}))
MEASURED = Evaluation(5.0, 1022, (4.9, 5.1), (0.5, 0.7), sparsity=0.6, seconds=2.5)
CONFIG = {"search": {"seed": 7, "operators": ["mutate"]}, "target": {"model": "smollm2"}, "long": "x" * 9000}


def small_lineage():
    """A seed, a child that is better, one that failed, one invalid and one repeat."""
    lineage = Lineage()
    thought = {"diagnosis": "Block 0 hurts.", "hypothesis": "A root is softer.", "prompt": "the prompt"}
    given = {"algorithm": ALGORITHM, "mask_hash": "00ff", "mask": "00ff", "answer": "the answer"}
    lineage.add(Candidate("seed-wanda", 0, "seed", (), ALGORITHM, status="evaluated", evaluation=MEASURED))
    child = Candidate("g1-c0", 1, "mutate", ("seed-wanda",), **given, **thought, status="evaluated")
    child.evaluation = replace(MEASURED, nll=4.8, window_nlls=(4.69, 4.91))
    lineage.add(child)
    lineage.add(Candidate("g1-c1", 1, "tune", ("seed-wanda",), **given, status="failed", error="NaN"))
    lineage.add(Candidate("g1-c2", 1, "tune", ("seed-wanda",), status="invalid", error="not a function"))
    lineage.add(Candidate("g1-c3", 1, "tune", ("seed-wanda",), **given, status="repeat", repeats="g1-c0"))
    return lineage


def track(tracker, lineage):
    for candidate in lineage:
        tracker.candidate(candidate, [lineage.edge(parent, candidate.id) for parent in candidate.parents])


@pytest.fixture(scope="session")
def first_use(tmp_path_factory):
    """A whole run in a process of its own, with a new database: its folder, and how the process ended."""
    folder = tmp_path_factory.mktemp("first")
    code = (
        "import logging, sys; from pathlib import Path; from autoprune.pipeline.tracking import MlflowTracker\n"
        "logging.basicConfig(level=logging.INFO); folder = Path(sys.argv[1])\n"
        "tracker = MlflowTracker(f'sqlite:///{folder}/new/mlflow.db', 'first use', 'run', folder)\n"
        "tracker.start({}); tracker.finish('FINISHED', {}, [])\n"
    )
    return folder, subprocess.run([sys.executable, "-c", code, str(folder)], capture_output=True, text=True)


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    """A store that failed is tried again at the next call."""
    monkeypatch.setattr("autoprune.pipeline.tracking.PAUSE", 0.0)


def test_a_store_that_fails_is_left_alone_for_a_while(uri, tmp_path, monkeypatch):
    tracker = started(uri, tmp_path)
    monkeypatch.setattr("autoprune.pipeline.tracking.PAUSE", 60.0)
    tried = []

    def away(*_, **__):
        tried.append(1)
        raise OSError("no route")

    with monkeypatch.context() as broken:
        broken.setattr(tracker._client, "log_batch", away)
        for generation in range(5):
            tracker.generation(generation, {"best_fitness_nll": 5.0})
        assert len(tried) == 1, "each try may take a time-out"
    tracker.finish("FINISHED", {}, [])
    client, parent, _ = store(uri)
    assert len(client.get_metric_history(parent.info.run_id, "best_fitness_nll")) == 5
    assert parent.info.status == "FINISHED"


def test_what_a_store_missed_is_written_bit_by_bit(uri, tmp_path, monkeypatch):
    tracker = started(uri, tmp_path)
    with monkeypatch.context() as broken:
        broken.setattr(tracker._client, "log_batch", lambda *_, **__: 1 / 0)
        for generation in range(10):
            tracker.generation(generation, {"best_fitness_nll": 5.0})
    monkeypatch.setattr("autoprune.pipeline.tracking.CATCHING_UP", 0.0)
    left = len(tracker._pending)
    tracker.generation(10, {"best_fitness_nll": 4.0})
    assert len(tracker._pending) == left, "each of its two calls was made, and no other"
    tracker.finish("FINISHED", {}, [])
    client, parent, _ = store(uri)
    assert len(client.get_metric_history(parent.info.run_id, "best_fitness_nll")) == 11


@pytest.fixture
def uri(first_use, tmp_path):
    """A database of the test's own: copied, since making MLflow's tables takes seconds."""
    shutil.copy(first_use[0] / "new" / "mlflow.db", tmp_path)
    return f"sqlite:///{tmp_path / 'mlflow.db'}"


TEXTS = {"fitness": ("prose[0:4]", "ab" * 32), "report": ("prose[4:8]", "cd" * 32)}


def started(uri, tmp_path, config=CONFIG):
    tracker = MlflowTracker(uri, "demo", "first", tmp_path / "run")
    tracker.start(config, TEXTS, ["org/tiny 2.5-model"])
    return tracker


def store(uri):
    """MLflow's own client: the parent run, and the child runs by name."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    runs = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    (parent,) = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == parent.info.run_id]
    assert len({run.info.run_name for run in children}) == len(children) == len(runs) - 1
    return client, parent, {run.info.run_name: run for run in children}


def artifact(client, run, name):
    return open(client.download_artifacts(run.info.run_id, name)).read()


def test_a_search_is_one_parent_with_a_child_for_each_measured_candidate(uri, tmp_path):
    report = tmp_path / "report.md"
    report.write_text("# found")
    lineage, tracker = small_lineage(), started(uri, tmp_path)
    track(tracker, lineage)
    for generation in range(3):
        tracker.generation(
            generation, {"best_fitness_nll": 5.0 - generation / 10, "invalid": 1, "nothing": float("inf")}
        )
    tracker.finish("FINISHED", {"best_nll": 4.8}, [report])

    client, parent, children = store(uri)
    assert (parent.info.run_name, parent.info.status) == ("first", "FINISHED")
    assert parent.data.params["search.seed"] == "7" and parent.data.params["search.operators"] == '["mutate"]'
    assert len(parent.data.params["long"]) == 500
    assert parent.data.metrics["best_nll"] == 4.8 and "nothing" not in parent.data.metrics
    counts = {name: parent.data.metrics[f"candidates_{name}"] for name in ("evaluated", "failed", "invalid", "repeat")}
    assert counts == {"evaluated": 2, "failed": 1, "invalid": 1, "repeat": 1}
    history = client.get_metric_history(parent.info.run_id, "best_fitness_nll")
    assert [(m.step, m.value) for m in history] == [(0, 5.0), (1, 4.9), (2, 4.8)]
    assert artifact(client, parent, "report.md") == "# found"

    assert set(children) == {"seed-wanda", "g1-c0", "g1-c1"}
    child = children["g1-c0"]
    metrics = {"fitness_nll": 4.8, "fitness_perplexity": 121.5104, "sparsity": 0.6, "evaluation_seconds": 2.5}
    assert child.data.metrics == pytest.approx(metrics | {"delta_nll": -0.2}, abs=1e-4)
    tags = {k.removeprefix("autoprune."): v for k, v in child.data.tags.items() if k.startswith("autoprune.")}
    assert tags == {
        "candidate": "g1-c0",
        "parents": "seed-wanda",
        "generation": "1",
        "operator": "mutate",
        "status": "evaluated",
        "verdict": lineage.edge("seed-wanda", "g1-c0")["verdict"],
        "mask_hash": "00ff",
        "code_hash": ALGORITHM.key,
        "group": "row",
        "allocation": "sdsa tau=0.5",
    }
    assert tags["verdict"] == "confirmed"
    described = child.data.tags["mlflow.note.content"]
    assert described == f"```text\nA root is softer.\n```\n\n```python\n{algorithm_text(ALGORITHM).rstrip()}\n```"
    assert (child.info.status, children["g1-c1"].info.status) == ("FINISHED", "FAILED")
    assert child.info.end_time - child.info.start_time == 2500
    source = artifact(client, child, "algorithm.py")
    assert source == "# group: row\n# allocation: sdsa tau=0.5\n" + ALGORITHM.score + "\n"
    thought = artifact(client, child, "thought.md")
    assert all(text in thought for text in ("Block 0 hurts.", "A root is softer.", "confirmed"))
    assert (
        artifact(client, child, "prompt.txt") == "the prompt" and artifact(client, child, "answer.txt") == "the answer"
    )
    assert {f.path for f in client.list_artifacts(children["seed-wanda"].info.run_id)} == {"algorithm.py", "thought.md"}
    assert (tmp_path / "mlartifacts" / child.info.run_id).is_dir()  # beside the database


def test_a_description_cannot_leave_its_fence(uri, tmp_path):
    claim = "```` <img src=x onerror=alert(1)>"
    described = started(uri, tmp_path)._description(Candidate("c", 0, "mutate", (), hypothesis=claim))
    assert described == f"`````text\n{claim}\n`````"


def test_a_resumed_search_goes_on_in_the_same_runs(uri, tmp_path):
    lineage, first = small_lineage(), started(uri, tmp_path)
    track(first, lineage)
    first.finish("KILLED", {}, [])
    assert store(uri)[1].info.status == "KILLED"

    second = started(uri, tmp_path, CONFIG | {"target": {"model": "another"}, "new": 1})
    assert store(uri)[1].info.status == "RUNNING"
    track(second, lineage)
    second.finish("FINISHED", {}, [])
    client, parent, children = store(uri)
    inputs = client.get_run(parent.info.run_id).inputs
    assert len(inputs.dataset_inputs) == 2 and len(inputs.model_inputs) == 1
    assert parent.info.run_id == json.loads((tmp_path / "run" / "mlflow.json").read_text())["run_id"]
    assert set(children) == {"seed-wanda", "g1-c0", "g1-c1"}
    assert parent.data.params["target.model"] == "smollm2" and parent.data.params["new"] == "1"


def test_metrics_that_a_store_missed_are_written_when_the_run_is_resumed_and_no_others(uri, tmp_path):
    first = started(uri, tmp_path)
    first.generation(0, {"best_fitness_nll": 5.0})
    first.finish("KILLED", {}, [])
    second = started(uri, tmp_path)
    for generation in range(3):
        second.generation(generation, {"best_fitness_nll": 5.0 - generation})
    client, parent, _ = store(uri)
    history = client.get_metric_history(parent.info.run_id, "best_fitness_nll")
    assert [(m.step, m.value) for m in history] == [(0, 5.0), (1, 4.0), (2, 3.0)]


def test_a_run_is_resumed_without_its_store_which_catches_up(uri, tmp_path, caplog):
    """As a job is that is tried again while the server is away; a new run has nobody to write for."""
    lineage, first = small_lineage(), started(uri, tmp_path)
    first.candidate(lineage["seed-wanda"], [])
    first.generation(0, {"best_fitness_nll": 5.0})
    other = sqlite3.connect(tmp_path / "mlflow.db")
    other.execute("ALTER TABLE experiments RENAME TO away")
    second = started(uri, tmp_path, CONFIG | {"new": 1})
    assert "no such table" in caplog.text and caplog.text.count("\n") == 1
    track(second, lineage)
    second.generation(0, {"best_fitness_nll": 5.0})
    with pytest.raises(InputError, match="start the server"):
        MlflowTracker(uri, "demo", "new", tmp_path / "new").start(CONFIG)
    other.execute("ALTER TABLE away RENAME TO experiments")
    other.close()
    second.generation(1, {"best_fitness_nll": 4.0})
    second.finish("FINISHED", {}, [])
    client, parent, children = store(uri)
    assert set(children) == {"seed-wanda", "g1-c0", "g1-c1"} and parent.data.params["new"] == "1"
    assert parent.info.status == "FINISHED"
    history = client.get_metric_history(parent.info.run_id, "best_fitness_nll")
    assert sorted((m.step, m.value) for m in history) == [(0, 5.0), (1, 4.0)]


def test_code_texts_models_and_the_machine_are_told(uri, tmp_path, monkeypatch):
    monkeypatch.setattr("autoprune.pipeline.tracking_context.PERIOD", 0.05)
    tracker = started(uri, tmp_path)
    time.sleep(1.0)
    for generation in range(2):
        tracker.generation(generation, {"best_fitness_nll": 5.0})
    tracker.finish("FINISHED", {}, [])
    client, parent, _ = store(uri)
    tags = parent.data.tags
    assert (tags["autoprune.kind"], tags["autoprune.version"]) == ("search", autoprune.__version__)
    assert len(tags["autoprune.lock"]) == 16
    told = {one.tags[0].value: (one.dataset.name, one.dataset.digest) for one in parent.inputs.dataset_inputs}
    assert told == {"fitness": ("prose[0:4]", "ab" * 16), "report": ("prose[4:8]", "cd" * 16)}
    (model,) = client.get_run(parent.info.run_id).inputs.model_inputs
    assert client.get_logged_model(model.model_id).tags["autoprune.model"] == "org/tiny 2.5-model"
    history = client.get_metric_history(parent.info.run_id, "system/cpu_utilization_percentage")
    assert 2 <= len(history) <= 3 * MOST_SAMPLES and len({m.timestamp for m in history}) == len(history)


def test_a_child_that_a_kill_cut_off_is_completed_and_not_made_again(uri, tmp_path):
    """Of many candidates, what an earlier sitting left is found in one look."""
    lineage, first = small_lineage(), started(uri, tmp_path)
    first.candidate(lineage["seed-wanda"], [])
    cut_off = first._client.create_run(
        first._experiment_id,
        run_name="g1-c0",
        tags={"mlflow.parentRunId": first._run_id, "autoprune.candidate": "g1-c0"},
    )
    second = started(uri, tmp_path)
    track(second, lineage)
    client, _, children = store(uri)
    assert set(children) == {"seed-wanda", "g1-c0", "g1-c1"}
    assert children["g1-c0"].info.run_id == cut_off.info.run_id and children["g1-c0"].info.status == "FINISHED"
    assert artifact(client, children["g1-c0"], "prompt.txt") == "the prompt"


def test_what_fails_is_kept_and_written_later(uri, tmp_path, caplog):
    """The artifact folder is gone for a while: child runs are made, and cannot be completed."""
    lineage, tracker = small_lineage(), started(uri, tmp_path)
    artifacts = tmp_path / "mlartifacts"
    assert not artifacts.exists()
    artifacts.write_text("a file where the folder should be")
    with caplog.at_level(logging.WARNING, logger="autoprune"):
        track(tracker, lineage)
        tracker.generation(0, {"best_fitness_nll": 5.0})
        assert store(uri)[1].data.metrics == {"best_fitness_nll": 5.0}  # it does not wait behind what cannot work
        assert {run.info.status for run in store(uri)[2].values()} == {"RUNNING"}
        artifacts.unlink()
        tracker.finish("FINISHED", {}, [])
    assert len(caplog.records) == 1 and "\n" not in caplog.records[0].getMessage()
    client, parent, children = store(uri)
    assert {name: run.info.status for name, run in children.items()} == {
        "seed-wanda": "FINISHED",
        "g1-c0": "FINISHED",
        "g1-c1": "FAILED",
    }
    assert artifact(client, children["g1-c0"], "prompt.txt") == "the prompt"
    assert children["g1-c0"].data.metrics["fitness_nll"] == 4.8 and parent.info.status == "FINISHED"


def test_a_database_in_trouble_does_not_stop_the_search(uri, tmp_path, caplog):
    """A table is away for a while, which fails as a locked database does, without its wait of 20 seconds."""
    tracker = started(uri, tmp_path)
    other = sqlite3.connect(tmp_path / "mlflow.db")
    other.execute("ALTER TABLE metrics RENAME TO away")
    tracker.generation(0, {"best_fitness_nll": 5.0})
    assert "no such table" in caplog.text and caplog.text.count("\n") == 1
    other.execute("ALTER TABLE away RENAME TO metrics")
    other.close()
    tracker.generation(1, {"best_fitness_nll": 4.0})
    client, parent, _ = store(uri)
    history = client.get_metric_history(parent.info.run_id, "best_fitness_nll")
    assert sorted((m.step, m.value) for m in history) == [(0, 5.0), (1, 4.0)]


def test_what_is_still_missing_at_the_end_is_said(uri, tmp_path, caplog):
    tracker = started(uri, tmp_path)
    tracker.finish("FINISHED", {}, [tmp_path / "not there"])
    assert "misses 1 records; the run folder has them all" in caplog.text


@pytest.mark.parametrize("bad", ["runs/mlflow.db", "sqlite:///relative.db", "htp://host:1"])
def test_an_unusable_address_is_one_clear_line(bad, tmp_path):
    with pytest.raises(InputError, match="expected sqlite:////absolute") as caught:
        MlflowTracker(bad, "demo", "run", tmp_path)
    assert "\n" not in str(caught.value) and bad in str(caught.value)


def test_a_file_that_is_no_database_is_one_clear_line(tmp_path):
    (tmp_path / "mlflow.db").write_text("this is not a database, and long enough to be seen as such" * 20)
    with pytest.raises(InputError, match="not a database.*default") as caught:
        MlflowTracker(f"sqlite:///{tmp_path / 'mlflow.db'}", "demo", "run", tmp_path)
    assert "\n" not in str(caught.value)


def test_a_server_that_is_not_there_is_said_at_once(tmp_path):
    before = time.monotonic()
    with pytest.raises(InputError, match="start the server") as caught:
        started(f"http://127.0.0.1:{free_port()}", tmp_path)
    assert time.monotonic() - before < 5 and "\n" not in str(caught.value)


def test_a_deleted_experiment_is_one_clear_line(uri, tmp_path):
    started(uri, tmp_path)
    client, parent, _ = store(uri)
    client.delete_experiment(parent.info.experiment_id)
    with pytest.raises(InputError, match="'demo' was deleted; restore it or choose another name"):
        started(uri, tmp_path)


def test_flatten():
    config = {"a": {"b": {"c": 1}, "d": None}, "e": [1, 2], "f": {}, "g": "text", "h": "y" * 501}
    expected = {"a.b.c": "1", "a.d": "null", "e": "[1, 2]", "f": "{}", "g": "text", "h": "y" * 499 + "…"}
    assert flatten(config) == expected


def test_nothing_is_printed(first_use):
    """The terminal belongs to the search: no table migrations, no emoji, no links."""
    done = first_use[1]
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def wait_for(url, process, seconds=120):
    for _ in range(seconds * 5):
        try:
            return urllib.request.urlopen(url, timeout=5).read()
        except OSError:
            assert process.poll() is None, "the server ended"
            time.sleep(0.2)
    raise AssertionError(f"no answer from {url}")


def test_the_ui_command_shows_runs_and_artifacts_and_its_server_can_be_the_store(uri, tmp_path, caplog):
    """A server that is killed in the middle and started again has every candidate once."""
    lineage, tracker = small_lineage(), started(uri, tmp_path)
    track(tracker, lineage)
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    command = [*shlex.split(tracker.ui_command), "--port", str(port)]
    servers = []

    def serve():
        with open(tmp_path / "server.log", "a") as log:
            servers.append(subprocess.Popen(command, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True))
        # Its first answer from the database takes longest.
        wait_for(f"{address}/api/2.0/mlflow/experiments/get-by-name?experiment_name=demo", servers[-1])

    def kill():
        os.killpg(servers[-1].pid, signal.SIGKILL)
        servers[-1].wait()

    def children():
        runs = client.search_runs([client.get_experiment_by_name("remote").experiment_id])
        return sorted(run.info.run_name for run in runs if "mlflow.parentRunId" in run.data.tags)

    serve()
    try:
        assert b"<html" in urllib.request.urlopen(address).read()
        client, parent, own = store(address)  # over the REST API
        assert set(own) == {"seed-wanda", "g1-c0", "g1-c1"}
        fetched = f"{address}/get-artifact?path=algorithm.py&run_uuid={own['g1-c0'].info.run_id}"
        assert ALGORITHM.score.encode() in urllib.request.urlopen(fetched).read()

        remote = MlflowTracker(address, "remote", "second", tmp_path / "second")
        remote.start(CONFIG)
        remote.candidate(lineage["seed-wanda"], [])
        kill()
        before = time.monotonic()
        track(remote, lineage)
        remote.generation(0, {"best_fitness_nll": 5.0})
        assert time.monotonic() - before < 10, "the search must not wait for it"
        assert caplog.text.count("kept, to be tried again") == 1
        serve()
        assert children() == ["seed-wanda"]
        remote.generation(1, {"best_fitness_nll": 4.8})
        assert children() == ["g1-c0", "g1-c1", "seed-wanda"]
        track(remote, lineage)  # as a resumed search does
        assert children() == ["g1-c0", "g1-c1", "seed-wanda"]
        (child,) = [
            run
            for run in client.search_runs([client.get_experiment_by_name("remote").experiment_id])
            if run.info.run_name == "g1-c0"
        ]
        assert artifact(client, child, "answer.txt") == "the answer" and child.data.metrics["fitness_nll"] == 4.8
        history = client.get_metric_history(remote._run_id, "best_fitness_nll")
        assert sorted((m.step, m.value) for m in history) == [(0, 5.0), (1, 4.8)]
        assert shlex.split(remote.ui_command)[-1] == address
    finally:
        kill()
    before = time.monotonic()
    remote.generation(2, {"best_fitness_nll": 5.0})
    remote.finish("FINISHED", {}, [])
    assert time.monotonic() - before < 5
    assert re.search("misses [2-4] records", caplog.text), "and perhaps what was seen of the machine"


def test_the_git_state_is_that_of_a_checkout_and_of_nobody_elses_repository(tmp_path, monkeypatch):
    subprocess.run(["git", "init", "--quiet", str(tmp_path)], check=True)
    within = tmp_path / "site-packages"
    within.mkdir()
    for root, told in ((tmp_path, True), (within, False)):
        monkeypatch.setattr("autoprune.pipeline.tracking_context.ROOT", root)
        assert ("autoprune.git_dirty" in source_tags()) == told
