"""lm-evaluation-harness on these models: `python -m xflow_jax.harness` is its command `lm_eval` with the model xflow.

    python -m xflow_jax.harness --model xflow --model_args pretrained=DIR,rule=flow,budget=0.25 --tasks gsm8k

(The harness finds only models that were registered in its own process.) A rule's options are parted by semicolons
there: rule=flow:power=8;commit=false. Needs the extra [lm-eval].
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
from tqdm import tqdm

from xflow_jax.decoding import (
    MaskPrediction,
    generate,
    parse_budget,
    parse_rule,
    resolve_steps,
)
from xflow_jax.errors import UserError
from xflow_jax.evaluation.likelihood import log_likelihoods
from xflow_jax.lm import load
from xflow_jax.parallel import default_mesh

try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError:
    sys.exit("error: lm-evaluation-harness is not installed; pip install xflow-jax[lm-eval]")


@register_model("xflow")
class XFlow(LM):
    """A model as the harness wants it.

    pretrained: as in xflow_jax.load. rule, budget, block_length: of decoding. gen_length: response tokens (None: what
    the task asks for). samples, cfg_scale: of the likelihood. check_greedy: whether loglikelihood also decodes, one
    token a step, to say if the continuation is what the model would write (else it says no). UserError on bad input.
    """

    def __init__(
        self,
        pretrained: str,
        rule: str = "mask",
        budget: str | float = 1,
        gen_length: int | None = None,
        block_length: int | None = None,
        samples: int = 128,
        cfg_scale: float = 0.0,
        check_greedy: bool = True,
        dtype: str = "float32",
        mesh: str | None = None,
        batch_size: int | str = 8,
        seed: int = 0,
        **_: Any,  # what the harness passes to every model, its device for one
    ) -> None:
        super().__init__()
        spec = None if mesh is None else str(mesh).replace(";", ",")
        self.lm = load(pretrained, dtype, default_mesh(spec))
        if self.lm.tokenizer is None:
            raise UserError(
                f"{pretrained} has no tokenizer.json, without which texts cannot be read"
            )
        if batch_size == "auto" or not str(batch_size).isdigit() or int(batch_size) < 1:
            raise UserError(f"batch_size must be a whole number of at least 1, not {batch_size!r}")
        self.rule = parse_rule(rule.replace(";", ","))[1]
        self.budget, self.gen_length, self.block_length = (
            parse_budget(str(budget)),
            gen_length,
            block_length,
        )
        self.samples, self.cfg_scale, self.check_greedy = samples, cfg_scale, check_greedy
        self.batch_size, self.seed = int(batch_size), seed

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer's cached requests from another's."""
        return str(self.lm.tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The tokenizer's template, which the harness keeps with its results."""
        return self.lm.tokenizer.chat_template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A chat as text, up to where the assistant speaks."""
        return self.lm.tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """An answer to each request (context, {"until": ..., "max_gen_toks": ...}), cut at the first of its stops."""
        jobs: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            length = self.gen_length or int(request.args[1].get("max_gen_toks", 256))
            jobs.setdefault(length, []).append(number)
        prompts = [self._encode(request.args[0]) for request in requests]
        texts = [""] * len(requests)
        for length, numbers in jobs.items():
            steps = resolve_steps(self.lm.config, self.budget, length, self.block_length)
            out = self._decode(
                [prompts[i] for i in numbers], self.rule, length, steps, disable_tqdm
            )
            for number, row in zip(numbers, out, strict=True):
                end = row.index(self.lm.config.eos_id) if self.lm.config.eos_id in row else len(row)
                texts[number] = self.lm.tokenizer.decode(row[:end], skip_special_tokens=True)
        for number, request in enumerate(requests):
            until = request.args[1].get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                texts[number] = texts[number].partition(stop)[0] if stop else texts[number]
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return texts

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """For each (context, continuation): a lower bound of log p in nats, and whether the model would write it."""
        pairs = [self._pair(*request.args) for request in requests]
        bounds = self._bounds(pairs, disable_tqdm)
        greedy = self._greedy(pairs, disable_tqdm) if self.check_greedy else [False] * len(pairs)
        results = [(float(bound), bool(same)) for bound, same in zip(bounds, greedy, strict=True)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """A lower bound of log p of whole texts; they must fit into the model's positions."""
        pairs = [((), self._encode(request.args[0])) for request in requests]
        return [float(bound) for bound in self._bounds(pairs, disable_tqdm)]

    def _encode(self, text: str) -> list[int]:
        return self.lm.tokenizer.encode(text, add_special_tokens=False)

    def _pair(self, context: str, continuation: str) -> tuple[Sequence[int], Sequence[int]]:
        """Their ids; spaces at the context's end belong to the continuation's first word."""
        kept = context.rstrip(" ")
        both, first = self._encode(context + continuation), self._encode(kept)
        return first, both[len(first) :]

    def _bounds(self, pairs: Sequence[Any], silent: bool) -> np.ndarray:
        options = {"cfg_scale": self.cfg_scale, "batch_size": self.batch_size, "seed": self.seed}
        group = next(g for g in range(min(16, self.samples), 0, -1) if self.samples % g == 0)
        return log_likelihoods(self.lm, pairs, self.samples, group, progress=not silent, **options)

    def _greedy(self, pairs: Sequence[Any], silent: bool) -> list[bool]:
        same = [False] * len(pairs)
        by_length: dict[int, list[int]] = {}
        for number, (prompt, response) in enumerate(pairs):
            if len(prompt):
                by_length.setdefault(len(response), []).append(number)
        for length, numbers in by_length.items():
            rows = self._decode(
                [pairs[i][0] for i in numbers], MaskPrediction(), length, length, silent
            )
            for number, row in zip(numbers, rows, strict=True):
                same[number] = row == list(pairs[number][1])
        return same

    def _decode(
        self, prompts: Sequence[Sequence[int]], rule: Any, length: int, steps: int, silent: bool
    ) -> list[list[int]]:
        """The responses' ids, in batches of like prompts."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = min(self.batch_size, len(order))
        block_length = None if rule is not self.rule else self.block_length
        rows: list[list[int]] = [[]] * len(prompts)
        for first in tqdm(range(0, len(order), size), unit="batch", disable=silent):
            batch = order[first : first + size]
            filled = [prompts[i] for i in batch + batch[-1:] * (size - len(batch))]
            out = generate(
                self.lm, filled, rule, length, steps, block_length=block_length, seed=self.seed
            )
            for i, row in zip(batch, out.tokens.tolist(), strict=False):
                rows[i] = row
        return rows


def main() -> None:
    """The harness's own command."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except UserError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
