"""What one more statistic does to a score is measured, told, and decides what is offered."""

import json
import math
import random
from collections import Counter
from dataclasses import replace

import pytest
import torch
from local import LocalEvaluator, local_search, small_config, without_clock

from autoprune.actors.messages import Answer
from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.given import givens, in_full
from autoprune.algorithms.language import parse
from autoprune.algorithms.scores import BASELINES
from autoprune.algorithms.vocabulary import STATISTICS
from autoprune.pipeline.trials import FORMS, Trial, promises, trial_lines, trials


@pytest.mark.parametrize("name", BASELINES)
def test_a_trial_is_the_score_with_one_more_statistic_and_nothing_else(name):
    parent = Algorithm(parse(BASELINES[name].source).source, BASELINES[name].group)
    torch.manual_seed(0)
    W = torch.randn(6, 8)
    values = {n: torch.rand(s.shape(6, 8)) + 0.1 for n, s in STATISTICS.items()}
    values["x_mean"] -= 0.5
    program = parse(parent.score)
    own = program(W, values)
    found = trials(parent, tuple(STATISTICS))
    assert len(found) == len(FORMS) * (len(STATISTICS) - len(program.reads))
    for trial in found:
        program = parse(trial.algorithm.score)
        assert trial.statistic in program.reads and trial.algorithm.group == parent.group
        x = values[trial.statistic].abs()
        wanted = {"m0 *": own * x, "m0 /": own / (x + 1e-6)}[trial.form[:4]]
        if "sqrt" in trial.form:
            wanted = own * x.sqrt()
        torch.testing.assert_close(program(W, values), wanted)


def test_scores_that_are_no_programs_have_no_trials():
    assert trials(Algorithm("sparsegpt"), ("x_norm",)) == []


def made(statistic, effect, form="S * x") -> Trial:
    return Trial(statistic, form, Algorithm(""), effect)


def test_the_best_form_speaks_for_a_statistic_and_only_what_is_better_and_offered_is_told():
    measured = [made("a", 0.1), made("a", -0.2, "S / a"), made("b", -0.1), made("c", None), made("d", 0.3)]
    assert promises(measured) == {"a": -0.2, "b": -0.1, "d": 0.3}
    assert trial_lines(measured, ("a", "b", "d"), 3) == ["- S / a: -0.200", "- S * x: -0.100"]
    assert trial_lines(measured, ("b",), 3) == ["- S * x: -0.100"] and trial_lines(measured, ("a", "b"), 1) == [
        "- S / a: -0.200"
    ]


def with_plan(config, **plan):
    return replace(config, search=replace(config.search, **plan))


def test_prompts_tell_what_was_measured(tmp_path, tiny_model):
    evaluator = LocalEvaluator(tiny_model, 0.5)
    search = local_search(tmp_path, evaluator, with_plan(small_config(tmp_path), operators={"mutate": 1.0}))
    search.run()
    told = [c for c in search.lineage if "Measured on a short text" in c.prompt]
    assert told, "some statistic helps a random model by chance"
    parent = search.lineage[told[0].parents[0]]
    measured = search._tried(parent)
    (here,) = search.measure([parent.algorithm], "probe")
    for trial in measured:
        (there,) = search.measure([trial.algorithm], "probe")
        assert trial.effect == there.nll - here.nll
    shown = [line for line in told[0].prompt.splitlines() if line.startswith("- m0 ")]
    assert set(shown) <= {f"- {t.form}: {t.effect:+.3f}" for t in measured if t.effect < 0}


def test_the_score_that_is_changed_is_rather_one_that_promises_more(tmp_path, tiny_model, monkeypatch):
    search = local_search(tmp_path, LocalEvaluator(tiny_model, 0.5))
    search.run()
    best = search.prompter.elites()
    last = best[-1]
    promise = 2 * (last.fitness - best[0].fitness) + 0.4  # half of it counts

    def tried(candidate):
        return [made("x_std", -promise if candidate is last else 0.1)]

    monkeypatch.setattr(search.prompter, "_tried", tried)
    rng = random.Random(0)
    focal = Counter(search.prompter._focal(rng, ("nobody",)) for _ in range(200))
    assert focal[(last.id,)] > 150 and ("nobody",) not in focal
    monkeypatch.setattr(search.prompter, "_tried", lambda _: [])
    assert search.prompter._focal(rng, ("nobody",)) == ("nobody",)


@pytest.mark.parametrize("change", ["off", "no probe", "genetic", "topk"])
def test_who_does_not_read_or_want_them_pays_for_none(tmp_path, tiny_model, change):
    config = small_config(tmp_path)
    plans = {"off": {"trials": False}, "no probe": {"fidelities": ("cheap",)}, "topk": {"prompt": "topk"}}
    config = with_plan(config, **plans.get(change, {}))
    if change == "genetic":
        config = replace(config, generator=replace(config.generator, kind="genetic"))
    search = local_search(tmp_path, LocalEvaluator(tiny_model, 0.5), config)
    search.run()
    assert not any("Measured on a short text" in candidate.prompt for candidate in search.lineage)
    known = {c.algorithm.key for c in search.lineage if c.algorithm}
    probed = [key for key, split in search.evaluator.measured if split == "probe"]
    regrouped = 2 * len(search.lineage)
    assert len(set(probed) - known) <= regrouped and len(probed) < 60


def test_a_search_with_trials_that_is_stopped_goes_on_the_same(tmp_path, tiny_model):
    evaluator = LocalEvaluator(tiny_model, 0.5)
    whole = local_search(tmp_path / "whole", evaluator)
    whole.run()
    total = len(evaluator.measured)
    for death in (total // 3, total // 2):
        evaluator.measured, evaluator.die_after = [], death
        with pytest.raises(KeyboardInterrupt):
            local_search(tmp_path / f"{death}", evaluator).run()
        evaluator.die_after = None
        again = local_search(tmp_path / f"{death}", evaluator)
        again.run()
        assert without_clock(again.lineage) == without_clock(whole.lineage) and len(evaluator.measured) == total
    assert math.isfinite(json.loads((whole.folder / "lineage.json").read_text())["candidates"][0]["evaluation"]["nll"])


def test_answers_build_on_the_scores_of_their_parents_by_name(tmp_path, tiny_model):
    """Who reads is given them, wherever a score is changed or two are joined; who does not read is not."""
    plan = {"operators": {"mutate": 1.0, "crossover": 1.0}, "design": "score"}
    search = local_search(tmp_path, LocalEvaluator(tiny_model, 0.5), with_plan(small_config(tmp_path), **plan))
    search.run()
    slots = [slot for generation in range(20) for slot in search.prompter.slots(generation, 0)]
    assert {slot.operator: slot.given for slot in slots} == {"mutate": 1, "crossover": 2}
    for slot in slots:
        words, grammar = slot.text, search.prompter.request(slot, 1, 0, 0).grammar
        starts = "    m0 = S" + "\n    m1 = T" * (slot.given - 1)
        assert starts in words and starts.replace("\n", "\\n") in grammar
        assert "In the answer S is what step" in words and ("T what step" in words) == (slot.given == 2)
        parents = [search.lineage[name].algorithm.score for name in slot.parents]
        answer = Answer(f"def score(W, x_norm):\n{starts}\n    return m0 * x_norm\n")
        candidate = search.read("new", 1, slot, answer)
        assert candidate.algorithm.score == parse(in_full(answer.text, givens(*parents))).source
    genetic = replace(search.config, generator=replace(search.config.generator, kind="genetic"), name="other")
    other = local_search(tmp_path, search.evaluator, genetic)
    other.run()
    assert all(slot.given == 0 for generation in range(10) for slot in other.prompter.slots(generation, 0))
