"""The whole search over its Protocols, in this process: order, repeats, resuming after a death at any point."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from local import LocalEvaluator, local_search, small_config

from autoprune.actors.messages import Answer
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS
from autoprune.models.errors import InputError
from autoprune.pipeline.lineage import Lineage
from autoprune.pipeline.report import algorithm_text


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
    (slot,) = search.slots(1, 0)[:1]
    whole = "def score(W, x_norm):\n    m0 = W.abs() * x_norm\n    m1 = m0 * 2"
    for parts, text, status, error in (
        (("score",), whole, "proposed", None),
        (("score",), whole[:24], "invalid", "the answer was cut"),
        (("allocation",), "Diagnosis: x\nAllocation: sdsa tau=1", "invalid", "the answer holds no whole allocation"),
    ):
        candidate = search.read("c", 1, replace(slot, parts=parts), Answer(text, finish_reason="length"))
        assert candidate.status == status and (candidate.error or "").startswith(error or "")
        assert candidate.salvaged == (("cut", "no return") if error is None else ())


def test_mutations_are_of_allocation_and_score_in_turn(tmp_path, fresh):
    """Also where a generation has a single prompt, or an odd number."""
    config = small_config(tmp_path)
    plan = replace(config.search, operators={"mutate": 1.0}, generations=1)
    for prompts in (1, 2, 3):
        own = replace(config, name=f"run-{prompts}", search=replace(plan, prompts=prompts))
        search = local_search(tmp_path, fresh, own)
        search.run()
        parts = [slot.parts for generation in range(60) for slot in search.slots(generation, 0)]
        assert parts.count(("group", "score")) == parts.count(("allocation",)) == 30 * prompts


def with_plan(config, **plan):
    return replace(config, search=replace(config.search, **plan))


GENETIC = {"explore": 1.0, "mutate": 2.0, "crossover": 2.0, "tune": 1.0}


def run(folder, evaluator, config):
    search = local_search(folder, evaluator, config)
    search.run()
    return search


def test_a_genetic_search_needs_no_model_and_follows_from_its_seed(tmp_path, fresh):
    config = with_plan(small_config(tmp_path), operators=GENETIC, answers=6, prompts=4)
    genetic = replace(config.generator, kind="genetic")
    searches = [
        run(tmp_path, fresh, replace(config, name=name, seed=seed, generator=genetic))
        for name, seed in (("one", 0), ("two", 0), ("other", 1))
    ]
    one, two, other = (without_clock(search.lineage) for search in searches)
    assert one == two != other
    written = [c for c in searches[0].lineage if c.operator in ("mutate", "crossover")]
    assert len(written) > 6 and sum(c.status != "invalid" for c in written) > 0.8 * len(written)
    for child in written:
        if child.operator == "mutate" and child.algorithm is not None:
            parent = searches[0].lineage[child.parents[0]].algorithm
            assert parent.score == child.algorithm.score or parent.allocation == child.algorithm.allocation


def test_every_algorithm_climbs_the_fidelities_in_order(tmp_path, fresh):
    config = with_plan(small_config(tmp_path), answers=8, generations=4)
    search = run(tmp_path, fresh, replace(config, generator=replace(config.generator, kind="grammar")))
    by_key = {}
    for key, split in fresh.measured:
        by_key.setdefault(key, []).append(split.partition("[")[0] if split.startswith("fitness[") else split)
    lineage = search.lineage
    screened = [c for c in lineage if c.status == "screened"]
    assert screened and all(c.rival in lineage for c in screened)
    for candidate in lineage:
        if candidate.operator == "seed" or candidate.algorithm is None:
            continue
        if candidate.status == "screened":
            assert candidate.evaluation is None and "fitness" not in [
                s for k, s in fresh.measured if k == candidate.algorithm.key
            ]
        if candidate.status == "evaluated":
            assert set(candidate.rungs) == {"probe", "cheap"}
    for candidate in lineage.evaluated():
        assert candidate.niche in lineage
        assert lineage[candidate.niche].niche == candidate.niche


def test_without_fidelities_everything_new_is_measured_in_full(tmp_path, fresh):
    config = with_plan(small_config(tmp_path), fidelities=(), operators={"explore": 1.0})
    search = run(tmp_path, fresh, replace(config, generator=replace(config.generator, kind="grammar")))
    assert {split for _, split in fresh.measured} == {"fitness", "fresh"}
    assert not any(c.status == "screened" for c in search.lineage)


@pytest.mark.parametrize(
    "budget, bound", [("calls", 5), ("tokens", 1), ("evaluations", 5), ("gpu_seconds", 4.0), ("wall_clock", 1e-9)]
)
def test_a_budget_ends_the_search_cleanly_and_a_larger_one_goes_on(tmp_path, fresh, budget, bound):
    from autoprune.pipeline.config import Budgets

    config = small_config(tmp_path)
    whole = without_clock(run(tmp_path, fresh, replace(config, name="whole")).lineage)
    short = run(tmp_path, fresh, replace(config, budgets=Budgets(**{budget: bound})))
    assert any(f"{budget} ({bound:g}) is used up" in line for line in short.progress.said)
    assert len(short.lineage) < len(json.loads(whole)["candidates"])
    assert short.lineage.best().fresh is not None, "what was found is measured on fresh text all the same"
    if budget in ("calls", "evaluations"):
        assert short.spent.of(budget) == bound, "to the last one, and not one more"
    again = run(tmp_path, fresh, replace(config, budgets=Budgets(**{budget: 10_000.0 if bound < 1 else 10_000})))
    assert len(again.lineage) > len(short.lineage)
    if budget == "wall_clock":
        measured = [c for c in again.lineage if c.fresh is None]
        assert {c.id for c in measured} <= {c["id"] for c in json.loads(whole)["candidates"]}


def test_a_resumed_search_has_spent_what_an_undisturbed_one_has(tmp_path, fresh):
    def spent(search):
        return {k: v for k, v in vars(search.spent).items() if isinstance(v, int)} | {"gpu": search.spent.gpu_seconds}

    whole = finished(tmp_path / "whole", fresh)
    total = len(fresh.measured)
    for death in range(0, total, 3):
        fresh.measured, fresh.die_after = [], death
        with pytest.raises(KeyboardInterrupt):
            finished(tmp_path / f"dies-{death}", fresh)
        fresh.die_after = None
        assert spent(finished(tmp_path / f"dies-{death}", fresh)) == spent(whole)
    assert spent(finished(tmp_path / "whole", fresh)) == spent(whole)


@pytest.mark.parametrize("prompt, operator", [("topk", "improve"), ("fixed", "sample")])
def test_plain_prompts_ask_for_whole_algorithms(tmp_path, fresh, prompt, operator):
    search = run(tmp_path, fresh, with_plan(small_config(tmp_path), prompt=prompt))
    written = [c for c in search.lineage if c.operator not in ("seed", "tune", "repair")]
    assert written and {c.operator for c in written} == {operator}
    assert not any("Evidence" in c.prompt for c in written)
    # Of whole algorithms, and of scores alone, by turns.
    assert len({"Allocation: sdsa tau" in c.prompt.partition("[user]")[0] for c in written}) == 2
    if prompt == "fixed":
        assert len({c.prompt for c in written}) == 2


def test_a_broken_answer_is_repaired_once(tmp_path, fresh):
    broken = "Hypothesis: x\ndef score(W, x_norm):\n    return W.abs() * y\n"
    mended = "Hypothesis: y\ndef score(W, x_norm):\n    return W.abs() * (x_norm + 1)\n"
    (tmp_path / "answers.txt").write_text(f"{broken}\n---\n{mended}")
    config = with_plan(
        small_config(tmp_path), prompts=1, answers=1, rounds=1, generations=1, operators={"explore": 1.0}, fidelities=()
    )
    config = replace(config, generator=replace(config.generator, answers=str(tmp_path / "answers.txt")))
    search = run(tmp_path, fresh, config)
    first, second = [c for c in search.lineage if c.operator != "seed"]
    assert first.status == "invalid" and "'y' is not defined" in first.error
    assert second.operator == "repair" and second.status == "evaluated" and second.parents[-1] == first.id
    assert broken.strip() in second.prompt and "'y' is not defined" in second.prompt
    assert search.spent.answers == 2
    assert (
        len(list(run(tmp_path, fresh, replace(config, name="none", search=replace(config.search, repairs=0))).lineage))
        == 4
    )


def test_tuning_fills_constants_on_the_cheap_fidelity(tmp_path, fresh):
    config = with_plan(small_config(tmp_path), operators={"mutate": 1.0, "tune": 1.0}, tuning=6, generations=4)
    search = run(tmp_path, fresh, config)
    tuned = [c for c in search.lineage if c.operator == "tune"]
    assert tuned and all(not c.answer and c.trials <= 6 for c in tuned)
    assert any(c.trials for c in tuned)
    for candidate in tuned:
        assert sum(c.operator == "tune" and c.generation == candidate.generation for c in search.lineage) == 1
    assert search.spent.cheap >= sum(c.trials for c in tuned) > 0


@pytest.mark.parametrize("design, kept", [("score", "allocation"), ("allocate", "score")])
def test_what_is_not_designed_stays_the_parents(tmp_path, fresh, design, kept):
    config = with_plan(
        small_config(tmp_path), design=design, operators={"explore": 1.0, "mutate": 1.0, "simplify": 1.0}
    )
    search = run(tmp_path, fresh, replace(config, generator=replace(config.generator, kind="grammar")))
    written = [c for c in search.lineage if c.operator != "seed" and c.algorithm is not None]
    assert len(written) > 3
    for candidate in written:
        parent = search.lineage[candidate.parents[0]].algorithm
        assert getattr(candidate.algorithm, kept) == getattr(parent, kept)


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


@pytest.mark.parametrize("budget", ["calls", "evaluations"])
def test_a_raised_budget_and_a_lost_checkpoint_change_nothing_that_was_done(tmp_path, fresh, budget):
    """What a smaller budget ended stays ended when the journal is replayed from its beginning."""
    import shutil

    from autoprune.pipeline.config import Budgets

    config = with_plan(
        small_config(tmp_path), operators=GENETIC, answers=5, prompts=2, rounds=2, candidates=3, generations=5
    )
    config = replace(config, generator=replace(config.generator, kind="genetic"))
    bounds = {"calls": (7, 30), "evaluations": (5, 12)}[budget]
    for bound in bounds:
        search = run(tmp_path, fresh, replace(config, budgets=Budgets(**{budget: bound})))
        search.measure([search.lineage.best().algorithm], "report")  # as the end of a run does
    whole, spent = without_clock(search.lineage), search.spent
    journaled = sum(split == "fitness" for _, split in set(fresh.measured))
    assert spent.evaluations == journaled <= (bounds[1] if budget == "evaluations" else 100)
    shutil.rmtree(tmp_path / "run" / "checkpoint")
    count = len(fresh.measured)
    again = run(tmp_path, fresh, replace(config, budgets=Budgets(**{budget: bounds[1]})))
    assert len(fresh.measured) == count, "nothing is measured again"
    assert without_clock(again.lineage) == whole
    assert (again.spent.answers, again.spent.evaluations) == (spent.answers, spent.evaluations)


def test_what_the_actors_lost_is_no_verdict(tmp_path, fresh, monkeypatch):
    """Seeds that were lost are measured when the search is resumed; a lost cheap measurement says nothing of masks."""
    from autoprune.actors.messages import Evaluation

    lost = Evaluation(None, 0, error="an actor died", lost=True)
    config = with_plan(small_config(tmp_path), operators={"mutate": 1.0, "tune": 1.0})
    with monkeypatch.context() as patched:
        patched.setattr(LocalEvaluator, "evaluate", lambda self, jobs, split: ((i, lost) for i in range(len(jobs))))
        with pytest.raises(InputError, match="none of the seeds could be measured .*an actor died"):
            run(tmp_path, fresh, config)
    real = LocalEvaluator.evaluate

    def flaky(self, jobs, split="fitness"):
        for index, evaluation in real(self, jobs, split):
            yield index, lost if split.startswith("fitness[") else evaluation

    with monkeypatch.context() as patched:
        patched.setattr(LocalEvaluator, "evaluate", flaky)
        search = run(tmp_path, fresh, config)
    stopped = [c for c in search.lineage if c.lost]
    assert stopped and all(c.status == "failed" and c.error == "an actor died" for c in stopped)
    assert any(c.operator == "tune" for c in search.lineage)
    hashes = [c.mask_hash for c in stopped]
    assert not any(c.repeats in {s.id for s in stopped} for c in search.lineage), "its masks may be tried again"
    assert hashes


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"seeds": ("wanda", "wanda")}, "search.seeds names wanda twice"),
        (
            {"fidelities": ("cheap", "probe")},
            "search.fidelities are cheap, probe: expected each once, probe before cheap",
        ),
        ({"cheap_windows": 8}, "search.cheap_windows is 8: expected less than data.fitness_windows"),
        ({"operators": {"tune": 1.0}}, "at least one beside tune"),
        (
            {"operators": {"tune": 1.0, "mutate": 1.0}, "fidelities": ("probe",)},
            "tune needs search.fidelities to have cheap",
        ),
        ({"operators": {"mutat": 1.0}}, "'mutat': expected explore or .*; mutate?"),
        ({"prompt": "gcott"}, "search.prompt is 'gcott'"),
        ({"design": "all"}, "search.design is 'all'"),
        ({"niche_radius": 1.5}, "search.niche_radius is 1.5"),
        ({"repairs": -1}, "search.repairs is -1"),
    ],
)
def test_plans_that_cannot_run_are_refused_in_one_line(settings, message):
    from autoprune.pipeline.config import Config, SearchPlan, check_config

    with pytest.raises(InputError, match=message) as refusal:
        check_config(Config(search=SearchPlan(**settings)))
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    "section, settings, message",
    [
        ("budgets", {"calls": -1}, "budgets.calls is -1"),
        ("budgets", {"wall_clock": float("nan")}, "budgets.wall_clock is nan"),
        ("budgets", {"evaluations": 2}, "budgets.evaluations is 2: expected at least 5, the seeds"),
        ("generator", {"max_tokens": 4096}, "generator.max_tokens is 4096: expected less than generator.max_model_len"),
        ("generator", {"temperature": -1.0}, "generator.temperature is -1"),
    ],
)
def test_values_that_cannot_run_are_refused_in_one_line(section, settings, message):
    from autoprune.pipeline.config import Config, check_config

    with pytest.raises(InputError, match=message):
        check_config(replace(Config(), **{section: replace(getattr(Config(), section), **settings)}))
