"""The README's table of the laptop runs is that of the stored results."""

import json

import pytest
from conftest import ROOT

ROWS = {"base": "SmolLM2-135M", "before": "after the cold start", "after": "after reinforcement learning"}


@pytest.fixture
def runs():
    files = sorted((ROOT / "results" / "laptop").glob("seed?_bfloat16.json"))
    assert files
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


@pytest.fixture
def readme():
    """Its words, wherever its lines end."""
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


@pytest.mark.parametrize("name", ROWS)
def test_the_table_is_theirs(name, runs, readme):
    each = lambda show: " / ".join(show(run[name]) for run in runs)
    cells = [
        each(lambda result: f"{result['score']:.1f} +- {result['standard_error']:.1f}"),
        each(lambda result: f"{result['failure']:.0f}") + " %",
        each(lambda result: f"{result['found_out']['serves_after_hint']:.0f}") + " %",
        each(lambda result: f"{result['words_per_reply']:.1f}"),
    ]
    assert f"| {ROWS[name]} | {' | '.join(cells)} |" in readme


def test_the_gains_are_theirs(runs, readme):
    gains = [run["after - before"] for run in runs]
    shown = " and ".join(f"{gain['difference']:+.1f} +- {gain['standard_error']:.1f}" for gain in gains)
    assert f"Reinforcement learning adds {shown}" in readme
