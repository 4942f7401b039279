"""The README's table of the laptop runs is that of the stored results."""

import json
from statistics import mean, stdev

import pytest
from conftest import ROOT

STAGES = {"base": "SmolLM2-135M", "before": "after the cold start", "after": "after reinforcement learning"}


def stored(pattern: str) -> list[dict]:
    files = sorted((ROOT / "results" / "laptop").glob(pattern))
    assert files
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


@pytest.fixture
def runs():
    return stored("seed?_bfloat16.json")


@pytest.fixture
def readme():
    """Its words, wherever its lines end."""
    return " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())


def row(title: str, cells: list[str], values: list[float], form: str = ".1f") -> str:
    """One cell per seed, then mean and standard deviation over seeds."""
    return f"| {title} | {' | '.join(cells)} | {mean(values):{form}}, {stdev(values):.1f} |"


def score_row(title: str, runs: list[dict], name: str, blank: int = 0) -> str:
    """`blank`: seeds without such a run."""
    cells = [f"{run[name]['score']:.1f} +- {run[name]['standard_error']:.1f}" for run in runs]
    return " ".join(row(title, cells + [""] * blank, [run[name]["score"] for run in runs]).split())


def gain_row(title: str, runs: list[dict], blank: int = 0) -> str:
    gains = [run["after - before"] for run in runs]
    cells = [f"{gain['difference']:+.1f} +- {gain['standard_error']:.1f}" for gain in gains]
    return " ".join(row(title, cells + [""] * blank, [gain["difference"] for gain in gains], "+.1f").split())


@pytest.mark.parametrize("name", STAGES)
def test_the_scores_are_theirs(name, runs, readme):
    assert score_row(STAGES[name], runs, name) in readme


def test_the_gains_are_theirs(runs, readme):
    assert gain_row("gain over the cold start", runs) in readme


def test_the_scores_and_gains_with_ppo_are_theirs(runs, readme):
    others = stored("ppo?_bfloat16.json")
    blank = len(runs) - len(others)
    assert score_row("after PPO instead (`--algo ppo`)", others, "after", blank) in readme
    assert gain_row("its gain over the cold start", others, blank) in readme


@pytest.mark.parametrize(
    "title, of",
    [
        ("right act, once hinted, cold start", lambda run: run["before"]["found_out"]["serves_after_hint"]),
        ("right act, once hinted, trained", lambda run: run["after"]["found_out"]["serves_after_hint"]),
        ("perplexity on ordinary text (base 20.5)", lambda run: run["after"]["guard"]["perplexity"]),
    ],
)
def test_what_else_the_table_says_is_theirs(title, of, runs, readme):
    assert row(title, [f"{of(run):.1f}" for run in runs], [of(run) for run in runs]) in readme
