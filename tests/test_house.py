"""The rules of tests/house.py hold in this repository, and each of them finds what breaks it."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests import house

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def sources():
    return house.read_sources(ROOT)


def tree(root: Path, **files: str) -> dict[str, house.Source]:
    """Writes a small tree and reads it. A keyword is a path with __ for / and without .py."""
    return write(root, {f"{name.replace('__', '/')}.py": text for name, text in files.items()})


def write(root: Path, files: dict[str, str]) -> dict[str, house.Source]:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return house.read_sources(root)


def listing(offenders: list[str]) -> str:
    return "\n".join([f"{len(offenders)} found:", *offenders])


def test_imports_go_down_only(sources):
    assert {"xflow_jax", "xflow_jax.models.config"} <= set(sources)
    assert house.import_complaints(sources) == []


def test_the_library_has_few_top_level_names():
    assert len(house.top_level_names(ROOT)) <= 20


def test_functions_of_the_core_are_short(sources):
    found = house.long_functions(sources)
    assert not found, listing(found)


def test_few_parameters_are_any(sources):
    loose, total = house.any_parameters(sources)
    assert len(loose) <= house.MAX_ANY * total, listing(loose)


def test_a_family_is_compared_only_where_it_is_made(sources):
    found = house.family_comparisons(sources)
    assert not found, listing(found)


@pytest.mark.parametrize("rule", ["opening", "first line", "semicolon"])
def test_docstrings_are_plain(sources, rule):
    found = house.docstring_complaints(sources)[rule]
    assert not found, listing(found)


def test_comments_hold_one_clause_each(sources):
    found = house.semicolon_comments(sources)
    assert not found, listing(found)


def test_messages_hold_one_clause_each(sources):
    found = house.semicolon_messages(sources)
    assert not found, listing(found)


def test_exported_functions_and_classes_have_docstrings(sources):
    found = house.missing_docstrings(sources)
    assert not found, listing(found)


D = "xflow_jax/decoding/__init__.py"
DECODE = "xflow_jax/decoding/decode.py"


@pytest.mark.parametrize(
    ("files", "complaint"),
    [
        ({"xflow_jax/models/a.py": "from xflow_jax.decoding import step"}, "must not import"),
        ({"xflow_jax/models/a.py": "from xflow_jax import decoding"}, "must not import"),
        ({"xflow_jax/models/a.py": "from ..decoding.decode import step"}, "(rank 4)"),
        ({"xflow_jax/models/a.py": "def f():\n    import xflow_jax.decoding"}, "a, line 2: models"),
        ({"xflow_jax/models/a.py": "import xflow_jax"}, "must not import xflow_jax (rank 7)"),
        ({"xflow_jax/models/a.py": "from . import b"}, None),
        (
            {
                "xflow_jax/models/a.py": "from typing import TYPE_CHECKING\n"
                "if TYPE_CHECKING:\n    import xflow_jax.decoding"
            },
            "models (rank 3) must not import xflow_jax.decoding (rank 4)",
        ),
        ({"xflow_jax/checkpoints/a.py": "import xflow_jax.decoding"}, "(rank 4) must not import"),
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
        ({"xflow_jax/sandbox/program.py": "from ctypes import CDLL"}, "ctypes must stay out of"),
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
    found = house.import_complaints(write(tmp_path, {**dict.fromkeys(rest, ""), **files}))
    if complaint is None:
        assert found == []
    else:
        assert len(found) == 1 and complaint in found[0]


def test_circles_are_found_in_modules_without_a_rank(tmp_path):
    found = write(
        tmp_path,
        {
            "xflow_jax/__init__.py": "",
            "xflow_jax/one.py": "def f():\n    from xflow_jax import two",
            "xflow_jax/two.py": "import xflow_jax.three",
            "xflow_jax/three.py": "from xflow_jax.one import f",
            "xflow_jax/four.py": "from xflow_jax import five, one",
            "xflow_jax/five.py": "from xflow_jax import four",
        },
    )
    circles = sorted(map(sorted, house.import_circles(found)))
    assert circles == [
        ["xflow_jax.five", "xflow_jax.four"],
        ["xflow_jax.one", "xflow_jax.three", "xflow_jax.two"],
    ]


def function_of(lines: int, name: str = "f") -> str:
    return f"@decorator\n@other\ndef {name}():\n" + "    x = 1\n" * (lines - 1)


def test_long_functions_are_found(tmp_path):
    nested = "class A:\n    async def g(self):\n        pass\n" + "        x = 1\n" * 59
    found = write(
        tmp_path,
        {
            "xflow_jax/models/a.py": function_of(60) + function_of(61, "g"),
            "xflow_jax/decoding/a.py": nested,
            "xflow_jax/training.py": function_of(99),
            "xflow_jax/cli/a.py": function_of(99),
            "train/models.py": function_of(99),
        },
    )
    assert house.long_functions(found) == [
        "xflow_jax.decoding.a.g: 61 lines",
        "xflow_jax.models.a.g: 61 lines",
        "xflow_jax.training.f: 99 lines",
    ]


def test_parameters_without_a_type_are_counted(tmp_path):
    code = """
class A:
    def method(self, bare, right: int, /, loose: Any, *rest: typing.Any, key: "list[Any]",
               **more): ...
    @classmethod
    def make(cls) -> None:
        async def inner(deep): return lambda x: x
"""
    loose, total = house.any_parameters(tree(tmp_path, train__a=code))
    places = [place.removeprefix("train.a.") for place in loose]
    assert places == [
        "method: bare",
        "method: loose",
        "method: rest",
        "method: more",
        "inner: deep",
    ]
    assert total == 7


def test_comparisons_with_a_family_are_found(tmp_path):
    found = write(
        tmp_path,
        {
            "xflow_jax/lm.py": "x = config.family == 'llada2'\ny = 'llada' in name",
            "xflow_jax/cli/a.py": "x = family in ('llada', 'other')\ny = 'llada-8b' == name",
            "xflow_jax/models/a.py": "x = family == 'llada'",
            "xflow_jax/checkpoints/a.py": "x = family == 'llada'",
            "train/models.py": "def f(family='llada'): return family != 'llada'",
        },
    )
    assert house.family_comparisons(found) == [
        "xflow_jax.cli.a, line 1: family in ('llada', 'other')",
        "xflow_jax.lm, line 1: config.family == 'llada2'",
        "xflow_jax.lm, line 2: 'llada' in name",
        "train.models, line 1: family != 'llada'",
    ]


TWELVE = "one two three four five six seven eight nine ten eleven twelve."


@pytest.mark.parametrize(
    ("text", "rule", "complaint"),
    [
        ("Builds a thing.", None, ""),
        (f"{TWELVE}\n\nWhat follows may be long and longer, and begin as it likes.", None, ""),
        ("Whatever it is, it is fine.", None, ""),
        ("Asks nothing of as many words.", None, ""),
        ("What it does.", "opening", "begins with 'What'"),
        ("Where, at times.", "opening", "begins with 'Where'"),
        ("Whether it is so.", "opening", "begins with 'Whether'"),
        ("As `run_program`.", "opening", "begins with 'As'"),
        (f"Zero {TWELVE}", "first line", "13 words"),
        (
            "Zero one two three four five six\nseven eight nine ten eleven twelve.",
            "first line",
            "13",
        ),
        ("Builds a thing.\n\nIt is big; it is slow; it is old.", "semicolon", ": 2"),
    ],
)
@pytest.mark.parametrize("holder", ["{}", "class A:\n    {}", "async def f():\n    {}"])
def test_docstrings_that_break_a_rule_are_found(tmp_path, text, rule, complaint, holder):
    sources = tree(tmp_path, convert__a=holder.format(f'"""{text}"""'))
    found = {name: places for name, places in house.docstring_complaints(sources).items() if places}
    assert list(found) == ([rule] if rule else [])
    if rule:
        (place,) = found[rule]
        assert complaint in place and place.startswith(
            ("convert.a:", "convert.a.A:", "convert.a.f:")
        )


def test_semicolons_between_clauses_are_found(tmp_path):
    code = """
x = "a; b"  # one clause, and "; " alone
y = 1  # two clauses; here they are
z = 2; w = 3
raise ValueError(f"{x} is odd; choose another")
parser.add_argument("--x", help="one; two", default="three; four")
"""
    joined = "raise UserError('; '.join(names))\nrequire(ok, 'one; two')\nfoo.warn('ends with;')"
    sources = tree(tmp_path, train__a=code, train__b=joined)
    assert house.semicolon_comments(sources) == ["train.a, line 3: # two clauses; here they are"]
    assert house.semicolon_messages(sources) == [
        "train.a, line 5:  is odd; choose another",
        "train.a, line 6: one; two",
        "train.b, line 2: one; two",
    ]


def test_exported_names_without_a_docstring_are_found(tmp_path):
    found = write(
        tmp_path,
        {
            "xflow_jax/models/__init__.py": "from xflow_jax.models.a import A, f, g\n"
            "from . import a\nX = 1\n__all__ = ['A', 'X', 'a', 'f', 'g', 'h']\n"
            "def h(): pass\ndef private(): pass",
            "xflow_jax/models/a.py": "from xflow_jax.models.b import g\n"
            "class A:\n    x: int\ndef f():\n    'Does it.'\ndef other(): pass",
            "xflow_jax/models/b.py": "async def g(): pass",
        },
    )
    assert house.missing_docstrings(found) == [
        f"xflow_jax.models.{name}" for name in ("A", "g", "h")
    ]


def test_the_figures_of_a_tree(tmp_path, capsys):
    write(
        tmp_path,
        {
            "xflow_jax/__init__.py": "",
            "xflow_jax/lm.py": "from xflow_jax.models import a\n" + function_of(5),
            "xflow_jax/models/__init__.py": "",
            "xflow_jax/models/a.py": f"'Zero {TWELVE}'\ndef f(x, y: int):\n    'Of it; a'\n",
            "xflow_jax/data/notes.txt": "no Python here",
            "train/align.py": f"x = {'1' * 97}\n" + "\n" * 400,
        },
    )
    assert house.top_level_names(tmp_path) == ["__init__", "lm", "models"]
    house.main(tmp_path)
    figures = dict(line.split("  ", 1) for line in capsys.readouterr().out.splitlines())
    assert {name: value.strip() for name, value in figures.items()} == {
        "top-level names in the library": "3",
        "arrows between them": "1",
        "modules in circles of imports": "0",
        "longest function": "5 lines (lm.f)",
        "longest in decoding, models, training": "2 lines (models.a.f)",
        "parameters that are Any or bare": "1 of 2 (50.0 %)",
        "family comparisons outside models, checkpoints": "0",
        "docstrings that open like a clause": "1 of 2",
        "docstrings with a first line above 12 words": "1 of 2",
        "semicolons in docstrings": "1",
        "semicolons in comments": "0",
        "semicolons in messages": "0",
        "exported names without a docstring": "0",
        "files above 400 lines": "1",
        "lines above 100 columns": "1",
    }
