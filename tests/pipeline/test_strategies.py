"""Strategies over the Protocols: operators, fidelities, budgets, baselines, and plans that cannot run."""

import json
import shutil
from dataclasses import replace

import pytest
from local import LocalEvaluator, finished, local_search, small_config, without_clock

from autoprune.actors.messages import Evaluation
from autoprune.models.errors import InputError
from autoprune.pipeline.asking import stored_lineage
from autoprune.pipeline.config import Budgets, Config, SearchPlan, check_config


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
    lineage = search.lineage
    screened = [c for c in lineage if c.status == "screened"]
    assert screened and all(c.rival in lineage for c in screened)
    for candidate in lineage:
        if candidate.operator == "seed" or candidate.algorithm is None:
            continue
        own = [
            split.partition("[")[0] + "[" * ("[" in split)
            for k, split in fresh.measured
            if k == candidate.algorithm.key
        ]
        assert own in (
            ["probe"],
            ["probe", "fitness["],
            ["probe", "fitness[", "fitness"],
            ["probe", "fitness[", "fitness", "fresh"],
        ) or candidate.status in ("repeat", "invalid")
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
    "budget, bound", [("calls", 5), ("tokens", 1), ("evaluations", 4), ("gpu_seconds", 4.0), ("wall_clock", 1e-9)]
)
def test_a_budget_ends_the_search_cleanly_and_a_larger_one_goes_on(tmp_path, fresh, budget, bound):

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
    if budget == "wall_clock":  # it ended before anything was cut short
        assert without_clock(again.lineage) == whole


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


def test_an_answer_that_is_too_long_to_be_repaired_takes_no_others_place(tmp_path, fresh):
    broken = "Hypothesis: x\ndef score(W, x_norm):\n    return W.abs() * y\n"
    mended = "Hypothesis: y\ndef score(W, x_norm):\n    return W.abs() * (x_norm + 1)\n"
    (tmp_path / "answers.txt").write_text("\n---\n".join((broken + "# " + 5000 * "z", broken, mended)))
    plan = {"prompts": 1, "answers": 2, "rounds": 1, "generations": 1, "repairs": 1, "operators": {"explore": 1.0}}
    config = with_plan(small_config(tmp_path), fidelities=(), **plan)
    config = replace(config, generator=replace(config.generator, answers=str(tmp_path / "answers.txt")))
    _, second, third = (c for c in run(tmp_path, fresh, config).lineage if c.operator != "seed")
    assert third.operator == "repair" and third.parents[-1] == second.id


def test_parents_that_are_too_long_for_the_context_end_no_search(tmp_path, fresh):
    answer = "Hypothesis: x\ndef score(W, x_norm, x_std):\n    return W.abs() * (x_norm + {} * x_std)\n"
    (tmp_path / "answers.txt").write_text("\n---\n".join(answer.format(f"0.{n}7071") for n in range(1, 9)))
    config = with_plan(small_config(tmp_path), operators={"crossover": 1.0, "mutate": 1.0})
    config = replace(config, generator=replace(config.generator, kind="vllm", answers=str(tmp_path / "answers.txt")))
    search = local_search(tmp_path, fresh, config)
    search.prompter._count = lambda messages: 10**6 if any("7071" in text for _, text in messages) else 10
    search.run()
    written = [c for c in search.lineage if c.operator != "seed"]
    assert len(written) > 4 and any(c.status == "evaluated" for c in written)
    assert all("7071" not in search.lineage[parent].algorithm.score for c in written for parent in c.parents)


def test_a_raised_budget_forgets_who_was_best_before(tmp_path, fresh):
    config = with_plan(small_config(tmp_path), operators={"mutate": 1.0}, generations=5)
    config = replace(config, generator=replace(config.generator, kind="grammar"))
    first = run(tmp_path, fresh, replace(config, budgets=Budgets(evaluations=4)))
    assert any(c.fresh for c in first.lineage)
    search = local_search(tmp_path, fresh, replace(config, budgets=Budgets(evaluations=100)))
    search.tracker.generation = lambda *_: told.append(any(c.fresh for c in stored_lineage(tmp_path / "run")))
    told = []
    search.run()
    assert told[0] and not told[-1] and any(c.fresh for c in search.lineage)


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


@pytest.mark.parametrize("kind", ["genetic", "scripted"])
@pytest.mark.parametrize("budget", ["calls", "evaluations"])
def test_a_raised_budget_and_a_lost_checkpoint_change_nothing_that_was_done(tmp_path, fresh, budget, kind):
    """What a smaller budget ended stays ended when the journal is replayed from its beginning."""

    config = with_plan(
        small_config(tmp_path), operators=GENETIC, answers=5, prompts=2, rounds=2, candidates=3, generations=5
    )
    config = replace(config, generator=replace(config.generator, kind=kind))
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


def test_what_brings_evaluators_down_is_poison_in_every_run(tmp_path, fresh, monkeypatch):
    """Its masks are not tried again, it is told of as a failure, and a resumed search says the same of it."""
    poison = Evaluation(None, 0, error="given up", poison=True, traceback="pid 7")
    config = with_plan(small_config(tmp_path), operators={"mutate": 1.0, "tune": 1.0}, answers=8)
    real = LocalEvaluator.evaluate

    def breaking(self, jobs, split="fitness"):
        for index, evaluation in real(self, jobs, split):
            yield index, poison if split.startswith("fitness[") else evaluation

    with monkeypatch.context() as patched:
        patched.setattr(LocalEvaluator, "evaluate", breaking)
        search = run(tmp_path, fresh, config)
    stopped = [c for c in search.lineage if c.status == "poison"]
    assert stopped and all(c.error == "given up" for c in stopped)
    hashes = [c.mask_hash for c in stopped if c.operator != "tune"]
    assert len(set(hashes)) == len(hashes)
    assert any(c.repeats in {s.id for s in stopped} for c in search.lineage)
    assert "pid" not in json.dumps(search.lineage.to_dict())
    again = run(tmp_path, fresh, config)
    assert without_clock(again.lineage) == without_clock(search.lineage)


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

    with pytest.raises(InputError, match=message):
        check_config(replace(Config(), **{section: replace(getattr(Config(), section), **settings)}))
