"""What a shard learned of its dense blocks, written down: calibrated once, read by whoever has the same shard later.

Two files in a folder: `state.safetensors`, and `state.json`, written last, without which the other does not count.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from autoprune.algorithms.profiles import BlockProfile
from autoprune.algorithms.statistics import InputMoments
from autoprune.models.shard import ModelShard, ShardReport

SCHEMA = 2
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__}  # whose arithmetic it is
TENSORS, FACTS = "state.safetensors", "state.json"


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """sha256 over name, dtype, shape and bytes of each, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def state_digest(shard: ModelShard) -> str:
    """sha256 over all that the shard learned of its weights and the text."""
    return _digest(*_state(shard))


def _digest(tensors: Mapping[str, Tensor], facts: dict) -> str:
    return hashlib.sha256((json.dumps(facts, sort_keys=True) + tensors_digest(tensors)).encode()).hexdigest()


def write_state(shard: ModelShard, folder: Path, about: Mapping) -> None:
    """Write down what the shard learned. about: what it follows from, as JSON can hold it; `read_state` asks for the
    same. Raises OSError where the folder cannot be written."""
    folder.mkdir(parents=True, exist_ok=True)
    facts = folder / FACTS
    facts.unlink(missing_ok=True)
    tensors, learned = _state(shard)
    try:
        _write(folder / TENSORS, lambda path: save_file({n: t.contiguous().cpu() for n, t in tensors.items()}, path))
    except SafetensorError as error:
        raise OSError(f"cannot write {folder / TENSORS}: {error}") from error
    manifest = {
        "schema": SCHEMA,
        "about": about,
        "sha256": _digest(tensors, learned),
        "facts": learned,
    }
    _write(facts, lambda path: path.write_text(json.dumps(manifest)))


def read_state(shard: ModelShard, folder: Path, about: Mapping) -> bool:
    """Give the shard what was written down about the same, as if it had been calibrated. False, and the shard as it
    was, where nothing usable is there."""
    try:
        manifest = json.loads((folder / FACTS).read_text())
        if manifest["schema"] != SCHEMA or manifest["about"] != about:
            return False
        tensors = load_file(folder / TENSORS)
        learned = manifest["facts"]
        if manifest["sha256"] != _digest(tensors, learned):
            return False
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return False
    held = {name: _under(name, tensors) for name in ("moments", "gradients", "dense")}
    shard.profiles = [BlockProfile.from_dict(profile) for profile in learned["profiles"]]
    shard.moments = []
    for index, (counts, layers) in enumerate(zip(learned["counts"], learned["layers"], strict=True)):
        own = _under(str(index), held["moments"])
        moments = [InputMoments.restored(*pair, _under(str(i), own)) for i, pair in enumerate(counts)]
        shard.moments.append({layer: moments[place] for layer, place in layers.items()})
        gradients = _under(str(index), held["gradients"])
        if gradients:
            shard.gradients.put(index, gradients)
    shard.dense_reports = {split: ShardReport(**report) for split, report in learned["reports"].items()}
    shard.dense_states = {
        split: [_under(split, held["dense"])[str(index)].to(shard.home) for index in range(shard.model.count)]
        for split in learned["reports"]
    }
    return True


def _state(shard: ModelShard) -> tuple[dict[str, Tensor], dict]:
    tensors, counts, layers = {}, [], []
    for index, moments in enumerate(shard.moments):
        different = list({id(own): own for own in moments.values()}.values())  # layers with one input share theirs
        for place, own in enumerate(different):
            tensors |= {f"moments/{index}/{place}/{name}": tensor for name, tensor in own.tensors().items()}
        counts.append([[own.count, own.damping] for own in different])
        places = {id(own): place for place, own in enumerate(different)}
        layers.append({layer: places[id(own)] for layer, own in moments.items()})
        tensors |= {f"gradients/{index}/{layer}": tensor for layer, tensor in shard.gradients.get(index).items()}
    for split, states in shard.dense_states.items():
        tensors |= {f"dense/{split}/{index}": tensor for index, tensor in enumerate(states)}
    # What took how long is nobody's property.
    reports = {s: asdict(r) | {"seconds": 0.0, "pruning_seconds": 0.0} for s, r in shard.dense_reports.items()}
    return tensors, {
        "profiles": [asdict(profile) for profile in shard.profiles],
        "counts": counts,
        "layers": layers,
        "reports": reports,
    }


def _under(name: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those whose names begin with this one and a slash, without both."""
    return {key.removeprefix(name + "/"): tensor for key, tensor in tensors.items() if key.startswith(name + "/")}


def _write(path: Path, write) -> None:
    """A file that is there whole, or not at all."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(temporary)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
