"""Prune or measure one whole model in this process: a single shard that holds every block, without Ray."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from autoprune.algorithms.algorithm import Algorithm
from autoprune.algorithms.allocation import allocate, check_allocation
from autoprune.algorithms.language import LanguageError
from autoprune.algorithms.probe import probe
from autoprune.models.blocks import check_family, checkpoint_bytes
from autoprune.models.corpora import load_corpus, token_windows
from autoprune.models.errors import InputError
from autoprune.models.export import check_output, check_space, export
from autoprune.models.loading import load_config, load_tokenizer, resolve_model
from autoprune.models.perplexity import perplexity
from autoprune.models.shard import ModelShard

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Perplexity:
    """`ppl_token@context` of a model: exp of `nll` (nats per token over `tokens` scored tokens)."""

    model: str
    corpus: str
    corpus_sha256: str
    context: int
    windows: int
    tokens: int
    dtype: str
    nll: float
    perplexity: float
    standard_error: float | None


def default_device() -> str:
    return "cuda" if torch.cuda.is_available() else "cpu"


def native_dtype(dtype: str) -> str:
    """`dtype`, where "auto" stands for bfloat16 if this machine has instructions for it, else for float32."""
    if dtype != "auto":
        return dtype
    if torch.cuda.is_available():
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    else:
        native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return "bfloat16" if native else "float32"


def check_sparsity(sparsity: float) -> None:
    if not 0 < sparsity < 1:
        raise InputError(f"sparsity is {sparsity:g}: expected a number between 0 and 1, such as 0.6 for 60%")


def check_windows(windows: int | None) -> None:
    if windows is not None and windows < 1:
        raise InputError(f"windows is {windows}: expected 1 or more, or none for all of the text")


def check_model(folder: Path, name: str, context: int) -> None:
    """InputError for a model of another family, or a context that it was not made for."""
    config = load_config(folder)
    check_family(config, name)
    if not 2 <= context <= config.max_position_embeddings:
        limit = config.max_position_embeddings
        raise InputError(f"context is {context}: expected 2 to {limit}, which is what {name} was made for")


def _whole_model(folder: Path, dtype: str, device: str | None) -> ModelShard:
    return ModelShard(folder, 0, load_config(folder).num_hidden_layers, dtype, device or default_device())


def evaluate(
    model: str,
    corpus: str,
    context: int = 2048,
    windows: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
) -> Perplexity:
    """Perplexity of a model (name, folder or hub id) on a corpus, over at most `windows` windows of `context` tokens.

    Raises InputError for an unknown model or corpus, or a text shorter than one window.
    """
    dtype = native_dtype(dtype)
    check_windows(windows)
    text = load_corpus(corpus)
    folder = resolve_model(model)
    check_model(folder, model, context)
    tokens = token_windows(text, load_tokenizer(folder), context, windows)
    shard = _whole_model(folder, dtype, device)
    _, report = shard.forward("evaluate", tokens, tokens)
    nlls = torch.tensor(report.window_nlls, dtype=torch.float64)
    nll = float(nlls.mean())
    return Perplexity(
        model=model,
        corpus=corpus,
        corpus_sha256=text.sha256,
        context=context,
        windows=len(tokens),
        tokens=len(tokens) * (context - 1),
        dtype=dtype,
        nll=nll,
        perplexity=perplexity(nll),
        standard_error=float(nlls.std() / math.sqrt(len(tokens))) if len(tokens) > 1 else None,
    )


def prune(
    model: str,
    algorithm: Algorithm,
    sparsity: float,
    calibration: str,
    out: Path,
    context: int = 512,
    windows: int | None = 32,
    dtype: str = "float32",
    device: str | None = None,
    progress: Progress = lambda _: None,
) -> dict:
    """Prune a model and write it to `out`; returns the sidecar's content.

    model: bundled name, local folder or hub id; calibration: a corpus, of which at most `windows` windows of
    `context` tokens are used; dtype: what is computed in (the checkpoint keeps its own dtype).
    Raises InputError, before anything is written, for unusable input.
    """
    check_sparsity(sparsity)
    check_allocation(algorithm.allocation)
    check_output(out)
    check_windows(windows)
    try:
        probe(algorithm, sparsity)
    except LanguageError as error:
        raise InputError(f"the score function cannot be used: {error}") from None
    dtype = native_dtype(dtype)
    text = load_corpus(calibration)
    folder = resolve_model(model)
    check_space(out, checkpoint_bytes(folder))
    check_model(folder, model, context)
    tokens = token_windows(text, load_tokenizer(folder), context, windows)
    progress(f"loading {model}")
    shard = _whole_model(folder, dtype, device)
    progress(f"calibrating on {len(tokens)} windows of {context} tokens")
    shard.calibrate(tokens)
    profiles = shard.profiles()
    sparsities = allocate(algorithm.allocation, profiles, sparsity)
    progress("pruning and writing")
    details = {
        "model": model,
        "calibration": {"corpus": calibration, "sha256": text.sha256, "windows": len(tokens), "context": context},
        "dtype": dtype,
        "profiles": [asdict(profile) for profile in profiles],
    }

    def write(paths: list[Path]) -> list[dict[str, dict]]:
        return [shard.export(paths[0], algorithm, sparsities)]

    return export(folder, out, 1, write, algorithm, sparsity, sparsities, details)
