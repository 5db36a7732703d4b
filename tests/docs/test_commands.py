"""Every command of the pages is run, in this process and on small models and texts; or it says on its line what it
needs, and is read as far as it can be; or another test, which is named here, runs it."""

import ast
import json
import re
import shlex
import shutil
from pathlib import Path

import pytest
from json_server import JsonHandler, served
from pages import COMMAND, EXECUTED, FILTER, ROOT, Command, blocks, commands
from place import Place, PoolHere

from autoprune.actors.pool import EvaluatorPool
from autoprune.pipeline import plots
from autoprune.pipeline.cli import _parser, main
from autoprune.pipeline.comparison import load_comparison
from autoprune.pipeline.config import load_config

# Commands that other tests run, or that run all tests.
ELSEWHERE = {
    "make setup": "tests/test_package.py::test_an_editable_install_works_beside_kernels",
    "make demo": "tests/test_walk.py::test_the_run_folder_holds_everything",
    "make test": "tests/docs/test_commands.py::test_a_command_is_run_or_says_why_not",
    "make chaos": "tests/chaos/test_chaos.py::test_whatever_is_killed_the_search_ends_as_if_nothing_had_been",
}
ALL = [command for page in EXECUTED for command in commands(page)]
RUN = [c for c in ALL if re.match(r"(\.venv/bin/)?autoprune ", c.text) and not c.needs]
SETS = [c for c in ALL if c.text.startswith("--set")]
FILTERS = [c for c in ALL if FILTER.fullmatch(c.text)]
MARKED = [c for c in ALL if c.needs]
BLOCKS = [block for page in EXECUTED for block in blocks(page)]
# This one is run as it is, and all other searches without Ray's actors (see `PoolHere`) and without drawing pictures.
WHOLE = next(c for c in RUN if "search " in c.text)
OWN = {"autoprune.actors.pool.EvaluatorPool": EvaluatorPool, "autoprune.pipeline.plots._png": plots._png}
SHORTER = {"autoprune.actors.pool.EvaluatorPool": PoolHere, "autoprune.pipeline.plots._png": lambda figure: b""}


class Server(JsonHandler):
    """OpenAI-compatible, with one model called NAME that answers from a file."""

    def do_GET(self):
        self.answer({"object": "list", "data": [{"id": "NAME", "object": "model"}]})

    def do_POST(self):
        asked = self.body()
        texts = (ROOT / "configs" / "smoke_answers.txt").read_text().split("\n---\n")
        choices = [
            {"index": n, "message": {"role": "assistant", "content": texts[n]}, "finish_reason": "stop"}
            for n in range(asked["n"])
        ]
        usage = {"prompt_tokens": 7, "completion_tokens": 4, "total_tokens": 11}
        self.answer({"id": "1", "object": "chat.completion", "choices": choices, "usage": usage})


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_model, cluster):
    """With what the pages' commands find: files that they show, pruned models, and runs."""
    with served(Server) as url, pytest.MonkeyPatch.context() as patch:
        place = Place(tmp_path_factory.mktemp("pages"), tiny_model, url)
        patch.chdir(place.folder)
        for name, instead in SHORTER.items():
            patch.setattr(name, instead)
        patch.setenv("AUTOPRUNE_CACHE", str(place.folder / "cache"))
        patch.setattr("autoprune.models.bundled._fetch", lambda entry, _: pytest.fail(f"{entry.name} would be fetched"))
        for block in BLOCKS:
            name = re.match(r"# (\w+\.(?:py|yaml))\n", block.text)
            if name:
                (place.folder / name[1]).write_text(place.named(block.text))
        assert place.search() == 0
        for name in ("mine", "first"):
            shutil.copytree("runs/demo", f"runs/{name}")
        for name in ("pruned", "first", "pruned-wanda"):
            shutil.copytree("runs/demo/model", name)
        yield place


@pytest.mark.parametrize("command", ALL, ids=str)
def test_a_command_is_run_or_says_why_not(command):
    assert COMMAND.fullmatch(command.text) or command in FILTERS, f"{command}: what is it?"
    if command in RUN or command in SETS or command in FILTERS or command in MARKED:
        return
    (known,) = [name for name in ELSEWHERE if re.match(rf"{name}( ARGS=|\s|$)", command.text)]
    file, name = ELSEWHERE[known].split("::")
    functions = {node.name for node in ast.parse((ROOT / file).read_text()).body if isinstance(node, ast.FunctionDef)}
    assert name in functions, f"{command}: there is no {ELSEWHERE[known]}"


@pytest.mark.parametrize("command", RUN, ids=str)
def test_it_does_what_it_says(command: Command, place: Place, monkeypatch, capsys):
    words, target = place.words(command.text)
    place.clear(words)
    if command is WHOLE:
        for name, own in OWN.items():
            monkeypatch.setattr(name, own)
    assert main(words) == 0, capsys.readouterr().err
    printed = capsys.readouterr().out
    assert printed.strip()
    if target is not None:
        target.write_text(printed)
        assert main(["check", str(target)]) == 0
    for option in ("--out", "--html"):
        if option in words:
            assert Path(words[words.index(option) + 1]).exists()
    for storage in (word.partition("=")[2] for word in words if word.startswith("storage=")):
        (name,) = (word.partition("=")[2] for word in words if word.startswith("name="))
        kept = {path.relative_to(f"{storage}/{name}").as_posix() for path in Path(storage, name).rglob("*")}
        assert kept >= {"report.html", "best.py", "lineage.json", "model/model.safetensors", "model/autoprune.json"}


@pytest.mark.parametrize("command", SETS, ids=str)
def test_a_search_takes_what_may_be_added_to_it(command, place):
    sets = shlex.split(command.text, comments=True)
    load_config(ROOT / "configs" / "demo.yaml", sets[1::2])
    assert place.search("--set", "name=added", *sets) == 0
    report = json.loads((place.folder / "runs" / "added" / "report.json").read_text())
    assert report["counts"]["usable"] > 0


@pytest.mark.parametrize("command", FILTERS, ids=str)
def test_mlflow_takes_a_filter(command, place):
    from mlflow import MlflowClient

    memory = json.loads((place.folder / "runs" / "demo" / "mlflow.json").read_text())
    client = MlflowClient(memory["uri"])
    client.search_runs([memory["experiment_id"]], command.text)
    data = [run.data for run in client.search_runs([memory["experiment_id"]])]
    kind, name = re.match(r"(\w+)\.`?([\w.]+)", command.text).groups()
    assert any(name in getattr(one, kind) for one in data), f"no run has {name}"


@pytest.mark.parametrize("command", MARKED, ids=str)
def test_what_cannot_be_run_here_can_be_read(command):
    from ray.dashboard.modules.job.cli import submit

    words = shlex.split(command.text, comments=True)
    words = words[next(place for place, word in enumerate(words) if "=" not in word) :]
    if words[:3] == ["ray", "job", "submit"]:
        given = submit.make_context("submit", words[3:]).params
        assert (ROOT / given["runtime_env"]).is_file() and given["working_dir"] == "."
        words = words[words.index("--") + 3 :]
    assert words[0].endswith("autoprune")
    options = _parser().parse_args(words[1:])
    if hasattr(options, "set"):
        load_config(ROOT / options.config, options.set)


def test_no_command_finds_what_another_one_has_made():
    """Nothing is overwritten, so copied one after the other the second would be refused."""
    words = [shlex.split(command.text, comments=True) for command in ALL]
    outs = [line[line.index("--out") + 1] for line in words if "--out" in line]
    searches = [line for line in words if "search" in line and "--resume" not in line]
    names = [word for line in searches for word in line if word.startswith("name=")]
    assert len(outs) > 4 and len(names) > 2
    assert sorted(outs) == sorted(set(outs)) and sorted(names) == sorted(set(names))


def test_few_commands_are_marked():
    assert len(MARKED) <= 3


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_python_runs_and_the_algorithm_language_is_in_it(block, place, capsys):
    if block.text.startswith("# "):
        assert main(["check", re.match(r"# (\w+\.py)", block.text)[1]]) == 0
    else:
        exec(compile(place.named(block.text), str(block), "exec"), {})


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "yaml"], ids=str)
def test_a_configuration_can_be_read_and_one_with_a_target_be_searched(block, place, tmp_path):
    file = tmp_path / "page.yaml"
    file.write_text(place.named(block.text))
    (load_comparison if "methods:" in block.text else load_config)(file)
    if "target:" in block.text:
        texts = {"calibration": "0:40", "fitness": "40:70", "report": "70:106"}
        sets = ["name=page", *(f"data.{name}=wikipedia-sample[{documents}]" for name, documents in texts.items())]
        assert place.search(*(part for text in sets for part in ("--set", text)), config=str(file)) == 0


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language not in ("sh", "python", "yaml")], ids=str)
def test_what_is_printed_hides_no_command(block):
    assert block.language == "text"
    assert not [line for line in block.text.splitlines() if COMMAND.fullmatch(line.strip())]


def test_every_page_has_commands():
    assert {command.page for command in RUN} >= set(EXECUTED) - {"docs/changing.md"}
    assert {command.page for command in ALL} == set(EXECUTED)
