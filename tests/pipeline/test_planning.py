"""What a plan says of memory is what loading takes; what it says of shipped configurations stands in them."""

import json
import re
import shlex
from dataclasses import replace
from itertools import combinations, pairwise
from pathlib import Path

import pytest
import torch
from tiny import save_tiny_model
from transformers import AutoModelForCausalLM

from autoprune.models.blocks import DecoderRange
from autoprune.models.footprint import (
    ARCHITECTURES,
    LOGIT,
    Workload,
    footprint,
    known_config,
    model_sizes,
    shard_bounds,
)
from autoprune.pipeline.cli import main
from autoprune.pipeline.config import load_config
from autoprune.pipeline.planning import plan, plan_lines

CONFIGS = Path(__file__).parents[2] / "configs"
LARGE = ["llama-2-7b", "llama-3.1-8b", "qwen2.5-7b", "mixtral-8x7b"]
LOAD = Workload(32, (8, 4), frozenset({"x_norm"}))


def loaded_bytes(shard: DecoderRange) -> int:
    """Of what really lies in memory, a tensor that two names share once."""
    tensors = [t for t in shard.model.state_dict().values() if not t.is_meta]
    tensors += [t for block in shard.blocks for t in block.state_dict().values() if not t.is_meta]
    return sum({t.data_ptr(): t.numel() * t.element_size() for t in tensors}.values())


@pytest.mark.parametrize("tie", [True, False])
@pytest.mark.parametrize("bounds", [[(0, 4)], [(0, 2), (2, 4)], [(0, 1), (1, 3), (3, 4)]])
def test_the_weights_of_a_shard_are_what_loading_it_takes(tmp_path, bounds, tie):
    folder = save_tiny_model(tmp_path / "tiny", tie=tie)
    sizes = model_sizes(known_config(str(folder)), "tiny", "float32")
    for start, stop in bounds:
        shard = DecoderRange(folder, start, stop, torch.float32, torch.device("cpu"))
        assert footprint(sizes, start, stop, LOAD).weights == pytest.approx(loaded_bytes(shard), rel=0.01)


@pytest.mark.parametrize("shards", [1, 2, 3, 5, 8])
@pytest.mark.parametrize("costs", [(1,) * 8, (1,) * 7 + (9,), (9,) + (1,) * 7, (3, 1, 4, 1, 5, 9, 2, 6)])
def test_no_other_way_to_share_blocks_has_a_cheaper_dearest_shard(costs, shards):
    def dearest(bounds):
        return max(sum(costs[start:stop]) for start, stop in bounds)

    bounds = shard_bounds(costs, shards)
    assert [block for start, stop in bounds for block in range(start, stop)] == list(range(8))
    assert all(start < stop for start, stop in bounds) and len(bounds) == shards
    others = [pairwise((0, *cuts, 8)) for cuts in combinations(range(1, 8), shards - 1)]
    assert dearest(bounds) == min(map(dearest, others))
    if len(set(costs)) == 1:
        sizes = [stop - start for start, stop in bounds]
        assert max(sizes) - min(sizes) <= 1


def test_the_head_counts_as_work_of_the_last_shard(tmp_path):
    """Its own blocks are fewer, so that a pipeline does not wait for it."""
    folder = save_tiny_model(tmp_path / "tiny")
    sizes = model_sizes(known_config(str(folder)), "tiny", "float32")
    logits = LOGIT * sizes.vocabulary * sizes.element
    assert (
        sizes.costs[:-1] == list(sizes.blocks[:-1])
        and sizes.costs[-1] - logits == sizes.blocks[-1] + sizes.head > sizes.head
    )
    heavy = replace(sizes, head=2 * sizes.blocks[0])
    assert shard_bounds(heavy.costs, 2) == ((0, 3), (3, 4))


def test_shards_of_a_small_model_take_as_long_as_one_another():
    """Measured on a CPU: the head and its likelihoods take as long as 12 to 13 of these 30 blocks."""
    name = "smollm2-135m-instruct"
    assert shard_bounds(model_sizes(known_config(name), name, "float32").costs, 2) == ((0, 21), (21, 30))


@pytest.mark.parametrize("name", LARGE)
def test_a_shipped_plan_agrees_with_the_whole_model(name):
    """Of the model on the meta device, made by transformers alone."""
    config = load_config(CONFIGS / f"{name}.yaml")
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(known_config(config.target.model), dtype=torch.bfloat16)
    wanted = sum(p.numel() * p.element_size() for p in whole.parameters())
    sizes = model_sizes(known_config(config.target.model), name, "bfloat16")
    pairs = shard_bounds(sizes.costs, config.evaluators.shards)
    assert sum(footprint(sizes, *pair, LOAD).weights for pair in pairs) == pytest.approx(wanted, rel=0.2)
    assert sizes.parameters == pytest.approx(wanted / 2, rel=0.001)


@pytest.mark.parametrize("name", LARGE)
def test_a_shipped_configuration_is_for_other_sparsities_too(name):
    path = CONFIGS / f"{name}.yaml"
    line = re.search(r"^# Other sparsities: (.*?)\n# What", path.read_text(), re.DOTALL | re.MULTILINE)[1]
    half, more, pattern = re.fullmatch(r"(.*), or (.*); .*?(--set .*)", line.replace("\\\n#", "")).groups()
    given = [shlex.split(half)[1::2], [f"target.sparsity={more}"], shlex.split(pattern)[1::2]]
    goals = []
    for sets in given:
        config = load_config(path, sets)
        goals.append(config.target.goal)
        assert plan(config, 80.0).problems == []
    assert goals == ["50%", "70%", "2:4"]


@pytest.mark.parametrize("name", LARGE)
def test_what_a_shipped_configuration_says_of_itself_is_what_plan_says(name):
    path = CONFIGS / f"{name}.yaml"
    text = path.read_text()
    variants = re.findall(r"^# (\d+) GPUs?:((?:.*\\\n)*.*)\n((?:#     .*\n)+)", text, re.MULTILINE)
    assert len(variants) >= 2
    for gpus, words, said in variants:
        given = shlex.split(re.sub(r"\\\n#", "", words).replace("as it stands", ""))
        config = load_config(path, given[1::2])
        found = plan(config, 80.0)
        assert found.problems == [] and found.gpus == int(gpus)
        assert [line[6:] for line in said.splitlines()] == list(plan_lines(found, config))[1:]


def test_what_does_not_fit_is_said_with_what_would(capsys):
    command = ["plan", str(CONFIGS / "mixtral-8x7b.yaml"), "--gpu-memory", "80", "--set", "evaluators.shards=1"]
    assert main(command) == 1
    text = capsys.readouterr().out
    assert "does not fit: a shard of mistralai/Mixtral-8x7B-v0.1 needs" in text
    needed = int(re.search(r"evaluators.shards=(\d+) would fit", text)[1])
    assert main([*command[:-1], f"evaluators.shards={needed}", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["problems"] == []
    assert main([*command[:-1], f"evaluators.shards={needed - 1}"]) == 1


def test_what_a_sleeping_engine_held_lies_beside_the_gpu():
    """Engines sleep by giving their weights to the CPU's memory; on CPUs none sleeps."""
    path = CONFIGS / "llama-2-7b.yaml"
    asleep, awake = (load_config(path, [f"generator.sleeps={sleeps}"]) for sleeps in ("true", "false"))
    found = plan(asleep, 80.0)
    engine = next(row for row in found.actors if "vLLM" in row["who"])
    assert found.host_bytes - plan(awake, 80.0).host_bytes == engine["parts"]["weights"]
    assert plan(asleep, 0).host_bytes == plan(awake, 0).host_bytes


def test_gradients_count_as_memory_of_the_host_whatever_the_device():
    config = load_config(CONFIGS / "llama-2-7b.yaml", ["target.dtype=bfloat16"])
    on_gpu, on_cpu = (plan(config, gib).actors[0] for gib in (80.0, 0))
    assert "gradients" not in on_gpu["parts"] and on_gpu["host"] > on_cpu["parts"]["gradients"] > 20 * 2**30
    scores = on_gpu["total"] + on_cpu["parts"]["gradients"] - on_cpu["total"]
    assert 0 < scores <= 3 * 4 * 32 * 2048**2, "attention's, which a GPU holds on the way back"
    assert on_cpu["host"] == on_gpu["host"] + on_gpu["total"] - scores, "each once"


def test_what_does_not_fit_beside_an_engine_is_said_with_what_the_gpus_that_there_are_can_hold(capsys):
    command = ["plan", str(CONFIGS / "llama-3.1-8b.yaml"), "--gpu-memory", "80", "--set"]
    assert main([*command, "data.context=8192"]) == 1
    text = capsys.readouterr().out
    assert "evaluators.shards=4 would fit, which takes 0.74 GPU for each of 4;" in text
    context = re.search(r"data.context=(\d+) would fit on the GPUs that there are", text)[1]
    assert main([*command, f"data.context={context}"]) == 0
    engine = next(line for line in capsys.readouterr().out.splitlines() if "vLLM engine" in line)
    total, room, cache, some, all_ = map(
        float, re.search(r": ([\d.]+) GiB of ([\d.]+) GiB .*cache ([\d.]+) for (\d+) of (\d+) answers", engine).groups()
    )
    assert total <= room and some < all_ == 36
    assert (some + 1) * cache / some + total - cache > 0.9 * 0.26 * 80, "one more would not fit"


def test_a_writer_whose_size_is_not_known_is_no_obstacle(capsys, tmp_path):
    """vLLM serves what cannot be pruned, such as quantised models."""
    stored = json.loads((ARCHITECTURES / "Qwen--Qwen2.5-Coder-7B-Instruct.json").read_text())
    quantised = stored | {"quantization_config": {"quant_method": "awq", "bits": 4}}
    (tmp_path / "config.json").write_text(json.dumps(quantised))
    command = ["plan", str(CONFIGS / "llama-3.1-8b.yaml"), "--gpu-memory", "80", "--set"]
    assert main([*command, f"generator.model={tmp_path}"]) == 0
    text = capsys.readouterr().out
    assert ": memory not known" in text and "beside what it takes to write" in text
    assert "everything of which that is known fits" in text
    assert main([*command, f"generator.model={tmp_path}", "--json"]) == 0
    assert [row["total"] for row in json.loads(capsys.readouterr().out)["actors"]][1:] == [None]
    assert main([*command, f"target.model={tmp_path}"]) == 2


def test_a_plan_for_this_machine_shares_its_gpus_as_a_search_would():
    config = load_config(CONFIGS / "demo.yaml")
    found = plan(config, 80.0, 64.0, 1)
    assert [row["gpus"] for row in found.actors] == [0.33, 0.33] and found.problems == []
    assert not any("on fewer GPUs" in line for line in plan_lines(found, config))
    whole = load_config(CONFIGS / "demo.yaml", ["evaluators.gpus_per_shard=1", "generator.gpus_per_engine=1"])
    assert plan(whole, 80.0, 64.0, 3).problems == []
    (problem,) = plan(whole, 80.0, 64.0, 2).problems
    assert "all actors need 3 GPUs, and there are 2: ask for less with" in problem
    (problem,) = plan(whole, 80.0, 4.0, 3).problems
    assert "of memory, and it has 4" in problem


def test_texts_are_looked_at_without_being_read(capsys, tmp_path):
    command = ["plan", str(CONFIGS / "demo.yaml"), "--gpu-memory", "0", "--set"]
    for setting, reason in (
        (f"data.report={tmp_path / 'no.txt'}", "there is no file"),
        ("data.report=wikipedia-sampel", "did you mean wikipedia-sample?"),
        ("data.report=wikipedia-sample[10:80]", "overlaps data.calibration"),
    ):
        assert main([*command, setting]) == 2
        assert reason in capsys.readouterr().err


def test_a_cpu_is_planned_for_too(capsys):
    assert main(["plan", str(CONFIGS / "demo.yaml"), "--gpu-memory", "0"]) in (0, 1)
    text = capsys.readouterr().out
    assert "2 × evaluator shard of smollm2-135m-instruct, 1 CPU each" in text and "needs 2 CPUs" in text
