"""Masks to bits and back.

    python bench/kernels/bench_pack.py [--device cpu|cuda] [--threads N]

Rivals: numpy's packbits and unpackbits on a CPU, shifts and sums of torch elsewhere.
"""

import sys

import numpy as np
import torch
from timing import Case, compare, options, random, shapes

from autoprune.kernels import masks


def shifted(mask):
    places = torch.arange(32, device=mask.device, dtype=torch.int32)
    return (mask.reshape(-1, 32).int() << places).sum(dim=1, dtype=torch.int32)


def cases(shape, device):
    mask = random(*shape, device=device) > 0
    bits, array = masks.pack(mask), mask.cpu().numpy()
    packed = np.packbits(array, bitorder="little")

    def right():
        assert np.array_equal(bits.cpu().numpy().view(np.uint8), packed)
        assert torch.equal(masks.unpack(bits, shape), mask)

    numpy_packs = {"numpy": lambda: np.packbits(array, bitorder="little")}
    numpy_unpacks = {"numpy": lambda: np.unpackbits(packed, bitorder="little")}
    torch_packs = {"shifts": lambda: shifted(mask)}
    moved, name = mask.numel() + mask.numel() // 8, f"{shape[0]}×{shape[1]}"
    on_cpu = device == "cpu"
    return [
        Case(f"pack {name}", lambda: masks.pack(mask), right, moved, numpy_packs if on_cpu else torch_packs),
        Case(f"unpack {name}", lambda: masks.unpack(bits, shape), right, moved, numpy_unpacks if on_cpu else {}),
    ]


def main() -> int:
    device = options(__doc__).device
    compare("pack, unpack", [case for shape in shapes(device)[-2:] for case in cases(shape, device)], device)
    return 0


if __name__ == "__main__":
    sys.exit(main())
