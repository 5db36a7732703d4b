"""A pruning algorithm: score function + comparison group + allocation, and nothing else."""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import asdict, dataclass, field

GROUPS = ("row", "matrix")  # what a candidate may choose; `Group` knows more
UPDATES = ("none", "sparsegpt", "cg")

Sparsities = list[list[float]]  # [blocks][prunable layers of the block], in the model's order


@dataclass(frozen=True)
class Group:
    """Where scores compete, read from its text.

    kind: "row"; "matrix"; "n:m" (text `2:4`: of every m consecutive weights of a row, n are kept); or "tile" (text
    `16x16`: rectangles of rows × columns are kept or pruned as a whole, compared over the matrix).
    first, second: n and m, or rows and columns; 0 otherwise.
    """

    kind: str
    first: int = 0
    second: int = 0

    @classmethod
    def parse(cls, text: str) -> Group:
        """Raises ValueError, one line, for a text that names no group."""
        if text in GROUPS:
            return cls(text)
        match = re.fullmatch(r"([1-9]\d{0,3})([:x])([1-9]\d{0,3})", text)
        if match is None or (match[2] == ":" and int(match[1]) >= int(match[3])):
            raise ValueError(
                f"unknown comparison group {text!r}: expected row, matrix, n:m such as 2:4 (n of m are kept, n < m), "
                "or rectangles such as 16x16"
            )
        return cls("n:m" if match[2] == ":" else "tile", int(match[1]), int(match[3]))

    @property
    def sparsity(self) -> float | None:
        """The share of the weights that n:m prunes; None for groups that leave it open."""
        return 1 - self.first / self.second if self.kind == "n:m" else None


@dataclass(frozen=True)
class Allocation:
    """Which rule turns summaries into sparsities, and its parameters (see `algorithms.allocation`).

    per: whose summaries are read: "block", or "layer" where each linear layer gets its own sparsity. values: for the
    rule "explicit" alone, one sparsity per block or layer, from which the budget is met. source: for the rule "written"
    alone, the text of `allocate(profile, sparsity)` in the algorithm language.
    """

    name: str = "uniform"
    parameters: dict[str, float] = field(default_factory=dict)
    per: str = "block"
    values: tuple[float, ...] = ()
    source: str = ""

    def __str__(self) -> str:
        parts = [self.name + ("@layer" if self.per == "layer" else "")]
        parts += [f"{name}={value:g}" for name, value in sorted(self.parameters.items())]
        parts += [f"{value:g}" for value in self.values]
        return " ".join([*parts, hashlib.sha256(self.source.encode()).hexdigest()[:8]] if self.source else parts)


@dataclass(frozen=True)
class Algorithm:
    """Everything needed to prune a model to a given sparsity.

    score: source text of `score(W, …)` in the algorithm language (see `algorithms.language`), or the name of a score
    that cannot be written in it: one of `algorithms.scores.NATIVE`.
    group: where scores compete (see `Group`).
    update: how the kept weights make up for the pruned ones: "none", "sparsegpt" or "cg" (see `algorithms.updates`).
    """

    score: str
    group: str = "row"
    allocation: Allocation = field(default_factory=Allocation)
    update: str = "none"

    @property
    def key(self) -> str:
        """Hash of the text of the algorithm: 16 hexadecimal digits, equal for equal fields."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()[:16]

    def to_dict(self) -> dict:
        data = asdict(self)
        data["allocation"]["values"] = list(self.allocation.values)
        if not self.allocation.source:  # as in the journals of searches that know of no such allocation
            del data["allocation"]["source"]
        return data

    @classmethod
    def from_dict(cls, data: dict) -> Algorithm:
        allocation = dict(data["allocation"])
        allocation["values"] = tuple(allocation.get("values", ()))
        return cls(data["score"], data["group"], Allocation(**allocation), data.get("update", "none"))
