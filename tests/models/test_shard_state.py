"""What a calibrated shard writes down gives another shard of the same weights the same measurements, to the bit."""

import json
from dataclasses import replace

import pytest
import torch

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.models.masking import planned_sparsities
from autoprune.models.shard import ModelShard
from autoprune.models.shard_state import FACTS, TENSORS, read_state, state_digest, tensors_digest, write_state

SCORE = "def score(W, x_kurtosis, h_inv_diag, g_rms, x_absmean):\n"
SCORE += "    return W.square() / h_inv_diag * g_rms * (1 + x_kurtosis) + x_absmean\n"
ALGORITHM = Algorithm(SCORE, "matrix", Allocation("sdsa", {"taylor": 0.5}))
STATISTICS = frozenset({"x_kurtosis", "h_inv_diag", "g_rms", "x_absmean"})
ABOUT = {"dtype": "float32", "text": "one"}


def windows(seed: int) -> torch.Tensor:
    return torch.randint(0, 256, (4, 24), generator=torch.Generator().manual_seed(seed))


def taught(folder) -> ModelShard:
    shard = ModelShard(folder, 0, 4, "float32", "cpu")
    shard.calibrate(windows(1), STATISTICS, ("score_std",))
    shard.backward(windows(1))
    shard.forward("fitness", windows(2), windows(2))
    return shard


def measured(shard: ModelShard):
    report = shard.forward(
        "fitness", windows(2), windows(2), ALGORITHM, planned_sparsities(ALGORITHM, shard.profiles, 0.5)
    )[1]
    return replace(report, seconds=0.0, pruning_seconds=0.0)


@pytest.fixture(scope="module")
def shard(tiny_model):
    return taught(tiny_model)


def test_another_shard_measures_the_same(shard, tiny_model, tmp_path):
    write_state(shard, tmp_path, ABOUT)
    other = ModelShard(tiny_model, 0, 4, "float32", "cpu")
    assert read_state(other, tmp_path, ABOUT)
    assert state_digest(other) == state_digest(shard)
    assert measured(other) == measured(shard)
    assert other.dense_reports["fitness"].window_nlls == shard.dense_reports["fitness"].window_nlls
    write_state(other, tmp_path / "again", ABOUT)
    assert (tmp_path / "again" / TENSORS).read_bytes() == (tmp_path / TENSORS).read_bytes()


@pytest.mark.parametrize("name", [TENSORS, FACTS])
def test_what_is_cut_or_altered_is_not_taken(shard, tiny_model, tmp_path, name):
    write_state(shard, tmp_path, ABOUT)
    whole = (tmp_path / name).read_bytes()
    fresh = ModelShard(tiny_model, 0, 4, "float32", "cpu")
    places = range(0, len(whole), max(1, len(whole) // 23))
    for place in places:
        (tmp_path / name).write_bytes(whole[:place])
        assert not read_state(fresh, tmp_path, ABOUT), f"cut at {place}"
    for place in (p for p in places if whole[p : p + 1] not in b' "'):
        (tmp_path / name).write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not read_state(fresh, tmp_path, ABOUT), f"altered at {place}"
    assert fresh.profiles == [] and fresh.moments == []
    (tmp_path / name).write_bytes(whole)
    assert read_state(fresh, tmp_path, ABOUT)


def test_what_was_learned_of_something_else_is_not_taken(shard, tiny_model, tmp_path):
    fresh = ModelShard(tiny_model, 0, 4, "float32", "cpu")
    assert not read_state(fresh, tmp_path / "nothing", ABOUT)
    write_state(shard, tmp_path, ABOUT)
    assert not read_state(fresh, tmp_path, ABOUT | {"text": "two"})
    facts = json.loads((tmp_path / FACTS).read_text())
    (tmp_path / FACTS).write_text(json.dumps(facts | {"schema": 0}))
    assert not read_state(fresh, tmp_path, ABOUT)


def test_a_digest_tells_one_changed_bit_of_any_tensor(tiny_model):
    shard = ModelShard(tiny_model, 1, 3, "float32", "cpu")
    tensors = shard.model.tensors()
    layers = {name.split(".")[2] for name in tensors if ".layers." in name}
    assert layers == {"1", "2"} and all(not tensor.is_meta for tensor in tensors.values())
    before = tensors_digest(tensors)
    assert before == tensors_digest(ModelShard(tiny_model, 1, 3, "float32", "cpu").model.tensors())
    for tensor in tensors.values():
        bits = tensor.detach().view(torch.int32).reshape(-1)
        bits[-1] ^= 1
        assert tensors_digest(tensors) != before
        bits[-1] ^= 1
    assert tensors_digest(tensors) == before
