"""Prompts offer few statistics: the parents', and rather those that were hardly tried."""

import random
from collections import Counter
from dataclasses import replace

import pytest
from local import LocalEvaluator, local_search, small_config

from autoprune.algorithms.algorithm import Algorithm
from autoprune.pipeline.focus import focus, tried
from autoprune.pipeline.lineage import Candidate, Lineage

OFFERED = ("x_norm", "x_mean", "x_std", "g_rms")


def score(*names: str) -> Algorithm:
    return Algorithm(f"def score({', '.join(('W', *names))}):\n    return W.abs() * {' * '.join(names) or '1.0'}\n")


@pytest.fixture
def lineage():
    lineage = Lineage()
    for index, names in enumerate([("x_norm",)] * 8 + [("x_norm", "x_std"), ("x_mean",)]):
        candidate = Candidate(f"c{index}", 0, "seed", algorithm=score(*names), mask_hash=f"{index}")
        candidate.status = "screened"
        lineage.add(candidate)
    lineage.add(Candidate("r", 1, "mutate", ("c0",), score("g_rms"), mask_hash="0", status="repeat"))
    lineage.add(Candidate("i", 1, "mutate", ("c0",), None, status="invalid"))
    return lineage


def drawn(lineage, operator, *parents) -> Counter:
    rng = random.Random(0)
    return Counter(focus(rng, lineage, operator, [score(*p) for p in parents], OFFERED) for _ in range(400))


def test_different_masks_count_and_repeats_do_not(lineage):
    assert tried(lineage) == {"x_norm": 9, "x_std": 1, "x_mean": 1}


@pytest.mark.parametrize("operator", ["simplify", "crossover"])
def test_what_the_parents_read_is_enough_to_join_or_to_simplify_them(lineage, operator):
    assert set(drawn(lineage, operator, ("x_norm",), ("g_rms", "x_mean"))) == {("x_norm", "x_mean", "g_rms")}


@pytest.mark.parametrize("operator, parents", [("mutate", [("x_norm",)]), ("crossover", [("x_norm",), ("x_norm",)])])
def test_one_more_is_offered_to_change_something(lineage, operator, parents):
    found = drawn(lineage, operator, *parents)
    assert set(found) == {("x_norm", "x_mean"), ("x_norm", "x_std"), ("x_norm", "g_rms")}
    assert found["x_norm", "g_rms"] > 1.5 * found["x_norm", "x_mean"], "it was never tried"


def test_explorations_are_offered_what_was_hardly_tried(lineage):
    found = drawn(lineage, "explore", ("x_norm",))
    assert all(len(names) == 2 and list(names) == [n for n in OFFERED if n in names] for names in found)
    assert sum(count for names, count in found.items() if "x_norm" in names) < 0.2 * found.total()


def test_what_promises_more_is_offered_more_often(lineage):
    rng, found = random.Random(0), Counter()
    for _ in range(400):
        promise = {"x_mean": -0.1, "g_rms": 0.1}
        found[focus(rng, lineage, "mutate", [score("x_norm")], OFFERED, promise)] += 1
    assert found["x_norm", "x_mean"] > 4 * found["x_norm", "x_std"] > 4 * found["x_norm", "g_rms"] / 2
    never = focus(
        random.Random(0), lineage, "mutate", [score("x_norm")], OFFERED, {"x_mean": -1e9, "g_rms": float("inf")}
    )
    assert never == ("x_norm", "x_mean"), "no overflow"


def test_where_everything_is_read_nothing_more_is_offered(lineage):
    assert set(drawn(lineage, "mutate", OFFERED)) == {OFFERED}


@pytest.mark.parametrize("diversity", [True, False])
def test_prompt_grammar_and_request_offer_the_same(tmp_path, tiny_model, diversity):
    config = small_config(tmp_path)
    plan = replace(config.search, diversity=diversity, operators={"explore": 1.0}, prompts=3, answers=3)
    search = local_search(tmp_path, LocalEvaluator(tiny_model, 0.5), replace(config, search=plan))
    search.run()
    offered = set()
    for slot in search.prompter.slots(2, 0):
        request = search.prompter.request(slot, 1, 0, 0)
        assert request.statistics == slot.statistics
        assert f"def score(W, {', '.join(slot.statistics)}):" in slot.messages[0][1]
        for name in plan.statistics:
            assert (f'"{name}' in request.grammar) == (name in slot.statistics)
        offered.add(slot.statistics)
    assert offered == {plan.statistics} if not diversity else all(len(names) == 2 for names in offered)
