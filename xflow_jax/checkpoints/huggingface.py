"""Reading of Hugging Face checkpoints from a directory or the hub."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, Sharding
from jax.typing import DTypeLike

from xflow_jax.checkpoints.atomic_write import (
    CONVERTED,
    copy_files,
    matching_files,
    partial_path,
)
from xflow_jax.checkpoints.checksums import CHECKSUM_FILE
from xflow_jax.checkpoints.safetensors_reader import (
    CONFIG_FILE,
    INDEX,
    SafetensorsSource,
    read_hf_int8,
    read_hf_leaf,
)
from xflow_jax.checkpoints.weight_map import TensorSlice, map_weights
from xflow_jax.errors import UserError, disk_errors, require
from xflow_jax.input_files import file_inside, is_cloud, object_exists, read_json, to_path
from xflow_jax.models import (
    INT8,
    SCALE,
    abstract_params,
    abstract_weights,
    build,
    model_config,
    shardings,
)
from xflow_jax.toml_config import format_value
from xflow_jax.types import ModelConfig

GENERATION_FILE = "generation_config.json"
# Small files that accompany the weights: those of the tokenizer, and the original's code, which is
# never run here.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.*",
    GENERATION_FILE,
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)


def read_hf_config(directory: Path) -> ModelConfig:
    """Reads the configuration in a directory's config.json.

    Raises:
        UserError: if the file is missing, is not JSON or is not a supported configuration, or if
            generation_config.json contradicts it.
    """
    file = file_inside(directory, CONFIG_FILE)
    require(file.exists(), f"{directory}: there is no {CONFIG_FILE}")
    config = model_config(read_json(file), str(file))
    _check_generation(file_inside(directory, GENERATION_FILE), config)
    return config


def _check_generation(file: Path, config: ModelConfig) -> None:
    """Raises UserError if generation_config.json has another end or mask token.

    The original code decodes with that file, and this library with config.json.
    """
    options = read_json(file) if file.exists() else {}
    if not isinstance(options, dict):
        return
    for key, own in (("eos_token_id", "eos_id"), ("mask_token_id", "mask_id")):
        given = options.get(key)
        if given is None:
            continue
        if own == "mask_id" and config.given_mask_id is None:
            continue  # the only place that has it (mask_token.py)
        expected = getattr(config, own)
        if expected not in (given if isinstance(given, list) else [given]):
            raise UserError(
                f"{file}: {key} is {format_value(given)}, but that of {CONFIG_FILE} is {expected}. "
                "Correct one of the files."
            )


def check_companions(directory: Path) -> None:
    """Raises UserError if a companion is a link that leaves the directory."""
    matching_files(directory, COMPANIONS)


def copy_companions(source: Path, target: Path, config: Mapping[str, object]) -> None:
    """Copies the files that accompany the weights.

    A generation_config.json that contradicts the configuration is left out, because it belongs to
    another model and the copy would be refused.

    Args:
        source: directory with the files.
        target: directory of the weights.
        config: the dict of its config.json.

    Raises:
        UserError: if a file is a link that leaves the source.
    """
    copy_files(source, target, COMPANIONS)
    copy = target / GENERATION_FILE
    try:
        _check_generation(copy, model_config(config, str(target / CONFIG_FILE)))
    except UserError:
        copy.unlink(missing_ok=True)


def find_hf_directory(name: str | Path) -> Path:
    """Finds a model's directory, or downloads the model from the hub.

    Args:
        name: path of a directory, or name of a model on the hub.

    Returns:
        The directory.

    Raises:
        UserError: if neither exists.
    """
    if is_cloud(name):
        folder = to_path(name)
        with disk_errors(folder, reading=True):
            found = any(object_exists(folder / file) for file in (CONFIG_FILE, CONVERTED))
        require(found, f"{folder}: there is no model, since it has no {CONFIG_FILE}")
        return folder
    try:
        path = to_path(name).expanduser()
        if path.is_dir():
            return path
        partial = partial_path(path)
        if path.exists():
            raise UserError(f"{path}: this is a file. Name the directory that holds {CONFIG_FILE}.")
        if partial.exists():
            raise UserError(f"{path}: it is not complete yet. See {partial.name} beside it.")
    except OSError as error:
        raise UserError(f"{name}: cannot be read: {error.strerror}") from None
    except (RuntimeError, ValueError):  # an unknown user after ~, or a name that no file can have
        raise UserError(f"{name}: there is no such directory") from None
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise UserError(f"{path}: there is no such directory")
    return download_from_hub(
        str(name),
        "model",
        "directory",
        [CONFIG_FILE, "*.safetensors", INDEX, CHECKSUM_FILE, *COMPANIONS],
    )


def download_from_hub(
    name: str, kind: Literal["model", "dataset"], local_kind: str, patterns: list[str]
) -> Path:
    """Downloads files of a repository of the hub.

    Args:
        name: name of the repository.
        kind: its kind.
        local_kind: the local thing that `name` could have been, for the message: "directory" or
            "file".
        patterns: patterns of the files.

    Returns:
        The local directory.

    Raises:
        UserError: if the repository cannot be downloaded.
    """
    from huggingface_hub import errors, snapshot_download  # needed for the network only

    reason, cause = "", Exception()
    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        reason, cause = "the hub requires a login and acceptance of its terms", error
    except errors.RepositoryNotFoundError as error:
        reason, cause = f"the hub has no public {kind} of this name", error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason, cause = "the hub cannot be reached", error
    except Exception as error:  # of many kinds, from several libraries
        reason, cause = f"the hub's answer was {type(error).__name__}", error
    raise UserError(f"{name}: there is no such {local_kind} here, and {reason}") from cause


def read_hf_params(
    directory: Path, dtype: DTypeLike, mesh: Mesh | None = None
) -> tuple[ModelConfig, dict[str, Any]]:
    """Reads the parameters of a Hugging Face directory.

    Args:
        directory: the directory.
        dtype: dtype of the parameters, as in `models.abstract_weights`.
        mesh: mesh to shard them over, or None for the default device.

    Returns:
        (configuration, parameters).

    Raises:
        UserError: if the directory is damaged or not supported.
    """
    config = read_hf_config(directory)
    abstract = abstract_weights(config, dtype)
    placement: dict[str, Sharding] = {}
    if mesh is not None:
        placement = flatten_dict(shardings(abstract, mesh, config.family), sep="/")
    source = SafetensorsSource(directory)
    mapping = map_weights(config, abstract_params(build(config)), source.entries)
    source.check(mapping)
    stored = flatten_dict(abstract, sep="/")
    leaves: dict[str, jax.Array] = {}
    for path, slices in mapping.slices.items():
        leaves |= read_stored(source, slices, path, stored[path], placement)
    return config, unflatten_dict(leaves, sep="/")


def read_stored(
    source: SafetensorsSource,
    slices: Collection[TensorSlice],
    path: str,
    stored: jax.ShapeDtypeStruct,
    placement: Mapping[str, Sharding],
) -> dict[str, jax.Array]:
    """Reads one parameter in the form in which it is kept.

    Args:
        source: the tensors.
        slices: the parts of the parameter.
        path: its path.
        stored: its shape and dtype.
        placement: path -> sharding. An absent one is the default device.

    Returns:
        Path -> the parameter, and behind an int8 matrix its scales.

    Raises:
        UserError: if a value is NaN or infinite.
    """
    sharding = placement.get(path)
    if stored.dtype != INT8:
        return {path: read_hf_leaf(source, slices, stored.shape, stored.dtype, sharding)}
    names = (path, path + SCALE)
    leaves = read_hf_int8(source, slices, stored.shape, *map(placement.get, names))
    return dict(zip(names, leaves, strict=True))
