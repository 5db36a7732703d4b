"""Fitness and fresh windows: apart from each other, and each over the whole text."""

import pytest

from autoprune.pipeline.preparation import spread


@pytest.mark.parametrize("windows, fitness, fresh", [(500, 8, 16), (40, 8, 8), (24, 8, 16), (100, 4, 1), (9, 8, 8)])
def test_both_kinds_lie_over_the_whole_and_apart(windows, fitness, fresh):
    own, other = spread(windows, fitness, fresh)
    assert len(own) == fitness and len(other) == min(fresh, windows - fitness)
    assert not set(own) & set(other) and own == sorted(own) and max(own + other) < windows
    steps = [b - a for a, b in zip(own, [*own[1:], windows + own[0]], strict=True)]
    assert max(steps) <= 2 * windows / fitness, "no part of the text is without a window"


def test_too_little_text_leaves_nothing_fresh():
    assert spread(8, 8, 8)[1] == [] and spread(5, 8, 8)[1] == []
