"""The probe: refusals, and a fingerprint that follows the masks and the allocation."""

import numpy as np
import pytest

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.language import LanguageError, parse
from autoprune.algorithms.probe import SHAPES, _layers, probe

UNIFORM = Allocation()
WANDA = "def score(W, x_norm):\n    return W.abs() * x_norm"


def algorithm(body, group="row", allocation=UNIFORM):
    return Algorithm(f"def score(W, x_norm, x_mean, x_std):\n    return {body}", group, allocation)


@pytest.mark.parametrize("group", ["row", "matrix"])
def test_mask_is_that_of_a_plain_sort(group):
    expected = []
    for layer in _layers():
        scores = parse(WANDA)(layer.W, layer.statistics).numpy()
        groups = scores if group == "row" else scores.reshape(1, -1)
        kept = np.ones(groups.shape, bool)
        order = np.argsort(groups, axis=1, kind="stable")
        np.put_along_axis(kept, order[:, : int(0.6 * groups.shape[1])], False, axis=1)
        expected.append(kept.reshape(-1))
    bits = np.packbits(np.concatenate(expected), bitorder="little").tobytes()
    result = probe(Algorithm(WANDA, group), 0.6)
    assert result.mask == bits.hex()
    assert len(result.mask) == sum(rows * columns for rows, columns in SHAPES) // 4


def test_same_masks_same_hash_whatever_the_text():
    one, other = algorithm("W.abs() * x_norm"), algorithm("(W.square() * x_norm ** 2).sqrt() * 3")
    assert probe(one, 0.6) == probe(other, 0.6)


def test_hash_follows_group_sparsity_score_and_allocation():
    results = [
        probe(algorithm("W.abs() * x_norm"), 0.6),
        probe(algorithm("W.abs() * x_norm"), 0.5),
        probe(algorithm("W.abs() * x_norm", "matrix"), 0.6),
        probe(algorithm("W.abs() * x_std"), 0.6),
        probe(algorithm("W.abs()"), 0.6),
        probe(algorithm("W.abs() * x_norm", allocation=Allocation("sdsa", {"tau": 0.5})), 0.6),
    ]
    assert len({result.mask_hash for result in results}) == len(results)
    assert results[0].mask == results[-1].mask
    assert len({result.mask for result in results}) == len(results) - 1
    assert all(len(result.mask_hash) == 16 for result in results)


@pytest.mark.parametrize(
    "body, message",
    [
        ("W / (W - W)", "not finite"),
        ("W.log()", "not finite"),
        ("W * 0", "all scores of a row are equal"),
        ("W * 0 + W.abs().sum(dim=1, keepdim=True)", "all scores of a row are equal"),
        ("W.sum(dim=1)", "expected float32"),
        ("W.max()", "not in the language"),
    ],
)
def test_unusable_scores_are_refused(body, message):
    with pytest.raises(LanguageError, match=message):
        probe(algorithm(body), 0.6)


def test_whole_rows_may_be_equal_where_the_matrix_competes():
    probe(algorithm("W * 0 + W.abs().sum(dim=1, keepdim=True)", "matrix"), 0.6)


def test_layers_look_like_a_model():
    for layer, shape in zip(_layers(), SHAPES, strict=True):
        norm, mean, std = (layer.statistics[name] for name in ("x_norm", "x_mean", "x_std"))
        assert tuple(layer.W.shape) == shape and norm.shape == (shape[1],)
        assert (norm.square() - mean.square() - std.square()).abs().max() < 1e-3
        assert norm.max() > 8 * norm.median()
        size = layer.W.abs().flatten()
        assert ((size - size.mean()) ** 3).mean() / size.std() ** 3 > 1.3  # half-normal: 1.0
