"""The README's table of the laptop runs is that of the stored results."""

import json
from statistics import mean, stdev

import pytest
from conftest import ROOT

from evaluate import mean_and_error
from extras import figures
from simulator import INTENTIONS, load_profiles

STAGES = {"base": "SmolLM2-135M", "before": "after the cold start", "after": "after reinforcement learning"}


def stored(pattern: str) -> list[dict]:
    files = sorted((ROOT / "results" / "laptop").glob(pattern))
    assert files
    return [json.loads(path.read_text(encoding="utf-8")) for path in files]


@pytest.fixture
def runs():
    return stored("seed?_bfloat16.json")


def words_of(page: str) -> str:
    """Wherever its lines end."""
    return " ".join((ROOT / page).read_text(encoding="utf-8").split())


@pytest.fixture
def readme():
    return words_of("README.md")


@pytest.fixture
def results_page():
    return words_of("results/README.md")


def row(title: str, cells: list[str], values: list[float], form: str = ".1f") -> str:
    """One cell per seed, then mean and standard deviation over seeds."""
    spread = f", {stdev(values):.1f}" if len(values) > 1 else ""
    return f"| {title} | {' | '.join(cells)} | {mean(values):{form}}{spread} |"


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


@pytest.mark.parametrize(
    "pattern, title",
    [
        ("grpo?_bfloat16", "GRPO instead (`--algo grpo`): score, gain"),
        ("seed?_float32", "PPO in float32 (`--dtype float32`): score, gain"),
        ("think?_bfloat16", "PPO with `--think`: score, gain"),
    ],
)
def test_what_others_reach_is_theirs(pattern, title, runs, readme):
    others = stored(f"{pattern}.json")
    scores, gains = [run["after"]["score"] for run in others], [run["after - before"]["difference"] for run in others]
    cells = [f"{score:.1f}, {gain_of(run)}" for score, run in zip(scores, others)] + [""] * (len(runs) - len(others))
    means = f"{mean(scores):.1f}, {mean(gains):+.1f}, {stdev(gains):.1f}"
    assert " ".join(f"| {title} | {' | '.join(cells)} | {means} |".split()) in readme


@pytest.mark.parametrize("kind", ["runs", "other users", "costs"])
def test_a_table_is_that_of_the_stored_runs(kind):
    made = {
        "runs": figures.table,
        "other users": figures.table_of_other_users,
        "costs": lambda: figures.table(figures.COSTS),
    }
    assert f"\n{made[kind]()}\n" in (ROOT / "results" / "README.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("row, key", [("seconds of a step", "seconds"), ("GB", "gigabytes")])
def test_what_trl_takes_is_what_was_measured(row, key):
    found = json.loads((ROOT / "results" / "bench_trl.json").read_text(encoding="utf-8"))
    ours, theirs = found[f"ours_{key}"], found[f"trl_{key}"]
    cells = f"{row} | {ours:.1f} | {theirs:.1f} | {theirs / ours:.2f} |\n"
    assert cells in (ROOT / "results" / "README.md").read_text(encoding="utf-8")


def test_other_users_are_those_of_the_run_that_was_trained(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "LAPTOP", tmp_path)
    for seed, score, gain in ((0, 60.0, 20.0), (1, 50.0, 10.0)):
        run = {"command": f"train --seed {seed}", "dtype": "float32", "after": {"score": score}}
        (tmp_path / f"{seed}.json").write_text(json.dumps(run | {"after - before": {"difference": gain}}))
        (tmp_path / f"{seed}_metrics.jsonl").write_text("")
    rows = []
    reader, attack = "another reader", "adversarial users"
    for seed, users, score, gain in ((0, reader, 45.0, 5.0), (1, reader, 41.0, 1.0), (1, attack, 30.0, -3.0)):
        results = {"out/checkpoint": {"score": score}, "difference": {"difference": gain}}
        trained = {"trained": f"train --seed {seed}", "dtype": "float32"}
        rows.append(json.dumps(trained | {"users": users, "results": results}))
    (tmp_path / "other_users.jsonl").write_text("\n".join(rows))
    line = "| train (float32) | 55.0; +15.0, 7.1 (2) | 43.0; +3.0, 2.8 (2) | 30.0; -3.0 (1) |  |"
    assert figures.table_of_other_users().splitlines()[2:] == [line]


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


@pytest.fixture
def labels():
    """{file: {model: its labels}}"""
    found = {}
    for name in ("labelled", "labelled_think", "labelled_variants"):
        found[name] = {}
        for line in (ROOT / "results" / "laptop" / f"{name}.jsonl").read_text(encoding="utf-8").splitlines():
            label = json.loads(line)
            found[name].setdefault(label["model"], []).append(label)
    return found


def percent(values) -> str:
    return f"{100 * mean(values):.0f}"


def test_the_shares_of_bad_replies_are_those_of_the_labels(readme, labels):
    def bad(name: str) -> dict[str, str]:
        return {model: percent(label["grade"] == 0 for label in found) for model, found in labels[name].items()}

    ours, others = bad("labelled"), bad("labelled_think")
    assert f"found {ours['cold start']} % of the cold start's replies bad" in readme
    assert f"{ours['PPO']} % after PPO, {ours['GRPO']} % after GRPO" in readme
    assert f"Other graders: {others['cold start']} % after the cold start, {others['PPO']} % after PPO" in readme
    assert f"with `--think` {others['cold start, --think']} and {others['PPO, --think']} %" in readme


def test_the_shares_of_good_and_bad_replies_of_variants_are_those_of_the_labels(results_page, labels):
    def shares(model: str, graders: int) -> tuple[int, str]:
        found = [label for label in labels["labelled_variants"][model] if label["graders"] == graders]
        assert len(found) == (60 if "terminal" in model or graders == 3 else 120)
        return sum(label["grade"] >= 2 for label in found), percent(label["grade"] == 0 for label in found)

    (good, bad), (others_good, others_bad) = shares("GRPO, --kl 0", 1), shares("GRPO", 1)
    assert f"graders find {good} good, not {others_good}, and {bad} +- 4 % bad, not {others_bad} +- 5" in results_page
    (good, bad), (others_good, others_bad) = shares("GRPO, --std", 2), shares("GRPO", 2)
    assert bad == others_bad
    assert f"find {good} of 120 replies good, not {others_good}, and {bad} % bad in both" in results_page
    variants = "GRPO, --reward terminal --gamma 1 --std", "GRPO, --reward mixed --gamma 1", "GRPO"
    (good, bad), (mixed_good, mixed_bad), (others_good, others_bad) = (shares(model, 3) for model in variants)
    words = f"find {good} and {mixed_good} of 60 replies of these two good, {bad} and {mixed_bad} % bad"
    assert f"{words}, of the default's {others_good} and {others_bad} %" in results_page
    good, bad = shares("GRPO, --reward terminal --gamma 1", 2)
    assert f"they find {good} of 60 good, {bad} +- 6 % bad" in results_page


def test_the_shares_of_right_acts_are_those_of_the_labels(readme, labels):
    wanted = {profile.id: profile.task for profile in load_profiles(ROOT / "data" / "test_profiles.jsonl")}
    before, after = (labels["labelled"][model] + labels["labelled_think"][model] for model in ("cold start", "PPO"))

    def right(by: str, found: list[dict]) -> str:
        return percent(INTENTIONS.get(label[by]) == wanted[label["id"]] for label in found)

    graded = f"in {right('act', before)} % of the replies after the cold start, in {right('act', after)} % after PPO"
    counts = f"({len(before)} and {len(after)} labels)"
    assert f"{graded} {counts}, the offline user in {right('read', before)} and {right('read', after)} %." in readme


@pytest.mark.parametrize(
    "file, of, pair, words",
    [
        ("harder", "vanilla test users", "challenging - vanilla", "challenging - vanilla is {}"),
        ("harder", "vanilla test users", "vanilla - open", "vanilla - open {}"),
        ("variants", "vanilla test users", "terminal - delta", "it ends {} from that"),
        ("variants", "vanilla test users", "mixed - delta", "{} (gain 5.0 to 11.1)"),
        ("variants", "vanilla test users", "terminal, std - delta", "it ends {} from it (gain 6.4 to 15.0)"),
        ("variants", "vanilla test users", "KL 0 - delta", "Without the KL it ends {} from it"),
        ("variants", "vanilla test users", "std - delta", "(`--std`) it ends {} from it"),
        ("thinking", "cold start", "think - not", "`--think` - without it is {} after the cold start"),
        ("thinking", "PPO", "think - not", "{} after PPO"),
        ("thinking", "GRPO", "think - not", "{} after GRPO"),
    ],
)
def test_a_paired_difference_is_that_of_the_persons(file, of, pair, words, results_page):
    found = json.loads((ROOT / "results" / "laptop" / f"{file}.json").read_text(encoding="utf-8"))[of]
    one, other = (found[name] for name in pair.split(" - "))
    difference, error = mean_and_error([one[person] - other[person] for person in one])
    assert len(one) == 48
    assert [found[pair]["difference"], found[pair]["standard_error"]] == pytest.approx([difference, error], abs=0.01)
    assert words.format(f"{difference:+.1f} +- {error:.1f}") in results_page


def test_a_line_holds_the_seeds_of_one_command_and_dtype(tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "LAPTOP", tmp_path)
    for name, dtype, seed, gain in (("a", "bfloat16", 0, 10.0), ("b", "bfloat16", 1, 14.0), ("c", "float32", 0, 5.0)):
        after = dict(score=40 + gain, success=1.0, failure=2.0, found_out={"serves_after_hint": 50.0})
        after |= dict(thinking_words_per_reply=3.0, words_per_reply=9.0, broken_formats=4.0)
        run = dict(command=f"train --seed {seed} --think", dtype=dtype, after=after)
        run |= dict(base={"score": 5.0}, before={"score": 40.0})
        (tmp_path / f"{name}.json").write_text(json.dumps(run | {"after - before": {"difference": gain}}))
        step = dict(rollout_seconds=20, update_seconds=40, tokens_per_second=100.0, peak_memory_gb=2.0 + gain)
        (tmp_path / f"{name}_metrics.jsonl").write_text((json.dumps(step) + "\n") * 4)
    start, same = "5.0, 0.0 | 40.0, 0.0", "1.0, 0.0 | 2.0, 0.0 | 50.0, 0.0 | 3.0, 0.0 | 9.0, 0.0 | 4.0, 0.0 | 4.0, 0.0"
    assert figures.table().splitlines()[2:] == [
        f"| train --think (bfloat16) | 2 | {start} | 52.0, 2.8 | 12.0, 2.8 | {same} |",
        "| train --think (float32) | 1 | 5.0 | 40.0 | 45.0 | 5.0 | 1.0 | 2.0 | 50.0 | 3.0 | 9.0 | 4.0 | 4.0 |",
    ]
    assert figures.table(figures.COSTS).splitlines()[2:] == [
        "| train --think (bfloat16) | 2 | 20.0, 0.0 | 40.0, 0.0 | 100.0, 0.0 | 14.0, 2.8 |",
        "| train --think (float32) | 1 | 20.0 | 40.0 | 100.0 | 7.0 |",
    ]


def test_a_figure_shows_a_dot_per_seed_and_kind(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **settings: drawn.append(figure))
    runs = {name: stored(f"{name}?_bfloat16.json")[:2] for name in ("seed", "think")}
    figures.draw_intentions(runs, tmp_path / "whom.png")
    by_intention, by_act = drawn[0].axes
    for axis, kinds in ((by_intention, 8), (by_act, 16)):
        dots = [line for line in axis.lines if len(line.get_xdata())]
        assert [len(line.get_xdata()) for line in dots] == [kinds] * 4
    first = runs["think"][0]["after"]["per_intention"][INTENTIONS["motives"]][1]
    assert by_intention.lines[2].get_xdata()[list(INTENTIONS).index("motives")] == first


def test_a_kl_that_nobody_has_measured_is_not_drawn(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **settings: drawn.append(figure))
    runs = {
        "with": [[dict.fromkeys(figures.PANELS, 0.5)] * 3],
        "without": [[dict.fromkeys(figures.PANELS, 0.5) | {"kl": 0}] * 3],
    }
    figures.draw_learning(runs, tmp_path / "learning.png")
    assert [len(axis.lines) for axis in drawn[0].axes] == [1 if key == "kl" else 2 for key in figures.PANELS]


def test_a_figure_compares_commands_that_are_stored():
    stored = figures.configurations()
    assert all(command in stored for commands in figures.FIGURES.values() for command in commands)


def test_a_figure_of_users_shows_every_score(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(figures.Figure, "savefig", lambda figure, path, **settings: drawn.append(figure))
    others = figures.other_users()
    runs = {command: others[command] for command in figures.FIGURES["harder"]}
    figures.draw_users(runs, tmp_path / "users.png")
    dots = [line for line in drawn[0].axes[0].lines if len(line.get_xdata())]
    scores = [
        [score for score, _ in found[users]]
        for found in runs.values()
        for users in ("vanilla users", "challenging users")
    ]
    assert [list(line.get_xdata()) for line in dots] == scores
    assert len({line.get_markerfacecolor() for line in dots}) == 3
    assert len({line.get_ydata()[0] for line in dots}) == 6
