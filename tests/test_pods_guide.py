"""Every command of the guide to pods and of configs/launch/, on a bucket and with small models.

Scripts run as they are, with programs of the cluster that this file writes. Of files for Kubernetes
and Cloud TPU, and of comments, the commands run.
"""

from __future__ import annotations

import dataclasses
import gzip
import json
import math
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

import jax
import pytest

from tests.gcs_helpers import BUCKET, bucket_server, use_server
from tests.process_helpers import PATIENCE
from tests.test_docs import fences
from tests.train.test_launch import LAUNCH, commands, documents
from xflow_jax.checkpoints import write_hf
from xflow_jax.input_files import object_sizes, to_path
from xflow_jax.models import PRESETS, build, init_params
from xflow_jax.tokenizer import load_tokenizer
from xflow_jax.types import ModelConfig

ROOT = Path(__file__).parents[1]
GUIDE = ROOT / "docs" / "guides" / "pods.md"
TINY = ROOT / "xflow_jax" / "tiny"
pytestmark = pytest.mark.slow

# What a small run adds to the command of a program.
SMALL = {
    "convert.from_hf": "",
    "convert.to_hf": "",
    "train.self_generate": "prompts=prompts.jsonl limit=40 gen_length=32 steps=2 batch_size=8",
    "train.pretrain": "model.d_model=16 model.n_layers=1 model.n_heads=2 batch_size=4 steps=8 "
    "save_every=8 evaluate_every=8 evaluate_problems=4",
    "train.align": "prompt_length=64 gen_length=32 batch_size=8 accumulate=1 steps=2 held_out=8 "
    "log_every=1 save_every=1",
    "train.grpo": "solved_only=false budget=1/32 prompts_per_step=2 group_size=2 steps=2 "
    "problems=4 evaluate_every=2 evaluate_problems=2 batch_size=2 save_every=1",
    "xflow_jax evaluate": "--set gen_length=32 --limit 2 --budgets 1/16",
    "xflow_jax generate": "--gen-length 32",
    "xflow_jax plan": "",
    "xflow_jax serve": "--slots 2 --gen-lengths 32 --prompt-lengths 64 --port 0",
}
# Files whose results another one reads.
NEEDS = {
    "gke_align.yaml": ["gke_convert.yaml", "gke_self_generate.yaml"],
    "gke_self_generate.yaml": ["gke_convert.yaml"],
    "gke_serve.yaml": ["gke_convert.yaml"],
    "skypilot_align.yaml": ["gke_convert.yaml", "gke_self_generate.yaml"],
    "skypilot_serve.yaml": ["gke_convert.yaml"],
    "slurm_evaluate.sbatch": ["slurm_convert.sbatch"],
    "slurm_grpo.sbatch": ["slurm_convert.sbatch"],
    "tpu_pod.sh": ["gke_convert.yaml", "gke_self_generate.yaml"],
}
VARIABLES = {
    "gke_self_generate.yaml": {"JOB_COMPLETION_INDEX": "0", "JOB_COMPLETIONS": "2"},
    "slurm_evaluate.sbatch": {"SLURM_ARRAY_TASK_ID": "0", "SLURM_ARRAY_TASK_COUNT": "8"},
    "slurm_grpo.sbatch": {"SLURM_JOB_ID": str(os.getpid())},  # from which JAX makes a port
}
# As the guide starts the first of two processes.
PROCESSES = "JAX_COORDINATOR_ADDRESS=10.0.0.1:1234 JAX_NUM_PROCESSES=2 JAX_PROCESS_ID=0"
# Two tasks on this machine, as two nodes would have them.
SRUN = """#!/bin/bash
export SLURM_NTASKS=2 SLURM_STEP_NUM_NODES=2 SLURM_STEP_NODELIST=localhost SLURM_LOCALID=0
SLURM_PROCID=1 "$@" & other=$!
SLURM_PROCID=0 "$@" && wait "$other"
"""


def write_models(work: Path) -> None:
    """Writes random models with the names of the hub, which are folders then."""
    tokenizer = load_tokenizer(TINY)
    assert tokenizer is not None
    sizes = {
        "vocab_size": 448,
        "mask_token_id": tokenizer.get_vocab()["<|mdm_mask|>"],
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    llada = {"d_model": 16, "n_layers": 1, "n_heads": 2, "n_kv_heads": 2, "mlp_hidden_size": 16}
    mini = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    mini |= {"num_key_value_heads": 2, "head_dim": 8, "intermediate_size": 16, "num_experts": 4}
    mini |= {"moe_intermediate_size": 8, "num_experts_per_tok": 2, "n_group": 2, "topk_group": 1}
    models: dict[str, ModelConfig] = {
        "GSAI-ML/LLaDA-8B-Instruct": dataclasses.replace(
            PRESETS["llada-8b"], **sizes, **llada, embedding_size=448
        ),
        "inclusionAI/LLaDA2.1-mini": dataclasses.replace(PRESETS["llada2.1-mini"], **sizes, **mini),
    }
    for name, config in models.items():
        params = init_params(build(config), jax.random.key(0))
        write_hf(work / name, params, config, TINY)


def write_data(work: Path) -> None:
    """Writes prompts and problems with the names in the commands."""
    prompts = [{"prompt": f"sum of {i}"} for i in range(40)]
    (work / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in prompts))
    problems = [
        {
            "task_id": i,
            "text": "Add one.",
            "code": "def f(x):\n  return x + 1",
            "test_list": ["assert f(1) == 2"],
            "test_setup_code": "",
        }
        for i in (*range(2, 5), *range(11, 15), *range(601, 613))
    ]
    (work / "mbpp.jsonl").write_text("".join(json.dumps(line) + "\n" for line in problems))
    (to_path(f"gs://{BUCKET}/guide") / "mbpp.jsonl").write_text((work / "mbpp.jsonl").read_text())
    human = [
        {
            "task_id": f"HumanEval/{i}",
            "prompt": "def f(x):\n",
            "entry_point": "f",
            "canonical_solution": "  return x + 1\n",
            "test": "def check(f):\n  assert f(1) == 2\n",
        }
        for i in range(3)
    ]
    with gzip.open(work / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(line) + "\n" for line in human)


class Cluster:
    """A folder in which the commands run, with what they expect around them.

    Attributes:
        work: the folder.
        done: names of the files whose commands have run.
    """

    def __init__(self, work: Path) -> None:
        self.work, self.done = work, set[str]()
        for name in ("configs", "convert", "train", "xflow_jax"):  # as in a checkout
            (work / name).symlink_to(ROOT / name)
        python = f'#!/bin/sh\nexec {sys.executable} "$@"\n'
        programs = {"bin/python": python, ".venv/bin/python": python}
        programs |= {"bin/srun": SRUN, "bin/scontrol": '#!/bin/sh\necho "$@" >>scontrol.log\n'}
        for name, text in programs.items():
            (work / name).parent.mkdir(parents=True, exist_ok=True)
            (work / name).write_text(text)
            (work / name).chmod(0o755)

    def environment(self, devices: int, variables: Mapping[str, str]) -> dict[str, str]:
        flags = f"--xla_force_host_platform_device_count={devices}"
        return os.environ | {
            "PATH": f"{self.work}/bin:{os.environ['PATH']}",
            "SCRATCH": str(self.work / "scratch"),
            "XLA_FLAGS": f"{flags} --xla_backend_optimization_level=0",
            # Commands share what they have compiled.
            "JAX_ENABLE_COMPILATION_CACHE": "true",
            "JAX_COMPILATION_CACHE_DIR": str(self.work / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            **variables,
        }

    def run(self, text: str, variables: Mapping[str, str], tasks: int = 1) -> None:
        """Runs commands, or one after the other all commands of a script.

        Args:
            text: the commands.
            variables: environment variables.
            tasks: number of connected processes that a command has, between which the devices of
                its mesh are divided.
        """
        text, devices = small(text)
        environment = self.environment(max(1, devices // tasks), variables)
        if " serve " in text:
            serve(text, self.work, environment)
            return
        run = subprocess.run(
            ["bash", "-e", "-c", text],
            cwd=self.work,
            env=environment,
            timeout=PATIENCE,
            capture_output=True,
            text=True,
        )
        assert run.returncode == 0, f"{text}\n{run.stdout[-3000:]}\n{run.stderr[-3000:]}"

    def run_file(self, file: Path) -> None:
        """Runs the commands of a file of configs/launch/, after those of the files it needs."""
        if file.name in self.done:
            return
        for name in NEEDS.get(file.name, ()):
            self.run_file(file.with_name(name))
        variables, text = VARIABLES.get(file.name, {}), file.read_text()
        # That of gke_align.yaml would only be continued.
        text = text.replace("out=gs://my-bucket/align", "out=gs://BUCKET/align_pod")
        text = text.replace("gs://my-bucket", "gs://BUCKET")
        if file.name in ("slurm_grpo.sbatch", "skypilot_align.yaml"):
            if file.suffix == ".sbatch":
                self.run(text.replace("set -u", "set -eu"), variables, tasks=2)
            else:
                self.run(two_nodes(documents(file)[0]["run"]), variables, tasks=2)
            text = "".join(f"{line}\n" for line in text.splitlines() if line[:1] == "#")
        for words in commands(text):
            command = f"python -m {shlex.join(words)}".replace("/scratch/", f"{self.work}/scratch/")
            self.run(command, variables)
            if "shard=auto" in words or "--shard" in words:
                self.run(re.sub(r"(shard[= ])auto", r"\1merge", command), {})
        self.done.add(file.name)


def two_nodes(script: str) -> str:
    """Returns a script that runs SkyPilot's script on two nodes at once, which are this machine."""
    script = script.replace(":1234", f":{free_port()}")
    nodes = "export SKYPILOT_NUM_NODES=2 SKYPILOT_NODE_IPS=127.0.0.1"
    one, other = (f"(export SKYPILOT_NODE_RANK={rank}\n{script})" for rank in (1, 0))
    return f"{nodes}\n{one} & other=$!\n{other} && wait $other"


def small(text: str) -> tuple[str, int]:
    """Returns commands with small shapes and the places of the test, and their largest mesh."""
    text = re.sub(r"\\\n(?:# *)?", " ", text)
    text = re.sub(r"^#.*$", "", text, flags=re.MULTILINE)
    text = re.sub(r"\bxflow (?=[a-z])", "python -m xflow_jax ", text)
    text = text.replace("gs://BUCKET", f"gs://{BUCKET}/launch")
    text = text.replace("gs://my-bucket", f"gs://{BUCKET}/guide")
    devices = [1]

    def shrink(match: re.Match[str]) -> str:
        sizes = [min(int(size), 2) for size in match[2].split(",")]
        devices.append(math.prod(sizes))
        return match[1] + ",".join(map(str, sizes))

    if " plan " not in text:
        text = re.sub(r"(mesh[= ])(\d+,\d+,\d+)", shrink, text)
    program = re.compile(r"(-m (xflow_jax \w+|(?:train|convert)\.\w+) .*?)(\s+#.*)?$", re.MULTILINE)

    def shorten(match: re.Match[str]) -> str:
        own = match[2] == "train.self_generate" and "mesh=" not in match[1]
        return f"{match[1]} {SMALL[match[2]]}{' mesh=1,1,1' if own else ''}"

    return program.sub(shorten, text), max(devices)


def serve(command: str, work: Path, environment: Mapping[str, str]) -> None:
    """Starts a server, sends a request, and ends it with SIGTERM."""
    environment = {**environment, "XFLOW_API_KEY": "secret"}
    with (work / "serve.log").open("w+") as log:
        server = subprocess.Popen(
            ["bash", "-c", f"exec {command.strip()}"],
            cwd=work,
            env=environment,
            stdout=log,
            stderr=log,
        )
        try:
            text, end = "", time.monotonic() + PATIENCE
            while not (found := re.search(r"ready after .* at http://\S+:(\d+)", text)):
                assert server.poll() is None and time.monotonic() < end, text[-3000:]
                time.sleep(0.1)
                text = (work / "serve.log").read_text()
            url = f"http://127.0.0.1:{found[1]}/v1/completions"
            data = json.dumps({"prompt": "sum", "max_tokens": 8}).encode()
            headers = {"Authorization": "Bearer secret", "Content-Type": "application/json"}
            with urllib.request.urlopen(
                urllib.request.Request(url, data, headers), timeout=PATIENCE
            ) as answer:
                assert json.load(answer)["choices"]
            server.send_signal(signal.SIGTERM)
            assert server.wait(PATIENCE) == 0
        finally:
            server.kill()
            server.wait()


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory) -> Iterator[Cluster]:
    work = tmp_path_factory.mktemp("cluster")
    with bucket_server(work) as variables:
        use_server(variables)
        write_models(work)
        write_data(work)
        yield Cluster(work)


@pytest.mark.parametrize("file", LAUNCH, ids=lambda file: file.name)
def test_the_commands_of_a_launch_file_run(cluster, file):
    cluster.run_file(file)


def guide_commands() -> list[str]:
    """Returns the commands of the guide in its order, without those that install."""
    text = "".join(fences(GUIDE.read_text(), "bash"))
    lines = re.sub(r"\\\n", " ", text).splitlines()
    found = [line for line in lines if line and not line.startswith(("pip install", "gcloud"))]
    # Those with --topology compile for minutes. tests/planning compiles smaller ones.
    return [line for line in found if "--topology" not in line]


def test_the_commands_of_the_guide_run(cluster):
    for line in guide_commands():
        tasks = 1
        if "tpu_pod.sh" in line:
            line = f"{PROCESSES} {line[line.index('python -m') :]}"
        if PROCESSES in line:
            tasks = 2
            line = line.replace("10.0.0.1:1234", f"127.0.0.1:{free_port()}")
            other = line.replace("JAX_PROCESS_ID=0", "JAX_PROCESS_ID=1")
            line = f"(\n{other}\n) & other=$!\n(\n{line}\n) && wait $other"
        cluster.run(line, {}, tasks)
    sizes = object_sizes(to_path(f"gs://{BUCKET}/guide"))
    wanted = ("llada-8b/files.json", "llada-8b-hf/config.json", "align/model/files.json")
    wanted += ("evaluate/table.md", "run/table.md", "shared/table.md", "shared/responses.jsonl")
    for name in wanted:
        assert name in sizes, name
    assert any(name.endswith(".xplane.pb") for name in sizes)
