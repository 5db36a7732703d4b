"""A model's whole answer: what is read of it, what is mended, and what is refused with a reason."""

import random
import time
from dataclasses import replace

import pytest
from test_grammar import sample

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.answers import SALVAGES, SDSA, parse_answer
from autoprune.algorithms.grammar import WRITTEN_PARTS, answer_rules
from autoprune.algorithms.language import parse
from autoprune.algorithms.probe import probe
from autoprune.algorithms.translator import LanguageError
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS

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
    algorithm = parse_answer(code, parent=Algorithm("", "matrix", parent)).algorithm
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


def test_a_function_without_a_value_to_return_is_refused():
    with pytest.raises(LanguageError, match="'y' is not defined"):
        parse_answer("def score(W, x_norm):\n    m0 = W * y\n")
    with pytest.raises(LanguageError, match="must end with its only return"):
        parse_answer("def score(W, x_norm):\n    for _ in range(3):\n        m0 = W * 2\n")


PLAIN = "def score(W, x_norm):\n    return W.abs() * x_norm"


@pytest.mark.parametrize(
    "text",
    [
        f"{PLAIN}  # :(\n\n\ndef other(x):\n    pass",
        PLAIN.replace("\n", "\n# every weight\n"),
        PLAIN.replace(":\n", ':\n    """Scores,\nat last."""\n'),
        f"<think>\ndef score(W):\n    return W\n</think>\n{PLAIN}",
        f"The parent was\n```\ndef score(W):\n    return W\n```\nand mine is\n```python\n{PLAIN}\n```\n",
        f"def score(W, x_norm) is Wanda's.\n{PLAIN}",
        PLAIN.replace("\n", "\r"),
        PLAIN.replace("\n", "\r\n"),
        PLAIN.replace("    ", "\t"),
        PLAIN.replace("(W, x_norm)", "(W: torch.Tensor, x_norm: torch.Tensor) -> torch.Tensor"),
        "def score(W, x_norm): return W.abs() * x_norm",
        "def score(W, x_norm):\n    m: torch.Tensor = W.abs() * x_norm\n    return m",
    ],
)
def test_what_a_person_would_see_is_seen(text):
    score = parse_answer(text).algorithm.score.replace("    v0 = W.abs() * x_norm\n    return v0", PLAIN[22:])
    assert score == PLAIN


@pytest.mark.parametrize(
    "head, group, allocation",
    [
        ("1. Group: matrix\n2. Allocation: sdsa tau=2", "matrix", {"tau": 2.0}),
        ("Group: rows\nAllocation: SDSA tau = 2, m = 0.25.", "row", {"tau": 2.0, "m": 0.25}),
        ("**Group:** `matrix`\n- *Allocation*: sdsa(tau=2, depth=0)  # less", "matrix", {"tau": 2.0, "depth": 0.0}),
    ],
)
def test_labels_in_many_hands(head, group, allocation):
    for text in (f"{head}\n{PLAIN}", f"{PLAIN}\n\n{head}"):
        algorithm = parse_answer(text).algorithm
        assert (algorithm.group, algorithm.allocation.parameters) == (group, SDSA.parameters | allocation)


def test_what_was_not_asked_for_is_the_parent_s_whatever_the_answer_says():
    parent = Algorithm(SCORE, "matrix", Allocation("owl", {"lam": 0.08}))
    text = f"Hypothesis: it helps\nGroup: unchanged\nAllocation: owl lam=0.08\n{PLAIN}"
    assert parse_answer(text, ("score",), parent).algorithm == replace(parent, score=PLAIN)
    text = "Diagnosis: the def score is fine\nHypothesis: h\nAllocation: sdsa tau=2 m=0.6 depth=0.5"
    proposal = parse_answer(text, ("allocation",), parent)
    assert proposal.algorithm == replace(parent, allocation=Allocation("sdsa", {"tau": 2.0, "m": 0.6, "depth": 0.5}))
    assert (proposal.diagnosis, proposal.hypothesis, proposal.salvaged) == ("the def score is fine", "h", ())
    written = "Diagnosis: the def allocate is flat\ndef allocate(profile, sparsity):\n    return 2 - profile.depth"
    for text in (written, f"{PLAIN}\n{written}", f"{written}\n{PLAIN}"):
        algorithm = parse_answer(text, ("allocate",), parent).algorithm
        assert algorithm.score == SCORE and "2.0 - profile.depth" in algorithm.allocation.source


@pytest.mark.parametrize("parts", [("allocate",), ("allocation",), ("score",), WRITTEN_PARTS])
@pytest.mark.parametrize("text", ["", "I am sorry, I cannot help.", "Diagnosis: the blocks differ and th"])
@pytest.mark.parametrize("cut", [False, True])
def test_an_answer_that_holds_nothing_is_no_answer(parts, text, cut):
    with pytest.raises(LanguageError, match="holds no"):
        parse_answer(text, parts, Algorithm(SCORE, "row", SDSA), cut=cut)


def test_thinking_that_was_cut_is_no_answer():
    with pytest.raises(LanguageError, match="holds no line"):
        parse_answer(f"<think>\nMaybe\n{PLAIN}\n", cut=True)


def test_a_line_in_prose_does_no_harm_where_another_can_be_read():
    text = f"Group: matrix\nAllocation: sdsa tau=2\n{PLAIN}\n\nAllocation: early blocks keep more.\nGroup: the best."
    algorithm = parse_answer(text).algorithm
    assert algorithm.group == "matrix" and algorithm.allocation.parameters["tau"] == 2


def test_a_label_that_was_cut_is_not_taken_for_whole():
    text = f"{PLAIN}\nGroup: matrix\nAllocation: sdsa tau=1 m=0"
    proposal = parse_answer(text, cut=True)
    assert proposal.algorithm.allocation == SDSA and proposal.salvaged == ("cut",)
    assert parse_answer(text).algorithm.allocation.parameters["m"] == 0
    alone = parse_answer("Allocation: sdsa tau=2\nThis is bec", ("allocation",), Algorithm(SCORE), cut=True)
    assert alone.algorithm.allocation.parameters["tau"] == 2


def test_of_cut_derivations_most_can_be_used():
    """Cut in their last line: what is returned instead is a matrix, however rows and columns were made."""
    rules, source, usable, tried = answer_rules(parts=WRITTEN_PARTS), random.Random(8), 0, 0
    for _ in range(150):
        text = sample(rules, source)
        if text.count(" = ") - text.partition("def score")[0].count(" = ") == 0:
            continue  # nothing stands above the return
        proposal = parse_answer(text[: source.randint(text.rindex("return"), len(text) - 1)], WRITTEN_PARTS, cut=True)
        assert proposal.salvaged in (("cut", "no return"), ("no return",))
        tried += 1
        try:
            probe(proposal.algorithm, 0.6)
            usable += 1
        except LanguageError as error:  # where no line made a matrix
            assert "m0" not in text.partition("def score")[2], error
    assert tried > 80 and usable > tried / 4


def test_an_allocation_that_was_cut_is_no_allocation():
    with pytest.raises(LanguageError, match="cut at the token limit"):
        parse_answer("Allocation: sdsa tau=1", ("allocation",), Algorithm(SCORE), cut=True)


def test_a_slip_above_a_whole_return_is_no_cut():
    text = ANSWER.replace("keepdim=True)", "keepdim=True")
    with pytest.raises(LanguageError, match="not Python"):
        parse_answer(text)


LARGE = "0x" + "f" * 4000


@pytest.mark.parametrize(
    "text",
    [
        "def score(W):\n    f\"{'\x7f'}\"",
        f"def score(W):\n    for _ in range({LARGE}):\n        a = W\n    return W\n",
        f"def score(W, x_norm={LARGE}):\n    return W\n",
        f"def score(W: {LARGE}):\n    return W\n",
        f"def score(W):\n    a = {LARGE}\n",
        "def score(W):\n    return W[0x" + "f" * 4000 + "]",
        "def score(W):\n" + "    m0 = ((((((((((((((((((((((((((((((((((((((((W\n" * 100,
        "def score(W):\n    a0 = W\n" + "".join(f"    a{i} = a{i - 1} + W\n" for i in range(1, 190)),
        "def score(W):\n" * 5000,
        "def score(W):\n    " + "x" * 200_000,
        "1." * 20_000,
        "<think>" * 14_000,
        "<think>" * 6_000 + "</think>" * 6_000,
        "*" * 90_000,
    ],
)
def test_hostile_answers_are_refused_or_read_in_time(text):
    began = time.thread_time()
    for cut in (False, True):
        try:
            parse_answer(text, cut=cut)
        except LanguageError as error:
            assert "\n" not in str(error) and len(str(error)) < 500
    assert time.thread_time() - began < 0.5


WRITTEN = ANSWER.replace(
    "Allocation: sdsa tau=1 m=0.5 depth=0.2",
    "def allocate(profile, sparsity):\n    u0 = profile.skewness.abs() ** 0.5\n    return 1 + 0.5 * u0",
)


def test_an_allocation_of_its_own():
    source = parse_answer(WRITTEN, parts=WRITTEN_PARTS).algorithm.allocation.source
    assert (
        source == "def allocate(profile, sparsity):\n    v0 = profile.skewness.abs() ** 0.5\n    return 0.5 * v0 + 1.0"
    )
    assert parse_answer(WRITTEN).algorithm.allocation == SDSA  # not asked for
    head, _, score = WRITTEN.partition("\ndef score")
    allocate = head[head.index("def allocate") :]
    behind = f"{head.replace(allocate, '')}def score{score}\n{allocate}"
    assert parse_answer(behind, parts=WRITTEN_PARTS) == parse_answer(WRITTEN, parts=WRITTEN_PARTS)
    mended = parse_answer(behind[: -len("* u0")], parts=WRITTEN_PARTS, cut=True)
    assert mended.salvaged == ("cut", "no return")
    assert mended.algorithm.allocation.source.endswith("return v0")
    with pytest.raises(LanguageError, match="'skew' is not a summary"):
        parse_answer(WRITTEN.replace("skewness", "skew"), parts=WRITTEN_PARTS)


def test_every_kind_of_salvage_can_be_told_apart():
    texts = {
        "fences": f"```\n{ANSWER}\n```",
        "prose": f"Sure! Here it is.\n{ANSWER}",
        "cut": ANSWER.partition("    return")[0] + "    m1 = m0 *",
        "no return": ANSWER.replace("return m0", "m1 = m0"),
    }
    assert tuple(texts) == SALVAGES
    assert [parse_answer(text).salvaged[:1] for text in texts.values()] == [(kind,) for kind in SALVAGES]


def test_wherever_an_answer_is_cut_it_is_refused_or_can_be_probed():
    for end in range(0, len(WRITTEN), 3):
        for cut in (True, False):
            try:
                algorithm = parse_answer(WRITTEN[:end], parts=WRITTEN_PARTS, cut=cut).algorithm
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


def test_a_share_by_gradients_is_chosen_only_where_gradients_are_offered():
    answer = ANSWER.replace("depth=0.2", "depth=0.2 taylor=0.5")
    with pytest.raises(LanguageError, match="the allocation is .* expected 'uniform' or 'sdsa tau=.*depth=0…0.9'"):
        parse_answer(answer)
    offered = (*DEFAULT_STATISTICS, "g_rms")
    chosen = parse_answer(answer, statistics=offered).algorithm.allocation
    assert chosen.parameters == {"tau": 1, "m": 0.5, "depth": 0.2, "taylor": 0.5}
    none = parse_answer(answer.replace("taylor=0.5", "taylor=0"), statistics=offered).algorithm.allocation
    assert none == parse_answer(ANSWER).algorithm.allocation, "0 is what it is where it is not named"


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
