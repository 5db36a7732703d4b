"""What several tests of the search share."""

import pytest
from local import LocalEvaluator


@pytest.fixture(scope="module")
def evaluator(tiny_model):
    return LocalEvaluator(tiny_model, 0.5)


@pytest.fixture
def fresh(evaluator):
    evaluator.measured, evaluator.die_after = [], None
    return evaluator
