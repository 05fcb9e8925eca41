"""The plots and the page of a trajectory."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from matplotlib import image

from xflow_jax.decoding.policy import init_policy
from xflow_jax.errors import UserError
from xflow_jax.evaluation.answers import Row
from xflow_jax.evaluation.plots import (
    _spread_heights,
    plot_accuracy,
    plot_alignment,
    plot_policy_steps,
)
from xflow_jax.evaluation.trajectory import current_tokens, write_trajectory_page


def row(rule: str, steps: int, accuracy: float) -> Row:
    low, high = max(accuracy - 5, 0), min(accuracy + 5, 100)
    return Row(rule, f"{steps}/8", steps, 100, accuracy, low, high, steps, steps / 8, 1, 1)


def trace() -> SimpleNamespace:
    """Builds four steps of two sequences of three positions. Early exit skipped the third step."""
    tokens = np.zeros((4, 2, 3), int)
    tokens[:, 1] = [[1, 2, 3], [4, 2, 3], [0, 0, 0], [4, 2, 1]]
    progress, confidence = np.zeros((4, 2, 3)), np.zeros((4, 2, 3))
    progress[:, 1] = [[1, 0.5, 0], [1, 1, 0.25], [1, 1, 0.25], [1, 0.125, 1]]
    confidence[:, 1] = [[0.9, 0.5, 0.1], [0.8, 0.7, 0.2], [0, 0, 0], [0.6, 0.125, 0.7]]
    reedited = np.zeros((4, 2, 3), bool)
    reedited[3, 1, 1] = True
    top = np.zeros((4, 2, 3, 4))
    top[..., 0], top[..., 1] = confidence, (1 - confidence) / 2
    likely = np.broadcast_to(np.arange(4), top.shape).copy()
    likely[..., 0] = tokens
    steps = {
        "tokens": tokens,
        "progress": progress,
        "confidence": confidence,
        "step_fraction": confidence,
    }
    return SimpleNamespace(**steps, reedited=reedited, top=top, top_tokens=likely)


TEXTS = ["zero", "def", " f", "</script><b>", "\n    "]


def test_the_curve_is_drawn(tmp_path):
    path = tmp_path / "curve.png"
    rules = ["mask", "flow:power=4", "threshold"]
    plot_accuracy(
        [row(rule, s, 10 * s + i) for i, rule in enumerate(rules) for s in (1, 2, 8)], path, "title"
    )
    pixels = image.imread(path)[..., :3]
    assert pixels.shape[0] > 400 and pixels.shape[1] > 700
    for colour in ((0x00, 0x72, 0xB2), (0xD5, 0x5E, 0x00), (0x00, 0x9E, 0x73)):
        assert (np.abs(pixels - np.array(colour) / 255).max(-1) < 0.02).sum() > 100
    plot_accuracy([row("mask", 8, 50.0)], path)  # a single point is enough
    with pytest.raises(UserError, match="cannot be written: No such file or directory"):
        plot_accuracy([row("mask", 8, 50.0)], tmp_path / "nowhere" / "curve.png")


@pytest.fixture
def pngs(tmp_path):
    """Returns a function that checks a plot and its error for a missing folder."""

    def check(plot):
        plot(tmp_path / "plot.png")
        assert image.imread(tmp_path / "plot.png").shape[0] > 400
        with pytest.raises(UserError, match="cannot be written"):
            plot(tmp_path / "nowhere" / "plot.png")

    return check


def test_an_alignment_is_drawn(pngs):
    names = ("held_out_loss", "held_out_error_masked", "held_out_error_clean")
    names += ("held_out_masked_nll", "frozen_masked_nll")
    lines = [{"step": step, **dict.fromkeys(names, 2.0 / (1 + step))} for step in range(3)]
    pngs(lambda path: plot_alignment([*lines, {"step": 3, "loss": 1.0}], path))


def test_the_steps_of_a_policy_are_drawn(pngs):
    pngs(lambda path: plot_policy_steps(init_policy(jax.random.key(0), 8), path))


def test_labels_are_pushed_spread_heights():
    assert _spread_heights([10, 50], 5, 0, 100) == [10, 50]
    assert sorted(_spread_heights([99, 99, 98], 5, 0, 100)) == [90, 95, 100]
    assert _spread_heights([1, 0], 5, 0, 100) == [5, 0]


def test_a_settled_token_stays_until_it_is_edited():
    t = trace()
    current = current_tokens(t.tokens[:, 1], t.progress[:, 1], t.reedited[:, 1])
    assert current.tolist() == [[1, 2, 3], [1, 2, 3], [1, 2, 0], [1, 2, 1]]


def page_data(page: str) -> dict:
    return json.loads(re.search(r"^const D = (.*);$", page, re.MULTILINE).group(1))


def test_the_page_is_self_contained(tmp_path):
    path = tmp_path / "page.html"
    write_trajectory_page(
        path, trace(), 1, TEXTS, "Is 1 < 2 & <i>?", {"rule": "flow", "verdict": "<passed>"}
    )
    page = path.read_text()
    assert "http" not in page and "src=" not in page and "@import" not in page
    assert page.count("</script>") == 1 and "<i>?" not in page and "&lt;passed&gt;" in page
    data = page_data(page)
    assert data["steps"] == [1, 2, 4] and data["of"] == 4  # the skipped step is left out
    shown = [[data["texts"][i] for i in step] for step in data["current"]]
    assert shown[-1] == ["def", " f", "def"] and data["texts"][data["predicted"][1][0]] == "\n    "
    assert data["reedited"][-1] == [0, 1, 0] and data["progress"][-1] == [1, 0.125, 1]
    assert [data["texts"][i] for i in data["candidates"][0][1]] == [
        " f",
        "def",
        " f",
        "</script><b>",
    ]
    assert data["probability"][0][1] == [0.5, 0.25, 0, 0]
    with pytest.raises(UserError, match="cannot be written"):
        write_trajectory_page(tmp_path / "nowhere" / "page.html", trace(), 1, TEXTS, "", {})


CHROMIUM = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)


def browse(page, tmp_path) -> str:
    """Opens the page in Chromium at step 2 and returns the resulting HTML."""
    flags = [
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-background-networking",
        "--disable-sync",
    ]
    flags += [f"--user-data-dir={tmp_path}/profile", "--virtual-time-budget=3000", "--dump-dom"]
    command = [CHROMIUM, *flags, f"file://{page}#step=2"]
    return subprocess.run(command, capture_output=True, text=True, timeout=120).stdout


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_describes_the_token_under_the_mouse(tmp_path):
    path = tmp_path / "page.html"
    write_trajectory_page(path, trace(), 1, TEXTS, "prompt", {"rule": "flow"})
    over = """document.querySelectorAll(".step")[2].children[2].dispatchEvent(
      new MouseEvent("mousemove", {bubbles: true, clientX: 40, clientY: 40}));"""
    path.write_text(path.read_text().replace("</script>", over + "</script>"))
    tip = re.search(
        r'<div id="tip"[^>]*display: block[^>]*>(.*?)</div>', browse(path, tmp_path), re.DOTALL
    ).group(1)
    assert "step 4, position 2" in tip and 'predicted " f", confidence 0.125' in tip
    assert (
        '0.125 " f"' in tip
        and '0.438 "def"' in tip
        and "step fraction 0.125" in tip
        and "re-edited" in tip
    )


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")
def test_the_page_draws_itself_in_a_browser(tmp_path):
    path = tmp_path / "page.html"
    write_trajectory_page(path, trace(), 1, TEXTS, "prompt", {"rule": "flow"})
    dom = browse(path, tmp_path)
    assert dom.count('class="step') == 3 and "step 2 of 4" in dom
    assert len(re.findall(r'<b[^>]*class="cell', dom)) == 9
    answer = re.search(r'<pre id="answer".*?</pre>', dom, re.DOTALL).group(0)
    assert re.sub(r"<.*?>", "", answer) == "def f&lt;/script&gt;&lt;b&gt;"
    assert re.search(r'<b[^>]*class="cell edit"', dom)
