"""The README's table is that of the stored results."""

import json

import pytest
from conftest import ROOT

ROWS = {"base": "SmolLM2-135M", "before": "after the cold start", "after": "after reinforcement learning"}


@pytest.mark.parametrize("name", ROWS)
def test_the_table_of_the_laptop_runs_is_theirs(name):
    files = sorted((ROOT / "results" / "laptop").glob("seed?_bfloat16.json"))
    scored = [json.loads(path.read_text(encoding="utf-8"))[name] for path in files]
    each = lambda show: " / ".join(map(show, scored))
    cells = [
        each(lambda result: f"{result['score']:.1f} +- {result['standard_error']:.1f}"),
        each(lambda result: f"{result['failure']:.0f}") + " %",
        each(lambda result: f"{result['found_out']['serves_after_hint']:.0f}") + " %",
        each(lambda result: f"{result['words_per_reply']:.1f}"),
    ]
    assert f"| {ROWS[name]} | {' | '.join(cells)} |" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_gains_of_the_laptop_runs_are_theirs():
    files = sorted((ROOT / "results" / "laptop").glob("seed?_bfloat16.json"))
    gains = [json.loads(path.read_text(encoding="utf-8"))["after - before"] for path in files]
    shown = " and ".join(f"{gain['difference']:+.1f} +- {gain['standard_error']:.1f}" for gain in gains)
    assert f"Reinforcement learning adds {shown}" in (ROOT / "README.md").read_text(encoding="utf-8")
