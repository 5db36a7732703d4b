"""Hostile sources are refused, each for its own reason, at once, and without touching the machine."""

import os
import time

import pytest
import torch
from hostile import HOSTILE, returns
from watching import Watch

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.language import LanguageError
from autoprune.algorithms.probe import probe

SECONDS = 0.05


@pytest.fixture(scope="module")
def watch():
    """After every part was used once: torch imports some of its own when they are first needed."""
    probe(Algorithm(returns("W.abs() * x_norm")), 0.6)
    for source, _ in HOSTILE.values():
        with pytest.raises(LanguageError):
            probe(Algorithm(source), 0.6)
    return Watch()


def test_there_are_enough_of_them():
    assert len(HOSTILE) >= 120 and len({source for source, _ in HOSTILE.values()}) == len(HOSTILE)


@pytest.mark.parametrize("name", HOSTILE)
def test_is_refused_for_its_own_reason(name, watch, capfd):
    source, reason = HOSTILE[name]
    environment, random = dict(os.environ), torch.get_rng_state()
    fastest = 1.0
    for _ in range(3):  # what is slow is slow every time
        began = time.thread_time()
        with pytest.raises(LanguageError) as refusal, watch as seen:
            probe(Algorithm(source), 0.6)
        fastest = min(fastest, time.thread_time() - began)
        assert seen == []
        if fastest < SECONDS:
            break
    assert fastest < SECONDS
    assert reason in str(refusal.value) and capfd.readouterr() == ("", "")
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
    assert dict(os.environ) == environment and torch.equal(torch.get_rng_state(), random)


def test_the_watch_sees(watch, tmp_path):
    """The hook would notice: a file, an import, a process and a socket are seen."""
    import socket
    import subprocess

    with watch as seen:
        (tmp_path / "file").write_text("")
        subprocess.run(["true"], check=True)
        socket.socket().close()
    events = {event for event, _ in seen}
    assert {"open", "subprocess.Popen", "socket.__new__"} <= events
