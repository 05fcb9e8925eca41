"""`xflow plan`: its output, its exit status and bad input."""

from __future__ import annotations

import argparse
import json

import pytest

from xflow_jax.cli import plan
from xflow_jax.errors import UserError


def arguments(*argv):
    parser = argparse.ArgumentParser()
    plan.add_arguments(parser)
    return parser.parse_args(argv)


def test_a_gpu_by_arithmetic_and_its_exit_status(capsys, tmp_path):
    file, page = tmp_path / "rows.json", tmp_path / "rows.md"
    options = ("--program=decode,align,sft,rollout", f"--json={file}", f"--markdown={page}")
    assert plan.run(arguments("--preset=llada-8b", "--device=gpu:h200", *options)) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("llada-8b decode on gpu:h200, mesh 1,1,1, batch 1: fits, ")
    rows = json.loads(file.read_text())["rows"]
    assert [r["program"] for r in rows] == ["decode", "align", "sft", "rollout"]
    assert rows[0]["seconds"]["compute"] == pytest.approx(rows[0]["flops"] / 989e12)
    assert "| decode | 1 | 1,1,1 | yes |" in page.read_text()
    assert plan.run(arguments("--preset=llada2-flash", "--device=gpu:h200")) == 1
    assert "does not fit" in capsys.readouterr().out


def test_int8_fits_where_bfloat16_does_not(capsys, tmp_path):
    command = ("--preset=llada-8b", "--device=tpu:v5e", "--batch=8", f"--json={tmp_path / 'rows'}")
    command += ("--block-length=32", "--cache=dual")
    assert plan.run(arguments(*command)) == 1
    page = tmp_path / "page.md"
    assert plan.run(arguments(*command, "--dtype=int8", f"--markdown={page}")) == 0
    assert "llada-8b decode, dual cache, int8 on tpu:v5e" in capsys.readouterr().out
    assert "--dtype int8" in page.read_text() and "| decode, dual cache, int8 |" in page.read_text()
    rows = json.loads((tmp_path / "rows").read_text())["rows"]
    assert [row["dtype"] for row in rows] == ["int8", "bfloat16"]


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ("--preset=llama", "--device=gpu:h200"),
            "there is no preset 'llama'. There are llada-8b",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--program=decoed"),
            "there is no program 'decoed'",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--batch=0"),
            "the batch '0' must be positive whole numbers",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--program=align", "--train-batch=0"),
            "--train-batch must be at least 1",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200:4", "--mesh=1,8,1"),
            "mesh 1,8,1 is of 8 devices, but there are 4",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--mesh=8"),
            "mesh '8' must be three positive sizes",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--set=steps=3"),
            "--set sets keys of a training, so it needs align or sft among the programs",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", f"--json={__file__}"),
            "test_plan.py: not valid JSON",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--dtype=float32"),
            "--dtype is 'float32', but it must be bfloat16 or int8",
        ),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--dtype=int8", "--program=decode,align"),
            "--dtype int8 is for decode, and the other programs train in bfloat16",
        ),
        (("--preset=llada-8b", "--topology=v5z-8"), "there is no topology 'v5z-8'"),
        (
            ("--preset=llada-8b", "--device=gpu:h200", "--gen-length=9999"),
            "exceed the model's 4096 positions",
        ),
    ],
)
def test_bad_input(argv, message):
    with pytest.raises(UserError) as error:
        plan.run(arguments(*argv))
    assert message in str(error.value)


def test_without_the_compiler_one_sentence_names_the_extra(monkeypatch):
    monkeypatch.setattr(plan.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError) as error:
        plan.run(arguments("--preset=llada-8b", "--topology=v5e-8"))
    assert str(error.value) == (
        'the TPU compiler is missing. It comes with the extra [plan]: pip install "xflow-jax[plan]"'
    )
