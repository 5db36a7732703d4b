"""Half a minute of the fuzzer; ten minutes: python tests/algorithms/fuzzing.py"""

import os

from fuzzing import CORPUS, broken_promise, fuzz, warm_up
from watching import Watch

SECONDS = float(os.environ.get("AUTOPRUNE_FUZZ_SECONDS", 12))


def test_no_mutation_breaks_a_promise():
    for text, wrong, _ in fuzz(SECONDS, seed=int.from_bytes(os.urandom(4))):
        raise AssertionError(f"{wrong}\n----\n{text}")


def test_what_was_found_once_stays_mended():
    from collections import Counter

    warm_up()
    watch, sources = Watch(), CORPUS.read_text().split("\n----\n") if CORPUS.exists() else []
    for source in sources:
        assert broken_promise(source, watch, Counter()) is None, source
