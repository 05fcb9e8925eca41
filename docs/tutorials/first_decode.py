# %% [markdown]
# # First decode
#
# This tutorial decodes one answer with the bundled model and looks at the three quantities that
# the flow keeps for each response position:
#
# - **progress** `t`, from 0 (masked) to 1 (decided),
# - the **state** `x`, a point in the space of input embeddings, which the model reads,
# - **confidence** `c`, the probability of the token that the model predicts there.
#
# `load` reads the bundled model `tiny`, a LLaDA of 1.4 M parameters. It answers requests of the
# task microcode: plain English in, a Python function out.

# %%
import matplotlib.pyplot as plt
import numpy as np

import xflow_jax as xf
from xflow_jax.serving import token_texts

lm = xf.load("tiny")
prompt = "Keep the even numbers, then square each number and return the sum."
rule = xf.Flow(power=8)
out = xf.generate(lm, [prompt], rule, gen_length=48, steps=12, block_length=16, trace=True)
print(out.texts[0])

# %% [markdown]
# The response has 48 positions and the decode took 12 forward passes, a budget of 1/4. Blocks of
# 16 positions are decoded one after the other, so each block gets four passes.
#
# The rule is `Flow(power=8)`: in each pass a position moves by the fraction `a = c ** 8` of its
# remaining way. A sure position arrives at once, a doubtful one hardly moves.
#
# ## The trace
#
# With `trace=True` the result holds every step, as arrays `[T, B, N]`: steps, sequences,
# positions.

# %%
trace = out.trace
for name in ("tokens", "progress", "confidence", "step_fraction", "reedited"):
    print(f"{name:14} {getattr(trace, name).shape}")

# %% [markdown]
# Here is the progress of all positions after each pass. Rows are passes, columns are positions.
# The first block fills in passes 1 to 4, the second in passes 5 to 8, the third in passes 9 to
# 12.

# %%
figure, axes = plt.subplots(
    num="progress of each position after each pass", figsize=(9, 3.4), layout="constrained"
)
image = axes.imshow(trace.progress[:, 0], cmap="YlGnBu", vmin=0, vmax=1, aspect="auto")
axes.set(
    xlabel="position in the response",
    ylabel="forward pass",
    yticks=range(12),
    yticklabels=range(1, 13),
)
for edge in (15.5, 31.5):
    axes.axvline(edge, color="grey", linewidth=0.8)
_ = figure.colorbar(image, label="progress t")

# %% [markdown]
# ## One block, position by position
#
# The next table follows six positions of the second block. Each cell is the predicted token and
# the progress after the pass. A token may change as long as its progress is below 1.

# %%
words = token_texts(lm)
block = slice(20, 26)
print("position  " + "".join(f"{i:>14}" for i in range(block.start, block.stop)))
for step in range(4, 8):
    cells = zip(trace.tokens[step, 0, block], trace.progress[step, 0, block], strict=True)
    print(f"pass {step + 1:<5}" + "".join(f"{words[int(i)]!r:>9} {t:.2f}" for i, t in cells))

# %% [markdown]
# ## Confidence and progress
#
# The left picture has the confidence of the positions of the second block, the right one their
# progress. Confidence is a statement of the model about one pass. Progress accumulates: it never
# falls, except by re-editing (Eq. 10), which puts a position back if its confidence falls behind
# its progress by more than 0.1.

# %%
figure, both = plt.subplots(
    1,
    2,
    num="confidence and progress of the second block",
    figsize=(9, 3),
    layout="constrained",
    sharey=True,
)
passes = np.arange(5, 9)
for axes, values, title in zip(
    both, (trace.confidence, trace.progress), ("confidence c", "progress t"), strict=True
):
    axes.plot(passes, values[4:8, 0, 16:32], marker="o", markersize=3, linewidth=1, alpha=0.8)
    axes.set(title=title, xlabel="forward pass", xticks=passes, ylim=(-0.05, 1.05))
print("positions re-edited in each pass:", trace.reedited[:, 0].sum(axis=-1))

# %% [markdown]
# ## The state x
#
# `x` is not part of the trace, but the trace determines it. It starts at the embedding `m` of the
# mask token. A step moves it by `a (x_pred - x)`, with `x_pred` the embedding of the predicted
# token (Eqs. 4 to 8). The cell below repeats this for one position and prints how far `x` is from
# `m` and from the final token.

# %%
table = np.asarray(lm.params["wte"]["embedding"], np.float32)
m, position = table[lm.config.mask_id], 22
x = m
final = table[out.tokens[0, position]]
for step in range(4, 8):
    x_pred = table[trace.tokens[step, 0, position]]
    arrived = trace.progress[step, 0, position] >= 1
    a = 1.0 if arrived else trace.step_fraction[step, 0, position]
    x = x + a * (x_pred - x)
    far = np.linalg.norm(x - m), np.linalg.norm(x - final)
    print(f"pass {step + 1}: a = {a:.3f}, from m {far[0]:.3f}, from the final token {far[1]:.3f}")
    if arrived:
        break

# %% [markdown]
# `xflow generate --trace FILE.html` writes the same trace as a page in which you can step through
# the passes.
#
# Next: [compare rules at several budgets](compare_rules.md).
