"""Adapter to lm-evaluation-harness: its command `lm_eval` with the model xflow.

    python -m xflow_jax.evaluation.lm_eval_harness --model xflow --tasks gsm8k \
        --model_args pretrained=DIR,rule=flow

lm-evaluation-harness finds only models that were registered in its own process. In --model_args,
semicolons separate the options of a rule. Needs the extra [lm-eval].
"""

from __future__ import annotations

import dataclasses
import logging
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm

from xflow_jax.decoding import (
    CacheOptions,
    MaskPrediction,
    Rule,
    generate,
    parse_budget,
    parse_rule,
    resolve_steps,
)
from xflow_jax.errors import UserError
from xflow_jax.evaluation.likelihood import log_likelihoods
from xflow_jax.lm import load
from xflow_jax.parallel import default_mesh


def _missing_package(error: ImportError) -> str:
    """Returns the sentence for a package that cannot be imported."""
    package = (error.name or "lm_eval").partition(".")[0]
    if package == "lm_eval":
        return "error: lm-evaluation-harness is not installed: pip install xflow-jax[lm-eval]"
    return (
        f"error: lm-evaluation-harness needs the package {package}, which is not installed: "
        f"pip install {package}"
    )


try:
    from lm_eval.api.model import LM
    from lm_eval.api.registry import register_model
except ImportError as error:
    sys.exit(_missing_package(error))

_LOG = logging.getLogger(__name__)
AUTO_BATCH_SIZE = 8
Pair = tuple[Sequence[int], Sequence[int]]  # ids of a context and its continuation


class Request(Protocol):
    """The part of lm_eval.api.instance.Instance that is used.

    Attributes:
        args: arguments of the request, such as (context, continuation).
    """

    @property
    def args(self) -> tuple[Any, ...]: ...


@register_model("xflow")
class XFlow(LM):
    """A model in the interface of lm-evaluation-harness.

    Args:
        pretrained: path or name of the model, as for xflow_jax.load.
        rule: the rule, with semicolons between its options.
        budget: share of the full number of steps.
        gen_length: response tokens, or None for the number that the task gives.
        block_length: positions of a block, or None for the default of the model.
        samples: masks of each response for the likelihood.
        cfg_scale: classifier-free guidance of the likelihood.
        check_greedy: decode each continuation of loglikelihood, one token a step, and compare it
            with the given one. If False, is_greedy is always False.
        dtype: float32, bfloat16 or int8.
        mesh: sizes of the mesh, with semicolons between them, or None for the default.
        batch_size: sequences of a batch, or "auto" for 8.
        seed: of masks and of rules that draw.
        cache, refresh, window, prompt_every: keys and values that the decode of a response keeps,
            as in xflow_jax.generate.
        mask_id: id of the mask token, for a model whose files do not name it.

    Raises:
        UserError: for bad input.
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
        cache: str | None = None,
        refresh: int = 0,
        window: int = 0,
        prompt_every: int = 1,
        mask_id: int | None = None,
        **_: object,  # lm-evaluation-harness passes more to every model, such as a device
    ) -> None:
        super().__init__()
        spec = None if mesh is None else str(mesh).replace(";", ",")
        self.lm = load(pretrained, dtype, default_mesh(spec), mask_id)
        # Any: the methods below need more of transformers' class than types.Tokenizer has.
        self._tokenizer: Any = self.lm.tokenizer
        if self._tokenizer is None:
            raise UserError(f"{pretrained} has no tokenizer.json, which is needed for texts")
        if str(batch_size).partition(":")[0] == "auto":  # as in "auto:4"
            batch_size = AUTO_BATCH_SIZE
        if not str(batch_size).isdecimal() or int(batch_size) < 1:
            raise UserError(
                f"batch_size must be auto or a whole number of at least 1, not {batch_size!r}"
            )
        self.rule = parse_rule(rule.replace(";", ","))[1]
        self.budget = parse_budget(str(budget))
        self.gen_length, self.block_length = gen_length, block_length
        self.samples, self.cfg_scale, self.check_greedy = samples, cfg_scale, check_greedy
        self.batch_size, self.seed = int(batch_size), seed
        self.cache_options = CacheOptions(cache, refresh, window, prompt_every)
        self.cache_options.resolve(self.lm.config)

    @property
    def tokenizer_name(self) -> str:
        """Name under which lm-evaluation-harness caches requests of this tokenizer."""
        return str(self._tokenizer.name_or_path).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template of the tokenizer, which is stored with the results."""
        return self._tokenizer.chat_template

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a chat as text, up to the beginning of the response."""
        return self._tokenizer.apply_chat_template(
            chat_history, tokenize=False, add_generation_prompt=add_generation_prompt
        )

    def generate_until(self, requests: Sequence[Request], disable_tqdm: bool = False) -> list[str]:
        """Generates a response to each request, cut at its first stop.

        A context that leaves no room for the response is cut on the left, with a warning.

        Args:
            requests: (context, {"until": ..., "max_gen_toks": ...}) each.
            disable_tqdm: show no progress bar.

        Raises:
            UserError: if the response alone fills the positions of the model.
        """
        by_length: dict[int, list[int]] = {}
        for number, request in enumerate(requests):
            length = self.gen_length or int(request.args[1].get("max_gen_toks", 256))
            by_length.setdefault(length, []).append(number)
        prompts = [self._encode(request.args[0]) for request in requests]
        texts = [""] * len(requests)
        stop_ids = self.lm.config.stop_ids
        for length, numbers in by_length.items():
            steps = resolve_steps(self.lm.config, self.budget, length, self.block_length)
            most = self.lm.config.max_length
            if length >= most:
                raise UserError(
                    f"a response of {length} tokens leaves no room for a context in the model's "
                    f"{most} positions: give a smaller gen_length in --model_args"
                )
            batch = self._cut_contexts(
                [prompts[i] for i in numbers], [most - length] * len(numbers)
            )
            rows = self._decode(
                batch,
                self.rule,
                length,
                steps,
                self.block_length,
                disable_tqdm,
                self.cache_options,
            )
            for number, row in zip(numbers, rows, strict=True):
                end = next((i for i, token in enumerate(row) if token in stop_ids), len(row))
                texts[number] = self._tokenizer.decode(row[:end], skip_special_tokens=True)
        for number, request in enumerate(requests):
            until = request.args[1].get("until") or []
            for stop in [until] if isinstance(until, str) else until:
                texts[number] = texts[number].partition(stop)[0] if stop else texts[number]
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return texts

    def loglikelihood(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Estimates the log-likelihood of each continuation.

        A context that leaves no room for the continuation is cut on the left, with a warning.

        Args:
            requests: (context, continuation) each.
            disable_tqdm: show no progress bar.

        Returns:
            A lower bound in nats, and is_greedy, for each request.
        """
        pairs = [self._pair(*request.args) for request in requests]
        most = self.lm.config.max_length
        contexts = self._cut_contexts([c for c, _ in pairs], [most - len(x) for _, x in pairs])
        pairs = [(context, pair[1]) for context, pair in zip(contexts, pairs, strict=True)]
        bounds = self._bounds(pairs, disable_tqdm)
        greedy = self._greedy(pairs, disable_tqdm) if self.check_greedy else [False] * len(pairs)
        results = [(float(bound), bool(same)) for bound, same in zip(bounds, greedy, strict=True)]
        for request, result in zip(requests, results, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return results

    def loglikelihood_rolling(
        self, requests: Sequence[Request], disable_tqdm: bool = False
    ) -> list[float]:
        """Estimates the log-likelihood of whole texts.

        A text with more tokens than the model has positions is scored in pieces, with a warning.

        Args:
            requests: (text,) each.
            disable_tqdm: show no progress bar.

        Returns:
            A lower bound in nats for each request.
        """
        texts = [self._encode(request.args[0]) for request in requests]
        most = self.lm.config.max_length
        pieces = [[ids[i : i + most] for i in range(0, max(len(ids), 1), most)] for ids in texts]
        if long := sum(len(parts) > 1 for parts in pieces):
            _LOG.warning(
                "%d of %d texts are longer than the model's %d positions. They are scored in "
                "pieces, each without the ones before it.",
                long,
                len(texts),
                most,
            )
        pairs: list[Pair] = [((), piece) for parts in pieces for piece in parts]
        bounds = iter(self._bounds(pairs, disable_tqdm))
        return [float(sum(next(bounds) for _ in parts)) for parts in pieces]

    def _cut_contexts(
        self, contexts: Sequence[Sequence[int]], room: Sequence[int]
    ) -> list[Sequence[int]]:
        """Cuts contexts on the left to their room, with a warning."""
        cut = [
            context[max(len(context) - max(most, 0), 0) :]
            for context, most in zip(contexts, room, strict=True)
        ]
        if shorter := sum(len(a) < len(b) for a, b in zip(cut, contexts, strict=True)):
            _LOG.warning(
                "%d of %d contexts do not fit into the model's %d positions beside the response. "
                "They are cut on the left.",
                shorter,
                len(contexts),
                self.lm.config.max_length,
            )
        return cut

    def _encode(self, text: str) -> list[int]:
        # The warning of transformers on long texts is wrong here, since they are cut.
        return self._tokenizer.encode(text, add_special_tokens=False, verbose=False)

    def _pair(self, context: str, continuation: str) -> Pair:
        """Tokenizes both. The context's final spaces go to the continuation."""
        kept = context.rstrip(" ")
        both, first = self._encode(context + continuation), self._encode(kept)
        return first, both[len(first) :]

    def _bounds(self, pairs: Sequence[Pair], silent: bool) -> np.ndarray:
        return log_likelihoods(
            self.lm,
            pairs,
            self.samples,
            cfg_scale=self.cfg_scale,
            batch_size=self.batch_size,
            seed=self.seed,
            progress=not silent,
        )

    def _greedy(self, pairs: Sequence[Pair], silent: bool) -> list[bool]:
        """Returns True for continuations that mask prediction writes, one token a step."""
        same = [False] * len(pairs)
        by_length: dict[int, list[int]] = {}
        for number, (prompt, response) in enumerate(pairs):
            if len(prompt):
                by_length.setdefault(len(response), []).append(number)
        for length, numbers in by_length.items():
            prompts = [pairs[i][0] for i in numbers]
            rows = self._decode(prompts, MaskPrediction(), length, length, None, silent)
            for number, row in zip(numbers, rows, strict=True):
                same[number] = row == list(pairs[number][1])
        return same

    def _decode(
        self,
        prompts: Sequence[Sequence[int]],
        rule: Rule,
        length: int,
        steps: int,
        block_length: int | None,
        silent: bool,
        cache: CacheOptions | None = None,
    ) -> list[list[int]]:
        """Decodes prompts, those of similar length in one batch."""
        order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
        size = min(self.batch_size, len(order))
        rows: list[list[int]] = [[]] * len(prompts)
        for first in tqdm(range(0, len(order), size), unit="batch", disable=silent):
            batch = order[first : first + size]
            filled = [prompts[i] for i in batch + batch[-1:] * (size - len(batch))]
            out = generate(
                self.lm,
                filled,
                rule,
                length,
                steps,
                block_length=block_length,
                seed=self.seed,
                **dataclasses.asdict(cache or CacheOptions()),
            )
            for i, row in zip(batch, out.tokens.tolist(), strict=False):
                rows[i] = row
        return rows


def main() -> None:
    """Runs the command of lm-evaluation-harness."""
    try:
        from lm_eval.__main__ import cli_evaluate

        cli_evaluate()
    except UserError as error:
        sys.exit(f"error: {error}")
    except ModuleNotFoundError as error:  # some tasks need further packages
        sys.exit(_missing_package(error))


if __name__ == "__main__":
    main()
