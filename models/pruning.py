"""Prune or measure one whole model in this process: a single shard that holds every block, without Ray."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from autoprune.algorithms.algorithm import UPDATES, Algorithm, Group
from autoprune.algorithms.allocation import check_allocation
from autoprune.algorithms.allocation import needs as features_of
from autoprune.algorithms.language import LanguageError
from autoprune.algorithms.probe import probe, probe_allocation
from autoprune.algorithms.scores import NATIVE
from autoprune.algorithms.statistics import GRAM_READERS
from autoprune.models.checkpoint_files import checkpoint_bytes
from autoprune.models.corpora import load_corpus, token_windows
from autoprune.models.errors import InputError
from autoprune.models.export import check_output, check_space, export, part_count
from autoprune.models.families import check_family
from autoprune.models.layers import Layer
from autoprune.models.loading import load_config, load_tokenizer, pinned, resolve_model
from autoprune.models.masking import Chooser, needs, planned_sparsities
from autoprune.models.measuring import calibrate
from autoprune.models.parts import PartWriter
from autoprune.models.perplexity import Reference, perplexity, standard_error
from autoprune.models.shard import GRADIENT_WINDOWS, Lane, ModelShard

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Perplexity:
    """`ppl_token@context` of a model: exp of `nll` (nats per token over `tokens` scored tokens).

    reference_perplexity: of a reference model over the same tokens, where one was given; difference: nll − that of the
    reference; kl: mean KL(reference ‖ model) per token, nats. Standard errors are over windows, that of the difference
    is paired. window_nlls: the nll of each window, in order.
    """

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
    reference: str | None = None
    reference_perplexity: float | None = None
    difference: float | None = None
    difference_standard_error: float | None = None
    kl: float | None = None
    kl_standard_error: float | None = None
    window_nlls: tuple[float, ...] = ()


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
    """InputError for a model that cannot be run block by block, or a context that it was not made for."""
    config = load_config(folder)
    check_family(config, name)
    limit = getattr(config.get_text_config(), "max_position_embeddings", context)
    if not 2 <= context <= limit:
        raise InputError(f"context is {context}: expected 2 to {limit}, which is what {name} was made for")


def check_algorithm(algorithm: Algorithm, sparsity: float) -> None:
    """InputError for an algorithm that cannot prune any model to this sparsity."""
    try:
        group = Group.parse(algorithm.group)
        check_allocation(algorithm.allocation)
        if algorithm.allocation.source:
            probe_allocation(algorithm.allocation.source)
    except ValueError as error:
        raise InputError(str(error)) from None
    if algorithm.update not in UPDATES:
        raise InputError(f"unknown weight update {algorithm.update!r}: expected {', '.join(UPDATES)}")
    if group.kind == "n:m" and abs(sparsity - (1 - group.first / group.second)) > 1e-9:
        right = 1 - group.first / group.second
        raise InputError(
            f"sparsity is {sparsity:g}, and {algorithm.group} means {right:g}: give that, or another group"
        )
    if algorithm.score in NATIVE:
        if group.kind == "tile":
            raise InputError(f"{algorithm.score} cannot prune rectangles: choose row, matrix or n:m")
        return
    if group.kind in ("n:m", "tile"):  # may fit the model and not the probe's layers
        algorithm = replace(algorithm, group="row")
    try:
        probe(algorithm, sparsity)
    except LanguageError as error:
        raise InputError(f"the score function cannot be used: {error}") from None


def check_fit(group: Group, layers: Sequence[Layer]) -> None:
    """InputError where n:m groups or rectangles do not divide a layer."""
    for layer in layers:
        rows, columns = layer.weight.shape
        down, across = (1, group.second) if group.kind == "n:m" else (group.first or 1, group.second or 1)
        if rows % down or columns % across:
            raise InputError(
                f"{layer.name}: [{rows}, {columns}] cannot be cut into "
                + (f"groups of {across} along a row" if group.kind == "n:m" else f"rectangles of {down}x{across}")
                + ": choose another --group"
            )


def _whole_model(folder: Path, dtype: str, device: str | None, offload: bool = False) -> ModelShard:
    blocks = load_config(folder).get_text_config().num_hidden_layers
    return ModelShard(folder, 0, blocks, dtype, device or default_device(), offload)


def evaluate(
    model: str,
    corpus: str,
    context: int = 512,
    windows: int | None = None,
    dtype: str = "float32",
    device: str | None = None,
    reference: str | None = None,
    offload: bool = False,
) -> Perplexity:
    """Perplexity of a model (name, folder or hub id) on a corpus, over at most `windows` windows of `context` tokens.

    reference: another model with the same tokenizer, such as the dense one: the KL divergence to it is less noisy than
    perplexity. offload: hold one block in memory at a time.
    Raises InputError for an unknown model or corpus, or a text shorter than one window.
    """
    dtype = native_dtype(dtype)
    check_windows(windows)
    text = load_corpus(corpus)
    folder = resolve_model(model)
    check_model(folder, model, context)
    tokens = token_windows(text, load_tokenizer(folder), context, windows)
    dense = dense_nlls = None
    if reference is not None:
        other = resolve_model(reference)
        check_model(other, reference, context)
        if not torch.equal(token_windows(text, load_tokenizer(other), context, windows), tokens):
            raise InputError(f"{reference} and {model} cut the text into different tokens: no KL divergence is defined")
        shard = _whole_model(other, dtype, device, offload)
        lane = _through(shard, tokens)
        shard.score(lane, tokens)
        dense_nlls = _finite(lane.report.window_nlls, dtype, reference)
        dense = Reference(lane.hidden, shard.model.logits)
    measured = _whole_model(folder, dtype, device, offload)
    lane = _through(measured, tokens)
    with shard.model.head() if dense else nullcontext():
        measured.score(lane, tokens, dense)
    nlls, divergences = _finite(lane.report.window_nlls, dtype, model), lane.report.window_kls
    nll = sum(nlls) / len(nlls)
    differences = [own - other for own, other in zip(nlls, dense_nlls, strict=True)] if dense_nlls else []
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
        standard_error=standard_error(nlls),
        reference=reference,
        reference_perplexity=perplexity(sum(dense_nlls) / len(dense_nlls)) if dense_nlls else None,
        difference=sum(differences) / len(differences) if differences else None,
        difference_standard_error=standard_error(differences),
        kl=sum(divergences) / len(divergences) if divergences else None,
        kl_standard_error=standard_error(divergences),
        window_nlls=tuple(nlls),
    )


def _finite(nlls: list[float], dtype: str, model: str) -> list[float]:
    """The windows' likelihoods; InputError where one is not finite."""
    if not math.isfinite(sum(nlls)):
        raise InputError(f"the likelihood of the text is not finite: {dtype} overflows on {model}; try another dtype")
    return nlls


def _through(shard: ModelShard, tokens: torch.Tensor) -> Lane:
    lane = Lane(hidden=shard.enter(tokens))
    shard.walk([lane])
    return lane


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
    sequential: bool = False,
    offload: bool = False,
    progress: Progress = lambda _: None,
) -> dict:
    """Prune a model and write it to `out`; returns the sidecar's content.

    model: bundled name, local folder or hub id; calibration: a corpus, of which at most `windows` windows of
    `context` tokens are used; dtype: what is computed in (the checkpoint keeps its own dtype).
    sequential: each block's statistics come from the output of the pruned blocks before it, not of the dense ones
    (summaries for the allocation, and gradients, which are of GRADIENT_WINDOWS of the windows, stay those of the
    dense model). offload: hold one block in memory at a time, and read it from disk whenever it is needed, so that the
    model may be larger than the memory.
    Raises InputError, before anything is written, for unusable input.
    """
    out = Path(out)
    check_sparsity(sparsity)
    check_algorithm(algorithm, sparsity)
    check_output(out)
    check_windows(windows)
    dtype = native_dtype(dtype)
    text = load_corpus(calibration)
    folder = resolve_model(model)
    size = checkpoint_bytes(folder)
    check_space(out, size)
    check_model(folder, model, context)
    blocks, values = load_config(folder).get_text_config().num_hidden_layers, algorithm.allocation.values
    if values and algorithm.allocation.per == "block" and len(values) != blocks:
        raise InputError(f"the explicit allocation has {len(values)} sparsities: expected {blocks}, one per block")
    tokens = token_windows(text, load_tokenizer(folder), context, windows)
    progress(f"loading {model}")
    shard = _whole_model(folder, dtype, device, offload)
    with shard.model.open(0) as layers:  # mostly all are alike
        check_fit(Group.parse(algorithm.group), layers)
    progress(f"calibrating on {len(tokens)} windows of {context} tokens")
    reads = needs(algorithm)
    anew = "gram" in reads or sequential  # statistics are made on the second walk, block by block
    kept = reads - GRAM_READERS if anew else reads
    calibrate(shard, tokens, kept | {"x_norm"}, features_of(algorithm.allocation), dtype)
    try:
        sparsities = planned_sparsities(algorithm, shard.profiles, sparsity)
    except ValueError as error:
        raise InputError(str(error)) from None
    details = {
        "model": pinned(model, folder),
        "calibration": {
            "corpus": calibration,
            "sha256": text.sha256,
            "windows": len(tokens),
            "context": context,
            "sequential": sequential,
            **({"gradient_windows": min(len(tokens), GRADIENT_WINDOWS)} if "g_rms" in reads else {}),
        },
        "dtype": dtype,
        "profiles": [asdict(profile) for profile in shard.profiles],
    }

    def write(paths: list[Path]) -> list[dict[str, dict]]:
        writer = PartWriter(shard.model, paths)
        lane = Lane(Chooser(algorithm), sparsities, calibration=shard.enter(tokens) if sequential else None)
        states = shard.enter(tokens) if "gram" in reads and not sequential else None

        def visit(index: int, _: Lane, layers: list, choice) -> None:
            progress(f"block {index + 1} of {shard.model.count} pruned")
            writer.add(index, layers, choice)

        try:
            shard.walk([lane], states, visit)
        except ValueError as error:  # n:m that does not divide a layer, scores that are not finite on real weights
            raise InputError(str(error)) from None
        return [writer.layers]

    parts = part_count(size, shard.model.count)
    return export(folder, out, parts, write, algorithm, sparsity, sparsities, details)
