"""Tensors of each block that are made in one pass and read in another."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors.torch import load_file, save_file
from torch import Tensor


class Shelf:
    """Tensors by name, for each block: in memory or, where only one block may be there at a time, in a temporary
    folder that goes with this object. Those on disk come back on the CPU."""

    def __init__(self, on_disk: bool) -> None:
        self._folder = TemporaryDirectory(prefix="autoprune-") if on_disk else None
        self._held: dict[int, dict[str, Tensor]] = {}

    def put(self, block: int, tensors: dict[str, Tensor]) -> None:
        """Replaces what this block had."""
        if self._folder is None:
            self._held[block] = tensors
        else:
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._file(block))

    def get(self, block: int) -> dict[str, Tensor]:
        """Empty for a block that was given none."""
        if self._folder is None:
            return self._held.get(block, {})
        return load_file(self._file(block)) if self._file(block).exists() else {}

    def pop(self, block: int) -> dict[str, Tensor]:
        """As `get`; the block has none afterwards."""
        tensors = self.get(block)
        if self._folder is None:
            self._held.pop(block, None)
        else:
            self._file(block).unlink(missing_ok=True)
        return tensors

    def _file(self, block: int) -> Path:
        return Path(self._folder.name) / f"{block}.safetensors"
