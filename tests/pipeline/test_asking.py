"""What a run says when it is asked, in words and as JSON: its candidates, the way to one of them, and how to use it."""

import json
import re
import shlex

import pytest
from local import finished, local_search, without_clock

from autoprune.models.errors import InputError
from autoprune.pipeline.asking import chosen, find, reasoning, stored_lineage
from autoprune.pipeline.cli import main
from autoprune.pipeline.population import read_score


@pytest.fixture
def search(tmp_path, fresh):
    found = finished(tmp_path, fresh)
    (found.folder / "config.yaml").write_text(found.config.to_yaml())
    return found


def said(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 0
    return capsys.readouterr().out


def refused(capsys, *arguments) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_the_lineage_is_that_of_the_newest_checkpoint_or_of_the_file_that_was_sent(search):
    for _ in range(2):
        stored = stored_lineage(search.folder)
        assert without_clock(stored) == without_clock(search.lineage)
        for path in sorted((search.folder / "checkpoint").rglob("manifest.json")):
            path.unlink()
    (search.folder / "lineage.json").write_text("{")
    with pytest.raises(InputError, match="lineage.json cannot be read"):
        stored_lineage(search.folder)
    (search.folder / "lineage.json").unlink()
    with pytest.raises(InputError, match="has no checkpoint yet"):
        stored_lineage(search.folder)


def test_a_search_that_was_stopped_can_be_asked(tmp_path, fresh):
    fresh.die_after = 9
    search = local_search(tmp_path, fresh)
    with pytest.raises(KeyboardInterrupt):
        search.run()
    assert not (search.folder / "lineage.json").exists()
    assert {c.id for c in stored_lineage(search.folder)} >= {"seed-magnitude", "seed-wanda"}


def test_every_candidate_has_a_line_and_filters_choose(search, capsys):
    lines = said(capsys, "lineage", search.folder).splitlines()
    assert [line.split()[0] for line in lines[1:]] == [c.id for c in search.lineage], "a line each, also in a pipe"
    for candidate in search.lineage.evaluated():
        (line,) = (line for line in lines if line.startswith(f"{candidate.id} "))
        if candidate.parents:
            edge = search.lineage.edge(candidate.parents[0], candidate.id)
            assert f"{edge['effect']:+.4f} ± {edge['effect_error']:.4f}  {edge['verdict']} " in line
    edges = [search.lineage.edge(c.parents[0], c.id) for c in search.lineage.evaluated() if c.parents]
    verdict = next(edge["verdict"] for edge in edges if "effect" in edge)
    for option, value in (("operator", "seed"), ("status", "evaluated"), ("verdict", verdict)):
        found = json.loads(said(capsys, "lineage", search.folder, f"--{option}", value, "--json"))
        key = {"operator": None, "status": None, "verdict": None} | {option: value}
        assert [one["id"] for one in found] == [c.id for c in chosen(search.lineage, **key)] != []
        if option == "verdict":
            assert all(one["against"][0]["verdict"] == verdict for one in found)


def test_where_no_candidate_is_left_it_is_said(search, capsys):
    none = ("--operator", "seed", "--verdict", "refuted")
    assert said(capsys, "lineage", search.folder, *none) == "no candidate\n"
    assert json.loads(said(capsys, "lineage", search.folder, *none, "--json")) == []


def test_the_page_can_be_had_at_any_time(search, capsys, tmp_path):
    nowhere = tmp_path / "nowhere"
    assert f"there is no folder {nowhere}" in refused(capsys, "lineage", search.folder, "--html", nowhere / "x.html")
    page = tmp_path / "page.html"
    assert said(capsys, "lineage", search.folder, "--html", page).strip() == str(page)
    assert all(f'"{candidate.id}"' in page.read_text() for candidate in search.lineage)


def test_the_chain_goes_from_a_seed_to_the_candidate(search, capsys):
    best = search.lineage.best()
    path = [c.id for c in search.lineage.ancestors_path(best.id)]
    text = said(capsys, "lineage", search.folder, "--of", "best")
    assert re.findall(r"^\d+\. (\S+) ", text, re.MULTILINE) == path
    assert all(line in text for line in best.algorithm.score.splitlines())
    chain = json.loads(said(capsys, "lineage", search.folder, "--of", best.id, "--json"))
    assert [step["id"] for step in chain] == path and chain == json.loads(json.dumps(reasoning(search.lineage, best)))
    assert chain[-1]["fitness_nll"] == best.fitness and chain[0]["against"] == []
    wrong = refused(capsys, "lineage", search.folder, "--verdict", "confirmd")
    assert "--verdict is 'confirmd': expected confirmed" in wrong
    assert "leave out the other options" in refused(capsys, "lineage", search.folder, "--html", "x", "--json")
    assert "leave out --operator" in refused(capsys, "lineage", search.folder, "--of", "best", "--operator", "tune")


def test_what_is_shown_is_a_file_that_prunes_as_the_search_did(search, capsys, tmp_path):
    best = search.lineage.best()
    text = said(capsys, "show", search.folder)
    file = tmp_path / "mine.py"
    file.write_text(text)
    algorithm, _ = read_score(file)
    assert (algorithm.score, algorithm.group, algorithm.allocation) == (
        best.algorithm.score,
        best.algorithm.group,
        best.algorithm.allocation,
    )
    found = json.loads(said(capsys, "show", search.folder, best.id, "--json"))
    words = shlex.split(found["command"])
    assert words[:2] == ["autoprune", "prune"] and f"{best.id}.py: {found['command']}" in text
    given = dict(zip(words[2::2], words[3::2], strict=True))
    assert given["--sparsity"] == "0.5" and given["--context"] == "16" and given["--model"] == "tiny"


def test_who_is_not_there_is_told_who_is(search, capsys):
    near = search.lineage.evaluated()[0].id
    assert f"no candidate '{near}x': expected best or an id, such as" in refused(
        capsys, "show", search.folder, near + "x"
    )
    assert find(search.lineage, near).id == near
    broken = next(c for c in search.lineage if c.algorithm is None)
    assert "has no algorithm: its answer could not be read" in refused(capsys, "show", search.folder, broken.id)
