"""A call in a thread of its own, which keeps neither a signal from being heard nor the process from ending."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any


class Aside:
    def __init__(self, call: Callable[[], Any]) -> None:
        self._value: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._value = call()
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, daemon=True)
        self._thread.start()

    def wait(self) -> Any:
        """What the call returned, once it has; raises what it raised."""
        while self._thread.is_alive():
            self._thread.join(0.5)  # a signal gets through between two
        if self._error is not None:
            raise self._error
        return self._value
