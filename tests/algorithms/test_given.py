"""An answer builds on the scores of its parents by name: what it means is what it would be written out by hand."""

import random
import re

import pytest
import torch

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.answers import parse_answer
from autoprune.algorithms.given import givens, in_full
from autoprune.algorithms.grammar import answer_grammar, answer_rules
from autoprune.algorithms.language import parse
from autoprune.algorithms.scores import BASELINES
from autoprune.algorithms.translator import LanguageError
from autoprune.algorithms.vocabulary import STATISTICS

NAMES = tuple(STATISTICS)
torch.manual_seed(0)
W = torch.randn(6, 8)
VALUES = {name: torch.rand(statistic.shape(6, 8)) + 0.1 for name, statistic in STATISTICS.items()}


def value(source: str) -> torch.Tensor:
    return parse(source)(W, VALUES)


@pytest.mark.parametrize("first", BASELINES)
@pytest.mark.parametrize("second", ["wanda", "ria", "pruner-zero"])
def test_the_names_stand_for_the_values_of_the_scores(first, second):
    one, two = BASELINES[first].source, BASELINES[second].source
    source = "def score(W, g_rms):\n    m0 = S\n    m1 = T\n    v0 = m0 * m1.sqrt()\n    return v0 + g_rms\n"
    found = value(in_full(source, givens(one, two)))
    torch.testing.assert_close(found, value(one) * value(two).sqrt() + VALUES["g_rms"])


def test_no_name_is_only_another_name_and_lines_that_are_not_used_go():
    wanda = BASELINES["wanda"].source
    twice = parse(in_full("def score(W):\n    m0 = S\n    return m0 * m0.sqrt()\n", givens(wanda))).source
    assert twice == "def score(W, x_norm):\n    v0 = W.abs() * x_norm\n    return v0 * v0.sqrt()"
    local = "def score(W):\n    a = W.abs()\n    b = a.sqrt()\n    return b\n"
    again = parse(in_full("def score(W, x_std):\n    m0 = S\n    return m0 * x_std\n", givens(local))).source
    assert again == "def score(W, x_std):\n    v0 = W.abs()\n    v1 = v0.sqrt()\n    return v1 * x_std"
    documented = 'def score(W, x_std):\n    """Doc."""\n    m0 = S\n    return m0 * x_std\n'
    ria = givens(BASELINES["ria"].source)
    assert parse(in_full(documented, ria)) == parse(in_full(documented.replace('    """Doc."""\n', ""), ria))
    with pytest.raises(LanguageError):
        parse_answer(
            "def score(W):\n    m0 = S\n    y = f\"{'\x7f'}\"\n    return m0\n", ("score",), given=givens(wanda)
        )
    without = in_full("def score(W):\n    m0 = S\n    return W.abs()\n", givens(wanda))
    assert parse(without).source == parse("def score(W):\n    return W.abs()\n").source


def test_a_score_that_was_built_on_another_can_be_built_on():
    source = BASELINES["ria"].source
    for _ in range(4):
        source = parse(in_full("def score(W, x_std):\n    m0 = S\n    return m0 * x_std\n", givens(source))).source
    torch.testing.assert_close(value(source), value(BASELINES["ria"].source) * VALUES["x_std"] ** 4)


@pytest.mark.parametrize(
    "source",
    [
        "def score(W):\n    S = W.abs()\n    return S\n",
        "def score(W, S):\n    return S\n",
        "def allocate(profile, sparsity):\n    return S\n",
        "x = 1\n",
    ],
)
def test_what_has_the_name_to_itself_stays_as_it_is(source):
    assert in_full(source, givens(BASELINES["wanda"].source)) == source


def test_scores_that_are_no_programs_are_not_given():
    assert givens("sparsegpt") == {} and list(givens(BASELINES["wanda"].source, "sparsegpt")) == ["S"]
    with pytest.raises(LanguageError, match="'S' is not defined"):
        parse_answer("def score(W):\n    m0 = S\n    return m0\n")


def drawn(rules, source: random.Random, name: str = "root") -> str:
    """A text of the grammar."""
    text = ""
    for item in source.choice(rules[name]):
        if isinstance(item, str):
            text += item
        elif hasattr(item, "rule"):
            text += drawn(rules, source, item.rule)
        else:
            text += "one two three four"
    return text


@pytest.mark.parametrize("given", [1, 2])
def test_whatever_the_grammar_writes_begins_with_the_names_and_can_be_used(given):
    rules, source = answer_rules(3, ("group", "score"), NAMES, given), random.Random(0)
    parents = givens(*(BASELINES[name].source for name in ("wanda", "ria")[:given]))
    starts = "\n    m0 = S" + "\n    m1 = T" * (given - 1)
    for _ in range(150):
        text = drawn(rules, source)
        assert starts in text and len(re.findall(r"^    [mrc]\d = ", text, re.MULTILINE)) <= 3
        algorithm = parse_answer(text, ("group", "score"), Algorithm(""), NAMES, given=parents).algorithm
        assert "x_norm" in parse(algorithm.score).reads or given == 2
        assert value(algorithm.score).shape == W.shape
    assert answer_grammar(3, ("score",), NAMES, given) != answer_grammar(3, ("score",), NAMES)
    with pytest.raises(ValueError, match="expected 2 to 9"):
        answer_grammar(1, given=2)
