"""Formulas of known scores, exactly; of whatever the grammar writes, what matplotlib can draw."""

import pytest
from matplotlib.mathtext import MathTextParser

from autoprune.actors.chance import GrammarGenerator
from autoprune.actors.messages import Request
from autoprune.algorithms.algorithm import Allocation
from autoprune.algorithms.answers import parse_answer
from autoprune.algorithms.formula import SYMBOLS, allocation_formula, read_symbols, score_formula
from autoprune.algorithms.grammar import PARTS, WRITTEN_PARTS
from autoprune.algorithms.scores import BASELINES
from autoprune.algorithms.vocabulary import STATISTICS
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS

W, X = r"\left|W_{ij}\right|", r"\Vert X_j\Vert"
KNOWN = {
    "return W.abs() * x_norm": [rf"S_{{ij}} = {W}\,{X}"],
    "return (W.abs() * x_norm).sqrt() + 0.5 * W.square()": [rf"S_{{ij}} = \sqrt{{{W}\,{X}}} + 0.5\,W_{{ij}}^{{2}}"],
    "return W.abs() * (x_norm + 1)": [rf"S_{{ij}} = {W}\,\left({X} + 1\right)"],
    "return W - (x_norm - x_std)": [rf"S_{{ij}} = W_{{ij}} - \left({X} - \sigma_j\right)"],
    "return W.abs() / (W.abs().sum(dim=1, keepdim=True) + 1e-6)": [
        rf"S_{{ij}} = \frac{{{W}}}{{\sum_{{j}}\left({W}\right) + 10^{{-6}}}}"
    ],
    "return W.abs().sum(dim=1, keepdim=True).square() * x_norm * W": [
        rf"S_{{ij}} = W_{{ij}}\,\left(\sum_{{j}}\left({W}\right)\right)^{{2}}\,{X}"
    ],
    "return W.sum(dim=0) * x_norm * W": [rf"S_{{ij}} = W_{{ij}}\,\left(\sum_{{i}}\left(W_{{ij}}\right)\right)\,{X}"],
    "return (W > x_norm).float() + W": [rf"S_{{ij}} = \left(W_{{ij}} > {X}\right) + W_{{ij}}"],
    "return W.abs() ** 0.49999": [rf"S_{{ij}} = {W}^{{0.5}}"],
    "return W.abs() * x_norm[0]": [],
    "return W.abs() * W.argsort(dim=1).argsort(dim=0).float()": [],
    "return W.abs() * x_norm.mean() + W.amax(dim=0)": [
        rf"S_{{ij}} = {W}\,\mathrm{{mean}}_{{j}}\left({X}\right) + \max_{{i}}\left(W_{{ij}}\right)"
    ],
    "return (W.abs() + x_norm) ** 1.5": [rf"S_{{ij}} = \left({W} + {X}\right)^{{1.5}}"],
    "return -W.abs()": [rf"S_{{ij}} = -{W}"],
    "return W.abs() * (W.abs() @ x_norm)[:, None]": [rf"S_{{ij}} = \left(\sum_{{j}} {W}\,{X}\right)\,{W}"],
    "return W.abs() * x_norm.argsort(dim=0).argsort(dim=0).float()": [
        rf"S_{{ij}} = {W}\,\mathrm{{rank}}_{{j}}\left({X}\right)"
    ],
    "return W.abs() * tune(0.5, 0, 1)": [rf"S_{{ij}} = 0.5\,{W}"],
    "return torch.where(W > 0, W, 0.5 * W)": [r"S_{ij} = \mathrm{if}\left(W_{ij} > 0, W_{ij}, 0.5\,W_{ij}\right)"],
    "a = W.abs() * x_norm\n    return a / (a.mean() + 2e-6)": [
        rf"v_{{0,ij}} = {W}\,{X}",
        r"S_{ij} = \frac{v_{0,ij}}{\mathrm{mean}_{ij}\left(v_{0,ij}\right) + 2 \cdot 10^{-6}}",
    ],
    "a = W.abs()\n    for _ in range(2):\n        a = a.sqrt()\n    return a": [],
}


@pytest.mark.parametrize("body", KNOWN)
def test_scores_as_people_write_them(body):
    assert score_formula(f"def score(W, x_norm, x_std):\n    {body}\n") == KNOWN[body]


def test_what_is_no_program_has_no_formula():
    assert score_formula("sparsegpt") == [] and allocation_formula(Allocation("owl")) == []


def test_sdsa_with_its_numbers():
    (line,) = allocation_formula(Allocation("sdsa", {"tau": 0.5, "m": 0.25, "depth": 0.0}))
    share = r"\frac{\gamma_b^{2}}{\mathrm{mean}_b\,\gamma_b^{2}}"
    assert line == rf"r_b \propto \left(\left(0.75 + 0.25\,{share}\right)\right)^{{\frac{{s}}{{1.5\,(1-s)}}}}"
    (line,) = allocation_formula(Allocation("sdsa", {"taylor": 0.5}))
    assert r"\left(1 + 0.5\left(1 - \frac{b}{B-1}\right)\right)\,t_l^{0.5}" in line


def test_symbols_are_explained():
    assert SYMBOLS.keys() == {"W", *STATISTICS}
    assert list(read_symbols("def score(W, x_norm, g_rms):\n    return W.abs() * g_rms")) == [r"W_{ij}", r"G_{ij}"]


def test_long_formulas_are_cut_into_lines():
    lines = "".join(f"    v{n} = x_norm / (v{n - 1} + 1.5)\n" if n else "    v0 = x_norm / 2\n" for n in range(40))
    found = score_formula(f"def score(W, x_norm):\n{lines}    return W.abs() * v39\n")
    assert len(found) > 5 and max(map(len, found)) < 400
    for line in found:
        MathTextParser("path").parse(f"${line}$")


def test_every_formula_can_be_drawn():
    parser, count = MathTextParser("path"), 0
    sources = [score_formula(baseline.source) for baseline in BASELINES.values()]
    sources += [allocation_formula(Allocation("written", source=text)) for text in WRITTEN_ALLOCATIONS.values()]
    for parts in (PARTS, WRITTEN_PARTS):
        names = tuple(STATISTICS)
        (answers,) = GrammarGenerator(0).generate([Request((), 40, 1.0, 300, parts=parts, statistics=names)])
        for answer in answers:
            algorithm = parse_answer(answer.text, parts, statistics=names).algorithm
            sources += [score_formula(algorithm.score), allocation_formula(algorithm.allocation)]
    for lines in sources:
        for line in lines:
            parser.parse(f"${line}$")
            count += 1
    assert count > 120
