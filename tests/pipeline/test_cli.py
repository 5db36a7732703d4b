"""Bad input: one clear line, exit code 2, nothing half-written. Good input: prune, evaluate and models for real."""

import fcntl
import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from rich.console import Console
from safetensors import safe_open
from searches import command, run

from autoprune.actors.metrics import GAUGES, TAGS
from autoprune.models.errors import InputError
from autoprune.pipeline.cli import main
from autoprune.pipeline.config import load_config
from autoprune.pipeline.config_reading import setting
from autoprune.pipeline.launch import cluster
from autoprune.pipeline.ledger import Spent
from autoprune.pipeline.progress import ConsoleProgress
from autoprune.pipeline.run_folder import locked
from autoprune.pipeline.status import Status

DOCUMENT = "The quick brown fox jumps over the lazy dog while the sun goes down behind the hills. " * 4


@pytest.fixture
def text(tmp_path) -> Path:
    file = tmp_path / "text.txt"
    file.write_text("\n\n".join(f"{number}. {DOCUMENT}" for number in range(12)))
    return file


@pytest.fixture
def config(tmp_path, tiny_model, text) -> Path:
    """A search that would run: on a tiny model, a local text and scripted answers."""
    answers = tmp_path / "answers.txt"
    answers.write_text("def score(W, x_norm):\n    return W.abs() * x_norm.sqrt()\n")
    settings = {
        "name": "run",
        "runs": str(tmp_path / "runs"),
        "target": {"model": str(tiny_model)},
        "generator": {"kind": "scripted", "answers": str(answers)},
        "data": {
            "context": 32,
            "calibration": f"{text}[0:4]",
            "fitness": f"{text}[4:8]",
            "report": f"{text}[8:12]",
        },
    }
    file = tmp_path / "search.yaml"
    file.write_text(yaml.safe_dump(settings))
    return file


def refused(capsys, *arguments: object) -> str:
    """The one line that a refused command prints."""
    assert main([str(argument) for argument in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    (line,) = captured.err.strip().splitlines()
    assert line.startswith("autoprune: ")
    return line


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("target.model=smollm2-135m-instrukt", "smollm2-135m-instruct"),
        ("target.model=/no/such/folder", "/no/such/folder"),
        ("generator.kind=vllm generator.model=qwen2.5-coder-1.5b", "qwen2.5-coder-1.5b-instruct"),
        ("data.fitness=wikipedia-sampel[0:3]", "wikipedia-sample"),
        ("data.fitness=/no/such/text.txt", "/no/such/text.txt"),
        ("target.sparsity=0", "between 0 and 1"),
        ("target.sparsity=1.5", "between 0 and 1"),
        ("target.sparcity=0.5", "did you mean target.sparsity?"),
        ("serch.generations=2", "did you mean search?"),
        ("search.generations=many", "whole number"),
        ("search.adapt=5", "search.adapt is 5: expected true or false"),
        ("evaluators.wait=.inf", "evaluators.wait is inf: expected a number that is finite"),
        ("search.operators.mutate=.nan", "search.operators.mutate is nan"),
        ("name=", "name is empty"),
        ("seed=-1", "seed is -1: expected 0 or more"),
        ("search.seeds=[wnada]", "wanda"),
        ("search.seeds=[wanda+sdas]", "sdsa"),
        ("data.context=4096", "expected 2 to 128"),
        ("evaluators.shards=9", "at most 4"),
        ("evaluators.gpus_per_shard=2", "expected a part of a GPU, such as 0.5, or 1; more shards use more"),
        ("generator.gpus_per_engine=1.5", "such as 0.5, or whole ones"),
        ("generator.kind=openai generator.base_url=http://127.0.0.1:9/v1", "no answer from http://127.0.0.1:9/v1"),
        ("generator.answers=/no/answers.txt", "/no/answers.txt"),
        ("name=a/b", "without slashes"),
        ("storage=s3://key:hidden@bucket/runs", "storage holds a password"),
        ("tracking.uri=http://user:hidden@host:5000", "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD"),
        ("generator.kind=openai generator.base_url=http://user:hidden@host/v1", "set OPENAI_API_KEY instead"),
        ("runs=/proc/nowhere", "/proc/nowhere"),
        ("tracking.uri=postgres://nowhere", "postgres://nowhere"),
    ],
)
def test_search_refuses_in_one_line_and_writes_nothing(capsys, config, tmp_path, setting, expected):
    sets = [part for pair in setting.split(" ") for part in ("--set", pair)]
    assert expected in refused(capsys, "search", config, *sets)
    assert not (tmp_path / "runs" / "run").exists(), "a refused search left a run folder"


def test_overlapping_splits_are_refused(capsys, config, text):
    assert "overlaps" in refused(capsys, "search", config, "--set", f"data.report={text}[6:9]")


def test_a_text_shorter_than_one_window_is_refused(capsys, config, tmp_path, tiny_model):
    short = tmp_path / "short.txt"
    short.write_text("Too short.")
    assert "tokens" in refused(capsys, "search", config, "--set", f"data.report={short}")
    assert "tokens" in refused(capsys, "evaluate", "--model", tiny_model, "--corpus", short, "--context", 64)


def test_a_configuration_that_cannot_be_read_is_refused(capsys, tmp_path):
    assert "cannot read" in refused(capsys, "search", tmp_path / "none.yaml")
    broken = tmp_path / "broken.yaml"
    broken.write_text("target: {sparsity: 0.6\nseed: 0\n")
    assert "is not YAML" in refused(capsys, "search", broken)
    assert "CONFIG.yaml" in refused(capsys, "search")


def test_a_cluster_that_is_not_there_is_said_at_once_and_leaves_no_run_folder(config, tmp_path):
    """In a process of its own: one that is connected already, as this one may be, asks no other cluster."""
    done = run(command("search", config), env=os.environ | {"RAY_ADDRESS": "127.0.0.1:9"}, timeout=60)
    line = "autoprune: no Ray cluster at 127.0.0.1:9 (RAY_ADDRESS): start it, or unset RAY_ADDRESS"
    assert (done.returncode, done.stderr.strip()) == (1, line)
    assert not (tmp_path / "runs" / "run").exists()


@pytest.mark.parametrize(
    ("address", "build", "visible"), [("", None, ""), ("", "13.0", "0"), ("ray://host:1", None, "0")]
)
def test_gpus_that_this_torch_cannot_use_are_not_counted(monkeypatch, address, build, visible):
    """Ray counts what a machine has, and the environment of `make setup` computes on CPUs."""
    seen = []
    monkeypatch.setattr("ray.is_initialized", lambda: False)
    monkeypatch.setattr("ray.init", lambda **_: seen.append(os.environ["CUDA_VISIBLE_DEVICES"]))
    monkeypatch.setattr("ray.shutdown", lambda: None)
    monkeypatch.setattr("socket.create_connection", lambda *_: socket.socket())
    monkeypatch.setattr("torch.version.cuda", build)
    monkeypatch.setattr("autoprune.pipeline.launch.distributions", lambda name: [])
    monkeypatch.setenv("RAY_ADDRESS", address)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with cluster():
        pass
    assert seen == [visible]


def test_a_disk_without_room_for_what_evaluators_keep_is_said_before_anything_starts(capsys, config, monkeypatch):
    def opened(*_):
        raise InputError("there is room")

    disk = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: disk._replace(free=50_300_000))  # the model has 0.2 MB
    monkeypatch.setattr("autoprune.pipeline.launch.open_folder", opened)
    assert "there is room" in refused(capsys, "search", config, "--set", "search.statistics=[x_norm]")
    gradients = refused(capsys, "search", config, "--set", "search.statistics=[x_norm, g_rms]")
    assert "50 MB free and 50 MB are needed: free some space" in gradients


@pytest.mark.parametrize("name", ["2026-05-01", "70", "yes", "llama #2", "llama: 60%", "it's", 'a "b"', "plain"])
def test_a_runs_name_stays_a_text_whatever_yaml_would_read(tmp_path, name):
    (tmp_path / "config.yaml").write_text("name: other\n")
    again = [setting("name", name), setting("runs", str(tmp_path / name))]
    config = load_config(tmp_path / "config.yaml", again)
    assert (config.name, config.runs) == (name, str(tmp_path / name))
    assert setting("name", "plain") == "name=plain"


def test_a_damaged_run_is_refused_before_anything_starts(capsys, config, tmp_path):
    assert "no run" in refused(capsys, "search", config, "--resume", tmp_path / "runs" / "run")
    folder = tmp_path / "runs" / "run"
    checkpoint = folder / "checkpoint" / "generation-0001"
    checkpoint.mkdir(parents=True)
    resolved = yaml.safe_load(config.read_text())
    (folder / "config.yaml").write_text(yaml.safe_dump(resolved))
    (checkpoint / "manifest.json").write_text('{"schema_ver')
    assert "journal.jsonl is empty, and there are checkpoints" in refused(capsys, "search", "--resume", folder)
    changed = refused(capsys, "search", config, "--resume", folder, "--set", "target.sparsity=0.5")
    assert "target.sparsity: 0.6 → 0.5" in changed and "evaluators.replicas" in changed
    freely = ("--set", "evaluators.replicas=2", "--set", "budgets.calls=7", "--set", "generator.engines=2")
    assert "journal.jsonl is empty, and there are checkpoints" in refused(
        capsys, "search", config, "--resume", "auto", *freely
    )
    with locked(folder):
        assert "another process is searching" in refused(capsys, "search", "--resume", folder)
    with open(folder / "lock") as file:  # as `autoprune status` does, to see whether a search runs
        fcntl.flock(file, fcntl.LOCK_SH)
        threading.Timer(0.2, fcntl.flock, (file, fcntl.LOCK_UN)).start()
        with locked(folder):
            pass
    assert "exists" in refused(capsys, "search", config)
    assert "report.json" in refused(capsys, "report", folder)
    (checkpoint / "manifest.json").unlink()
    checkpoint.rmdir()
    (folder / "journal.jsonl").write_text('{"sha256":"0","record":{}}\n')
    assert "line 1 is damaged" in refused(capsys, "search", "--resume", folder)


def test_a_configuration_of_another_command_is_refused(capsys):
    configs = Path(__file__).parents[2] / "configs"
    assert "of `autoprune compare`: it has models" in refused(capsys, "search", configs / "compare.yaml")
    assert "of `autoprune search`: it has target" in refused(capsys, "compare", configs / "demo.yaml")
    assert "unknown configuration key target" in refused(
        capsys, "compare", configs / "compare.yaml", "--set", "target=x,model=y"
    )
    assert "--gpu-memory is nan" in refused(capsys, "plan", configs / "demo.yaml", "--gpu-memory", "nan")


def test_prune_refuses_bad_input_and_leaves_nothing(capsys, tmp_path, tiny_model, text):
    out = tmp_path / "out"
    base = ["prune", "--model", tiny_model, "--calibration", text, "--context", 32, "--out", out]
    assert "between 0 and 1" in refused(capsys, *base, "--sparsity", 60)
    assert "sdsa" in refused(capsys, *base, "--sparsity", 0.6, "--allocation", "sdas")
    assert "wanda" in refused(capsys, *base, "--sparsity", 0.6, "--score", "wandda")
    hostile = tmp_path / "hostile.py"
    hostile.write_text("import os\ndef score(W):\n    os.system('touch /tmp/x')\n    return W\n")
    assert "one of them or each once" in refused(capsys, *base, "--sparsity", 0.6, "--score", hostile)
    flat = tmp_path / "flat.py"
    flat.write_text("def score(W):\n    return W.abs() * 0\n")
    assert "cannot be used" in refused(capsys, *base, "--sparsity", 0.6, "--score", flat)
    assert "windows is 0" in refused(capsys, *base, "--sparsity", 0.6, "--windows", 0)
    for ending in ("+owl", "/cg"):
        assert "it takes --allocation owl" in refused(capsys, *base, "--sparsity", 0.6, "--score", f"{flat}{ending}")
    assert "is a file" in refused(capsys, *base[:-1], flat, "--sparsity", 0.6)
    assert "no --sparsity" in refused(capsys, *base)
    assert "2:4 means 0.5" in refused(capsys, *base, "--sparsity", 0.6, "--group", "2:4")
    assert "unknown comparison group 'colum'" in refused(capsys, *base, "--sparsity", 0.6, "--group", "colum")
    assert "none, sparsegpt, cg" in refused(capsys, *base, "--sparsity", 0.6, "--update", "gc")
    for allocation, reason in (
        ("sdsa:tua=1", "did you mean 'tau'"),
        ("sdsa:tau=x", "cannot read the parameters"),
        ("sdsa@head", "expected @layer"),
        ("explicit:0.5,0.6", "4"),
        ("explicit:0.5,0.6,0.7,1.8", "1.8"),
    ):
        assert reason in refused(capsys, *base, "--sparsity", 0.6, "--allocation", allocation), allocation
    file = tmp_path / "file"
    file.write_text("")
    blocked = [*base[:-1], file / "out"]
    assert "cannot write" in refused(capsys, *blocked, "--sparsity", 0.6)
    taken = [*base[:-1], tmp_path]
    assert "not empty" in refused(capsys, *taken, "--sparsity", 0.6)
    assert not out.exists()
    assert not list(tmp_path.glob(".out-*"))


def test_a_full_disk_is_one_line(capsys, tmp_path, tiny_model, text, config):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", disk], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("may not mount a small file system here")
    try:
        arguments = ["--calibration", text, "--context", 32, "--sparsity", 0.6, "--out", disk / "out"]
        assert "MB free" in refused(capsys, "prune", "--model", tiny_model, *arguments)
        assert "MB free" in refused(capsys, "search", config, "--set", f"runs={disk}")
        assert list(disk.iterdir()) == []
    finally:
        subprocess.run(["umount", disk], check=True)


def test_prune_then_evaluate(capsys, tmp_path, tiny_model, text):
    """A pruned folder says what was pruned, layer by layer, and measures differently from the dense one."""
    out = tmp_path / "pruned"
    common = ["--context", "32"]
    how = ["--score", "wanda", "--allocation", "uniform", "--sparsity", "0.6", "--calibration", f"{text}[0:6]"]
    assert main(["prune", "--model", str(tiny_model), *how, "--out", str(out), *common]) == 0
    sidecar = json.loads((out / "autoprune.json").read_text())
    assert sidecar["algorithm"]["group"] == "row"
    assert (out / "model.safetensors").stat().st_mode & 0o777 == 0o644
    assert {layer["pruned"] / layer["numel"] for layer in sidecar["layers"].values()} <= {19 / 32, 48 / 80}
    capsys.readouterr()
    nlls = []
    for model in (tiny_model, out):
        assert main(["evaluate", "--model", str(model), "--corpus", f"{text}[6:]", "--json", *common]) == 0
        nlls.append(json.loads(capsys.readouterr().out)["nll"])
    assert nlls[0] != nlls[1]
    one = ["evaluate", "--model", str(out), "--corpus", str(text), "--windows", "1", "--reference", str(tiny_model)]
    printed = shown(capsys, *one, *common)
    assert "31 tokens in one window: no standard error, float32" in printed and "±" not in printed


def test_a_pattern_is_kept_unless_another_allocation_is_asked_for(capsys, tmp_path, tiny_model, text):
    common = ["prune", "--model", str(tiny_model), "--calibration", f"{text}[0:6]", "--context", "32", "--group", "2:4"]
    assert main([*common, "--out", str(tmp_path / "a")]) == 0
    assert "of every 4" not in capsys.readouterr().out
    with safe_open(tmp_path / "a" / "model.safetensors", "pt") as file:
        weight = file.get_tensor("model.layers.0.mlp.down_proj.weight")
    assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()
    assert main([*common, "--out", str(tmp_path / "b"), "--allocation", "explicit:0.25,0.5,0.5,0.75"]) == 0
    printed = capsys.readouterr().out
    assert "of every 4 weights are kept: 1 in 7 layers, 2 in 14 layers, 3 in 7 layers" in printed


def test_a_score_named_as_compare_names_it(capsys, tmp_path, tiny_model, text):
    how = ["--model", str(tiny_model), "--calibration", str(text), "--context", "32", "--sparsity", "0.5"]
    assert main(["prune", *how, "--score", "wanda/cg+owl:lam=0.05", "--out", str(tmp_path / "a")]) == 0
    algorithm = json.loads((tmp_path / "a" / "autoprune.json").read_text())["algorithm"]
    assert algorithm["update"] == "cg" and algorithm["allocation"]["name"] == "owl"
    capsys.readouterr()
    twice = ["--score", "wanda/cg", "--update", "none", "--out", tmp_path / "b"]
    assert "say the same thing twice" in refused(capsys, "prune", *how, *twice)


def test_prune_with_every_option(capsys, tmp_path, tiny_model, text):
    out = tmp_path / "pruned"
    how = ["--score", "sparsegpt", "--update", "cg", "--group", "2:4", "--allocation", "sdsa@layer:tau=0.3,m=0.9"]
    more = ["--sequential", "--offload", "--calibration", f"{text}[0:6]", "--context", "32", "--out", str(out)]
    assert main(["prune", "--model", str(tiny_model), *how, *more]) == 0
    sidecar = json.loads((out / "autoprune.json").read_text())
    assert sidecar["algorithm"]["allocation"]["parameters"] == {"tau": 0.3, "m": 0.9, "depth": 0.5}
    assert len({layer["sparsity"] for layer in sidecar["layers"].values()}) > 1  # n differs by layer
    assert {layer["sparsity"] for layer in sidecar["layers"].values()} <= {0.0, 0.25, 0.5, 0.75, 1.0}
    assert sidecar["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.05)
    capsys.readouterr()
    options = ["--corpus", f"{text}[6:]", "--context", "32", "--reference", str(tiny_model), "--json"]
    assert main(["evaluate", "--model", str(out), *options]) == 0
    resident = json.loads(capsys.readouterr().out)
    assert resident["kl"] > 0 and resident["reference"] == str(tiny_model)
    assert main(["evaluate", "--model", str(out), "--offload", *options]) == 0
    assert json.loads(capsys.readouterr().out) == resident


def test_an_explicit_list_of_sparsities(tmp_path, tiny_model, text):
    out = tmp_path / "pruned"
    how = ["--allocation", "explicit:0.3,0.5,0.5,0.7", "--sparsity", "0.5", "--calibration", str(text)]
    assert main(["prune", "--model", str(tiny_model), *how, "--context", "32", "--out", str(out)]) == 0
    planned = json.loads((out / "autoprune.json").read_text())["sparsity"]["planned"]
    assert [block[0] for block in planned] == pytest.approx([0.3, 0.5, 0.5, 0.7])


def test_a_score_of_ones_own(capsys, tmp_path, tiny_model, text):
    """A file with Wanda written by hand prunes exactly as the built-in Wanda does."""
    own = tmp_path / "own.py"
    own.write_text("import torch\n\ndef score(W, x_norm):\n    mine = torch.abs(W)\n    return mine * x_norm\n")
    pruned = []
    for name, score in (("a", "wanda"), ("b", str(own))):
        arguments = ["prune", "--model", str(tiny_model), "--score", score, "--allocation", "uniform"]
        more = ["--sparsity", "0.5", "--calibration", str(text), "--context", "32", "--out", str(tmp_path / name)]
        assert main([*arguments, *more]) == 0
        pruned.append((tmp_path / name / "model.safetensors").read_bytes())
    assert pruned[0] == pruned[1]


def test_models_list_names_what_is_bundled(capsys):
    assert main(["models", "list"]) == 0
    printed = capsys.readouterr().out
    for name in ("smollm2-135m-instruct", "qwen2.5-coder-1.5b-instruct", "wikipedia-sample"):
        assert name in printed
    assert "no bundled model" in refused(capsys, "models", "fetch", "smollm")


def test_check_says_what_a_source_is_and_costs(capsys, tmp_path, monkeypatch):
    file = tmp_path / "score.py"
    file.write_text("import torch\ndef score(W, x_std, x_norm):\n    a = x_norm * torch.abs(W)\n    return a / 2\n")
    assert main(["check", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == ["def score(W, x_norm):", "    v0 = W.abs() * x_norm", "    return v0 / 2.0"]
    assert lines[3:5] == ["reads: W, x_norm", "cost: 3.0 operations per weight; 2.0 matrices of W's size at a time"]
    assert re.fullmatch(r"masks by row: [0-9a-f]{16}\nmasks by matrix: [0-9a-f]{16}", "\n".join(lines[5:7]))
    assert lines[7:] == ["group: row", "allocation: not in the file, so that of --allocation"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(file.read_text()))
    assert main(["check", "-"]) == 0 and capsys.readouterr().out.splitlines() == lines
    file.write_text("def allocate(profile, sparsity):\n    return 1 + profile.skewness\n")
    assert main(["check", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[:3] == [
        "def allocate(profile, sparsity):", "    return profile.skewness + 1.0", "reads: skewness, sparsity"
    ]  # fmt: skip
    assert re.fullmatch(r"retentions: [0-9a-f]{16}", lines[3]) and len(lines) == 4
    for source, reason in (
        ("def score(W):\n    return W.nump()", "line 2, column 12: 'nump' is not in the language"),
        ("def score(W):\n    return W.sum(dim=1)", "expected float32"),
        ("def score(W):\n    return W * 0", "nothing is ranked"),
        ("# allocation: sdsaa tau=1\ndef score(W):\n    return W", "unknown allocation 'sdsaa': expected"),
    ):
        file.write_text(source)
        assert reason in refused(capsys, "check", file)
    assert "sparsity is 2" in refused(capsys, "check", file, "--sparsity", "2")


def test_an_algorithm_of_one_s_own(capsys, tmp_path, tiny_model, text):
    """Score and allocation from one file, or the allocation from another."""
    file, other = tmp_path / "own.py", tmp_path / "other.py"
    allocation = "def allocate(profile, sparsity):\n    return {}\n"
    file.write_text("def score(W):\n    return W.abs()\n" + allocation.format("4 - profile.depth"))
    other.write_text(allocation.format("1 + profile.depth"))
    common = ["prune", "--model", str(tiny_model), "--calibration", str(text), "--context", "32", "--sparsity", "0.5"]

    def planned(name, *options):
        assert main([*common, "--score", str(file), *options, "--out", str(tmp_path / name)]) == 0
        return [
            block[0] for block in json.loads((tmp_path / name / "autoprune.json").read_text())["sparsity"]["planned"]
        ]

    first = planned("a")
    assert first == sorted(first) and first[0] < first[-1]
    second = planned("c", "--allocation", f"{other}@layer")
    assert second == sorted(second, reverse=True) and second[0] > second[-1]
    assert planned("d", "--allocation", "uniform") == [0.5] * len(first)
    capsys.readouterr()
    assert "holds no `def score(W, …):`" in refused(capsys, *common, "--score", other, "--out", tmp_path / "e")
    bad = ["--score", "wanda", "--allocation", f"{file}:tau=1", "--out", tmp_path / "e"]
    assert "write them into" in refused(capsys, *common, *bad)


def test_status_says_how_far_a_search_is(capsys, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").touch()
    assert "has no status.json" in refused(capsys, "status", folder)
    console = ConsoleProgress()
    told = []
    status = Status(folder, console, lambda: [[2, 1], [0, 3]], lambda: 4, told.append)
    spent = dict.fromkeys(Spent.__dataclass_fields__, 0) | {"answers": 7, "completion_tokens": 90, "generating": 3.0}
    spent |= {"evaluations": 3, "cheap": 5, "evaluating": 16.0}
    facts = {"generation": 2, "generations": 9, "candidates": 31, "best": {"id": "g01-c02", "nll": 4.0}, "spent": spent}
    with locked(folder):
        assert json.loads(shown(capsys, "status", folder, "--json"))["state"] == "running", "before anything was done"
        status._written = 0.0
        status.step("evaluating (fitness)", 3, 8)
        status.step("evaluating (fitness)", 4, 8)  # too soon to be written
        found = json.loads(shown(capsys, "status", folder, "--json"))
        assert found["state"] == "running" and found["doing"] == {"what": "evaluating (fitness)", "done": 3, "total": 8}
        assert "generation" not in found and not told
        status.state(facts | {"left": {"calls": 40.0, "tokens": None}})  # written at once, and nothing is under way
        found = json.loads(shown(capsys, "status", folder, "--json"))
        assert found["generation"] == 2 and "doing" not in found and len(told) == 1
        status._written = 0.0
        status.step("evaluating (fitness)", 5, 8)
        text = shown(capsys, "status", folder)
        for part in ("generation 2 of 9, 31 candidates", "5 of 8",
                     "best on the fitness split so far g01-c02: fitness 4.0000, perplexity 54.60",
                     "replica 1: 0 3 candidates in flight", "4 evaluators were made anew", "30 tokens/s, 1800 eval",
                     "left: 40 calls", "running, last heard of 0 s ago"):  # fmt: skip
            assert part in text
        assert told[0]["in_flight"] == {"0": 2, "1": 4} and told[0]["budget_left"] == {"calls": 40.0}
        assert told[0]["best_fitness_nats"] == 4.0 and set(told[0]) == set(GAUGES)
        assert {name for name, value in told[0].items() if isinstance(value, dict)} == set(TAGS)
        console.console = Console(file=io.StringIO(), force_terminal=True, width=200)
        status.step("evaluating (fitness)", 5, 8)
        status.step("evaluating (fitness)", 8, 8)  # the bar goes
        drawn = console.console.file.getvalue()
        for part in ("evaluating (fitness)", "8/8", "in flight 2+4", "generation 2/9", "best 54.60", "30 tok/s",
                     "1800 evaluations/h", "left 40 calls"):  # fmt: skip
            assert part in drawn
        status.step("evaluating (report)", 1, 8)
        console.end()
        assert console.console.file.getvalue().endswith("\x1b[?25h\r\x1b[1A\x1b[2K"), "the cursor is seen again"
    text = shown(capsys, "status", folder)
    assert "gone, last heard" in text and "in flight" not in text
    status.state({"best": {"id": "g01-c01", "nll": 0.5, "combined": "worst", "final": True}})
    status.end("stopped")
    text = shown(capsys, "status", folder)
    assert "stopped, last heard" in text and "in flight" not in text
    assert told[-1]["in_flight"] == {"0": 0, "1": 0}
    assert "best, after fresh text, g01-c01: fitness 0.5000, 1.65 × dense, worst of all cases, window by window" in text


def shown(capsys, *arguments: object) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out
