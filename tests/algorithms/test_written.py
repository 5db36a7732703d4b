"""Allocations written in the language: those of the project do what their rules do; others are refused."""

import random

import pytest
import torch
from safetensors.torch import load_file

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.allocation import AllocationError, allocate, check_allocation, needs
from autoprune.algorithms.language import LanguageError, parse, parse_allocation
from autoprune.algorithms.probe import probe, probe_allocation
from autoprune.algorithms.profiles import BlockProfile, Profile
from autoprune.algorithms.scores import WANDA
from autoprune.algorithms.vocabulary import SUMMARIES
from autoprune.algorithms.written import WRITTEN_ALLOCATIONS
from autoprune.models.pruning import prune


def model(source, blocks):
    """Of blocks whose summaries differ, one far more skewed than the others."""

    def summaries():
        return source.uniform(1, 3), source.uniform(0, 3), source.uniform(0.1, 1)

    made = []
    for block in range(blocks):
        layers = tuple(Profile(source.choice([1000, 2000]), *summaries()) for _ in range(3))
        skewness, *rest = summaries()
        skewness += 15 * (block == blocks // 2)
        made.append(BlockProfile(sum(layer.numel for layer in layers), skewness, *rest, layers=layers))
    return made


def body(expression):
    return f"def allocate(profile, sparsity):\n    return {expression}\n"


@pytest.mark.parametrize("name", WRITTEN_ALLOCATIONS)
@pytest.mark.parametrize("per", ["block", "layer"])
def test_written_rules_are_the_rules(name, per):
    source = random.Random(0)
    written = Allocation("written", per=per, source=WRITTEN_ALLOCATIONS[name])
    check_allocation(written)
    for blocks in (1, 2, 5, 30):
        for sparsity in (0.3, 0.5, 0.6):
            profiles = model(source, blocks)
            own, rule = allocate(written, profiles, sparsity), allocate(Allocation(name, per=per), profiles, sparsity)
            for mine, theirs in zip(own, rule, strict=True):
                assert mine == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("name", WRITTEN_ALLOCATIONS)
def test_written_rules_give_the_same_masks(name, tmp_path, tiny_model):
    text, masks = tmp_path / "text.txt", []
    text.write_text("\n\n".join(f"{number}. The sun goes down behind the hills. " * 9 for number in range(9)))
    for allocation in (Allocation(name), Allocation("written", source=WRITTEN_ALLOCATIONS[name])):
        out = tmp_path / allocation.name
        algorithm = Algorithm(parse(WANDA.source).source, "row", allocation)
        sidecar = prune(str(tiny_model), algorithm, 0.5, str(text), out, context=24, windows=4, device="cpu")
        assert Algorithm.from_dict({k: v for k, v in sidecar["algorithm"].items() if k != "key"}) == algorithm
        masks.append({key: tensor == 0 for key, tensor in load_file(out / "model.safetensors").items()})
    assert all(torch.equal(masks[0][key], masks[1][key]) for key in masks[0])


def test_every_summary_can_be_read_and_is_asked_for():
    for name in SUMMARIES:
        source = body(f"0.1 + profile.{name}.abs()")
        assert parse_allocation(source).reads == (name,)
        probe_allocation(source)
        assert needs(Allocation("written", source=source)) == {name} & {"kurtosis", "score_std"}
    unknown = [BlockProfile(10, 1.0, 1.0, 1.0)]
    with pytest.raises(AllocationError, match="reads kurtosis, which was not measured"):
        allocate(Allocation("written", source=body("profile.kurtosis")), unknown, 0.5)


@pytest.mark.parametrize(
    "source, reason",
    [
        (body("profile"), "profile is read by its summaries, profile.NAME: numel"),
        (body("profile.skew"), "did you mean 'skewness'"),
        (body("profile.__class__"), "'__class__' is not a summary"),
        (body("profile.numel.tolist()"), "'tolist' is not in the language"),
        (body("sparsity.numel"), "the attribute 'numel' is not in the language"),
        (body("W.abs()"), "'W' is not defined"),
        (body("profile.skewness.mean()"), "returned float64 [], expected float64 [1]"),
        (body("profile.numel > 0"), "returned bool"),
        (body("sparsity"), "returned a float"),
        (body("-profile.numel"), "one of them above 0"),
        (body("1 / profile.depth"), "finite"),
        (body("(profile.numel[:, None] * profile.numel[None, :]).sum(dim=0)"), "larger than the number of units [5]"),
        ("def allocate(profile):\n    return profile.numel", "expected `def allocate(profile, sparsity):`"),
        ("def allocate(profile, sparsity=0):\n    return profile.numel", "expected `def allocate(profile, sparsity):`"),
        ("def allocate(sparsity, profile):\n    return profile.numel", "expected `def allocate(profile, sparsity):`"),
        (body("profile.numel") + body("profile.numel"), "one of them or each once"),
        (WANDA.source, "expected exactly one function, `def allocate(profile, sparsity):`"),
        ("def allocate(profile, sparsity):\n    profile = sparsity\n    return profile", "cannot be assigned to"),
        ("def allocate(profile, sparsity):\n    sparsity = 0.5\n    return profile.numel", "stays as it is"),
        ("def allocate(profile, sparsity):\n    profile.numel = 1\n    return profile.numel", "the statement Assign"),
    ],
)
def test_what_is_refused(source, reason):
    with pytest.raises(LanguageError) as refusal:
        probe_allocation(source)
    assert reason in str(refusal.value) and "\n" not in str(refusal.value)


def test_a_profile_is_an_allocation_s_alone():
    with pytest.raises(LanguageError):
        parse("def score(W, x_norm):\n    return W.abs() * profile.numel")


def test_the_same_allocation_in_other_words_is_the_same_algorithm():
    def hashed(expression):
        allocation = Allocation("written", source=parse_allocation(body(expression)).source)
        return probe(Algorithm(WANDA.source, "row", allocation), 0.6).mask_hash

    assert hashed("profile.skewness * 2") == hashed("profile.skewness.square() / profile.skewness")
    assert hashed("profile.skewness") != hashed("profile.kurtosis")


def test_nothing_but_source_belongs_to_it():
    for allocation in (
        Allocation("written", {"tau": 1.0}, source=WRITTEN_ALLOCATIONS["sdsa"]),
        Allocation("written", values=(0.5,), source=WRITTEN_ALLOCATIONS["sdsa"]),
        Allocation("sdsa", source=WRITTEN_ALLOCATIONS["sdsa"]),
    ):
        with pytest.raises(AllocationError):
            check_allocation(allocation)
    with pytest.raises(LanguageError):
        check_allocation(Allocation("written"))
