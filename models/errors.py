"""Errors that mean "what you gave cannot be used": one clear line for a person, exit code 2 of the command."""


class InputError(ValueError):
    """What was wrong, what was expected and what to do, in one line."""
