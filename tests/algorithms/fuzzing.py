"""Mutations of valid programs: the validator must refuse or accept, and never crash, hang or reach out.

    python tests/algorithms/fuzzing.py [--seconds 600] [--seed N]

Ends with exit code 1 at the first source that breaks a promise, and prints it.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from hostile import HOSTILE
from watching import Watch

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.answers import parse_answer
from autoprune.algorithms.grammar import WRITTEN_PARTS
from autoprune.algorithms.language import LanguageError, parse, parse_allocation
from autoprune.algorithms.manual import calls
from autoprune.algorithms.operations import BY_NAME, OPERATIONS
from autoprune.algorithms.probe import probe, probe_allocation
from autoprune.algorithms.scores import BASELINES
from autoprune.algorithms.vocabulary import STATISTICS, SUMMARIES
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS

# Whole answers of models: under the grammar, and as they come without it.
ANSWERS = (
    "Diagnosis: rows differ\nHypothesis: their means tell how\nGroup: matrix\ndef allocate(profile, sparsity):\n"
    "    u0 = profile.skewness.abs().softmax(dim=0)\n    return 1 + tune(0.5, 0.1, 2) * u0\ndef score(W, x_norm):\n"
    "    m0 = W.abs() * x_norm\n    c0 = (m0 @ x_norm)[:, None]\n    return m0 / (c0 + 1e-6)",
    "Sure!\n\n**Diagnosis:** none\n- Allocation: sdsa tau=1 m=0.5\n```python\nimport torch\n\ndef score(W, x_norm):\n"
    '    """Doc."""\n    m = torch.abs(W) * x_norm[None, :]  # why\n    m * 2\n```\nThat is it.',
)
CORPUS = Path(__file__).with_name("fuzz_corpus.txt")  # sources that once broke a promise, between lines of ----
SECONDS = 1.0  # of processor time, for one source
PIECES = (
    *BY_NAME, *STATISTICS, *SUMMARIES, "W", "torch", "profile", "sparsity", "tune(1, 0, 2)", "for _ in range(3):",
    "return", "def", "lambda: ", "__class__", "import os", "[None, :]", "[:, None]", "[0]", "[::2]", "(", ")", "[", "]",
    ":", ",", ".", "=", "==", "+", "-", "*", "**", "/", "@", "<", ">", "1", "0", "-1", "1e9", "1e-30", "0.5", "True",
    "None", "dim=1", "dim=0", "keepdim=True", "p=2", "'a'", "\n", "\n    ", "    ", "\t", "#", "\\", "\0",
    "\u202e", "é", "\x7f", "0x" + "f" * 4000, "f\"{'\x7f'}\"", "# :(", "```", "\ndef score(W):\n    ",
)  # fmt: skip


def seeds() -> list[str]:
    """Valid programs, those that were refused for a reason, and what broke something before."""
    broken = CORPUS.read_text().split("\n----\n") if CORPUS.exists() else []
    hostile = [source for source, _ in HOSTILE.values() if len(source) < 2000]
    return [b.source for b in BASELINES.values()] + [*WRITTEN_ALLOCATIONS.values(), *ANSWERS, *hostile, *broken]


def mutated(source: random.Random, text: str, others: list[str]) -> str:
    """One to three changes: pieces put in, taken out, replaced, repeated, taken from another text; lines shuffled."""
    for _ in range(source.choice([1, 1, 1, 2, 3])):
        start = source.randint(0, len(text))
        end = min(len(text), start + source.choice([0, 1, 2, 5, 20]))
        match source.randrange(6):
            case 0:
                text = text[:start] + source.choice(PIECES) + text[start:]
            case 1:
                text = text[:start] + text[end:]
            case 2:
                text = text[:start] + source.choice(PIECES) + text[end:]
            case 3:
                text = text[:end] + text[start:end] * source.randint(1, 30) + text[end:]
            case 4:
                text = text[:start] + source.choice(others)[-source.randint(1, 60) :] + text[start:]
            case _:
                lines = text.split("\n")
                text = "\n".join(source.sample(lines, len(lines)))
    return text


def warm_up() -> None:
    """Every operation once: torch imports some of its own when they are first needed."""
    for operation in OPERATIONS:
        for text, _ in calls(operation):
            with suppress(LanguageError):
                probe(Algorithm(f"def score(W, x_norm):\n    x = x_norm\n    return {text} + W * x\n"), 0.6)
    for text in seeds():
        with suppress(LanguageError):
            probe(Algorithm(text), 0.6)
        with suppress(LanguageError):
            probe_allocation(text)


def broken_promise(text: str, watch: Watch, outcomes: Counter) -> str | None:
    """What went wrong with a source, if anything. One that takes long does so every time: a pause of the garbage
    collector or of the machine comes once."""
    for _ in range(2):
        began = time.thread_time()
        wrong = judged(text, watch, outcomes)
        took = time.thread_time() - began
        if wrong is not None or took <= SECONDS:
            return wrong
    return f"it took {took:.1f} s"


def judged(text: str, watch: Watch, outcomes: Counter) -> str | None:
    """What went wrong with a source: it must be refused in one line, or run to a fingerprint, and touch nothing."""
    with watch as seen:
        try:
            if "def allocate" in text and "def score" not in text:
                canonical = parse_allocation(text).source
                same = parse_allocation(canonical).source == canonical and (
                    probe_allocation(text) == probe_allocation(canonical)
                )
            else:
                canonical = parse(text).source
                same = parse(canonical).source == canonical and (
                    probe(Algorithm(text), 0.6) == probe(Algorithm(canonical), 0.6)
                )
            outcomes["accepted"] += 1
            if not same:
                return "its canonical form is another program"
        except LanguageError as refusal:
            outcomes["refused"] += 1
            if "\n" in str(refusal) or not str(refusal):
                return f"the refusal is not one line: {refusal}"
        except Exception as error:
            return f"{type(error).__name__}: {error}"
        for cut in (False, True):
            try:
                salvaged = parse_answer(text, parts=WRITTEN_PARTS, statistics=tuple(STATISTICS), cut=cut)
                outcomes["salvaged"] += bool(salvaged.salvaged)
                probe(salvaged.algorithm, 0.6)
            except LanguageError:
                pass
            except Exception as error:
                return f"as an answer: {type(error).__name__}: {error}"
    return f"it touched {seen[:3]}" if seen else None


def fuzz(seconds: float, seed: int) -> Iterator[tuple[str, str, Counter]]:
    """(source, what went wrong, how many were accepted and refused by then) for every broken promise."""
    source, outcomes, pool = random.Random(seed), Counter(), seeds()
    warm_up()
    watch, end = Watch(), time.monotonic() + seconds
    while time.monotonic() < end:
        text = mutated(source, source.choice(pool), pool)
        accepted = outcomes["accepted"]
        wrong = broken_promise(text, watch, outcomes)
        if wrong is not None:
            yield text, wrong, outcomes
        elif outcomes["accepted"] > accepted and len(pool) < 2000:
            pool.append(text)  # whose mutations are mostly valid, too
    print(f"{sum(outcomes.values())} sources in {seconds:g} s: {dict(outcomes)}", file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--seconds", type=float, default=600)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    for text, wrong, _ in fuzz(options.seconds, options.seed):
        print(f"{wrong}\n----\n{text}")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
