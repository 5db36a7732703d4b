"""Writing a shard's tensors, pruned, as safetensors files: block by block, one file in memory at a time."""

from __future__ import annotations

from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from autoprune.kernels.distance import digest
from autoprune.models.blocks import DecoderRange
from autoprune.models.checkpoint_files import read_tensors
from autoprune.models.layers import Layer
from autoprune.models.masking import BlockChoice


class PartWriter:
    """Spreads a shard's blocks evenly, in order, over files; tensors outside the blocks go into the first.

    Tensors are as they are on disk, in their dtype, with the pruned weights set to zero and, after a weight update,
    the kept ones new.
    """

    def __init__(self, model: DecoderRange, paths: list[Path]) -> None:
        self.model = model
        self.paths = paths
        self.layers: dict[str, dict] = {}  # by name: numel, pruned weights, and the mask's digest (kernels.distance)
        self._tensors: dict[str, Tensor] = read_tensors(model.folder, model.outside_names())

    def add(self, index: int, layers: list[Layer], choice: BlockChoice) -> None:
        """Take in block `index` of the shard; blocks come in order."""
        tensors = read_tensors(self.model.folder, self.model.block_names(index))
        for layer in layers:
            mask, updated = choice.mask(layer.name), choice.updated.get(layer.name)
            layer.store(tensors, mask.cpu(), None if updated is None else updated.cpu())
            name = f"{self.model.block_prefix}.{self.model.start + index}.{layer.name}"
            self.layers[name] = {
                "numel": mask.numel(),
                "pruned": mask.numel() - int(mask.sum()),
                "mask": f"{digest(choice.bits[layer.name]):016x}",
            }
            if layer.name in choice.fallbacks:
                self.layers[name]["fallback"] = "magnitude"
            if layer.name in choice.dead:
                self.layers[name]["dead_inputs"] = choice.dead[layer.name]
            if layer.name in choice.dampings:
                self.layers[name]["damping"] = choice.dampings[layer.name]
        self._tensors |= tensors
        part = self._part(index)
        if index + 1 == self.model.count or self._part(index + 1) != part:
            save_file(self._tensors, self.paths[part], metadata={"format": "pt"})
            self.paths[part].chmod(0o644)  # safetensors writes 0600; a checkpoint is as readable as any other output
            self._tensors = {}

    def _part(self, index: int) -> int:
        return index * len(self.paths) // self.model.count
