"""Drawing texts from a grammar at random: what a search finds without a language model, and food for tests."""

from __future__ import annotations

import random
from collections.abc import Callable

from autoprune.algorithms.grammar import Ref, Rules, Words


def derive(rules: Rules, source: random.Random, words: Callable[[Words], str], rule: str = "root") -> str:
    """One derivation, every alternative of a rule equally likely. words: what stands for thoughts."""
    text = []
    for item in source.choice(rules[rule]):
        if isinstance(item, Ref):
            text.append(derive(rules, source, words, item.rule))
        elif isinstance(item, Words):
            text.append(words(item))
        else:
            text.append(item)
    return "".join(text)
