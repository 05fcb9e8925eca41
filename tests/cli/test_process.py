"""Standard streams and errors of every program: one sentence, and no answer is lost."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PROGRAM = """
import sys
from xflow_jax.cli.process import print_text, run_process
from xflow_jax.errors import UserError

def run():
    {body}

sys.exit(run_process(run, needs_output={needs_output}))
"""


def run(
    body: str, shell: str = "", needs_output: bool = True, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs a program with this body. The shell's text follows the command."""
    code = PROGRAM.format(body=body, needs_output=needs_output)
    command = f'"$PYTHON" -c "$CODE" {shell}'
    return subprocess.run(
        ["bash", "-c", command],
        cwd=ROOT,
        env={"PYTHON": sys.executable, "CODE": code, "PATH": "/usr/bin:/bin", **env},
        capture_output=True,
        text=True,
        timeout=300,
    )


def test_a_character_that_the_output_lacks_is_escaped():
    done = run("print_text('Größe \\U0001f600 \\x1b[2J')", PYTHONIOENCODING="ascii")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout == "Gr\\xf6\\xdfe \\U0001f600 \\x1b[2J\n"
    done = run("raise UserError('Größe')", PYTHONIOENCODING="ascii")
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "error: Gr\\xf6\\xdfe\n")


def test_a_closed_output_is_noticed_before_the_work():
    done = run("open('/dev/null'); print(1); sys.exit(9)", ">&-")
    assert done.returncode == 2 and done.stderr.startswith("error: standard output is closed")
    assert done.stderr.count("\n") == 1
    for shell in (">&- 2>&-", "2>&-"):
        done = run("print(1); print(2, file=sys.stderr)", shell, needs_output=False)
        assert done.returncode == 0 and done.stderr == ""


def test_a_reader_that_is_gone():
    done = run("[print('x' * 1000) for _ in range(10**4)]", "| head -1; echo ${PIPESTATUS[0]}")
    assert done.stdout == "x" * 1000 + "\n1\n" and done.stderr == ""


def test_a_full_output():
    for body in ("print(1)", "print('x' * 10**6)"):
        done = run(body, "> /dev/full")
        sentence = "error: cannot read or write: No space left on device\n"
        assert (done.returncode, done.stderr) == (2, sentence)


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        ("raise KeyboardInterrupt", 130, "interrupted"),
        ("raise MemoryError", 2, "error: there is not enough memory"),
        (
            "raise RuntimeError('RESOURCE_EXHAUSTED: 3 bytes\\nmore')",
            2,
            "error: there is not enough memory on the device: RESOURCE_EXHAUSTED: 3 bytes",
        ),
        ("open('/no/such')", 2, "error: /no/such: cannot be read or written: No such file or"),
        ("open('a\\0b')", 2, "error: a name holds the character NUL"),
        ("raise UserError('a\\x1b[2J\\nb')", 2, r"error: a\x1b[2J\nb"),
    ],
)
def test_errors_are_one_line(body, status, sentence):
    done = run(body)
    assert done.returncode == status and done.stdout == ""
    assert done.stderr.startswith(sentence) and done.stderr.count("\n") == 1


def test_a_bug_keeps_its_traceback():
    done = run("raise RuntimeError('bug')")
    assert done.returncode == 1 and "Traceback" in done.stderr
