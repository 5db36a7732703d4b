"""A pruned checkpoint: plain dense safetensors that any loader reads, and a sidecar that says how it came about."""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open

from autoprune import __version__
from autoprune.algorithms.algorithm import Algorithm, Sparsities
from autoprune.models.catalogue import sha256_of
from autoprune.models.errors import InputError

SIDECAR = "autoprune.json"
SIDECAR_SCHEMA = 1
PART_BYTES = 1_000_000_000
SPARE = 50_000_000  # bytes, for tokenizer, report and journal
COPIED = (".json", ".txt", ".model", ".jinja")  # configuration and tokenizer files


def check_output(out: Path) -> None:
    """InputError unless `out` is new or an empty folder in a place where a folder can be made."""
    if out.exists() and not out.is_dir():
        raise InputError(f"output {out} is a file: choose another --out, a folder that is new or empty")
    if out.exists() and any(out.iterdir()):
        raise InputError(f"output folder {out} exists and is not empty: choose another --out or remove it")
    parent = next(p for p in [out, *out.parents] if p.exists())
    if not os.access(parent, os.W_OK) or not parent.is_dir():
        raise InputError(f"cannot write to {parent}: choose an output folder that you may write to")


def check_space(out: Path, size: int) -> None:
    """InputError unless `size` bytes and some room to spare are free where `out` is to be."""
    parent = next(p for p in [out, *out.parents] if p.exists())
    free, needed = shutil.disk_usage(parent).free, size + SPARE
    if free < needed:
        raise InputError(
            f"for {out}, {parent} has {free / 1e6:,.0f} MB free and {needed / 1e6:,.0f} MB are needed: "
            "free some space or choose another folder"
        )


@contextmanager
def whole_folder(out: Path) -> Iterator[Path]:
    """A temporary folder beside `out` that becomes `out` on success and vanishes on failure. Where `out` is there and
    empty, perhaps a disk of its own, it lies inside, and its files go up, the sidecar last."""
    check_output(out)
    out = out.resolve()  # a link may lead to another disk
    there = out.exists()
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{out.name}-", dir=out if there else out.parent))
        temporary.chmod(0o755)  # mkdtemp makes it private; a checkpoint is as readable as any other output
    except OSError as error:
        place = out if there else out.parent
        raise InputError(f"cannot write to {place}: {error.strerror}; choose another output folder") from None
    try:
        yield temporary
        if there:
            for file in sorted(temporary.iterdir(), key=lambda file: file.name == SIDECAR):
                os.replace(file, out / file.name)
        else:
            os.replace(temporary, out)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"writing {out} failed: {reason}; nothing was left behind") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def part_count(size: int, blocks: int) -> int:
    """Into how many files a checkpoint of `size` bytes is written: each is held in memory until it is complete."""
    return max(1, min(math.ceil(size / PART_BYTES), blocks))


def shard_file(index: int, count: int) -> str:
    """The file name that Hugging Face loaders expect for part `index` (from 0) of `count`."""
    return "model.safetensors" if count == 1 else f"model-{index + 1:05d}-of-{count:05d}.safetensors"


def export(
    source: Path,
    out: Path,
    shards: int,
    write_shards: Callable[[list[Path]], list[dict[str, dict]]],
    algorithm: Algorithm,
    sparsity: float,
    sparsities: Sparsities,
    details: dict,
) -> dict:
    """Write the pruned model as a folder; returns the sidecar's content.

    write_shards: writes one safetensors file per given path and returns reports by layer ({layer: {"numel",
    "pruned", …}}). sparsities: as planned, per block and layer. details: what else the sidecar records (calibration,
    model name, …).
    Raises InputError where `out` cannot be written; nothing half-written is left.
    """
    with whole_folder(out) as folder:
        paths = [folder / shard_file(index, shards) for index in range(shards)]
        layers = {name: entry for report in write_shards(paths) for name, entry in report.items()}
        for file in source.iterdir():
            if file.suffix in COPIED and "safetensors" not in file.name and file.name not in (SIDECAR, "manifest.json"):
                shutil.copyfile(file, folder / file.name)
        if shards > 1:
            _write_index(folder, paths)
        numel = sum(entry["numel"] for entry in layers.values())
        pruned = sum(entry["pruned"] for entry in layers.values())
        sidecar = {
            "schema": SIDECAR_SCHEMA,
            "autoprune": __version__,
            "versions": {name: version(name) for name in ("torch", "transformers", "safetensors")},
            "algorithm": algorithm.to_dict() | {"key": algorithm.key},
            "sparsity": {"target": sparsity, "achieved": pruned / numel, "planned": sparsities},
            "layers": {name: entry | {"sparsity": entry["pruned"] / entry["numel"]} for name, entry in layers.items()},
            **details,
            "sha256": {path.name: sha256_of(path) for path in paths},
        }
        (folder / SIDECAR).write_text(json.dumps(sidecar, indent=1) + "\n")
    return sidecar


def _write_index(folder: Path, paths: list[Path]) -> None:
    weight_map, size = {}, 0
    for path in paths:
        size += path.stat().st_size
        with safe_open(path, framework="pt") as file:
            weight_map |= dict.fromkeys(file.keys(), path.name)
    index = {"metadata": {"total_size": size}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")
