"""An audit hook that sees what a source makes Python touch."""

from __future__ import annotations

import sys
import threading

from autoprune.algorithms.reader import NOWHERE

# What Python itself announces while it compiles an accepted text and looks at frames.
HARMLESS = ("compile", "exec", "sys._getframe", "object.__getattr__", "builtins.id", "gc.", "cpython.")


class Watch:
    """Everything that Python's audit hooks announce while `on`, but for what is harmless. A hook stays for good."""

    def __init__(self):
        self.on, self.seen, self.thread = False, [], threading.get_ident()
        sys.addaudithook(self.hook)

    def hook(self, event, arguments):
        ours = self.on and threading.get_ident() == self.thread and not event.startswith(HARMLESS)
        if ours and not (event == "open" and str(arguments[0]).startswith(NOWHERE)):
            self.seen.append((event, arguments))

    def __enter__(self):
        self.seen, self.on = [], True
        return self.seen

    def __exit__(self, *_):
        self.on = False
