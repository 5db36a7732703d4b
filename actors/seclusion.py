"""What a process that runs candidates keeps of its environment."""

from __future__ import annotations

import os
import re

# Of the environment, all that an evaluator keeps once its model is loaded: what libraries are steered by. Everything
# else may be a credential of whoever started the search, and candidates run in this process.
KEPT = re.compile(
    r"PATH|HOME|USER|LANG|LC_\w+|TZ|TMPDIR|TERM|PYTHON\w*|VIRTUAL_ENV|LD_LIBRARY_PATH|XDG_CACHE_HOME|AUTOPRUNE_CACHE|"
    r"HF_HOME|HF_HUB_OFFLINE|CC|CXX|CPATH|C_INCLUDE_PATH|LIBRARY_PATH|CONDA_PREFIX|THP_MEM_ALLOC_ENABLE|"
    r"(OMP|MKL|NUMBA|KMP|OPENBLAS|TORCH|TORCHINDUCTOR|TRITON|CUDA|NVIDIA|NCCL|ROCR|HIP|RAY)_\w+"
)
SECRET = re.compile(r"TOKEN|SECRET|PASS|KEY|CREDENTIAL|AUTH|JOB_CONFIG|RUNTIME_ENV", re.IGNORECASE)


def seclude() -> None:
    """Take from this process's environment what is not KEPT.

    A hurdle behind the language, which cannot name the environment: the block that the kernel shows of a process's
    start stays as it was.
    """
    for name in list(os.environ):
        if not KEPT.fullmatch(name) or SECRET.search(name):
            del os.environ[name]
