"""Decoder blocks of any causal language model that transformers knows: found by structure, run one by one."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedConfig

from autoprune.models.checkpoint_files import Checkpoint, Source
from autoprune.models.errors import InputError
from autoprune.models.families import StandIn, build, same
from autoprune.models.layers import Layer, block_layers, inside
from autoprune.models.loading import load_config

CALLS_KEPT = 4  # shapes [windows, L] whose masks and positions are kept; a pass over a split uses two at most
WINDOWS_EMBEDDED = 4  # at a time: masks are made along with the embeddings, and are as large as windows × L × L


class DecoderRange:
    """Blocks start … stop−1 of a causal language model, what comes before them if first, what comes after if last.

    Nothing of a family is written down here: its own decoder, with stand-ins for its blocks, says what enters the
    first block and which masks and positions each one is given, and its own forward pass makes the logits of what
    leaves the last one. Only the tensors of the range are read from disk; what is small beside the blocks (norms,
    learned positions) in every range, the embedding only if first, the head only if last. With `offload`, a block is
    on the device while it is open, the embedding during `embed`, the head while `head` is open or during `logits`.
    """

    def __init__(
        self, folder: Path, start: int, stop: int, dtype: torch.dtype, device: torch.device, offload: bool = False
    ) -> None:
        """Raises InputError for a model that cannot be run so, and a folder that lacks tensors or is damaged."""
        self.config: PreTrainedConfig = load_config(folder)
        self.folder, self.start, self.count = folder, start, stop - start
        self.device, self.offload = device, offload
        self.model, self._decoder, self.block_prefix = build(self.config, folder, dtype)
        self.checkpoint = Checkpoint(folder, self.model)
        blocks = self.model.get_submodule(self.block_prefix)
        self.first, self.last = start == 0, stop == len(blocks)
        self.blocks = list(blocks[start:stop])
        self._meta = self.model.state_dict()
        self._kept_dtypes = self.model._get_dtype_plan(dtype)  # parts that transformers computes in float32 always
        self._names = self._groups()
        wanted = [*range(self.count), *["embedding"] * self.first, *["head"] * self.last, "rest"]
        self.checkpoint.check([name for key in wanted for name in self._names[key]])
        self._make_buffers()
        self._stand_ins = [StandIn(block) for block in blocks]
        self.model.set_submodule(self.block_prefix, nn.ModuleList(self._stand_ins))
        self._calls: dict[tuple[int, int], list[tuple[tuple, dict]]] = {}
        self._layers: dict[int, list[Layer]] = {}
        self._holders: Counter[int | str] = Counter()
        held = ["rest"] if offload else wanted
        ends = [key for key in held if isinstance(key, str)]
        self._fill(*ends)  # together, so that a tied embedding and head are one tensor
        self._learn_decoder()
        for index in range(self.count if not offload else 0):
            self._fill(index)
        self._holders.update(held)

    def _groups(self) -> dict[int | str, list[str]]:
        """The model's tensors by what is read and freed together: a block by its index here, or a part outside."""
        paths = {id(module): path for path, module in self.model.named_modules()}
        embedding = paths[id(self.model.get_input_embeddings())]
        head = paths.get(id(self.model.get_output_embeddings()))
        groups: dict[int | str, list[str]] = {key: [] for key in (*range(self.count), "embedding", "head", "rest")}
        for name in self._meta:
            block = self._block_of(name)
            if block is not None:
                groups.setdefault(block - self.start, []).append(name)
            elif inside(name, embedding):
                groups["embedding"].append(name)
            else:
                groups["head" if head is not None and inside(name, head) else "rest"].append(name)
        return groups

    def _block_of(self, name: str) -> int | None:
        if not name.startswith(self.block_prefix + "."):
            return None
        return int(name[len(self.block_prefix) + 1 :].split(".")[0])

    def _make_buffers(self) -> None:
        """What is neither on disk nor a weight (rotary frequencies, scales) was made on the meta device and is made
        anew by the initialisation that `from_pretrained` uses."""
        made = [
            name
            for name, _ in self.model.named_non_persistent_buffers()
            if self._block_of(name) is None or 0 <= self._block_of(name) - self.start < self.count
        ]
        for module in self.model.modules():
            module._is_hf_initialized = True
        holders = [(self.model.get_submodule(name.rpartition(".")[0]), name.rpartition(".")[2]) for name in made]
        for module, key in holders:
            module._is_hf_initialized = False
            module._buffers[key] = torch.empty_like(module._buffers[key], device="cpu")
        self.model.initialize_weights()
        for module, key in holders:
            module._buffers[key] = module._buffers[key].to(self.device)

    def _learn_decoder(self) -> None:
        """Find out how the decoder takes a block's answer, and that it does nothing else between its blocks.

        Raises InputError where a block is given more than the hidden states of the one before, unchanged, and what
        follows from the shape [windows, L]: it would run here, and measure something else.
        """
        reason, calls = "", []
        for as_tuple in (False, True):
            for stand_in in self._stand_ins:
                stand_in.as_tuple = as_tuple
            try:
                calls = []
                for value in (0.0, 1.0):
                    self._trace(None, (1, 2), value)
                    calls.append([(args, list(kwargs.items())) for args, kwargs in self._calls.pop((1, 2))])
                break
            except (ValueError, TypeError, RuntimeError, LookupError, AttributeError) as error:
                reason = reason or (str(error).splitlines() or [type(error).__name__])[0]
        if len(calls) == 2:
            if same(*calls):
                return
            reason = "they are given more than masks and positions"
        raise InputError(
            f"{self.folder} is of the family {self.config.model_type!r}: expected blocks that read nothing but the "
            f"hidden states of the block before and the shape of the windows ({reason})"
        )

    def _trace(self, tokens: torch.Tensor | None, shape: tuple[int, int], value: float = 0.0) -> torch.Tensor:
        """Run the decoder with stand-ins, on tokens or on embeddings that are `value` everywhere; returns what enters
        the first block. What each block is given besides is kept for this shape [windows, L]."""
        with torch.inference_mode(False), torch.no_grad():  # what is kept may be used under autograd later
            inputs = {"inputs_embeds": self._embeddings(shape, value)} if tokens is None else {"input_ids": tokens}
            left = self._decoder(**inputs, use_cache=False)[0]
        hidden = self._stand_ins[0].seen
        passed_on = all(one.seen is hidden or torch.equal(one.seen, hidden) for one in self._stand_ins)
        if hidden.ndim != 3 or left.ndim != 3 or not passed_on:
            raise ValueError("its decoder changes the hidden states between blocks")
        while len(self._calls) >= CALLS_KEPT:
            self._calls.pop(next(iter(self._calls)))
        self._calls[shape] = [stand_in.call for stand_in in self._stand_ins]
        self._forget()
        return hidden

    def _embeddings(self, shape: tuple[int, int], value: float = 0.0) -> torch.Tensor:
        weight = self.model.get_input_embeddings().weight
        return torch.full((*shape, weight.shape[1]), value, dtype=weight.dtype, device=self.device)

    def _forget(self) -> None:
        for stand_in in self._stand_ins:
            stand_in.seen = stand_in.call = stand_in.answer = None

    @contextmanager
    def _held(self, key: int | str) -> Iterator[None]:
        """A group of tensors is on the device while this is open; it may be nested."""
        if not self._holders[key]:
            self._fill(key)
        self._holders[key] += 1
        try:
            yield
        finally:
            self._holders[key] -= 1
            if not self._holders[key]:
                self._put({name: self._meta[name] for name in self._names[key]})
                self._layers.pop(key, None)

    def _fill(self, *keys: int | str) -> None:
        names = [name for key in keys for name in self._names[key]]
        with torch.inference_mode(False), torch.no_grad():
            self._put(self.checkpoint.load(names, self._dtype, self.device))
        for key in keys:
            if isinstance(key, int):
                self._layers[key] = self._find_layers(key)

    def _put(self, tensors: dict[str, torch.Tensor]) -> None:
        """Make these the model's tensors. Parameters are made anew: one cannot move off the meta device."""
        for name, tensor in tensors.items():
            root, block = self.model, self._block_of(name)
            if block is not None:
                root, name = self.blocks[block - self.start], name[len(f"{self.block_prefix}.{block}.") :]
            path, _, leaf = name.rpartition(".")
            module = root.get_submodule(path)
            if leaf in module._parameters:
                module._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
            else:
                module._buffers[leaf] = tensor

    def _dtype(self, name: str) -> torch.dtype:
        for pattern, dtype in self._kept_dtypes.items():
            if re.search(pattern.replace("*", ".*"), name):
                return dtype
        return self._meta[name].dtype

    def _find_layers(self, index: int) -> list[Layer]:
        prefix = f"{self.block_prefix}.{self.start + index}."

        def sources(name: str, expert: int | None, transposed: bool) -> tuple[Source, ...]:
            return self.checkpoint.sources(prefix + name, expert, transposed)

        return block_layers(self.blocks[index], self.config.get_text_config(), sources)

    @contextmanager
    def open(self, index: int) -> Iterator[list[Layer]]:
        """Block start+index is on the device while this is open, and its layers are those yielded. May be nested."""
        with self._held(index):
            yield self._layers[index]

    @contextmanager
    def head(self) -> Iterator[None]:
        """With `offload`: the head stays on the device while this is open, for several calls of `logits`."""
        with self._held("head"):
            yield

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """Tokens, int64 [windows, L] → what enters block 0 [windows, L, D]; of the first range only."""
        chunks = tokens.to(self.device).split(WINDOWS_EMBEDDED)
        with self._held("embedding"):
            return torch.cat([self._trace(chunk, tuple(chunk.shape)) for chunk in chunks])

    def run(self, index: int, hidden: torch.Tensor) -> torch.Tensor:
        """Block start+index, which must be open, on hidden states [windows, L, D] → the same shape."""
        if not self._holders[index]:
            raise RuntimeError(f"block {self.start + index} is run without being open")
        shape = tuple(hidden.shape[:2])
        if shape not in self._calls:
            self._trace(None, shape)
        args, kwargs = self._calls[shape][self.start + index]
        answer = self.blocks[index](hidden, *args, **kwargs)
        return answer if isinstance(answer, torch.Tensor) else answer[0]

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """What leaves the last block [windows, L, D] → logits [windows, L, vocabulary]; of the last range only."""
        with self.head():
            try:
                self._stand_ins[-1].answer = hidden.to(self.device)
                return self.model(inputs_embeds=self._embeddings(tuple(hidden.shape[:2])), use_cache=False).logits
            finally:
                self._forget()

    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything that this range read from disk and holds now, by name; blocks by their number in the model."""
        found = {name: tensor for name, tensor in self.model.state_dict().items() if self._block_of(name) is None}
        for index, block in enumerate(self.blocks):
            prefix = f"{self.block_prefix}.{self.start + index}."
            found |= {prefix + name: tensor for name, tensor in block.state_dict().items()}
        return {name: tensor for name, tensor in found.items() if not tensor.is_meta}

    def block_names(self, index: int) -> set[str]:
        """Names on disk of the tensors of block start+index."""
        own = set(self._names[index])
        return {name for name, target in self.checkpoint.target.items() if target in own}

    def outside_names(self) -> set[str]:
        """Names on disk of this range's tensors outside the blocks, such that each is one range's.

        The first range has them all, also those that no module reads, but for a head that is not tied: the last one's.
        """
        names = set()
        for name in self.checkpoint.files:
            target = self.checkpoint.target.get(name)
            if target is None or self._block_of(target) is None:
                head = target in self._names["head"] and not self.checkpoint.tied(target)
                if self.last if head else self.first:
                    names.add(name)
        return names
