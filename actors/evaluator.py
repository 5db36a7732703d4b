"""The evaluator actor: Ray's view of one shard of the target model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from autoprune.actors.messages import Probe
from autoprune.actors.seclusion import seclude
from autoprune.actors.storage import Storage
from autoprune.algorithms.algorithm import Algorithm, Sparsities
from autoprune.algorithms.language import LanguageError
from autoprune.algorithms.probe import probe
from autoprune.algorithms.profiles import BlockProfile
from autoprune.kernels.masks import prune_matrix, prune_nm, prune_rows
from autoprune.models.loading import resolve_model
from autoprune.models.masking import planned_sparsities
from autoprune.models.shard import ModelShard, ShardReport
from autoprune.models.shard_state import FACTS, VERSIONS, read_state, state_digest, tensors_digest, write_state

PIECE = 1 << 26  # bytes of a file that travel at a time


@dataclass(frozen=True)
class Ready:
    """A shard that may be given work. digest: of its weights, and of what it learned of them and the texts; equal
    digests, equal measurements. profiles: of its blocks. reports: of the dense passes, by split."""

    digest: str
    profiles: list[BlockProfile]
    reports: dict[str, ShardReport]


class EvaluatorShard:
    """Loads its own blocks from disk; only source text, small numbers and hidden states cross the wire."""

    def __init__(
        self,
        model: str,
        start: int,
        stop: int,
        dtype: str,
        device: str,
        threads: int,
        alone: bool = False,
        state: str = "",
        share: float = 1.0,
    ) -> None:
        """model: a name that every node can resolve, so that each fetches what it lacks. alone: the process is this
        shard's own, and is secluded once it has its model. state: where what is learned of the dense model is kept (a
        folder, or what `Storage` knows); empty: nowhere. share: of a GPU's memory, beyond which nothing is taken."""
        if device == "cuda" and share < 1:
            torch.cuda.set_per_process_memory_fraction(share)
        # Fixed, so that their number never changes a sum.
        torch.set_num_threads(threads)
        self.shard = ModelShard(resolve_model(model), start, stop, dtype, device)
        self._weights = tensors_digest(self.shard.model.tensors())
        # What else measurements follow from, beside what the driver knows.
        chip = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
        self._about = {"weights": self._weights, "chip": chip, **VERSIONS}
        self._name = f"shard-{start:04d}-{stop:04d}"
        self._storage = Storage(state) if state else None
        # Kernels are compiled, or read from disk, at their first call: here, not within the deadline of a candidate.
        weight = torch.rand(4, 64, device=device, dtype=getattr(torch, dtype))
        for scores in (torch.rand(64, device=device), torch.rand(4, 64, device=device)):
            prune_rows(weight, scores, 32)
            prune_matrix(weight, scores, 128)
            prune_nm(weight, scores, 2, 4)
        if alone:
            seclude()

    def take_up(self, about: dict) -> Ready | None:
        """Take what was kept of the same weights and the same `about` for this shard's own; None where there is
        none."""
        if self._storage is None:
            return None
        found = False
        with contextlib.suppress(OSError), self._storage.reading(self._name) as folder:
            found = read_state(self.shard, folder, about | self._about)
        return self.ready() if found else None

    def keep(self, about: dict, expected: str | None, *_passes: object) -> Ready:
        """Keep what calibration and the dense passes taught, for `take_up`; what cannot be kept is learned again.

        expected: the digest that other replicas have shown, or None: what differs is not kept. Further arguments: what
        all shards' passes returned, which must have ended well before this one is ready.
        """
        ready = self.ready()
        if self._storage is not None and expected in (None, ready.digest):
            with contextlib.suppress(OSError), self._storage.writing(self._name, last=FACTS) as folder:
                write_state(self.shard, folder, about | self._about)
        return ready

    def ready(self) -> Ready:
        """What the driver needs of this shard once it has been calibrated and has measured the dense model. An engine
        may be next on this GPU."""
        self.give_back()
        return Ready(f"{self._weights} {state_digest(self.shard)}", self.shard.profiles, self.shard.dense_reports)

    def give_back(self) -> None:
        """What is kept of a GPU's memory for the next use."""
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    def calibrate(self, states: torch.Tensor, statistics: frozenset[str], features: frozenset[str]) -> torch.Tensor:
        left = self.shard.calibrate(states, statistics, features)
        return left.new_empty(0) if self.shard.model.last else left  # nobody reads what leaves the last one

    def backward(self, upstream: torch.Tensor) -> torch.Tensor:
        return self.shard.backward(upstream)

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

    def export(self, files: list[Path], algorithm: Algorithm, sparsities: Sparsities) -> tuple[dict[str, dict], bool]:
        """Write this shard's part of the pruned model: to `files`, where this machine sees the driver's folder, which
        is what the second value says; else to files of its own, until `part` has handed them over."""
        seen = self._sees(files[0].parent)
        if not seen:
            self._parts = Path(tempfile.mkdtemp(prefix="autoprune-"))
        own = files if seen else [self._parts / file.name for file in files]
        return self.shard.export(own, algorithm, self._own(sparsities)), seen

    def part(self, name: str) -> Iterator[bytes]:
        """A file that `export` wrote, piece by piece; it is gone afterwards."""
        path = self._parts / name
        try:
            with open(path, "rb") as file:
                while piece := file.read(PIECE):
                    yield piece
        finally:
            path.unlink()
            if not any(self._parts.iterdir()):
                self._parts.rmdir()

    def _sees(self, folder: Path) -> bool:
        return folder.is_dir()

    def _own(self, sparsities: Sparsities) -> Sparsities:
        """This shard's part of those of all blocks."""
        start = self.shard.model.start
        return sparsities[start : start + self.shard.model.count]
