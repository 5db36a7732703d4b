"""What several tests share: a tiny model made on the spot, one search on it, and one Ray cluster for the session."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch
from tiny import save_tiny_model

if not torch.cuda.is_available():
    # The kernels run in Triton's interpreter, which has to be chosen before Triton is imported, and in this process
    # only: what it starts must not inherit it.
    os.environ["TRITON_INTERPRET"] = "1"
    import triton

    triton.knobs.propagate_env = False
    triton.knobs.runtime.interpret = True
    del os.environ["TRITON_INTERPRET"]


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def whole(tiny_model, tmp_path_factory) -> Iterator[Callable[[], Path]]:
    """A search on a tiny model that nobody disturbs, for those to be compared with that somebody does. It runs beside
    the first of these; to call it waits for its end, and gives its folder."""
    from searches import ROOT, brief, search_command

    runs = tmp_path_factory.mktemp("runs")
    log = runs / "whole.log"
    with log.open("w") as file:
        arguments = search_command("smoke.yaml", runs, *brief(tiny_model), "name=whole")
        search = subprocess.Popen(arguments, cwd=ROOT, stdout=file, stderr=file)

    def ended() -> Path:
        assert search.wait(300) == 0, log.read_text()[-2000:]
        return runs / "whole"

    yield ended
    search.terminate()  # where nobody waited for it


@pytest.fixture(scope="session")
def cluster():
    """One local Ray cluster, shared: starting one takes longer than most tests."""
    import ray

    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    yield
    ray.shutdown()


BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@pytest.fixture(scope="session")
def browser():
    """A real browser without a screen. Where there is none, what needs it is skipped."""
    playwright = pytest.importorskip("playwright.sync_api", reason="needs Playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if found is None:
        pytest.skip(f"needs a browser: none of {', '.join(BROWSERS)} is on the path (Debian: apt-get install chromium)")
    with playwright.sync_playwright() as driver:
        # Without its sandbox it also runs as root, in a container; it sees nothing here but our own pages.
        browser = driver.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()
