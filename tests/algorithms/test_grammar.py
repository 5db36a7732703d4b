"""The grammar writes only what the reader accepts: checked by sampling the rules themselves, and by xgrammar."""

import ast
import functools
import itertools
import os
import random
import re
from types import SimpleNamespace

import pytest
import torch

from autoprune.algorithms.answers import parse_answer
from autoprune.algorithms.cost import dry_run
from autoprune.algorithms.derivation import derive
from autoprune.algorithms.grammar import WRITTEN_PARTS, Ref, answer_grammar, answer_rules
from autoprune.algorithms.language import LanguageError, parse, parse_allocation
from autoprune.algorithms.operations import BY_NAME, OPERATIONS
from autoprune.algorithms.probe import probe, probe_allocation
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS, STATISTICS, SUMMARIES
from autoprune.kernels.masks import row_mask

HEAD = (
    "Diagnosis: the outlier columns are pruned\nHypothesis: input norms will protect them\n"
    "Group: row\nAllocation: sdsa tau=0.5 m=0.3 depth=0.2\ndef score(W, x_norm, x_mean, x_std):\n"
)


# As HEAD, of an answer that is offered every statistic, and so a share of the budget by gradients.
ALL_HEAD = HEAD.replace("x_norm, x_mean, x_std", ", ".join(STATISTICS)).replace("depth=0.2", "depth=0.2 taylor=0.5")

OFFERS = [DEFAULT_STATISTICS, tuple(STATISTICS), ("g_rms",), ("h_inv_diag", "x_kurtosis"), ()]


def sample(rules, source):
    """One derivation, with words of any characters."""

    def words(item):
        lengths = [source.randint(1, item.longest) for _ in range(source.randint(item.least, item.most))]
        return " ".join("".join(chr(source.randint(33, 126)) for _ in range(n)) for n in lengths)

    return derive(rules, source, words)


@pytest.fixture(scope="module")
def answers():
    rules, source = answer_rules(), random.Random(0)
    return [sample(rules, source) for _ in range(1000)]


def test_every_derivation_is_read_and_its_code_kept(answers):
    for answer in answers:
        proposal = parse_answer(answer)
        assert parse(proposal.algorithm.score).source == proposal.algorithm.score
        assert f"Group: {proposal.algorithm.group}\n" in answer
        settings = dict(re.findall(r"(tau|m|depth)=([\d.]+)", answer.partition("Allocation:")[2].splitlines()[0]))
        assert proposal.algorithm.allocation.parameters == {key: float(value) for key, value in settings.items()}
        diagnosis = answer.splitlines()[0].removeprefix("Diagnosis: ").lstrip("*_ ")  # markup is dropped
        assert proposal.diagnosis == " ".join(diagnosis.split())


def test_nearly_every_derivation_can_be_used_and_many_differ(answers):
    masks = []
    for answer in answers[:200]:
        algorithm = parse_answer(answer).algorithm
        dry_run(parse(algorithm.score))
        try:
            masks.append(probe(algorithm, 0.6).mask)
        except LanguageError:
            continue
    assert len(masks) >= 196
    assert len(set(masks)) >= 130


def test_damaged_answers_are_refused_or_still_sound(answers):
    """Whatever a few changed characters make of an answer: a clear refusal, or a program that reads as itself."""
    source, refused = random.Random(1), 0
    for answer in answers:
        start = answer.index("def score")
        for _ in range(source.randint(1, 3)):
            at = source.randrange(start, len(answer))
            answer = answer[:at] + source.choice(["", " ", "\n", *"()[]:=*-.,_'1eWxm\0\\"]) + answer[at + 1 :]
        try:
            score = parse_answer(answer).algorithm.score
        except LanguageError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            assert parse(score).source == score
    assert 0.2 * len(answers) < refused < len(answers)


def test_every_local_has_a_say(answers):
    """The reader drops lines without effect: what is left must be as many lines as were written."""
    written = kept = 0
    for answer in answers:
        written += len(re.findall(r"^    [mrc]\d = ", answer, re.MULTILINE))
        kept += parse_answer(answer).algorithm.score.count(" = ")
    assert kept >= 0.8 * written


def test_answers_are_short(answers):
    assert max(len(answer.partition("def score")[2]) for answer in answers) < 600


SHAPES = {"m": (5, 7), "r": (7,), "c": (5, 1), "s": (), "u": (9,)}


@pytest.mark.parametrize("result, text", [writing for o in OPERATIONS for writing in o.writings])
def test_writings_have_the_shape_of_their_type_and_stay_above_zero(result, text):
    """Evaluated by Python itself on random operands ≥ 0, zeros among them."""
    generator = torch.Generator().manual_seed(0)
    values = {"torch": torch}

    def operand(match):
        if match[1] not in SHAPES:
            return "0.9" if match[1] == "q" else "1.5"
        name = f"{match[1]}{len(values)}"
        values[name] = torch.rand(SHAPES[match[1]], generator=generator).sub(0.2).clamp(min=0)
        return name

    # `median` of the language is torch's quantile at 0.5.
    value = eval(re.sub(r"\{(\w)\}", operand, text).replace(".median(", ".quantile(0.5, "), values)
    assert value.shape == SHAPES[result]
    assert value.isfinite().all() and (value >= 0).all()


def test_writings_use_only_what_the_table_allows():
    for operation in OPERATIONS:
        for _, text in operation.writings:
            tree = ast.parse(re.sub(r"\{(\w)\}", r"\1", text), mode="eval")
            called = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
            assert called <= BY_NAME.keys()
            assert operation.name in called or f" {operation.name} " in text
        if operation.form != "operator":
            assert hasattr(torch, operation.name) or hasattr(torch.Tensor, operation.name)


@pytest.mark.parametrize("offered", OFFERS)
def test_rules_are_complete_and_not_left_recursive(offered):
    rules = answer_rules(statistics=offered)
    first = {name: {a[0].rule for a in alternatives if isinstance(a[0], Ref)} for name, alternatives in rules.items()}
    for name, alternatives in rules.items():
        assert alternatives, name
        assert all(item.rule in rules for a in alternatives for item in a if isinstance(item, Ref)), name
    for _ in rules:  # transitive closure
        first = {name: after.union(*(first[other] for other in after)) for name, after in first.items()}
    assert not [name for name, after in first.items() if name in after]


@pytest.mark.parametrize("offered", OFFERS)
def test_answers_read_all_that_is_offered_and_nothing_else(offered):
    """Among 100 derivations; each depends on W, since the reader drops what has no effect."""
    rules, source = answer_rules(statistics=offered), random.Random(3)
    written, reads, refused = "", [], 0
    for index in range(100):
        answer = sample(rules, source)
        written += answer.partition("):\n")[2]
        algorithm = parse_answer(answer, statistics=offered).algorithm
        program = parse(algorithm.score)
        dry_run(program)
        assert re.search(r"\bW\.", program.source)
        reads += program.reads
        try:
            if index < 40:
                probe(algorithm, 0.6)
        except LanguageError:
            refused += 1
    assert refused <= 2
    assert set(re.findall(r"\b[xhg]_\w+", written)) == set(offered)
    assert all(reads.count(name) >= 5 for name in offered)
    for name in offered:
        assert not STATISTICS[name].signed or written.count(f"{name}.abs()") == written.count(name)


def test_number_of_locals_is_bounded():
    assert len(answer_grammar(0)) < len(answer_grammar(1)) < len(answer_grammar(2))
    rules = answer_rules(1)
    assert all(sample(rules, random.Random(seed)).count(" = ") <= 1 for seed in range(50))
    with pytest.raises(ValueError, match="max_locals is 10"):
        answer_grammar(10)


def acceptor(grammar):
    """Whether xgrammar, which constrains vLLM's decoding, lets a text be written."""
    xgrammar = pytest.importorskip("xgrammar")
    vocabulary = [bytes([byte]) for byte in range(256)] + [b"<end>"]
    info = xgrammar.TokenizerInfo(vocabulary, stop_token_ids=[256])
    compiled = xgrammar.GrammarCompiler(info).compile_grammar(grammar)

    def accepts(text):
        matcher = xgrammar.GrammarMatcher(compiled)
        return matcher.accept_string(text) and matcher.accept_token(256)

    return accepts


class TestXgrammar:
    """The library that constrains vLLM's decoding reads the grammar, and draws the line where it should."""

    @pytest.fixture(scope="class")
    def accepts(self):
        return acceptor(answer_grammar())

    @pytest.fixture(scope="class")
    def accepts_all(self):
        return acceptor(answer_grammar(statistics=tuple(STATISTICS)))

    def test_derivations_are_accepted(self, accepts, answers):
        assert all(accepts(answer) for answer in itertools.islice(answers, 100))

    @pytest.mark.parametrize(
        "body",
        [
            "    return W.abs() * x_norm",
            "    r0 = W.abs().mean(dim=0)\n    return W.abs() / (r0 + 1e-6)",
            "    m0 = W.abs() * x_norm\n    c0 = m0.mean(dim=1, keepdim=True)\n    return m0 / (c0 + 1e-6)",
            "    m0 = W.abs() / (W.abs().sum(dim=0) + 1e-6)\n"
            "    m1 = W.abs() / (W.abs().sum(dim=1, keepdim=True) + 1e-6)\n"
            "    m2 = m1 + m0\n    return m2 * (x_norm ** 0.5)",
        ],
    )
    def test_known_algorithms_can_be_written(self, accepts, body):
        assert accepts(HEAD + body)
        dry_run(parse(parse_answer(HEAD + body).algorithm.score))

    @pytest.mark.parametrize(
        "body",
        [
            "    return W.abs() * r0",  # not defined
            "    return x_norm * x_std",  # a row
            "    r0 = W.abs().mean(dim=1, keepdim=True)\n    return W.abs() * r0",  # a column under a row's name
            "    return W * x_norm",  # signed
            "    return W.abs() / x_std",  # unguarded
            "    r0 = W.abs().mean(dim=0)\n    return W.abs() * x_norm",  # defined in vain
            "    import os\n    return W.abs() * x_norm",
            "    return W.abs() * h_inv_diag",  # not offered
            "    return W.abs() * g_rms",
        ],
    )
    def test_everything_else_cannot(self, accepts, body):
        assert not accepts(HEAD + body)

    @pytest.mark.parametrize(
        "body",
        [
            "    return W.square() * g_rms",
            "    return W.square() / (h_inv_diag + 1e-6)",
            "    return W.abs() * (g_rms * x_absmean)",
            "    m0 = (W.abs() * g_rms) / (x_kurtosis + 1e-6)\n    return m0 + g_rms",
            "    r0 = g_rms.mean(dim=0)\n    return W.abs() * r0",
        ],
    )
    def test_what_is_offered_can_be_written(self, accepts_all, body):
        answer = ALL_HEAD + body
        assert accepts_all(answer)
        probe(parse_answer(answer, statistics=tuple(STATISTICS)).algorithm, 0.6)

    @pytest.mark.parametrize(
        "body",
        [
            "    return g_rms * x_norm",  # without W
            "    m0 = g_rms * x_norm\n    return m0 * x_std",
            "    m0 = W.abs() * x_norm\n    m1 = g_rms * x_norm\n    return m1 * x_std",
            "    return W.abs() * W.square()",  # ranks as W does
            "    return W.abs() * x_mean",  # signed
        ],
    )
    def test_scores_without_a_say_of_W_cannot(self, accepts_all, body):
        assert not accepts_all(ALL_HEAD + body)


@pytest.mark.parametrize("parts", [("allocation",), ("score",), ("group", "allocation"), ("allocate",)])
def test_an_answer_may_hold_some_parts_only(parts):
    """What is left out cannot be written; what is there is written as in a whole answer."""
    text = answer_grammar(parts=parts)
    assert ("Group: " in text) == ("group" in parts)
    assert ("Allocation: " in text) == ("allocation" in parts)
    assert ("def score" in text) == ("score" in parts)
    assert ("def allocate" in text) == ("allocate" in parts)
    whole = dict(line.split(" ::= ") for line in answer_grammar().splitlines())
    whole |= dict(line.split(" ::= ") for line in answer_grammar(parts=WRITTEN_PARTS).splitlines())
    for line in text.splitlines():
        name, rule = line.split(" ::= ")
        assert name == "root" or whole[name] == rule


# In `make test` a share of the 10,000 that AUTOPRUNE_DERIVATIONS=10000 asks for: those take two minutes.
MANY = int(os.environ.get("AUTOPRUNE_DERIVATIONS", "1500"))


@functools.cache
def probe_layer():
    """A layer, and its statistics as float32 by name: small, so that thousands of programs can be run on it."""
    generator = torch.Generator().manual_seed(2)
    W = torch.randn(12, 20, generator=generator)
    shapes = {name: one.shape(12, 20) for name, one in STATISTICS.items()}
    return W, {name: torch.rand(shape, generator=generator) + 0.1 for name, shape in shapes.items()}


def as_python(source):
    """The function of a text that the grammar's own rules derived, run by Python as it stands; no candidate's text."""
    text = source.replace(".median(", ".quantile(0.5, ")
    space = {"torch": torch, "tune": lambda value, low, high: value}
    exec(text.replace(".argsort(dim=0)", ".argsort(dim=0, stable=True)"), space)
    return space


def test_derivations_are_accepted_and_their_canonical_forms_do_the_same():
    """Over everything that the grammar can offer, `allocate` and all statistics among it."""
    source, names = random.Random(5), tuple(STATISTICS)
    rules = answer_rules(parts=WRITTEN_PARTS, statistics=names)
    W, statistics = probe_layer()
    units = {name: torch.rand(7, dtype=torch.float64) + 0.1 for name in SUMMARIES}
    for index in range(MANY):
        answer = sample(rules, source)
        proposal = parse_answer(answer, parts=WRITTEN_PARTS, statistics=names)
        assert proposal.salvaged == ()
        program, own = parse(proposal.algorithm.score), parse_allocation(proposal.algorithm.allocation.source)
        assert parse(program.source) == program and parse_allocation(own.source) == own
        plain = as_python(answer[answer.index("def allocate") :])
        scores = plain["score"](W, *statistics.values())
        same = program(W, statistics)
        # Operands that change places may change the last bit of a product with three factors, never a rank.
        assert torch.equal(row_mask(scores, 12), row_mask(same, 12)), answer
        if index % 5 == 0:
            wishes = plain["allocate"](SimpleNamespace(**units), 0.6)
            torch.testing.assert_close(own(units, 0.6), wishes.double())


@pytest.mark.parametrize("units", [1, 2, 30])
def test_every_derived_allocation_can_be_used(units):
    """Whatever the summaries are: zeros, and models of one block."""
    source, rules = random.Random(6), answer_rules(parts=("allocate",))
    generator = torch.Generator().manual_seed(units)
    for index in range(400):
        text = sample(rules, source)
        program = parse_allocation(text[text.index("def allocate") :])
        scale = 10.0 ** source.randint(-3, 7)
        profile = {name: scale * torch.rand(units, generator=generator, dtype=torch.float64) for name in SUMMARIES}
        if index % 2:
            profile = {name: value * (value > scale / 2) for name, value in profile.items()}
        wishes = program(profile, source.choice([0.1, 0.6, 0.9]))
        assert wishes.shape == (units,) and wishes.isfinite().all() and (wishes > 0).all(), text
        if index < 100:
            probe_allocation(program.source)


def test_allocations_use_every_line_and_every_summary():
    source, rules = random.Random(7), answer_rules(parts=("allocate",))
    texts = [sample(rules, source).partition("def allocate")[2] for _ in range(500)]
    for text in texts:
        program = parse_allocation(f"def allocate{text}")
        assert program.source.count("\n") == text.count("\n")  # no line was dropped as dead
    assert set(re.findall(r"profile\.(\w+)", "".join(texts))) == set(SUMMARIES)
