"""Extraction and verdicts of HumanEval and MBPP beside the definition of the original protocol.

The reference below states the protocol once more, with regular expressions, as the originals do:
humaneval_postprocess_v2 and MBPPEvaluator of OpenCompass, in the version of ML-GSAI/LLaDA, and
check_correctness of openai/human-eval.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import json
import random
import re
import time
import warnings

import pytest

from xflow_jax.errors import UserError
from xflow_jax.evaluation.fingerprint import describe_task
from xflow_jax.evaluation.tables import table_legend
from xflow_jax.sandbox import run_many
from xflow_jax.tasks import humaneval, mbpp
from xflow_jax.tasks.base import extract_code, get_task
from xflow_jax.tasks.extraction import EXTRACTIONS

PROBLEM = humaneval.Problem(
    task_id="HumanEval/0",
    prompt='from typing import List\n\n\ndef f(x: int) -> int:\n    """ The same. """\n',
    entry_point="f",
    canonical_solution="    return x\n",
    test="METADATA = {}\n\n\ndef check(candidate):\n    assert candidate(1) == 1\n",
)
ADD = mbpp.Problem(11, "Add.", "def add(a, b):\n    return a + b", ("assert add(1, 2) == 3",), "")


def reference_humaneval(text: str) -> str:
    blocks = re.findall("`{3}" r"\w*\n((?s:.*?))" "`{3}", text)
    return (blocks[0] if blocks else text).lstrip()


def reference_mbpp(text: str, quotes: bool = True) -> str:
    patterns = []
    for body in ("'(.*)'", "'(.*)", "(.*)"):
        for done in (r"\[DONE\]", "DONE"):
            patterns += [rf"{begin}\s*{body}\s*{done}" for begin in (r"\[BEGIN\]", "BEGIN")]
    patterns += ["```python" r"\s*(.*)\s*" "```", "```" r"\s*(.*)\s*" "```"]
    patterns += ["```python" r"\s*(.*)\s*$", "```" r"\s*(.*)\s*$", r"(.*)\s*" "```.*"]
    patterns += [r"\[BEGIN\]\s*'(.*)", r"\[BEGIN\](.*)", r"'(.*)'\s*\[DONE\]"]
    found = (re.search(pattern, text, re.DOTALL) for pattern in patterns)
    code = next((match.group(1) for match in found if match), text)
    code = re.split(r"'?\s*\[?DONE\]?", code.split("```")[0])[0].replace("\\_", "_").strip()
    if quotes and code[:1] == "'":
        code = code[1:]
    if quotes and code[-1:] == "'":
        code = code[:-1]
    return code


def reference_passes(program: str) -> bool:
    """Runs a whole program of this file as the originals do, in one namespace."""
    output = io.StringIO()
    try:
        with contextlib.redirect_stdout(output), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(program, {})
    except BaseException:
        return False
    return True


SAME = "def f(x):\n    return x"
FENCE = f"```python\n{SAME}\n```"

# name -> (answer, True if it passes)
HUMANEVAL = {
    "fence": (FENCE, True),
    "fence without a name": (f"```\n{SAME}\n```", True),
    "fence of another name": (f"```py\n{SAME}\n```", True),
    "capital name": (f"```Python\n{SAME}\n```", True),
    "name with a digit": (f"```python3\n{SAME}\n```", True),
    "name with a sign": (f"```c++\n{SAME}\n```", False),
    "prose around the fence": (f"Here it is:\n\n{FENCE}\n\nIt returns x.", True),
    "prose on the line of the fence": (f"Here it is: {FENCE} Done.", True),
    "no fence": (SAME, True),
    "no fence, empty lines before it": (f"\n\n{SAME}\n", True),
    "no fence, spaces before it": (f"  {SAME}", True),
    "prose and no fence": (f"Here it is:\n{SAME}", False),
    "prose below and no fence": (f"{SAME}\n\nThis returns x.", False),
    "comment and no fence": (f"# It returns x.\n{SAME}", True),
    "unclosed fence": (f"```python\n{SAME}", False),
    "unclosed fence after prose": (f"Here it is:\n```python\n{SAME}\n", False),
    "closed fence, then an unclosed one": (f"{FENCE}\n```python\ndef f(x):", True),
    "body with its indentation": ("    return x", False),
    "body without indentation": ("return x", False),
    "body in a fence": ("```python\n    return x\n```", False),
    "body of two lines": ("    y = x\n    return y", False),
    "body of two lines, the first one not indented": ("y = x\n    return y", False),
    "lambda": ("```python\nf = lambda x: x\n```", True),
    "lambda without a fence": ("f = lambda x: x", True),
    "alias": ("```python\ndef same(x):\n    return x\nf = same\n```", True),
    "class with a call": (
        "```python\nclass F:\n    def __call__(self, x):\n        return x\nf = F()\n```",
        True,
    ),
    "decorated": ("```python\ndef d(g):\n    return g\n\n@d\ndef f(x):\n    return x\n```", True),
    "indented fence": (
        "1. Code:\n\n   ```python\n   def f(x):\n       return x\n   ```",
        True,
    ),
    "indented fence of two statements": (
        "   ```python\n   y = 0\n   def f(x):\n       return x\n   ```",
        False,
    ),
    "CRLF fence": ("```python\r\ndef f(x):\r\n    return x\r\n```", False),
    "CRLF code": ("```python\ndef f(x):\r\n    return x\r\n```", True),
    "space after the marks": (f"``` python\n{SAME}\n```", False),
    "space after the name": (f"```python \n{SAME}\n```", False),
    "attributes of the fence": (f'```python title="a"\n{SAME}\n```', False),
    "four backticks": (f"````python\n{SAME}\n````", True),
    "tildes": (f"~~~python\n{SAME}\n~~~", False),
    "code on the line of the marks": ("```f = lambda x: x```", False),
    "two fences, the first right": (f"{FENCE}\n```python\nprint(f(1))\nraise\n```", True),
    "two fences, the second right": (f"```bash\npip install x\n```\n{FENCE}", False),
    "two fences, the first a draft": (f"```python\ndef f(x):\n    return 0\n```\n{FENCE}", False),
    "fence of an example below the code": (f"{FENCE}\n```\n>>> f(1)\n1\n```", True),
    "future import": (f"```python\nfrom __future__ import annotations\n{SAME}\n```", False),
    "import": ("```python\nimport math\ndef f(x):\n    return int(math.sqrt(x * x))\n```", True),
    "names of the problem": ("```python\ndef f(x: List) -> List:\n    return x\n```", True),
    "main guard": (f"```python\n{SAME}\nif __name__ == '__main__':\n    raise OSError\n```", True),
    "prints": (f"```python\n{SAME}\nprint(f(1))\n```", True),
    "a test that fails": (f"```python\n{SAME}\nassert f(1) == 2\n```", False),
    "leaves early": (f"```python\n{SAME}\nraise SystemExit(0)\n```", False),
    "another name of the function": ("```python\ndef g(x):\n    return x\n```", False),
    "wrong": ("```python\ndef f(x):\n    return x + 1\n```", False),
    "empty": ("", False),
    "empty fence": ("```python\n```", False),
    "tabs": ("```python\ndef f(x):\n\treturn x\n```", True),
    "backticks in the code": (
        '```python\ndef f(x):\n    """ ```x``` """\n    return x\n```',
        False,
    ),
    "whole problem": (f"```python\n{PROBLEM.prompt}    return x\n```", True),
}

SUM = "def add(a, b):\n    return a + b"
# name -> (answer, True if it passes)
MBPP = {
    "worked example": (f"[BEGIN]\n '{SUM}' \n[DONE] \n\n ", True),
    "without quotes": (f"[BEGIN]\n{SUM}\n[DONE]", True),
    "opening quote only": (f"[BEGIN]\n'{SUM}\n[DONE]", True),
    "closing quote only": (f"[BEGIN]\n{SUM}'\n[DONE]", True),
    "double quotes": (f'[BEGIN]\n"{SUM}"\n[DONE]', False),
    "no DONE": (f"[BEGIN]\n '{SUM}'", True),
    "no DONE, no quotes": (f"[BEGIN]\n{SUM}\n", True),
    "no DONE, opening quote only": (f"[BEGIN]\n '{SUM}", True),
    "no BEGIN": (f"'{SUM}' \n[DONE]", True),
    "no BEGIN, no quotes": (f"{SUM}\n[DONE]", True),
    "BEGIN without brackets": (f"BEGIN\n '{SUM}' \nDONE", True),
    "BEGIN without brackets, DONE with": (f"BEGIN\n '{SUM}' \n[DONE]", True),
    "DONE without brackets": (f"[BEGIN]\n '{SUM}' \nDONE", True),
    "BEGIN alone without brackets": (f"BEGIN\n{SUM}", False),
    "no markers": (SUM, True),
    "quotes alone": (f"'{SUM}'", True),
    "prose before BEGIN": (f"Sure:\n[BEGIN]\n '{SUM}' \n[DONE]", True),
    "prose after DONE": (f"[BEGIN]\n '{SUM}' \n[DONE]\nIt adds a and b.", True),
    "prose and no markers": (f"Sure:\n{SUM}", False),
    "more examples": (f"[BEGIN]\n '{SUM}' \n[DONE] \n\n [BEGIN]\n 'raise' \n[DONE]", True),
    "escaped underscore": (
        "[BEGIN]\n 'def add(a, b):\n    my\\_sum = a + b\n    return my\\_sum' \n[DONE]",
        True,
    ),
    "indented code": ("[BEGIN]\n '    def add(a, b):\n        return a + b' \n[DONE]", True),
    "indented lines": ("[BEGIN]\n 'x = 1\n  def add(a, b):\n    return a + b' \n[DONE]", False),
    "CRLF": ("[BEGIN]\n 'def add(a, b):\r\n    return a + b' \r\n[DONE]", True),
    "lambda": ("[BEGIN]\n 'add = lambda a, b: a + b' \n[DONE]", True),
    "fence": (f"```python\n{SUM}\n```", True),
    "fence without a name": (f"```\n{SUM}\n```", True),
    "fence of another name": (f"```py\n{SUM}\n```", False),
    "unclosed fence": (f"Sure:\n```python\n{SUM}", True),
    "unclosed fence without a name": (f"Sure:\n```\n{SUM}", True),
    "two fences": (f"```python\n{SUM}\n```\nand\n```python\nraise\n```", True),
    "prose around the fence": (f"Sure:\n```python\n{SUM}\n```\nIt adds.", True),
    "fence between the markers": (f"[BEGIN]\n```python\n{SUM}\n```\n[DONE]", False),
    "fence after DONE": (f"[BEGIN]\n '{SUM}' \n[DONE]\n```python\nraise\n```", True),
    "fence and DONE without BEGIN": (f"```python\n{SUM}\n```\n[DONE]", True),
    "four backticks": (f"```python\n{SUM}\n````", False),
    "BEGIN in a fence": (f"```\n[BEGIN]\n{SUM}\n[DONE]\n```", True),
    "DONE in the code": (f"[BEGIN]\n 'DONE = 1\n{SUM}' \n[DONE]", False),
    "code that ends in a quote": (
        "[BEGIN]\n 'def add(a, b):\n    return a + b if a else '' \n[DONE]",
        False,
    ),
    "code that ends in two quotes": (
        "[BEGIN]\n 'def add(a, b):\n    return a + b if a else ''' \n[DONE]",
        False,
    ),
    "wrong": ("[BEGIN]\n 'def add(a, b):\n    return a - b' \n[DONE]", False),
    "tests in the answer": (f"[BEGIN]\n '{SUM}\nassert add(1, 2) == 3' \n[DONE]", True),
    "empty": ("", False),
    "markers alone": ("[BEGIN] [DONE]", False),
}


def test_there_are_enough_shapes():
    assert len(HUMANEVAL) >= 45 and len(MBPP) >= 30


def test_humaneval_extracts_and_judges_like_the_original():
    texts = [text for text, _ in HUMANEVAL.values()]
    config = humaneval.TASK.config
    jobs = [humaneval.TASK.job(PROBLEM, text) for text in texts]
    results = run_many(jobs, config.limits)
    for (name, (text, passes)), job, result in zip(HUMANEVAL.items(), jobs, results, strict=True):
        code = reference_humaneval(text)
        assert humaneval.TASK.extract(PROBLEM, text) == code, name
        assert job[0] == PROBLEM.prompt + code + "\n", name
        whole = f"{PROBLEM.prompt}{code}\n{PROBLEM.test}\ncheck({PROBLEM.entry_point})"
        assert reference_passes(whole) == passes, name
        assert result.passed == passes, (name, result.reason)


def test_mbpp_extracts_and_judges_like_the_original():
    texts = [text for text, _ in MBPP.values()]
    jobs = [mbpp.TASK.job(ADD, text) for text in texts]
    results = run_many(jobs, mbpp.TASK.config.limits)
    for (name, (text, passes)), job, result in zip(MBPP.items(), jobs, results, strict=True):
        code = reference_mbpp(text)
        assert job[0] == code, name
        assert extract_code(mbpp.CONFIG, text) == code, name
        plain = reference_mbpp(text, quotes=False)
        assert EXTRACTIONS["opencompass-mbpp"].extract(text) == plain, name
        assert reference_passes("\n".join([code, *ADD.test_list])) == passes, name
        assert result.passed == passes, (name, result.reason)


PIECES = ["```", "```python", "````", "`", "python", "[BEGIN]", "BEGIN", "[DONE]", "DONE", "[", "]"]
PIECES += ["'", "''", " ", "  ", "\n", "\r\n", "\t", "x", "def f():\n  return 1", "\\_", "\\", "é"]
PIECES += ["\u2003", "[BEGIN]\n '", "' \n[DONE]", "\n```\n", "DON", "E"]


def test_extraction_equals_the_original_on_random_mixtures():
    rng = random.Random(0)
    for _ in range(20_000):
        text = "".join(rng.choices(PIECES, k=rng.randint(0, 14)))
        assert EXTRACTIONS["opencompass-humaneval-v2"].extract(text) == reference_humaneval(text)
        assert EXTRACTIONS["llada-mbpp"].extract(text) == reference_mbpp(text), repr(text)
        plain = reference_mbpp(text, quotes=False)
        assert EXTRACTIONS["opencompass-mbpp"].extract(text) == plain, repr(text)


@pytest.mark.parametrize("piece", [*PIECES, "[BEGIN]\n'", "'\n", "```\n", "BEGIN '", "' DONE"])
def test_extraction_of_long_texts_takes_linear_time(piece):
    text = piece * (200_000 // len(piece))
    began = time.process_time()
    for extraction in EXTRACTIONS.values():
        extraction.extract(text)
    assert time.process_time() - began < 5


def test_the_worked_examples_have_the_white_space_of_the_original():
    tests = {
        2: ("similar_elements((3, 4, 5, 6),(5, 7, 4, 10)) == (4, 5)",)
        + ("similar_elements((1, 2, 3, 4),(5, 4, 3, 7)) == (3, 4)",)
        + ("similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14)",),
        3: ("is_not_prime(2) == False", "is_not_prime(10) == True", "is_not_prime(35) == True"),
        4: tuple(
            f"heap_queue_largest( [25, 35, 22, 85, 14, 65, 75, 22, 58],{n})=={largest}{space}"
            for n, largest, space in (
                (3, [85, 75, 65], " "),
                (2, [85, 75], " "),
                (5, [85, 75, 65, 58, 35], ""),
            )
        ),
    }
    texts = {
        2: "Write a function to find the similar elements from the given two tuple lists.",
        3: "Write a python function to identify non-prime numbers.",
        4: "Write a function to find the largest integers from a given list of numbers using heap "
        "queue algorithm.",
    }
    codes = {
        2: "def similar_elements(test_tup1, test_tup2):\r\n"
        "  res = tuple(set(test_tup1) & set(test_tup2))\r\n  return (res) ",
        3: "import math\r\ndef is_not_prime(n):\r\n    result = False\r\n"
        "    for i in range(2,int(math.sqrt(n)) + 1):\r\n        if n % i == 0:\r\n"
        "            result = True\r\n    return result",
        4: "import heapq as hq\r\ndef heap_queue_largest(nums,n):\r\n"
        "  largest_nums = hq.nlargest(n, nums)\r\n  return largest_nums",
    }
    shots = tuple(
        mbpp.Problem(i, texts[i], codes[i], tuple(f"assert {t}" for t in tests[i]), "")
        for i in mbpp.SHOTS
    )
    turns = mbpp.TASK.prompt(dataclasses.replace(ADD, shots=shots))
    assert turns[0]["content"].endswith(
        "(4, 5)\nassert similar_elements((1, 2, 3, 4),(5, 4, 3, 7))"
        " == (3, 4) \nassert similar_elements((11, 12, 14, 13),(17, 15, 14, 13)) == (13, 14) \n"
    )
    assert turns[1]["content"].endswith("return (res)' \n[DONE] \n\n ")
    assert turns[-1]["content"].endswith("tests:\n\n assert add(1, 2) == 3  \n")
    # Hash of the six turns in configs/datasets/mbpp/mbpp_gen_830460.py of ML-GSAI/LLaDA.
    digest = hashlib.sha256(json.dumps([turn["content"] for turn in turns[:6]]).encode())
    assert digest.hexdigest() == "c83087bebb1fc311bbe04b4cb16898e2213386504060bf55375e4c7cb35ca844"
    fewer = get_task("mbpp", ["shots=1"])
    assert len(fewer.prompt(dataclasses.replace(ADD, shots=shots))) == 3


@pytest.mark.parametrize(
    "ending", ["return 'None'", "return ''", "return 'a' ", "pass", "return 1"]
)
def test_reference_solutions_survive_their_own_extraction(ending):
    code = f"def add(a, b):\r\n    {ending}"
    problem = dataclasses.replace(ADD, code=code)
    assert extract_code(mbpp.CONFIG, mbpp.canonical(problem)) == code.strip()


# Each deviation by its option, with an answer whose verdict it changes.
DEVIATIONS = [
    ("humaneval", ["extraction=first-fence"], PROBLEM, HUMANEVAL["unclosed fence"][0], True),
    ("humaneval", ["body_only=true"], PROBLEM, HUMANEVAL["body with its indentation"][0], True),
    ("humaneval", ["body_only=true"], PROBLEM, HUMANEVAL["body of two lines"][0], True),
    ("humaneval", ["body_only=true"], PROBLEM, HUMANEVAL["body in a fence"][0], True),
    ("humaneval", ["body_only=true"], PROBLEM, HUMANEVAL["lambda"][0], True),
    ("humaneval", ["body_only=true"], PROBLEM, "\0" + "(" * 300, False),
    ("mbpp", ["extraction=begin-or-fence"], ADD, MBPP["fence between the markers"][0], True),
    ("mbpp", ["extraction=opencompass-mbpp"], ADD, MBPP["quotes alone"][0], False),
    ("mbpp", ["extraction=opencompass-mbpp"], ADD, MBPP["worked example"][0], True),
]


@pytest.mark.parametrize(("name", "overrides", "problem", "text", "passes"), DEVIATIONS)
def test_each_deviation_is_an_option(name, overrides, problem, text, passes):
    task = get_task(name, overrides)
    assert run_many([task.job(problem, text)], task.config.limits)[0].passed == passes
    # The option is printed, and runs with and without it do not mix.
    key, _, value = overrides[0].partition("=")
    assert value.capitalize() in table_legend(task) or value in table_legend(task)
    settings = describe_task(task, None)["settings"]
    assert settings != describe_task(get_task(name), None)["settings"]
    assert str(settings[key]).lower() == value


def test_a_hint_names_the_option_for_bodies():
    hint = humaneval.TASK.hint
    for name in ("body with its indentation", "body without indentation", "body of two lines"):
        assert "--set body_only=true accepts it" in hint(PROBLEM, HUMANEVAL[name][0])
    for name in ("fence", "wrong", "unclosed fence", "prose and no fence", "empty"):
        assert hint(PROBLEM, HUMANEVAL[name][0]) is None
    assert get_task("humaneval", ["body_only=true"]).hint(PROBLEM, "    return x") is None


def test_setup_code_is_an_option():
    problem = dataclasses.replace(
        ADD,
        code="class Node: pass\ndef add(a): return a",
        test_list=("assert add(root)",),
        test_setup_code="root = Node()",
    )
    answer = mbpp.canonical(problem)
    without = get_task("mbpp", ["setup_code=false"])
    jobs = [mbpp.TASK.job(problem, answer), without.job(problem, answer)]
    assert [result.passed for result in run_many(jobs)] == [True, False]


@pytest.mark.parametrize(
    ("name", "override", "sentence"),
    [
        ("humaneval", "body_onyl=true", "there is no key body_onyl. Did you mean body_only?"),
        ("humaneval", "setup_code=true", "there is no key setup_code"),
        ("humaneval", "extraction=fence", 'one of "opencompass-humaneval-v2", "first-fence"'),
        ("mbpp", "extraction=first-fence", 'one of "llada-mbpp"'),
        ("humaneval", "gen_length=0", "gen_length must be at least 1, not 0"),
        ("humaneval", "block_length=0", "block_length must be at least 1, not 0"),
        ("humaneval", "shots=1", "shots must be 0 to 0, not 1"),
        ("mbpp", "shots=4", "shots must be 0 to 3, not 4"),
        ("mbpp", "prompt={text} {test}", "prompt must be a text with {text} and {tests}"),
        ("mbpp", "shot_prompt={0}", "shot_prompt must be a text with {text} and {tests}"),
        ("microcode", "prompt={", "prompt must be a text with {prompt}"),
        ("humaneval", "limits.seconds=0", "the sandbox limit seconds must be above 0"),
        ("humaneval", "limits.second=3", "Did you mean limits.seconds?"),
        ("humaneval", "body_only", "it must look like key=value"),
    ],
)
def test_a_wrong_option_is_one_sentence(name, override, sentence):
    with pytest.raises(UserError) as error:
        get_task(name, [override])
    assert sentence in str(error.value) and "\n" not in str(error.value)


def test_protocols_are_changed_by_key():
    task = get_task("humaneval", ["limits.seconds=3", "block_length=32", "stop=['x']"])
    assert task.config.limits.seconds == 3.0 and task.config.block_length == 32
    assert task.extract(PROBLEM, "a = 1 x") == "a = 1 "
    task = get_task("microcode", ["gen_length=32", "prompt=Please: {prompt}"])
    assert task.config.gen_length == 32
    assert task.prompt(task.problems(None, 1)[0]).startswith("Please: ")
