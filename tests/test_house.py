"""The layout: imports go down and through doors, and the figures of tests/house.py stay small."""

from __future__ import annotations

import pytest

from tests import house


@pytest.fixture(scope="module")
def sources():
    return house.read_sources(house.Path(__file__).parents[1])


def test_imports_go_down_only(sources):
    assert {"xflow_jax", "xflow_jax.models.config"} <= set(sources)
    assert house.import_complaints(sources) == []


def test_the_library_has_few_top_level_names():
    assert len(house.top_level_names(house.Path(__file__).parents[1])) <= 20


D = "xflow_jax/decoding/__init__.py"
DECODE = "xflow_jax/decoding/decode.py"


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"xflow_jax/models/a.py": "from xflow_jax.decoding import step"}, "must not import"),
        ({"xflow_jax/models/a.py": "from xflow_jax import decoding"}, "must not import"),
        ({"xflow_jax/models/a.py": "from ..decoding.decode import step"}, "(rank 3)"),
        ({"xflow_jax/models/a.py": "def f():\n    import xflow_jax.decoding"}, "a, line 2: models"),
        ({"xflow_jax/models/a.py": "import xflow_jax"}, "must not import xflow_jax (rank 6)"),
        ({"xflow_jax/models/a.py": "from . import b"}, None),
        (
            {
                "xflow_jax/models/a.py": "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    import xflow_jax.decoding"
            },
            "models (rank 2) must not import xflow_jax.decoding (rank 3)",
        ),
        ({"xflow_jax/checkpoints/a.py": "import xflow_jax.decoding"}, "(rank 3) must not import"),
        (
            {D: "__all__ = ['step']", "xflow_jax/lm.py": "from xflow_jax.decoding import step"},
            None,
        ),
        (
            {D: "__all__ = ['step']", "xflow_jax/lm.py": "from xflow_jax.decoding import other"},
            "xflow_jax.decoding.other is not exported by xflow_jax.decoding",
        ),
        (
            {"xflow_jax/lm.py": "from xflow_jax.decoding.decode import step"},
            "xflow_jax.decoding.decode.step is not exported by xflow_jax.decoding",
        ),
        ({"xflow_jax/odd.py": ""}, "xflow_jax.odd has no rank: give odd a place in RANKS"),
        ({"xflow_jax/lm.py": "import train.setup"}, "must not import the program train.setup"),
        ({"train/align.py": "import convert.names"}, "train/ must not import convert.names"),
        ({"convert/names.py": "from train import setup"}, "convert/ must not import train.setup"),
        ({"convert/names.py": "def f():\n    import torch"}, "torch is imported only inside"),
        ({"convert/verify.py": "import torch.nn"}, "torch is imported only inside functions"),
        ({"xflow_jax/lm.py": "from flax import linen as nn"}, "flax.linen is imported only in"),
        ({"train/align.py": "from flax.linen import Module"}, "flax.linen is imported only in"),
        ({"xflow_jax/sandbox/child.py": "import numpy"}, "imports only the standard library"),
        ({"xflow_jax/sandbox/child.py": "from ctypes import CDLL"}, "ctypes must stay out of"),
        (
            {
                "xflow_jax/sandbox/x.py": "import xflow_jax.sandbox.launch",
                "xflow_jax/sandbox/launch.py": "",
            },
            "xflow_jax.sandbox.launch is a script, and is not imported",
        ),
        (
            {
                DECODE: "import xflow_jax.decoding.a",
                "xflow_jax/decoding/a.py": "from . import decode",
            },
            "modules import each other in a circle",
        ),
    ],
)
def test_a_wrong_import_is_found(tmp_path, files, complaint):
    rest = ["xflow_jax/__init__.py", D, DECODE, "xflow_jax/models/__init__.py"]
    rest += ["xflow_jax/models/b.py", "train/setup.py", "convert/names.py"]
    for name, source in {**dict.fromkeys(rest, ""), **files}.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    found = house.import_complaints(house.read_sources(tmp_path))
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1 and complaint in found[0]
