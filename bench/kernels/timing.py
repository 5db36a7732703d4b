"""What the benchmarks of kernels share: they check a result, time it beside its rivals, and print a table.

Times are in one process and in turn; what is said of them are ratios. The share of a copy is the time of a copy of as
many bytes as the kernel has to move, on the same device, by the time of the kernel.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

# Linear layers [out, in]: of SmolLM2-135M and Qwen2.5-Coder-1.5B, and for CUDA of Llama-2-7B and Llama-3-8B.
SMALL = [(192, 576), (576, 576), (1536, 576), (576, 1536), (256, 1536), (1536, 1536), (8960, 1536), (1536, 8960)]
LARGE = [(4096, 11008), (14336, 4096)]
SPARSITY = 0.6
QUANTILES = (0.2, 0.5, 0.8)
COPIED = {"cpu": 1 << 26, "cuda": 1 << 30}  # bytes of the copy whose bandwidth is the measure


@dataclass
class Case:
    """run: what is timed; right: raises AssertionError where its result is wrong; moved: bytes that it has to read and
    write at least; rivals: other ways to the same end, by name."""

    label: str
    run: Callable[[], object]
    right: Callable[[], None]
    moved: int
    rivals: dict[str, Callable[[], object]] = field(default_factory=dict)


@dataclass
class Outcome:
    """seconds: at QUANTILES; copy: share of a copy's bandwidth; ratios: times of rivals by the time of the kernel."""

    label: str
    seconds: tuple[float, float, float]
    copy: float
    ratios: dict[str, float]


def options(description: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    chosen = parser.parse_args()
    torch.set_num_threads(chosen.threads)
    return chosen


def shapes(device: str) -> list[tuple[int, int]]:
    return LARGE if device == "cuda" else SMALL


def dtype_of(device: str) -> torch.dtype:
    """Of weights: what models are in there."""
    return torch.bfloat16 if device == "cuda" else torch.float32


def random(*shape: int, device: str, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def norms(width: int, device: str) -> torch.Tensor:
    """Of features that differ in scale, as those of a language model do."""
    return random(width, device=device, seed=width).exp()


def timed(run: Callable[[], object], device: str, seconds: float = 0.4) -> tuple[float, float, float]:
    """Seconds of one call at QUANTILES."""
    if device == "cuda":
        from triton.testing import do_bench

        return tuple(value / 1e3 for value in do_bench(run, quantiles=list(QUANTILES)))
    run()
    taken, began = [], time.perf_counter()
    while len(taken) < 5 or time.perf_counter() - began < seconds:
        before = time.perf_counter()
        run()
        taken.append(time.perf_counter() - before)
    deciles = statistics.quantiles(taken, n=10, method="inclusive")
    return tuple(deciles[int(10 * quantile) - 1] for quantile in QUANTILES)


def copy_bandwidth(device: str) -> float:
    """Bytes read and written per second by a copy on the device."""
    source = torch.zeros(COPIED[device], dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return 2 * len(source) / timed(lambda: target.copy_(source), device)[1]


def compare(title: str, cases: list[Case], device: str) -> list[Outcome]:
    """Check, time and print all cases."""
    speed, name = copy_bandwidth(device), torch.cuda.get_device_name() if device == "cuda" else "CPU"
    threads = f", {torch.get_num_threads()} threads" if device == "cpu" else ""
    print(f"{title}; {name}{threads}, a copy moves {speed / 1e9:.1f} GB/s")
    rivals = list(dict.fromkeys(rival for case in cases for rival in case.rivals))
    print("| case | MB moved | ms (20 / 50 / 80%) | GB/s | share of a copy | " + " | ".join(rivals) + " |")
    print("| --- " + "| ---: " * (4 + len(rivals)) + "|")
    outcomes = []
    for case in cases:
        case.right()
        own = timed(case.run, device)
        ratios = {rival: timed(run, device)[1] / own[1] for rival, run in case.rivals.items()}
        outcomes.append(Outcome(case.label, own, case.moved / own[1] / speed, ratios))
        cells = [
            case.label,
            f"{case.moved / 1e6:.2f}",
            " / ".join(f"{1e3 * value:.3f}" for value in own),
            f"{case.moved / own[1] / 1e9:.2f}",
            f"{outcomes[-1].copy:.0%}",
            *(f"{ratios[rival]:.1f} ×" if rival in ratios else "" for rival in rivals),
        ]
        print("| " + " | ".join(cells) + " |", flush=True)
    return outcomes


def missed(outcomes: list[Outcome], copy: float = 0.0, **ratios: float) -> int:
    """Print which outcomes miss a bar: a share of a copy, or a ratio to a rival. The exit code."""
    below = [f"{one.label}: {one.copy:.0%} of a copy, {copy:.0%} wanted" for one in outcomes if one.copy < copy]
    for rival, least in ratios.items():
        below += [
            f"{one.label}: {one.ratios[rival]:.1f} × {rival}, {least:g} × wanted"
            for one in outcomes
            if one.ratios[rival] < least
        ]
    print("\n".join(below) or "all bars are met")
    return 1 if below else 0
