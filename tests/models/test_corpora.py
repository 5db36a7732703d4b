"""Corpora by name, document slices, overlap, token windows, and the way from wikitext to prose."""

import itertools
import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from autoprune.models.corpora import load_corpus, overlap, plain_text, token_windows
from autoprune.models.errors import InputError

DOCUMENTS = ["one two", "three", "four five\nsix", "seven", "eight"]


@pytest.fixture
def text_file(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("\n" + "\n\n".join(DOCUMENTS[:3]) + "\n \n\n" + "\n\n".join(DOCUMENTS[3:]) + "\n")
    return path


def write_rows(path, rows):
    if path.suffix == ".jsonl":
        path.write_text("\n".join(json.dumps(row) for row in rows) + "\n")
    else:
        import pyarrow
        from pyarrow import parquet

        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns(tmp_path, suffix):
    path = write_rows(tmp_path / f"a{suffix}", [{"id": i, "text": text} for i, text in enumerate(DOCUMENTS)])
    assert load_corpus(str(path)).documents == tuple(DOCUMENTS)
    path = write_rows(tmp_path / f"b{suffix}", [{"gold_completion": t[2:], "prefix": t[:2]} for t in DOCUMENTS])
    assert load_corpus(str(path)).documents == tuple(DOCUMENTS)
    path = write_rows(tmp_path / f"c{suffix}", [{"id": 1, "body": "x"}])
    with pytest.raises(InputError, match="has the columns id, body; expected `text`"):
        load_corpus(str(path))


def test_text_file_and_hash(text_file):
    corpus = load_corpus(str(text_file))
    assert [document.strip() for document in corpus.documents] == DOCUMENTS
    part = load_corpus(f"{text_file}[1:2]")
    assert part.documents == ("three",)
    assert part.sha256 != corpus.sha256 == load_corpus(f"{text_file}[:]").sha256


def test_half_a_character_is_no_text(tmp_path):
    (tmp_path / "cut.jsonl").write_text('{"text": "cut \\ud83d"}\n')
    assert load_corpus(str(tmp_path / "cut.jsonl")).documents == ("cut ?",)


def test_slices_and_overlap_agree_with_python(text_file):
    slices = [f"[{a}:{b}]" for a, b in itertools.product(["", "0", "2", "-2", "9"], ["", "1", "3", "-1"])]
    chosen = {}
    for text in ["", *slices]:
        expected = eval(f"list(range(5)){text}")
        chosen[text] = set(expected)
        if expected:
            assert [d.strip() for d in load_corpus(f"{text_file}{text}").documents] == [DOCUMENTS[i] for i in expected]
        else:
            with pytest.raises(InputError, match="holds no documents"):
                load_corpus(f"{text_file}{text}")
    for a, b in itertools.product(chosen, chosen):
        if not any(index in a + b for index in ("9", "-")):  # these do not need the length of the text
            text_file.rename(text_file.with_suffix(".away"))
            assert overlap(f"{text_file}{a}", f"{text_file}{b}") == bool(chosen[a] & chosen[b])
            text_file.with_suffix(".away").rename(text_file)
        if "9" not in a + b:
            assert overlap(f"{text_file}{a}", f"{text_file}{b}") == bool(chosen[a] & chosen[b])


def test_overlap_of_sources(text_file, monkeypatch):
    monkeypatch.chdir(text_file.parent)
    assert overlap("text.txt", str(text_file))
    assert not overlap("wikipedia-sample", "text.txt")
    assert not overlap("wikipedia-sample[:50]", "wikipedia-sample[50:]")
    assert overlap("wikipedia-sample[:51]", "wikipedia-sample[50:]")
    assert overlap("a/b", "a/b::train")
    assert overlap("a/b:c:test", "a/b::test[0:3]")
    assert not overlap("a/b:c:train", "a/b:c:test")
    assert not overlap("a/b:c", "a/b:d")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("wikipedia", "did you mean wikipedia-sample"),
        ("smollm2-135m-instruct", "no text called"),
        ("nowhere.txt", "there is no file nowhere.txt"),
        ("wikipedia-sample[1:5:2]", "cannot read the document slice"),
        ("some/dataset:default:train", "cannot load the hub dataset some/dataset"),
    ],
)
def test_clear_errors(spec, message, monkeypatch):
    with pytest.raises(InputError, match=message) as error:
        load_corpus(spec)
    assert "\n" not in str(error.value)


def test_broken_files(tmp_path):
    path = tmp_path / "broken.jsonl"
    for content in ("{", '{"text": 1}', '{"text": "a"}\n{"txt": "b"}', "[1]"):
        path.write_text(content)
        with pytest.raises(InputError, match=r"broken\.jsonl"):
            load_corpus(str(path))
    path.write_text("")
    with pytest.raises(InputError, match="broken.jsonl is empty"):
        load_corpus(str(path))


def test_of_a_hub_dataset_no_more_is_read_than_the_slice_needs(tmp_path, monkeypatch):
    """A folder of the dataset's name is read as the dataset is; its second file cannot be read."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.HfApi.dataset_info", lambda *_, **__: None)  # there is no hub here
    folder = tmp_path / "some" / "data"
    folder.mkdir(parents=True)
    write_rows(folder / "train-0.jsonl", [{"id": 1, "text": text} for text in ("a", " ", "b", "c")])
    (folder / "train-1.jsonl").write_text("{")
    assert load_corpus("some/data::train[0:2]").documents == ("a", "b"), "empty ones do not count"
    assert load_corpus("some/data[1:3]").documents == ("b", "c")
    with pytest.raises(InputError, match="holds no documents; some/data has at least 1,"):
        load_corpus("some/data[1:1]")
    for spec in ("some/data", "some/data[0:4]", "some/data[:-1]"):
        with pytest.raises(InputError, match="cannot load the hub dataset some/data"):
            load_corpus(spec)
    write_rows(folder / "train-1.jsonl", [{"id": 2, "text": "d"}])
    assert load_corpus("some/data").documents == load_corpus("some/data[0:9]").documents == ("a", "b", "c", "d")


def test_token_windows(text_file, tiny_model, caplog):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    tokenizer.model_max_length = 8
    corpus = load_corpus(str(text_file))
    stream = [tokenizer.convert_tokens_to_ids(c) for c in "\n\n".join(corpus.documents).translate({32: "Ġ", 10: "Ċ"})]
    windows = token_windows(corpus, tokenizer, 7)
    assert windows.dtype == torch.int64 and windows.shape == (len(stream) // 7, 7)
    assert windows.flatten().tolist() == stream[: windows.numel()]
    assert len(windows) > 4, "enough to leave some out"
    assert token_windows(corpus, tokenizer, 7, 2).equal(windows[[0, len(windows) // 2]]), "over all of the text"
    assert token_windows(corpus, tokenizer, 7, 99).equal(windows)
    assert not caplog.records  # nothing about sequences longer than the model's maximum
    with pytest.raises(InputError, match=f"has {len(stream)} tokens and one window needs 500"):
        token_windows(corpus, tokenizer, 500)


def test_one_bos_for_the_stream(text_file):
    backend = Tokenizer(models.WordLevel({"<s>": 0, "</s>": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    kinds = {"bos": "<s> $A", "both": "<s> $A </s>", "eos": "$A </s>", "none": "$A"}
    corpus = load_corpus(str(text_file))
    for kind, template in kinds.items():
        backend.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=[("<s>", 0), ("</s>", 1)]
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
        expected = [0] * (kind in ("bos", "both")) + [2] * 8
        assert token_windows(corpus, tokenizer, len(expected)).tolist() == [expected], kind


def test_plain_text():
    wikitext = """{{Infobox|name={{PAGENAME}}|size={{convert|3|km}}}}<!-- a
    comment -->[[File:a.png|thumb|A [[cat|kitten]] {{small|x}} [1]]]
The '''cat''' ({{lang-la|felis}}) is an [[animal]]s' [[Friend (thing)|friend]]<ref name="x">[http://a.b C]</ref><ref
name="y"/> of {{convert|5|kg|lb}}&nbsp;weight, see [http://example.org the site].

{| class="wikitable"
| a || {| inner |}
|}
== History ==
=== Early ===
* First &amp; ''foremost''<br/> item
== Empty ==
== See also ==
* [[Dog]]
=== Below ===
dropped
== Size ==
{{quote|It is [[big|large]].}}
[[Category:Cats]]"""
    assert plain_text(wikitext).split("\n\n") == [
        "The cat is an animals' friend of 5 kg weight, see the site.",
        "History",
        "Early",
        "First & foremost item",
        "Size",
        "It is large.",
    ]


def test_wikipedia_sample_is_prose():
    documents = load_corpus("wikipedia-sample").documents
    text = "\n\n".join(documents)
    assert len(documents) == 106 and 2.7e6 < len(text) < 2.9e6
    assert documents[0].startswith("Anarchism is a political philosophy that advocates self-governed societies")
    for markup in ("[[", "]]", "{{", "}}", "''", "<ref", "&nbsp;", "&amp;", "http://"):
        assert markup not in text, markup
