"""A search that is stopped, goes on, is killed, and goes on again ends as one that was left alone."""

import os
import signal
import subprocess
from pathlib import Path

from searches import (
    ROOT,
    brief,
    check_same_end,
    check_stopped,
    command,
    mlflow_run,
    no_process_of,
    run,
    search_command,
    wait_for_answers,
)


def interrupt(arguments: list[str], folder: Path, generation: int, number: signal.Signals) -> tuple[int, str]:
    """Starts a search, sends its driver the signal while it measures a generation's answers, and waits until nothing of
    it is left. Returns the driver's exit code, and what it said on stderr."""
    log = folder.with_suffix(".log")
    # Ray's processes inherit the driver's environment: the folder in it marks them as this search's.
    environment = os.environ | {"AUTOPRUNE_TEST": str(folder.parent)}
    with log.open("w") as file:
        driver = subprocess.Popen(arguments, cwd=ROOT, env=environment, stderr=file)
    try:
        wait_for_answers(folder, generation, driver)
        driver.send_signal(number)
        driver.wait(60)
    finally:
        driver.kill()  # where it did not end
    check_stopped(folder)
    assert no_process_of(folder.parent), "a process outlived its driver"
    return driver.returncode, log.read_text()


def test_a_search_that_is_stopped_and_killed_ends_as_one_that_is_left_alone(whole, tiny_model, tmp_path):
    folder = tmp_path / "disturbed"
    begin = search_command("smoke.yaml", tmp_path, *brief(tiny_model), f"name={folder.name}")
    code, said = interrupt(begin, folder, 1, signal.SIGINT)
    assert code == 130, said
    assert f"autoprune search --resume {folder}" in said and "Traceback" not in said
    code, said = interrupt(command("search", "--resume", folder), folder, 2, signal.SIGTERM)
    assert code == 143, said
    assert f"autoprune search --resume {folder}" in said
    assert "Traceback" not in said
    stopped = mlflow_run(folder).info
    assert stopped.status == "KILLED"

    go_on = command("search", "--resume", folder)
    interrupt(go_on, folder, 3, signal.SIGKILL)

    done = run(go_on)
    assert done.returncode == 0, done.stderr[-2000:]
    check_same_end(folder, whole())
    ended = mlflow_run(folder).info
    assert (ended.run_id, ended.status) == (stopped.run_id, "FINISHED")
