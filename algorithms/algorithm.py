"""A pruning algorithm: score function + comparison group + allocation, and nothing else."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field

GROUPS = ("row", "matrix")


@dataclass(frozen=True)
class Allocation:
    """Which rule turns block summaries into block sparsities, and its parameters (see `algorithms.allocation`)."""

    name: str = "uniform"
    parameters: dict[str, float] = field(default_factory=dict)

    def __str__(self) -> str:
        parameters = " ".join(f"{name}={value:g}" for name, value in sorted(self.parameters.items()))
        return f"{self.name} {parameters}".strip()


@dataclass(frozen=True)
class Algorithm:
    """Everything needed to prune a model to a given sparsity.

    score: source text of `score(W, …)` in the algorithm language (see `algorithms.language`).
    group: where scores compete, one of GROUPS.
    """

    score: str
    group: str = "row"
    allocation: Allocation = field(default_factory=Allocation)

    @property
    def key(self) -> str:
        """Hash of the text of the algorithm: 16 hexadecimal digits, equal for equal fields."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: dict) -> Algorithm:
        return cls(data["score"], data["group"], Allocation(**data["allocation"]))
