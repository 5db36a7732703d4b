"""What crosses the wire between the driver and the actors: small, frozen, plain data."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from autoprune.algorithms.algorithm import Algorithm

Messages = tuple[tuple[str, str], ...]  # (role, text) pairs, as chat templates take them


CHARACTERS = 2.5  # that a token of code has, at least, where no tokenizer is at hand


def estimate(messages: Messages) -> int:
    """Tokens of a prompt whose tokenizer is not known; rather too many."""
    return int(sum(len(text) for _, text in messages) / CHARACTERS)


def chat(messages: Messages) -> list[dict[str, str]]:
    """As chat templates and servers take them."""
    return [{"role": role, "content": text} for role, text in messages]


def split_places(name: str) -> tuple[str, list[int] | None]:
    """The split that a name speaks of, and which of its windows; None for all: "fitness[0,3]" are the first and the
    fourth of "fitness"."""
    base, bracket, rest = name.partition("[")
    return base, [int(place) for place in rest.rstrip("]").split(",")] if bracket else None


@dataclass(frozen=True)
class Request:
    """One prompt of which `n` independent completions are wanted.

    messages: (role, text) pairs, as chat templates take them. grammar: GBNF text that constrains decoding, or None.
    brief: what the grammar would enforce, in words, for a server that takes no grammar.
    parts, statistics: what the grammar was made of (see `algorithms.grammar.answer_rules`).
    operator, parents: what the prompt asks for and of which algorithms, for who varies them without reading it.
    offset: how many answers the search asked for before, so that a script goes on where a stopped search was.
    """

    messages: Messages
    n: int
    temperature: float
    max_tokens: int
    grammar: str | None = None
    offset: int = 0
    brief: str = ""
    parts: tuple[str, ...] = ()
    statistics: tuple[str, ...] = ()
    operator: str = ""
    parents: tuple[Algorithm, ...] = ()


Answered = Callable[[int, "list[Answer]"], None]  # is told a request's place and its answers, as soon as they are there


GREETING = (("system", "You write Python."), ("user", "Write: def score(W): return W.abs()"))


def control(request: Request) -> Request:
    """The same request with harmless words: who answers it, and not the request itself, is well, and the words are to
    blame. What is wrong with all requests, such as the grammar, is wrong with it, too."""
    return replace(request, messages=GREETING)


@dataclass(frozen=True)
class Answer:
    """One completion of the language model, with its token counts.

    finish_reason: "stop", or "length" when the answer was cut at the token limit.
    """

    text: str
    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Probe:
    """What a candidate's score function did on the small probe layers.

    error: why it cannot be used, in one line, or None. poison: it brought evaluators down, as often as one may;
    traceback: what was last seen of it then.
    mask: the packed masks that it yields on the probe, as hexadecimal digits ("" after an error). mask_hash: 16
    hexadecimal digits; equal masks, equal hash.
    """

    error: str | None
    mask: str = ""
    mask_hash: str = ""
    poison: bool = False
    traceback: str = ""


@dataclass(frozen=True)
class Evaluation:
    """The measurements of one algorithm on one split.

    nll: mean negative log-likelihood per token, in nats, over `tokens` scored tokens; lower is better; None after an
    error.
    window_nlls: the same for each window, in order. block_sparsities: what was reached, per block.
    block_errors: ‖h − h_dense‖ / ‖h_dense‖ of the hidden states leaving each block, on the profile windows.
    seconds: computing time, summed over the shards. error: one line, or None. poison: it brought evaluators down, or
    kept them past the deadline, as often as one may; traceback: what was last seen of it then.
    """

    nll: float | None
    tokens: int
    window_nlls: tuple[float, ...] = ()
    block_sparsities: tuple[float, ...] = ()
    block_errors: tuple[float, ...] = ()
    sparsity: float = 0.0
    seconds: float = 0.0
    error: str | None = None
    poison: bool = False
    traceback: str = ""

    @classmethod
    def from_dict(cls, data: dict) -> Evaluation:
        """From `asdict`, also after JSON, which makes lists of tuples."""
        return cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in data.items()})


def last_line(error: BaseException) -> str:
    """The last line of an error's text, which in a remote traceback is the error itself."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[-1] if lines else ''}"[:300]
