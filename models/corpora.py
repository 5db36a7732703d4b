"""Text by name: bundled corpora, local files and hub datasets, cut into documents and then into token windows."""

from __future__ import annotations

import bz2
import difflib
import hashlib
import html
import itertools
import json
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from autoprune.models.bundled import fetch
from autoprune.models.catalogue import CATALOGUE
from autoprune.models.errors import InputError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

SEPARATOR = "\n\n"  # between documents, wherever they become one stream
SUFFIXES = (".txt", ".jsonl", ".parquet")
HUB_SECONDS = 10  # for the hub's first answer
TEXT_COLUMNS = (("text",), ("prefix", "gold_completion"))
FORMS = (
    "expected a bundled corpus ({bundled}), a local .txt, .jsonl or .parquet file, or a hub dataset "
    "`organisation/name:configuration:split`, each with an optional document slice such as [0:100]"
)
SLICE = re.compile(r"(?P<source>.*?)\[(?P<start>-?\d*):(?P<stop>-?\d*)\]", re.DOTALL)
HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?::(?P<configuration>[\w.-]*))?(?::(?P<split>[\w.-]+))?")


@dataclass(frozen=True)
class Corpus:
    """spec: what was asked for. sha256: of the documents joined by blank lines (UTF-8), hexadecimal."""

    spec: str
    documents: tuple[str, ...]
    sha256: str


def load_corpus(spec: str) -> Corpus:
    """The documents that `spec` names, in their order; empty ones are left out before slicing.

    spec is a source, then optionally `[a:b]`, a Python slice over documents. The source is one of
    - a bundled name, such as `wikipedia-sample`;
    - a local file: .txt (documents are blocks of lines between blank lines; where there are no blank lines, every line
      is one), .jsonl or .parquet (column `text`, or `prefix` + `gold_completion` put together);
    - a hub dataset `organisation/name`, `…:configuration`, `…:configuration:split` or `…::split`; the split is
      `train` unless given, and the columns are those of .jsonl.
    Of a hub dataset no more is fetched than up to the slice's end, where it has one that counts from the front.
    Raises InputError for what is none of these, cannot be read, or is empty.
    """
    source, start, stop = _parse(spec)
    ahead = stop is not None and stop >= 0 and (start is None or start >= 0)
    documents = list(itertools.islice(filter(str.strip, _read(source, ahead)), stop if ahead else None))
    # Half of a character that was cut in two, as JSON can hold it, is no text.
    chosen = tuple(document.encode(errors="replace").decode() for document in documents[start:stop])
    if not documents and stop != 0:
        raise InputError(f"{source} is empty: expected text")
    if not chosen:
        count = f"at least {len(documents)}" if ahead and len(documents) == stop else len(documents)
        raise InputError(f"{spec} holds no documents; {source} has {count}, numbered from 0")
    return Corpus(spec, chosen, hashlib.sha256(SEPARATOR.join(chosen).encode()).hexdigest())


def check_spec(spec: str) -> None:
    """InputError for what is no corpus, as far as that can be told without reading it."""
    source, *_ = _parse(spec)
    if source in CATALOGUE and CATALOGUE[source].kind == "corpus":
        return
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES:
        _existing(path, source)
    else:
        _hub_parts(source)


def overlap(spec_a: str, spec_b: str) -> bool:
    """Whether two specs share a document of one source: then one must not judge what was tuned on the other.

    The text is read only where a negative index needs the number of documents.
    """
    (source_a, *slice_a), (source_b, *slice_b) = _parse(spec_a), _parse(spec_b)
    if not _same_source(source_a, source_b):
        return False
    bounds = [index for index in (*slice_a, *slice_b) if index is not None]
    count = sum(1 for text in _read(source_a) if text.strip()) if any(index < 0 for index in bounds) else 2**62
    a, b = range(*slice(*slice_a).indices(count)), range(*slice(*slice_b).indices(count))
    return max(a.start, b.start) < min(a.stop, b.stop)


def token_windows(
    corpus: Corpus, tokenizer: PreTrainedTokenizerBase, context: int, limit: int | None = None
) -> torch.Tensor:
    """The corpus as one stream of tokens, cut into non-overlapping windows: int64 [n, context], n ≤ limit.

    Of more than `limit` windows those are taken that `evenly` says: the first few would be of one or two documents, and
    speak for those only. Documents are joined by blank lines and tokenised once; the stream starts with one BOS if the
    tokenizer adds one of its own accord; the tail that fills no window is dropped. Raises InputError if there is not
    one full window.
    """
    import torch

    # What the tokenizer adds around an empty text is what it adds around any; only a leading BOS is wanted (no EOS).
    bos = [token for token in tokenizer("").input_ids[:1] if token == tokenizer.bos_token_id]
    text = SEPARATOR.join(corpus.documents)
    # verbose=False: a stream is longer than the model's context on purpose.
    ids = bos + tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    count = len(ids) // context
    if count == 0:
        raise InputError(
            f"{corpus.spec} has {len(ids)} tokens and one window needs {context}; "
            "take more documents or a shorter context"
        )
    windows = torch.tensor(ids[: count * context], dtype=torch.int64).view(count, context)
    return windows if limit is None or limit >= count else windows[evenly(count, limit)]


def evenly(total: int, count: int) -> list[int]:
    """Places of `count` among `total` windows, evenly spaced, from the first one on; count ≤ total."""
    return [index * total // count for index in range(count)]


def _parse(spec: str) -> tuple[str, int | None, int | None]:
    """Source, start and stop."""
    match = SLICE.fullmatch(spec)
    if match is None:
        if spec.endswith("]"):
            raise InputError(f"cannot read the document slice of {spec!r}; expected [a:b] with whole numbers, no step")
        return spec, None, None
    start, stop = (int(text) if text else None for text in (match["start"], match["stop"]))
    return match["source"], start, stop


def _same_source(a: str, b: str) -> bool:
    if {a, b} & CATALOGUE.keys():
        return a == b
    if {Path(a).suffix, Path(b).suffix} & set(SUFFIXES):
        return Path(a).expanduser().resolve() == Path(b).expanduser().resolve()
    (id_a, configuration_a, split_a), (id_b, configuration_b, split_b) = _hub_parts(a), _hub_parts(b)
    if (id_a.lower(), split_a) != (id_b.lower(), split_b):
        return False
    # Unnamed, it is the dataset's default, which may be the one that the other names.
    return configuration_a == configuration_b or not configuration_a or not configuration_b


def _hub_parts(source: str) -> tuple[str, str, str]:
    match = HUB.fullmatch(source)
    if match is None:
        bundled = [name for name, entry in CATALOGUE.items() if entry.kind == "corpus"]
        near = difflib.get_close_matches(source.lower(), bundled, 1, 0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise InputError(f"no text called {source!r}{hint}; {FORMS.format(bundled=', '.join(bundled))}")
    return match["id"], match["configuration"] or "", match["split"] or "train"


def _read(source: str, ahead: bool = False) -> Iterable[str]:
    """Documents, empty ones too. ahead: not all of them will be asked for."""
    if source in CATALOGUE and CATALOGUE[source].kind == "corpus":
        return _read_file(fetch(source) / "documents.jsonl")
    path = Path(source).expanduser()
    if path.suffix in SUFFIXES:
        return _read_file(_existing(path, source))
    return _read_hub(*_hub_parts(source), ahead)


def _existing(path: Path, source: str) -> Path:
    if not path.is_file():
        raise InputError(f"there is no file {source}; check the path")
    return path


def _read_file(path: Path) -> list[str]:
    try:
        if path.suffix == ".parquet":
            from pyarrow import parquet

            columns = _text_columns(parquet.read_schema(path).names, path)
            table = parquet.read_table(path, columns=columns).to_pydict()
            return ["".join(parts) for parts in zip(*(table[name] for name in columns), strict=True)]
        if path.suffix == ".txt":
            text = path.read_text(encoding="utf-8")
            blocks = re.split(r"\n\s*\n", text)
            return blocks if len([block for block in blocks if block.strip()]) > 1 else text.split("\n")
        with path.open(encoding="utf-8") as file:
            rows = [json.loads(line) for line in file if line.strip()]
        columns = _text_columns(rows[0], path) if rows else ()
        return ["".join(row[name] for name in columns) for row in rows]
    except InputError:
        raise
    except (OSError, ValueError, TypeError, KeyError) as error:  # not UTF-8, not JSON, no Parquet, not text, a gap
        raise InputError(f"cannot read the text in {path}: {type(error).__name__}: {error}") from error


def _read_hub(name: str, configuration: str, split: str, ahead: bool) -> Iterator[str]:
    """ahead: row by row as they arrive, in the same order; a cached copy, which is all that there is offline, is read
    from the disk in any case."""
    from datasets import load_dataset
    from huggingface_hub import HfApi, constants

    try:
        if not constants.HF_HUB_OFFLINE:  # one short question: `datasets` alone retries for half a minute
            HfApi().dataset_info(name, timeout=HUB_SECONDS)
        streaming = ahead and not constants.HF_HUB_OFFLINE
        dataset = load_dataset(name, configuration or None, split=split, streaming=streaming)
        columns: list[str] = []
        for row in dataset:
            columns = columns or _text_columns(row, name)
            yield "".join(row[column] for column in columns)
    except InputError:
        raise
    except Exception as error:  # its own errors, the hub's, the HTTP library's, Arrow's
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise InputError(
            f"cannot load the hub dataset {name} (configuration {configuration or 'default'}, split {split}): {reason}"
            "; check the name and the network (HF_HUB_OFFLINE=1 uses a cached copy), or give a local or bundled text"
        ) from error


def _text_columns(names: Iterable[str], source: object) -> list[str]:
    """The columns that make up a document, put together in this order."""
    names = list(names)
    for columns in TEXT_COLUMNS:
        if set(columns) <= set(names):
            return list(columns)
    raise InputError(f"{source} has the columns {', '.join(names)}; expected `text`, or `prefix` and `gold_completion`")


# From a MediaWiki dump to prose. Not a full parser: it keeps paragraphs, headings and list items, and drops what a
# reader of plain text cannot use (templates, tables, references, pictures, formulas, link lists at the end).

DROPPED_ELEMENTS = "ref|math|gallery|timeline|source|syntaxhighlight|imagemap|score|hiero|references|chem|pre|nowiki"
DROPPED_SECTIONS = {
    "see also", "references", "external links", "further reading", "notes", "bibliography", "sources", "citations",
    "footnotes", "works cited", "notes and references", "references and notes", "gallery", "publications",
}  # fmt: skip
NAMESPACE_LINK = re.compile(r"\s*:?(file|image|category|media|[a-z]{2,3}(-[a-z]+)?):", re.IGNORECASE)


def wikipedia_articles(dump: Path) -> Iterator[tuple[str, str]]:
    """(title, plain text) of every article of a bz2-compressed MediaWiki XML dump, redirects left out."""
    with bz2.open(dump) as file:
        for _, page in ElementTree.iterparse(file):
            if page.tag.rpartition("}")[2] != "page":
                continue
            if page.findtext("{*}ns") == "0" and page.find("{*}redirect") is None:
                text = plain_text(page.findtext("{*}revision/{*}text") or "")
                if text:
                    yield page.findtext("{*}title") or "", text
            page.clear()


def plain_text(wikitext: str) -> str:
    """Prose of an article's wikitext, paragraphs separated by blank lines."""
    text = re.sub(r"<!--.*?-->", "", wikitext, flags=re.DOTALL)
    text = re.sub(rf"<({DROPPED_ELEMENTS})\b[^<>]*/>", "", text, flags=re.IGNORECASE)
    text = re.sub(rf"<({DROPPED_ELEMENTS})\b[^<>]*>.*?</\1\s*>", "", text, flags=re.IGNORECASE | re.DOTALL)
    text = re.sub(r"\[(?:https?:|ftp:)?//[^\s\]]*\s*([^\]]*)\]", r"\1", text)
    text = _innermost_first(r"\[\[((?:(?!\[\[|\]\]).)*)\]\]", _link, text)  # before templates: both use "|"
    text = _innermost_first(r"\{\{([^{}]*)\}\}", _template, text)
    text = _innermost_first(r"\{\|(?:(?!\{\||\|\}).)*\|\}", lambda _: "", text)
    text = re.sub(r"</?[a-zA-Z][^<>]*>", "", text)
    text = re.sub(r"'{2,}|__[A-Z]+__|\[\[|\]\]|\{\{|\}\}", "", text)
    text = html.unescape(html.unescape(text)).replace("\xa0", " ")
    text = "\n\n".join(_paragraphs(text))
    text = re.sub(r"\([\s,;:]+", "(", text)
    text = re.sub(r"\s*\(\)|[ \t]+(?=[,.;:)\n])", "", text)
    return re.sub(r"[ \t]{2,}", " ", text)


def _innermost_first(pattern: str, replacement: Callable[[re.Match[str]], str], text: str) -> str:
    """Replace until nothing matches: what is nested goes before what is around it."""
    count = 1
    while count:
        text, count = re.subn(pattern, replacement, text, flags=re.DOTALL)
    return text


def _template(match: re.Match[str]) -> str:
    """The words of the few templates that stand inside sentences; nothing of all others."""
    name, *arguments = (part.strip() for part in match[1].split("|"))
    values = [argument for argument in arguments if not re.match(r"\w+\s*=", argument)]
    name = name.lower()
    if name.startswith("formatnum:"):
        return name.partition(":")[2].strip()
    if name in ("convert", "cvt") and len(values) >= 2:
        return f"{values[0]} {values[1]}"
    if name in ("nowrap", "quote", "blockquote", "nobr", "em", "strong", "sc", "smallcaps") and values:
        return values[0]
    return values[1] if (name == "lang" or name.startswith("transl")) and len(values) > 1 else ""


def _link(match: re.Match[str]) -> str:
    return "" if NAMESPACE_LINK.match(match[1]) else match[1].rpartition("|")[2]


def _paragraphs(text: str) -> Iterator[str]:
    """Lines that hold prose; a heading only if something stands below it."""
    headings: list[str] = []
    dropped = 0  # level of the dropped section that we are in
    for line in text.split("\n"):
        heading = re.fullmatch(r"(=+)\s*(.*?)\s*=+\s*", line)
        if heading:
            level = len(heading[1])
            if dropped and level > dropped:
                continue
            dropped = level if heading[2].lower() in DROPPED_SECTIONS else 0
            headings = [] if dropped else [*headings[: level - 2], heading[2]]
            continue
        line = line.strip().lstrip("*#:; ").strip()
        if dropped or not any(character.isalnum() for character in line) or line[0] in "|!{}":
            continue
        yield from headings
        headings = []
        yield line
