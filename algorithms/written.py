"""Allocations of the project, written in the language that candidates are written in.

Each yields what the rule of its name does (`algorithms.rules`), to rounding, where no unit meets a bound: `owl`, `dlp`
and `atp` are shifted there, and what is written is scaled. Two cannot: `dsa` needs an arcus sine, and `alphapruning`
scales what is pruned, where a candidate's answer scales what is kept.
"""

UNIFORM = """\
def allocate(profile, sparsity):
    return profile.numel / profile.numel
"""

SDSA = """\
def allocate(profile, sparsity):
    g = profile.skewness.clamp(min=0.05)
    p = g.clamp(max=1.75 * g.median(dim=0)).log().softmax(dim=0)
    share = 0.4 + 0.6 * p / p.mean()
    odds = sparsity / (1 - sparsity) / 1.5
    e = torch.minimum(odds + 0 * p, 2 + 0 * p)
    return (share * (1.5 - 0.5 * profile.depth)) ** e
"""

OWL = """\
def allocate(profile, sparsity):
    z = profile.outlier_share - profile.outlier_share.amin()
    band = 0.16 * z / z.amax().clamp(min=1e-30)
    return band - (band * profile.numel).sum() / profile.numel.sum() + 1 - sparsity
"""

DLP = """\
def allocate(profile, sparsity):
    i = profile.score_mean / profile.score_mean.sum()
    z = i.amax() - i
    band = 0.3 * z / z.amax().clamp(min=1e-30)
    return band - (band * profile.numel).sum() / profile.numel.sum() + 1 - sparsity
"""

ATP = """\
def allocate(profile, sparsity):
    kept = -0.16 * profile.depth
    return kept - (kept * profile.numel).sum() / profile.numel.sum() + 1 - sparsity
"""

WRITTEN_ALLOCATIONS: dict[str, str] = {"uniform": UNIFORM, "sdsa": SDSA, "owl": OWL, "dlp": DLP, "atp": ATP}
