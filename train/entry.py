"""Supervised training of an entry policy: `python -m train.entry configs/entry_latin_square.toml`.

The model is frozen. It answers training requests at many thresholds, and the answers are judged.
A small policy learns from these decodes which masks may enter together. Afterwards
`flow:policy=FILE,jump=0.8` decodes with a threshold on its learned confidence.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

from train.grpo_sampler import parse_flow
from train.run import Run
from train.setup import run_program
from xflow_jax.decoding import (
    DecodeConfig,
    EntryPolicy,
    adapt_loop,
    check_entry_ranges,
    decode_batch,
    init_entry_policy,
    make_decode_config,
    pad_prompts,
    parse_budget,
    parse_rule,
    row_keys,
    save_policy,
)
from xflow_jax.errors import require
from xflow_jax.evaluation import fingerprint, make_cells
from xflow_jax.input_files import to_path
from xflow_jax.lm import LM, load
from xflow_jax.sandbox import Pool
from xflow_jax.tasks import Task, get_task
from xflow_jax.tokenizer import chat_ids, decode_responses
from xflow_jax.toml_config import load_toml
from xflow_jax.training import (
    EntryLabels,
    Explorer,
    Teacher,
    TrainState,
    make_entry_step,
    rollout,
    target_states,
    verdict_states,
)
from xflow_jax.types import Metrics

States = dict[str, np.ndarray]
GOLDEN = (5**0.5 - 1) / 2  # multiples of it, modulo 1, fill (0, 1) evenly


@dataclasses.dataclass(frozen=True)
class EntryConfig:
    """A run of supervised training.

    Attributes:
        model: directory or name of the model.
        out: folder of the run.
        task: the task of the requests.
        protocol: changes of its protocol, such as "block_length=48".
        problems: number of training requests.
        decodes: decodes of each request.
        labels: "verdict" of the answer, or agreement with a right answer, the "target".
        target_rule: rule that makes the targets at full budget.
        thresholds: smallest and largest threshold. Each batch has its own.
        budget: largest share of the full number of steps in a decode.
        switches: options of the flow, as in flow:SWITCHES.
        width: d, neurons of a layer.
        above: learned confidence above which a mask enters, if a flow does not say otherwise.
        temperature: of the draws of decodes with the label "verdict".
        steps: updates.
        states: states of a batch.
        rate: learning rate at the beginning. It falls to 0 as a cosine.
        clip: largest global norm of the gradients.
        log_every: updates between lines of metrics.
        save_every: updates between checkpoints.
        batch_size: decodes of a batch.
        dtype: dtype of the model.
        seed: seed of the policy, the decodes and the batches.

    Raises:
        UserError: if a value is out of range.
    """

    model: str
    out: str
    task: str = "latin-square"
    protocol: tuple[str, ...] = ()
    problems: int = 1536
    decodes: int = 1
    labels: EntryLabels = "verdict"
    target_rule: str = "threshold:tau=0.98"
    thresholds: tuple[float, float] = (0.15, 0.9)
    budget: str = "1/2"
    switches: str = "early_exit=true,reedit_margin=none"
    width: int = 32
    above: float = 0.9
    temperature: float = 0.5
    steps: int = 800
    states: int = 256
    rate: float = 3e-3
    clip: float = 1.0
    log_every: int = 10
    save_every: int = 50
    batch_size: int = 64
    dtype: Literal["float32", "bfloat16"] = "float32"
    seed: int = 0

    def __post_init__(self) -> None:
        counts = ("decodes", "steps", "states", "log_every", "save_every", "batch_size")
        for name in counts:
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}, but it must be at least 1")
        for name in ("rate", "clip"):
            value = getattr(self, name)
            require(value > 0, f"{name} is {value}, but it must be positive")
        require(
            self.problems >= self.batch_size,
            f"problems is {self.problems}, which does not fill a batch of {self.batch_size}",
        )
        low, high = self.thresholds
        require(
            0 < low <= high < 1,
            f"thresholds is {list(self.thresholds)}, but it must be two numbers above 0 and "
            "below 1, the smaller one first",
        )
        require(
            self.width >= 4 and self.width % 4 == 0,
            f"width is {self.width}, but it must be a multiple of 4",
        )
        check_entry_ranges(self.above, self.temperature)


class Collector:
    """Decodes training requests and labels their states.

    Args:
        lm: the model.
        task: the task.
        config: the configuration.

    Raises:
        UserError: for a wrong rule or budget, or a model without a tokenizer.
    """

    def __init__(self, lm: LM, task: Task, config: EntryConfig):
        require(
            lm.tokenizer is not None,
            f"{config.model} has no tokenizer.json, which training needs for its prompts",
        )
        assert lm.tokenizer is not None
        self.lm, self.task, self.config, self.tokenizer = lm, task, config, lm.tokenizer
        flow = parse_flow(config.switches, None, task)
        self.policy = init_entry_policy(
            jax.random.key(config.seed), config.width, config.above, config.temperature
        )
        dataclasses.replace(flow, policy=self.policy)  # refuses switches that it cannot use
        self.problems: list[object] = list(task.training(None, config.problems))
        require(
            len(self.problems) >= config.batch_size,
            f"the task {task.name} has {len(self.problems)} training requests, which do not fill a "
            f"batch of {config.batch_size}. Lower batch_size.",
        )
        cell = make_cells(lm, task, {"flow": flow}, [parse_budget(config.budget)])[0]
        self.prompts = [chat_ids(self.tokenizer, task.prompt(p)) for p in self.problems]
        self.ids, self.mask = pad_prompts(lm, self.prompts)
        self.decode_config = self._decode_config(cell.steps, flow.early_exit)
        self.flow = flow
        _, self.target_rule = parse_rule(config.target_rule, task.config.rule_options)
        self.target_config = adapt_loop(
            self.target_rule, self._decode_config(task.config.gen_length, True)
        )

    def _decode_config(self, steps: int, early_exit: bool) -> DecodeConfig:
        protocol, longest = self.task.config, max(map(len, self.prompts))
        made = make_decode_config(
            self.lm, longest, protocol.gen_length, steps, None, protocol.block_length
        )
        return dataclasses.replace(made, early_exit=early_exit)

    def collect(self) -> States:
        """Returns the labelled states of all decodes.

        Raises:
            UserError: if there are none.
        """
        size = self.config.batch_size
        parts: list[States] = []
        with Pool(self.task.config.limits) as sandbox:
            for first in tqdm(range(0, len(self.problems) - size + 1, size), desc="decodes"):
                parts += self._collect_batch(np.arange(first, first + size), sandbox)
        # Rows of different batches are different decodes.
        for number, part in enumerate(parts):
            part["decode"] = part["decode"] + number * size
        states = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
        require(len(states["decode"]) > 0, "no answer is right, so there is nothing to learn from")
        order = np.argsort(states["decode"], kind="stable")  # the states of a decode together
        return {name: x[order] for name, x in states.items()}

    def _collect_batch(self, rows: np.ndarray, sandbox: Pool) -> Iterator[States]:
        """Yields the states of each decode of some requests."""
        config = self.config
        keys = row_keys(jax.random.key(config.seed), [self.prompts[i] for i in rows])
        arrays = (self.ids[rows], self.mask[rows])
        target = None
        if config.labels == "target":
            target = self._targets(rows, arrays, keys, sandbox)
        for turn in range(config.decodes):
            least = jnp.full((len(rows), 1), self._threshold(int(rows[0]) // len(rows), turn))
            own = self.policy
            policy: EntryPolicy = Explorer(own.params, own.above, own.temperature, least=least)
            if target is not None:
                policy = Teacher(own.params, least=least, target=jnp.asarray(target))
            drawn = jax.vmap(jax.random.fold_in, (0, None))(keys, turn)
            flow = dataclasses.replace(self.flow, policy=policy)
            made = rollout(self.lm.model, self.lm.params, flow, self.decode_config, *arrays, drawn)
            if target is not None:
                yield target_states(made, target)
            else:
                yield verdict_states(made, self._judge(rows, np.asarray(made.tokens), sandbox))

    def _threshold(self, batch: int, turn: int) -> float:
        """Returns the threshold of a batch, spread evenly over the range.

        The rows share it, since a batch takes as many passes as its slowest row.
        """
        low, high = self.config.thresholds
        share = (GOLDEN * (batch * self.config.decodes + turn + 1) + self.config.seed / 7) % 1
        return low + (high - low) * share

    def _targets(
        self,
        rows: np.ndarray,
        arrays: tuple[np.ndarray, np.ndarray],
        keys: jax.Array,
        sandbox: Pool,
    ) -> np.ndarray:
        """Returns right answers, int [R, N], and -1 for requests without one."""
        tokens, *_ = decode_batch(
            self.lm.model, self.lm.params, self.target_rule, self.target_config, *arrays, keys
        )
        target = np.asarray(tokens)
        return np.where(self._judge(rows, target, sandbox)[:, None] > 0, target, -1)

    def _judge(self, rows: np.ndarray, tokens: np.ndarray, sandbox: Pool) -> np.ndarray:
        """Returns 1 for right answers and 0 for others, float32 [R]."""
        end_ids = self.task.config.end_ids(self.lm.config.stop_ids)
        texts = decode_responses(self.tokenizer, tokens, end_ids)
        pairs = zip(rows, texts, strict=True)
        results = sandbox.run_many([self.task.job(self.problems[i], text) for i, text in pairs])
        return np.asarray([result.passed for result in results], np.float32)


def draw_batch(states: States, size: int, rng: np.random.Generator) -> States:
    """Draws a batch of complete decodes.

    Its rest is filled with states that do not count.

    Args:
        states: as from `Collector.collect`.
        size: S, states of the batch.
        rng: source of the draws.

    Returns:
        The batch, with "decode" counted from 0.
    """
    ends = np.flatnonzero(np.diff(states["decode"], append=-1)) + 1
    starts = np.concatenate([[0], ends[:-1]])
    longest = int((ends - starts).max())
    require(
        longest <= size,
        f"states is {size}, less than those of one decode, which has {longest}. Raise it.",
    )
    chosen: list[np.ndarray] = []
    used = 0
    for decode in rng.permutation(len(ends)):
        length = ends[decode] - starts[decode]
        if used + length > size:
            break
        chosen.append(np.arange(starts[decode], ends[decode]))
        used += length
    at = np.concatenate(chosen)
    batch = {name: _pad(x[at], size) for name, x in states.items()}
    number = np.repeat(np.arange(len(chosen)), [len(part) for part in chosen])
    return batch | {"decode": _pad(number.astype(np.int32), size)}


def _train(
    run: Run,
    config: EntryConfig,
    state: TrainState,
    step_fn: Callable[[TrainState, States], tuple[TrainState, Metrics]],
    states: States,
) -> TrainState:
    """Runs the updates that are left."""
    print(f"{len(np.unique(states['decode']))} decodes of {len(states['decode'])} states")
    for step in run.steps(int(state.step), config.steps, "entry"):
        done, is_last = step + 1, step + 1 == config.steps
        rng = np.random.default_rng((config.seed, step))
        state, metrics = step_fn(state, draw_batch(states, config.states, rng))
        if done % config.log_every == 0 or is_last:
            run.log_step(done, metrics, "loss")
        if done % config.save_every == 0 or is_last or run.stopped:
            run.save(done, state)
    return state


def _write(config: EntryConfig, policy: EntryPolicy) -> None:
    """Writes the policy."""
    options = dataclasses.asdict(config)
    del options["out"]  # the same run has the same bytes in every folder
    made_by = {"command": "python -m train.entry", "config": options}
    file = to_path(config.out) / "policy.safetensors"
    save_policy(file, policy, switches=config.switches, made_by=json.dumps(made_by))
    print(f"{file}: the policy")


def _pad(x: np.ndarray, size: int) -> np.ndarray:
    """Adds zeros up to `size` rows."""
    return np.pad(x, [(0, size - len(x))] + [(0, 0)] * (x.ndim - 1))


def main(path: str, overrides: list[str]) -> None:
    """Trains an entry policy to the configured step, and writes it.

    A resumed run repeats the decodes, and continues the updates.

    Args:
        path: TOML file of an EntryConfig.
        overrides: texts like "key=value".

    Raises:
        UserError: for bad input. It is found before the folder of the run is made.
    """
    config = load_toml(path, EntryConfig, overrides)
    require(jax.process_count() == 1, "train.entry runs in one process")
    collector = Collector(
        load(config.model, dtype=config.dtype), get_task(config.task, config.protocol), config
    )
    optimizer = optax.chain(
        optax.clip_by_global_norm(config.clip),
        optax.adam(optax.cosine_decay_schedule(config.rate, config.steps)),
    )
    state = TrainState.create(collector.policy.params, optimizer)
    step_fn = jax.jit(make_entry_step(collector.policy, optimizer, config.labels))
    with Run(config.out, config.seed) as run:
        run.frozen = fingerprint(collector.lm.params)
        if run.latest is not None:
            state, _ = run.restore(state)
        if int(state.step) < config.steps:
            state = _train(run, config, state, step_fn, collector.collect())
        run.wait()
        if int(state.step) == config.steps:
            trained = dataclasses.replace(collector.policy, params=jax.device_get(state.params))
            _write(config, trained)


if __name__ == "__main__":
    run_program(main, "python -m train.entry CONFIG [key=value ...]")
