"""Errors for people: one line each, no traceback."""


class InputError(ValueError):
    """What you gave cannot be used: what was wrong, what was expected, what to do. Exit code 2 of the command."""


class Lost(RuntimeError):
    """Something that the search stands on went away; the run folder is whole and can be resumed. Exit code 1."""


class TakenOver(Lost):
    """Another search goes on with this run: this one must not be resumed beside it."""
