"""Responses of a model to prompts, as data for its own alignment: `python -m train.self_generate CONFIG`.

Decodes by mask prediction, one {"index", "prompt_ids", "response_ids"} a line, with "passed" where the answers can be
judged (microcode); what made them stands beside, in NAME.about.json. Continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

from train.prompts import read_conversations
from train.setup import run_program
from xflow_jax.decoding import MaskPrediction, generate, make_decode_config
from xflow_jax.errors import UserError
from xflow_jax.lm import LM, load, read_model_config
from xflow_jax.parallel import make_mesh
from xflow_jax.sandbox import run_many
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import chat_ids, load_tokenizer
from xflow_jax.toml_config import load_toml
from xflow_jax.training import read_lines

# What may differ between the calls of one run.
FREE = ("out", "limit", "batch_size", "mesh")


@dataclasses.dataclass(frozen=True)
class SelfGenerateConfig:
    """A run of self-generation. prompts: a jsonl or parquet file with `prompt` or `messages`, a data set of the hub, or
    "microcode" for its training set.

    limit: of prompts; 0 = all. longest_prompt: in tokens, longer ones are left out; 0 = none is. steps: forward passes
    for the whole response, 0 = as many as tokens. mesh: "data,fsdp,tensor" of each process's own devices, or empty.
    """

    model: str
    prompts: str
    out: str
    limit: int = 2048
    longest_prompt: int = 0
    gen_length: int = 48
    block_length: int = 0
    steps: int = 0
    batch_size: int = 64
    temperature: float = 0.0
    confidence_eos_eot_inf: bool = False
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: str = ""

    def __post_init__(self) -> None:
        for name in ("gen_length", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but it must be at least 1")
        for name in ("limit", "longest_prompt", "block_length", "steps"):
            if getattr(self, name) < 0:
                raise UserError(f"{name} is {getattr(self, name)}, but it must not be negative")


def read_prompts(config: SelfGenerateConfig, tokenizer: Any) -> dict[int, list[int]]:
    """index in the data -> ids, of the first `limit` prompts that are not too long; UserError for bad ones."""
    if config.prompts == "microcode":
        asked = [problem.prompt for problem in microcode_problems(config)]
    else:
        asked = islice(read_conversations(config.prompts), config.limit or None)
    prompts = {index: chat_ids(tokenizer, one) for index, one in enumerate(asked)}
    longest = config.longest_prompt
    kept = {index: ids for index, ids in prompts.items() if not longest or len(ids) <= longest}
    if not kept:
        raise UserError(
            f"{config.prompts}: all of its {len(prompts)} prompts are longer than {longest} tokens"
        )
    if dropped := len(prompts) - len(kept):
        print(
            f"{dropped} of {len(prompts)} prompts have more than {longest} tokens and are left out"
        )
    return kept


def microcode_problems(config: SelfGenerateConfig) -> list[microcode.Problem]:
    """Requests of training compositions; with seeds from 1 on, since seed 0 is the one that rules are tuned on."""
    if not config.limit:
        raise UserError("limit is 0, but microcode's training set has no end; say how many prompts")
    return microcode.problems("train", config.limit, seed=config.seed + 1)


def judge(problems: list[microcode.Problem], texts: list[str]) -> list[bool]:
    """Whether the answers pass their problems' checks, run in the sandbox."""
    codes = [microcode.extract(text) for text in texts]
    jobs = [
        (code, microcode.checks(problem, code))
        for problem, code in zip(problems, codes, strict=True)
    ]
    return [result.passed for result in run_many(jobs)]


def main(path: str, overrides: list[str]) -> None:
    """Writes `out`; with several processes each answers its own prompts, on its own devices, into a file of its own."""
    config = load_toml(path, SelfGenerateConfig, overrides)
    # What can be told from files is told before any device is asked for anything.
    directory, model_config = read_model_config(config.model)
    tokenizer = load_tokenizer(directory)
    if tokenizer is None:
        raise UserError(
            f"{config.model} has no tokenizer.json, which self-generation needs for its prompts"
        )
    prompts = read_prompts(config, tokenizer)
    longest, blocks = max(map(len, prompts.values())), config.block_length or None
    steps = config.steps or config.gen_length
    make_decode_config(
        LM(None, model_config, None, tokenizer), longest, config.gen_length, steps, None, blocks
    )
    problems = microcode_problems(config) if config.prompts == "microcode" else []
    out = _own_file(Path(config.out))
    done = _resume(out, config)
    mine = [i for i in prompts if i % jax.process_count() == jax.process_index()]
    # Prompts of like length share a batch, so that little of it is padding.
    todo = sorted((i for i in mine if i not in done), key=lambda i: (len(prompts[i]), i))
    mesh = make_mesh(config.mesh, jax.local_devices()) if config.mesh else None
    lm = load(directory, dtype=config.dtype, mesh=mesh)
    rule = MaskPrediction(
        temperature=config.temperature, confidence_eos_eot_inf=config.confidence_eos_eot_inf
    )
    began, tokens = time.perf_counter(), 0
    with (
        out.open("a") as file,
        tqdm(
            total=len(mine), initial=len(mine) - len(todo), desc="self-generate", dynamic_ncols=True
        ) as bar,
    ):
        for first in range(0, len(todo), config.batch_size):
            batch = todo[first : first + config.batch_size]
            rows = [prompts[i] for i in batch]
            rows += rows[-1:] * (
                config.batch_size - len(rows)
            )  # one shape of the batch, one compilation
            made = generate(
                lm,
                rows,
                rule,
                gen_length=config.gen_length,
                steps=steps,
                block_length=blocks,
                seed=config.seed,
            )
            lines = [
                {"index": i, "prompt_ids": prompts[i], "response_ids": row}
                for i, row in zip(batch, made.tokens.tolist(), strict=False)
            ]
            if problems:
                verdicts = judge([problems[i] for i in batch], made.texts[: len(batch)])
                lines = [
                    line | {"passed": passed} for line, passed in zip(lines, verdicts, strict=True)
                ]
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            tokens += len(batch) * config.gen_length
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
    print(f"{out}: {len(mine)} responses")


def _own_file(out: Path) -> Path:
    """Where this process writes. UserError where another number of them has begun: prompts would be answered twice."""
    count = jax.process_count()
    own = (
        out
        if count == 1
        else out.with_suffix(f".{jax.process_index():05d}-of-{count:05d}{out.suffix}")
    )
    shards = list(out.parent.glob(f"{out.stem}.?????-of-?????{out.suffix}"))
    others = [file for file in shards if count == 1 or not file.stem.endswith(f"-of-{count:05d}")]
    others += [out] if count > 1 and out.exists() else []
    if others:
        raise UserError(
            f"{others[0]} was written by another number of processes than {count}; choose another out or remove it"
        )
    return own


def _resume(out: Path, config: SelfGenerateConfig) -> set[int]:
    """The indices that `out` has already; drops a line that a crash cut off, refuses the file of another run."""
    made_by = {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}
    about = out.with_suffix(".about.json")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        about.write_text(json.dumps(made_by, indent=2) + "\n")
        return set()
    before = json.loads(about.read_text()) if about.exists() else None
    if before != made_by:
        raise UserError(
            f"{out} was made with other settings, see {about}; choose another out or remove it"
        )
    lines = read_lines(out)
    temporary = out.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines))
    temporary.replace(out)
    return {json.loads(line)["index"] for line in lines}


if __name__ == "__main__":
    run_program(main, "python -m train.self_generate CONFIG [key=value ...]")
