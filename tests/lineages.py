"""Made-up lineages that look like those of real searches: every operator and status, thoughts, code, block data."""

import math
import random

from autoprune.actors.messages import Evaluation
from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.pipeline.lineage import Candidate, Lineage

BLOCKS, WINDOWS, TOKENS = 30, 16, 511
SEEDS = {"magnitude": 9.0901, "wanda": 4.4890, "wanda+owl": 4.4257, "wanda+sdsa": 4.2361, "ria+sdsa": 4.4187}
DIAGNOSES = (
    "Block 0 and the last block carry most of the damage, and the score treats their columns like any other.",
    "Input features with few large activations dominate the norm, so weights on quiet but steady features go first.",
    "Rows of the output projections differ tenfold in scale; comparing over the matrix starves the small ones.",
    "Late blocks lose less than early ones at equal sparsity, and the allocation does not use it.",
)
HYPOTHESES = (
    "A root of the activation norm damps the outliers and keeps steady features, which should help blocks 0 to 3.",
    "Dividing by the mean size of the column keeps features that few weights read.",
    "A stronger depth factor moves the loss to blocks that can bear it.",
    "Adding the deviation from the mean separates features that vary from those that are merely large.",
)
TERMS = ("W.abs()", "x_norm.sqrt()", "x_norm", "(x_norm + x_mean.abs())", "W.abs().mean(dim=0)", "x_std", "W.square()")
ERRORS = (
    "line 3: name 'm9' is not defined: expected one of W, x_norm, x_mean",
    "line 2: torch.randn is not in the language: expected arithmetic, comparisons, or one of abs, sqrt, square, …",
    "the score is constant on the probe: every weight would be pruned or kept",
)
ALLOCATE = "def allocate(profile, sparsity):\n    s0 = profile.skewness.log()\n    return s0 * (1.5 - profile.depth)"


def evaluation(nll: float, rng: random.Random, depth: float = 0.2) -> Evaluation:
    """As of a model of 30 blocks pruned to 60%: errors grow with depth, one or two blocks stand out."""
    windows = tuple(nll + rng.gauss(0, 0.05) for _ in range(WINDOWS))
    sparsities = tuple(
        0.6
        + depth * (b / (BLOCKS - 1) - 0.5) * 0.4
        - (0.12 if b == 0 else 0.04 if b == BLOCKS - 1 else 0)
        + rng.gauss(0, 0.004)
        for b in range(BLOCKS)
    )
    size = min(1.4, nll / 12)
    errors = tuple(size * (0.35 + 0.65 * math.sqrt((b + 1) / BLOCKS)) + rng.gauss(0, 0.008) for b in range(BLOCKS))
    return Evaluation(sum(windows) / WINDOWS, WINDOWS * TOKENS, windows, sparsities, errors, 0.6, 12.5)


def code(rng: random.Random, before: str | None = None) -> str:
    """A score function; with one before it, that one with a line or two changed."""
    lines = before.split("\n")[1:-1] if before else []
    if not lines:
        lines = [f"    v{i} = {rng.choice(TERMS)} * {rng.choice(TERMS)}" for i in range(rng.randint(1, 4))]
    for _ in range(rng.randint(1, 2)):
        place = rng.randrange(len(lines))
        power = f"{rng.uniform(0.3, 2):.2f}"
        lines[place] = f"    v{place} = {rng.choice(TERMS)} * {rng.choice(TERMS)} ** {power}"
    return "\n".join(["def score(W, x_norm, x_mean, x_std):", *lines, f"    return v{len(lines) - 1} * W.abs()"])


def made_up(generations: int, width: int, seed: int = 0, parents: int | None = None) -> tuple[Lineage, str]:
    """Five seeds and `width` candidates in each of so many generations; and the best one's id.

    parents: of each candidate; otherwise one, or two of a crossover.
    """
    rng, lineage = random.Random(seed), Lineage()
    for index, (name, nll) in enumerate(SEEDS.items()):
        allocation = Allocation("sdsa", {"tau": 1.0, "m": 0.6, "depth": 0.0}) if "sdsa" in name else Allocation()
        score = f"def score(W, x_norm):\n    return W.abs() * x_norm{' ** 0.5' * (index % 2)}"
        algorithm, mask = Algorithm(score, "row", allocation), f"{rng.getrandbits(256):064x}"
        measured = evaluation(nll, rng, 0.0)
        given = {"status": "evaluated", "mask": mask, "mask_hash": mask[:16], "evaluation": measured}
        lineage.add(Candidate(f"seed-{name}", 0, "seed", algorithm=algorithm, **given))
    elites = sorted(lineage, key=lambda c: c.fitness)[:4]
    for generation in range(1, generations + 1):
        made = [_candidate(lineage, elites, generation, index, rng, parents) for index in range(width)]
        elites = sorted([*elites, *made], key=lambda c: c.fitness)[: 6 + width // 8]
    for elite in elites[:4]:
        elite.fresh = evaluation(elite.fitness + rng.gauss(0.02, 0.03), rng)
    return lineage, lineage.best().id


def _candidate(
    lineage: Lineage,
    elites: list[Candidate],
    generation: int,
    index: int,
    rng: random.Random,
    parents: int | None,
) -> Candidate:
    operator = rng.choices(("explore", "mutate", "crossover", "simplify", "tune", "repair"), (5, 6, 4, 2, 4, 1))[0]
    status = rng.choices(
        ("evaluated", "invalid", "repeat", "screened", "surplus", "failed", "poison", "proposed"),
        (60, 7, 12, 12, 6, 1.2, 0.5, 0.3),
    )[0]
    chosen = rng.sample(elites, parents or (2 if operator == "crossover" else 1))
    parent = chosen[0]
    candidate = Candidate(f"g{generation:02d}-c{index:02d}", generation, operator, tuple(c.id for c in chosen))
    candidate.diagnosis, candidate.hypothesis = rng.choice(DIAGNOSES), rng.choice(HYPOTHESES)
    candidate.status, candidate.tokens, candidate.prompt = status, rng.uniform(200, 500), "[system]\n" + "p" * 4000
    parameters = {"tau": round(rng.uniform(0.3, 1.2), 2), "m": 0.6, "depth": round(rng.uniform(0, 0.6), 2)}
    written = rng.random() < 0.15
    allocation = Allocation("written", source=ALLOCATE) if written else Allocation("sdsa", parameters)
    candidate.algorithm = Algorithm(code(rng, parent.algorithm.score), rng.choice(("row", "matrix")), allocation)
    candidate.mask = (
        f"{int(parent.mask, 16) ^ (rng.getrandbits(256) & rng.getrandbits(256) & rng.getrandbits(256)):064x}"
    )
    candidate.mask_hash = candidate.mask[:16]
    candidate.answer = (
        f"Diagnosis: {candidate.diagnosis}\nHypothesis: {candidate.hypothesis}\n{candidate.algorithm.score}"
    )
    worse = rng.expovariate(1 / 3) if rng.random() < 0.15 else abs(rng.gauss(0.04, 0.12))
    nll = parent.fitness + (-rng.expovariate(1 / 0.012) if rng.random() < 0.3 else worse)
    if status == "evaluated":
        candidate.evaluation = evaluation(rng.choices((nll, 18.4, math.inf), (98, 1, 0.4))[0], rng)
    if status in ("evaluated", "screened"):
        candidate.rungs = {"probe": nll + rng.gauss(0, 0.1), "cheap": nll + rng.gauss(0, 0.05)}
    if status == "screened":
        candidate.rival = elites[0].id
    if status == "repeat":
        candidate.repeats = parent.id
    if status == "invalid":
        candidate.error, candidate.algorithm, candidate.mask = rng.choice(ERRORS), None, ""
    if status == "failed":
        candidate.error = "the pruned model's loss is not a number"
    if status == "poison":
        candidate.error = "brought 3 evaluators down: the last one was killed by the out-of-memory killer"
    lineage.add(candidate)
    return candidate
