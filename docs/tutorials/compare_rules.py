# %% [markdown]
# # Compare rules at budgets
#
# A *rule* decides how far each position moves in a forward pass. A *budget* is the number of
# passes, as a share of the response tokens. This tutorial evaluates three rules at two budgets on
# requests that training never saw.
#
# `parse_rules` reads the same text as the option `--rules` of `xflow evaluate`.

# %%
from fractions import Fraction

import matplotlib.pyplot as plt
import numpy as np

import xflow_jax as xf
from xflow_jax.decoding import parse_rules
from xflow_jax.evaluation import Answers, evaluate, make_cells, rows_to_text
from xflow_jax.tasks import get_task

lm = xf.load("tiny")
task = get_task("microcode")
problems = task.problems(None, 64)
rules = parse_rules("mask,threshold:tau=0.95,flow:jump=0.98,early_exit=true,reedit_margin=none")
print(problems[0].prompt)
for label in rules:
    print(label)

# %% [markdown]
# `make_cells` makes one cell for each rule and budget. `evaluate` decodes all problems in each
# cell, runs the answers in the sandbox and counts those that pass. `Answers(None, {})` keeps
# nothing on disk.

# %%
cells = make_cells(lm, task, rules, [Fraction(1, 4), Fraction(1, 8)])
rows = evaluate(lm, task, problems, cells, Answers(None, {}), batch_size=64)
print(rows_to_text(rows))

# %% [markdown]
# The column of forward passes is the mean over the sequences. Mask prediction takes every pass of
# its budget. The other two stop when a block is decided.
#
# With 64 problems the 95 % intervals are wide, so differences of ten points mean little here. The
# [results](../reports/results.md) have 512 problems.

# %%
figure, axes = plt.subplots(
    num="problems solved over forward passes", figsize=(7, 3.6), layout="constrained"
)
for label in rules:
    mine = sorted(
        (row.passes_per_token, row.accuracy, row.low, row.high) for row in rows if row.rule == label
    )
    x, y, low, high = np.array(mine).T
    axes.errorbar(x, y, yerr=[y - low, high - y], marker="o", capsize=3, label=label)
axes.set(xlabel="forward passes per response token", ylabel="problems solved (%)", ylim=(0, 100))
_ = axes.legend(fontsize=8, loc="lower right")

# %% [markdown]
# The same comparison from the command line, which also keeps every answer and writes the tables
# and a picture:
#
# ```bash
# xflow evaluate --model tiny --task microcode --limit 64 --budgets 1/4,1/8 --out runs/compare \
#   --rules "mask,threshold:tau=0.95,flow:jump=0.98,early_exit=true,reedit_margin=none"
# ```
#
# Next: [a rule of your own](own_rule.md).
