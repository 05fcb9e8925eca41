"""The page of decodes: its data, and what it does in a browser, recorded and live."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tests.serving.page_server import TEXT, WORDS, Recorded, serve
from xflow_jax.errors import UserError
from xflow_jax.serving import TracedDecode, live_page, write_trajectory_page
from xflow_jax.serving.page.trace import current_tokens


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


def edited() -> SimpleNamespace:
    """Builds `trace()` with a re-edit to another token."""
    steps = trace()
    steps.tokens[3, 1, 1] = 4
    return steps


TEXTS = ["zero", "def", " f", "</script><b>", "\n    "]


def test_a_settled_token_stays_until_it_is_edited():
    t = trace()
    current = current_tokens(t.tokens[:, 1], t.progress[:, 1], t.reedited[:, 1])
    assert current.tolist() == [[1, 2, 3], [1, 2, 3], [1, 2, 0], [1, 2, 1]]


def page_data(page: str) -> dict:
    return json.loads(re.search(r"^const D = (.*);$", page, re.MULTILINE).group(1))


def write_page(path: Path, prompt: str = "prompt", **facts: str) -> None:
    decode = TracedDecode("flow", trace(), 1, facts)
    write_trajectory_page(path, [decode], TEXTS, [{"role": "user", "content": prompt}])


def test_the_page_is_self_contained(tmp_path):
    path = tmp_path / "page.html"
    write_page(path, "Is 1 < 2 & <i>?", verdict="<passed>")
    page = path.read_text()
    assert "http" not in page and "src=" not in page and "@import" not in page
    assert page.count("</script>") == 1 and "<i>?" not in page and "&lt;passed&gt;" in page
    (data,) = page_data(page)["runs"]
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
        write_page(tmp_path / "nowhere" / "page.html")


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
    write_page(path)
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
    write_page(path)
    dom = browse(path, tmp_path)
    assert dom.count('class="step') == 3 and "step 2 of 4" in dom
    assert len(re.findall(r'<b[^>]*class="cell', dom)) == 9
    answer = re.search(r'<pre id="answer".*?</pre>', dom, re.DOTALL).group(0)
    assert re.sub(r"<.*?>", "", answer) == "def f&lt;/script&gt;&lt;b&gt;"
    # The token of the re-edit is the one before it.
    assert re.search(r'<b[^>]*class="cell kept"', dom)


@contextlib.contextmanager
def browser(**options: Any) -> Iterator[Any]:
    """Opens a page in Chromium, and fails for an error of its script."""
    api = pytest.importorskip("playwright.sync_api", reason="needs playwright")
    if CHROMIUM is None:
        pytest.skip("needs Chromium")
    with api.sync_playwright() as engines:
        flags = ["--no-sandbox", "--disable-gpu"]
        chromium = engines.chromium.launch(executable_path=CHROMIUM, args=flags)
        page = chromium.new_context(**options).new_page()
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        yield page
        chromium.close()
        assert faults == []


@pytest.fixture
def seen() -> Recorded:
    pytest.importorskip("starlette", reason="needs the extra serve")
    pytest.importorskip("uvicorn", reason="needs the extra serve")
    return Recorded()


@pytest.mark.slow
def test_two_recorded_decodes_step_together_by_keys_and_are_saved_as_a_page(tmp_path):
    second = edited()
    second.confidence[1, 1] = 0  # it skips another step
    decodes = [TracedDecode("flow", trace(), 1), TracedDecode("mask", second, 1)]
    chat = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Go."}]
    write_trajectory_page(tmp_path / "two.html", decodes, TEXTS, chat, "tiny")
    with browser() as page:
        page.goto(f"file://{tmp_path}/two.html#step=1")
        assert page.locator(".said").all_inner_texts() == ["Be short.", "Go."]
        assert page.inner_text("#where") == "pass 1" and page.locator(".panel").count() == 2
        page.keyboard.press("ArrowRight")
        assert page.inner_text("#where") == "pass 2"
        steps = [text.split("\n")[1] for text in page.locator(".top").all_inner_texts()]
        assert steps == ["step 2 of 4", "step 1 of 4"]
        page.keyboard.press("End")
        assert page.locator(".top").all_inner_texts()[1].split("\n")[1] == "step 4 of 4"
        marks = (
            page.locator(".panel >> nth=1")
            .locator(".tok")
            .evaluate_all("toks => toks.map(t => [t.dataset.g, t.innerText, t.className])")
        )
        assert [mark[0] for mark in marks] == ["●", "↻", "●"]
        assert "edit" in marks[1][2] and marks[0][2] == "tok done"
        page.keyboard.press("c")
        page.keyboard.press("ArrowRight")
        page.keyboard.press("ArrowRight")
        assert "step 4, position 2" in page.inner_text("#tip")
        page.keyboard.press("Tab")
        with page.expect_download() as saved:
            page.keyboard.press("e")
        again = Path(saved.value.path()).read_text()
        assert (
            page_data(again)["runs"][1]["current"]
            == page_data((tmp_path / "two.html").read_text())["runs"][1]["current"]
        )
        (tmp_path / "again.html").write_text(again)
        page.goto(f"file://{tmp_path}/again.html#step=2")
        assert page.inner_text("#where") == "pass 2" and page.locator(".said").count() == 2


@pytest.mark.slow
@pytest.mark.parametrize("motion", ["no-preference", "reduce"])
def test_a_re_edit_pulses_once_and_not_under_reduced_motion(tmp_path, motion):
    chat = [{"role": "user", "content": "prompt"}]
    decode = TracedDecode("flow", edited(), 1)
    write_trajectory_page(tmp_path / "page.html", [decode], TEXTS, chat)
    count = """window.pulses = 0; document.addEventListener("animationstart", e => {
      if (e.animationName === "pulse") window.pulses++; })"""
    with browser(reduced_motion=motion) as page:
        page.add_init_script(count)
        page.goto(f"file://{tmp_path}/page.html#step=2")
        page.keyboard.press("ArrowRight")
        assert page.locator(".tok.edit").count() == 1
        page.wait_for_timeout(900)
        assert page.evaluate("window.pulses") == (1 if motion == "no-preference" else 0)


def ask(page: Any, text: str) -> None:
    page.fill("[name=text]", text)
    page.keyboard.press("Enter")


@pytest.mark.slow
def test_a_live_answer_comes_into_focus_and_the_next_request_has_the_history(seen):
    with serve(live_page(), seen) as url, browser() as page:
        page.goto(url)
        page.wait_for_function("document.querySelector('#model').textContent === 'stub-1'")
        page.click("#prelude > summary")
        page.fill("#system", "Be short.")
        ask(page, "Where?")
        page.wait_for_selector(".tok.mask, .tok:not(.done)")
        assert page.get_attribute(".answer", "aria-live") == "off"
        page.wait_for_function("document.querySelector('#where').textContent === 'step 12 of 12'")
        page.wait_for_selector("dl:has-text('12 for 32 positions')")
        assert page.locator("[aria-live=polite]").all_inner_texts() == [TEXT]
        assert page.inner_text("#answer") == TEXT
        assert page.locator(".tok.done").count() == 32 and "2 re-edited" in page.inner_text(".top")
        page.hover(".tok >> nth=3")
        assert page.locator("#tip .cand").count() == 3  # the three candidates of the stub
        page.keyboard.press("Home")
        page.locator("#slider").focus()
        page.keyboard.press("Home")
        assert page.inner_text("#where") == "step 1 of 12"
        ask(page, "And when?")
        page.wait_for_selector(".past pre")
        assert page.inner_text(".past pre") == TEXT
        page.wait_for_selector("dl:has-text('12 for 32 positions')")
    first, second = seen.bodies
    assert first["xflow"] == {
        "rule": "flow:reedit=always",
        "budget": "1/4",
        "belief": {"every": 1, "top": 4},
    }
    assert first["stream"] is True and first["max_tokens"] == 64 and first["seed"] == 0
    assert [m["role"] for m in first["messages"]] == ["system", "user"]
    assert second["messages"] == [
        *first["messages"],
        {"role": "assistant", "content": TEXT},
        {"role": "user", "content": "And when?"},
    ]


@pytest.mark.slow
def test_two_live_decoders_share_prompt_seed_and_budget_and_one_clock(seen):
    with serve(live_page(), seen) as url, browser() as page:
        page.goto(url)
        page.wait_for_function("document.querySelector('#model').textContent === 'stub-1'")
        page.check("[name=beside]")
        page.fill("[name=seed]", "7")
        ask(page, "Where?")
        page.wait_for_function("document.querySelector('#where').textContent === 'pass 24'")
        tops = page.locator(".top").all_inner_texts()
        assert "step 12 of 12" in tops[0] and "step 24 of 24" in tops[1]
        page.focus("#slider")
        page.keyboard.press("ArrowLeft")
        for _ in range(17):
            page.click("#back")
        tops = page.locator(".top").all_inner_texts()
        assert page.inner_text("#where") == "pass 6"
        assert "step 6 of 12" in tops[0] and "step 6 of 24" in tops[1]
        page.select_option("#sync", "time")
        assert page.inner_text("#where").endswith(" s")
        page.check(".panel >> nth=1 >> [name=use]")
        with page.expect_download() as saved:
            page.click("#export")
        runs = page_data(Path(saved.value.path()).read_text())["runs"]
        assert [run["label"] for run in runs] == ["flow:reedit=always", "threshold:tau=0.9"]
        assert [len(run["ms"]) for run in runs] == [12, 24]
        assert [runs[0]["texts"][i] for i in runs[0]["current"][-1][: len(WORDS)]] == WORDS
    one, two = seen.bodies
    assert {one["xflow"].pop("rule"), two["xflow"].pop("rule")} == {run["label"] for run in runs}
    assert one == two and one["seed"] == 7


@pytest.mark.slow
def test_errors_are_sentences_and_stop_closes_the_stream(seen):
    seen.gap, seen.key = 0.3, "secret"
    with serve(live_page(), seen) as url, browser(viewport={"width": 390, "height": 844}) as page:
        page.goto(url)
        page.wait_for_function("document.querySelector('#model').textContent.includes('API key')")
        page.click("#settings > summary")
        page.fill("[name=key]", "secret")
        page.keyboard.press("Tab")
        page.wait_for_function("document.querySelector('#model').textContent === 'stub-1'")
        page.fill("[name=tokens]", "65")
        ask(page, "<b>Where?</b>")
        page.wait_for_selector(".fault")
        assert page.inner_text("[role=alert]").endswith("max_tokens is 65, at most 64")
        page.fill("[name=tokens]", "64")
        ask(page, "<b>Where?</b>")
        page.wait_for_selector(".tok.end")
        assert page.locator(".said").all_inner_texts()[1] == "<b>Where?</b>"
        wide = page.evaluate("document.documentElement.scrollWidth")
        assert wide == 390
        page.keyboard.press("Escape")
        page.wait_for_function("document.querySelectorAll('.fault').length === 2")
        for _ in range(50):
            page.wait_for_timeout(50)
            if seen.gone:
                break
    assert seen.gone == 1 and seen.headers[0]["authorization"] == "Bearer secret"


@pytest.mark.slow
def test_a_model_of_single_requests_gets_each_message_alone(seen):
    seen.examples = ["Sort them."]
    with serve(live_page(), seen) as url, browser() as page:
        page.goto(url)
        page.wait_for_selector("#hello:has-text('knows single requests')")
        page.click("#hello button")
        assert page.input_value("[name=text]") == "Sort them."
        for _ in range(2):
            ask(page, "Sort them.")
            page.wait_for_selector("dl:has-text('12 for 32 positions')")
            page.wait_for_selector("#stop", state="hidden")
    assert [len(body["messages"]) for body in seen.bodies] == [1, 1]


@pytest.mark.slow
def test_two_decoders_of_a_real_server_end_with_its_answers():
    conftest = pytest.importorskip("tests.serving.conftest", reason="needs the extra serve")
    running = conftest.start(page=live_page())
    running.wait_until_ready()
    prompt = "Keep the even numbers, then square each number and return the sum."
    with browser() as page:
        page.set_default_timeout(600_000)
        page.goto(running.url)
        page.wait_for_function("document.querySelector('#model').textContent === 'tiny'")
        page.check("[name=beside]")
        ask(page, prompt)
        page.wait_for_selector(".panel >> nth=1 >> dl:has-text('for 48 positions')")
        page.wait_for_selector("#stop", state="hidden")
        assert page.locator(".panel").count() == 2
        shown = [panel.inner_text() for panel in page.locator(".panel").all()]
        assert all("for 48 positions" in text for text in shown)
        answer = page.locator("[aria-live=polite]").first.inner_text()
    assert "def solve" in answer and running.end() == 0
