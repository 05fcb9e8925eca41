"""Tests that constraints.txt has one version of each package for every Python."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[1]
PYTHONS = ("3.11", "3.12", "3.13")


def constraints(python: str) -> list[tuple[str, str]]:
    """Returns the (name, version) pairs for a Python."""
    lines = [Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines()]
    return [
        (canonicalize_name(line.name), str(line.specifier).removeprefix("=="))
        for line in lines
        if line.marker is None or line.marker.evaluate({"python_version": python})
    ]


@pytest.mark.parametrize("python", PYTHONS)
def test_every_dependency_has_one_version(python):
    found = constraints(python)
    names = [name for name, _ in found]
    assert len(set(names)) == len(names)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = [text for texts in project["optional-dependencies"].values() for text in texts]
    wanted = [Requirement(text) for text in project["dependencies"] + extras]
    unpinned = {"s3fs"}  # it would pin older versions of what gcsfs needs
    for requirement in wanted:
        if requirement.marker is None or requirement.marker.evaluate({"python_version": python}):
            name = canonicalize_name(requirement.name)
            assert name in unpinned or requirement.specifier.contains(dict(found)[name])


def test_the_matrix_of_ci_has_the_versions_of_jax():
    text = (ROOT / ".github/workflows/ci.yml").read_text()
    rows = re.findall(r'\{python: "(.+?)", jax: "(.+?)"\}', text)
    versions = {python: dict(constraints(python))["jax"] for python in PYTHONS}
    assert rows == [(python, version[:4]) for python, version in versions.items()]
