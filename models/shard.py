"""A shard: a contiguous range of decoder blocks that can be calibrated, pruned for one pass, and run."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.language import Program, parse
from autoprune.algorithms.statistics import BlockProfile, InputMoments, block_profile
from autoprune.kernels.masks import matrix_mask, row_mask
from autoprune.models.blocks import DecoderRange, prunable, read_tensors
from autoprune.models.calibration import input_moments
from autoprune.models.perplexity import window_nlls

WINDOWS_AT_ONCE = 4  # bounds the memory of attention and activations; a block runs over chunks of this many windows
PROFILE_WINDOWS = 2  # windows whose dense hidden states are kept, to say in which blocks an algorithm errs


@dataclass
class ShardReport:
    """What one shard measured during one pass, per block of the shard.

    numels and pruned count prunable weights; errors are ‖h − h_dense‖ / ‖h_dense‖ after each block.
    window_nlls: nats per token and window, of the last shard only.
    """

    numels: list[int] = field(default_factory=list)
    pruned: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    window_nlls: list[float] = field(default_factory=list)
    seconds: float = 0.0


def layer_mask(
    program: Program, group: str, sparsity: float, weight: torch.Tensor, moments: InputMoments
) -> torch.Tensor:
    """Kept weights [out, in] of one layer: the floor of sparsity × group size is pruned in every comparison group.

    Raises ValueError for scores that are not finite: they would be ties that say nothing.
    """
    scores = program(weight.float(), {name: getattr(moments, name).to(weight.device) for name in program.reads})
    if not all(bound.isfinite() for bound in torch.aminmax(scores)):
        raise ValueError("the scores are not finite on the target's weights")
    size = weight.shape[1] if group == "row" else weight.numel()
    count = int(sparsity * size + 1e-9)  # 0.6 × 5 is 3, though 2.9999… in floating point
    return row_mask(scores, count) if group == "row" else matrix_mask(scores, count)


class ModelShard:
    """Blocks start … stop−1 of a model on one device. The dense weights are never written to."""

    def __init__(self, folder: Path, start: int, stop: int, dtype: str, device: str) -> None:
        self.device = torch.device(device)
        self.model = DecoderRange(folder, start, stop, getattr(torch, dtype), self.device)
        self.layers = [prunable(block) for block in self.model.blocks]
        self.moments: list[dict[str, InputMoments]] = []
        self._dense_states: dict[str, list[torch.Tensor]] = {}
        self._checksum = self.checksum()

    def checksum(self) -> int:
        """Sum of the bits of all prunable weights: a write that forgets to restore one does not leave it as it was."""
        views = {2: torch.int16, 4: torch.int32}
        weights = [layer.weight for layers in self.layers for layer in layers.values()]
        return sum(int(w.view(views[w.element_size()]).sum(dtype=torch.int64)) for w in weights)

    @torch.inference_mode()
    def calibrate(self, states: torch.Tensor) -> torch.Tensor:
        """Token windows (first shard) or hidden states in → hidden states out; moments of all inputs are kept."""
        hidden = self._enter(states)
        self.moments = []
        for index, layers in enumerate(self.layers):
            with input_moments(layers) as moments:
                hidden = self._run_block(index, hidden)
            self.moments.append(moments)
        return hidden.cpu()

    @torch.inference_mode()
    def profiles(self) -> list[BlockProfile]:
        """Per block: what allocations read of |W| and of the calibrated Wanda scores."""
        return [
            block_profile((layer.weight, moments[name].x_norm) for name, layer in layers.items())
            for layers, moments in zip(self.layers, self.moments, strict=True)
        ]

    @torch.inference_mode()
    def forward(
        self,
        split: str,
        states: torch.Tensor,
        tokens: torch.Tensor,
        algorithm: Algorithm | None = None,
        sparsities: list[float] | None = None,
    ) -> tuple[torch.Tensor, ShardReport]:
        """One pass over a split: dense where algorithm is None, otherwise with each block pruned while it runs.

        states: token windows for the first shard, else hidden states [windows, L, D]; tokens: int64 [windows, L];
        sparsities: one per block of this shard. Returns the hidden states that leave the shard and the measurements;
        after the last shard only an empty tensor, since its measurement is the NLL.
        Raises LanguageError or ValueError where the algorithm yields no usable scores.
        """
        began = time.perf_counter()
        report = ShardReport()
        program = parse(algorithm.score) if algorithm is not None else None
        hidden = self._enter(states)
        dense = self._dense_states.get(split) if algorithm is not None else None
        references = []
        for index, layers in enumerate(self.layers):
            weights = {name: layer.weight.data for name, layer in layers.items()}
            try:
                pruned = 0
                if program is not None:
                    for name, layer in layers.items():
                        moments = self.moments[index][name]
                        mask = layer_mask(program, algorithm.group, sparsities[index], weights[name], moments)
                        layer.weight.data = weights[name] * mask
                        pruned += mask.numel() - int(mask.sum())
                hidden = self._run_block(index, hidden)
            finally:
                for name, layer in layers.items():
                    layer.weight.data = weights[name]
            report.numels.append(sum(w.numel() for w in weights.values()))
            report.pruned.append(pruned)
            states_now = hidden[:PROFILE_WINDOWS].float()
            references.append(states_now.to(torch.bfloat16))
            if dense is not None:
                reference = dense[index].float()
                report.errors.append(float((states_now - reference).norm() / reference.norm()))
        if algorithm is None:
            self._dense_states[split] = references
        elif self.checksum() != self._checksum:
            raise RuntimeError("the dense weights changed during an evaluation")
        if self.model.last:
            report.window_nlls = window_nlls(hidden, tokens, self.model.norm, self.model.head)
            hidden = hidden.new_empty(0)
        report.seconds = time.perf_counter() - began
        return hidden.cpu(), report

    @torch.inference_mode()
    def export(self, file: Path, algorithm: Algorithm, sparsities: list[float]) -> dict[str, dict]:
        """Write this shard's tensors as one safetensors file: as they are on disk, in their dtype, with the pruned
        weights set to zero. Returns per layer: numel and pruned weights."""
        program = parse(algorithm.score)
        layers_report = {}
        tensors = read_tensors(self.model.folder, self.model.own_names)
        for index, layers in enumerate(self.layers):
            for name, layer in layers.items():
                moments = self.moments[index][name]
                mask = layer_mask(program, algorithm.group, sparsities[index], layer.weight.data, moments).cpu()
                full_name = f"{self.model.block_prefix}.{self.model.start + index}.{name}"
                tensors[f"{full_name}.weight"] = tensors[f"{full_name}.weight"] * mask
                layers_report[full_name] = {"numel": mask.numel(), "pruned": mask.numel() - int(mask.sum())}
        save_file(tensors, file, metadata={"format": "pt"})
        return layers_report

    def _enter(self, states: torch.Tensor) -> torch.Tensor:
        states = states.to(self.device)
        return self.model.embedding(states) if self.model.first else states

    def _run_block(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        return torch.cat([self.model.run(index, chunk) for chunk in hidden.split(WINDOWS_AT_ONCE)])
