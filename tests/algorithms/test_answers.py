"""A model's whole answer: what is read of it, what is mended, and what is refused with a reason."""

from dataclasses import replace

import pytest

from autoprune.algorithms.algorithm import Allocation
from autoprune.algorithms.answers import SALVAGES, SDSA, parse_answer
from autoprune.algorithms.language import parse
from autoprune.algorithms.probe import probe
from autoprune.algorithms.translator import LanguageError

ANSWER = """Diagnosis: Rows differ in scale.
Hypothesis: Dividing by the row mean will help.
Group: matrix
Allocation: sdsa tau=1 m=0.5 depth=0.2
def score(W, x_norm, x_mean, x_std):
    m0 = W.abs() * x_norm
    c0 = m0.mean(dim=1, keepdim=True)
    return m0 / (c0 + 1e-6)"""


def test_answer():
    proposal = parse_answer(ANSWER)
    assert proposal.diagnosis == "Rows differ in scale."
    assert proposal.hypothesis == "Dividing by the row mean will help."
    assert proposal.algorithm.group == "matrix"
    assert proposal.algorithm.allocation == Allocation("sdsa", {"tau": 1.0, "m": 0.5, "depth": 0.2})
    assert proposal.algorithm.score.startswith("def score(W, x_norm):\n    v0 = ")


def test_answer_in_prose_and_markup():
    head, code = ANSWER.split("\ndef")
    head = "Sure!\n\n**" + head.replace(":", ":**").replace("\n", "\n- **")
    text = f"{head}\n\n```python\nimport torch\n\ndef{code}\n```\nThis works because def score(W) is good.\n"
    proposal = parse_answer(text)
    assert proposal.salvaged == ("fences", "prose")
    assert replace(proposal, salvaged=()) == parse_answer(ANSWER)


def test_answer_with_an_indented_function_and_text_after_it():
    code = (
        "  def score(\n      W,\n      x_norm,\n  ):\n      a = (\n  W.abs() * x_norm)\n\n      return a\n  And so on."
    )
    assert parse_answer(code).algorithm.score == "def score(W, x_norm):\n    v0 = W.abs() * x_norm\n    return v0"


def test_missing_lines_take_the_given_defaults():
    code = ANSWER.partition("0.2\n")[2]
    proposal = parse_answer(code)
    assert (proposal.diagnosis, proposal.hypothesis) == ("", "")
    assert (proposal.algorithm.group, proposal.algorithm.allocation) == ("row", SDSA)
    parent = Allocation("atp", {"beta": 0.01})
    algorithm = parse_answer(code, group="matrix", allocation=parent).algorithm
    assert (algorithm.group, algorithm.allocation) == ("matrix", parent)
    assert parse_answer("Allocation: uniform\n" + code).algorithm.allocation == Allocation("uniform")


def test_only_statistics_that_are_offered_may_be_read():
    reads = ANSWER.replace("x_std", "h_inv_diag").replace("* x_norm", "* h_inv_diag")
    with pytest.raises(LanguageError) as refusal:
        parse_answer(reads)
    assert str(refusal.value) == ("the score reads h_inv_diag: not offered here; offered are W, x_norm, x_mean, x_std")
    assert parse(parse_answer(reads, statistics=("h_inv_diag", "g_rms")).algorithm.score).reads == ("h_inv_diag",)
    with pytest.raises(LanguageError, match="the score reads x_norm: not offered here; offered are W, g_rms"):
        parse_answer(ANSWER, statistics=("g_rms",))


def test_a_statistic_that_is_a_parameter_only_does_no_harm():
    listed = ANSWER.replace("x_std", "g_rms")
    assert parse_answer(listed) == parse_answer(ANSWER)


# What is left of ANSWER without its last lines.
SCORE = "def score(W, x_norm):\n    v0 = W.abs() * x_norm\n    return v0"


@pytest.mark.parametrize("end", ["def score(", "x_mean, x_std):", "x_std):\n", "m0 = "])
@pytest.mark.parametrize("cut", [False, True])
def test_a_cut_answer_of_which_nothing_is_left_says_so(end, cut):
    with pytest.raises(LanguageError, match="the answer was cut"):
        parse_answer(ANSWER[: ANSWER.index(end, ANSWER.index("def")) + len(end)], cut=cut)


@pytest.mark.parametrize("end", ["c0 = m0.mean(dim", "c0 =", "c0", "retu", "return", "return ", "return m0 / (c0"])
@pytest.mark.parametrize("cut", [False, True])
def test_a_cut_answer_ends_with_its_last_whole_statement(end, cut):
    """And returns the last local that can be a score: not c0, which is a column."""
    proposal = parse_answer(ANSWER[: ANSWER.index(end, ANSWER.index("def")) + len(end)], cut=cut)
    assert proposal.salvaged == ("cut", "no return")
    assert proposal.algorithm.score == SCORE


def test_whether_a_line_is_whole_is_not_known_where_the_answer_was_cut():
    """`return m0 / (c0 + 1e-6)` may be all of the line, or its beginning; behind a line break it is all."""
    assert parse_answer(ANSWER).salvaged == ()
    assert parse_answer(ANSWER, cut=True).salvaged == ("cut", "no return")
    assert parse_answer(ANSWER + "\n", cut=True) == parse_answer(ANSWER)


@pytest.mark.parametrize(
    "body, score",
    [
        ("m0 = W.abs() * x_norm", SCORE),
        ("m0 = W.abs() * x_norm\n    c0 = m0.mean(dim=1, keepdim=True)\n```\nThis is it.", SCORE),
        ("m0 = W.abs() * x_norm\n    m0", SCORE),
        ("m0 = W.abs()\n    m0 * x_norm", "def score(W, x_norm):\n    v0 = W.abs()\n    return v0 * x_norm"),
        ("W.abs() * x_norm", "def score(W, x_norm):\n    return W.abs() * x_norm"),
    ],
)
def test_a_missing_return_is_added(body, score):
    proposal = parse_answer(f"def score(W, x_norm):\n    {body}")
    assert "no return" in proposal.salvaged and proposal.algorithm.score == score


def test_what_cannot_be_a_score_is_not_returned():
    with pytest.raises(LanguageError, match="expected float32"):
        parse_answer("def score(W, x_norm):\n    r0 = x_norm * 2\n")
    with pytest.raises(LanguageError, match="'y' is not defined"):
        parse_answer("def score(W, x_norm):\n    m0 = W * y\n")


WRITTEN = ANSWER.replace(
    "Allocation: sdsa tau=1 m=0.5 depth=0.2",
    "def allocate(profile, sparsity):\n    u0 = profile.skewness.abs() ** 0.5\n    return 1 + 0.5 * u0",
)


def test_an_allocation_of_its_own():
    source = parse_answer(WRITTEN, allocates=True).algorithm.allocation.source
    assert (
        source == "def allocate(profile, sparsity):\n    v0 = profile.skewness.abs() ** 0.5\n    return 0.5 * v0 + 1.0"
    )
    assert parse_answer(WRITTEN).algorithm.allocation == SDSA  # not asked for
    head, _, score = WRITTEN.partition("\ndef score")
    allocate = head[head.index("def allocate") :]
    behind = f"{head.replace(allocate, '')}def score{score}\n{allocate}"
    assert parse_answer(behind, allocates=True) == parse_answer(WRITTEN, allocates=True)
    mended = parse_answer(behind[: -len("* u0")], allocates=True, cut=True)
    assert mended.salvaged == ("cut", "no return")
    assert mended.algorithm.allocation.source.endswith("return v0")
    with pytest.raises(LanguageError, match="'skew' is not a summary"):
        parse_answer(WRITTEN.replace("skewness", "skew"), allocates=True)


def test_every_kind_of_salvage_can_be_told_apart():
    texts = {
        "fences": f"```\n{ANSWER}\n```",
        "prose": f"Sure! Here it is.\n{ANSWER}",
        "cut": ANSWER[:-3] + "\n    m1 = m0 *",
        "no return": ANSWER.replace("return m0", "m1 = m0"),
    }
    assert tuple(texts) == SALVAGES
    assert [parse_answer(text).salvaged[:1] for text in texts.values()] == [(kind,) for kind in SALVAGES]


def test_wherever_an_answer_is_cut_it_is_refused_or_can_be_probed():
    for end in range(len(WRITTEN)):
        for cut in (True, False):
            try:
                algorithm = parse_answer(WRITTEN[:end], allocates=True, cut=cut).algorithm
            except LanguageError as error:
                assert "\n" not in str(error)
            else:
                probe(algorithm, 0.6)


def test_an_answer_without_a_function_is_refused():
    with pytest.raises(LanguageError, match="no line `def score"):
        parse_answer("Diagnosis: I would multiply weights and inputs.")


@pytest.mark.parametrize(
    "line", ["sdsa tau=0", "sdsa tau=nan", "sdsa q=1", "sdsa m=2", "magic", "sdsa tau", "uniform m=1"]
)
def test_allocations_out_of_bounds_are_refused(line):
    with pytest.raises(LanguageError, match="the allocation is"):
        parse_answer(ANSWER.replace("sdsa tau=1 m=0.5 depth=0.2", line))


def test_unknown_group_is_refused():
    with pytest.raises(LanguageError, match="the group is 'block', expected row or matrix"):
        parse_answer(ANSWER.replace("Group: matrix", "Group: block"))


def test_thoughts_are_capped_and_printable():
    text = ANSWER.replace("Rows differ", "Rows\x1b[31m \u202ediffer\ud800 " + "x" * 1000)
    diagnosis = parse_answer(text).diagnosis
    assert len(diagnosis) == 400 and diagnosis.isprintable()


@pytest.mark.parametrize(
    "text", ["def\n score(W):\n    return W", "x\x0bdef score(W):\n    return W.abs()", "def score"]
)
def test_a_broken_definition_is_refused_in_one_line(text):
    with pytest.raises(LanguageError) as refusal:
        parse_answer(text)
    assert "\n" not in str(refusal.value)
