"""Arguments of `xflow serve`. The server itself is tested in tests/serving."""

from __future__ import annotations

import sys

import pytest

from xflow_jax.cli.main import build_parser, main


def test_lists_and_automatic_numbers():
    words = ["serve", "--model", "m", "--gen-lengths", "64,128", "--slots", "auto"]
    args = build_parser("serve").parse_all(words)
    assert (args.gen_lengths, args.prompt_lengths, args.slots) == ([64, 128], None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--port", "70000"], "--port must be from 0 to 65535, not 70000"),
        (["--steps-per-call", "9"], "--steps-per-call must be from 1 to 8, not 9"),
        (["--slots", "0"], "--slots must be at least 1, not 0"),
        (
            ["--cache", "duel"],
            "there is no cache 'duel'. There are none, exact, prompt, prefix and",
        ),
        (["--cache", "exact"], "llada attends to later blocks, so it has no exact cache"),
        (["--cache", "auto", "--window", "8"], "window 8 needs cache dual, not none"),
        (["--gen-lengths", "64,0"], "must be lengths of at least 1"),
        (["--gen-lengths", "a"], "must be a whole number"),
        (["--rules", "nope"], "there is no rule 'nope'"),
    ],
)
def test_wrong_arguments(capsys, words, message):
    try:
        status = main(["serve", "--model", "tiny", *words])
    except SystemExit as error:
        status = error.code
    assert status == 2 and message in capsys.readouterr().err


def test_a_missing_package_is_named(capsys, monkeypatch):
    monkeypatch.delitem(sys.modules, "xflow_jax.cli.serve_run", raising=False)
    for name in [n for n in sys.modules if n.startswith("xflow_jax.serving.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["serve", "--model", "tiny"]) == 2
    assert "xflow serve needs the package uvicorn: pip install" in capsys.readouterr().err
