"""Places that a user names, on a disk or in object storage.

`to_path` is the one way from a name, perhaps gs:// or s3://, to a path. A disk gives a
pathlib.Path. Object storage gives an etils.epath.Path, which has those methods of pathlib.Path that
this project uses.
"""

from __future__ import annotations

import importlib.util
import os
import re
from pathlib import Path
from typing import cast

from xflow_jax.errors import UserError, require

DRIVERS = {"gs": ("gcsfs", "gcs"), "s3": ("s3fs", "s3")}  # scheme -> (package, extra)
_URL = re.compile(r"([A-Za-z][A-Za-z0-9+.-]*)://")
# pathlib makes one slash of two, and then the name is that of a folder.
_COLLAPSED = re.compile(r"(gs|s3):/(?!/)")


def to_path(name: str | os.PathLike[str]) -> Path:
    """Returns the path of a place that a user names.

    Args:
        name: path on a disk, or a URL like gs://bucket/folder or s3://bucket/folder.

    Returns:
        The path.

    Raises:
        UserError: for another kind of URL, a URL without a bucket, a URL that pathlib has read
            before, or if the driver of the storage is not installed.
    """
    text = os.fspath(name)
    if _COLLAPSED.match(text):
        raise UserError(f"{text}: two slashes must follow the colon, as in {text[:3]}//bucket/name")
    match = _URL.match(text)
    if match is None:
        return name if isinstance(name, Path) else Path(text)
    scheme = match[1]
    if scheme not in DRIVERS:
        choice = " or ".join(f"{known}://" for known in DRIVERS)
        raise UserError(f"{text}: a place is on a disk, or begins with {choice}")
    require(
        bool(text[match.end() :].strip("/")),
        f"{text}: a bucket must follow, as in {match[0]}bucket/name",
    )
    package, extra = DRIVERS[scheme]
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f'{text}: {match[0]} needs {package}. Install it with pip install "xflow-jax[{extra}]".'
        )
    from etils import epath  # slow, and not always needed

    return cast(Path, epath.Path(text))


def is_cloud(name: str | os.PathLike[str]) -> bool:
    """Returns True for a place in object storage."""
    return _URL.match(os.fspath(name)) is not None


def absolute(name: str | os.PathLike[str]) -> Path:
    """Returns the path with the working directory in front. A URL stays."""
    path = to_path(name)
    return path if is_cloud(path) else path.absolute()
