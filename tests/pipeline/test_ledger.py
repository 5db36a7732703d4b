"""What was asked and measured is paid for once, and counts as spent when the search comes to it."""

import time
from dataclasses import replace

import pytest

from autoprune.actors.messages import Answer, Evaluation, Probe, Request
from autoprune.algorithms.algorithm import Algorithm
from autoprune.models.errors import InputError, Lost
from autoprune.pipeline.checkpoint import Journal, journal_line
from autoprune.pipeline.config import Budgets
from autoprune.pipeline.ledger import Ledger

ONE, TWO = Algorithm("def score(W):\n    return W.abs()"), Algorithm("def score(W):\n    return W.square()")
REQUEST = Request((("user", "write"),), n=2, temperature=1.0, max_tokens=10)


class Counted:
    """Writes and measures; says how often."""

    def __init__(self):
        self.asked, self.measured, self.poison = 0, [], False

    def generate(self, requests, answered):
        self.asked += 1
        return [[Answer("a", 100, 7)] * request.n for request in requests]

    def probe(self, algorithms):
        self.measured += [(algorithm.key, "probe") for algorithm in algorithms]
        return [Probe("given up", poison=True, traceback="pid 8") if self.poison else Probe(None)] * len(algorithms)

    def evaluate(self, jobs, split="fitness"):
        for index in reversed(range(len(jobs))):
            self.measured.append((jobs[index].key, split))
            if self.poison:
                yield index, Evaluation(None, 0, error="given up", poison=True, traceback="pid 7")
            else:
                yield index, Evaluation(1.0 + index, 10, seconds=2.0)


@pytest.fixture
def make(tmp_path):
    worker = Counted()

    def new(**budgets):
        return Ledger(tmp_path, worker, worker, Budgets(**budgets))

    new.worker = worker
    return new


def test_answers_and_measurements_are_paid_for_once(make):
    for _ in range(2):
        ledger = make()
        texts = ledger.answers((1, 0, "round"), lambda: [REQUEST, replace(REQUEST, n=1)])
        assert [len(text) for text in texts] == [2, 1]
        first, again, second = ledger.measure([ONE, ONE, TWO], "fitness")
        assert first == again and (first.nll, second.nll) == (1.0, 2.0)
        ledger.measure([ONE], "fitness[0]")
        ledger.measure([ONE], "report")
        spent = ledger.spent
        assert (spent.answers, spent.prompt_tokens, spent.completion_tokens) == (3, 200, 21)
        assert (spent.evaluations, spent.cheap, spent.gpu_seconds) == (2, 1, 8.0)
    assert make.worker.asked == 1 and len(make.worker.measured) == 4


def test_what_was_answered_before_a_search_was_stopped_is_not_asked_again(make):
    asked = [replace(REQUEST, offset=offset, n=1 + offset % 2) for offset in range(4)]
    seen = []

    def stopped(requests, answered):
        answered(2, [Answer("early", 100, 7)])
        answered(1, [Answer("other", 100, 7)] * 2)
        raise KeyboardInterrupt

    make.worker.generate = stopped
    ledger = make()
    with pytest.raises(KeyboardInterrupt):
        ledger.answers((1, 0, "round"), lambda: asked)
    assert ledger.spent.answers == 0 and ledger.asked(1, 0), "it counts as a whole, and whatever the budgets say"

    def rest(requests, answered):
        seen.extend(requests)
        return [[Answer("late", 100, 7)] * request.n for request in requests]

    make.worker.generate = rest
    changed = [*asked[:3], replace(asked[3], temperature=0.5)]
    again = make()
    texts = again.answers((1, 0, "round"), lambda: changed)
    assert seen == [asked[0], changed[3]], "another question under the same number is another one"
    assert [text[0].text for text in texts] == ["late", "other", "early", "late"]
    assert [len(text) for text in texts] == [1, 2, 1, 2] and again.spent.answers == 6
    assert make().answers((1, 0, "round"), lambda: []) == texts and len(seen) == 2


def test_what_the_search_has_not_come_to_is_not_spent(make):
    ledger = make()
    ledger.answers((1, 0, "round"), lambda: [REQUEST])
    used = ledger.used
    ledger.measure([ONE, TWO], "fitness")
    again = make(evaluations=2)
    again.restore(used, 12.0, 1)
    assert again.spent.answers == 2 and again.spent.evaluations == 0 and again.left("evaluations") == 2
    again.measure([TWO], "fitness")
    assert again.left("evaluations") == 1 and again.spent.total == 12.0 + again.spent.evaluating
    assert again.asked(1, 0) and not again.asked(1, 1)


@pytest.mark.parametrize(
    "budget, bound, other", [("calls", 2, 3), ("tokens", 114, 115), ("evaluations", 1, 2), ("gpu_seconds", 2.0, 2.1)]
)
def test_each_budget_is_used_up_at_its_bound(make, budget, bound, other):
    for value, ends in ((bound, True), (other, False), (0, False)):
        ledger = make(**{budget: value})
        ledger.answers((1, 0, "round"), lambda: [REQUEST])
        ledger.measure([ONE], "fitness")
        assert (ledger.exhausted() is not None) == ends
        if ends:
            assert ledger.exhausted() == f"{budget} ({bound:g})" and ledger.left(budget) == 0
            assert f"of {bound:,.0f}" in ledger.line()


def test_the_time_of_what_a_killed_sitting_did_after_its_last_checkpoint_counts(make, tmp_path):
    make().measure([ONE], "fitness")
    journal = tmp_path / "journal.jsonl"
    (record,) = Journal(journal)
    journal.write_bytes(journal_line(record | {"seconds": 3600.0}))
    again = make(wall_clock=3000)
    assert again.exhausted() is None, "the search has not come to it"
    again.measure([ONE], "fitness")
    assert again.exhausted() == "wall_clock (3000)" and 3600 <= again.spent.total < 3610
    restored = make()
    restored.restore([], 3700.0, 1)  # the record was there, and was not used yet
    restored.measure([ONE], "fitness")
    assert restored.spent.total == 3700.0, "it is in what the checkpoint says"


def test_answers_that_were_written_beside_a_measurement_take_no_time_of_their_own(make, tmp_path):
    ledger = make()
    ledger.ask_ahead((2, 0, "round"), lambda: [REQUEST])
    ledger.answers((2, 0, "round"), list)
    journal = tmp_path / "journal.jsonl"
    journal.write_bytes(b"".join(journal_line(record | {"seconds": 3600.0}) for record in Journal(journal)))
    again = make()
    again.answers((2, 0, "round"), list)
    assert again.spent.answers == 2 and again.spent.total == 3600.0, "what was waited for them does"
    assert [record["kind"] for record in again.records] == ["begun", "answers", "waited"]


def test_what_brought_evaluators_down_is_not_tried_again(make):
    make.worker.poison = True
    (first,) = make().measure([ONE], "fitness")
    make.worker.poison = False
    again = make()
    assert again.measure([ONE], "fitness") == [first] and first.poison and len(make.worker.measured) == 1
    assert again.traceback(ONE.key) == "pid 7" and again.traceback(TWO.key) == ""


def test_a_probe_that_brought_evaluators_down_is_not_tried_again(make):
    make.worker.poison = True
    first = make().probe([ONE, ONE])
    make.worker.poison = False
    again = make()
    assert again.probe([TWO, ONE]) == [Probe(None), first[0]] and first[0].poison and first[0] == first[1]
    assert make.worker.measured == [(ONE.key, "probe"), (TWO.key, "probe")], "each once"
    assert again.traceback(ONE.key) == "pid 8" and again.spent.cheap == 0


def test_a_traceback_is_found_whatever_text_it_was_of(make):
    make.worker.poison = True
    make().measure([ONE], "fitness[0,1]")
    assert make().traceback(ONE.key) == "pid 7" and make().seconds(ONE.key) == 0.0


def test_answers_to_other_prompts_are_refused(make):
    make().begin([1.0], {}, "v1")
    make().begin([1.0], {}, "v1")
    with pytest.raises(InputError, match="was begun with prompts v1, and these are v2"):
        make().begin([1.0], {}, "v2")


def test_a_generation_that_ended_asks_nothing_more(make):
    ledger = make()
    ledger.answers((1, 0, "round"), lambda: [REQUEST])
    ledger.end(1, ["a", "b"])
    again = make()
    assert again.ended(1) == ["a", "b"] and again.ended(2) is None
    assert again.answers((1, 1, "round"), lambda: [REQUEST]) == [] and make.worker.asked == 1
    assert again.answers((2, 0, "round"), lambda: [REQUEST]) and make.worker.asked == 2
    again.end(1, ["c"])
    assert make().ended(1) == ["a", "b"], "what was chosen stays chosen"


def test_one_case_on_the_report_split_is_no_cheap_measurement(make):
    ledger = make()
    ledger.measure([ONE], "report@1")
    ledger.measure([ONE], "probe")
    assert ledger.spent.cheap == 1


def test_records_between_those_that_were_used_are_not_spent(make):
    ledger = make()
    for algorithm in (ONE, TWO):
        ledger.measure([algorithm], "fitness")
    again = make()
    again.measure([TWO], "fitness")
    third = make()
    third.restore(again.used, 0.0, 2)
    assert third.spent.evaluations == 1
    assert third.measure([TWO], "fitness") and third.spent.evaluations == 1
    assert third.measure([ONE], "fitness") and third.spent.evaluations == 2


def test_looks_at_the_report_split_are_as_many_as_winners(make):
    ledger = make()
    assert [ledger.look(key) for key in ("one", "one", "two", "one")] == [1, 1, 2, 2]
    assert make().look("three") == 3, "also those of earlier sittings"


def test_a_search_that_is_stopped_waits_for_no_storage(make):
    """Whose answer another thread waits for."""
    ledger = make()
    with ledger._writing:
        began = time.monotonic()
        ledger.close(hurry=True)
        assert time.monotonic() - began < 2
    with pytest.raises(Lost, match="has ended"):
        ledger.measure([ONE], "fitness")
