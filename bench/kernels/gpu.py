"""The GPU lane: tests of the kernels on CUDA, then every benchmark; less than 8 minutes on one GPU.

    python bench/kernels/gpu.py

Exit code 1 where a test fails or a bar is missed.
"""

import subprocess
import sys
import time
from pathlib import Path

import torch

HERE = Path(__file__).resolve().parent
BENCHES = ("row_select", "matrix_select", "nm_select", "pack", "moments", "distance")


def main() -> int:
    if not torch.cuda.is_available():
        print("no CUDA device: expected one to run the kernels on", file=sys.stderr)
        return 2
    began, failed = time.monotonic(), []
    tests = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", str(HERE.parents[1] / "tests" / "kernels")]
    benches = [[sys.executable, str(HERE / f"bench_{name}.py"), "--device", "cuda"] for name in BENCHES]
    for command in (tests, *benches):
        if subprocess.run(command, cwd=HERE.parents[1]).returncode:
            failed.append(" ".join(command[1:]))
    print(f"{time.monotonic() - began:.0f} s; " + ("failed: " + "; ".join(failed) if failed else "nothing failed"))
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
