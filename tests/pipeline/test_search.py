"""The whole search over its Protocols, in this process: order, repeats, resuming after a death at any point."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from local import LocalEvaluator, finished, local_search, small_config, without_clock

from autoprune.actors.messages import Answer, Evaluation
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS
from autoprune.models.errors import InputError
from autoprune.pipeline.lineage import Lineage
from autoprune.pipeline.wording import algorithm_text


def test_a_search_measures_seeds_and_generations(tmp_path, fresh):
    search = finished(tmp_path, fresh)
    ids = [candidate.id for candidate in search.lineage]
    assert ids[:3] == ["seed-magnitude", "seed-wanda", "seed-wanda+sdsa"]
    assert [name for name, _ in search.tracker.candidates] == ids, "the tracker sees all, in proposal order"
    assert [index for index, _ in search.tracker.generations] == [0, 1, 2, 3]
    evaluated = search.lineage.evaluated()
    assert len(fresh.measured) == len(set(fresh.measured)), "nothing is measured twice"
    assert [split for _, split in fresh.measured].count("fitness") == len(evaluated) == search.spent.evaluations
    assert evaluated == sorted(evaluated, key=lambda c: c.fitness)
    by_status = {status: [c for c in search.lineage if c.status == status] for status in ("invalid", "repeat")}
    assert by_status["invalid"], "the script holds an answer with an import"
    assert any("import" in c.error.lower() for c in by_status["invalid"])
    assert all("import" in c.error.lower() or "no whole allocation" in c.error for c in by_status["invalid"])
    for candidate in by_status["repeat"]:
        assert search.lineage[candidate.repeats].mask_hash == candidate.mask_hash
    for candidate in search.lineage:
        if candidate.operator != "seed":
            assert candidate.parents and all(parent in search.lineage for parent in candidate.parents)
            assert bool(candidate.prompt) == bool(candidate.answer) == (candidate.operator != "tune")


def test_new_scores_are_compared_where_the_probe_likes_them_better(tmp_path, fresh):
    search = finished(tmp_path, fresh)
    measured = len(fresh.measured)
    written = [c for c in search.lineage if c.operator not in ("seed", "tune") and "probe" in c.rungs]
    lineage = search.lineage
    read = {c.id: [p for p in map(lineage.__getitem__, c.parents) if p.algorithm is not None] for c in written}
    new = [c for c in written if all(p.algorithm.score != c.algorithm.score for p in read[c.id])]
    assert any(c.regrouped for c in new)
    for candidate in new:
        other = replace(candidate.algorithm, group={"row": "matrix", "matrix": "row"}[candidate.algorithm.group])
        (evaluation,) = search.measure([other], "probe")
        assert evaluation.error or candidate.rungs["probe"] <= evaluation.nll
        said = "matrix" if "Group: matrix" in candidate.answer else "row"
        assert candidate.regrouped == (candidate.algorithm.group != said) or "Group:" not in candidate.answer
    assert len(fresh.measured) == measured, "both were measured already"
    assert not any(c.regrouped for c in search.lineage if c not in new and c.status != "repeat")


GROUPED = "Diagnosis: a\nHypothesis: b\nGroup: {group}\nAllocation: sdsa tau=1 m=0.5 depth=0.2\n{score}"
PRODUCT = "def score(W, x_norm, x_std):\n    return W.abs() * x_norm * x_std"
BY_ROW = "def score(W, x_norm):\n    return W.abs() * x_norm / W.abs().mean(dim=1, keepdim=True)"
OF_MATRIX = "def score(W, x_norm):\n    return W.abs().mean(dim=1, keepdim=True) + W * 0"


class OneGroup(LocalEvaluator):
    """On the probe's text `liked` does better than the other group; `broken` are the groups that bring
    evaluators down."""

    liked, broken = "matrix", frozenset()

    def evaluate(self, jobs, split="fitness", sparsity=None):
        for index, evaluation in super().evaluate(jobs, split, sparsity):
            group = jobs[index].group
            if split == "probe" and group in self.broken and jobs[index].score.count("x_std"):
                yield index, Evaluation(None, 0, error="given up", poison=True)
            elif split == "probe":
                level = 5.0 if group == self.liked else 6.0
                yield index, replace(evaluation, nll=level, window_nlls=(level,))
            else:
                yield index, evaluation


def asked(tmp_path, tiny_model, *answers, **settings):
    """What becomes of these answers of one generation."""
    evaluator = OneGroup(tiny_model, 0.5)
    vars(evaluator).update(settings)
    script = tmp_path / "script.txt"
    script.write_text("\n---\n".join(answers))
    config = small_config(tmp_path)
    plan = replace(config.search, generations=1, rounds=1, prompts=1, answers=len(answers), operators={"explore": 1.0})
    writer = replace(config.generator, answers=str(script))
    search = local_search(tmp_path, evaluator, replace(config, search=plan, generator=writer))
    search.run()
    return search, [c for c in search.lineage if c.operator == "explore"]


@pytest.mark.parametrize("liked", ["row", "matrix"])
def test_equal_answers_are_one_algorithm_in_the_better_group(tmp_path, tiny_model, liked):
    answers = [GROUPED.format(group=group, score=PRODUCT) for group in ("row", "matrix", "row")]
    _, found = asked(tmp_path, tiny_model, *answers, liked=liked)
    assert [c.algorithm.group for c in found] == [liked] * 3
    assert [c.regrouped for c in found] == [group != liked for group in ("row", "matrix", "row")]
    assert [c.repeats for c in found] == [None, found[0].id, found[0].id]
    assert len({c.mask_hash for c in found}) == 1 == len({c.mask for c in found})


def test_what_is_a_repeat_in_one_group_only_is_proposed_in_the_other(tmp_path, tiny_model):
    """By rows it ranks as Wanda, which its division leaves as it is."""
    _, (found,) = asked(tmp_path, tiny_model, GROUPED.format(group="row", score=BY_ROW))
    assert found.algorithm.group == "matrix" and found.repeats is None and found.status != "repeat"


def test_what_is_no_algorithm_in_the_better_group_stays_in_its_own(tmp_path, tiny_model):
    _, (found,) = asked(tmp_path, tiny_model, GROUPED.format(group="matrix", score=OF_MATRIX), liked="row")
    assert found.algorithm.group == "matrix" and not found.regrouped and found.status not in ("invalid", "failed")


@pytest.mark.parametrize("broken", [{"row"}, {"matrix"}, {"row", "matrix"}])
def test_the_group_that_can_be_measured_is_the_better_one(tmp_path, tiny_model, broken):
    """Where neither can, the candidate is poison, and nothing more is tried."""
    search, (found,) = asked(tmp_path, tiny_model, GROUPED.format(group="row", score=PRODUCT), broken=broken)
    assert found.algorithm.group == ("matrix" if broken == {"row"} else "row")
    assert found.regrouped == (broken == {"row"})
    tried = {split for key, split in search.evaluator.measured if key == found.algorithm.key}
    if len(broken) == 2:
        assert (found.status, found.error) == ("poison", "given up") and tried == {"probe"}
    else:
        assert found.status != "poison"


def test_edges_carry_the_measured_effect(tmp_path, fresh):
    search = finished(tmp_path, fresh)
    edges = search.lineage.graph.edges(data=True)
    # A repaired candidate also descends from the broken one.
    both = [(p, c, edge) for p, c, edge in edges if search.lineage[p].status == search.lineage[c].status]
    measured = [(p, c, edge) for p, c, edge in both if search.lineage[c].status == "evaluated"]
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
    assert again.tracker.generations == first.tracker.generations, "metrics that the store may lack"


def test_a_search_is_not_resumed_on_another_text(tmp_path, fresh, monkeypatch):
    first = finished(tmp_path, fresh)
    whole = (tmp_path / "run" / "journal.jsonl").read_bytes()
    dense = fresh.dense["fitness"]
    near = tuple(nll + 1e-4 for nll in dense.window_nlls)
    monkeypatch.setitem(fresh.dense, "fitness", replace(dense, window_nlls=near))  # another machine
    assert without_clock(finished(tmp_path, fresh).lineage) == without_clock(first.lineage)
    for other in (dense.window_nlls[1:], (dense.window_nlls[0] + 0.1, *dense.window_nlls[1:])):
        monkeypatch.setitem(fresh.dense, "fitness", replace(dense, window_nlls=other))
        with pytest.raises(InputError, match="the dense model measured .* The text, the model or the arithmetic"):
            local_search(tmp_path, fresh)
    assert (tmp_path / "run" / "journal.jsonl").read_bytes() == whole


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, fresh):
    first = finished(tmp_path, fresh)
    count = len(fresh.measured)
    newest = max((tmp_path / "run" / "checkpoint").glob("generation-*"))
    (newest / "spent.json").write_bytes((newest / "spent.json").read_bytes()[:-9])
    again = finished(tmp_path, fresh)
    assert any("damaged" in line for line in again.progress.said)
    assert without_clock(again.lineage) == without_clock(first.lineage)
    assert len(fresh.measured) == count

    part = min((tmp_path / "run" / "checkpoint" / "parts").iterdir())
    part.write_bytes(part.read_bytes()[:-9])  # all rest on it
    last = finished(tmp_path, fresh)
    assert "no checkpoint is left: the search begins again, and its journal answers" in last.progress.said
    assert without_clock(last.lineage) == without_clock(first.lineage)
    assert len(fresh.measured) == count


def test_a_checkpoint_writes_the_candidates_of_its_own_generation_alone(tmp_path, fresh):
    search = finished(tmp_path, fresh)
    parts = sorted((tmp_path / "run" / "checkpoint" / "parts").iterdir())
    held = [[c["id"] for c in json.loads(part.read_text())] for part in parts]
    assert held == [[c.id for c in search.lineage.of_generation(n)] for n in range(4)]
    stored = json.loads((tmp_path / "run" / "lineage.json").read_text())
    assert stored["candidates"] == json.loads(json.dumps([c.to_dict() for c in search.lineage]))
    assert any(c["fresh"] for c in stored["candidates"])


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


CODESIGN = """Diagnosis: Blocks differ in the spread of their weights.
Hypothesis: Blocks whose kurtosis is high must keep more.
Group: row
def allocate(profile, sparsity):
    u0 = profile.kurtosis / (profile.kurtosis.mean() + 1e-6)
    return 1 + 0.5 * u0
def score(W, x_norm, x_mean, x_std):
    return W.abs() * x_std
---
Sure! Early blocks matter, so I keep more of them:
```python
def allocate(profile, sparsity):
    return 1 / (profile.depth + 0.5)

def score(W, x_norm):
    m0 = W.abs() * x_norm
    c0 = m0.mean(dim=1, keepdim=True)
```
---
def allocate(profile, sparsity):
    return profile.skewness.log()
def score(W, x_norm):
    m0 = W.abs() * (x_norm + 1)
    return m0 / (c0 +"""


def test_a_search_by_chance_needs_no_model_and_follows_from_its_seed(tmp_path, fresh):
    config = small_config(tmp_path)
    searches = []
    for name, seed in (("one", 0), ("two", 0), ("other", 1)):
        own = replace(config, name=name, seed=seed, generator=replace(config.generator, kind="grammar"))
        searches.append(local_search(tmp_path, fresh, own))
        searches[-1].run()
    one, two, other = ([(c.algorithm, c.status) for c in search.lineage] for search in searches)
    assert one == two != other
    written = [c for c in searches[0].lineage if c.operator != "seed"]
    assert len(written) >= 9 and all(c.algorithm is not None for c in written), "whatever is drawn can be read"


def test_allocations_are_written_where_that_is_asked_for(tmp_path, fresh):
    """A function of its own for each of the answers that hold one, kept or replaced as the operator says."""
    (tmp_path / "answers.txt").write_text(CODESIGN)
    config = small_config(tmp_path)
    config = replace(
        config,
        generator=replace(config.generator, answers=str(tmp_path / "answers.txt")),
        search=replace(
            config.search,
            allocation="written",
            generations=4,
            candidates=4,
            answers=6,
            prompts=3,
            fidelities=(),
            operators={"mutate": 1.0},
        ),
    )
    search = local_search(tmp_path, fresh, config)
    search.run()
    sources = {}
    for candidate in search.lineage:
        if candidate.operator == "seed" or candidate.algorithm is None:
            continue
        parent = search.lineage[candidate.parents[0]].algorithm
        same = [getattr(candidate.algorithm, part) == getattr(parent, part) for part in ("score", "allocation")]
        if candidate.operator in ("mutate", "simplify", "tune"):
            assert any(same), "these are of the score or of the allocation"
        elif candidate.operator != "repair":
            assert same[1], "these are of the score"
        if candidate.status == "evaluated" and candidate.algorithm.allocation.source:
            sources[candidate.algorithm.allocation.source] = candidate
        if not candidate.prompt:  # nobody was asked
            continue
        assert ("profile.kurtosis: " in candidate.prompt) and "tau" not in candidate.prompt.partition("[user]")[0]
    assert any("kurtosis" in source for source in sources) and any("depth" in source for source in sources)
    for source, candidate in sources.items():
        assert source in algorithm_text(candidate.algorithm)
        assert len(set(candidate.evaluation.block_sparsities)) > 1
    salvaged = {kind for candidate in search.lineage for kind in candidate.salvaged}
    assert {"fences", "prose", "no return"} <= salvaged
    shown = [
        c
        for c in search.lineage
        if c.prompt and c.operator != "repair" and search.lineage[c.parents[0]].algorithm.allocation.source
    ]
    assert shown
    for candidate in shown:
        source = search.lineage[candidate.parents[0]].algorithm.allocation.source
        assert source.replace("\n", "\n   ") in candidate.prompt
    # Rules are shown as functions, too: what is to be changed must be seen.
    uniform = WRITTEN_ALLOCATIONS["uniform"].strip().replace("\n", "\n   ")
    seeds = [c for c in search.lineage if c.generation and c.parents[0] == "seed-wanda"]
    assert seeds and all(uniform in candidate.prompt for candidate in seeds)
    again = Lineage.from_dict(json.loads(json.dumps(search.lineage.to_dict())))
    assert again.to_dict() == search.lineage.to_dict()


def test_an_answer_that_was_cut_is_mended_or_refused(tmp_path, fresh):
    search = local_search(tmp_path, fresh)
    search.run()
    (slot,) = search.prompter.slots(1, 0)[:1]
    whole = "def score(W, x_norm):\n    m0 = W.abs() * x_norm\n    m1 = m0 * 2"
    for parts, text, status, error in (
        (("score",), whole, "proposed", None),
        (("score",), whole[:24], "invalid", "the answer was cut"),
        (("allocation",), "Diagnosis: x\nAllocation: sdsa tau=1", "invalid", "the answer holds no whole allocation"),
    ):
        candidate = search.read("c", 1, replace(slot, parts=parts), Answer(text, finish_reason="length"))
        assert candidate.status == status and (candidate.error or "").startswith(error or "")
        assert candidate.salvaged == (("cut", "no return") if error is None else ())


WITH_TUNE = {"mutate": 1.0, "tune": 0.01}


def test_mutations_are_of_allocation_and_score_in_turn(tmp_path, fresh):
    """Also where a generation has a single prompt, or an odd number."""
    config = small_config(tmp_path)
    plan = replace(config.search, operators={"mutate": 1.0}, generations=1)
    for prompts in (1, 2, 3):
        own = replace(config, name=f"run-{prompts}", search=replace(plan, prompts=prompts))
        search = local_search(tmp_path, fresh, own)
        search.run()
        parts = [slot.parts for generation in range(60) for slot in search.prompter.slots(generation, 0)]
        assert parts.count(("group", "score")) == parts.count(("allocation",)) == 30 * prompts
    tuned = local_search(tmp_path, fresh, replace(config, name="tuned", search=replace(plan, operators=WITH_TUNE)))
    tuned.run()
    parts = [slot.parts for generation in range(60) for slot in tuned.prompter.slots(generation, 0)]
    scores, numbers = parts.count(("group", "score")), parts.count(("allocation",))
    assert scores == pytest.approx(2 * numbers, rel=0.2), "numbers are tuned without asking, too"


@pytest.mark.parametrize("bounds", [(0, 1, 4), (0, 1, 2, 3, 4)])
def test_the_number_of_evaluators_changes_no_byte_of_the_graph(tmp_path, fresh, tiny_model, bounds):
    finished(tmp_path / "one", fresh)
    finished(tmp_path / "many", LocalEvaluator(tiny_model, 0.5, bounds=bounds))
    one, many = ((tmp_path / name / "run" / "lineage.json").read_bytes() for name in ("one", "many"))
    assert one == many


def test_elites_are_believed_after_fresh_text(tmp_path, fresh):
    search = finished(tmp_path, fresh)
    again = [c for c in search.lineage if c.fresh is not None]
    assert 1 < len(again) <= search.config.search.elites
    best = search.lineage.best()
    assert best in again and best.believed == min(c.believed for c in again)
    assert best.believed == pytest.approx((best.fitness * 60 + best.fresh.nll * 60) / 120)
