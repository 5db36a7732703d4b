"""What a model's name means, and its configuration and tokenizer. (`models.blocks` reads the weights.)

transformers and torch are imported where they are needed: `autoprune models list` must not wait for them.
"""

from __future__ import annotations

import difflib
import re
from pathlib import Path
from typing import TYPE_CHECKING

from autoprune.models.bundled import fetch
from autoprune.models.catalogue import CATALOGUE
from autoprune.models.errors import InputError

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase

BUNDLED_MODELS = [name for name, entry in CATALOGUE.items() if entry.kind == "model"]
HUB_FILES = ("*.safetensors", "*.safetensors.index.json", "*.json", "tokenizer.model", "*.jinja", "merges.txt")
# Patterns cross folders: what lies in one, or is the same in another form (Mistral's), would be fetched beside it.
HUB_IGNORED = ("*/*", "consolidated*.safetensors")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tekken.json")
HUB_SECONDS = 10  # for the first answer; a download that has begun may take as long as it needs
HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
HUB_MODEL = re.compile(rf"(?P<id>{HUB_ID.pattern})(?:@(?P<revision>[\w.-]+))?")

# Tensors of a GGUF file whose names begin with `blk.<n>.`, for the two architectures that the catalogue holds.
GGUF_BLOCK = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
DEQUANTISE_ROWS = 8192  # at a time: the largest matrix (151,936 × 1,536) would need several GB beside the model


def resolve_model(name: str) -> Path:
    """The folder of a model: a bundled name, a local folder with a config.json, or a hub id `organisation/name`, of the
    newest revision or that of `organisation/name@revision`.

    Downloads what is not on disk yet. Raises InputError when it is none of these or cannot be had.
    """
    if name in CATALOGUE:
        if name not in BUNDLED_MODELS:
            raise InputError(f"{name} is a corpus, not a model; expected one of: {', '.join(BUNDLED_MODELS)}")
        return fetch(name)
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise InputError(f"the folder {name} has no config.json; expected a model as `save_pretrained` writes it")
        return folder
    if match := HUB_MODEL.fullmatch(name):
        return _from_hub(match["id"], match["revision"])
    near = difflib.get_close_matches(name.lower(), BUNDLED_MODELS, 1, 0.4)
    hint = f" (did you mean {near[0]}?)" if near else ""
    raise InputError(
        f"no model {name!r}{hint}; expected a bundled model ({', '.join(BUNDLED_MODELS)}), a local folder with a "
        "config.json, or a hub id such as organisation/name"
    )


def pinned(name: str, folder: Path) -> str:
    """The name of a model that was found in this folder, of the hub with its revision: whoever asks for it later gets
    the same files, those on its disk where the hub is away."""
    match = HUB_MODEL.fullmatch(name)
    if match is None or Path(name).expanduser().is_dir() or folder.parent.name != "snapshots":
        return name
    return f"{match['id']}@{folder.name}"


def fetch_config(name: str) -> Path:
    """A folder that holds the configuration of a hub id, `organisation/name` or `organisation/name@revision`, and no
    weights. Raises InputError as `resolve_model`."""
    match = HUB_MODEL.fullmatch(name)
    return _from_hub(match["id"], match["revision"], ("config.json",))


def _from_hub(name: str, revision: str | None, files: tuple[str, ...] = HUB_FILES) -> Path:
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub.errors import (
        GatedRepoError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    wanted = {"allow_patterns": list(files), "ignore_patterns": list(HUB_IGNORED)}
    try:
        # One short question first: a hub that cannot be reached is known at once, not after every file's retries.
        HfApi().model_info(name, revision=revision, timeout=HUB_SECONDS)
        return Path(snapshot_download(name, revision=revision, **wanted))
    except GatedRepoError as error:
        raise InputError(f"{name} needs its owner's permission; ask for it on the hub, then set HF_TOKEN") from error
    except RepositoryNotFoundError as error:
        raise InputError(f"the hub has no model {name} that you may see; check the name, or set HF_TOKEN") from error
    except RevisionNotFoundError as error:
        raise InputError(f"the hub has no revision {revision} of {name}; check it, or leave it out") from error
    except Exception as error:  # the hub's client raises its own, its HTTP library's and the system's errors
        try:
            return Path(snapshot_download(name, revision=revision, local_files_only=True, **wanted))
        except (LocalEntryNotFoundError, HFValidationError):
            raise InputError(
                f"cannot get {name} from the model hub ({type(error).__name__}); check the network, "
                f"give a local folder, or use a bundled model: {', '.join(BUNDLED_MODELS)}"
            ) from error


def load_config(path: Path | str) -> PretrainedConfig:
    """The configuration of a resolved model; code from the folder is never run."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError, StrictDataclassError) as error:
        raise InputError(f"cannot read the model configuration in {path}: {_first_line(error)}") from error


def load_tokenizer(path: Path | str) -> PreTrainedTokenizerBase:
    """The tokenizer of a resolved model; code from the folder is never run."""
    from transformers import AutoTokenizer

    expected = "expected tokenizer.json and tokenizer_config.json beside config.json"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except Exception as error:  # a broken tokenizer.json raises a bare Exception from the Rust side
        raise InputError(f"cannot read the tokenizer in {path}: {_first_line(error)}; {expected}") from error
    own = tokenizer.vocab_files_names.values()
    # Without any file some families get an empty vocabulary. Those that read bytes need none.
    if own and not any((Path(path) / name).exists() for name in (*own, *TOKENIZER_FILES)):
        raise InputError(f"cannot read the tokenizer in {path}: no file of it is there; {expected}")
    return tokenizer


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def convert_gguf(source: Path, target: Path) -> None:
    """Dequantise a GGUF file of the llama or qwen2 architecture to bfloat16 safetensors with config and tokenizer.

    The embedding is tied to the output matrix, as in the models that the catalogue holds. Where the file carries both,
    the output matrix is kept: quantisers give it more bits.
    """
    import torch
    from gguf import GGUFReader, dequantize
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    config = AutoConfig.from_pretrained(source.parent, gguf_file=source.name)
    config.dtype, config.tie_word_embeddings = torch.bfloat16, True
    reader = GGUFReader(source)
    state = {}
    for tensor in reader.tensors:
        weight = torch.empty(*reversed(tensor.shape.tolist()), dtype=torch.bfloat16)
        rows = tensor.data if weight.ndim == 2 else tensor.data[None]
        for start in range(0, len(rows), DEQUANTISE_ROWS):
            values = torch.from_numpy(dequantize(rows[start : start + DEQUANTISE_ROWS], tensor.tensor_type).copy())
            weight.view(len(rows), -1)[start : start + DEQUANTISE_ROWS] = values
        state[_parameter_name(tensor.name)] = _unpermute(weight, tensor.name, config)
    shared = state.get("lm_head.weight", state["model.embed_tokens.weight"])
    state["lm_head.weight"] = state["model.embed_tokens.weight"] = shared

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.load_state_dict(state, assign=True)  # strict: a tensor too many or too few is an error
    model.tie_weights()
    model.save_pretrained(target)
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(target)


def _parameter_name(name: str) -> str:
    outside = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    stem, kind = name.rsplit(".", 1)
    if stem in outside:
        return f"{outside[stem]}.{kind}"
    _, number, part = stem.split(".")
    return f"model.layers.{number}.{GGUF_BLOCK[part]}.{kind}"


def _unpermute(weight, name: str, config: PretrainedConfig):
    """GGUF interleaves the two halves of each rotary head of a llama's q and k; transformers keeps them apart."""
    if config.model_type != "llama" or not name.endswith(("attn_q.weight", "attn_k.weight")):
        return weight
    heads = config.num_attention_heads if "attn_q" in name else config.num_key_value_heads
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
