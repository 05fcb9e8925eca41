"""Our logits beside the original PyTorch code's: `python -m convert.verify HF_DIR --trust-remote-code`.

Both compute in float32, the original first and then ours, so memory holds one of the two models at a time.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import run_program
from xflow_jax.checkpoints import huggingface, safetensors_reader
from xflow_jax.errors import UserError
from xflow_jax.lm import load

CASES = ((1, 32), (2, 17))  # batch and length
TOLERANCE = 1e-3
AUTO = ("AutoModelForCausalLM", "AutoModel")


@dataclass(frozen=True)
class Difference:
    """How far two logits [B, L, V] are apart: at most, in units of the original's standard deviation, and in argmax."""

    largest: float
    relative: float
    agreement: float


def compare(ours: np.ndarray, theirs: np.ndarray) -> Difference:
    """The difference of logits [B, L, V]."""
    if ours.shape != theirs.shape:
        raise UserError(f"the original's logits are {list(theirs.shape)}, ours {list(ours.shape)}")
    largest = float(np.abs(ours - theirs).max())
    agreement = float(np.mean(ours.argmax(-1) == theirs.argmax(-1)))
    return Difference(largest, largest / float(theirs.std()), agreement)


def inputs(config: Any, seed: int = 0) -> list[np.ndarray]:
    """Random ids int [B, L], half of them the mask."""
    rng = np.random.default_rng(seed)
    cases = []
    for shape in CASES:
        ids = rng.integers(0, config.vocab_size, shape)
        cases.append(np.where(rng.random(shape) < 0.5, config.mask_id, ids))
    return cases


def verify(
    directory: Path, original: Callable[[list[np.ndarray]], list[np.ndarray]]
) -> list[Difference]:
    """Our logits of the model in `directory` against those that `original` computes for the same ids, case by case."""
    cases = inputs(huggingface.read_hf_config(directory))
    theirs = original(cases)
    gc.collect()
    lm = load(directory)
    return [
        compare(np.asarray(lm.logits(ids)), logits)
        for ids, logits in zip(cases, theirs, strict=True)
    ]


def torch_logits(directory: Path, trust: bool) -> Callable[[list[np.ndarray]], list[np.ndarray]]:
    """A function from ids to the logits of the directory's own modelling code, which runs only if `trust` is set.

    The weights are put in here instead of by `from_pretrained`, which newer versions of transformers refuse for code as
    old as LLaDA's. Raises UserError without torch, without trust, and where that code cannot be loaded.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            "convert.verify runs the original PyTorch code, but torch is not installed: pip install -e '.[convert]'"
        ) from None
    named = json.loads((directory / safetensors_reader.CONFIG).read_text()).get("auto_map") or {}
    if not any(key in named for key in AUTO):
        raise UserError(
            f"{directory / safetensors_reader.CONFIG}: no auto_map names the original's code, so there is nothing to run"
        )
    if not trust:
        raise UserError(
            f"{directory}: its modelling code would be run; read it, and pass --trust-remote-code if you trust it"
        )

    def logits(cases: list[np.ndarray]) -> list[np.ndarray]:
        model = _torch_model(directory, named)
        with torch.no_grad():
            return [model(input_ids=torch.from_numpy(ids)).logits.float().numpy() for ids in cases]

    return logits


def _torch_model(directory: Path, named: dict[str, str]) -> Any:
    import torch
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        where = str(directory.absolute())
        config = get_class_from_dynamic_module(named["AutoConfig"], where).from_pretrained(where)
        kind = get_class_from_dynamic_module(
            next(named[key] for key in AUTO if key in named), where
        )
        model = kind(config)
        source = safetensors_reader.SafetensorsSource(directory)
        state = {
            name: torch.from_numpy(source.read(name).astype(np.float32)) for name in source.entries
        }
        model.load_state_dict(state, assign=True)
    except Exception as error:  # whatever somebody's code raises
        raise UserError(
            f"{directory}: its modelling code cannot be loaded under transformers {transformers.__version__}: "
            f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        ) from error
    return model.float().eval()


def main(arguments: argparse.Namespace) -> None:
    """The command: a line per case, and exit status 1 where the two differ."""
    directory = huggingface.find_hf_directory(arguments.hf_dir)
    original = torch_logits(directory, arguments.trust_remote_code)
    differences = verify(directory, original)
    for shape, d in zip(CASES, differences, strict=True):
        print(
            f"ids {list(shape)}: largest difference {d.largest:.2e} ({d.relative:.1e} standard deviations), "
            f"same argmax at {d.agreement:.2%} of positions"
        )
    worst = max(d.relative for d in differences)
    print(
        "same"
        if worst <= arguments.tolerance
        else f"DIFFERENT: more than {arguments.tolerance} standard deviations"
    )
    sys.exit(worst > arguments.tolerance)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m convert.verify", description="our logits beside the original's"
    )
    parser.add_argument(
        "hf_dir",
        help="Hugging Face directory with the modelling code, or a model's name on the hub",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model"
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="in standard deviations of the logits (default: %(default)s)",
    )
    run_program(main, parser)
