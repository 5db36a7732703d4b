"""The pruned model of a run in MLflow's registry, from where it is loaded and generates."""

import json
import shutil

import pytest

from autoprune.models.errors import InputError
from autoprune.pipeline.cli import main
from autoprune.pipeline.registering import register
from autoprune.pipeline.tracking import MlflowTracker


@pytest.fixture
def run(tmp_path, tiny_model):
    """What a finished search leaves, as far as it matters here."""
    folder = tmp_path / "runs" / "mine"
    folder.mkdir(parents=True)
    tracker = MlflowTracker(f"sqlite:///{tmp_path / 'runs' / 'mlflow.db'}", "demo", "mine", folder)
    tracker.start({})
    tracker.finish("FINISHED", {}, [])
    (folder / "config.yaml").write_text("name: mine\n")
    shutil.copytree(tiny_model, folder / "model")
    details = {
        "candidate": "g1-c0",
        "perplexity": {"report_nll": 4.5},
        "layers": {"a": {}},
        "sparsity": {"target": 0.6},
    }
    (folder / "model" / "autoprune.json").write_text(json.dumps(details))
    (folder / "report.json").write_text(json.dumps({"name": "mine", "target": "org/tiny", "sparsity": 0.6}))
    return folder


def test_the_model_is_registered_on_demand_and_its_weights_are_copied_once(run, capsys):
    import mlflow

    assert main(["register", str(run)]) == 0
    assert capsys.readouterr().out.strip() == "models:/tiny-pruned-60/1"
    assert register(run, "another-name") == "models:/another-name/1"
    summary = json.loads((run / "report.json").read_text())
    (run / "report.json").write_text(json.dumps(summary | {"sparsity": 0.5, "group": "2:4"}))
    assert register(run) == "models:/tiny-pruned-2-4/1"
    memory = json.loads((run / "mlflow.json").read_text())
    client = mlflow.MlflowClient(memory["uri"])
    (logged,) = client.search_logged_models([memory["experiment_id"]], "name = 'pruned'")
    assert logged.source_run_id == memory["run_id"] and client.get_run(memory["run_id"]).info.status == "FINISHED"
    found = client.get_model_version("tiny-pruned-60", "1")
    assert found.tags["autoprune.candidate"] == "g1-c0" and found.tags["autoprune.report_nll"] == "4.5"
    info = mlflow.models.get_model_info("models:/tiny-pruned-60/1")
    assert info.signature.inputs.to_dict()[0]["type"] == "string"
    assert info.metadata["autoprune"]["candidate"] == "g1-c0" and "layers" not in info.metadata["autoprune"]
    loaded = mlflow.transformers.load_model("models:/tiny-pruned-60/1")
    assert loaded("ab", max_new_tokens=2)[0]["generated_text"].startswith("ab")


def test_an_upload_that_was_cut_off_is_done_again(run, monkeypatch):
    import mlflow

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as broken:
        broken.setattr("mlflow.MlflowClient.log_model_artifacts", full)
        with pytest.raises(OSError, match="No space left"):
            register(run, "cut-off")
    assert register(run, "cut-off") == "models:/cut-off/1"
    loaded = mlflow.transformers.load_model("models:/cut-off/1")
    assert loaded("ab", max_new_tokens=2)[0]["generated_text"].startswith("ab")


def test_what_is_not_there_is_one_clear_line(run, capsys):
    (run / "report.json").unlink()
    with pytest.raises(InputError, match="holds no finished run .*report.json.*let the search end"):
        register(run)
    assert main(["register", str(run)]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()
    assert "report.json" in line
