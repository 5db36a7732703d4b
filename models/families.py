"""What a family's model looks like: made without weights, its list of blocks found, and stand-ins for the blocks."""

from __future__ import annotations

from copy import deepcopy

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from autoprune.models.errors import InputError
from autoprune.models.layers import has_linears, inside

# Outputs that a stand-in for a block cannot give; a configuration that asks for them would end in an error.
EXTRA_OUTPUTS = ("output_hidden_states", "output_attentions", "output_router_logits")


def build(config: PreTrainedConfig, name: object, dtype: torch.dtype) -> tuple[PreTrainedModel, nn.Module, str]:
    """The model on the meta device, its decoder, and where its blocks are, such as `model.layers`.

    config is adapted to how the model is run. name: what messages call the model. Raises InputError for what cannot be
    run block by block: anything but a decoder with one list of num_hidden_layers blocks that hold linear layers, or
    weights that are quantised.
    """
    family = f"{name} is of the family {config.model_type!r}"
    if getattr(config, "quantization_config", None) is not None:
        raise InputError(f"{name} is quantised: expected a checkpoint with float weights")
    for option in EXTRA_OUTPUTS:
        if getattr(config, option, False):
            setattr(config, option, False)
    model, reason = None, ""
    for attention in ("eager",) if is_capped(config) else ("sdpa", "eager"):  # some families have the second alone
        try:
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(
                    config, dtype=dtype, attn_implementation=attention, experts_implementation="eager"
                )
            break
        except (ValueError, ImportError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
    if model is None:
        raise InputError(f"{family}: expected a causal language model that transformers can make ({reason})")
    count = getattr(config.get_text_config(), "num_hidden_layers", None)
    lists: dict[str, int] = {}
    for decoder in (model.get_decoder(), model.base_model):  # the former finds a head where one is called `decoder`
        lists = _lists(model, decoder)
        right = [path for path, length in lists.items() if length == count]
        right = [path for path in right if not any(path != other and inside(path, other) for other in right)]
        if len(right) == 1:
            return model.eval().requires_grad_(False), decoder, right[0]
    found = [f"{path} of {length}" for path, length in lists.items()] or ["no such list"]
    raise InputError(
        f"{family}: expected a decoder with one list of num_hidden_layers = {count} blocks that hold linear layers; "
        f"found {', '.join(found[:3])}{' and others' if len(found) > 3 else ''}"
    )


def is_capped(config: PreTrainedConfig) -> bool:
    """Whether attention is capped, which transformers does in its plain form alone, and leaves out in the others."""
    return getattr(config.get_text_config(), "attn_logit_softcapping", None) is not None


def _lists(model: nn.Module, decoder: nn.Module) -> dict[str, int]:
    """Lists of modules inside the decoder of which each holds linear layers: path in the model → length."""
    place = next((path for path, module in model.named_modules() if module is decoder), "")
    return {
        path: len(module)
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and inside(path, place) and module and all(map(has_linears, module))
    }


def check_family(config: PreTrainedConfig, name: object) -> None:
    """InputError unless the model can be run block by block, as far as that can be told without its weights."""
    build(deepcopy(config), name, torch.float32)


class StandIn(nn.Module):
    """Takes a block's place in the decoder: hands the hidden states on and notes what else the block would be given.

    For whatever a decoder reads off a block, it answers with the block's own attribute.
    """

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.__dict__["block"] = block  # not as a submodule: the model's own modules are only what is not in blocks
        self.as_tuple = False
        self.answer: torch.Tensor | None = None  # handed on instead of what came in

    def __getattr__(self, name: str) -> object:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["block"], name)

    def forward(self, *args: object, **kwargs: object) -> object:
        self.seen = args[0] if args else kwargs.pop("hidden_states")
        self.call = (args[1:], kwargs)
        hidden = self.seen if self.answer is None else self.answer
        return (hidden, None) if self.as_tuple else hidden


def same(one: object, other: object) -> bool:
    """Whether two arguments of a block are equal; False for what may carry something from block to block."""
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return one.shape == other.shape and torch.equal(one, other)
    if isinstance(one, (tuple, list, dict)) and type(one) is type(other) and len(one) == len(other):
        if isinstance(one, dict):
            return bool(one) and all(key in other and same(value, other[key]) for key, value in one.items())
        return all(map(same, one, other))
    return isinstance(one, (bool, int, float, str, type(None), torch.dtype, torch.device)) and one == other
