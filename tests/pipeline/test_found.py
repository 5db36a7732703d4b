"""Algorithms that the project ships: each can be pruned with, and says where it comes from."""

from pathlib import Path

import pytest

from autoprune.algorithms.probe import probe
from autoprune.pipeline.population import read_score

FOUND = sorted((Path(__file__).parents[2] / "algorithms" / "found").glob("*.py"))


def test_something_was_found():
    assert FOUND


@pytest.mark.parametrize("file", FOUND, ids=lambda file: file.stem)
def test_what_was_found_is_an_algorithm_with_its_origin(file):
    algorithm, spread = read_score(file)
    assert spread and probe(algorithm, 0.6).mask_hash
    text = file.read_text()
    assert all(word in text for word in ("# Found by AutoPrune: ", "# Lineage", "# Again: ", "report split"))
    assert "@" not in text.replace("ppl_token@", "")
