"""Fitness over several cases: in nats above each dense model, of the worst case or their mean."""

import json
import threading
from dataclasses import replace

import pytest
from local import local_search, small_config

from autoprune.actors.messages import Evaluation
from autoprune.models.errors import InputError, Lost
from autoprune.pipeline.asking import reasoning_lines
from autoprune.pipeline.config import Further, Target, check_config, load_config
from autoprune.pipeline.screening import subset_nll
from autoprune.pipeline.targets import Case, Cases, combine
from autoprune.pipeline.wording import of_cases, perplexity_text


def evaluation(*nlls, errors=(0.1, 0.5), **more):
    return Evaluation(sum(nlls) / len(nlls), 10 * len(nlls), nlls, (0.5,), errors, 0.5, 1.0, **more)


@pytest.mark.parametrize("worst, nll, windows, last", [(True, 2.5, (2.0, 3.0), 0.9), (False, 1.5, (1.5, 1.5), 0.7)])
def test_cases_are_combined_window_by_window(worst, nll, windows, last):
    found = combine([evaluation(2.0, 0.0), evaluation(1.0, 3.0, 5.0, errors=(0.3, 0.9))], worst)
    assert found.nll == nll and found.window_nlls == windows
    assert found.block_errors == pytest.approx((0.1, last))
    assert found.tokens == 50 and found.seconds == 2.0


def test_what_fails_in_one_case_fails():
    broken = Evaluation(None, 0, error="not finite", seconds=0.5)
    found = combine([evaluation(1.0), broken], worst=True)
    assert found.nll is None and found.error == "not finite" and found.seconds == 1.5


class Pool:
    """Two windows of dense NLL 2 and 3 (in all cases), and pruned ones that grow with the sparsity."""

    dense = {"fitness": evaluation(2.0, 3.0), "report": evaluation(2.2, 3.2)}
    room = 1

    def evaluate(self, jobs, split="fitness", sparsity=None):
        for index in reversed(range(len(jobs))):
            yield index, evaluation(*(n + sparsity for n in ((3.0,) if "[" in split else (2.0, 3.0))))


def test_every_case_is_measured_against_its_own_dense_model():
    cases = Cases([Case(Pool(), 0.5, "a"), Case(Pool(), 0.7, "b")], worst=True)
    assert cases.dense["fitness"].nll == cases.dense["report"].nll == 0.0
    found = dict(cases.evaluate(["x", "y"]))
    assert {i: e.nll for i, e in found.items()} == pytest.approx({0: 0.7, 1: 0.7})
    (one,) = (e for _, e in cases.evaluate(["x"], "fitness[1]"))
    assert one.nll == pytest.approx(0.7), "a window against the same window"
    (plain,) = (e for _, e in cases.evaluate(["x"], "report@0"))
    assert plain.nll == pytest.approx(3.0), "one case alone is in nats as such"


class Meeting(Pool):
    """Measures nothing before another pool is asked, too; notes what it is asked for."""

    room = 8

    def __init__(self, barrier):
        self._barrier, self.asked = barrier, []

    def evaluate(self, jobs, split="fitness", sparsity=None):
        self.asked.append((list(jobs), sparsity))
        self._barrier.wait()
        for index, found in super().evaluate(jobs, split, sparsity):
            yield index, Evaluation(None, 0, error=f"not at {sparsity}") if jobs[index] == "bad" else found


def test_pools_measure_side_by_side_and_what_failed_in_a_case_is_spared_the_others_of_its_pool():
    barrier = threading.Barrier(2, timeout=30)
    first, second = Meeting(barrier), Meeting(barrier)
    cases = Cases([Case(first, 0.7, "a"), Case(second, 0.5, "b"), Case(first, 0.6, "c"), Case(second, 0.4, "d")], True)
    jobs = ["bad", *range(17)]
    found = list(cases.evaluate(jobs))
    assert [index for index, _ in found] == list(range(18))
    assert found[0][1].error == "not at 0.7", "of the first case that it failed in, whichever came first"
    assert [e.nll for _, e in found[1:]] == pytest.approx([0.7] * 17)
    assert first.asked == [(jobs[:16], 0.7), (jobs[1:16], 0.6), (jobs[16:], 0.7), (jobs[16:], 0.6)], "twice the room"
    assert [sparsity for _, sparsity in second.asked] == [0.5, 0.4, 0.5, 0.4]


def test_what_ends_one_pool_ends_the_search():
    class Ends(Pool):
        def evaluate(self, jobs, split="fitness", sparsity=None):
            raise Lost("gone")

    with pytest.raises(Lost, match="gone"):
        list(Cases([Case(Pool(), 0.7, "a"), Case(Ends(), 0.5, "b")], worst=True).evaluate(["x"]))


@pytest.mark.parametrize("how", ["worst", "mean"])
def test_a_search_over_two_sparsities(tmp_path, evaluator, how, monkeypatch):
    config = small_config(tmp_path)
    config = replace(config, target=replace(config.target, further=(Further("", 0.7),), combine=how))
    cases = Cases([Case(evaluator, 0.5, "half"), Case(evaluator, 0.7, "more")], worst=how == "worst")
    search = local_search(tmp_path, cases, config)
    search.run()
    best = search.lineage.best()
    own = [next(iter(evaluator.evaluate([best.algorithm], "fitness", s)))[1].window_nlls for s in (0.5, 0.7)]
    join = max if how == "worst" else lambda values: sum(values) / 2
    dense = evaluator.dense["fitness"].window_nlls
    above = [join([a - d for a in pair]) for pair, d in zip(zip(*own, strict=True), dense, strict=True)]
    assert best.fitness == pytest.approx(sum(above) / 4, abs=1e-6)
    (whole,) = search.measure([best.algorithm], "fitness")
    (part,) = search.measure([best.algorithm], "fitness[2,0]")
    assert part.nll == pytest.approx(subset_nll(whole, (2, 0)), abs=1e-5), "cheap and full have one zero"
    written = next(c for c in search.lineage if c.prompt)
    assert "tiny to 50%; tiny to 70%" in written.prompt and f"the {how} of these cases" in written.prompt
    told = "\n".join(reasoning_lines(search.lineage, best, config.target.combined))
    assert f"{perplexity_text(best.fitness)} × dense, {of_cases(how)} on the fitness split" in told
    final = {"id": best.id, "nll": best.fitness, "combined": how, "final": True}
    assert search.progress.facts["best"] == final, "after the end, the one that stood on fresh text"
    assert json.loads((tmp_path / "run" / "lineage.json").read_text())
    other = replace(evaluator.dense["fitness"], window_nlls=tuple(nll + 0.1 for nll in dense))
    monkeypatch.setitem(evaluator.dense, "fitness", other)  # nats above the dense model would still be 0 for it
    with pytest.raises(InputError, match="cannot go on"):
        local_search(tmp_path, cases, config)


def test_models_of_one_name_are_told_apart():
    target = Target("org/tiny", further=(Further("other/tiny"), Further("other/large", 0.5)))
    assert target.cases == ("org/tiny to 60%", "other/tiny to 60%", "large to 50%")


def test_cases_are_read_from_a_configuration(tmp_path):
    (tmp_path / "c.yaml").write_text("target:\n  further:\n  - {sparsity: 0.5}\n  - {model: other}\n  combine: mean\n")
    config = load_config(tmp_path / "c.yaml")
    assert config.target.further == (Further("", 0.5), Further("other", 0.6))
    with pytest.raises(InputError, match=r"further\[0\].sparsity is 1.5"):
        check_config(replace(config, target=replace(config.target, further=(Further("", 1.5),))))
    (tmp_path / "c.yaml").write_text("target:\n  further:\n  - {sparsty: 0.5}\n")
    with pytest.raises(InputError, match="sparsty"):
        load_config(tmp_path / "c.yaml")
