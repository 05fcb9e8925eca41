"""Arguments of `xflow bench-serve`. What it measures is tested in tests/serving/test_load.py."""

from __future__ import annotations

import sys

import pytest

from xflow_jax.cli.main import main


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "one of the arguments --url --model is required"),
        (["--url", "x", "--model", "tiny"], "not allowed with argument"),
        (["--url", "x", "--rate", "0"], "--rate must be above 0, not 0"),
        (["--url", "x", "--rate", "nan"], "--rate must be above 0, not nan"),
        (["--url", "x", "--disconnects", "2"], "--disconnects must be from 0 to 1, not 2"),
        (["--model", "tiny", "--requests", "0"], "--requests must be at least 1, not 0"),
        (["--url", "http://127.0.0.1:1", "--requests", "1"], "there is no server at"),
    ],
)
def test_wrong_arguments(capsys, words, message):
    try:
        status = main(["bench-serve", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "openai", None)
    assert main(["bench-serve", "--url", "http://127.0.0.1:1"]) == 2
    assert "xflow bench-serve needs the package openai: pip install" in capsys.readouterr().err
