"""n:m as what a search prunes to: every candidate has that group and no allocation, and its end says so."""

import json
import shlex
import shutil
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from local import LocalEvaluator, local_search, small_config
from safetensors.torch import load_file
from tiny import save_tiny_model

from autoprune.algorithms.algorithm import Allocation, Group
from autoprune.models.errors import InputError
from autoprune.models.export import export
from autoprune.models.masking import planned_sparsities
from autoprune.pipeline.cli import main
from autoprune.pipeline.conclusion import conclude
from autoprune.pipeline.config import Config, Further, Target, check_config, difference, load_config
from autoprune.pipeline.launch import experiment_of
from autoprune.pipeline.planning import plan, plan_lines
from autoprune.pipeline.population import read_score, seed
from autoprune.pipeline.preparation import Prepared
from autoprune.pipeline.run_folder import open_folder
from autoprune.pipeline.targets import Case, Cases

UNIFORM = Allocation()
WRITTEN = """Diagnosis: a
Hypothesis: b
Group: matrix
Allocation: sdsa tau=1 m=0.5 depth=0.2
def score(W, x_norm, x_std):
    return {score}"""
SCORES = (
    "W.abs() * (x_std + 0.5 * x_norm)",
    "W.abs() * x_norm / W.abs().mean(dim=0)",
    "W.abs() ** 1.5 * x_std",
    "W.abs() * x_norm ** 0.5",
    "W.abs() * (x_norm + tune(0.3, 0.1, 2) * x_std)",
)


class Pool(LocalEvaluator):
    """Also what the end of a search asks of a pool. seen: what was measured, and which shares of blocks went."""

    folder, seen, calibration_windows = None, (), 7

    @property
    def numels(self):
        return [profile.numel for profile in self._profiles]

    def evaluate(self, jobs, split="fitness", sparsity=None):
        for index, evaluation in super().evaluate(jobs, split, sparsity):
            self.seen += ((jobs[index], evaluation.block_sparsities),)
            yield index, evaluation

    def export(self, out, algorithm, details):
        sparsities = planned_sparsities(algorithm, self._profiles, self._sparsity)

        def write(paths):
            pairs = zip(self._shards, paths, strict=True)
            return [shard.export([path], algorithm, sparsities)[0] for shard, path in pairs]

        return export(self.folder, out, len(self._shards), write, algorithm, self._sparsity, sparsities, details)


def nm_config(folder, model="tiny", group="2:4", **plan_):
    config = small_config(folder)
    seeds, operators = ("magnitude", "wanda", "ria"), {"explore": 1.0, "mutate": 2.0, "simplify": 1.0, "tune": 3.0}
    settings = {
        "seeds": seeds,
        "design": "score",
        "operators": operators,
        "answers": 4,
        "generations": 4,
        "adapt": False,
    } | plan_
    return replace(
        config,
        target=Target(str(model), Group.parse(group).sparsity, group=group),
        search=replace(config.search, **settings),
    )


def about(config):
    hashes = dict.fromkeys(("calibration", "fitness", "report"), "ab")
    return Prepared(config.target.model, Path(config.target.model), None, {}, hashes)


@pytest.fixture(scope="module")
def done(tmp_path_factory, tiny_model):
    """A search for 2:4 with its end, its pool, and its folder."""
    folder = tmp_path_factory.mktemp("nm")
    script = folder / "answers.txt"
    script.write_text("\n---\n".join(WRITTEN.format(score=score) for score in SCORES))
    config = nm_config(folder, tiny_model)
    config = replace(config, generator=replace(config.generator, answers=str(script)))
    pool = Pool(tiny_model, 0.5)
    pool.folder = tiny_model
    search = local_search(folder, pool, config)
    search.run()
    conclude(config, config.folder, pool, search, about(config), ("mlflow ui", "here"), search.progress)
    return search, pool, config.folder


def test_the_model_says_of_how_much_text_it_was_calibrated_on(done):
    sidecar = json.loads((done[2] / "model" / "autoprune.json").read_text())
    assert sidecar["calibration"]["windows"] == 7, "the text's, not the configuration's"


def test_each_row_has_its_windows_and_its_difference_to_the_best_on_the_report_split(done):
    report = json.loads((done[2] / "report.json").read_text())
    *others, best = sorted(report["table"], key=lambda row: row["method"] == "best found")
    assert best["above_best"] is None and len(others) > 2 and report["looks"] == 1
    for row in others:
        pairs = zip(row["report_window_nlls"], best["report_window_nlls"], strict=True)
        differences = torch.tensor([own - other for own, other in pairs], dtype=torch.float64)
        error = differences.std().item() / len(differences) ** 0.5
        assert row["above_best"] == pytest.approx([differences.mean().item(), error], abs=1e-9)
    assert "looked at" not in (done[2] / "report.md").read_text()


@pytest.mark.parametrize("how", ["half", "another"])
def test_half_a_model_that_a_kill_left_or_anothers_is_written_anew(done, tmp_path, how):
    search, pool, folder = done
    model, old = tmp_path / "model", folder / "model"
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    whole = (old / "autoprune.json").read_text()
    (model / "autoprune.json").unlink()
    if how == "another":  # of the same id: the journal went another way since
        sidecar = json.loads(whole)
        (model / "autoprune.json").write_text(json.dumps(sidecar | {"algorithm": sidecar["algorithm"] | {"key": "x"}}))
        (model / "model.safetensors").write_bytes(b"")
    conclude(search.config, tmp_path, pool, search, about(search.config), ("mlflow ui", "here"), search.progress)
    assert (model / "autoprune.json").read_text() == whole
    assert (model / "model.safetensors").read_bytes() == (old / "model.safetensors").read_bytes()
    assert not list(tmp_path.glob(".model-*"))


def groups_kept(model, of):
    """How many weights are not zero, of every so many consecutive ones of a row of a pruned matrix."""
    counts = []
    for name, weight in load_file(model / "model.safetensors").items():
        if "proj" in name:
            for row in weight.tolist():
                for start in range(0, len(row), of):
                    counts.append(sum(value != 0 for value in row[start : start + of]))
    return counts


def test_of_every_four_weights_of_the_winner_two_are_kept(done):
    search, _, folder = done
    kept = groups_kept(folder / "model", 4)
    assert len(kept) == 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 80 * 32) // 4 and set(kept) == {2}
    sidecar = json.loads((folder / "model" / "autoprune.json").read_text())
    assert sidecar["algorithm"]["group"] == "2:4" and sidecar["algorithm"]["allocation"]["name"] == "uniform"
    assert sidecar["sparsity"]["target"] == sidecar["sparsity"]["achieved"] == 0.5
    assert sidecar["candidate"] == search.lineage.best().id


def test_every_candidate_competes_in_the_same_group_under_no_allocation(done):
    search, pool, _ = done
    readable = [c for c in search.lineage if c.algorithm is not None]
    assert {c.operator for c in readable} > {"seed", "mutate", "tune"}
    assert all((c.algorithm.group, c.algorithm.allocation) == ("2:4", UNIFORM) and not c.regrouped for c in readable)
    assert all(set(c.evaluation.block_sparsities) == {0.5} for c in search.lineage.evaluated())
    assert len(search.lineage.evaluated()) > 3, "answers that name a group and an allocation are read without them"
    tuned = [c for c in readable if c.operator == "tune"]
    for candidate in tuned:
        parent = search.lineage[candidate.parents[0]].algorithm
        assert replace(candidate.algorithm, score=parent.score) == parent
    assert {algorithm.group for algorithm, _ in pool.seen} == {"2:4"}, "no other group is tried"
    alone = [shares for algorithm, shares in pool.seen if algorithm.allocation.name == "explicit"]
    # They are measured side by side, so they end in any order.
    assert sorted(alone) == sorted(tuple(0.5 * (other == block) for other in range(4)) for block in range(4))


@pytest.mark.parametrize("prompt", ["gcot", "topk", "fixed"])
@pytest.mark.parametrize(
    "group, said", [("2:4", "every 4 consecutive weights of a row, the 2"), ("4:8", "8 consecutive")]
)
def test_nobody_is_asked_for_a_group_or_an_allocation(tmp_path, fresh, prompt, group, said):
    search = local_search(tmp_path, fresh, nm_config(tmp_path, group=group, prompt=prompt, prompts=6, answers=6))
    search._commit(0, [seed(text, group) for text in search.config.search.seeds])
    slots = [slot for turn in range(3) for slot in search.prompter.slots(1, turn) if slot.operator != "tune"]
    assert len(slots) > 12
    for slot in slots:
        grammar = search.prompter.request(slot, 1, 0, 0).grammar
        assert slot.parts == ("score",) and "Group" not in grammar and "llocat" not in grammar
        (_, system), (_, user) = slot.messages
        form = system.partition("Answer in exactly this form")[2]
        assert said in system and "Group:" not in form and "llocation" not in form and "allocate" not in system
        assert "matrix (all" not in system and "its group" not in user and "sdsa" not in user


@pytest.mark.parametrize("kind", ["genetic", "grammar"])
def test_searches_by_chance_keep_the_group(tmp_path, fresh, kind):
    config = nm_config(tmp_path, operators={"explore": 1.0, "mutate": 1.0, "crossover": 1.0})
    search = local_search(tmp_path, fresh, replace(config, generator=replace(config.generator, kind=kind)))
    search.run()
    written = [c for c in search.lineage if c.operator != "seed" and c.algorithm is not None]
    assert len(written) > 4 and any(c.status == "evaluated" for c in written)
    assert all((c.algorithm.group, c.algorithm.allocation) == ("2:4", UNIFORM) for c in written)


def test_the_report_says_what_was_pruned_to_and_claims_no_allocation(done):
    search, _, folder = done
    text, found = (folder / "report.md").read_text(), json.loads((folder / "report.json").read_text())
    assert found["group"] == "2:4" and text.splitlines()[0].endswith(" to 2:4")
    assert [row["method"] for row in found["table"]] == ["dense", "magnitude", "wanda", "ria", "best found"]
    assert "sdsa" not in text.lower() and not (folder / "sparsity.png").exists()
    assert "of every 4 consecutive weights of a row 2 are kept" in text and "The zeros are 2:4" in text
    assert "in each group of 2:4" in text and len(found["sensitivity"]) == 4
    command = shlex.split(found["prune_command"])
    assert command[command.index("--group") + 1] == "2:4" and "--sparsity" not in command
    algorithm, spread = read_score(folder / "best.py")
    assert algorithm == search.lineage.best().algorithm and spread
    assert "to 2:4, mask only" in (folder / "best.py").read_text()


def test_the_command_of_the_report_keeps_two_of_four(done, tmp_path):
    _, _, folder = done
    text = tmp_path / "text.txt"
    text.write_text("Not a long text, but a text. " * 40)
    command = shlex.split(json.loads((folder / "report.json").read_text())["prune_command"])[1:]
    command[command.index("--calibration") + 1] = str(text)
    command[command.index("--out") + 1] = str(tmp_path / "pruned")
    assert main(command) == 0
    assert set(groups_kept(tmp_path / "pruned", 4)) == {2}


def read(tmp_path, text, *overrides):
    (tmp_path / "c.yaml").write_text(text)
    return load_config(tmp_path / "c.yaml", overrides)


@pytest.mark.parametrize("text", ['{group: "2:4"}', "{group: 2:4}", "{group: 2:4, sparsity: 0.5}"])
def test_the_group_decides_what_a_file_leaves_out(tmp_path, text):
    for config in (read(tmp_path, f"target: {text}"), read(tmp_path, "target: {}", "target.group=2:4")):
        assert (config.target.group, config.target.sparsity) == ("2:4", 0.5)
        assert config.search.design == "score" and config.search.seeds == ("magnitude", "wanda", "ria")
        assert read(tmp_path, config.to_yaml()) == config
    assert read(tmp_path, "target: {group: '1:4'}").target.sparsity == 0.75
    assert read(tmp_path, "target: {group: 2:4}\nsearch: {seeds: [wanda]}").search.seeds == ("wanda",)
    assert read(tmp_path, "target: {group: free}") == read(tmp_path, "") == Config()


@pytest.mark.parametrize(
    "text, message",
    [
        ("target: {group: 2:4, sparsity: 0.6}", "target.sparsity is 0.6, and group 2:4 means 0.5"),
        ("target: {group: 4:2}", "target.group is '4:2': expected free, or n:m such as 2:4"),
        ("target: {group: row}", "target.group is 'row'"),
        ("target: {group: 2:4}\nsearch: {design: both}", "search.design is both: .* expected score"),
        (
            "target: {group: 2:4}\nsearch: {seeds: [wanda, wanda+sdsa, ria+owl]}",
            "search.seeds are wanda, wanda.sdsa, ria.owl: .* such as wanda, ria$",
        ),
        ("target: {further: [{group: 2:4, sparsity: 0.6}]}", r"further\[0\].sparsity is 0.6, and group 2:4 means 0.5"),
        ("target: {group: 2:4, further: [{sparsity: 0.6}]}", r"further\[0\].sparsity is 0.6, and group 2:4"),
        ("target: {group: 2:4, further: [{group: free}]}", r"further\[0\].group is free, and target.group is 2:4"),
        ("target: {further: [{group: rows}]}", r"further\[0\].group is 'rows'"),
    ],
)
def test_what_contradicts_the_group_is_one_line(tmp_path, text, message):
    with pytest.raises(InputError, match=message) as refusal:
        read(tmp_path, text)
    assert "\n" not in str(refusal.value)


def test_runs_that_know_no_group_are_resumed_and_a_changed_group_is_refused(tmp_path):
    config = small_config(tmp_path)
    config = replace(config, target=replace(config.target, further=(Further("", 0.7),)))
    old = config.to_dict()
    for case in (old["target"], *old["target"]["further"]):
        del case["group"]
    config.folder.mkdir()
    (config.folder / "config.yaml").write_text(yaml.safe_dump(old))
    assert difference(load_config(config.folder / "config.yaml"), config) == []
    plain = nm_config(tmp_path / "nm")
    with ExitStack() as held:
        open_folder(plain.folder, plain, False, held)
        changed = replace(plain, target=replace(plain.target, group="4:8"))
        with pytest.raises(InputError, match="target.group: '2:4' → '4:8'"):
            open_folder(plain.folder, changed, True, held)


def test_experiments_are_named_by_the_group(tmp_path):
    config = nm_config(tmp_path, "org/tiny")
    assert experiment_of(config) == "autoprune/tiny@2:4"
    more = replace(config, target=replace(config.target, further=(Further("other", 0.5),)))
    assert experiment_of(more) == "autoprune/tiny@2:4+1" and more.target.cases == ("tiny to 2:4", "other to 2:4")
    assert experiment_of(small_config(tmp_path)) == "autoprune/tiny@50%"


def test_a_further_case_prunes_by_its_own_group(tmp_path, evaluator):
    """Whatever group and allocation suit the first case."""
    config = small_config(tmp_path)
    config = replace(config, target=replace(config.target, further=(Further("", 0.75, "2:8"),), combine="mean"))
    check_config(config)
    cases = Cases([Case(evaluator, c.sparsity, c.goal, c.group) for c in config.target.every], worst=False)
    search = local_search(tmp_path, cases, config)
    search.run()
    best, dense = search.lineage["seed-wanda+sdsa"], evaluator.dense["fitness"].nll
    other = replace(best.algorithm, group="2:8", allocation=UNIFORM)
    ((_, own),), ((_, more),) = (
        evaluator.evaluate([algorithm], "fitness", sparsity)
        for algorithm, sparsity in ((best.algorithm, 0.5), (other, 0.75))
    )
    assert set(more.block_sparsities) == {0.75} and len(set(own.block_sparsities)) > 1
    assert best.fitness == pytest.approx((own.nll + more.nll) / 2 - dense, abs=1e-6)
    assert any("tiny to 50%; tiny to 2:8" in c.prompt for c in search.lineage)


def test_a_plan_counts_no_trials_of_groups_and_says_what_cannot_be_cut(tmp_path):
    folder = save_tiny_model(tmp_path / "tiny")
    config = nm_config(tmp_path, folder)
    config = replace(config, generator=replace(config.generator, kind="grammar"))
    found = plan(config, 0.0)
    assert found.problems == [] and next(iter(plan_lines(found, config))).endswith(" to 2:4")
    free = plan(replace(config, target=Target(str(folder), 0.5)), 0.0)
    assert (found.answers, found.evaluations) == (free.answers, free.evaluations) and found.hours < free.hours
    for group, message in (("16:32", f"{folder} has layers of 80 inputs"), ("3:5", "expected m that divides 32")):
        first, *_ = plan(nm_config(tmp_path, folder, group), 0.0).problems
        assert message in first
