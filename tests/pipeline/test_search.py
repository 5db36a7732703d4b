"""The whole search over its Protocols, in this process: order, repeats, resuming after a death at any point."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from local import LocalEvaluator, local_search

from autoprune.models.errors import InputError


@pytest.fixture(scope="module")
def evaluator(tiny_model):
    return LocalEvaluator(tiny_model, 0.5)


@pytest.fixture
def fresh(evaluator):
    evaluator.measured, evaluator.die_after = [], None
    return evaluator


def finished(folder: Path, evaluator: LocalEvaluator):
    search = local_search(folder, evaluator)
    search.run()
    return search


def without_clock(lineage) -> str:
    return json.dumps(lineage.to_dict(), sort_keys=True)


def test_a_search_measures_seeds_and_generations(tmp_path, fresh):
    search = finished(tmp_path, fresh)
    ids = [candidate.id for candidate in search.lineage]
    assert ids[:3] == ["seed-magnitude", "seed-wanda", "seed-wanda+sdsa"]
    assert [name for name, _ in search.tracker.candidates] == ids, "the tracker sees all, in proposal order"
    assert [index for index, _ in search.tracker.generations] == [0, 1, 2, 3]
    evaluated = search.lineage.evaluated()
    assert len(fresh.measured) == len(set(fresh.measured)) == len(evaluated)
    assert evaluated == sorted(evaluated, key=lambda c: c.fitness)
    by_status = {status: [c for c in search.lineage if c.status == status] for status in ("invalid", "repeat")}
    assert by_status["invalid"], "the script holds an answer with an import"
    assert all("import" in c.error.lower() for c in by_status["invalid"])
    for candidate in by_status["repeat"]:
        assert search.lineage[candidate.repeats].mask_hash == candidate.mask_hash
    for candidate in search.lineage:
        if candidate.operator != "seed":
            assert candidate.parents and all(parent in search.lineage for parent in candidate.parents)
            assert candidate.prompt and candidate.answer


def test_edges_carry_the_measured_effect(tmp_path, fresh):
    search = finished(tmp_path, fresh)
    edges = search.lineage.graph.edges(data=True)
    measured = [(p, c, edge) for p, c, edge in edges if search.lineage[c].status == "evaluated"]
    assert measured
    for parent, child, edge in measured:
        effect = search.lineage[child].fitness - search.lineage[parent].fitness
        assert edge["effect"] == pytest.approx(effect)
        if edge["verdict"] == "confirmed":
            assert effect < -edge["effect_error"]
        if edge["verdict"] == "refuted":
            assert effect > edge["effect_error"]


def test_dying_anywhere_and_resuming_gives_the_same_lineage(tmp_path, fresh):
    whole = without_clock(finished(tmp_path / "whole", fresh).lineage)
    total = len(fresh.measured)
    for death in range(total):
        fresh.measured, fresh.die_after = [], death
        folder = tmp_path / f"dies-{death}"
        with pytest.raises(KeyboardInterrupt):
            finished(folder, fresh)
        fresh.die_after = None
        resumed = finished(folder, fresh)
        assert without_clock(resumed.lineage) == whole
        assert len(fresh.measured) == total, "an algorithm was measured twice"
        assert (folder / "run" / "lineage.json").is_file()


def test_a_finished_search_resumed_does_nothing(tmp_path, fresh):
    first = finished(tmp_path, fresh)
    count = len(fresh.measured)
    again = finished(tmp_path, fresh)
    assert len(fresh.measured) == count
    assert without_clock(again.lineage) == without_clock(first.lineage)
    assert again.spent.answers == first.spent.answers


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, fresh):
    first = finished(tmp_path, fresh)
    count = len(fresh.measured)
    newest = max((tmp_path / "run" / "checkpoint").iterdir())
    (newest / "lineage.json").write_bytes((newest / "lineage.json").read_bytes()[:-9])
    again = finished(tmp_path, fresh)
    assert any("damaged" in line for line in again.progress.said)
    assert without_clock(again.lineage) == without_clock(first.lineage)
    assert len(fresh.measured) == count

    for checkpoint in (tmp_path / "run" / "checkpoint").iterdir():
        (checkpoint / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="no valid checkpoint"):
        finished(tmp_path, fresh)


@pytest.mark.parametrize("hash_seed", ["1", "2"])
def test_no_hash_seed_reaches_a_decision(tmp_path, fresh, tiny_model, hash_seed):
    here = without_clock(finished(tmp_path / "here", fresh).lineage)
    script = (
        "import sys; sys.path[:0] = [sys.argv[3]]\n"
        "from pathlib import Path\n"
        "from local import LocalEvaluator, local_search\n"
        "search = local_search(Path(sys.argv[2]), LocalEvaluator(Path(sys.argv[1]), 0.5)); search.run()\n"
    )
    arguments = [sys.executable, "-c", script, str(tiny_model), str(tmp_path / "there"), str(Path(__file__).parent)]
    subprocess.run(arguments, check=True, env=os.environ | {"PYTHONHASHSEED": hash_seed})
    there = json.loads((tmp_path / "there" / "run" / "lineage.json").read_text())
    assert json.dumps(there, sort_keys=True) == here
