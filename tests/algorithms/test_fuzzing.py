"""Half a minute of the fuzzer; ten minutes: python tests/algorithms/fuzzing.py"""

import os
import time
from collections import Counter

import fuzzing
import pytest
from fuzzing import CORPUS, broken_promise, fuzz, warm_up
from watching import Watch

SECONDS = float(os.environ.get("AUTOPRUNE_FUZZ_SECONDS", 12))


def test_no_mutation_breaks_a_promise():
    for text, wrong, _ in fuzz(SECONDS, seed=int.from_bytes(os.urandom(4))):
        raise AssertionError(f"{wrong}\n----\n{text}")


def test_what_was_found_once_stays_mended():
    warm_up()
    watch, sources = Watch(), CORPUS.read_text().split("\n----\n") if CORPUS.exists() else []
    for source in sources:
        assert broken_promise(source, watch, Counter()) is None, source


@pytest.mark.parametrize("slow, said", [(1, None), (2, "it took ")])
def test_what_takes_long_does_so_twice(monkeypatch, slow, said):
    times = iter([True] * slow + [False])

    def judged(*_):
        end = time.thread_time() + (0.1 if next(times) else 0)
        while time.thread_time() < end:
            pass

    monkeypatch.setattr(fuzzing, "judged", judged)
    monkeypatch.setattr(fuzzing, "SECONDS", 0.05)
    wrong = broken_promise("", Watch(), Counter())
    assert wrong is None if said is None else wrong.startswith(said)
