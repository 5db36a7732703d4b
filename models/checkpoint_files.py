"""The safetensors files of a checkpoint folder, and where in them the tensors of a transformers model are."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from autoprune.models.errors import InputError

# The operations by which transformers joins tensors of one expert each into one tensor of all experts.
EXPERT_OPERATIONS = (["MergeModulelist"], ["MergeModulelist", "Concatenate"])


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name → safetensors file that holds it, for a checkpoint folder in the Hugging Face layout."""
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if not single.exists() and index.exists():  # in this order transformers looks for them: an index may be left over
        try:
            files = {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError, TypeError):
            raise InputError(f"{index} is damaged: expected a weight_map; fetch or save the model again") from None
        for file in set(files.values()):
            if not file.exists():
                raise InputError(f"{file} is missing, which the index names: fetch or save the model again")
        return files
    if not single.exists():
        raise InputError(
            f"{folder} holds no model.safetensors: expected a safetensors checkpoint; save it as one first"
        )
    with open_tensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def checkpoint_bytes(folder: Path) -> int:
    """Size of a checkpoint's weights on disk."""
    return sum(file.stat().st_size for file in set(weight_files(folder).values()))


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file; InputError where it is missing, cut or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): fetch or save the model again") from None


def each_tensor(files: dict[str, Path], names: Iterable[str]) -> Iterable[tuple[str, torch.Tensor]]:
    """These tensors one by one as (name, tensor in the dtype on disk), each file opened once; InputError where a file
    lacks one that `files` places in it."""
    wanted: dict[Path, list[str]] = {}
    for name in sorted(names):
        wanted.setdefault(files[name], []).append(name)
    for path, own in wanted.items():
        with open_tensors(path) as file:
            for name in own:
                try:
                    yield name, file.get_tensor(name)
                except SafetensorError:
                    raise InputError(f"{path} lacks {name}: fetch or save the model again") from None


def read_tensors(folder: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """Just these tensors of a checkpoint, in the dtype on disk; names that it does not hold are left out."""
    files = weight_files(folder)
    return dict(each_tensor(files, names & files.keys()))


@dataclass(frozen=True)
class Source:
    """Where rows of one linear layer's weight [out, in] are on disk.

    name: of the tensor on disk; rows: those of the weight that it holds, None for all; expert: the layer's place along
    the first dimension, where one tensor holds all experts; transposed: the tensor is [in, out], or [experts, in, out].
    """

    name: str
    rows: slice | None = None
    expert: int | None = None
    transposed: bool = False

    def view(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        """The rows [rows, in] as a view of the tensor on disk: writing to it writes to `tensors`."""
        tensor = tensors[self.name]
        tensor = tensor if self.expert is None else tensor[self.expert]
        return tensor.T if self.transposed else tensor


class Checkpoint:
    """Where a folder holds the tensors of a model, whose modules may name and join them in another way.

    Translated by transformers' own rules, those that `from_pretrained` follows: names, the base prefix, and experts
    that are one tensor each on disk (gate rows, then up rows) and one tensor for all of them in the module.
    """

    def __init__(self, folder: Path, model: PreTrainedModel) -> None:
        """model: on any device, also meta; only its names and shapes are read."""
        self.folder = folder
        self.files = weight_files(folder)
        self.target: dict[str, str] = {}  # name on disk → name of the module's tensor; without what no module has
        self._shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        self._parts: dict[str, list[tuple[int | None, Source]]] = {}  # (expert or None for the whole tensor, source)
        self._foreign: set[str] = set()  # module tensors that are stored in a layout which is not understood here
        self._translate(model)
        self._tied = self._ties(model)

    def _translate(self, model: PreTrainedModel) -> None:
        rules = get_model_conversion_mapping(model)
        renamings = [rule for rule in rules if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in rules if isinstance(rule, WeightConverter)]
        of_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        for name in sorted(self.files):
            prefixed = (model.base_model_prefix, self._shapes)
            target, pattern = rename_source_key(name, renamings, converters, *prefixed)
            if target not in self._shapes and name in self._shapes:
                target, pattern = name, None
            if target not in self._shapes:
                continue
            self.target[name] = target
            parts = self._parts.setdefault(target, [])
            if pattern is None:
                parts.append((None, Source(name)))
                continue
            rule = of_pattern[pattern]
            operations = [type(operation).__name__ for operation in rule.operations]
            if operations in EXPERT_OPERATIONS:
                count, place = len(rule.source_patterns), rule.source_patterns.index(pattern)
                step = self._shapes[target][1] // count
                expert = int([part for part in name.split(".") if part.isdigit()][-1])
                parts.append((expert, Source(name, slice(place * step, (place + 1) * step) if count > 1 else None)))
            else:
                self._foreign.add(target)

    def _ties(self, model: PreTrainedModel) -> dict[str, str]:
        """Module tensor without one of its own on disk → the one on disk that it is tied to."""
        groups: dict[int, list[str]] = {}
        for name, parameter in model.named_parameters(remove_duplicate=False):
            groups.setdefault(id(parameter), []).append(name)
        held = {name: kept for names in groups.values() for kept in names if kept in self._parts for name in names}
        return {name: kept for name, kept in held.items() if name not in self._parts}

    def tied(self, target: str) -> bool:
        """Whether this module tensor shares its tensor on disk with another one."""
        return target in self._tied or target in self._tied.values()

    def sources(self, target: str, expert: int | None, transposed: bool) -> tuple[Source, ...]:
        """Where the weight of a linear layer is on disk: the module tensor `target`, or one expert of it, which the
        module keeps as [in, out] if `transposed`."""
        return tuple(
            replace(source, expert=expert if whole is None else None, transposed=transposed)
            for whole, source in self._parts[target]
            if whole is None or whole == expert
        )

    def check(self, targets: list[str]) -> None:
        """InputError unless the folder holds all of these module tensors."""
        missing = [name for name in targets if not self._whole(self._tied.get(name, name))]
        foreign = [name for name in targets if name in self._foreign]
        if foreign:
            raise InputError(
                f"{self.folder} stores {foreign[0]} in a layout that is not supported: load the model with "
                "transformers and save it by save_pretrained(…, save_original_format=False)"
            )
        if missing:
            more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
            raise InputError(f"{self.folder} lacks {missing[0]}{more}: the checkpoint is incomplete")

    def load(
        self, targets: list[str], dtype: Callable[[str], torch.dtype], device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Module tensors by name, in `dtype(name)` on `device`; tied ones are the same tensor.

        One tensor at a time is read from disk beside the result. InputError for a tensor of another shape than the
        module's; `check` says beforehand what the folder lacks.
        """
        places = {
            source.name: (name, expert, source.rows)
            for name in {self._tied.get(name, name) for name in targets}
            for expert, source in self._parts[name]
        }
        found: dict[str, torch.Tensor] = {}
        for disk_name, tensor in each_tensor(self.files, places):
            name, expert, rows = places[disk_name]
            shape = self._shapes[name]
            if expert is not None:
                shape = torch.Size([shape[1] if rows is None else rows.stop - rows.start, *shape[2:]])
            if tensor.shape != shape:
                raise InputError(
                    f"{self.folder}: {disk_name} has the shape {list(tensor.shape)}: expected {list(shape)} by its "
                    "config.json"
                )
            if expert is None:
                found[name] = tensor.to(device=device, dtype=dtype(name))
            else:
                if name not in found:
                    found[name] = torch.empty(self._shapes[name], dtype=dtype(name), device=device)
                found[name][expert][rows or slice(None)].copy_(tensor)
        return {name: found[self._tied.get(name, name)] for name in targets}

    def _whole(self, target: str) -> bool:
        """Whether every row of a module tensor is on disk."""
        parts = self._parts.get(target, [])
        if not parts or parts[0][0] is None:
            return bool(parts)
        experts, rows = self._shapes[target][:2]
        there = sum(rows if source.rows is None else source.rows.stop - source.rows.start for _, source in parts)
        return there == experts * rows and all(expert < experts for expert, _ in parts)
