"""Fitness and fresh windows: apart from each other, and each over the whole text."""

import json
import shutil
from pathlib import Path

import pytest

from autoprune.models.errors import InputError
from autoprune.pipeline.config import Config, Data, Generator, SearchPlan, Target
from autoprune.pipeline.population import seed
from autoprune.pipeline.preparation import absolute, load_splits, settled, spread


@pytest.mark.parametrize("windows, fitness, fresh", [(500, 8, 16), (40, 8, 8), (24, 8, 16), (100, 4, 1), (9, 8, 8)])
def test_both_kinds_lie_over_the_whole_and_apart(windows, fitness, fresh):
    own, other = spread(windows, fitness, fresh)
    assert len(own) == fitness and len(other) == min(fresh, windows - fitness)
    assert not set(own) & set(other) and own == sorted(own) and max(own + other) < windows
    steps = [b - a for a, b in zip(own, [*own[1:], windows + own[0]], strict=True)]
    assert max(steps) <= 2 * windows / fitness, "no part of the text is without a window"


def test_too_little_text_leaves_nothing_fresh():
    assert spread(8, 8, 8)[1] == [] and spread(5, 8, 8)[1] == []


def test_the_same_text_under_two_names_is_refused_and_repeated_lines_are_not(tmp_path):
    def written(name, documents):
        (tmp_path / name).write_text("".join(json.dumps({"text": text}) + "\n" for text in documents))
        return str(tmp_path / name)

    own = [[f"document {index} of {name}, which is no other one's" for index in range(30)] for name in "abc"]
    head = "Below is an instruction."
    mixed = [[text for document in documents for text in (head, document)] for documents in own]
    first, second, third = (written(f"{index}.jsonl", documents) for index, documents in enumerate(mixed))
    texts = load_splits(Data(calibration=first, fitness=second, report=third))
    assert [len(text.documents) for text in texts.values()] == [60, 60, 60]
    long = written(
        "long.jsonl", own[2] * 1 + [f"{index} more of it, and longer than the others" for index in range(900)]
    )
    for splits in ((first, third, long), (long, second, third)):
        with pytest.raises(InputError, match=r"and data.* share \d+% of the shorter one: give them different texts"):
            load_splits(Data(**dict(zip(("calibration", "fitness", "report"), splits, strict=True))))


def test_the_same_text_in_another_cut_is_refused_and_lines_that_any_text_has_are_not(tmp_path):
    """Rows of a JSONL file are whole articles, of a text file every paragraph is a document."""
    articles = [
        [f"{name}, paragraph {index} of an article that is long enough" for index in range(9)] for name in "abcd"
    ]
    usual = ["", "import os", "    return self"]  # short, and in every text
    files = {}
    for name, paragraphs in zip("abcd", articles, strict=True):
        files[name] = str(tmp_path / f"{name}.jsonl")
        Path(files[name]).write_text(json.dumps({"text": "\n\n".join(paragraphs + usual)}) + "\n")
    files["again"] = str(tmp_path / "again.txt")
    Path(files["again"]).write_text("\n\n".join([*articles[1], *usual, *articles[3]]) + "\n")
    assert load_splits(Data(calibration=files["a"], fitness=files["b"], report=files["c"]))
    with pytest.raises(InputError, match=r"data.report .*again.txt.* and data.fitness .* share \d+% of the shorter"):
        load_splits(Data(calibration=files["a"], fitness=files["b"], report=files["again"]))


def test_a_folders_name_may_have_a_bracket_and_a_servers_model_is_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("model [8B] v1.0", "served"):
        (tmp_path / name).mkdir()
    (tmp_path / "my.jsonl").touch()
    assert absolute("model [8B] v1.0/") == str(tmp_path / "model [8B] v1.0")
    (tmp_path / "ours.py").write_text("def allocate(profile, sparsity):\n    return profile.skewness\n")
    seeds = settled(
        Config(target=Target("served"), search=SearchPlan(seeds=("wanda+ours.py@layer", "ria+sdsa")))
    ).search.seeds
    assert seeds == (f"wanda+{tmp_path}/ours.py@layer", "ria+sdsa")
    assert [seed(text).id for text in seeds] == ["seed-wanda+ours.py@layer", "seed-ria+sdsa"]
    (tmp_path / "c++").mkdir()
    (tmp_path / "c++" / "mine.py").write_text("# group: matrix\ndef score(W, h_inv_diag):\n    return W / h_inv_diag\n")
    plan = SearchPlan(seeds=("c++/mine.py+sdsa", "c++/mine.py", "wanda"))
    config = settled(Config(target=Target("served"), search=plan))
    assert config.search.seeds == (f"{tmp_path}/c++/mine.py+sdsa", f"{tmp_path}/c++/mine.py", "wanda")
    assert "h_inv_diag" in config.search.statistics, "what a seed reads is measured"
    (tmp_path / "you@there").mkdir()
    shutil.copy("ours.py", "you@there")
    with pytest.raises(InputError, match="search.seeds has two of the name wanda\\+ours.py: give"):
        settled(Config(target=Target("served"), search=SearchPlan(seeds=("wanda+ours.py", "wanda+you@there/ours.py"))))
    assert absolute("my.jsonl[0:4]") == f"{tmp_path / 'my.jsonl'}[0:4]" and absolute("org/name") == "org/name"
    for kind, model in (("openai", "served"), ("vllm", str(tmp_path / "served"))):
        config = settled(Config(target=Target("served"), generator=Generator(kind=kind, model="served")))
        assert config.target.model == str(tmp_path / "served") and config.generator.model == model
