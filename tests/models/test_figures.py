"""Figures of the real SmolLM2-135M against reference figures that another program measured under the same conditions.

The texts are WikiText-2 (test) and a sample of C4, which are not part of the project: the test looks for them in
AUTOPRUNE_DATA, or in `shared/data` beside the checkout, and is skipped where they are not.
"""

import os
from dataclasses import replace
from pathlib import Path

import pytest

from autoprune.algorithms.algorithm import Allocation, Group
from autoprune.algorithms.updates import conjugate_gradients, layer_error, sparsegpt
from autoprune.models.corpora import load_corpus, token_windows
from autoprune.models.loading import load_tokenizer, resolve_model
from autoprune.models.measuring import Workbench
from autoprune.models.shard import ModelShard
from autoprune.pipeline.population import baseline

DATA = Path(os.environ.get("AUTOPRUNE_DATA", Path(__file__).parents[2].parent / "shared" / "data"))
WIKITEXT, C4 = DATA / "wikitext-2-raw.test.txt", DATA / "c4-sample.jsonl"


@pytest.mark.skipif(not (WIKITEXT.exists() and C4.exists()), reason="needs WikiText-2 and a sample of C4")
def test_wanda_at_60_percent_reproduces_the_reference_figures():
    """fp32; calibration on the first 48 windows of 512 tokens of C4 documents 0–399, perplexity over the first 16
    windows of WikiText-2 test."""
    folder = resolve_model("smollm2-135m-instruct")
    tokenizer = load_tokenizer(folder)
    splits = {
        "calibration": token_windows(load_corpus(f"{C4}[0:400]"), tokenizer, 512)[:48],
        "report": token_windows(load_corpus(str(WIKITEXT)), tokenizer, 512)[:16],
    }
    bench = Workbench(folder, 30, splits, "float32", "cpu")
    wanda = baseline("wanda")
    skewed = replace(wanda, allocation=Allocation("sdsa", {"tau": 0.5, "m": 0.3, "depth": 0.0}))
    uniform, sdsa = bench.measure([(wanda, 0.6), (skewed, 0.6)], "report", divergence=False)
    assert uniform.perplexity == pytest.approx(226.6, rel=0.03)
    assert sdsa.perplexity == pytest.approx(163.8, rel=0.03)
    assert uniform.sparsity == pytest.approx(0.6, abs=1e-3) and sdsa.sparsity == pytest.approx(0.6, abs=1e-3)


def test_updates_lower_the_error_of_real_layers():
    """The first blocks of SmolLM2-135M; `bench/updates.py` does all of them."""
    folder = resolve_model("smollm2-135m-instruct")
    tokens = token_windows(load_corpus("wikipedia-sample[0:20]"), load_tokenizer(folder), 256, 8)
    shard = ModelShard(folder, 0, 2, "float32", "cpu")
    hidden = shard.enter(tokens)
    for index in range(2):
        with shard.model.open(index) as layers:
            moments, hidden = shard.collect(index, layers, hidden, {"gram"})
            for layer in layers:
                own, weight = moments[layer.name], layer.weight.float()
                mask, updated = sparsegpt(weight, own.factor, Group("row"), 0.6)
                solved = conjugate_gradients(weight, mask, own.gram, start=updated)
                errors = [layer_error(weight, new, own.gram) for new in (weight * mask, updated, solved)]
                assert errors[0] > errors[1] > errors[2] > 0, f"{index}.{layer.name}"
