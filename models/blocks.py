"""Where a transformers model keeps its decoder blocks, and loading only some of them."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig

from autoprune.models.errors import InputError
from autoprune.models.loading import load_config

# Families whose forward pass is: embed, blocks, norm, head, with nothing scaled between. One that also scales
# embeddings or logits would run here, and measure something else.
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")


def check_family(config: PreTrainedConfig, name: object) -> None:
    """InputError unless the model is of a family that can be run block by block."""
    if config.model_type not in FAMILIES:
        raise InputError(f"{name} is of the family {config.model_type!r}: expected one of {', '.join(FAMILIES)}")


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name → safetensors file that holds it, for a checkpoint folder in the Hugging Face layout."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            return {name: folder / file for name, file in json.loads(index.read_text())["weight_map"].items()}
        except (ValueError, KeyError, AttributeError):
            raise InputError(f"{index} is damaged: expected a weight_map; fetch or save the model again") from None
    single = folder / "model.safetensors"
    if not single.exists():
        raise InputError(
            f"{folder} holds no model.safetensors: expected a safetensors checkpoint; save it as one first"
        )
    with open_tensors(single) as file:
        return dict.fromkeys(file.keys(), single)


def checkpoint_bytes(folder: Path) -> int:
    """Size of a checkpoint's weights on disk."""
    return sum(file.stat().st_size for file in set(weight_files(folder).values()))


def open_tensors(path: Path) -> safe_open:
    """Open a safetensors file; InputError where it is missing, cut or damaged."""
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read ({error}): fetch or save the model again") from None


def read_tensors(folder: Path, names: set[str]) -> dict[str, torch.Tensor]:
    """Just these tensors of a checkpoint, in the dtype on disk; names that it does not hold are left out."""
    tensors = {}
    files = weight_files(folder)
    for path in sorted({files[name] for name in names if name in files}):
        with open_tensors(path) as file:
            for name in file.keys():  # noqa: SIM118 (a safetensors file is not a mapping)
                if name in names:
                    tensors[name] = file.get_tensor(name)
    return tensors


def prunable(block: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of one block by name: what pruning may touch. Norms are no linear layers."""
    return {name: module for name, module in block.named_modules() if isinstance(module, nn.Linear)}


class DecoderRange(nn.Module):
    """Blocks start … stop−1 of a causal language model, with the embedding if first and norm and head if last.

    Only their weights are read from disk. One block runs by giving the model's own decoder a single layer and the
    hidden states: masks, positions and rotary embeddings stay the family's own business.
    """

    def __init__(self, folder: Path, start: int, stop: int, dtype: torch.dtype, device: torch.device) -> None:
        super().__init__()
        self.config: PreTrainedConfig = load_config(folder)
        check_family(self.config, folder)
        self.folder = folder
        self.start = start
        self.first, self.last = start == 0, stop == self.config.num_hidden_layers
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(self.config, attn_implementation="sdpa")
        decoder = model.get_decoder()
        prefix = next(name for name, module in model.named_modules() if module is decoder)
        self.block_prefix = f"{prefix}.layers"
        embedding = f"{prefix}.embed_tokens.weight"
        head_source = embedding if self.config.tie_word_embeddings else "lm_head.weight"
        ends = {embedding} if self.first else set()
        if self.last:
            ends |= {f"{prefix}.norm.weight", "lm_head.weight", head_source}

        def wanted(name: str) -> bool:
            if name.startswith(self.block_prefix + "."):
                return start <= int(name[len(self.block_prefix) + 1 :].split(".")[0]) < stop
            return name in ends

        files = weight_files(folder)
        tensors = read_tensors(folder, {name for name in files if wanted(name)})
        # What this shard writes when the model is exported: a tied embedding belongs to the first shard.
        self.own_names = {
            n for n in tensors if self.first or not (self.config.tie_word_embeddings and n == head_source)
        }
        tensors = {name: tensor.to(device=device, dtype=dtype) for name, tensor in tensors.items()}
        if self.last and self.config.tie_word_embeddings:
            tensors["lm_head.weight"] = tensors[head_source]
        model.load_state_dict(tensors, strict=False, assign=True)
        self.blocks = nn.ModuleList(decoder.layers[start:stop])
        self.embedding = decoder.embed_tokens if self.first else None
        self.norm = decoder.norm if self.last else None
        self.head = model.get_output_embeddings() if self.last else None
        missing = [name for name, parameter in self.named_parameters() if parameter.is_meta]
        if missing:
            raise InputError(f"{folder} lacks {missing[0]} and {len(missing) - 1} more: the checkpoint is incomplete")
        # What is not a weight (rotary frequencies) was made on the meta device and is made anew here.
        decoder.rotary_emb = type(decoder.rotary_emb)(config=self.config).to(device)
        decoder.norm, decoder.embed_tokens = nn.Identity(), None
        self._layer_types = getattr(self.config, "layer_types", None)
        # A plain list hides the decoder from this module's parameters: its layers change with each call.
        self._decoder = [decoder]
        self.requires_grad_(False)
        self.eval()

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Block start+index on hidden states [windows, L, D] → the same shape."""
        decoder = self._decoder[0]
        decoder.layers = nn.ModuleList([self.blocks[index]])
        if self._layer_types is not None:
            decoder.config.layer_types = [self._layer_types[self.start + index]]
        return decoder(inputs_embeds=hidden, use_cache=False).last_hidden_state
