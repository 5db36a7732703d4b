"""`prune` on every family against an oracle: transformers' own model, inputs noted by hand, masks by plain loops."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from families import FAMILIES, tiny_family
from safetensors import SafetensorError, safe_open
from tiny import save_byte_tokenizer, save_tiny_model
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.updates import DAMPING
from autoprune.kernels.distance import digest
from autoprune.kernels.masks import pack
from autoprune.models import calibration, masking, shelf
from autoprune.models.blocks import DecoderRange
from autoprune.models.corpora import load_corpus, token_windows
from autoprune.models.errors import InputError
from autoprune.models.export import SIDECAR, whole_folder
from autoprune.models.loading import load_tokenizer
from autoprune.models.pruning import evaluate, prune
from autoprune.pipeline.population import baseline

WANDA = Algorithm("def score(W, x_norm):\n    return W.abs() * x_norm\n", "row")
CONTEXT, WINDOWS = 24, 8
PROSE = "The quick brown fox jumps over the lazy dog; 0123456789. Sphinx of black quartz, judge my vow! "


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    """Threads cost more than they bring on matrices of 32 × 48."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    file = tmp_path_factory.mktemp("text") / "prose.txt"
    file.write_text(PROSE * 8)
    return str(file)


def windows(folder, text):
    return token_windows(load_corpus(text), load_tokenizer(folder), CONTEXT, WINDOWS)


class Inputs:
    """Sum of squares and number of inputs of every linear layer and expert, by the name of its weight."""

    def __init__(self, model, prefix):
        self.squares, self.counts, self.weights = {}, {}, {}
        self.in_out = model.config.model_type == "gpt_oss"  # how experts are kept
        for name, module in model.named_modules():
            if not name.startswith(prefix + "."):
                continue
            parameters = dict(module.named_parameters(recurse=False))
            fused = sorted(key for key, tensor in parameters.items() if tensor.ndim == 3)
            if fused:
                assert fused == ["down_proj", "gate_up_proj"]
                for expert in range(len(module.down_proj)):
                    for key in fused:
                        weight = parameters[key].data[expert]
                        self.weights[f"{name}.{key}.{expert}"] = weight.T if self.in_out else weight
                module.register_forward_pre_hook(lambda m, inputs, n=name: self.routed(n, m, *inputs))
            elif name.endswith("gate"):
                pass  # weighs experts: never pruned
            elif isinstance(module, torch.nn.Linear):
                self.weights[name] = module.weight.data
                module.register_forward_pre_hook(lambda _, inputs, n=name: self.note(n, inputs[0]))
            elif isinstance(module, Conv1D):
                self.weights[name] = module.weight.data.T
                module.register_forward_pre_hook(lambda _, inputs, n=name: self.note(n, inputs[0]))

    def note(self, name, x):
        rows = x.reshape(-1, x.shape[-1]).double()
        self.squares[name] = self.squares.get(name, 0) + (rows**2).sum(0)
        self.counts[name] = self.counts.get(name, 0) + len(rows)

    def routed(self, name, experts, hidden, index, _weights):
        for expert in range(len(experts.down_proj)):
            x = hidden.reshape(-1, hidden.shape[-1])[(index == expert).any(-1)]
            if len(x):
                self.note(f"{name}.gate_up_proj.{expert}", x)
                if self.in_out:
                    joined = x @ experts.gate_up_proj[expert] + experts.gate_up_proj_bias[expert]
                    gate, up = joined[:, ::2].clamp(max=experts.limit), joined[:, 1::2]
                    between = gate * torch.sigmoid(gate * experts.alpha) * (up.clamp(-experts.limit, experts.limit) + 1)
                else:
                    gate, up = (x @ experts.gate_up_proj[expert].T).chunk(2, -1)
                    between = experts.act_fn(gate) * up
                self.note(f"{name}.down_proj.{expert}", between)

    def norm(self, name):
        return (self.squares[name] / self.counts[name]).sqrt().float()


def loop_mask(weight, norm, sparsity):
    """Kept weights, row by row: floor(sparsity × in) lowest |w|·‖x‖ go, of equal ones the one further left first."""
    scores = (weight.float().abs() * norm).tolist()
    mask = torch.ones(weight.shape, dtype=torch.bool)
    for i, row in enumerate(scores):
        for j in sorted(range(len(row)), key=row.__getitem__)[: math.floor(sparsity * len(row))]:
            mask[i, j] = False
    return mask


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("offload", [False, True])
def test_masks_of_a_family_equal_plain_loops(tmp_path, text, family, offload):
    folder = tiny_family(tmp_path / "model", family)
    save_byte_tokenizer(folder)
    dense = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, experts_implementation="eager").eval()
    prefix = DecoderRange(folder, 0, dense.config.num_hidden_layers, torch.float32, torch.device("cpu")).block_prefix
    inputs = Inputs(dense, prefix)
    with torch.inference_mode():
        dense(windows(folder, text))
    out = tmp_path / "pruned"
    sidecar = prune(str(folder), WANDA, 0.5, text, out, context=CONTEXT, windows=WINDOWS, device="cpu", offload=offload)
    assert set(sidecar["layers"]) == set(inputs.weights)
    pruned = Inputs(AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32), prefix).weights
    for name, weight in inputs.weights.items():
        few = inputs.counts.get(name, 0) < 16 and ".experts." in name
        assert ("fallback" in sidecar["layers"][name]) == few
        mask = loop_mask(weight, torch.ones(weight.shape[1]) if few else inputs.norm(name), 0.5)
        assert torch.equal(pruned[name], weight * mask), name
        assert sidecar["layers"][name]["mask"] == f"{digest(pack(mask)):016x}"
    kept = {name: value for name, value in dense.state_dict().items() if not changes(name, inputs.weights)}
    after = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).state_dict()
    assert all(torch.equal(after[name], value) for name, value in kept.items()), "something else was changed"


def changes(name, weights):
    return name.removesuffix(".weight") in weights or f"{name}.0" in weights


def test_a_weight_that_is_nan_is_named(tmp_path, text):
    folder = tiny_family(tmp_path / "model", "llama")
    save_byte_tokenizer(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    model.model.layers[1].mlp.up_proj.weight.data[3, 5] = math.nan
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="block 1, mlp.up_proj: a weight is NaN: the model is damaged"):
        prune(str(folder), WANDA, 0.5, text, tmp_path / "out", context=CONTEXT, windows=WINDOWS, device="cpu")
    assert not (tmp_path / "out").exists()


def test_experts_that_are_never_seen_are_refused(tmp_path, text, monkeypatch):
    """A family whose experts are applied in some other way must not be pruned by magnitude without a word."""
    folder = tiny_family(tmp_path / "model", "gpt_oss")
    save_byte_tokenizer(folder)
    monkeypatch.setattr(calibration, "PRODUCTS", (torch.nn.functional.linear,))
    with pytest.raises(InputError, match="block 0, mlp.experts.*no expert was seen"):
        prune(str(folder), WANDA, 0.5, text, tmp_path / "out", context=CONTEXT, windows=WINDOWS, device="cpu")


def test_an_expert_that_saw_few_tokens_falls_back_to_magnitude_and_says_so(tmp_path, text):
    folder = tiny_family(tmp_path / "model", "mixtral")
    save_byte_tokenizer(folder)
    sidecar = prune(str(folder), WANDA, 0.5, text, tmp_path / "out", context=8, windows=1, device="cpu")
    fallbacks = [name for name, layer in sidecar["layers"].items() if layer.get("fallback") == "magnitude"]
    assert fallbacks and all(".experts." in name for name in fallbacks)


def zeros(folder):
    """Pruned weights of every tensor on disk, by name."""
    with safe_open(folder / "model.safetensors", "pt") as file:
        return {name: file.get_tensor(name) == 0 for name in file.keys()}  # noqa: SIM118


@pytest.mark.parametrize(
    "algorithm",
    [
        WANDA,
        replace(WANDA, group="matrix", allocation=Allocation("sdsa", per="layer")),
        replace(WANDA, group="2:4", allocation=Allocation("sdsa", {"tau": 0.2, "m": 0.9})),
        replace(WANDA, update="sparsegpt"),
        Algorithm("sparsegpt", "row", update="cg"),
        Algorithm("def score(W, h_inv_diag):\n    return W.square() / h_inv_diag\n"),
        Algorithm("def score(W, g_rms, x_kurtosis):\n    return W.abs() * g_rms + x_kurtosis * 1e-9\n"),
        replace(WANDA, allocation=Allocation("sdsa", {"taylor": 0.5})),
        replace(WANDA, group="2:4", allocation=Allocation("sdsa", {"taylor": 1.0})),
    ],
    ids=["wanda", "matrix-per-layer", "2:4", "obs", "sparsegpt-cg", "h_inv_diag", "g_rms", "taylor", "taylor-2:4"],
)
@pytest.mark.parametrize("sequential", [False, True])
def test_offloading_changes_nothing(tmp_path, tiny_model, text, algorithm, sequential):
    options = {"context": CONTEXT, "windows": WINDOWS, "device": "cpu", "sequential": sequential}
    resident = prune(str(tiny_model), algorithm, 0.5, text, tmp_path / "resident", **options)
    offloaded = prune(str(tiny_model), algorithm, 0.5, text, tmp_path / "offloaded", offload=True, **options)
    assert resident["sha256"] == offloaded["sha256"] and resident["layers"] == offloaded["layers"]
    assert resident["sparsity"]["achieved"] == pytest.approx(0.5, abs=0.03)
    assert json.loads((tmp_path / "resident" / SIDECAR).read_text()) == json.loads(json.dumps(resident))


def test_sequential_statistics_are_those_of_the_pruned_blocks_before(tmp_path, text):
    """Block 0 as with dense statistics; block 1's masks follow from inputs made by the pruned block 0."""
    folder = save_tiny_model(tmp_path / "model")
    out = tmp_path / "pruned"
    prune(str(folder), WANDA, 0.5, text, out, context=CONTEXT, windows=WINDOWS, device="cpu", sequential=True)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    pruned = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32).eval()
    for block in range(4):
        inputs = Inputs(model, f"model.layers.{block}")
        with torch.inference_mode():
            model(windows(folder, text))
        for name, weight in inputs.weights.items():
            mask = loop_mask(weight, inputs.norm(name), 0.5)
            assert torch.equal(pruned.get_submodule(name).weight.data, weight * mask), name
        model.model.layers[block].load_state_dict(pruned.model.layers[block].state_dict())
        for module in model.modules():
            module._forward_pre_hooks.clear()


def test_two_of_four_survive_in_every_group_and_the_budget_is_met(tmp_path, tiny_model, text):
    algorithm = replace(WANDA, group="2:4")
    sidecar = prune(str(tiny_model), algorithm, 0.5, text, tmp_path / "out", context=CONTEXT, device="cpu")
    assert sidecar["sparsity"]["achieved"] == 0.5
    for name, zero in zeros(tmp_path / "out").items():
        if "_proj" in name:
            assert (zero.reshape(-1, 4).sum(1) == 2).all(), name


def test_rectangles_go_as_a_whole(tmp_path, tiny_model, text):
    algorithm = replace(WANDA, group="8x4")
    sidecar = prune(str(tiny_model), algorithm, 0.5, text, tmp_path / "out", context=CONTEXT, device="cpu")
    assert sidecar["sparsity"]["achieved"] == 0.5
    for name, zero in zeros(tmp_path / "out").items():
        if "_proj" in name:
            tiles = zero.reshape(zero.shape[0] // 8, 8, zero.shape[1] // 4, 4).sum((1, 3))
            assert set(tiles.unique().tolist()) == {0, 32}, name


@pytest.mark.parametrize(
    ("algorithm", "sparsity", "message"),
    [
        (replace(WANDA, group="2:4"), 0.6, "2:4 means 0.5"),
        (replace(WANDA, group="3:7"), 4 / 7, "q_proj: .*groups of 7"),
        (replace(WANDA, group="5x5"), 0.5, "q_proj: .*5x5"),
        (replace(WANDA, group="hexagon"), 0.5, "unknown comparison group"),
        (replace(WANDA, update="magic"), 0.5, "unknown weight update"),
        (Algorithm("sparsegpt", "4x4"), 0.5, "cannot prune rectangles"),
        (replace(WANDA, allocation=Allocation("explicit", values=(0.5,) * 3)), 0.5, "4"),
    ],
)
def test_what_cannot_be_done_is_one_line_and_leaves_nothing(tmp_path, tiny_model, text, algorithm, sparsity, message):
    with pytest.raises(InputError, match=message) as error:
        prune(str(tiny_model), algorithm, sparsity, text, tmp_path / "out", context=CONTEXT, device="cpu")
    assert "\n" not in str(error.value) and list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_filled_wherever_it_lies(tmp_path, tiny_model, text, monkeypatch):
    """A disk of its own cannot be replaced by a folder, nor can a link, nor the folder that the user is in."""
    there = tmp_path / "elsewhere" / "there"
    there.mkdir(parents=True)
    (tmp_path / "link").symlink_to(there)
    inode = there.stat().st_ino
    monkeypatch.chdir(there)
    for out in (Path("."), tmp_path / "link"):
        sidecar = prune(str(tiny_model), WANDA, 0.5, text, out, context=CONTEXT, windows=WINDOWS, device="cpu")
        stored = json.loads((there / "autoprune.json").read_text())
        assert stored["layers"] == sidecar["layers"] and there.stat().st_ino == inode
        assert not [file for file in there.iterdir() if file.name.startswith(".")]
        assert AutoModelForCausalLM.from_pretrained(there)
        for file in there.iterdir():
            file.unlink()
    with pytest.raises(InputError, match="nothing was left behind"), whole_folder(there) as folder:
        (folder / "half").write_text("x")
        raise OSError("disk full")
    assert there.is_dir() and not any(there.iterdir())


def test_overflow_in_fp16_is_said(tmp_path, text):
    folder = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers[1].mlp.up_proj.weight.data *= 1e6
    model.save_pretrained(folder)
    with pytest.raises(InputError, match=r"block 1, mlp.down_proj.*float16 overflows.*bfloat16"):
        prune(str(folder), WANDA, 0.5, text, tmp_path / "out", context=CONTEXT, dtype="float16", device="cpu")


def test_evaluate_with_a_reference(tmp_path, tiny_model, text):
    prune(str(tiny_model), WANDA, 0.5, text, tmp_path / "out", context=CONTEXT, device="cpu")
    options = {"context": CONTEXT, "windows": 4, "device": "cpu"}
    result = evaluate(str(tmp_path / "out"), text, reference=str(tiny_model), **options)
    ids = token_windows(load_corpus(text), load_tokenizer(tiny_model), CONTEXT, 4)
    with torch.inference_mode():
        logs = [
            AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits[:, :-1].log_softmax(-1)
            for folder in (tiny_model, tmp_path / "out")
        ]
    expected = (logs[0].exp() * (logs[0] - logs[1])).sum(-1).mean()
    assert result.kl == pytest.approx(float(expected), rel=1e-4) and result.kl > 0
    dense, own = (-log.gather(-1, ids[:, 1:, None]).mean((1, 2)) for log in logs)
    assert result.window_nlls == pytest.approx(own.tolist(), rel=1e-4) and len(own) == 4
    assert result.difference == pytest.approx((own - dense).mean().item(), abs=1e-5)
    assert result.difference_standard_error == pytest.approx((own - dense).std().item() / 2, rel=1e-3)
    offloaded = evaluate(str(tmp_path / "out"), text, reference=str(tiny_model), offload=True, **options)
    assert offloaded == result
    same = evaluate(str(tiny_model), text, reference=str(tiny_model), **options)
    assert same.kl == pytest.approx(0, abs=1e-7)
    dense = evaluate(str(tiny_model), text, **options)
    assert result.reference_perplexity == dense.perplexity != result.perplexity


@pytest.mark.parametrize("score", ["obs-diag", "sparsegpt", "wanda/cg", "wanda"])
def test_more_damping_than_usual_is_said(tmp_path, tiny_model, text, monkeypatch, score):
    """Whatever reads the Hessian says so; what does not has nothing to say."""
    monkeypatch.setattr(masking, "DAMPING", 0.0)  # what is usual
    layers = prune(str(tiny_model), baseline(score), 0.5, text, tmp_path / "out", CONTEXT, device="cpu")["layers"]
    said = [layer["damping"] for layer in layers.values() if "damping" in layer]
    assert len(said) == (0 if score == "wanda" else len(layers)) and set(said) <= {DAMPING}


def test_gradients_on_disk_are_those_in_memory(tmp_path, tiny_model, text):
    files = []
    for offload in (False, True):
        out = tmp_path / str(offload)
        sidecar = prune(
            str(tiny_model), baseline("pruner-zero"), 0.5, text, out, CONTEXT, device="cpu", offload=offload
        )
        assert sidecar["calibration"]["gradient_windows"] == min(16, sidecar["calibration"]["windows"])
        files.append((out / "model.safetensors").read_bytes())
    assert files[0] == files[1]


def test_dead_inputs_and_a_singular_hessian_are_handled_and_said(tmp_path, text):
    """Features that are zero for every token, and fewer tokens than features; masks and weights stay finite."""
    folder = save_tiny_model(tmp_path / "model")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.model.layers[2].mlp.gate_proj.weight.data[:5] = 0  # silu(0)·up = 0: five dead inputs of down_proj
    model.save_pretrained(folder)
    for update in ("none", "cg"):
        out = tmp_path / update
        algorithm = Algorithm("sparsegpt", update=update)
        sidecar = prune(str(folder), algorithm, 0.5, text, out, context=8, windows=1, device="cpu")
        said = {name: layer["dead_inputs"] for name, layer in sidecar["layers"].items() if "dead_inputs" in layer}
        assert said == {"model.layers.2.mlp.down_proj": 5}
        with safe_open(out / "model.safetensors", "pt") as file:
            weight = file.get_tensor("model.layers.2.mlp.down_proj.weight")
        assert weight.isfinite().all() and (weight[:, :5] == 0).all()


def test_reference_with_another_padding_of_the_vocabulary(tmp_path, tiny_model, text):
    """Rows that no token stands for change no divergence, and are no error."""
    padded = tmp_path / "padded"
    shutil.copytree(tiny_model, padded)
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.resize_token_embeddings(model.config.vocab_size + 8, mean_resizing=False)
    model.save_pretrained(padded)
    options = {"context": CONTEXT, "windows": 2, "device": "cpu"}
    for model, reference in ((padded, tiny_model), (tiny_model, padded)):
        assert evaluate(str(model), text, reference=str(reference), **options).kl == pytest.approx(0, abs=1e-6)


def test_evaluate_says_that_it_overflowed(tmp_path, tiny_model, text):
    folder = tmp_path / "model"
    shutil.copytree(tiny_model, folder)
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    model.model.layers[0].mlp.down_proj.weight.data *= 1e8
    model.save_pretrained(folder)
    with pytest.raises(InputError, match="float16 overflows on .*model"):
        evaluate(str(folder), text, CONTEXT, dtype="float16", device="cpu")
    with pytest.raises(InputError, match="float16 overflows on .*model"):
        evaluate(str(tiny_model), text, CONTEXT, dtype="float16", device="cpu", reference=str(folder))


def test_a_cache_is_needed_only_where_something_is_kept_there(tmp_path, tiny_model, text, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("AUTOPRUNE_CACHE", str(tmp_path / "file" / "cache"))
    assert evaluate(str(tiny_model), text, CONTEXT, device="cpu", offload=True).windows
    with pytest.raises(InputError, match="cannot keep gradients in .*AUTOPRUNE_CACHE"):
        prune(
            str(tiny_model), baseline("pruner-zero"), 0.5, text, tmp_path / "out", CONTEXT, device="cpu", offload=True
        )


def test_a_pattern_that_divides_no_layer_is_refused_before_calibration(tmp_path, tiny_model, text):
    said = []
    algorithm = Algorithm(WANDA.score, "3:7")
    with pytest.raises(InputError, match=r"\[\d+, \d+\] cannot be cut into groups of 7 along a row"):
        prune(str(tiny_model), algorithm, 4 / 7, text, tmp_path / "out", CONTEXT, device="cpu", progress=said.append)
    assert not any("calibrating" in line for line in said)


def test_gradients_without_room_on_disk_are_one_line(tmp_path, tiny_model, text, monkeypatch):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(shelf, "save_file", full)
    with pytest.raises(InputError, match="cannot keep gradients in .*No space left"):
        prune(str(tiny_model), baseline("pruner-zero"), 0.5, text, tmp_path / "out", CONTEXT, offload=True)
    assert not (tmp_path / "out").exists()
