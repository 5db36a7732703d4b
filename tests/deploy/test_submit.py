"""A search runs as a job of a Ray cluster that asks for a token, is stopped, submitted again, and ends as one that was
left alone. The cluster is a real one, on this machine, and apart from all others."""

import contextlib
import json
import os
import secrets
import signal
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from ports import free_port
from searches import (
    ROOT,
    brief,
    check_same_end,
    check_stopped,
    mlflow_run,
    no_process_of,
    processes_of,
    records,
    run,
    settings,
    wait_for,
    wait_for_answers,
)
from test_deploy import UPLOAD, packages

from autoprune.pipeline.config import Config, Generator, SearchPlan, difference

RUNTIME_ENV = Path("deploy/runtime_env.yaml")  # from the top of the checkout
RAY = str(Path(sys.executable).with_name("ray"))
HEADS = {"HF_TOKEN": secrets.token_hex(16), "OPENAI_API_KEY": secrets.token_hex(16)}  # of the cluster's head
SUBMITTERS = {"AWS_SECRET_ACCESS_KEY": secrets.token_hex(16)}  # of whoever submits, and nobody else's


@dataclass(frozen=True)
class Head:
    """A cluster of one machine. folder: what it writes. environment: of who may submit jobs."""

    url: str
    folder: Path
    token: str
    environment: dict[str, str]

    def get(self, path: str, token: str | None) -> tuple[int, str]:
        """Status and body of what the dashboard answers."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers), timeout=30) as answer:
                return answer.status, answer.read().decode()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode()

    def answers(self) -> bool:
        try:
            return self.get("/api/version", self.token)[0] == 200
        except OSError:  # nobody listens yet
            return False

    def jobs(self) -> dict[str, dict]:
        status, body = self.get("/api/jobs/", self.token)
        assert status == 200, body
        return {job["submission_id"]: job for job in json.loads(body)}

    def submit(self, name: str, entrypoint: list[str], runtime_env: Path = RUNTIME_ENV) -> list[str]:
        """The command that submits a job, and follows its log until it ends."""
        options = ["--address", self.url, "--submission-id", name, "--working-dir", "."]
        return [RAY, "job", "submit", *options, "--runtime-env", str(runtime_env), "--", *entrypoint]


@pytest.fixture
def head(tmp_path) -> Iterator[Head]:
    token = secrets.token_hex(32)
    (tmp_path / "token").write_text(token)
    port = free_port()
    # Short, since sockets lie in it.
    with tempfile.TemporaryDirectory(dir="/tmp", ignore_cleanup_errors=True) as folder:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
        environment |= {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(tmp_path / "token"), "RAY_TMPDIR": folder}
        options = {
            "temp-dir": folder,
            "dashboard-host": "127.0.0.1",
            "dashboard-port": port,
            "object-store-memory": 100_000_000,
            # Those that Ray would take otherwise may be another cluster's.
            "port": 0,
            "ray-client-server-port": free_port(),
            "dashboard-agent-listen-port": 0,
            "min-worker-port": 0,
            "max-worker-port": 0,
        }
        start = [RAY, "start", "--head", "--block", "--disable-usage-stats"]
        start += [f"--{name}={value}" for name, value in options.items()]
        log = tmp_path / "head.log"
        with log.open("w") as file:
            process = subprocess.Popen(
                start, cwd=tmp_path, env=environment | HEADS, stdout=file, stderr=file, start_new_session=True
            )
        found = Head(f"http://127.0.0.1:{port}", Path(folder), token, environment | SUBMITTERS)
        try:
            wait_for(found.answers, process, f"the dashboard does not answer; see {log}")
            yield found
        finally:
            process.terminate()  # it ends the others; `ray stop` would end every cluster of the machine
            no_process_of(found.folder)
            for pid in processes_of(found.folder):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            process.wait(30)


def files_with(value: str, *folders: Path) -> list[Path]:
    found = []
    for path in (path for folder in folders for path in folder.rglob("*") if path.is_file()):
        with contextlib.suppress(FileNotFoundError):  # Ray clears up
            found += [path] if value.encode() in path.read_bytes() else []
    return found


def check_upload(folder: Path) -> None:
    """What was carried to the cluster is the code, and little else."""
    names = {entry.name for entry in folder.iterdir()}
    assert {*packages(), "configs"} <= names
    assert not names & {".git", ".venv", "tests", "runs", "mlruns", "build"}
    assert not [name for name in names if name.endswith(".env")]
    sizes = [path.stat().st_size for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    assert sum(sizes) < UPLOAD


def test_a_job_that_is_stopped_and_submitted_again_ends_as_one_that_is_left_alone(head, whole, tiny_model, tmp_path):
    runs = tmp_path / "runs"
    folder = runs / "job"
    pairs = settings(f"runs={runs}", f"name={folder.name}", *brief(tiny_model))
    search = [sys.executable, "-m", "autoprune", "search", "configs/smoke.yaml", "--resume", "auto", *pairs]

    log = tmp_path / "first.log"
    with log.open("w") as file:
        first = subprocess.Popen(
            head.submit("first", search), cwd=ROOT, env=head.environment, stdout=file, stderr=subprocess.STDOUT
        )
    # Meanwhile, somebody without the token, and with a wrong one.
    stranger = head.environment | {"RAY_AUTH_MODE": "disabled"}
    refused = run(head.submit("refused", search), env=stranger)
    assert refused.returncode != 0 and "Missing authentication token" in refused.stderr
    assert head.get("/api/jobs/", None)[0] == 401
    assert head.get("/api/jobs/", "wrong")[0] == 403

    wait_for_answers(folder, 1, first)
    # The command to stop it takes longer to start than this search would go on: it finds the driver as it is now.
    driver = json.loads((folder / "status.json").read_text())["pid"]
    os.kill(driver, signal.SIGSTOP)
    (uploaded,) = head.folder.glob("session_2*/runtime_resources/working_dir_files/_ray_pkg_*/")
    check_upload(uploaded)
    workers = processes_of(head.folder, "ray::EvaluatorShard")
    assert workers
    assert {os.readlink(f"/proc/{pid}/cwd") for pid in (driver, *workers)} == {str(uploaded)}, "other code runs"
    has = Path(f"/proc/{driver}/environ").read_text()
    assert all(value in has for value in HEADS.values()), "credentials of the head are for its jobs"
    assert not any(value in has for value in SUBMITTERS.values())
    wait_for(lambda: "seed-wanda: fitness" in log.read_text(), first, "the log is not followed")
    stop = run([RAY, "job", "stop", "--address", head.url, "--no-wait", "first"], env=head.environment)
    os.kill(driver, signal.SIGCONT)
    assert stop.returncode == 0, stop.stderr
    first.wait(90)
    said = log.read_text()
    assert f"stopped by SIGTERM; go on with: autoprune search --resume {folder}" in said
    assert "Traceback" not in said
    assert head.jobs()["first"]["status"] == "STOPPED"
    assert files_with("Job first has been terminated gracefully", head.folder), "its time to end was too short"
    check_stopped(folder)
    assert records(folder, "evaluation")
    stopped = mlflow_run(folder).info
    assert stopped.status == "KILLED"
    assert no_process_of(runs) and no_process_of(head.folder, "ray::EvaluatorShard"), "a process outlived its job"

    # The checkout has changed meanwhile, so Ray unpacks it elsewhere.
    given = yaml.safe_load((ROOT / RUNTIME_ENV).read_text())
    changed = tmp_path / "runtime_env.yaml"
    changed.write_text(yaml.safe_dump(given | {"excludes": [*given["excludes"], "/docs"]}))
    second = run(head.submit("second", search, changed), env=head.environment)
    assert second.returncode == 0, second.stdout[-3000:]
    assert "best found" in second.stdout
    check_same_end(folder, whole())
    ended = mlflow_run(folder).info
    assert (ended.run_id, ended.status) == (stopped.run_id, "FINISHED")

    jobs = head.jobs()
    assert {name: job["status"] for name, job in jobs.items()} == {"first": "STOPPED", "second": "SUCCEEDED"}
    assert all(job["runtime_env"]["env_vars"] == given["env_vars"] for job in jobs.values())
    assert len({job["runtime_env"]["working_dir"] for job in jobs.values()}) == 2
    assert files_with("--resume auto", head.folder), "no log of a job was found"
    for secret in (head.token, *HEADS.values(), *SUBMITTERS.values()):
        assert not files_with(secret, head.folder, runs)
        assert secret not in json.dumps(jobs) + said + second.stdout + second.stderr


def test_a_file_that_came_with_a_job_is_the_same_in_the_next_one():
    first, moved, other = (
        Config(
            generator=Generator(kind="scripted", answers=f"/tmp/{place}.txt"),
            search=SearchPlan(seeds=("wanda", f"wanda+/tmp/{place}.py@layer")),
        )
        for place in ("a/_ray_pkg_0a1b/configs/answers", "b/c/_ray_pkg_2c3d/configs/answers", "a/_ray_pkg_0a1b/others")
    )
    assert difference(first, moved) == []
    found = difference(first, other)
    assert len(found) == 2 and found[0] == "generator.answers: 'configs/answers.txt' → 'others.txt'"
