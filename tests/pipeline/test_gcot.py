"""Prompts say what the graph says: ancestors in order, contrast, verdicts; and who is chosen as parent."""

import random
from collections import Counter

import pytest

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.allocation import DEFAULTS
from autoprune.algorithms.grammar import answer_grammar
from autoprune.algorithms.language import parse
from autoprune.algorithms.scores import BASELINES, NATIVE
from autoprune.algorithms.vocabulary import DEFAULT_STATISTICS, STATISTICS
from autoprune.models.errors import InputError
from autoprune.pipeline.config import Config, SearchPlan, check_config, load_config
from autoprune.pipeline.gcot import (
    FAILURE_LIMIT,
    KNOWN_LIMIT,
    PATH_LIMIT,
    Setting,
    build_prompt,
    plain_prompt,
    repair_prompt,
)
from autoprune.pipeline.lineage import Candidate, Lineage
from autoprune.pipeline.operators import choose
from autoprune.pipeline.population import CLAIMS, OWN_CLAIM, baseline, choose_parents, read_score, seed
from autoprune.pipeline.wording import algorithm_text


def measured(
    name: str, nll: float, parents: tuple[str, ...] = (), mask: str = "ff00", noise: float = 0.01
) -> Candidate:
    windows = tuple(nll + noise * (-1) ** index for index in range(4))
    return Candidate(
        name,
        len(parents),
        "mutate" if parents else "seed",
        parents,
        Algorithm(f"def score(W):\n    return W.abs() * {nll}\n", "row", Allocation("sdsa", {"tau": 0.5})),
        hypothesis=f"claim of {name}",
        status="evaluated",
        mask=mask,
        mask_hash=name,
        evaluation=Evaluation(nll, 40, windows, (0.5,) * 3, (0.1, 0.2, 0.9 + nll / 100), 0.5),
    )


def characters(messages) -> int:
    return sum(len(text) for _, text in messages)


def prompt(lineage, task, parents, limit=20_000, statistics=DEFAULT_STATISTICS, **setting):
    setting = {"count": characters, "limit": limit, "statistics": statistics} | setting
    return build_prompt(lineage, task, parents, Setting(2.5, 0.6, **setting))


@pytest.fixture
def lineage() -> Lineage:
    graph = Lineage()
    graph.add(measured("root", 4.0))
    graph.add(measured("other", 5.0, mask="00ff"))
    graph.add(measured("good", 3.5, ("root",)))
    graph.add(measured("bad", 6.0, ("root",)))
    graph.add(measured("middling", 4.2, ("root",)))
    graph.add(Candidate("broken", 1, "mutate", ("root",), status="invalid", error="no such name"))
    graph.add(measured("focal", 3.4, ("good",)))
    return graph


def test_the_prompt_walks_ancestors_with_best_and_worst_contrast(lineage):
    (_, system), (_, user) = prompt(lineage, "mutate_score", ("focal",))
    assert "Diagnosis:" in system and "def score" in system
    steps = user.partition("How we got here:")[2]
    places = [steps.index(f"claim of {name}") for name in ("root", "good", "bad", "focal")]
    assert places == sorted(places), "not in topological order"
    assert "claim of middling" not in steps, "neither ancestor, nor best or worst child"
    assert "claim of other" not in steps
    assert "4. (mutate of 2) Claim: claim of focal" in steps
    assert "of step 4" in steps.partition("Task")[2]
    assert "the dense model has 2.500" in user and "60% of the weights" in user


def test_evidence_and_conclusion_follow_the_measurements(lineage):
    user = prompt(lineage, "mutate_score", ("focal",))[1][1]
    bad = user.partition("claim of bad")[2].partition("claim of")[0]
    assert "fitness 6.000, +2.000" in bad and "the claim is refuted" in bad
    good = user.partition("claim of good")[2].partition("claim of")[0]
    assert "-0.500" in good and "the claim is confirmed" in good
    assert "the error grows most in blocks 2 (+0.7" in good


def test_a_difference_within_the_noise_is_inconclusive():
    graph = Lineage()
    graph.add(measured("root", 4.0))
    child = measured("child", 4.0001, ("root",))
    windows = tuple(4.0001 + 0.5 * (-1) ** index for index in range(4))
    child.evaluation = Evaluation(4.0001, 40, windows, (), (), 0.5)
    graph.add(child)
    assert graph.edge("root", "child")["verdict"] == "inconclusive"


def test_a_crossover_names_both_parents(lineage):
    user = prompt(lineage, "crossover", ("focal", "other"))[1][1]
    assert "claim of other" in user.partition("How we got here:")[2]
    assert "works in the score of step 5 with what works in the score of step 2" in user


def test_prompts_stay_bounded_however_deep_the_lineage(lineage):
    for index in range(30):
        lineage.add(measured(f"deep-{index}", 3.3 - index / 100, (f"deep-{index - 1}" if index else "focal",)))
    user = prompt(lineage, "mutate_score", ("deep-29",))[1][1]
    assert user.count("Claim:") <= 3 * PATH_LIMIT
    known = user.partition("How we got here:")[0]
    assert sum(line.startswith("- ") for line in known.splitlines()) == KNOWN_LIMIT
    assert "claim of deep-29" in user


def test_operators_come_in_proportion():
    weights = {"explore": 1.0, "mutate": 2.0, "crossover": 1.0, "never": 0.0}
    for trial in range(50):
        chosen = Counter(choose(random.Random(trial), weights, 8))
        assert chosen == {"explore": 2, "mutate": 4, "crossover": 2}
    mixed = Counter(name for trial in range(400) for name in choose(random.Random(trial), weights, 3))
    assert mixed["mutate"] / 1200 == pytest.approx(0.5, abs=0.05)
    assert mixed["explore"] / 1200 == pytest.approx(0.25, abs=0.05)


def test_parents_are_elites_and_the_partner_is_far(lineage):
    for trial in range(30):
        focal, partner = choose_parents(random.Random(trial), "crossover", lineage.evaluated())
        assert focal != partner
        if focal != "other":
            assert partner == "other", "the only one with different masks"
    assert {choose_parents(random.Random(t), "mutate", lineage.evaluated()[:2])[0] for t in range(30)} == {
        "focal",
        "good",
    }


def test_seeds_write_their_defaults_out():
    algorithm = seed("wanda+sdsa").algorithm
    assert algorithm.allocation.parameters == DEFAULTS["sdsa"] != {}
    assert algorithm.group == "row" and seed("ria").algorithm.group == "matrix"


@pytest.mark.parametrize("offered", [DEFAULT_STATISTICS, tuple(STATISTICS), ("g_rms", "x_norm"), ()])
def test_the_prompt_describes_what_the_grammar_lets_be_read_and_nothing_else(lineage, offered):
    system = prompt(lineage, "explore", ("focal",), 20_000, offered)[0][1]
    header = f"def score({', '.join(('W', *offered))}):"
    assert f"\n{header}\n" in system and f"\\n{header}" in answer_grammar(statistics=offered)
    for name, statistic in STATISTICS.items():
        shape = "[out, in]" if statistic.type == "m" else "[in]"
        assert (f"\n{name}: {statistic.description}, {shape}.\n" in system) == (name in offered)
        assert (name in system) == (name in offered)
    assert "{" not in system
    for text in (system, answer_grammar(statistics=offered)):
        assert ("taylor=" in text) == ("g_rms" in offered)


def test_three_statistics_are_offered_unless_told_otherwise(lineage):
    three = ("x_norm", "x_mean", "x_std")
    assert SearchPlan().statistics == three
    assert answer_grammar() == answer_grammar(statistics=three)
    assert prompt(lineage, "explore", ("focal",)) == prompt(lineage, "explore", ("focal",), 20_000, three)


def test_a_limit_counts_the_statistics_that_are_told_of(lineage):
    whole = prompt(lineage, "crossover", ("focal", "other"))
    size = sum(len(text) for _, text in whole)
    more = prompt(lineage, "crossover", ("focal", "other"), size, tuple(STATISTICS))
    assert more[1][1].count("Claim:") < whole[1][1].count("Claim:")


@pytest.mark.parametrize(
    "names, message",
    [
        (("x_norm", "x_nrm"), "search.statistics is 'x_nrm': expected .*; x_norm?"),
        (("W",), "search.statistics is 'W': expected x_norm or "),
        (("x_std", "x_norm", "x_std"), "search.statistics names x_std twice"),
    ],
)
def test_statistics_that_nobody_can_offer_are_refused(names, message):
    with pytest.raises(InputError, match=message) as refusal:
        check_config(Config(search=SearchPlan(statistics=names)))
    assert "\n" not in str(refusal.value)


def test_statistics_are_read_from_a_configuration(tmp_path):
    (tmp_path / "config.yaml").write_text("search:\n  statistics: [x_norm, g_rms]\n")
    config = load_config(tmp_path / "config.yaml")
    assert config.search.statistics == ("x_norm", "g_rms")
    (tmp_path / "again.yaml").write_text(config.to_yaml())
    assert load_config(tmp_path / "again.yaml") == config


@pytest.mark.parametrize(
    "text, score, group, update, allocation, per",
    [
        ("wanda", "wanda", "row", "none", "uniform", "block"),
        ("wanda/cg+sdsa", "wanda", "row", "cg", "sdsa", "block"),
        ("magnitude/none+owl", "magnitude", "matrix", "none", "owl", "block"),
        ("pruner-zero+atp@layer", "pruner-zero", "row", "none", "atp", "layer"),
        ("obs-diag/sparsegpt", "obs-diag", "row", "sparsegpt", "uniform", "block"),
        ("sparsegpt", "sparsegpt", "row", "none", "uniform", "block"),
        ("sparsegpt/sparsegpt+owl@layer", "sparsegpt", "row", "sparsegpt", "owl", "layer"),
    ],
)
def test_a_baseline_is_read_from_its_text(text, score, group, update, allocation, per):
    source = score if score in NATIVE else parse(BASELINES[score].source).source
    assert baseline(text) == Algorithm(source, group, Allocation(allocation, DEFAULTS[allocation], per), update)


def test_equal_allocations_have_equal_texts():
    assert str(baseline("wanda+sdsa:taylor=0").allocation) == str(baseline("wanda+sdsa").allocation)
    assert str(baseline("wanda+sdsa:taylor=0.5").allocation) == "sdsa depth=0.5 m=0.6 tau=1 taylor=0.5"


@pytest.mark.parametrize(
    "text, message",
    [
        ("wnda", "unknown score 'wnda': expected magnitude, .*sparsegpt; wanda?"),
        ("", "unknown score ''"),
        ("wanda/", "unknown update ''"),
        ("wanda/obs+sdsa", "unknown update 'obs': expected none, sparsegpt, cg"),
        ("wanda/cg/cg", "unknown update 'cg/cg'"),
        ("wanda+sdas", "unknown allocation 'sdas'.*'sdsa'"),
        ("wanda+owl@row", "unknown ending '@row' of allocation 'owl@row': expected @layer"),
        ("wanda+owl@", "unknown ending '@'"),
        ("wanda+explicit", "'explicit'.*values"),
        ("wanda@layer", "unknown score 'wanda@layer'"),
    ],
)
def test_a_text_that_names_no_baseline_is_refused_in_one_line(text, message):
    with pytest.raises(InputError, match=message) as refusal:
        baseline(text)
    assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("text", ["sparsegpt", "sparsegpt/cg+sdsa", "wanda/cg", "ria/sparsegpt+owl"])
def test_what_cannot_be_read_or_changes_weights_is_no_seed(text):
    with pytest.raises(InputError, match="cannot be a seed"):
        seed(text)


@pytest.mark.parametrize("name", BASELINES)
def test_every_other_baseline_is_a_seed_with_a_claim(name):
    assert seed(f"{name}/none+owl@layer").hypothesis == f"{CLAIMS[name]}; {CLAIMS['owl']}"
    assert seed(name).id == f"seed-{name}"


def test_a_file_is_a_seed_with_its_own_group_and_allocation(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text("# group: matrix\n# allocation: owl lam=0.1\ndef score(W, g_rms):\n    return W.abs() * g_rms\n")
    alone, other = seed(str(file)), seed(f"{file}+sdsa")
    assert (alone.id, other.id) == ("seed-mine.py", "seed-mine.py+sdsa") and alone.algorithm.group == "matrix"
    assert str(alone.algorithm.allocation) == "owl lam=0.1" and other.algorithm.allocation == Allocation(
        "sdsa", DEFAULTS["sdsa"]
    )
    assert alone.hypothesis == f"{OWN_CLAIM}; {CLAIMS['owl']}"
    paired = seed(str(file), "2:4").algorithm
    assert (paired.group, paired.allocation) == ("2:4", Allocation("uniform"))
    file.write_text("# group: 2:4\ndef score(W):\n    return W.abs()\n")
    with pytest.raises(InputError, match="mine.py is for 2:4 and cannot be a seed: expected row or matrix"):
        seed(str(file))
    assert seed(str(file), "2:4").algorithm.group == "2:4"
    with pytest.raises(InputError, match="cannot read .*none.py"):
        seed(str(tmp_path / "none.py"))


def test_every_baseline_and_every_rule_that_can_be_named_has_a_claim():
    assert set(BASELINES) | set(NATIVE) | set(DEFAULTS) - {"explicit"} <= CLAIMS.keys()


def test_a_long_chain_loses_its_oldest_evidence_first(lineage):
    whole = prompt(lineage, "crossover", ("focal", "other"))
    size = sum(len(text) for _, text in whole)
    user = prompt(lineage, "crossover", ("focal", "other"), size - 1)[1][1]
    steps = user.partition("How we got here:")[2]
    assert "claim of root" not in steps, "the oldest that is no parent"
    assert "claim of good" in steps and "claim of focal" in steps and "claim of other" in steps
    assert "works in the score of step 4 with what works in the score of step 1" in user
    shortest = prompt(lineage, "crossover", ("focal", "other"), 10)[1][1]
    assert shortest.count("Claim:") == 2


def test_what_failed_is_remembered_with_its_parent(lineage):
    for index in range(FAILURE_LIMIT):
        lineage.add(measured(f"worse-{index}", 4.5 + index / 10, ("focal",)))
    lineage.add(Candidate("late", 2, "mutate", ("focal",), status="invalid", error="r7 is not defined"))
    stopped = measured("stopped", 9.0, ("focal",))
    stopped.status, stopped.evaluation = "screened", None
    lineage.add(stopped)
    text = prompt(lineage, "mutate_score", ("focal",))[1][1].partition("came to nothing")[2].partition("Task")[0]
    assert "refused: r7 is not defined" in text and "9.0 [row, sdsa tau=0.5]: worse at first sight" in text
    assert text.count("\n- ") == FAILURE_LIMIT and "4.5" not in text, "the newest are told"
    assert "came to nothing" not in prompt(lineage, "mutate_score", ("good",))[1][1]
    plain = prompt(lineage, "mutate_score", ("focal",), diverse=False)[1][1]
    assert "came to nothing" not in plain and "do not write these again" not in plain


def test_evidence_goes_before_failures_and_these_before_what_is_known(lineage):
    lineage.add(measured("worse", 4.5, ("focal",)))
    sizes = []
    for limit in range(6_000, 400, -20):
        user = prompt(lineage, "mutate_score", ("focal",), limit)[1][1]
        sizes.append((user.count("Claim:"), user.count("came to nothing"), user.count("\n- ")))
    assert sizes == sorted(sizes, reverse=True) and sizes[0] == (5, 1, 8) and sizes[-1] == (1, 0, 0)
    assert (1, 1, 8) in sizes and (1, 0, 7) in sizes, "one kind goes after the other"


def test_a_plain_prompt_lists_the_best_and_no_reasons(lineage):
    best = lineage.evaluated()
    setting = Setting(2.5, 0.6, characters, 20_000)
    (_, system), (_, user) = plain_prompt(best, "topk", setting)
    assert system == prompt(lineage, "explore", ("focal",))[0][1], "told of the same"
    assert [float(line.split()[1].rstrip(".")) for line in user.splitlines() if line.startswith("Fitness ")] == [
        c.fitness for c in best
    ]
    assert not any(word in user for word in ("Claim", "Evidence", "refuted", "claim of"))
    short = plain_prompt(best, "topk", Setting(2.5, 0.6, characters, characters(((0, system), (1, user))) - 1))[1][1]
    assert "3.400" in short and "W.abs() * 6.0" in user and "W.abs() * 6.0" not in short


def test_a_repair_shows_the_answer_and_the_error(lineage):
    asked = prompt(lineage, "explore", ("focal",))
    texts = "def score(W):\n    return w", "'w' is not defined"
    setting = Setting(2.5, 0.6, characters, characters(asked) + 200)
    *before, (role, answer), (_, wish) = repair_prompt(asked, *texts, setting)
    assert tuple(before) == asked and role == "assistant" and answer.endswith("return w")
    assert "'w' is not defined" in wish
    assert repair_prompt(asked, *texts, Setting(2.5, 0.6, characters, characters(asked))) is None
    assert repair_prompt(asked, *texts, Setting(2.5, 0.6, characters, characters(asked), repair=200)) is not None


@pytest.mark.parametrize(
    "parts, there, missing",
    [
        (("group", "score"), "How the budget is spread over the blocks is settled", "Allocation:"),
        (("allocation",), "The score function and its group are settled", "def score"),
        (("allocate",), "profile.skewness: ", "def score"),
    ],
)
def test_what_is_not_designed_is_not_asked_for(lineage, parts, there, missing):
    system = prompt(lineage, "explore", ("focal",), parts=parts)[0][1]
    assert there in system and missing not in system.partition("exactly this form")[2]


@pytest.mark.parametrize(
    "algorithm",
    [
        Algorithm(
            "def score(W):\n    return W.abs()", "matrix", Allocation("sdsa", {"tau": 0.5, "m": 0.3, "depth": 0.2})
        ),
        Algorithm("def score(W):\n    return W.abs()", "2:4", Allocation("owl", dict(DEFAULTS["owl"]), "layer")),
        Algorithm(
            "def score(W):\n    return W.abs()",
            allocation=Allocation("written", source="def allocate(profile, sparsity):\n    return profile.depth + 1.0"),
        ),
        Algorithm("def score(W):\n    return W.abs()", allocation=Allocation("explicit", {}, "block", (0.5, 0.7))),
    ],
)
def test_an_algorithm_reads_back_from_its_text(tmp_path, algorithm):
    (tmp_path / "own.py").write_text(algorithm_text(algorithm))
    assert read_score(tmp_path / "own.py") == (algorithm, True)


def test_a_file_that_says_nothing_else_is_by_row_and_uniform(tmp_path):
    (tmp_path / "own.py").write_text("def score(W):\n    return W.abs()\n")
    assert read_score(tmp_path / "own.py") == (Algorithm("def score(W):\n    return W.abs()"), False)
    (tmp_path / "own.py").write_text("# group: colum\ndef score(W):\n    return W.abs()\n")
    with pytest.raises(InputError, match="unknown comparison group 'colum'"):
        read_score(tmp_path / "own.py")


@pytest.mark.parametrize(
    "comment, group, allocation, spread",
    [
        ("# Allocation: owl", "row", "owl lam=0.08", True),
        ("#ALLOCATION : atp@layer", "row", "atp@layer", True),
        ("# Group: matrix", "matrix", "uniform", False),
    ],
)
def test_what_a_file_says_of_its_group_and_allocation_is_taken(tmp_path, comment, group, allocation, spread):
    (tmp_path / "own.py").write_text(f"{comment}\ndef score(W):\n    return W.abs()\n")
    algorithm, said = read_score(tmp_path / "own.py")
    assert (algorithm.group, str(algorithm.allocation), said) == (group, allocation, spread)


@pytest.mark.parametrize(
    "comment, message",
    [
        ("# allocation: sdsaa tau=1", "own.py: unknown allocation 'sdsaa'.*'sdsa'"),
        ("# allocation: sdsa tua=1", "unknown parameter 'tua'.*'tau'"),
        ("# allocation: written 12345678", "holds no `def allocate"),
    ],
)
def test_what_a_file_says_of_its_allocation_is_refused_where_it_is_none(tmp_path, comment, message):
    (tmp_path / "own.py").write_text(f"{comment}\ndef score(W):\n    return W.abs()\n")
    with pytest.raises(InputError, match=message):
        read_score(tmp_path / "own.py")
