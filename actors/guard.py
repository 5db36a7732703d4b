"""No process outlives its actor: a helper process that kills the actor's session when the actor is gone.

vLLM runs its engine in children and grandchildren of the actor. A SIGKILL of the actor, or of the driver above it,
reaches none of them, and a forgotten engine holds gigabytes. The actor therefore leads a session of its own, and the
guard, outside of it, waits for the end of a pipe that only the actor holds open.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def guard_session() -> subprocess.Popen | None:
    """Make the calling process a session leader and start its guard.

    Keep the result: the guard acts when its stdin closes, at the latest when this process ends. None where the process
    can lead no session: killing somebody else's would be worse than leaving a process behind.
    """
    with contextlib.suppress(PermissionError):  # it leads a session, or a group of processes in another's
        os.setsid()
    if os.getsid(0) != os.getpid():
        return None
    command = [sys.executable, "-S", __file__, str(os.getsid(0))]
    return subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True)


def _members(session: int) -> list[int]:
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, *fields = (entry / "stat").read_text().rpartition(")")[2].split()
            if int(fields[2]) == session and state != "Z":
                found.append(int(entry.name))
    return found


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.stdin.buffer.read()
    while members := _members(int(sys.argv[1])):
        for pid in members:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.1)


if __name__ == "__main__":
    main()
