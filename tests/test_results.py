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


def score_of(result: dict) -> str:
    return f"{result['score']:.1f} +- {result['standard_error']:.1f}"


def gain_of(run: dict) -> str:
    gain = run["after - before"]
    return f"{gain['difference']:+.1f} +- {gain['standard_error']:.1f}"


@pytest.mark.parametrize("name", STAGES)
def test_the_scores_are_theirs(name, runs, readme):
    assert row(STAGES[name], [score_of(run[name]) for run in runs], [run[name]["score"] for run in runs]) in readme


def test_the_gains_are_theirs(runs, readme):
    gains = [run["after - before"]["difference"] for run in runs]
    assert row("gain over the cold start", [gain_of(run) for run in runs], gains, "+.1f") in readme


def test_what_is_said_of_ppo_is_its(readme):
    (run,) = stored("ppo?_bfloat16.json")
    assert f"PPO, seed 0, ends at {score_of(run['after'])}, {gain_of(run)} over the cold start" in readme


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
