"""Evaluators, the generator, whole nodes and the driver are killed while a search runs: it ends as one that was left
alone. AUTOPRUNE_KILLS says how often, and without it nothing runs; `make chaos` kills 30 times, and the driver alone 20
times."""

import itertools
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
from tiny import save_chat_model

KILLS = int(os.environ.get("AUTOPRUNE_KILLS", "0"))
DRIVER = Path(__file__).parent / "driver.py"
pytestmark = pytest.mark.skipif(not KILLS, reason="make chaos")


@pytest.fixture(scope="module")
def nodes():
    """A cluster of three small nodes, in a folder of its own so that nothing else finds it."""
    from ray.cluster_utils import Cluster

    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        before = os.environ.get("RAY_TMPDIR")
        os.environ["RAY_TMPDIR"] = folder
        cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
        extra = [cluster.add_node(num_cpus=1) for _ in range(2)]
        yield cluster, extra
        cluster.shutdown()
        os.environ.pop("RAY_TMPDIR")
        os.environ |= {} if before is None else {"RAY_TMPDIR": before}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return save_chat_model(tmp_path_factory.mktemp("models") / "tiny")


def start(cluster, folder: Path, model: Path) -> subprocess.Popen:
    command = [sys.executable, str(DRIVER), cluster.address, str(folder), str(model)]
    with open(folder.parent / "driver.err", "a") as errors:
        return subprocess.Popen(command, stderr=errors, start_new_session=True)


def pids(name: str) -> list[int]:
    """Of Ray's actors whose class begins so, of this cluster's."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            ours = os.environ["RAY_TMPDIR"].encode() in (entry / "environ").read_bytes()
            if ours and (entry / "cmdline").read_bytes().startswith(f"ray::{name}".encode()):
                found.append(int(entry.name))
        except OSError:
            continue
    return sorted(found)


def records(folder: Path) -> int:
    journal = folder / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


def lineage(folder: Path) -> bytes:
    return (folder / "lineage.json").read_bytes()


def finish(driver: subprocess.Popen, folder: Path, limit: float = 600) -> None:
    assert driver.wait(limit) == 0, (folder.parent / "driver.err").read_text()[-3000:]
    assert (folder / "done").exists()


@pytest.fixture(scope="module")
def whole(nodes, model, tmp_path_factory) -> Path:
    """The search, left alone."""
    folder, began = tmp_path_factory.mktemp("whole") / "run", time.monotonic()
    finish(start(nodes[0], folder, model), folder)
    (folder.parent / "seconds").write_text(str(time.monotonic() - began))
    statuses = [c["status"] for c in json.loads(lineage(folder))["candidates"]]
    assert statuses.count("poison") >= 3 and statuses.count("evaluated") >= 10 and "repeat" in statuses
    assert not pids("Chaotic") and not pids("Scripted"), "an actor outlived its driver"
    return folder


def kill(victim: str, rng: random.Random, nodes, driver, folder, model):
    """Returns the driver that runs afterwards."""
    cluster, extra = nodes
    if victim == "driver":
        os.killpg(driver.pid, signal.SIGKILL)
        driver.wait()
        return start(cluster, folder, model)
    if victim == "node":
        cluster.remove_node(extra.pop(rng.randrange(len(extra))), allow_graceful=False)
        extra.append(cluster.add_node(num_cpus=1))
        return driver
    deadline, name = time.monotonic() + 300, "Chaotic" if victim == "evaluator" else "Scripted"
    while time.monotonic() < deadline:
        try:
            os.kill(rng.choice(pids(name)), signal.SIGKILL)
            return driver
        except (IndexError, ProcessLookupError):  # it is being made anew, which takes long where all are
            time.sleep(0.1)
    raise AssertionError(f"no {name} came back within 300 s")


def check(folder: Path, whole: Path) -> None:
    assert lineage(folder) == lineage(whole)
    lines = [json.loads(line)["record"] for line in (folder / "journal.jsonl").read_text().splitlines()]
    measured = [(r["key"], r["split"]) for r in lines if r["kind"] == "evaluation"]
    asked = [(r["generation"], r["round"], r["what"]) for r in lines if r["kind"] == "answers"]
    assert len(set(measured)) == len(measured), "something was measured twice and counted twice"
    assert len(set(asked)) == len(asked)
    deadline = time.monotonic() + 30
    while pids("Chaotic") + pids("Scripted") and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not pids("Chaotic") + pids("Scripted"), "a process outlived the search"


def test_whatever_is_killed_the_search_ends_as_if_nothing_had_been(nodes, model, whole, tmp_path):
    rng, folder, total = random.Random(0), tmp_path / "run", records(whole)
    victims = itertools.cycle(["evaluator", "generator", "evaluator", "driver", "evaluator", "node", "evaluator"])
    points = sorted(rng.sample(range(1, total - 1), min(KILLS, total - 2)))
    driver, done = start(nodes[0], folder, model), 0
    for point in points:
        while records(folder) < point and driver.poll() is None:
            time.sleep(0.02)
        assert driver.poll() is None, (tmp_path / "driver.err").read_text()[-3000:]
        driver = kill(next(victims), rng, nodes, driver, folder, model)
        done += 1
    assert done == KILLS, "the search has too few records for so many"
    finish(driver, folder)
    check(folder, whole)


@pytest.mark.skipif(KILLS < 30, reason="make chaos")
def test_a_driver_that_is_killed_at_any_moment_goes_on(nodes, model, whole, tmp_path):
    rng, folder = random.Random(1), tmp_path / "run"
    # While actors start, and while they work, on slow machines too.
    span = max(25.0, float((whole.parent / "seconds").read_text()) / 5)
    driver = start(nodes[0], folder, model)
    for _ in range(20):
        time.sleep(rng.uniform(1.0, span))
        if driver.poll() is not None:
            finish(driver, folder)
            (folder / "done").unlink()
            driver = start(nodes[0], folder, model)
        driver = kill("driver", rng, nodes, driver, folder, model)
    finish(driver, folder)
    check(folder, whole)
