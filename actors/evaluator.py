"""The evaluator actor: Ray's view of one shard of the target model."""

from __future__ import annotations

from pathlib import Path

import torch

from autoprune.actors.messages import Probe
from autoprune.actors.seclusion import seclude
from autoprune.algorithms.algorithm import Algorithm, Sparsities
from autoprune.algorithms.language import LanguageError
from autoprune.algorithms.probe import probe
from autoprune.algorithms.profiles import BlockProfile
from autoprune.kernels.masks import prune_matrix, prune_nm, prune_rows
from autoprune.models.loading import resolve_model
from autoprune.models.masking import planned_sparsities
from autoprune.models.shard import ModelShard, ShardReport


class EvaluatorShard:
    """Loads its own blocks from disk; only source text, small numbers and hidden states cross the wire."""

    def __init__(
        self, model: str, start: int, stop: int, dtype: str, device: str, threads: int, alone: bool = False
    ) -> None:
        """model: a name that every node can resolve, so that each fetches what it lacks. alone: the process is this
        shard's own, and is secluded once it has its model."""
        # Fixed, so that their number never changes a sum.
        torch.set_num_threads(threads)
        self.shard = ModelShard(resolve_model(model), start, stop, dtype, device)
        # Kernels are compiled, or read from disk, at their first call: here, not within the deadline of a candidate.
        weight = torch.rand(4, 64, device=device, dtype=getattr(torch, dtype))
        for scores in (torch.rand(64, device=device), torch.rand(4, 64, device=device)):
            prune_rows(weight, scores, 32)
            prune_matrix(weight, scores, 128)
            prune_nm(weight, scores, 2, 4)
        if alone:
            seclude()

    def calibrate(self, states: torch.Tensor, statistics: frozenset[str], features: frozenset[str]) -> torch.Tensor:
        return self.shard.calibrate(states, statistics, features)

    def backward(self, upstream: torch.Tensor) -> torch.Tensor:
        return self.shard.backward(upstream)

    def profiles(self) -> list[BlockProfile]:
        return self.shard.profiles

    def plan(self, algorithm: Algorithm, profiles: list[BlockProfile], sparsity: float) -> Sparsities:
        """The sparsities of all blocks of the model, whose profiles these are."""
        return planned_sparsities(algorithm, profiles, sparsity)

    def forward(
        self,
        split: str,
        states: torch.Tensor,
        tokens: torch.Tensor,
        algorithm: Algorithm | None,
        sparsities: Sparsities | None,
    ) -> tuple[torch.Tensor, ShardReport]:
        return self.shard.forward(split, states, tokens, algorithm, sparsities and self._own(sparsities))

    def probe(self, algorithm: Algorithm, sparsity: float) -> Probe:
        try:
            result = probe(algorithm, sparsity)
        except LanguageError as error:
            return Probe(str(error))
        return Probe(None, result.mask, result.mask_hash)

    def export(self, file: Path, algorithm: Algorithm, sparsities: Sparsities) -> dict[str, dict]:
        return self.shard.export([file], algorithm, self._own(sparsities))

    def _own(self, sparsities: Sparsities) -> Sparsities:
        """This shard's part of those of all blocks."""
        start = self.shard.model.start
        return sparsities[start : start + self.shard.model.count]
