"""Zero-shot accuracy, by the real lm-eval on a tiny random model, against log-likelihoods computed by hand."""

import json
import math
import random
import sys
from pathlib import Path

import pytest
import torch

from autoprune.models import zeroshot
from autoprune.models.errors import InputError
from autoprune.models.zeroshot import METRICS, SEVEN, ZeroShot, mean, zero_shot

SAMPLES = 40
WORDS = ["a", "cat", "sat", "on", "the", "mat", "and", "was", "not", "at", "all", "displeased", "by", "être", "né"]


def write_task(folder: Path, name: str, **settings) -> None:
    """A task file as people write them (YAML reads JSON), on the documents beside it."""
    folder.mkdir(exist_ok=True)
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / "documents.jsonl")}, "cache_dir": str(folder / "cache")},
        "output_type": "multiple_choice",
        "test_split": "test",
        "doc_to_text": "Q: {{question}}\nA:",
        "doc_to_target": "{{right}}",
        "doc_to_choice": "{{answers}}",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }
    (folder / f"{name}.yaml").write_text(json.dumps(task | settings))


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """On matrices this small, threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def documents() -> list[dict]:
    """Questions with two to four answers, each of one to six words, so that their lengths differ."""
    dice = random.Random(1)

    def words(most: int) -> str:
        return " ".join(dice.choices(WORDS, k=dice.randint(1, most)))

    return [
        {"question": words(8), "answers": [words(6) for _ in range(dice.randint(2, 4))], "right": dice.randint(0, 1)}
        for _ in range(SAMPLES)
    ]


@pytest.fixture(scope="module")
def tasks(documents, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zeroshot") / "tasks"
    folder.mkdir()
    (folder / "documents.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    write_task(folder, "by_length")
    write_task(folder, "plain", metric_list=[{"metric": "acc"}], num_fewshot=1, fewshot_split="test")
    write_task(folder / "further", "boolq", dataset_path="organisation/no-such-data", dataset_kwargs={})
    write_task(folder, "written", output_type="generate_until")
    write_task(folder, "f1_too", metric_list=[{"metric": "acc"}, {"metric": "f1"}])
    write_task(folder, "f1_only", metric_list=[{"metric": "f1"}])
    write_task(folder, "misspelt", doc_to_target="{{rigth}}")
    (folder / "both.yaml").write_text(json.dumps({"group": "both", "task": ["by_length", "plain"]}))
    return folder


@pytest.fixture(scope="module")
def correct(documents, tiny_model) -> dict[str, list[bool]]:
    """By metric, whether the model is right on each document: every answer run by itself, with no padding."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    right = {"acc": [], "acc_norm": []}
    for document in documents:
        question = tokenizer(f"Q: {document['question']}\nA:").input_ids
        sums, norms = [], []
        for answer in document["answers"]:
            ids = question + tokenizer(f" {answer}").input_ids
            with torch.no_grad():
                log_probabilities = model(torch.tensor([ids])).logits[0].log_softmax(-1)
            total = 0.0
            for position in range(len(question), len(ids)):
                total += float(log_probabilities[position - 1, ids[position]])
            sums.append(total)
            norms.append(total / len(answer))
        right["acc"].append(sums.index(max(sums)) == document["right"])
        right["acc_norm"].append(norms.index(max(norms)) == document["right"])
    return right


def expected(task: str, metric: str, right: list[bool]) -> ZeroShot:
    share = sum(right) / len(right)
    variance = sum((hit - share) ** 2 for hit in right) / (len(right) - 1)
    error = math.sqrt(variance / len(right))
    return ZeroShot(task, metric, pytest.approx(share), pytest.approx(error), len(right))


def measure(tiny_model, tasks, *names, **options) -> list[ZeroShot]:
    return zero_shot(str(tiny_model), names, dtype="float32", device="cpu", task_path=tasks, **options)


def test_accuracy_is_that_of_log_likelihoods_by_hand(tiny_model, tasks, correct):
    assert correct["acc"] != correct["acc_norm"], "the documents cannot tell the two metrics apart"
    said = []
    results = measure(tiny_model, tasks, "by_length", "plain", batch_size=3, progress=said.append)
    assert results == [expected("by_length", "acc_norm", correct["acc_norm"]), expected("plain", "acc", correct["acc"])]
    assert mean(results) == pytest.approx((sum(correct["acc"]) + sum(correct["acc_norm"])) / (2 * SAMPLES))
    assert said[-1] == str(results[1]) and "plain: acc 0." in said[-1] and said[-1].endswith("(40 samples)")


def test_limit_takes_the_first_documents(tiny_model, tasks, correct):
    for limit in (7, SAMPLES + 1):
        (result,) = measure(tiny_model, tasks, "plain", limit=limit)
        assert result == expected("plain", "acc", correct["acc"][:limit])
    (result,) = measure(tiny_model, tasks, "plain", limit=1)
    assert result == ZeroShot("plain", "acc", float(correct["acc"][0]), None, 1)
    assert "±" not in str(result)


def test_the_seven_tasks_are_lm_evals_and_measure_what_is_reported():
    managers = zeroshot._managers(None, SEVEN)
    assert {name: zeroshot._metric(name, managers[name]) for name in SEVEN} == METRICS
    assert len(SEVEN) == 7


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("by_lenght", r"^no task 'by_lenght' \(did you mean by_length\?\); expected tasks of lm-eval, such as boolq,"),
        ("winogrand", r"did you mean winogrande\?"),
        ("both", "^both is a group of tasks"),
        ("written", "^written is not a multiple-choice task"),
        ("f1_too", "^the task f1_too measures acc, f1: pip install scikit-learn first"),
        ("f1_only", "^the task f1_only measures f1; expected acc or acc_norm"),
        ("misspelt", r"^cannot load the task misspelt from .*misspelt.yaml \("),
        ("boolq", r"^cannot get the data of the task boolq from the hub dataset organisation/no-such-data \(.*network"),
    ],
)
def test_a_task_that_cannot_be_used_is_one_line(tiny_model, tasks, name, message):
    with pytest.raises(InputError, match=message) as raised:
        measure(tiny_model, tasks, name)
    assert "\n" not in str(raised.value)


def test_other_unusable_input_is_one_line(tiny_model, tasks, tmp_path, monkeypatch):
    with pytest.raises(InputError, match="^limit is 0"):
        measure(tiny_model, tasks, "plain", limit=0)
    with pytest.raises(InputError, match="^batch_size is -1"):
        measure(tiny_model, tasks, "plain", batch_size=-1)
    with pytest.raises(InputError, match="^no task to measure"):
        measure(tiny_model, tasks)
    with pytest.raises(InputError, match="^there is no folder"):
        measure(tiny_model, tmp_path / "nowhere", "plain")
    with pytest.raises(InputError, match="^no model 'smollm'"):
        measure("smollm", tasks, "plain")
    (tmp_path / "config.json").write_bytes((tiny_model / "config.json").read_bytes())
    with pytest.raises(InputError, match="^cannot load the model in .*safetensors"):
        measure(tmp_path, tasks, "plain")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(InputError, match=r"pip install '.\[eval\]'"):
        measure(tiny_model, tasks, "plain")
