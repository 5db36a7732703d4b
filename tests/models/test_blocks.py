"""Blocks run one by one against transformers' own forward pass, for families that differ in all that matters here."""

import hashlib
import json
import shutil

import pytest
import torch
from families import COMMON, FAMILIES, tiny_family
from safetensors.torch import load_file, save_file
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig, AutoModelForCausalLM

from autoprune.models.blocks import DecoderRange
from autoprune.models.checkpoint_files import read_tensors, weight_files
from autoprune.models.errors import InputError
from autoprune.models.families import check_family
from autoprune.models.layers import block_layers, replaced
from autoprune.models.shard import ModelShard

CPU = torch.device("cpu")
ROUTERS = {  # what chooses and weighs experts, per family
    "mixtral": {"mlp.gate.weight"},
    "qwen3_moe": {"mlp.gate.weight"},
    "qwen2_moe": {"mlp.gate.weight", "mlp.shared_expert_gate.weight"},
    "deepseek_v3": {"mlp.gate.weight"},
    "gpt_oss": {"mlp.router.weight"},
}
EXPERTS = ("mlp.experts.gate_up_proj", "mlp.experts.down_proj")


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring on matrices of 32 × 48."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folder of a tiny model by family name, made once."""
    folders = {}

    def folder(name):
        if name not in folders:
            folders[name] = tiny_family(tmp_path_factory.mktemp(name) / "model", name)
        return folders[name]

    return folder


def tokens(windows, length, seed=0):
    return torch.randint(0, 256, (windows, length), generator=torch.Generator().manual_seed(seed))


def reference(folder, dtype=torch.float32):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, experts_implementation="eager").eval()


def ranges(folder, bounds, dtype=torch.float32, offload=False):
    return [DecoderRange(folder, start, stop, dtype, CPU, offload) for start, stop in bounds]


def logits(parts, ids):
    hidden = parts[0].embed(ids)
    for part in parts:
        for index in range(part.count):
            with part.open(index):
                hidden = part.run(index, hidden)
    return parts[-1].logits(hidden)


def count(folder):
    return AutoConfig.from_pretrained(folder).num_hidden_layers


@pytest.mark.parametrize("name", FAMILIES)
def test_blocks_one_by_one_are_the_model(saved, name):
    folder = saved(name)
    model, blocks = reference(folder), count(saved(name))
    ways = [
        ranges(folder, [(0, blocks)]),
        ranges(folder, [(0, 1), (1, blocks)]),
        ranges(folder, [(0, blocks - 1), (blocks - 1, blocks)], offload=True),
    ]
    with torch.inference_mode():
        for ids in (tokens(5, 20, 1), tokens(2, 12, 2), tokens(5, 20, 3)):
            expected = model(ids).logits
            assert expected.std() > 0.1
            for way in ways:
                torch.testing.assert_close(logits(way, ids), expected, rtol=1e-5, atol=1e-5)


def test_attention_is_capped_where_the_model_says_so(tmp_path):
    """transformers' own default leaves it out."""
    options = COMMON | {"num_hidden_layers": 2, "head_dim": 8, "attn_logit_softcapping": 0.05}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("gemma2", **options))
    for tensor in model.state_dict().values():
        tensor += torch.randn_like(tensor)
    model.save_pretrained(tmp_path)
    ids, kinds = tokens(2, 20), ("eager", "sdpa")
    with torch.inference_mode():
        right, wrong = (
            AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32, attn_implementation=kind)(ids).logits
            for kind in kinds
        )
        assert (right - wrong).abs().max() > 0.01, "or the test could not fail"
        torch.testing.assert_close(logits(ranges(tmp_path, [(0, 2)]), ids), right, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["gemma3_text", "opt", "mixtral", "gpt_oss"])
def test_half_precision_is_transformers_half_precision(saved, name, dtype):
    folder, ids = saved(name), tokens(2, 20)
    with torch.inference_mode():
        expected = reference(folder, dtype)(ids).logits
        got = logits(ranges(folder, [(0, 1), (1, count(folder))], dtype, offload=True), ids)
    assert got.dtype == expected.dtype
    torch.testing.assert_close(got, expected, rtol=0, atol=0)


def of_model(model, part, index, layer):
    """The weight [out, in] in transformers' model that a layer should be."""
    path = f"{part.block_prefix}.{part.start + index}.{layer.name}"
    if layer.expert is not None:
        path, _, expert = path.rpartition(".")
        weight = model.get_parameter(path)[int(expert)]
    else:
        weight = model.get_parameter(f"{path}.weight")
    in_out = model.config.model_type == "gpt2" or (layer.expert is not None and model.config.model_type == "gpt_oss")
    return weight.T if in_out else weight


@pytest.mark.parametrize("name", FAMILIES)
def test_layers_are_all_the_matrices_of_a_block_but_routers(saved, name):
    folder = saved(name)
    model = reference(folder)
    (part,) = ranges(folder, [(0, count(folder))])
    for index in range(part.count):
        block = model.get_submodule(f"{part.block_prefix}.{index}")
        matrices = {key: value for key, value in block.named_parameters() if value.ndim > 1 and "bias" not in key}
        assert index == 0 or ROUTERS.get(name, set()) <= matrices.keys()
        matrices = {key: value for key, value in matrices.items() if key not in ROUTERS.get(name, ())}
        expected = []
        for key, value in matrices.items():
            expected += [f"{key}.{e}" for e in range(4)] if value.ndim == 3 else [key.removesuffix(".weight")]
        with part.open(index) as layers:
            assert [layer.name for layer in layers] == expected
            assert [layer.module is None for layer in layers] == [layer.expert is not None for layer in layers]
            for layer in layers:
                assert torch.equal(layer.weight, of_model(model, part, index, layer))
                assert layer.of(layer.parameter.data).data_ptr() == layer.weight.data_ptr()
    assert any(layer.expert == 3 for layer in layers) == (name in ROUTERS)


def test_experts_in_a_form_that_is_not_known_are_refused():
    """DBRX keeps all experts of a kind in one matrix: pruning the rest, and its router, would go unnoticed."""
    config = AutoConfig.for_model("dbrx", d_model=32, n_heads=4, ffn_config={"moe_num_experts": 4})
    flat = nn.Module()
    flat.w1 = nn.Parameter(torch.randn(4 * 48, 32))
    block = nn.ModuleDict({"attention": nn.Linear(32, 32), "router": nn.Linear(32, 4), "mlp": flat})
    with pytest.raises(
        InputError, match=r"such as mlp.w1 \[192, 32\] \(.*of the block.*expected linear modules, or ex"
    ):
        block_layers(block, config, lambda *_: ())


@pytest.mark.parametrize("keys, transposed", [(("up", "down"), True), (("down",), False)])
def test_experts_alone_in_their_module_are_taken_as_linear_layers_are(keys, transposed):
    """Of several, the first reads hidden states, and says how they are kept; of one alone nothing can be told."""
    experts = nn.Module()
    for key in keys:
        setattr(experts, key, nn.Parameter(torch.randn(4, *((32, 48) if key == "up" else (48, 32)))))
    if not transposed:
        experts.down = nn.Parameter(torch.randn(4, 32, 48))
    config = AutoConfig.for_model("mixtral", num_local_experts=4, hidden_size=32)
    layers = block_layers(nn.ModuleDict({"experts": experts}), config, lambda *_: ())
    assert {layer.transposed for layer in layers} == {transposed} and len(layers) == 4 * len(keys)


def test_a_linear_router_and_a_list_of_experts():
    """As some families have them: each expert a module of its own, and a router that is a linear layer."""

    def linears(**shapes):
        return nn.ModuleDict({name: nn.Linear(*shape) for name, shape in shapes.items()})

    experts = nn.ModuleList([linears(up=(32, 8), down=(8, 32), small=(32, 4)) for _ in range(4)])
    mlp = nn.ModuleDict({"gate": linears(wg=(32, 4)), "experts": experts, "shared": linears(up=(32, 8), gate=(32, 1))})
    block = nn.ModuleDict({"attention": linears(q=(32, 32), k=(32, 4)), "norm": nn.LayerNorm(32), "mlp": mlp})
    layers = block_layers(block, AutoConfig.for_model("mixtral", num_local_experts=4), lambda *_: ())
    expected = ["attention.q", "attention.k"]
    expected += [f"mlp.experts.{expert}.{name}" for expert in range(4) for name in ("up", "down", "small")]
    assert [layer.name for layer in layers] == [*expected, "mlp.shared.up"]
    assert all(layer.module is block.get_submodule(layer.name) for layer in layers)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_an_expert_multiplies_what_is_routed_to_it_by_its_weight(saved, name):
    folder = saved(name)
    (part,) = ranges(folder, [(0, 2)])
    experts = reference(folder).model.layers[1].mlp.experts
    x = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    with part.open(1) as layers, torch.inference_mode():
        named = {layer.name: layer.weight for layer in layers}
        for expert in range(4):
            gate, up = (x @ named[f"{EXPERTS[0]}.{expert}"].T).chunk(2, dim=-1)
            by_hand = (nn.functional.silu(gate) * up) @ named[f"{EXPERTS[1]}.{expert}"].T
            chosen = torch.full((6, 1), expert)
            torch.testing.assert_close(by_hand, experts(x, chosen, torch.ones(6, 1)), rtol=1e-4, atol=1e-5)


class LinearCalls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.weights = set()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            self.weights.add(args[1].data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_every_expert_is_a_call_of_its_own(saved, name):
    (part,) = ranges(saved(name), [(0, 2)])
    with part.open(0) as layers, torch.inference_mode():
        hidden = part.embed(tokens(4, 32))
        with LinearCalls() as calls:
            part.run(0, hidden)
        assert {layer.weight.data_ptr() for layer in layers} <= calls.weights


@pytest.mark.parametrize("name", ["llama", "gpt2", "mixtral", "gpt_oss"])
@pytest.mark.parametrize("offload", [False, True])
def test_replaced_weights_are_used_and_taken_back(saved, name, offload):
    folder, ids = saved(name), tokens(2, 16)
    model = reference(folder)
    (part,) = ranges(folder, [(0, count(folder))], offload=offload)
    with torch.inference_mode():
        dense = logits([part], ids)
        with part.open(1) as layers:
            chosen = [layer for layer in layers if layer.expert in (None, 2)][1:]
            weights = {layer.name: layer.weight.double() * 0.5 for layer in chosen}
            for layer in chosen:
                of_model(model, part, 1, layer).data.mul_(0.5)
            before = {layer.name: layer.weight for layer in layers}
            copies = {key: weight.clone() for key, weight in before.items()}
            with replaced(layers, weights):
                pruned = logits([part], ids)
                for layer in layers:
                    assert torch.equal(layer.weight, copies[layer.name] * (0.5 if layer in chosen else 1))
                assert all(torch.equal(weight, copies[key]) for key, weight in before.items()), "storage written to"
            with pytest.raises(KeyError), replaced(layers, weights):
                raise KeyError
            for layer in layers:
                assert layer.weight.data_ptr() == before[layer.name].data_ptr()
                assert torch.equal(layer.weight, copies[layer.name])
            assert torch.equal(logits([part], ids), dense)
        torch.testing.assert_close(pruned, model(ids).logits, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pruned, dense, rtol=1e-2)


def test_replaced_refuses_an_unknown_name_and_another_shape(saved):
    (part,) = ranges(saved("llama"), [(0, 1)])
    with part.open(0) as layers:
        before = [layer.weight.data_ptr() for layer in layers]
        good = {"self_attn.q_proj": torch.zeros(32, 32)}
        for bad in ({"self_attn.x_proj": torch.zeros(32, 32)}, {"mlp.down_proj": torch.zeros(48, 32)}):
            with pytest.raises(ValueError, match=r"proj.*expected"), replaced(layers, good | bad):
                pass
        assert [layer.weight.data_ptr() for layer in layers] == before


def pruned_copy(folder, out, bounds):
    """Store random masks, and for every second layer new weights, as shards of a checkpoint; the expected weights."""
    model = reference(folder, torch.float32)
    shutil.copytree(folder, out, ignore=shutil.ignore_patterns("*.safetensors*"))
    generator = torch.Generator().manual_seed(5)
    weight_map, names = {}, []
    for number, part in enumerate(ranges(folder, bounds)):
        own = [part.outside_names(), *(part.block_names(index) for index in range(part.count))]
        names += [name for group in own for name in group]
        tensors = read_tensors(folder, set().union(*own))
        for index in range(part.count):
            with part.open(index) as layers:
                for order, layer in enumerate(layers):
                    mask = torch.rand(layer.weight.shape, generator=generator) > 0.5
                    updated = torch.randn(layer.weight.shape, generator=generator) if order % 2 else None
                    layer.store(tensors, mask, updated)
                    expected = of_model(model, part, index, layer).data
                    disk = next(iter(tensors.values())).dtype
                    expected.copy_(torch.where(mask, expected if updated is None else updated.to(disk), 0))
        save_file(tensors, out / f"{number}.safetensors", metadata={"format": "pt"})
        weight_map |= dict.fromkeys(tensors, f"{number}.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    assert sorted(names) == sorted(weight_files(folder)), "not every tensor is one shard's"
    return model.state_dict()


LAYOUTS = {  # of the checkpoint: options of save_pretrained
    "as on the hub": {},
    "experts together": {"save_original_format": False},
    "many files": {"max_shard_size": "50KB"},
}


@pytest.mark.parametrize(
    ("name", "layout"),
    [(name, "as on the hub") for name in FAMILIES]
    + [("mixtral", "experts together"), ("qwen3_moe", "experts together"), ("qwen2", "many files")],
)
def test_stored_layers_are_what_transformers_loads(tmp_path, name, layout):
    folder = tiny_family(tmp_path / "model", name, **LAYOUTS[layout])
    files = sorted(folder.glob("*.safetensors"))
    assert (len(files) > 1) == (layout == "many files")
    before = [hashlib.sha256(file.read_bytes()).digest() for file in files]
    expected = pruned_copy(folder, tmp_path / "pruned", [(0, 1), (1, count(folder))])
    found = reference(tmp_path / "pruned").state_dict()
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in found)
    assert [hashlib.sha256(file.read_bytes()).digest() for file in files] == before


def test_stored_values_keep_the_dtype_and_the_bits_on_disk(saved, tmp_path):
    folder = tmp_path / "half"
    reference(saved("mixtral"), torch.bfloat16).save_pretrained(folder)
    expected = pruned_copy(folder, tmp_path / "pruned", [(0, 2)])
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "pruned").state_dict()
    assert {tensor.dtype for tensor in found.values()} == {torch.bfloat16}
    zeros = torch.cat([tensor.flatten() for tensor in found.values()])
    assert not zeros[zeros == 0].signbit().any()
    assert all(torch.equal(found[key].float(), expected[key]) for key in found)


def loaded(part):
    tensors = [*part.model.parameters(), *(tensor for block in part.blocks for tensor in block.parameters())]
    return sum(size for _, size in {(t.data_ptr(), t.numel()) for t in tensors if not t.is_meta})


def test_a_range_loads_only_its_own_tensors(saved):
    folder = saved("llama")  # its embedding is tied
    block = 32 * 32 * 2 + 32 * 16 * 2 + 32 * 48 * 3 + 2 * 32
    embedding, norm = 256 * 32, 32
    sizes = [loaded(part) for part in ranges(folder, [(0, 1), (1, 3), (3, 4), (0, 4)])]
    assert sizes == [embedding + block + norm, 2 * block + norm, embedding + block + norm, embedding + 4 * block + norm]
    assert ranges(folder, [(3, 4)])[0].outside_names() == set()


def test_an_untied_head_is_the_last_range_s(saved):
    first, last = ranges(saved("qwen2"), [(0, 1), (1, 4)])
    assert last.outside_names() == {"lm_head.weight"}
    assert first.outside_names() == {"model.embed_tokens.weight", "model.norm.weight"}
    assert last.model.get_input_embeddings().weight.is_meta and first.model.lm_head.weight.is_meta


def test_offload_holds_one_block_at_a_time(saved):
    folder = saved("mixtral")
    (part,) = ranges(folder, [(0, 2)], offload=True)
    ends = loaded(part)
    assert ends == 32  # the last norm
    hidden = part.embed(tokens(2, 8))
    assert loaded(part) == ends
    with part.open(0) as layers:
        one = loaded(part)
        with part.open(0) as again:
            assert again is layers and loaded(part) == one
            moved = part.run(0, hidden)
        assert torch.equal(part.run(0, hidden), moved)
    with part.head(), part.head():
        part.logits(moved)
        assert loaded(part) == ends + 256 * 32
    assert loaded(part) == ends
    with pytest.raises(RuntimeError, match="block 0 is run without being open"):
        part.run(0, hidden)


def test_gradients_flow_also_after_a_pass_in_inference_mode(saved):
    folder, ids = saved("llama"), tokens(2, 16)
    model = reference(folder).requires_grad_(True)
    (part,) = ranges(folder, [(0, 4)])
    hidden = part.embed(ids)
    with torch.inference_mode():
        logits([part], ids)
    with part.open(0) as layers, part.open(1), part.open(2), part.open(3):
        layers[0].parameter.requires_grad_(True)
        for index in range(4):
            hidden = part.run(index, hidden)
        (gradient,) = torch.autograd.grad(part.logits(hidden).square().mean(), layers[0].parameter)
    model(ids).logits.square().mean().backward()
    torch.testing.assert_close(gradient, model.model.layers[0].self_attn.q_proj.weight.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("count, taken", [(3, [0, 1, 2]), (5, [0, 1, 3])])
def test_what_weights_mean_to_the_loss_is_known_on_every_shard(saved, monkeypatch, count, taken):
    """taylor_mean against transformers' own gradients, window by window; of two shards, a chain of both. Of many
    windows some are taken, from all over the text."""
    monkeypatch.setattr("autoprune.models.shard.GRADIENT_WINDOWS", 3)
    folder, ids = saved("llama"), tokens(count, 16)
    model = reference(folder).requires_grad_(True)
    squares = {}
    for window in ids[taken].split(1):
        model.zero_grad()
        model(window, labels=window).loss.backward()
        for name, weight in model.named_parameters():
            squares[name] = squares.get(name, 0) + weight.grad**2 / 3
    shards = [ModelShard(folder, start, stop, "float32", "cpu") for start, stop in ((0, 1), (1, 4))]
    states = ids
    for shard in shards:
        states = shard.calibrate(states, {"x_norm", "g_rms"})
    upstream = ids
    for shard in reversed(shards):
        upstream = shard.backward(upstream)
    profiles = [profile for shard in shards for profile in shard.profiles]
    for block, profile in enumerate(profiles):
        with (shards[0] if block < 1 else shards[1]).model.open(block if block < 1 else block - 1) as layers:
            names = [f"model.layers.{block}.{layer.name}.weight" for layer in layers]
            gradients = (shards[0] if block < 1 else shards[1]).gradients.get(block if block < 1 else block - 1)
            for layer, name in zip(layers, names, strict=True):
                own = squares[name].sqrt()
                torch.testing.assert_close(gradients[layer.name], own / own.mean(), rtol=1e-3, atol=1e-4)
        weights = dict(model.named_parameters())
        expected = [(weights[name].abs() * squares[name].sqrt()).mean().item() for name in names]
        assert [layer.taylor_mean for layer in profile.layers] == pytest.approx(expected, rel=1e-3)
        numels = [layer.numel for layer in profile.layers]
        whole = sum(n * e for n, e in zip(numels, expected, strict=True)) / sum(numels)
        assert profile.taylor_mean == pytest.approx(whole, rel=1e-3)


def test_gradients_do_not_underflow_in_16_bits(saved, tmp_path):
    """Of a mean over 128 tokens the small ones would: float16 ends at 6e-8, and has all its digits from 6e-5 on."""
    model = reference(saved("llama"))
    with torch.no_grad():
        model.model.norm.weight.mul_(1e-3)
    model.save_pretrained(tmp_path)
    ids, found = tokens(2, 128), {}
    for dtype in ("float32", "float16"):
        shard = ModelShard(tmp_path, 0, 4, dtype, "cpu")
        shard.calibrate(ids, {"x_norm", "g_rms"})
        shard.backward(ids)
        found[dtype] = shard
    for index in range(4):
        precise, half = (found[dtype].gradients.get(index) for dtype in ("float32", "float16"))
        for name in precise:
            errors = (half[name] / precise[name] - 1).abs()
            assert errors.median() < 0.015, name
    means = [[profile.taylor_mean for profile in shard.profiles] for shard in found.values()]
    assert means[0] == pytest.approx(means[1], rel=0.02)


def test_an_expert_without_a_gradient_is_like_the_others_of_its_block(saved):
    ids = torch.tensor([[5, 5]])  # the same states twice, so two experts of four
    shard = ModelShard(saved("mixtral"), 0, 2, "float32", "cpu")
    shard.calibrate(ids, {"x_norm", "g_rms"})
    shard.backward(ids)
    for index, profile in enumerate(shard.profiles):
        means = [layer.taylor_mean for layer in profile.layers]
        with shard.model.open(index) as layers:
            gradients = shard.gradients.get(index)
            reached = [gradients[layer.name].std() > 0 for layer in layers]
            assert all(gradients[layer.name].mean() == pytest.approx(1) for layer in layers), "over their mean"
        known = [mean for mean, there in zip(means, reached, strict=True) if there]
        assert 0 < len(known) < len(means) and min(known) > 0
        blank = [mean for mean, there in zip(means, reached, strict=True) if not there]
        assert blank == pytest.approx([sum(known) / len(known)] * len(blank))


def rename(folder, out, change):
    shutil.copytree(folder, out)
    tensors = {change(name): tensor for name, tensor in load_file(out / "model.safetensors").items()}
    tensors.pop(None, None)
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    return out


def test_names_without_the_base_prefix_are_understood(saved, tmp_path):
    folder, ids = saved("llama"), tokens(2, 16)
    bare = rename(folder, tmp_path / "bare", lambda name: name.removeprefix("model."))
    with torch.inference_mode():
        expected = logits(ranges(folder, [(0, 4)]), ids)
        assert torch.equal(logits(ranges(bare, [(0, 2), (2, 4)]), ids), expected)
    assert ranges(bare, [(2, 3)])[0].block_names(0) == {n for n in weight_files(bare) if n.startswith("layers.2.")}


def test_what_a_checkpoint_lacks_is_named(saved, tmp_path):
    def drop(*names):
        return lambda name: None if name.endswith(names) else name

    folder = rename(saved("qwen3"), tmp_path / "a", drop("2.mlp.up_proj.weight", "3.mlp.up_proj.weight"))
    ranges(folder, [(0, 2)])
    with pytest.raises(InputError, match=r"lacks model\.layers\.2\.mlp\.up_proj\.weight and 1 more"):
        ranges(folder, [(2, 4)], offload=True)
    folder = rename(saved("mixtral"), tmp_path / "b", drop("layers.1.block_sparse_moe.experts.2.w3.weight"))
    with pytest.raises(InputError, match=r"lacks model\.layers\.1\.mlp\.experts\.gate_up_proj: .*incomplete"):
        ranges(folder, [(1, 2)])


def test_a_damaged_file_and_another_shape_are_one_line(saved, tmp_path):
    folder = shutil.copytree(saved("qwen2"), tmp_path / "cut")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(InputError, match="cannot be read"):
        ranges(folder, [(0, 1)])
    shutil.copyfile(saved("qwen2") / "model.safetensors", file)
    config = json.loads((folder / "config.json").read_text()) | {"intermediate_size": 40}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        InputError, match=r"layers\.0\.mlp\.down_proj\.weight has the shape \[32, 48\]: expected \[32, 40\]"
    ):
        ranges(folder, [(0, 4)])


def test_architectures_that_cannot_be_run_block_by_block_are_refused(saved, tmp_path):
    lists = r"one list of num_hidden_layers = 2 blocks that hold linear layers; found transformer\.attentions of 2, "
    with pytest.raises(InputError, match=f"thing is of the family 'xlm': expected a decoder with {lists}"):
        check_family(AutoConfig.for_model("xlm", emb_dim=32, n_layers=2, n_heads=4, vocab_size=256), "thing")
    with pytest.raises(InputError, match="'vit': expected a causal language model"):
        check_family(AutoConfig.for_model("vit"), "thing")
    config = AutoConfig.from_pretrained(saved("llama"))
    config.quantization_config = {"quant_method": "fp8"}
    with pytest.raises(InputError, match="quantised"):
        check_family(config, "thing")


def test_blocks_that_are_given_more_than_hidden_states_are_refused(saved, tmp_path, monkeypatch):
    rotary = type(reference(saved("llama")).model.rotary_emb)
    monkeypatch.setattr(rotary, "forward", lambda self, x, position_ids: (x, x))
    with pytest.raises(InputError, match=r"read nothing but .*given more than masks and positions"):
        ranges(saved("llama"), [(1, 3)])
    options = {"vocab_size": 64, "vocab_size_per_layer_input": 64, "hidden_size": 16, "hidden_size_per_layer_input": 8}
    options |= {"intermediate_size": 16, "num_hidden_layers": 2, "num_kv_shared_layers": 0, "laurel_rank": 4}
    options |= {"layer_types": ["full_attention"] * 2, "activation_sparsity_pattern": [0.0] * 2, "head_dim": 4}
    config = AutoConfig.for_model("gemma3n_text", num_attention_heads=2, num_key_value_heads=2, **options)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    with pytest.raises(InputError, match="'gemma3n_text': expected blocks that read nothing but"):
        ranges(tmp_path / "model", [(0, 2)])
