"""Names of models, their tokenizers, and GGUF files written on the spot from a model that we know."""

import json
import math
import shutil
from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub.errors import RepositoryNotFoundError
from huggingface_hub.utils import filter_repo_objects
from tiny import save_tiny_model
from tokenizers import pre_tokenizers
from transformers import AutoModelForCausalLM, Qwen2Config

from autoprune.models.checkpoint_files import checkpoint_bytes, weight_files
from autoprune.models.corpora import load_corpus, token_windows
from autoprune.models.errors import InputError
from autoprune.models.footprint import known_config
from autoprune.models.loading import GGUF_BLOCK, convert_gguf, load_config, load_tokenizer, pinned, resolve_model

TEMPLATE = "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}{% endfor %}"


def test_local_folder(tiny_model, tmp_path):
    assert resolve_model(str(tiny_model)) == tiny_model
    assert load_config(tiny_model).num_hidden_layers == 4
    tokenizer = load_tokenizer(tiny_model)
    assert tokenizer.decode(tokenizer("a b\nc").input_ids) == "a b\nc"
    with pytest.raises(InputError, match="has no config.json"):
        resolve_model(str(tmp_path))
    with pytest.raises(InputError, match="cannot read the model configuration"):
        load_config(tmp_path)
    with pytest.raises(InputError, match="cannot read the tokenizer"):
        load_tokenizer(tmp_path)


def test_a_model_that_was_saved_without_its_tokenizer_is_said_to_be(tmp_path):
    """Its class would come with an empty vocabulary."""
    (tmp_path / "config.json").write_text(json.dumps(Qwen2Config().to_dict()))
    with pytest.raises(InputError, match="cannot read the tokenizer in .*: no file of it is there; expected tokenizer"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("change", [{"hidden_size": "576"}, {"num_attention_heads": 0.5}])
def test_a_configuration_with_values_of_another_kind_is_one_line(tiny_model, tmp_path, change):
    options = json.loads((tiny_model / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(options | change))
    with pytest.raises(InputError, match="cannot read the model configuration") as error:
        load_config(tmp_path)
    assert "\n" not in str(error.value)


def test_code_of_a_model_is_not_run(tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'was run')!r}, 'w').close()\n")
    options = json.loads((folder / "config.json").read_text()) | {"model_type": "theirs"}
    maps = {"auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"}}
    (folder / "config.json").write_text(json.dumps(options | maps))
    with pytest.raises(InputError, match="cannot read the model configuration") as error:
        load_config(folder)
    assert "\n" not in str(error.value) and not (tmp_path / "was run").exists()


def test_one_file_of_weights_counts_more_than_an_index_that_is_left_over(tiny_model, tmp_path):
    """As for transformers: a model was saved as one file where it had been in parts."""
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    assert set(weight_files(folder).values()) == {folder / "model.safetensors"}
    assert AutoModelForCausalLM.from_pretrained(folder)


def test_a_part_that_is_missing_is_said_to_be(tiny_model, tmp_path):
    AutoModelForCausalLM.from_pretrained(tiny_model).save_pretrained(tmp_path, max_shard_size="50KB")
    assert checkpoint_bytes(tmp_path) > 0
    next(tmp_path.glob("model-00002-*")).unlink()
    with pytest.raises(
        InputError, match="model-00002-of-.* is missing, which the index names: fetch or save the model"
    ):
        checkpoint_bytes(tmp_path)


def test_of_the_hub_only_the_files_that_are_read_are_fetched(monkeypatch, tiny_model):
    asked = {}
    monkeypatch.setattr("huggingface_hub.HfApi.model_info", lambda *_, **__: None)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda name, **wanted: asked.update(wanted) or tiny_model)
    resolve_model("some/model")
    files = ["config.json", "model-1.safetensors", "consolidated.safetensors", "original/model.safetensors", "x.bin"]
    kinds = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(filter_repo_objects(files, **kinds)) == files[:2]
    assert known_config("some/model@v1").model_type == "llama"
    kinds = {"allow_patterns": asked["allow_patterns"], "ignore_patterns": asked["ignore_patterns"]}
    assert list(filter_repo_objects(files, **kinds)) == files[:1] and asked["revision"] == "v1"


def test_a_plan_says_of_a_model_that_the_hub_does_not_show_what_a_search_says(monkeypatch):
    def hidden(*_, **__):
        raise RepositoryNotFoundError("404", response=SimpleNamespace(headers={}, request=None))

    monkeypatch.setattr("huggingface_hub.HfApi.model_info", hidden)
    for read in (known_config, resolve_model):
        with pytest.raises(InputError, match="the hub has no model some/model that you may see"):
            read("some/model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("smolm2-135m", "did you mean smollm2-135m-instruct"),
        ("/no/such/folder", "expected a bundled model"),
        ("wikipedia-sample", "is a corpus, not a model"),
        ("./no-such", "expected a bundled model"),
        ("../no-such", "expected a bundled model"),
        ("a/b--c", "cannot get a/b--c from the model hub"),
        ("organisation/model", "cannot get organisation/model from the model hub"),
    ],
)
def test_clear_errors(name, message):
    with pytest.raises(InputError, match=message) as error:
        resolve_model(name)
    assert "\n" not in str(error.value)


def test_a_model_of_the_hub_is_held_to_its_revision(tiny_model, tmp_path, monkeypatch):
    """Of what an earlier download has left, in the layout of the hub's cache: there is no network."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    held = tmp_path / "models--some--model"
    (held / "refs").mkdir(parents=True)
    old, new = (character * 40 for character in "ab")
    for sha in (old, new):
        shutil.copytree(tiny_model, held / "snapshots" / sha)
    (held / "refs" / "main").write_text(old)
    before = pinned("some/model", resolve_model("some/model"))
    assert before == f"some/model@{old}"
    (held / "refs" / "main").write_text(new)  # there was an update
    assert resolve_model("some/model").name == new and resolve_model(before).name == old
    assert pinned(before, resolve_model(before)) == before
    with pytest.raises(InputError, match="cannot get some/model from the model hub"):
        resolve_model("some/model@v2")
    assert pinned(str(tiny_model), tiny_model) == str(tiny_model)


def write_gguf(model, path, output=None):
    """The model in float32, as llama.cpp's converter lays it out: a llama's q and k rows interleaved per head."""
    config, prefix = model.config, model.config.model_type
    writer = gguf.GGUFWriter(path, prefix)
    writer.add_name("tiny")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm" if prefix == "llama" else "qwen2")
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    writer.add_token_list([*letters[:-2], letters[0] + letters[1], "<|end|>"])  # two bytes that no test writes give way
    writer.add_token_types([1] * 255 + [3])
    writer.add_token_merges([f"{letters[0]} {letters[1]}"])
    writer.add_eos_token_id(255)
    writer.add_bos_token_id(255)
    writer.add_chat_template(TEMPLATE)
    back = {theirs: ours for ours, theirs in GGUF_BLOCK.items()}
    outside = {"model.embed_tokens": "token_embd", "model.norm": "output_norm"}
    for name, tensor in model.state_dict().items():
        stem, kind = name.rsplit(".", 1)
        value = tensor.float().numpy()
        if stem == "lm_head":
            continue
        if stem.startswith("model.layers."):
            _, _, number, part = stem.split(".", 3)
            if prefix == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                heads = config.num_attention_heads if "q_proj" in part else config.num_key_value_heads
                value = value.reshape(heads, 2, -1, value.shape[1]).swapaxes(1, 2).reshape(value.shape)
            stem = f"blk.{number}.{back[part]}"
        writer.add_tensor(f"{outside.get(stem, stem)}.{kind}", np.ascontiguousarray(value))
    if output is not None:
        writer.add_tensor("output.weight", output)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_gguf_keeps_the_model(tmp_path, family):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "tiny", family), dtype=torch.bfloat16)
    write_gguf(model, tmp_path / "source")
    convert_gguf(tmp_path / "source", tmp_path / "converted")

    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert converted.dtype == torch.bfloat16 and not hasattr(converted.config, "quantization_config")
    ids = torch.arange(40)[None]
    assert torch.equal(converted(ids).logits, model(ids).logits)
    tokenizer = load_tokenizer(tmp_path / "converted")
    assert tokenizer.chat_template == TEMPLATE and tokenizer.eos_token == "<|end|>"
    assert tokenizer.model_max_length == 128
    assert tokenizer.decode(tokenizer("def f(x):\n  return 12").input_ids) == "def f(x):\n  return 12"


def test_gguf_output_matrix_is_shared(tmp_path):
    model = AutoModelForCausalLM.from_pretrained(save_tiny_model(tmp_path / "tiny"), dtype=torch.bfloat16)
    output = (model.lm_head.weight.float() + 0.5).detach().bfloat16()
    write_gguf(model, tmp_path / "source", output.float().numpy())
    convert_gguf(tmp_path / "source", tmp_path / "converted")
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    assert converted.lm_head.weight is converted.model.embed_tokens.weight
    assert torch.equal(converted.lm_head.weight, output)


def test_smollm2_is_whole():
    folder = resolve_model("smollm2-135m-instruct")
    tokenizer = load_tokenizer(folder)
    assert tokenizer.eos_token == "<|im_end|>"
    assert "<|im_start|>user\nHi<|im_end|>" in tokenizer.apply_chat_template(
        [{"role": "user", "content": "Hi"}], tokenize=False
    )
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    windows = token_windows(load_corpus("wikipedia-sample[:1]"), tokenizer, 128, 2)
    with torch.no_grad():
        loss = model(windows, labels=windows).loss.item()
    assert 10 < math.exp(loss) < 40  # a permutation or a tensor that went wrong gives thousands
