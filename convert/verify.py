"""Comparison with the original PyTorch code: `python -m convert.verify HF_DIR --trust-remote-code`.

Both models compute logits in float32, the original first, so that memory holds one at a time.
"""

from __future__ import annotations

import argparse
import gc
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from convert import run_program
from xflow_jax.checkpoints import (
    CHECKSUM_FILE,
    CONFIG_FILE,
    SafetensorsSource,
    find_hf_directory,
    is_checkpoint,
    read_hf_config,
    read_record,
    resolve_mask_id,
)
from xflow_jax.errors import UserError, require
from xflow_jax.input_files import read_json_object
from xflow_jax.lm import load
from xflow_jax.types import ModelConfig

CASES = ((1, 32), (2, 17))  # B, L. With --block-length, L is a block longer.
TOLERANCE = 1e-3
MODEL_CLASSES = ("AutoModelForCausalLM", "AutoModel")  # keys of auto_map, the first one wins

LogitsFunction = Callable[[list[np.ndarray]], list[np.ndarray]]  # ids [B, L] -> logits [B, L, V]


@dataclass(frozen=True)
class Difference:
    """Difference between two arrays of logits.

    Attributes:
        largest: largest absolute difference.
        relative: the same in standard deviations of the original's logits.
        agreement: share of positions with the same argmax, 0 to 1.
    """

    largest: float
    relative: float
    agreement: float


def compare(ours: np.ndarray, original: np.ndarray) -> Difference:
    """Compares two arrays of logits [B, L, V].

    Raises:
        UserError: if their shapes differ, or if one holds NaN or infinity.
    """
    for name, logits in (("our", ours), ("the original's", original)):
        require(bool(np.isfinite(logits).all()), f"{name} logits are NaN or infinite")
    if ours.shape != original.shape:
        raise UserError(
            f"the original's logits are {list(original.shape)}, ours {list(ours.shape)}"
        )
    largest = float(np.abs(ours - original).max())
    agreement = float(np.mean(ours.argmax(-1) == original.argmax(-1)))
    return Difference(largest, largest / float(original.std()), agreement)


def inputs(config: ModelConfig, block_length: int | None = None, seed: int = 0) -> list[np.ndarray]:
    """Draws token ids, int [B, L], half of them the mask."""
    rng = np.random.default_rng(seed)
    cases = []
    for batch, length in CASES:
        shape = batch, length + (block_length or 0)
        ids = rng.integers(0, config.vocab_size, shape)
        cases.append(np.where(rng.random(shape) < 0.5, config.mask_id, ids))
    return cases


def verify(
    directory: Path,
    original: LogitsFunction,
    mask_id: int | None = None,
    block_length: int | None = None,
) -> list[Difference]:
    """Compares our logits with those of the original.

    Args:
        directory: Hugging Face directory of the model.
        original: function that computes the original's logits for a list of token ids.
        mask_id: id of the mask token, or None for that of the directory.
        block_length: positions of a block for block-causal attention, or None for full attention.

    Returns:
        The difference for each of CASES.

    Raises:
        UserError: if the model cannot be loaded, or the shapes of the logits differ.
    """
    config = resolve_mask_id(read_hf_config(directory), directory, mask_id)
    cases = inputs(config, block_length)
    expected = original(cases)
    gc.collect()
    lm = load(directory)
    return [
        compare(np.asarray(lm.logits(ids, block_length=block_length)), logits)
        for ids, logits in zip(cases, expected, strict=True)
    ]


def block_options(
    forward: Callable[..., object], length: int, block_length: int | None
) -> dict[str, Any]:
    """Returns the arguments by which the original's code attends in blocks.

    Args:
        forward: function of the code.
        length: positions of the inputs.
        block_length: positions of a block, or None for the code's own attention.

    Returns:
        Its own argument `block_size`, as in Fast-dLLM v2, or a mask.
    """
    if block_length is None:
        return {}
    if "block_size" in inspect.signature(forward).parameters:
        return {"block_size": block_length}
    return {"attention_mask": block_mask(length, block_length)}


def block_mask(length: int, block_length: int) -> np.ndarray:
    """Returns the block-causal mask, int [1, 1, L, L].

    It is 1 where a query attends to a key.
    """
    block = np.arange(length) // block_length
    return (block[:, None] >= block[None, :]).astype(np.int64)[None, None]


def torch_logits(directory: Path, trust: bool, block_length: int | None = None) -> LogitsFunction:
    """Makes a function that computes logits with the directory's own modelling code.

    Args:
        directory: Hugging Face directory with modelling code.
        trust: True allows that code to run.
        block_length: positions of a block, if the code gets a block-causal mask.

    Returns:
        The function. It loads the model when it is called.

    Raises:
        UserError: without torch, without modelling code, or without trust.
    """
    try:
        import torch
    except ImportError:
        raise UserError(
            "convert.verify runs the original PyTorch code, but torch is not installed: "
            "pip install -e '.[convert]'"
        ) from None
    config_file = directory / CONFIG_FILE
    auto_map = read_json_object(config_file).get("auto_map") or {}
    if not isinstance(auto_map, dict) or not any(key in auto_map for key in MODEL_CLASSES):
        raise UserError(
            f"{config_file}: no auto_map names the original's code, so there is nothing to run"
        )
    if not trust:
        raise UserError(
            f"{directory}: its modelling code would be run. Read it, and pass --trust-remote-code "
            "if you trust it."
        )

    def logits(cases: list[np.ndarray]) -> list[np.ndarray]:
        model, found = _torch_model(directory, auto_map), []
        with torch.no_grad():
            for ids in cases:
                options = block_options(model.forward, ids.shape[1], block_length)
                if "attention_mask" in options:
                    options["attention_mask"] = torch.from_numpy(options["attention_mask"])
                output = model(input_ids=torch.from_numpy(ids), **options)
                found.append(output.logits.float().numpy())
        return found

    return logits


def _torch_model(directory: Path, auto_map: dict[str, str]) -> Any:
    """Loads the original model.

    The weights are set here and not by `from_pretrained`, because newer versions of transformers
    reject code as old as LLaDA's.
    """
    import torch
    import transformers
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    try:
        location = str(directory.absolute())
        config_class = get_class_from_dynamic_module(auto_map["AutoConfig"], location)
        model_class = get_class_from_dynamic_module(
            next(auto_map[key] for key in MODEL_CLASSES if key in auto_map), location
        )
        model = model_class(config_class.from_pretrained(location))
        source = SafetensorsSource(directory)
        state = {
            name: torch.from_numpy(source.read(name).astype(np.float32)) for name in source.entries
        }
        model.load_state_dict(state, assign=True)
    except Exception as error:  # the modelling code may raise anything
        reason = str(error).splitlines()[0] if str(error) else ""
        raise UserError(
            f"{directory}: its modelling code cannot be loaded under transformers "
            f"{transformers.__version__}: {type(error).__name__}: {reason}"
        ) from error
    return model.float().eval()


def check_files(directory: Path) -> str:
    """Reads all files of a model and compares them with their checksums.

    Args:
        directory: a converted checkpoint, or a directory in the Hugging Face format.

    Returns:
        The end of a sentence on what was compared.

    Raises:
        UserError: that names the first damaged file.
    """
    if is_checkpoint(directory):
        read_record(directory, large=True, always=True)
        return "the files have the sizes and checksums of files.json"
    source = SafetensorsSource(directory, always=True)
    if not (directory / CHECKSUM_FILE).exists():
        return f"its {len(source.files)} files of weights are whole, but it has no {CHECKSUM_FILE}"
    return f"its {len(source.files)} files of weights have the checksums of {CHECKSUM_FILE}"


def main(arguments: argparse.Namespace) -> None:
    """Prints the differences. Exits with status 1 if too large."""
    directory = find_hf_directory(arguments.hf_dir)
    if arguments.checksums:
        print(f"{directory}: {check_files(directory)}")
        return
    size = arguments.block_length
    require(size is None or size >= 1, f"--block-length must be at least 1, not {size}")
    original = torch_logits(directory, arguments.trust_remote_code, size)
    differences = verify(directory, original, arguments.mask_id, size)
    for (batch, length), d in zip(CASES, differences, strict=True):
        print(
            f"ids {[batch, length + (size or 0)]}: largest difference {d.largest:.2e} "
            f"({d.relative:.1e} standard deviations), "
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
        prog="python -m convert.verify",
        description="Compare our logits with those of the original PyTorch code.",
    )
    parser.add_argument(
        "hf_dir",
        help="Hugging Face directory with modelling code, or name of a model on the hub",
    )
    parser.add_argument(
        "--checksums",
        action="store_true",
        help="only compare all files with the checksums of files.json. Converted checkpoints too",
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run the code that comes with the model"
    )
    parser.add_argument(
        "--mask-id",
        type=int,
        metavar="ID",
        help="id of the mask token (default: that of the directory)",
    )
    parser.add_argument(
        "--block-length",
        type=int,
        metavar="N",
        help="compare under block-causal attention in blocks of N positions, and pass the code "
        "its argument block_size, or else a mask (default: full attention, without a mask)",
    )
    parser.add_argument(
        "--tolerance",
        type=float,
        default=TOLERANCE,
        help="largest difference in standard deviations of the logits (default: %(default)s)",
    )
    run_program(main, parser)
