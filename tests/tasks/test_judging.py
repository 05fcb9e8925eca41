"""Judged answers: the helpers of tests, the classes of set-up code, and libraries."""

from __future__ import annotations

import pytest

from xflow_jax.sandbox import SAME_INTERPRETER, Limits, Pool
from xflow_jax.tasks import humaneval, mbpp

PROMPT = (
    "import math\n\n\ndef poly(xs, x):\n"
    "    return sum(c * math.pow(x, i) for i, c in enumerate(xs))"
    '\n\n\ndef zero(xs):\n    """A zero of poly."""\n'
)
ZERO = humaneval.Problem(
    task_id="HumanEval/32",
    prompt=PROMPT,
    entry_point="zero",
    canonical_solution="    return -xs[0] / xs[1]\n",
    test="def check(candidate):\n    for xs in ([1, 2], [3, 4]):\n"
    "        assert abs(poly(xs, candidate(xs))) < 1e-4\n",
)
TREE = "class Tree:\n  def __init__(self, left=None):\n    self.left = left\n"
SETUP = "import math\n" + TREE + "tree = Tree(Tree())\nlimit = math.floor(2.5)"


def problem(setup: str, tests: tuple[str, ...]) -> mbpp.Problem:
    return mbpp.Problem(task_id=11, text="", code="", test_list=tests, test_setup_code=setup)


@pytest.fixture(scope="module")
def pool():
    with Pool(Limits(seconds=60), workers=1) as pool:
        yield pool


def test_an_answer_cannot_replace_a_helper_of_the_tests(pool):
    right = PROMPT + ZERO.canonical_solution
    assert pool.run(*humaneval.program(ZERO, right)).reason == "passed"
    for cheat in ("def poly(xs, x): return 0\n", "import math\nmath.pow = lambda *_: 0\n"):
        wrong = PROMPT + "    return 7\n" + cheat
        assert pool.run(*humaneval.program(ZERO, wrong)).reason.startswith("wrong answer")


def test_only_problems_with_helpers_have_them_in_their_tests():
    text = "import math\ndef f(x):\n    '''x'''\n"
    plain = humaneval.Problem("HumanEval/0", text, "f", "", "x = 1")
    assert humaneval.program(plain, "")[1] == "x = 1\n\ncheck(f)\n"
    checks = humaneval.program(ZERO, "")[1]
    assert checks.startswith("import math\ndef poly(") and "def zero" not in checks


def test_classes_of_the_set_up_code_are_there_while_the_solution_runs(pool):
    uses = problem(SETUP, ("assert depth(tree) == limit",))
    solution = "LEAF = Tree()\ndef depth(t):\n    return 0 if t is None else 1 + depth(t.left)\n"
    result = pool.run(*mbpp.TASK.program(uses, solution))
    assert (result.reason, result.same_interpreter) == ("passed", False)
    # The solution may define the class itself, as in two problems of the data.
    defines = problem("tree = Tree(Tree())\nlimit = 2", ("assert depth(tree) == limit",))
    assert pool.run(*mbpp.TASK.program(defines, TREE + solution)).reason == "passed"
    wrong = solution.replace("1 +", "2 +")
    assert pool.run(*mbpp.TASK.program(uses, wrong)).reason.startswith("wrong answer")


def test_set_up_code_is_split_only_at_classes():
    for setup in ("", "x = 1\r\ny = 2;", "this is no python", "def f(): return 1"):
        assert mbpp.split_setup(setup) == ("", setup)
    classes, rest = mbpp.split_setup(SETUP)
    assert classes.startswith("import math\nclass Tree") and "tree = " not in classes
    assert rest == "import math\ntree = Tree(Tree())\nlimit = math.floor(2.5)\n"


def test_an_answer_may_use_numpy(pool):
    tests = ("assert mean([1, 2]) == 1.5", "assert mean([3]) == 3")
    answer = "import numpy as np\ndef mean(xs):\n    return np.mean(xs)\n"
    assert pool.run(*mbpp.TASK.program(problem("", tests), answer)).reason == "passed"


def test_tests_that_pass_a_function_are_marked(pool):
    tests = ("assert apply(lambda x: x + 1, 2) == 3",)
    result = pool.run(*mbpp.TASK.program(problem("", tests), "def apply(f, x): return f(x)"))
    assert result.passed and result.reason == SAME_INTERPRETER
