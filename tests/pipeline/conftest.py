"""What several tests of the search share."""

import os
import tempfile
from pathlib import Path

import pytest
from local import LocalEvaluator

MEMORY = "/dev/shm"


@pytest.fixture
def tmp_path():
    """In memory, where there is such a file system: a search waits for the disk with every record of its journal, which
    is half of the time that these tests would take."""
    where = MEMORY if os.access(MEMORY, os.W_OK) else None
    with tempfile.TemporaryDirectory(prefix="autoprune-test-", dir=where, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@pytest.fixture(scope="module")
def evaluator(tiny_model):
    return LocalEvaluator(tiny_model, 0.5)


@pytest.fixture
def fresh(evaluator):
    evaluator.measured, evaluator.die_after = [], None
    return evaluator
