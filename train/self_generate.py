"""Responses of a model to prompts, as data for its own alignment: `python -m train.self_generate CONFIG`.

Decodes by mask prediction, one {"index", "prompt_ids", "response_ids"} a line, with "passed" where the answers can be
judged (microcode), and continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from train.setup import run_program
from xflow_jax.config import UserError, load_toml
from xflow_jax.data import read_lines
from xflow_jax.generate import generate
from xflow_jax.lm import load
from xflow_jax.rules import MaskPrediction
from xflow_jax.sandbox import run_many
from xflow_jax.sharding import make_mesh
from xflow_jax.tasks import microcode
from xflow_jax.tokenizer import chat_ids


@dataclasses.dataclass(frozen=True)
class SelfGenerateConfig:
    """A run of self-generation. prompts: a jsonl file with `prompt` or `messages`, or "microcode" for its training set.

    steps: forward passes for the whole response, 0 = as many as tokens. mesh: "data,fsdp,tensor", empty for one device.
    """

    model: str
    prompts: str
    out: str
    limit: int = 2048
    gen_length: int = 48
    block_length: int = 0
    steps: int = 0
    batch_size: int = 64
    temperature: float = 0.0
    confidence_eos_eot_inf: bool = False
    seed: int = 0
    dtype: str = "float32"
    mesh: str = ""


def read_prompts(config: SelfGenerateConfig, tokenizer: Any) -> list[list[int]]:
    """The prompts as ids, the first `limit` of them. UserError names the file and line of a bad one."""
    if config.prompts == "microcode":
        return [chat_ids(tokenizer, problem.prompt) for problem in microcode_problems(config)]
    rows = []
    for number, line in enumerate(read_lines(config.prompts), start=1):
        where = f"{config.prompts}, line {number}"
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{where} is no JSON: {error}") from None
        asked = record.get("messages", record.get("prompt")) if isinstance(record, dict) else None
        if not asked:
            raise UserError(f"{where} has neither `prompt` nor `messages`")
        if isinstance(asked, list) and asked[-1]["role"] == "assistant":
            asked = asked[:-1]  # the answer of the data set: ours takes its place
        rows.append(chat_ids(tokenizer, asked))
    if not rows:
        raise UserError(f"{config.prompts}: no prompts in it")
    return rows[: config.limit]


def microcode_problems(config: SelfGenerateConfig) -> list[microcode.Problem]:
    """Requests of training compositions; with seeds from 1 on, since seed 0 is the one that rules are tuned on."""
    return microcode.problems("train", config.limit, seed=config.seed + 1)


def judge(problems: list[microcode.Problem], texts: list[str]) -> list[bool]:
    """Whether the answers pass their problems' checks, run in the sandbox."""
    codes = [microcode.extract(text) for text in texts]
    jobs = [(code, microcode.checks(problem, code)) for problem, code in zip(problems, codes, strict=True)]
    return [result.passed for result in run_many(jobs)]


def main(path: str, overrides: list[str]) -> None:
    """Writes `out`; with several processes each writes its own rows to a file of its own."""
    config = load_toml(path, SelfGenerateConfig, overrides)
    lm = load(config.model, dtype=config.dtype, mesh=make_mesh(config.mesh) if config.mesh else None)
    if lm.tokenizer is None:
        raise UserError(f"{config.model} has no tokenizer.json, which self-generation needs for its prompts")
    prompts = read_prompts(config, lm.tokenizer)
    problems = microcode_problems(config) if config.prompts == "microcode" else []
    out = Path(config.out)
    if jax.process_count() > 1:
        out = out.with_suffix(f".{jax.process_index():05d}-of-{jax.process_count():05d}{out.suffix}")
    done = _resume(out, config)
    mine = range(jax.process_index(), len(prompts), jax.process_count())
    # Prompts of like length share a batch, so that little of it is padding.
    todo = sorted((i for i in mine if i not in done), key=lambda i: (len(prompts[i]), i))
    rule = MaskPrediction(temperature=config.temperature, confidence_eos_eot_inf=config.confidence_eos_eot_inf)
    began, tokens = time.perf_counter(), 0
    with out.open("a") as file, tqdm(total=len(mine), initial=len(mine) - len(todo), desc="self-generate") as bar:
        for first in range(0, len(todo), config.batch_size):
            batch = todo[first : first + config.batch_size]
            rows = [prompts[i] for i in batch]
            rows += rows[-1:] * (config.batch_size - len(rows))  # one shape of the batch, one compilation
            made = generate(
                lm,
                rows,
                rule,
                gen_length=config.gen_length,
                steps=config.steps or config.gen_length,
                block_length=config.block_length or None,
                seed=config.seed,
            )
            lines = [
                {"index": i, "prompt_ids": prompts[i], "response_ids": row}
                for i, row in zip(batch, made.tokens.tolist(), strict=False)
            ]
            if problems:
                verdicts = judge([problems[i] for i in batch], made.texts[: len(batch)])
                lines = [line | {"passed": passed} for line, passed in zip(lines, verdicts, strict=True)]
            file.write("".join(json.dumps(line) + "\n" for line in lines))
            file.flush()
            tokens += len(batch) * config.gen_length
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - began):.0f} tokens/s")
    print(f"{out}: {len(mine)} responses")


def _resume(out: Path, config: SelfGenerateConfig) -> set[int]:
    """The indices that `out` has already; drops a line that a crash cut off, refuses the file of another run."""
    made_by = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("out", "limit", "batch_size", "mesh")}
    about = out.with_suffix(".about.json")
    if not out.exists():
        out.parent.mkdir(parents=True, exist_ok=True)
        about.write_text(json.dumps(made_by, indent=2) + "\n")
        return set()
    before = json.loads(about.read_text()) if about.exists() else None
    if before != made_by:
        raise UserError(f"{out} was made with other settings, see {about}; choose another out or remove it")
    lines = read_lines(out)
    temporary = out.with_suffix(".tmp")
    temporary.write_text("".join(line + "\n" for line in lines))
    temporary.replace(out)
    return {json.loads(line)["index"] for line in lines}


if __name__ == "__main__":
    run_program(main, "python -m train.self_generate CONFIG [key=value ...]")
