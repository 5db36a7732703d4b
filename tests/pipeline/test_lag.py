"""With a lag the language model writes while candidates are measured, and timing changes nothing."""

import threading
import time
from dataclasses import replace

import pytest
from local import LocalEvaluator, local_search, small_config, without_clock

from autoprune.models.errors import InputError, Lost
from autoprune.pipeline.config import Budgets, Config, Generator, SearchPlan, check_config


class Watched:
    """Passes requests on; says at which generation's measuring they came, and takes its time where told to."""

    def __init__(self, generator, evaluator, delay):
        self._generator, self._evaluator, self._delay = generator, evaluator, delay
        self.threads = []

    def generate(self, requests, answered):
        self.threads.append(threading.current_thread() is threading.main_thread())
        if self._delay == "after":  # not before everything of the generation is measured
            count = -1
            while count != (count := len(self._evaluator.measured)):
                time.sleep(0.3)
        return self._generator.generate(requests, answered)

    def __getattr__(self, name):
        return getattr(self._generator, name)


def test_an_engine_that_sleeps_while_evaluators_measure_cannot_write_meanwhile():
    sleeping = Config(generator=Generator(sleeps=True))
    check_config(sleeping)
    with pytest.raises(InputError, match="search.lag and generator.sleeps exclude each other"):
        check_config(replace(sleeping, search=SearchPlan(lag=1)))


def lagged(folder, evaluator, delay="", lag=1, **budgets):
    config = small_config(folder)
    plan = replace(config.search, lag=lag, generations=4, rounds=2)
    search = local_search(folder, evaluator, replace(config, search=plan, budgets=Budgets(**budgets)))
    search.generator = search.ledger.generator = Watched(search.generator, evaluator, delay)
    return search


def test_prompts_know_the_generation_before_last_and_timing_changes_nothing(tmp_path, tiny_model):
    graphs = []
    for index, delay in enumerate(("", "after")):
        search = lagged(tmp_path / str(index), LocalEvaluator(tiny_model, 0.5), delay)
        search.run()
        graphs.append(without_clock(search.lineage))
        assert search.generator.threads.count(False) == 3, "one generation in advance, but for the first"
        for candidate in search.lineage:
            known = [search.lineage[p].generation for p in candidate.parents]
            if candidate.operator not in ("seed", "repair"):
                assert all(generation in (0, *range(candidate.generation - 1)) for generation in known)
    assert graphs[0] == graphs[1]
    other = lagged(tmp_path / "other", LocalEvaluator(tiny_model, 0.5), lag=0)
    other.run()
    assert all(other.generator.threads) and without_clock(other.lineage) != graphs[0]


@pytest.mark.parametrize("budget", [{}, {"calls": 9}, {"evaluations": 7}])
def test_killed_at_any_moment_it_ends_as_if_nothing_had_been(tmp_path, tiny_model, budget):
    whole = lagged(tmp_path / "whole", LocalEvaluator(tiny_model, 0.5), **budget)
    whole.run()
    asked = len([r for r in whole.ledger.records if r["kind"] == "answers"])
    evaluator = LocalEvaluator(tiny_model, 0.5)
    measured, written = len(whole.evaluator.measured), 0
    for stop in [*range(2, measured, 4), None]:
        evaluator.die_after = stop
        search = lagged(tmp_path / "runs", evaluator, **budget)
        try:
            search.run()
        except KeyboardInterrupt:
            for ahead in search.ledger._ahead.values():  # a thread of a process that was killed would write no more
                ahead.wait()
        written += len(search.generator.threads)
    assert without_clock(search.lineage) == without_clock(whole.lineage)
    assert len(evaluator.measured) == measured and written == asked, "nothing was measured or asked for twice"
    assert search.spent.answers == whole.spent.answers


def test_what_goes_wrong_in_advance_ends_the_search_when_it_is_needed(tmp_path, tiny_model):
    search = lagged(tmp_path, LocalEvaluator(tiny_model, 0.5))
    real = search.generator.generate

    def dying(requests, answered):
        if threading.current_thread() is not threading.main_thread():
            raise Lost("vLLM stopped serving")
        return real(requests, answered)

    search.generator.generate = dying
    with pytest.raises(Lost, match="stopped serving"):
        search.run()
    assert {c.generation for c in search.lineage} == {0, 1}
