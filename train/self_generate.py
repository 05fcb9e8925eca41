"""Self-generated data for the alignment: `python -m train.self_generate CONFIG`.

A line of the output looks like {"index": ..., "prompt_ids": [...], "response_ids": [...]}. It also
has "passed" if the prompts are of a task that judges answers. NAME.about.json beside it describes
the run, which continues where it stopped.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import jax
from tqdm import tqdm

from train.prompts import read_conversations
from train.setup import run_program
from xflow_jax.checkpoints import append_text, close_text, destination_lock, write_atomic
from xflow_jax.decoding import Rule, generate, make_decode_config, parse_rule
from xflow_jax.errors import UserError, require
from xflow_jax.evaluation import fingerprint
from xflow_jax.input_files import read_json, read_json_object, to_path
from xflow_jax.lm import LM, load, read_model_config
from xflow_jax.models import build
from xflow_jax.parallel import MERGE, WHOLE, Shard, make_mesh, parse_shard
from xflow_jax.sandbox import run_many
from xflow_jax.tasks import NAMES, Task, get_task
from xflow_jax.tokenizer import chat_ids, load_tokenizer
from xflow_jax.toml_config import load_toml
from xflow_jax.training import read_lines, read_records
from xflow_jax.types import Tokenizer

# Keys that may differ between the calls of one run.
FREE = ("out", "limit", "batch_size", "mesh", "shard")
WEIGHTS = "weights"  # key of the model's fingerprint in the description of a run


@dataclasses.dataclass(frozen=True)
class SelfGenerateConfig:
    """A run of self-generation.

    Attributes:
        model: directory or name of the model.
        prompts: a jsonl or parquet file with `prompt` or `messages`, a data set of the hub, or
            "microcode", "microcode-long" or "latin-square" for the training set of that task.
        out: the jsonl file.
        limit: number of prompts, 0 for all.
        longest_prompt: largest number of prompt tokens, 0 for no limit. Longer prompts are left
            out.
        gen_length: N, positions of a response.
        block_length: positions of a block, 0 for the default of the model.
        steps: forward passes for the whole response, 0 for one per token.
        rule: the decoding rule, as text.
        batch_size: B, prompts of a batch.
        temperature: temperature of the Gumbel noise that chooses tokens, for the rule "mask".
        confidence_eos_eot_inf: predict EOS and EoT with confidence 0.
        seed: seed of the noise and of a task's requests.
        dtype: dtype of the computation.
        mesh: sizes of data, fsdp and tensor of each process's own devices, or empty for one device.
        shard: share of an independent worker as i/n, or "auto" (`parallel.parse_shard`). Each
            worker writes its own file. "merge" makes `out` of all of them, and what they lack.

    Raises:
        UserError: if a value is out of range.
    """

    model: str
    prompts: str
    out: str
    limit: int = 2048
    longest_prompt: int = 0
    gen_length: int = 48
    block_length: int = 0
    steps: int = 0
    rule: str = "mask"
    batch_size: int = 64
    temperature: float = 0.0
    confidence_eos_eot_inf: bool = False
    seed: int = 0
    dtype: Literal["float32", "bfloat16"] = "float32"
    mesh: str = ""
    shard: str = ""

    def __post_init__(self) -> None:
        for name in ("gen_length", "batch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}, but it must be at least 1")
        for name in ("limit", "longest_prompt", "block_length", "steps"):
            value = getattr(self, name)
            require(value >= 0, f"{name} is {value}, but it must not be negative")


def read_prompts(config: SelfGenerateConfig, tokenizer: Tokenizer) -> dict[int, list[int]]:
    """Reads the first `limit` prompts, without those that are too long.

    Args:
        config: the configuration.
        tokenizer: tokenizer with a chat template.

    Returns:
        Index in the data -> token ids.

    Raises:
        UserError: if the data are bad, or if all prompts are too long.
    """
    conversations: Iterable[str | Sequence[dict[str, str]]]
    task = find_generated(config.prompts)
    if task is not None:
        conversations = [task.prompt(problem) for problem in training_problems(config, task)]
    else:
        conversations = islice(read_conversations(config.prompts), config.limit or None)
    prompts = {i: chat_ids(tokenizer, messages) for i, messages in enumerate(conversations)}
    longest = config.longest_prompt
    kept = {index: ids for index, ids in prompts.items() if not longest or len(ids) <= longest}
    require(
        bool(kept),
        f"{config.prompts}: all of its {len(prompts)} prompts are longer than {longest} tokens",
    )
    if dropped := len(prompts) - len(kept):
        print(
            f"{dropped} of {len(prompts)} prompts have more than {longest} tokens and are left out"
        )
    return kept


def find_generated(name: str) -> Task[Any] | None:
    """Returns the task of a name, if it generates its problems."""
    task = get_task(name) if name in NAMES else None
    return task if task is not None and task.generate is not None else None


def training_problems(config: SelfGenerateConfig, task: Task[Any]) -> Sequence[object]:
    """Makes training requests of a task.

    Args:
        config: the configuration. Seeds count from 1 here, because rules are tuned on seed 0.
        task: a task that generates its problems.

    Returns:
        `limit` requests.

    Raises:
        UserError: if there is no limit.
    """
    endless = f"limit is 0, but {task.name}'s training set has no end. Set a limit."
    require(config.limit > 0, endless)
    assert task.generate is not None
    return task.generate("train", config.limit, config.seed + 1)


def judge(task: Task[Any], problems: Sequence[object], texts: Sequence[str]) -> list[bool]:
    """Runs answers in the sandbox.

    Args:
        task: the task.
        problems: its problems.
        texts: an answer to each.

    Returns:
        True for answers that pass the checks of their problems.
    """
    jobs = [task.job(*pair) for pair in zip(problems, texts, strict=True)]
    return [result.passed for result in run_many(jobs, task.config.limits)]


def decoding_rule(config: SelfGenerateConfig) -> Rule:
    """Returns the rule that decodes the responses.

    Args:
        config: the configuration.

    Raises:
        UserError: for an unknown rule or option.
    """
    names = ("temperature", "confidence_eos_eot_inf")
    defaults = [(name, getattr(config, name)) for name in names]
    return parse_rule(config.rule, defaults)[1]


def main(path: str, overrides: list[str]) -> None:
    """Writes the responses.

    Each of several processes answers its own prompts on its own devices, and writes its own file.

    Args:
        path: TOML file of a SelfGenerateConfig.
        overrides: texts like "key=value".

    Raises:
        UserError: for bad input. That of files is found before any device is used.
    """
    config = load_toml(path, SelfGenerateConfig, overrides)
    directory, model_config = read_model_config(config.model)
    tokenizer = load_tokenizer(directory, model_config.chat_template)
    if tokenizer is None:
        raise UserError(
            f"{config.model} has no tokenizer.json, which self-generation needs for its prompts"
        )
    decoding_rule(config)
    prompts = read_prompts(config, tokenizer)
    # Lengths and steps are checked without parameters.
    unloaded = LM(build(model_config), model_config, {}, tokenizer)
    make_decode_config(
        unloaded,
        max(map(len, prompts.values())),
        config.gen_length,
        config.steps or config.gen_length,
        None,
        config.block_length or None,
    )
    mesh = make_mesh(config.mesh, jax.local_devices()) if config.mesh else None
    merges = config.shard == MERGE
    share = parse_shard("" if merges else config.shard)
    if share == WHOLE and not merges:
        share = Shard(jax.process_index(), jax.process_count())
    out = to_path(config.out) if merges else _own_file(to_path(config.out), share)
    own = {i: ids for i, ids in prompts.items() if share.takes(i)}
    with destination_lock(out):  # each process has its own file and its own lock
        done = _resume(out, config, own)
        if merges:
            done |= _take_shards(out, config, own, done)
        lm = load(directory, dtype=config.dtype, mesh=mesh)
        _check_weights(out, config, lm)
        _generate(config, lm, own, done, out)
        close_text(out)
    print(f"{out}: {len(own)} responses")


def _generate(
    config: SelfGenerateConfig, lm: LM, prompts: Mapping[int, list[int]], done: set[int], out: Path
) -> None:
    """Appends the missing responses to the file, batch by batch."""
    task = find_generated(config.prompts)
    problems = [] if task is None else training_problems(config, task)
    # Prompts of similar length share a batch, so that it has little padding.
    todo = sorted((i for i in prompts if i not in done), key=lambda i: (len(prompts[i]), i))
    start, tokens = time.perf_counter(), 0
    with tqdm(
        total=len(prompts),
        initial=len(prompts) - len(todo),
        desc="self-generate",
        dynamic_ncols=True,
    ) as bar:
        for first in range(0, len(todo), config.batch_size):
            batch = todo[first : first + config.batch_size]
            responses, texts = _decode(config, lm, [prompts[i] for i in batch])
            lines: list[dict[str, object]] = [
                {"index": i, "prompt_ids": prompts[i], "response_ids": response}
                for i, response in zip(batch, responses, strict=True)
            ]
            if task is not None:
                passed = judge(task, [problems[i] for i in batch], texts)
                lines = [line | {"passed": p} for line, p in zip(lines, passed, strict=True)]
            append_text(out, "".join(json.dumps(line) + "\n" for line in lines))
            tokens += len(batch) * config.gen_length
            bar.update(len(batch))
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s")


def _decode(
    config: SelfGenerateConfig, lm: LM, rows: list[list[int]]
) -> tuple[list[list[int]], list[str]]:
    """Returns (token ids, texts) of the responses to a batch of prompts."""
    out = generate(
        lm,
        # With one shape for all batches there is one compilation.
        rows + rows[-1:] * (config.batch_size - len(rows)),
        decoding_rule(config),
        gen_length=config.gen_length,
        steps=config.steps or config.gen_length,
        block_length=config.block_length or None,
        seed=config.seed,
    )
    return out.tokens.tolist()[: len(rows)], (out.texts or [])[: len(rows)]


def _own_file(out: Path, share: Shard) -> Path:
    """Returns the file that this process writes.

    Raises UserError for files of another number of processes, because prompts would be answered
    twice.
    """
    count = share.count
    own = out if count == 1 else out.with_suffix(f".{share.name}{out.suffix}")
    shards = _shard_files(out)
    others = [file for file in shards if count == 1 or not file.stem.endswith(f"-of-{count:05d}")]
    others += [out] if count > 1 and out.exists() else []
    if others:
        raise UserError(
            f"{others[0]} was written by another number of processes than {count}. Choose another "
            "out, or remove the file."
        )
    return own


def _shard_files(out: Path) -> list[Path]:
    """Returns the files of several processes or workers."""
    return sorted(out.parent.glob(f"{out.stem}.?????-of-?????{out.suffix}"))


def _take_shards(
    out: Path, config: SelfGenerateConfig, prompts: Mapping[int, list[int]], done: set[int]
) -> set[int]:
    """Appends the workers' responses in the order of a single process."""
    lines: dict[int, str] = {}
    about, weights = out.with_suffix(".about.json"), {}
    for file in _shard_files(out):
        _read_indices(file, config, prompts)  # checks its configuration and its prompts
        lines |= {json.loads(line)["index"]: line for line in read_lines(file)}
        weights[read_json_object(file.with_suffix(".about.json")).get(WEIGHTS)] = file
    if not lines:
        raise UserError(f"{out}: no file of a worker is beside it. Run with shard=i/n before.")
    if len(weights) > 1:
        raise UserError(f"{' and '.join(map(str, weights.values()))} were made with other weights")
    write_atomic(about, json.dumps({**read_json_object(about), WEIGHTS: [*weights][0]}) + "\n")
    new = sorted(lines.keys() - done, key=lambda i: (len(prompts[i]), i))
    append_text(out, "".join(lines[i] + "\n" for i in new))
    return set(new)


def _check_weights(out: Path, config: SelfGenerateConfig, lm: LM) -> None:
    """Raises UserError if the responses so far are of other weights."""
    about = out.with_suffix(".about.json")
    before = read_json_object(about)
    weights = fingerprint(lm.params)
    if before.get(WEIGHTS, weights) != weights:
        raise UserError(
            f"{out} was made with other weights than {config.model} has now. Choose another out, "
            "or remove the file."
        )
    if WEIGHTS not in before:
        write_atomic(about, json.dumps({**before, WEIGHTS: weights}, indent=2) + "\n")


def _resume(out: Path, config: SelfGenerateConfig, prompts: Mapping[int, list[int]]) -> set[int]:
    """Returns the indices that are in the file already.

    It removes a line that a crash cut off, and raises UserError for the file of another run or of
    other prompts.
    """
    if not out.exists():
        about = json.dumps(_made_by(config), indent=2) + "\n"
        write_atomic(out.with_suffix(".about.json"), about)
        write_atomic(out, "")
        return set()
    done = _read_indices(out, config, prompts)
    write_atomic(out, "".join(line + "\n" for line in read_lines(out)))
    return done


def _made_by(config: SelfGenerateConfig) -> dict[str, object]:
    return {k: v for k, v in dataclasses.asdict(config).items() if k not in FREE}


def _read_indices(
    out: Path, config: SelfGenerateConfig, prompts: Mapping[int, list[int]]
) -> set[int]:
    """Returns the indices in a file.

    Raises UserError for the file of another run or of other prompts.
    """
    made_by, about = _made_by(config), out.with_suffix(".about.json")
    before = read_json(about) if about.exists() else None
    if isinstance(before, dict):  # earlier versions had no rules
        before = {"rule": SelfGenerateConfig.rule} | before
    if not isinstance(before, dict) or {k: before[k] for k in before if k != WEIGHTS} != made_by:
        raise UserError(
            f"{out} was made with another configuration, see {about}. Choose another out, or "
            "remove the file."
        )
    done = set()
    for where, line in read_records(out):
        if not isinstance(line, dict) or not isinstance(line.get("index"), int):
            raise UserError(f"{where}: no response with an index. Correct or remove the line.")
        if line.get("prompt_ids") != prompts.get(line["index"], line.get("prompt_ids")):
            raise UserError(
                f"{where}: the prompts have changed since. Choose another out, or remove the file."
            )
        done.add(line["index"])
    return done


if __name__ == "__main__":
    run_program(main, "python -m train.self_generate CONFIG [key=value ...]")
