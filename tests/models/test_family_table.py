"""The page of families against the tests that there are, and against the code."""

import json
import re
from pathlib import Path

import pytest

from tests.decoding import test_family_goldens as decoding
from tests.family_helpers import FAMILY, GOLDEN_MODELS, decode_cases, family_config
from tests.models import test_families as families
from tests.training import test_alignment as alignment
from tests.training import test_sft as fine_tuning
from xflow_jax.checkpoints.weight_map import WEIGHT_TABLES
from xflow_jax.models.presets import PRESETS

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "reference" / "models.md").read_text()
# Decoders of the families' authors, and the tests that compare with them.
DECODERS = {
    "llada_official_generate": decoding.test_mask_prediction_equals_the_official_decoder,
    "dream_generate": decoding.test_the_schedule_of_dream_equals_the_original_decoder,
    "llada21_generate": decoding.test_editing_equals_the_original_decoder,
    "sdar_generate": decoding.test_mask_prediction_equals_sdar,
    "fast_dllm_v2_generate": decoding.test_parts_of_blocks_equal_fast_dllm_v2,
}
MODULES = {"llada": ["llada.py"], "llada2": ["llada2.py", "moe.py"]}  # beside the configuration


def table(first_column):
    """Returns the cells of the page's table whose head begins with some words, by row."""
    lines = PAGE[PAGE.index(f"| {first_column} |") :].split("\n\n")[0].splitlines()
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in lines)
    return {row[0].strip("`"): dict(zip(head, row, strict=True)) for row in rows}


def parameters(test):
    """Returns the texts among the parameters of a test, as a tuple for each run of it."""
    found = set()
    for mark in test.pytestmark:
        for value in mark.args[1] if mark.name == "parametrize" else ():
            values = getattr(value, "values", value)
            values = values if isinstance(values, tuple) else (values,)
            found.add(tuple(text for text in values if isinstance(text, str)))
    return found


def covered(test):
    """Returns the golden checkpoints among the parameters of a test."""
    return {name for values in parameters(test) for name in values if name in GOLDEN_MODELS}


def test_every_family_is_on_the_page():
    for rows in (table("family | models"), table("family | logits"), table("family | lines")):
        assert sorted(rows) == sorted(WEIGHT_TABLES)
    listed = " ".join(row["presets"] for row in table("family | models").values())
    assert PRESETS.keys() - {*re.findall("`([^`]+)`", listed)} == {"llada2-20m"}


def test_every_decode_of_the_goldens_is_compared():
    groups = json.loads((FAMILY / "decode_golden.json").read_text())["groups"]
    cases = {(group["kind"], group["checkpoint"]) for group in groups}
    assert {kind for kind, _ in cases} == {*DECODERS, "dream_schedule"}
    for kind, checkpoint in cases - {("dream_schedule", None)}:
        wanted = {(checkpoint, name) for name in decode_cases(kind, checkpoint)}
        # What SDAR does to a prompt's end has a test of its own.
        assert wanted - parameters(DECODERS[kind]) <= {("sdar_tiny", decoding.QUIRK)}
    times = decode_cases("dream_schedule", None)
    assert parameters(decoding.test_the_times_of_dream) == {(name,) for name in times}
    for name in FAMILY.glob("flow_*"):
        flows = json.loads((name / "flow_golden.json").read_text())["cases"]
        numbers = [n for checkpoint, n in decoding.FLOWS if f"flow_{checkpoint}" == name.name]
        assert numbers == list(range(len(flows)))


@pytest.mark.parametrize("name", GOLDEN_MODELS)
def test_the_table_has_what_tests_cover(name):
    """The first family has goldens of its own, in tests of their own."""
    family = GOLDEN_MODELS[name].family
    row, causal = table("family | logits")[family], family_config(family).is_block_causal
    whole, blocks = covered(families.test_logits), covered(families.test_block_causal_logits)
    wanted = {
        "logits": "original" if name in whole else name in blocks and "original, block-causal only",
        "convert both ways": name in covered(families.test_round_trip_bit_for_bit) and "bytes",
        "own decoder": any(decode_cases(kind, name) for kind in DECODERS) and "original",
        "flow": "reference" if name in dict(decoding.FLOWS) else "runs",
        "threshold and all other rules": (
            name in covered(families.test_every_rule_runs_and_rows_do_not_depend_on_their_batch)
            and "run"
        ),
        "exact cache": (
            "equal" if name in covered(families.test_the_exact_cache_changes_nothing) else "none"
        ),
        "block caches": (
            "equal at first"
            if name in covered(decoding.test_cached_passes_equal_the_full_one)
            else "no need"
        ),
        "alignment": (
            name in covered(alignment.test_every_family_is_aligned_at_the_rows_that_predict)
            and "tested"
        ),
        "fine-tuning": name in fine_tuning.GOLDENS.values() and "tested",
        "serve": (
            "stream"
            if name in covered(families.test_a_stream_ends_with_the_tokens_of_generate)
            else "refused"
        ),
    }
    row["own decoder"] = row["own decoder"].split(",")[0]
    row["serve"] = row["serve"].removeprefix("HTTP, ")
    assert {column: row[column] for column in wanted} == wanted
    assert (wanted["exact cache"] == "equal") == causal


@pytest.mark.parametrize("family", WEIGHT_TABLES)
def test_the_page_has_the_lines_of_each_family(family):
    files = [f"{family}_config.py", *MODULES.get(family, [])]
    folder = ROOT / "xflow_jax" / "models"
    if family == "fast_dllm":
        assert f"wc -l xflow_jax/models/{files[0]}" in PAGE
    ours = [len((folder / file).read_text().splitlines()) for file in files]
    shown = [int(number) for number in table("family | lines")[family]["lines"].split(" + ")]
    assert shown == pytest.approx(ours, rel=0.1, abs=5)
