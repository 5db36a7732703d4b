"""The probe: refusals, and a fingerprint that follows the masks and the allocation."""

import numpy as np
import pytest

from autoprune.algorithms.algorithm import Algorithm, Allocation
from autoprune.algorithms.language import LanguageError, parse
from autoprune.algorithms.probe import SHAPES, _layers, probe
from autoprune.algorithms.vocabulary import STATISTICS

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


@pytest.mark.parametrize("group, kept, of", [("2:4", 2, 4), ("1:2", 1, 2), ("5:8", 5, 8)])
def test_of_every_m_weights_n_are_kept(group, kept, of):
    expected = []
    for layer in _layers():
        for row in parse(WANDA)(layer.W, layer.statistics).tolist():
            for start in range(0, len(row), of):
                pruned = sorted(range(start, start + of), key=lambda j: (row[j], j))[: of - kept]
                expected += [j not in pruned for j in range(start, start + of)]
    result = probe(Algorithm(WANDA, group), 0.6)
    assert result.mask == np.packbits(np.array(expected), bitorder="little").tobytes().hex()
    assert probe(Algorithm(WANDA, group), 0.9) == result, "the pattern says how many, whatever the sparsity"


@pytest.mark.parametrize("rows, columns", [(16, 16), (4, 8), (1, 32)])
def test_rectangles_are_pruned_as_a_whole(rows, columns):
    expected = []
    for layer in _layers():
        scores = parse(WANDA)(layer.W, layer.statistics).numpy()
        corners = [(i, j) for i in range(0, scores.shape[0], rows) for j in range(0, scores.shape[1], columns)]
        ranked = sorted(corners, key=lambda c: scores[c[0] : c[0] + rows, c[1] : c[1] + columns].astype(float).mean())
        kept = np.ones(scores.shape, bool)
        for i, j in ranked[: int(0.6 * len(corners))]:
            kept[i : i + rows, j : j + columns] = False
        expected.append(kept.reshape(-1))
    bits = np.packbits(np.concatenate(expected), bitorder="little").tobytes()
    assert probe(Algorithm(WANDA, f"{rows}x{columns}"), 0.6).mask == bits.hex()


@pytest.mark.parametrize(
    "group, message",
    [
        ("3:5", "the group 3:5 does not fit a probe layer"),
        ("16x12", "the group 16x12 does not fit a probe layer"),
        ("block", "unknown comparison group 'block'"),
        ("4:2", "unknown comparison group '4:2'"),
    ],
)
def test_groups_that_do_not_fit_are_refused_in_one_line(group, message):
    with pytest.raises(LanguageError, match=message) as refusal:
        probe(Algorithm(WANDA, group), 0.6)
    assert "\n" not in str(refusal.value)


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


def test_an_update_is_another_algorithm_with_the_same_masks():
    plain, updated = (probe(Algorithm(WANDA, update=update), 0.6) for update in ("none", "cg"))
    assert plain.mask == updated.mask and plain.mask_hash != updated.mask_hash


@pytest.mark.parametrize(
    "body, group, allocation, expected",
    [
        ("W.abs() * x_norm", "row", UNIFORM, "7c45e526f3be91ae"),
        ("W.abs() * (x_mean.abs() + x_std)", "row", UNIFORM, "d1e0e6cacbd67038"),
        ("W.abs() * x_std + x_mean.abs()", "matrix", Allocation("sdsa", {"tau": 0.5}), "142118fd2220645e"),
    ],
)
def test_hashes_are_those_of_earlier_checkpoints(body, group, allocation, expected):
    """Recorded when x_norm, x_mean and x_std were all that there was: a resumed search must know its repeats."""
    assert probe(algorithm(body, group, allocation), 0.6).mask_hash == expected


@pytest.mark.parametrize("name", STATISTICS)
def test_no_statistic_of_the_probe_depends_on_which_others_there_are(name, monkeypatch):
    before = _layers()
    monkeypatch.delitem(STATISTICS, name)
    for layer, without in zip(before, _layers.__wrapped__(), strict=True):
        assert np.array_equal(layer.W, without.W)
        assert without.statistics.keys() == layer.statistics.keys() - {name}
        assert all(np.array_equal(layer.statistics[other], without.statistics[other]) for other in without.statistics)


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
        assert list(layer.statistics) == list(STATISTICS)
        for name, statistic in STATISTICS.items():
            assert layer.statistics[name].shape == statistic.shape(*shape)
            assert (layer.statistics[name].min() < 0) == statistic.signed
            sizes = layer.statistics[name].abs()
            assert sizes.min() > 0 and sizes.max() > 4 * sizes.median()
        norm, mean, std = (layer.statistics[name] for name in ("x_norm", "x_mean", "x_std"))
        assert (layer.statistics["x_absmean"] >= mean.abs()).all() and (layer.statistics["x_absmean"] <= norm).all()
        assert (layer.statistics["x_kurtosis"] >= 1).all()
        gradients = layer.statistics["g_rms"].flatten()
        for other in (layer.W.abs(), norm.expand(shape)):
            assert np.corrcoef(gradients, other.flatten())[0, 1] == pytest.approx(0, abs=0.1)
        assert tuple(layer.W.shape) == shape and norm.shape == (shape[1],)
        assert (norm.square() - mean.square() - std.square()).abs().max() < 1e-3
        assert norm.max() > 8 * norm.median()
        size = layer.W.abs().flatten()
        assert ((size - size.mean()) ** 3).mean() / size.std() ** 3 > 1.3  # half-normal: 1.0


def test_what_only_data_shows_is_a_refusal():
    """Without data torch takes the absolute value of truth values; with data it does not."""
    with pytest.raises(LanguageError, match=r"in `return \(W > x_norm\).abs\(\) \* W`: \"abs_cpu\" not implemented"):
        probe(Algorithm("def score(W, x_norm):\n    return (W > x_norm).abs() * W\n"), 0.6)
