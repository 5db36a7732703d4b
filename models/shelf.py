"""Tensors of each block that are made in one pass and read in another."""

from __future__ import annotations

from pathlib import Path
from tempfile import TemporaryDirectory

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoprune.models.catalogue import cache_folder
from autoprune.models.errors import InputError


class Shelf:
    """Tensors by name, for each block: in memory or, where only one block may be there at a time, in a temporary
    folder that goes with this object; it lies in the cache, since the system's own for such files may be memory.
    Those on disk come back on the CPU. Raises InputError where the disk is full."""

    def __init__(self, on_disk: bool) -> None:
        self._on_disk = on_disk
        self._folder: TemporaryDirectory | None = None  # made when it is needed: most runs keep nothing here
        self._held: dict[int, dict[str, Tensor]] = {}

    def put(self, block: int, tensors: dict[str, Tensor]) -> None:
        """Replaces what this block had."""
        if not self._on_disk:
            self._held[block] = tensors
            return
        try:
            if self._folder is None:
                cache_folder().mkdir(parents=True, exist_ok=True)
                self._folder = TemporaryDirectory(prefix=".shelf-", dir=cache_folder())
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, self._file(block))
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"cannot keep gradients in {cache_folder()} ({error}): free some space, or choose another cache with "
                "AUTOPRUNE_CACHE"
            ) from None

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
