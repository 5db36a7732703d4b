"""A shard: a contiguous range of decoder blocks that can be calibrated, pruned for one pass, and run."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from autoprune.algorithms.algorithm import Algorithm, Sparsities
from autoprune.algorithms.profiles import BlockProfile, block_profile, with_taylor
from autoprune.algorithms.statistics import GRAM_READERS, InputMoments, NotFiniteError
from autoprune.models.blocks import DecoderRange
from autoprune.models.calibration import input_moments, squared_gradients
from autoprune.models.corpora import evenly
from autoprune.models.layers import Layer, replaced
from autoprune.models.masking import BlockChoice, Chooser
from autoprune.models.parts import PartWriter
from autoprune.models.perplexity import Reference, score_windows
from autoprune.models.shelf import Shelf

WINDOWS_AT_ONCE = 8  # bounds the memory of attention and activations; a block runs over chunks of this many windows
# Gradients are of so many calibration windows, evenly spaced: each takes a pass of its own, and the states that enter
# every block are kept meanwhile.
GRADIENT_WINDOWS = 16
PROFILE_WINDOWS = 2  # windows whose dense hidden states are kept, to say in which blocks an algorithm errs


@dataclass
class ShardReport:
    """What one shard measured during one pass, per block of the shard.

    numels and pruned count prunable weights; errors are ‖h − h_dense‖ / ‖h_dense‖ after each block.
    window_nlls: nats per token and window, of the last shard only; window_kls: nats to the dense model, where it was
    asked for. fallbacks: experts pruned by magnitude for want of text; dead_inputs: inputs of layers that were zero
    for every token; damped: layers whose Hessian needed more damping than usual. seconds: of the pass, of which
    pruning_seconds went into scores, selection and updates.
    """

    numels: list[int] = field(default_factory=list)
    pruned: list[int] = field(default_factory=list)
    errors: list[float] = field(default_factory=list)
    window_nlls: list[float] = field(default_factory=list)
    window_kls: list[float] = field(default_factory=list)
    fallbacks: list[str] = field(default_factory=list)
    dead_inputs: int = 0
    damped: int = 0
    seconds: float = 0.0
    pruning_seconds: float = 0.0


@dataclass
class Lane:
    """One algorithm's way through the blocks of a shard; several lanes walk side by side, so that a block is read, and
    its statistics are made, once for all of them.

    chooser: None for the dense model. hidden: states to be measured, or None. calibration: states of its own, which
    follow the pruned blocks (sequential calibration), or None: statistics of the dense model.
    """

    chooser: Chooser | None = None
    sparsities: Sparsities | None = None
    hidden: Tensor | None = None
    calibration: Tensor | None = None
    report: ShardReport = field(default_factory=ShardReport)


Visit = Callable[[int, Lane, "list[Layer]", "BlockChoice | None"], None]


class ModelShard:
    """Blocks start … stop−1 of a model on one device. The dense weights are never written to.

    offload: only one block is on the device at a time, read from disk when it is needed; hidden states stay in the
    CPU's memory, of which the device gets WINDOWS_AT_ONCE windows at a time; gradients are kept on disk.
    """

    def __init__(self, folder: Path, start: int, stop: int, dtype: str, device: str, offload: bool = False) -> None:
        self.device = torch.device(device)
        self.model = DecoderRange(folder, start, stop, getattr(torch, dtype), self.device, offload)
        self.home = torch.device("cpu") if offload else self.device  # of hidden states
        self.profiles: list[BlockProfile] = []
        self.moments: list[dict[str, InputMoments]] = []
        self.gradients = Shelf(on_disk=offload)  # root mean square per weight, fp32 by layer
        self._entered = Shelf(on_disk=offload)  # what entered each block, while gradients are still to be made
        self._calibrated: Tensor | None = None  # what left the last block
        self.dense_states: dict[str, list[Tensor]] = {}  # by split: of PROFILE_WINDOWS windows, after each block, bf16
        self.dense_reports: dict[str, ShardReport] = {}  # by split
        self._checksum = None if offload else self.checksum()

    def checksum(self) -> int:
        """Sum of the bits of all prunable weights: a write that forgets to restore one does not leave it as it was."""
        views, total = {2: torch.int16, 4: torch.int32}, 0
        for index in range(self.model.count):
            with self.model.open(index) as layers:
                for weight in (layer.weight for layer in layers):
                    total += int(weight.view(views[weight.element_size()]).sum(dtype=torch.int64))
        return total

    @torch.no_grad()
    def calibrate(
        self, states: Tensor, statistics: Iterable[str] = ("x_norm",), features: Iterable[str] = ()
    ) -> Tensor:
        """Token windows (first shard) or hidden states in → hidden states out; moments and profiles are kept.

        statistics: what algorithms will read; Gram matrices are freed as soon as what follows from them is known.
        features: which summaries allocations will read beside the usual ones (see `block_profile`).
        Raises NotFiniteError, naming block and layer, where an input is not finite, ValueError where a weight is not.
        """
        wants = frozenset(statistics)
        hidden = self.enter(states)
        self.moments, self.profiles = [], []
        for index in range(self.model.count):
            if "g_rms" in wants:
                self._entered.put(index, {"states": for_gradients(hidden)})
            with self.model.open(index) as layers:
                moments, hidden = self.collect(index, layers, hidden, wants)
                self._check_experts(index, layers, moments)
                for own in moments.values():
                    for name in wants - {"g_rms", "gram"}:
                        if own.count:
                            own.statistic(name)
                    own.drop_gram()
                inputs = [_norm_or_zeros(moments[layer.name]) for layer in layers]
                weights = (layer.weight for layer in layers)
                self.profiles.append(block_profile(zip(weights, inputs, strict=True), features))
            self.moments.append(moments)
        self._calibrated = for_gradients(hidden) if "g_rms" in wants and self.model.last else None
        return hidden.cpu()

    def _check_experts(self, index: int, layers: list[Layer], moments: dict[str, InputMoments]) -> None:
        """Each token goes to some expert: where none saw any, the family runs them in a way that is not seen."""
        experts = [layer.name for layer in layers if layer.expert is not None]
        if experts and not any(moments[name].count for name in experts):
            raise ValueError(
                f"block {self.model.start + index}, {experts[0]}: no expert was seen to meet a token: expected experts "
                "that are applied one by one, as a linear layer or a matrix product; this family cannot be calibrated"
            )

    def backward(self, upstream: Tensor) -> Tensor:
        """After `calibrate` with "g_rms": root mean squares of the gradients of the mean NLL of each window by every
        prunable weight, over GRADIENT_WINDOWS of the windows, divided by their mean over the layer; with them
        `profiles` get their `taylor_mean`.

        upstream: the token windows for the last shard, otherwise what the shard after this one returned. Returns the
        gradient by the hidden states that entered this shard, times `_loss_scale`. Blocks are visited last to first,
        one at a time. Raises NotFiniteError, naming block and layer, where a gradient is not finite.
        """
        if self.model.last:
            hidden, tokens = self._calibrated, for_gradients(upstream).to(self.device)
            parts = []
            with self.model.head():
                for window, ids in zip(hidden.split(1), tokens, strict=True):
                    with torch.enable_grad():
                        window = window.clone().requires_grad_(True)
                        loss = torch.nn.functional.cross_entropy(self.model.logits(window)[0, :-1].float(), ids[1:])
                        parts.append(torch.autograd.grad(loss * _loss_scale(len(ids)), window)[0])
            gradient = torch.cat(parts).to(self.device)  # with offload states are on the CPU
        else:
            gradient = upstream.to(self.device)
        for index in reversed(range(self.model.count)):
            states = self._entered.pop(index)["states"].to(self.device)
            with self.model.open(index) as layers:
                squares, gradient = squared_gradients(
                    layers, states, lambda hidden, i=index: self.model.run(i, hidden), gradient
                )
                windows, scale = len(gradient), _loss_scale(states.shape[1])
                means = {name: (square / windows).sqrt_().cpu() / scale for name, square in squares.items()}
                taylor = [_taylor_mean(layer.weight, means[layer.name]) for layer in layers]
                for layer, mean in zip(layers, taylor, strict=True):
                    if not math.isfinite(mean):
                        where = f"block {self.model.start + index}, {layer.name}"
                        raise NotFiniteError(f"{where}: the gradient is not finite")
                # Of experts that no token of these windows reached nothing is known: they are like the others.
                known = [mean for mean in taylor if mean] or [0.0]
                filled = [mean or sum(known) / len(known) for mean in taylor]
                self.profiles[index] = with_taylor(self.profiles[index], filled)
            # Relative, so that a sum with other statistics is of numbers of like size: raw ones are 1e-5 or so.
            relative = {name: mean / mean.mean() if mean.any() else mean + 1 for name, mean in means.items()}
            self.gradients.put(index, relative)
        self._calibrated = None
        return gradient.cpu()

    def collect(
        self, index: int, layers: list[Layer], states: Tensor, wants: Iterable[str]
    ) -> tuple[dict[str, InputMoments], Tensor]:
        """Moments of one open block's layers over hidden states, and the states that leave it."""
        try:
            with input_moments(layers, wants) as moments:
                return moments, self._run_block(index, states)
        except NotFiniteError as error:
            block = f"block {self.model.start + index}"
            broken = [layer.name for layer in layers if layer.weight.isnan().any()]  # infinite ones may overflow, too
            if broken:
                raise ValueError(f"{block}, {broken[0]}: a weight is NaN: the model is damaged") from None
            raise NotFiniteError(f"{block}, {error}") from None

    @torch.inference_mode()
    def walk(self, lanes: Sequence[Lane], calibration: Tensor | None = None, visit: Visit = lambda *_: None) -> None:
        """Take every lane through all blocks, side by side.

        calibration: dense hidden states from which statistics are made anew, block by block; needed where a lane reads
        Gram matrices, which are not kept. Without it the statistics of `calibrate` serve.
        visit: called for every block and lane, while the block is open and pruned.
        """
        static = [lane.chooser.reads for lane in lanes if lane.chooser and lane.calibration is None]
        for index in range(self.model.count):
            with self.model.open(index) as layers:
                shared = self.moments[index] if self.moments else {}
                if calibration is not None and static:
                    shared, calibration = self.collect(index, layers, calibration, frozenset().union(*static))
                for lane in lanes:
                    self._step(index, lane, layers, shared, visit)

    def _step(
        self, index: int, lane: Lane, layers: list[Layer], moments: dict[str, InputMoments], visit: Visit
    ) -> None:
        choice, weights = None, {}
        if lane.chooser is not None:
            if lane.calibration is not None:
                moments, _ = self.collect(index, layers, lane.calibration, lane.chooser.reads)
            reads = lane.chooser.reads
            gradients = self.gradients.get(index) if lane.chooser.scores_by_gradients else {}
            if reads & GRAM_READERS:  # lanes share the factor: its time is none's own
                for own in moments.values():
                    if own.count and own.gram is not None:
                        _ = own.factor
            if self.model.device.type == "cuda":
                torch.cuda.synchronize()  # the blocks before it are under way: their time is not its
            began = time.perf_counter()
            choice = lane.chooser.block(layers, moments, gradients, lane.sparsities[index])
            weights = choice.weights
            lane.report.pruning_seconds += time.perf_counter() - began
            prefix = f"block {self.model.start + index}, "
            lane.report.fallbacks += [prefix + name for name in choice.fallbacks]
            lane.report.dead_inputs += sum(choice.dead.values())
            lane.report.damped += len(choice.dampings)
        lane.report.numels.append(sum(layer.weight.numel() for layer in layers))
        lane.report.pruned.append(choice.pruned if choice else 0)
        with replaced(layers, weights):
            if lane.calibration is not None:
                lane.calibration = self._run_block(index, lane.calibration)
            if lane.hidden is not None:
                lane.hidden = self._run_block(index, lane.hidden)
        visit(index, lane, layers, choice)

    @torch.inference_mode()
    def forward(
        self,
        split: str,
        states: Tensor,
        tokens: Tensor,
        algorithm: Algorithm | None = None,
        sparsities: Sparsities | None = None,
    ) -> tuple[Tensor, ShardReport]:
        """One pass over a split: dense where algorithm is None, otherwise with each block pruned while it runs.

        states: token windows for the first shard, else hidden states [windows, L, D]; tokens: int64 [windows, L];
        sparsities: one per layer for each block of this shard. Returns the hidden states that leave the shard and the
        measurements; after the last shard only an empty tensor, since its measurement is the NLL.
        Raises LanguageError or ValueError where the algorithm yields no usable scores.
        """
        began = time.perf_counter()
        lane = Lane(Chooser(algorithm) if algorithm else None, sparsities, self.enter(states))
        dense = self.dense_states.get(split) if algorithm is not None else None
        references = []

        def visit(index: int, lane: Lane, *_) -> None:
            states_now = lane.hidden[:PROFILE_WINDOWS].float()
            references.append(states_now.to(torch.bfloat16))
            if dense is not None:
                reference = dense[index].float()
                lane.report.errors.append(float((states_now - reference).norm() / reference.norm()))

        self.walk([lane], visit=visit)
        if algorithm is None:
            self.dense_states[split], self.dense_reports[split] = references, lane.report
        elif self._checksum is not None and self.checksum() != self._checksum:
            raise RuntimeError("the dense weights changed during an evaluation")
        if self.model.last:
            lane.report.window_nlls, _ = score_windows(lane.hidden, tokens, self.model.logits)
            lane.hidden = lane.hidden.new_empty(0)
        lane.report.seconds = time.perf_counter() - began
        return lane.hidden.cpu(), lane.report

    @torch.inference_mode()
    def export(self, paths: list[Path], algorithm: Algorithm, sparsities: Sparsities) -> dict[str, dict]:
        """Write this shard's tensors, pruned with the statistics of `calibrate`, as safetensors files (`PartWriter`).

        Returns per layer: numel and pruned weights.
        """
        writer = PartWriter(self.model, paths)
        self.walk(
            [Lane(Chooser(algorithm), sparsities)], visit=lambda i, _, layers, choice: writer.add(i, layers, choice)
        )
        return writer.layers

    def enter(self, states: Tensor) -> Tensor:
        """Hidden states [windows, L, D] that enter the first block of the shard: of tokens, if it is the model's."""
        return (self.model.embed(states) if self.model.first else states).to(self.home)

    @torch.inference_mode()
    def score(self, lane: Lane, tokens: Tensor, reference: Reference | None = None) -> None:
        """Fill a lane's report, after the last block, with the NLL of its states and the KL to a reference."""
        with self.model.head():
            report = lane.report
            report.window_nlls, report.window_kls = score_windows(lane.hidden, tokens, self.model.logits, reference)

    def _run_block(self, index: int, hidden: Tensor) -> Tensor:
        left = torch.empty_like(hidden)
        for chunk, out in zip(hidden.split(WINDOWS_AT_ONCE), left.split(WINDOWS_AT_ONCE), strict=True):
            out.copy_(self.model.run(index, chunk.to(self.device)))
        return left


def for_gradients(windows: Tensor) -> Tensor:
    """A copy of those of the calibration windows, or of their states, of which gradients are taken."""
    return windows[evenly(len(windows), min(len(windows), GRADIENT_WINDOWS))]


def _loss_scale(length: int) -> float:
    """What the loss of a window is multiplied with: about its tokens, over which it is a mean, so that float16 holds
    its gradients. A power of two, which changes no digit where nothing under- or overflows."""
    return 2.0 ** int(math.log2(length))


def _taylor_mean(weight: Tensor, gradient: Tensor) -> float:
    """Mean of |w|·g over a layer."""
    return float((weight.detach().cpu().float().abs() * gradient).mean(dtype=torch.float64))


def _norm_or_zeros(moments: InputMoments) -> Tensor:
    """An expert that no token was routed to has no norm; nothing reached it."""
    return moments.statistic("x_norm") if moments.count else torch.zeros(len(moments.sum))
