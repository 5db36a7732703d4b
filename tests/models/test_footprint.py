"""What a footprint counts is what a shard really takes."""

import weakref

import pytest
import torch
from families import tiny_family
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig

from autoprune.models.footprint import Workload, footprint, known_config, model_sizes
from autoprune.models.loading import BUNDLED_MODELS, load_config, resolve_model
from autoprune.models.shard import GRADIENT_WINDOWS, ModelShard

CONTEXT = 4


class Storages(TorchDispatchMode):
    """Bytes of the tensors that were made while this is open, at most at a time."""

    def __init__(self):
        super().__init__()
        self.seen, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        def storages(tree):
            return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]

        given = {storage._cdata for storage in storages((args, kwargs))}
        made = func(*args, **(kwargs or {}))
        for storage in storages(made):
            if storage._cdata not in given | self.seen:
                self.seen.add(storage._cdata)
                self.now += storage.nbytes()
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())
        return made

    def _gone(self, key, size):
        self.seen.discard(key)
        self.now -= size


def shard_of(folder, family):
    config = known_config(str(tiny_family(folder, family)))
    sizes = model_sizes(config, family, "float32")
    return ModelShard(folder, 0, len(sizes.blocks), "float32", "cpu"), sizes


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_gradients_take_what_is_counted_for_them(tmp_path, family):
    shard, sizes = shard_of(tmp_path, family)
    counted = footprint(
        sizes, 0, len(sizes.blocks), Workload(CONTEXT, (GRADIENT_WINDOWS,), frozenset({"x_norm", "g_rms"}))
    )
    tokens = torch.randint(256, (GRADIENT_WINDOWS, CONTEXT), generator=torch.Generator().manual_seed(0))
    shard.calibrate(tokens, {"x_norm", "g_rms"})
    with Storages() as made:
        shard.backward(tokens)
    kept = [tensor for index in range(shard.model.count) for tensor in shard.gradients.get(index).values()]
    assert counted.gradients == sum(tensor.nbytes for tensor in kept)
    assert 0.65 * (expected := counted.gradients + counted.work + counted.host) < made.peak < expected


def test_gradients_lie_beside_the_device(tmp_path):
    """`ModelShard.backward` takes them to the CPU; a device has room for those of a block or two at a time."""
    _, sizes = shard_of(tmp_path, "llama")
    twice = sizes.__class__(**{**vars(sizes), "blocks": sizes.blocks * 2, "prunable": sizes.prunable * 2})
    load = Workload(CONTEXT, (GRADIENT_WINDOWS,), frozenset({"x_norm", "g_rms"}))
    one, two = (footprint(each, 0, len(each.blocks), load) for each in (sizes, twice))
    assert two.gradients == 2 * one.gradients == 8 * sum(sizes.prunable)
    assert (two.work, two.host) == (one.work, one.host)
    assert two.total == two.weights + two.states + two.work


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt2"])
def test_gram_matrices_are_as_wide_as_the_inputs_of_layers(tmp_path, family):
    shard, sizes = shard_of(tmp_path, family)
    beside, alone = (
        footprint(sizes, 0, len(sizes.blocks), Workload(CONTEXT, (2,), frozenset(reads))).host
        for reads in ({"gram"}, {"x_norm"})
    )
    states = shard.enter(torch.arange(2 * CONTEXT).view(2, CONTEXT))
    with shard.model.open(0) as layers:
        moments, _ = shard.collect(0, layers, states, {"gram"})
    grams = sum({id(own): own.gram.nbytes for own in moments.values()}.values())
    assert grams <= (beside - alone) / 2 <= 2 * grams, "with as much for the factors"


def test_a_stored_architecture_serves_any_revision():
    known = known_config("Qwen/Qwen2.5-7B")
    assert known_config("Qwen/Qwen2.5-7B@no-such-revision").to_dict() == known.to_dict()


def test_the_stored_architecture_of_a_bundled_model_is_its_own():
    """Of the small one: the other one takes a gigabyte."""
    name = "smollm2-135m-instruct"
    own, stored = load_config(resolve_model(name)), known_config(name)
    assert model_sizes(stored, name, "bfloat16") == model_sizes(own, name, "bfloat16")
    assert stored.max_position_embeddings == own.max_position_embeddings


def test_a_bundled_model_is_planned_for_without_being_fetched(monkeypatch):
    monkeypatch.setattr("autoprune.models.loading.fetch", lambda name: 1 / 0)
    assert [known_config(name).num_hidden_layers for name in BUNDLED_MODELS] == [30, 28]


@pytest.mark.parametrize("cap", [None, 50.0])
def test_attention_that_is_capped_holds_its_scores(cap):
    config = AutoConfig.for_model("gemma2", num_hidden_layers=2, attn_logit_softcapping=cap)
    sizes = model_sizes(config, "tiny", "bfloat16")
    assert sizes.heads == (config.num_attention_heads if cap else 0)
    work = footprint(sizes, 0, 1, Workload(4096, (8, 8), frozenset())).work
    assert (work > 8 * config.num_attention_heads * 4096**2 * 8) == bool(cap)
