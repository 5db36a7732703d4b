"""The files that run a search on clusters are what their tools take, agree with each other and with the package, and
hold nothing that should not be in a repository. No Docker, Kubernetes or cloud is asked."""

import configparser
import fnmatch
import importlib.util
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

import jsonschema
import pytest
import yaml

from autoprune import __version__
from autoprune.pipeline.cli import _parser
from autoprune.pipeline.config import Config, build, check_config, load_config

ROOT = Path(__file__).parents[2]
CLUSTERS = ("ray_cluster.yaml", "deploy/on_premises.yaml")
FILES = (
    *CLUSTERS,
    "deploy/rayjob.yaml",
    "deploy/runtime_env.yaml",
    "deploy/mlflow.yaml",
    "deploy/Dockerfile",
    ".dockerignore",
    ".rayignore",
)
UPLOAD = 5_000_000  # bytes of a checkout that a job may carry; Ray keeps them in the head's memory


def text(name: str) -> str:
    return (ROOT / name).read_text()


def commands(name: str) -> list[str]:
    """Lines of a file, of its comments too, joined where a backslash ends them."""
    lines = re.sub(r"(?m)^\s*#\s?", "", text(name)).replace("\\\n", " ")
    return [" ".join(line.split()) for line in lines.splitlines()]


def packages() -> set[str]:
    """Folders that hold the package."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    return set(config["options"]["packages"].replace("autoprune.", "").split())


def values(node: object, key: str) -> Iterator:
    """All values of a key, however deep."""
    if isinstance(node, dict):
        for name, value in node.items():
            if name == key:
                yield value
            yield from values(value, key)
    elif isinstance(node, list):
        for value in node:
            yield from values(value, key)


KUBERNETES = list(yaml.safe_load_all(text("deploy/rayjob.yaml")))
BY_KIND = {kind: [doc for doc in KUBERNETES if doc["kind"] == kind] for kind in {doc["kind"] for doc in KUBERNETES}}
JOB = BY_KIND["RayJob"][0]["spec"]
CLUSTER = JOB["rayClusterSpec"]
HEAD = CLUSTER["headGroupSpec"]
WORKERS = CLUSTER["workerGroupSpecs"]
PODS = [JOB["submitterPodTemplate"], HEAD["template"], *(group["template"] for group in WORKERS)]
NODES = PODS[1:]
MLFLOW = yaml.safe_load(text("deploy/mlflow.yaml"))


# --- images


def images() -> list[str]:
    found = re.findall(r"(?m)^FROM (\S+)", text("deploy/Dockerfile"))
    stages = {"scratch", *re.findall(r"(?m)^FROM \S+ AS (\S+)", text("deploy/Dockerfile"))}
    found = [image for image in found if image not in stages]
    for name in (*CLUSTERS, "deploy/mlflow.yaml"):
        document = yaml.safe_load(text(name))
        found += [image for key in ("image", "head_image", "worker_image") for image in values(document, key)]
    return found + list(values(KUBERNETES, "image"))


def test_every_image_is_pinned_and_ours_is_this_version():
    assert len(images()) == 8  # python, two clusters, two of MLflow, three of Kubernetes
    for image in images():
        name, colon, tag = image.rpartition(":")
        assert colon and re.search(r"\d+\.\d+", tag) and "latest" not in tag, f"{image} is not pinned"
        if "autoprune" in name:
            assert tag == __version__, f"{image} is not of version {__version__}"
    assert f"autoprune-gpu:{__version__}" in text("deploy/Dockerfile")


def test_versions_are_those_of_the_locks():
    assert CLUSTER["rayVersion"] == version("ray")
    assert f"mlflow:v{version('mlflow')}-" in MLFLOW["services"]["server"]["image"]
    (python,) = re.findall(r"FROM python:(\d+\.\d+)\.", text("deploy/Dockerfile"))
    assert f"for CPython {python} " in text("deploy/locks/gpu.txt").splitlines()[0]


# --- clusters of Ray's launcher


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_takes_the_cluster(name):
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(yaml.safe_load(text(name)))
    validate_config(prepared)
    wanted = [kind for kind in prepared["available_node_types"].values() if kind["max_workers"]]
    assert wanted and all(kind["min_workers"] == kind["max_workers"] for kind in wanted)
    assert prepared["max_workers"] == sum(kind["max_workers"] for kind in wanted)
    # Nothing is fetched on a worker, the image aside.
    setup = " ".join((*prepared["worker_setup_commands"], *prepared["initialization_commands"]))
    assert not re.search(r"\b(pip|apt|apt-get|conda|curl|wget|git)\b", setup)


@pytest.mark.parametrize("name", CLUSTERS)
def test_ray_start_is_called_as_it_can_be(name):
    from ray.scripts.scripts import start

    cluster, given = yaml.safe_load(text(name)), {}
    for role in ("head", "worker"):
        *_, command = cluster[f"{role}_start_ray_commands"]
        assert command.startswith("ray start ")
        given[role] = start.make_context("start", shlex.split(command)[2:]).params
    head, worker = given["head"], given["worker"]
    assert head["head"] and (head["num_cpus"], head["num_gpus"]) == (0, 0), "an actor could be placed on the head"
    assert head["dashboard_host"] == "127.0.0.1"
    assert worker["address"] == f"$RAY_HEAD_IP:{head['port']}"
    (memory,) = re.findall(r"--shm-size=(\d+)g", " ".join(cluster["docker"]["run_options"]))
    assert max(head["object_store_memory"], worker["object_store_memory"]) < int(memory) * 1e9


@pytest.mark.parametrize("name", CLUSTERS)
def test_machines_share_memory_files_and_a_token(name):
    cluster = yaml.safe_load(text(name))
    options = " ".join(cluster["docker"]["run_options"])
    for option in ("--shm-size=", "--ulimit nofile=", "--env RAY_AUTH_MODE=token", f":{settings()['AUTOPRUNE_CACHE']}"):
        assert option in options
    assert cluster["file_mounts"][f"{settings()['HOME']}/.ray/auth_token"] == "~/.ray/auth_token"
    assert "--gpus all" in cluster["docker"]["worker_run_options"]
    for source in re.findall(r"--volume (\S+?):", options):
        assert any(source.startswith(path) for path in re.findall(r"mountpoint -q (\S+)", text(name)))


def test_own_machines_are_all_used():
    cluster = yaml.safe_load(text("deploy/on_premises.yaml"))
    assert cluster["min_workers"] == cluster["max_workers"] == len(cluster["provider"]["worker_ips"])


def test_the_head_of_the_cloud_has_no_resources():
    cluster = yaml.safe_load(text("ray_cluster.yaml"))
    assert cluster["available_node_types"][cluster["head_node_type"]]["resources"] == {"CPU": 0, "GPU": 0}


# --- Kubernetes


def test_kubernetes_documents_have_known_fields():
    schema = yaml.safe_load((Path(__file__).parent / "fixtures" / "kubernetes.yaml").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    for document in KUBERNETES:
        own = schema | {"$ref": f"#/$defs/{document['kind']}"}
        del own["oneOf"]  # only one of them can match, and its own error says more
        jsonschema.validate(document, own, jsonschema.Draft202012Validator)


def test_mounts_name_volumes_and_volumes_name_what_is_there():
    claims = {claim["metadata"]["name"] for claim in BY_KIND["PersistentVolumeClaim"]}
    maps = {found["metadata"]["name"] for found in BY_KIND["ConfigMap"]}
    for pod in PODS:
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", ())}
        mounts = [mount["name"] for box in pod["spec"]["containers"] for mount in box.get("volumeMounts", ())]
        assert set(mounts) == volumes and len(mounts) == len(set(mounts))
    assert set(values(PODS, "claimName")) == claims
    assert {reference["name"] for reference in values(PODS, "configMap")} == maps
    assert all(claim["spec"]["accessModes"] == ["ReadWriteMany"] for claim in BY_KIND["PersistentVolumeClaim"])


def gigabytes(quantity: str) -> int:
    return int(re.fullmatch(r"(\d+)Gi", quantity)[1])


def test_every_node_has_shared_memory_for_its_object_store():
    for group in (HEAD, *WORKERS):
        pod = group["template"]["spec"]
        (memory,) = [volume["emptyDir"] for volume in pod["volumes"] if volume["name"] == "shared-memory"]
        assert memory["medium"] == "Memory"
        assert int(group["rayStartParams"]["object-store-memory"]) < gigabytes(memory["sizeLimit"]) * 2**30
        assert gigabytes(memory["sizeLimit"]) < gigabytes(pod["containers"][0]["resources"]["limits"]["memory"])
        paths = {mount["name"]: mount["mountPath"] for mount in pod["containers"][0]["volumeMounts"]}
        assert paths["shared-memory"] == "/dev/shm"
        assert paths["models"] == settings()["AUTOPRUNE_CACHE"]


def test_no_pod_has_more_rights_or_less_resources_than_it_says():
    for pod in PODS:
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False
        context = spec["securityContext"]
        assert context["runAsNonRoot"] and context["seccompProfile"] == {"type": "RuntimeDefault"}
        assert f"{context['runAsUser']}:{context['runAsGroup']}" == instructions("USER")[-1]
        for box in spec["containers"]:
            assert box["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert box["resources"]["requests"] == box["resources"]["limits"]


def test_a_retry_goes_on_and_gpus_are_enough():
    assert JOB["backoffLimit"] > 0 and "--resume auto" in JOB["entrypoint"]
    assert JOB["shutdownAfterJobFinishes"] is True and JOB["ttlSecondsAfterFinished"] > 0
    assert CLUSTER["authOptions"] == {"mode": "token"}
    assert HEAD["rayStartParams"]["num-cpus"] == HEAD["rayStartParams"]["num-gpus"] == "0"
    assert "nvidia.com/gpu" not in HEAD["template"]["spec"]["containers"][0]["resources"]["limits"]
    there = 0
    for group in WORKERS:
        assert group["replicas"] == group["minReplicas"] == group["maxReplicas"]
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        there += group["replicas"] * int(limits["nvidia.com/gpu"])
    config = embedded()
    evaluators, writer = config.evaluators, config.generator
    wanted = evaluators.replicas * evaluators.shards * evaluators.gpus_per_shard
    assert wanted + writer.engines * writer.tensor_parallel == there
    # The run lies where every node finds it, and a stopped one has time to be written.
    pod = HEAD["template"]["spec"]
    (box,) = pod["containers"]
    assert config.storage or config.runs in {m["mountPath"] for m in box["volumeMounts"] if m["name"] == "runs"}
    (wait,) = [int(v["value"]) for v in box["env"] if v["name"] == "RAY_JOB_STOP_WAIT_TIME_S"]
    assert 3 < wait < pod["terminationGracePeriodSeconds"]


def test_ray_start_takes_the_parameters_of_every_group():
    from ray.scripts.scripts import start

    known = {option for parameter in start.params for option in parameter.opts}
    for group in (HEAD, *WORKERS):
        assert {f"--{name}" for name in group["rayStartParams"]} <= known


def test_only_the_cluster_and_named_pods_reach_ray():
    (policy,) = BY_KIND["NetworkPolicy"]
    own = policy["spec"]["podSelector"]["matchLabels"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    assert all(own.items() <= pod["metadata"]["labels"].items() for pod in NODES)
    submitter = JOB["submitterPodTemplate"]["metadata"]["labels"]
    submits = False
    for rule in policy["spec"]["ingress"]:
        assert rule["from"], "from anywhere"
        for peer in rule["from"]:
            labels = peer["podSelector"]["matchLabels"]
            assert labels
            if labels != own:
                assert [port["port"] for port in rule["ports"]] in ([8265], [8080])
            submits |= labels.items() <= submitter.items() and rule.get("ports", [{}])[0].get("port") == 8265
    assert submits


# --- commands and configurations


def embedded() -> Config:
    (found,) = BY_KIND["ConfigMap"]
    config = build(Config, yaml.safe_load(found["data"]["search.yaml"]))
    check_config(config)
    return config


def test_embedded_configurations_load():
    assert embedded().target.dtype != "auto"  # decided on the head, which has no GPU
    for found in BY_KIND["ConfigMap"]:
        assert set(found["data"]) == {"search.yaml"}


@pytest.mark.parametrize("name", (*CLUSTERS, "deploy/rayjob.yaml", "deploy/runtime_env.yaml"))
def test_commands_of_ours_are_taken_with_their_configurations(name, tmp_path):
    found = [line.partition("python -m autoprune ")[2] for line in commands(name) if "python -m autoprune " in line]
    assert found
    (tmp_path / "search.yaml").write_text(BY_KIND["ConfigMap"][0]["data"]["search.yaml"])
    mounts = {mount["name"]: mount["mountPath"] for mount in HEAD["template"]["spec"]["containers"][0]["volumeMounts"]}
    for line in found:
        options = _parser().parse_args(shlex.split(line))
        inside = options.config.is_relative_to(mounts["configs"])
        path = tmp_path / options.config.relative_to(mounts["configs"]) if inside else ROOT / options.config
        config = load_config(path, options.set)
        assert options.resume == "auto"
        assert config.storage or config.runs == mounts["runs"], "the run would lie where only one machine sees it"


def test_commands_of_ray_are_taken():
    from ray.dashboard.modules.job.cli import submit

    jobs = 0
    for name in (*CLUSTERS, "deploy/runtime_env.yaml"):
        for line in commands(name):
            for file in re.findall(r"^ray (?:up|down|dashboard) (\S+)", line):
                assert file == name
            if "ray job submit " in line:
                words = shlex.split(line.partition("ray job submit ")[2])
                given = submit.make_context("submit", words).params
                assert given["address"] == "http://127.0.0.1:8265" and given["working_dir"] == "."
                assert (ROOT / given["runtime_env"]).is_file()
                jobs += 1
    assert jobs == 3


# --- what a job carries


def excludes() -> list[str]:
    return yaml.safe_load(text("deploy/runtime_env.yaml"))["excludes"]


def test_excludes_are_the_same_in_both_places():
    lines = [line for line in text(".rayignore").splitlines() if line and not line.startswith("#")]
    assert lines == excludes()


def test_ray_takes_the_runtime_environment():
    from ray.runtime_env import RuntimeEnv

    given = yaml.safe_load(text("deploy/runtime_env.yaml"))
    assert set(given) == {"excludes", "env_vars"}  # no pip, no conda: the image has everything
    RuntimeEnv(**given)


def test_a_job_carries_the_code_and_little_else(tmp_path):
    from ray._private.runtime_env.packaging import _get_excludes

    left_out = _get_excludes(ROOT, excludes())
    # Ray asks for the folder itself, and walks through it unless that is left out.
    for folder in (".git", ".venv", "runs", "mlruns", "tests", "docs/images", "bench/answers"):
        assert left_out(ROOT / folder), folder
    for name in ("pruned/model.safetensors", "model.gguf", ".env", "credentials.env", ".env.local"):
        assert left_out(ROOT / name), name
    done = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if done.returncode != 0:
        pytest.skip("not a git checkout")
    tracked = [ROOT / name for name in done.stdout.split("\0") if name and (ROOT / name).is_file()]
    carried = [path for path in tracked if not left_out(path)]
    needed = {*packages(), "configs"}
    assert not [path for path in tracked if path.relative_to(ROOT).parts[0] in needed and left_out(path)]
    assert sum(path.stat().st_size for path in carried) < UPLOAD
    for path in carried:
        copy = tmp_path / path.relative_to(ROOT)
        copy.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, copy)
    # -P: what is found is what was carried, not what lies in the folder from which this is called.
    read = "import autoprune.pipeline.cli, autoprune.models.errors as m; print(m.__file__)"
    command = [sys.executable, "-P", "-c", f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {read}"]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "models" / "errors.py")


# --- the image


def instructions(name: str) -> list[str]:
    """Arguments of a Dockerfile's instructions of this name, in order."""
    lines = re.sub(r"(?m)^\s*#.*\n", "", text("deploy/Dockerfile"))
    lines = re.sub(r"\s*\\\n\s*", " ", lines)
    known = "FROM|ENV|RUN|COPY|ARG|VOLUME|WORKDIR|USER|HEALTHCHECK|CMD|ENTRYPOINT"
    found = [re.fullmatch(rf"({known}) (.+)", line) for line in lines.splitlines() if line.strip()]
    assert all(found), "a line that is no instruction"
    return [match[2] for match in found if match[1] == name]


def settings() -> dict[str, str]:
    return dict(pair.partition("=")[::2] for line in instructions("ENV") for pair in shlex.split(line))


def test_the_image_is_made_of_what_is_here():
    stages = [line.partition(" AS ")[2] for line in instructions("FROM")]
    assert stages[-2:] == ["cpu", "gpu"]
    allowed = [line[1:] for line in text(".dockerignore").splitlines() if line.startswith("!")]
    assert text(".dockerignore").splitlines()[1] == "*"  # nothing else is sent to the builder
    copied = set()
    for line in instructions("COPY"):
        *sources, _target = shlex.split(line)
        if sources[0].startswith("--from="):
            assert sources[0].removeprefix("--from=") in stages
            continue
        for source in sources:
            assert (ROOT / source).exists(), source
            assert any(source == name or source.startswith(f"{name}/") for name in allowed), f"{source} is not sent"
            copied.add(source)
    assert packages() <= copied
    for name in allowed:
        assert any(fnmatch.fnmatch(source, f"{name}*") for source in copied), f"{name} is sent for nothing"


@pytest.mark.parametrize("target", ["cpu", "gpu"])
def test_what_is_locked_is_every_requirement_with_its_marker(target):
    spec = importlib.util.spec_from_file_location("lock", ROOT / "deploy" / "lock.py")
    spec.loader.exec_module(lock := importlib.util.module_from_spec(spec))
    found = lock.requirements(target)
    assert any(";" in line for line in found), "a marker is part of its line"
    pinned = text(f"deploy/locks/{target}.txt") + (text("deploy/locks/torch-cpu.txt") if target == "cpu" else "")
    assert all(re.search(rf"(?m)^{re.escape(lock.name_of(line))}==", pinned) for line in found)


def test_the_image_has_the_packages_of_the_locks():
    installs = [line for line in instructions("RUN") if "pip install" in line]
    used = []
    for line in installs:
        for command in line.split("||"):
            assert "--no-deps" in command
            lock = re.search(r"-r /locks/(\S+)", command)
            assert "--require-hashes" in command if lock else "/source" in command
            used += [lock[1]] if lock else []
    # Torch before the rest, and its CPU build before the index's own, as in the Makefile.
    assert used == ["torch-cpu.txt", "torch-indexed.txt", "cpu.txt", "gpu.txt"]
    assert all((ROOT / "deploy" / "locks" / name).is_file() for name in used)


def test_the_image_runs_as_nobody_special_with_what_others_call():
    assert instructions("USER") == ["1000:1000"] * 2
    assert not instructions("ENTRYPOINT") and not instructions("ARG")
    assert instructions("HEALTHCHECK") == ["NONE"]
    assert instructions("VOLUME") == [f'["{settings()["AUTOPRUNE_CACHE"]}"]']
    assert settings()["HOME"] == "/home/autoprune"  # Ray's launcher reads it there, and takes /root otherwise
    (system,) = [line for line in instructions("RUN") if "apt-get install" in line]
    for name in ("gcc", "g++", "libnuma1", "wget", "rsync", "openssh-client"):
        assert f" {name} " in system


# --- MLflow


def test_mlflow_takes_the_command():
    from mlflow.cli import server

    command = MLFLOW["services"]["server"]["command"]
    assert command[:2] == ["mlflow", "server"]
    given = server.make_context("server", [str(word) for word in command[2:]]).params
    assert given["app_name"] == "basic-auth"
    mounts = dict(volume.split(":")[::-1] for volume in MLFLOW["services"]["server"]["volumes"])
    assert given["artifacts_destination"] in mounts and MLFLOW["services"]["server"]["working_dir"] in mounts


def test_mlflow_has_no_password_of_ours_and_is_not_in_the_open():
    services = MLFLOW["services"]
    for service in services.values():
        assert service["healthcheck"]["test"]
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= MLFLOW["volumes"].keys()
        assert set(service["networks"]) <= MLFLOW["networks"].keys()
        for name, value in service["environment"].items():
            if re.search("PASSWORD|SECRET|KEY|URI", name):
                assert re.search(r"\$\{(\w+):\?set \1\}", value), f"{name} has a value without being set"
    assert "ports" not in services["database"] and MLFLOW["networks"]["inside"]["internal"]
    assert services["database"]["networks"] == ["inside"]
    (port,) = services["server"]["ports"]
    assert port.startswith("${MLFLOW_BIND:-127.0.0.1}:") and port.endswith(f":{services['server']['command'][7]}")
    hosts = services["server"]["environment"]["MLFLOW_SERVER_ALLOWED_HOSTS"]
    assert hosts == "${MLFLOW_ALLOWED_HOSTS:-localhost:*,127.0.0.1:*}"
    assert services["server"]["environment"]["MLFLOW_ALLOW_PICKLE_DESERIALIZATION"] == "false"


# --- all of them

CREDENTIAL = re.compile(
    r"AKIA[0-9A-Z]{12}|-----BEGIN|\bhf_\w{8}|\bsk-\w{8}|\bgh[ps]_\w{8}|://[^/\s:@]+:[^$/\s@]+@"
    r"|(?i:password|secret|token|api_?key)\w*[=:]\s*['\"]?(?!\$|set |required\b|true\b|false\b|token\b)\w{6}"
    r"|\b[0-9a-f]{32}"
)


@pytest.mark.parametrize("name", FILES)
def test_nothing_looks_like_a_credential(name):
    found = CREDENTIAL.search(text(name))
    assert not found, f"{name}: {found[0]}"


@pytest.mark.parametrize(
    "line",
    (
        "AWS_ACCESS_KEY_ID=AKIAABCDEFGHIJKLMNOP",
        "HF_TOKEN: hf_abcdefghijk",
        "MLFLOW_TRACKING_PASSWORD=password1234",
        "uri: postgresql://mlflow:mlflow1@database/mlflow",
        "auth_token: 0123456789abcdef0123456789abcdef",
        "RAY_AUTH_TOKEN=abcdefgh",
    ),
)
def test_what_looks_like_a_credential_is_found(line):
    assert CREDENTIAL.search(line)


@pytest.mark.parametrize("name", FILES)
def test_lines_are_short_and_yaml_is_indented_by_two(name):
    for line in text(name).splitlines():
        assert len(line) <= 120, line
        if name.endswith(".yaml"):
            assert "\t" not in line and (len(line) - len(line.lstrip(" "))) % 2 == 0, line
