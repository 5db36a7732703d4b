"""The compiler for NVIDIA GPUs takes every kernel; it needs no GPU."""

import subprocess
import sys
from pathlib import Path

import pytest
import triton

FOLDER = Path(triton.__file__).parent / "backends/nvidia/bin"
ROWS = {"select_rows", "select_long_rows", "select_groups", "moments_of_rows"}
MATRIX = {"count_and_copy", "count_ties", "apply_threshold"}
MASKS = {"pack_words", "unpack_words", "differing_bits", "mixed_words"}


@pytest.mark.skipif(not (FOLDER / "ptxas").exists(), reason="this Triton has no compiler for NVIDIA GPUs")
def test_every_kernel_compiles(tmp_path):
    done = subprocess.run(
        [sys.executable, Path(__file__).with_name("compiling.py"), "--once", "90"],
        capture_output=True,
        text=True,
        env={"PATH": "/usr/bin:/bin", "TRITON_CACHE_DIR": str(tmp_path), "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert {line.split()[1] for line in done.stdout.splitlines()} == ROWS | MATRIX | MASKS
