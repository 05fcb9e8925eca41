"""Checkpoints in the Hugging Face format, config.json and safetensors, read tensor by tensor.

A safetensors file is an 8-byte length, a JSON header of that length, and the tensors' bytes. It is read here without
its library, so that only what is asked for is ever in memory, and a damaged file is told from a wrong one.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

import jax
from jax.sharding import Mesh

from xflow_jax.checkpoints.atomic_write import partial_path
from xflow_jax.checkpoints.safetensors_reader import CONFIG, INDEX, SafetensorsSource, read_leaf
from xflow_jax.checkpoints.weight_map import map_weights
from xflow_jax.errors import UserError
from xflow_jax.models import abstract_params, build, model_config, shardings
from xflow_jax.parallel import path_name

# Small files that travel with the weights: the tokenizer's, and the original's code, which is never run here.
COMPANIONS = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "tokenizer.model",
    "chat_template.*",
    "generation_config.json",
    "configuration_*.py",
    "modeling_*.py",
    "tokenization_*.py",
)


def read_hf_config(directory: Path) -> Any:
    """The configuration in a directory's config.json; UserError where there is none or it is not one of ours."""
    file = directory / CONFIG
    try:
        return model_config(json.loads(file.read_text()), str(file))
    except OSError:
        raise UserError(f"{directory}: there is no {CONFIG}") from None
    except ValueError as error:
        raise UserError(f"{file}: not valid JSON: {error}") from None


def find_hf_directory(name: str | Path) -> Path:
    """The directory of that name, or else the hub's model, which is fetched; UserError where neither can be had."""
    path = Path(name).expanduser()
    if path.is_dir():
        return path
    if path.exists():
        raise UserError(f"{path}: a file; name the directory that holds {CONFIG}")
    if partial_path(path).exists():
        raise UserError(f"{path}: not there yet; {partial_path(path).name} beside it is half-made")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", str(name)):
        raise UserError(f"{path}: there is no such directory")
    return download_from_hub(
        str(name), "model", "directory", [CONFIG, "*.safetensors", INDEX, *COMPANIONS]
    )


def download_from_hub(
    name: str, kind: Literal["model", "dataset"], here: str, patterns: list[str]
) -> Path:
    """The folder that a model or data set of the hub is fetched to; here: what would have been taken from this machine.

    UserError says why it cannot be had.
    """
    from huggingface_hub import errors, snapshot_download  # only who asks for the network needs it

    try:
        return Path(snapshot_download(name, repo_type=kind, allow_patterns=patterns))
    except errors.GatedRepoError as error:
        reason, cause = "the hub wants you to log in and accept its terms", error
    except errors.RepositoryNotFoundError as error:
        reason, cause = f"the hub has no public {kind} of this name", error
    except (errors.LocalEntryNotFoundError, errors.OfflineModeIsEnabled) as error:
        reason, cause = "the hub cannot be reached", error
    except Exception as error:  # of many kinds, from several libraries
        reason, cause = f"the hub's answer was {type(error).__name__}", error
    raise UserError(f"{name}: there is no such {here} here, and {reason}") from cause


def flatten(tree: Any) -> Iterator[tuple[str, Any]]:
    """(path, leaf) of each leaf of a tree, in its order."""
    return ((path_name(path), leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(tree))


def unflatten(leaves: dict[str, Any]) -> dict[str, Any]:
    """The nested dict of leaves by path."""
    tree: dict[str, Any] = {}
    for path, leaf in leaves.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


def read_hf_params(
    directory: Path, dtype: Any, mesh: Mesh | None = None
) -> tuple[Any, dict[str, Any]]:
    """(config, parameters in `dtype`) of a Hugging Face directory, sharded over the mesh where there is one."""
    config = read_hf_config(directory)
    abstract = abstract_params(build(config, dtype, param_dtype=dtype))
    where = {} if mesh is None else dict(flatten(shardings(abstract, mesh, config.family)))
    source = SafetensorsSource(directory)
    plan = map_weights(config, abstract, source.entries)
    source.check(plan)
    leaves = {
        path: read_leaf(source, plan.leaves[path], x.shape, x.dtype, where.get(path))
        for path, x in flatten(abstract)
    }
    return config, unflatten(leaves)
