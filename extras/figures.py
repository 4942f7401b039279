"""The tables and the figures of results/, from the runs that are stored there: `python -m extras.figures`.

A run is results/laptop/NAME.json (its result.json, before that its command, dtype, machine and seconds) and NAME_metrics.jsonl (its
metrics.jsonl). Runs of one dtype whose commands differ by --seed alone are one configuration. A line of other_users.jsonl is what
evaluate.py finds of a run's model against the cold start with users that are not those of its own test (`trained`: the run's command).
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

from reader import ACTS
from simulator import INTENTIONS

LAPTOP = Path(__file__).parent.parent / "results" / "laptop"
PANELS = {
    "change_per_turn": "emotion per reply (training users)",
    "serves": "right act, % (training users)",
    "kl": "KL to the cold start, nats/token",
    "entropy": "entropy, nats/token",
}
FIGURES = {  # name: the commands that it compares
    "learning": ("python train.py (bfloat16)", "python train.py --algo grpo (bfloat16)"),
    "thinking": ("python train.py (bfloat16)", "python train.py --think (bfloat16)"),
    "thinking_grpo": ("python train.py --algo grpo (bfloat16)", "python train.py --think --algo grpo (bfloat16)"),
    "harder": (
        "python train.py --algo grpo (bfloat16)",
        "python train.py --algo grpo --difficulty vanilla (bfloat16)",
        "python train.py --algo grpo --difficulty challenging (bfloat16)",
    ),
    "rewards": (
        "python train.py --algo grpo (bfloat16)",
        "python train.py --algo grpo --reward terminal --gamma 1 (bfloat16)",
        "python train.py --algo grpo --reward mixed --gamma 1 (bfloat16)",
    ),
    "cold_start": (
        "python train.py --algo grpo (bfloat16)",
        "python train.py --algo grpo --cold-start none (bfloat16)",
    ),
    "updates": (
        "python train.py --algo grpo (bfloat16)",
        "python train.py --algo grpo --kl 0 (bfloat16)",
        "python train.py --algo grpo --std (bfloat16)",
    ),
}
LOOKS = ("-", "black"), ("--", "white"), (":", "grey")  # of a line, of a dot: readable in grey
USERS = "vanilla users", "another reader", "adversarial users", "challenging users"  # first those of a run's own test
COLUMNS = {  # of the table: what it holds of one seed's result and metrics
    "base": lambda run, _: run.get("base", run["before"])["score"],  # without a cold start the same
    "cold start": lambda run, _: run["before"]["score"],
    "trained": lambda run, _: run["after"]["score"],
    "gain over the cold start": lambda run, _: run["after - before"]["difference"],
    "success, %": lambda run, _: run["after"]["success"],
    "failure, %": lambda run, _: run["after"]["failure"],
    "right act, once hinted, %": lambda run, _: run["after"]["found_out"]["serves_after_hint"],
    "words of a thought": lambda run, _: run["after"]["thinking_words_per_reply"],
    "of a reply": lambda run, _: run["after"]["words_per_reply"],
    "broken formats, %": lambda run, _: run["after"]["broken_formats"],
    "minutes of training": lambda _, steps: sum(row["rollout_seconds"] + row["update_seconds"] for row in steps) / 60,
}
COSTS = {  # of another table
    "rollout, s a step": lambda _, steps: mean(row["rollout_seconds"] for row in steps),
    "update, s a step": lambda _, steps: mean(row["update_seconds"] for row in steps),
    "sampled tokens/s of rollout": lambda _, steps: mean(row["tokens_per_second"] for row in steps),
    "peak memory, GB": lambda _, steps: max(row["peak_memory_gb"] for row in steps),
}


def configuration(command: str, dtype: str) -> str:
    return f"{re.sub(' --seed [0-9]+', '', command)} ({dtype})"


def configurations() -> dict[str, list[tuple[dict, list[dict]]]]:
    """{command without its seed (dtype): [(result, metrics of each step), one per seed]}"""
    found = defaultdict(list)
    for file in sorted(LAPTOP.glob("*_metrics.jsonl")):
        result = json.loads(file.with_name(file.name.replace("_metrics.jsonl", ".json")).read_text(encoding="utf-8"))
        metrics = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[configuration(result["command"], result["dtype"])].append((result, metrics))
    return dict(sorted(found.items()))


def other_users() -> dict[str, dict[str, list[tuple[float, float]]]]:
    """{command without its seed (dtype): {users: [(score, gain over the cold start), one per seed]}}, where others are stored."""
    found = {}
    for line in (LAPTOP / "other_users.jsonl").read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        score, gain = row["results"]["out/checkpoint"]["score"], row["results"]["difference"]["difference"]
        by_users = found.setdefault(configuration(row["trained"], row["dtype"]), {users: [] for users in USERS})
        by_users[row["users"]].append((score, gain))
    for command, runs in configurations().items():
        if command in found:
            found[command][USERS[0]] = [(run["after"]["score"], run["after - before"]["difference"]) for run, _ in runs]
    return dict(sorted(found.items()))


def table(columns: dict = COLUMNS) -> str:
    """A line per configuration: of each of `columns` the mean over its seeds, then their standard deviation."""
    lines = [f"| command | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for command, runs in configurations().items():
        cells = []
        for of in columns.values():
            values = [of(result, metrics) for result, metrics in runs]
            cells.append(f"{mean(values):.1f}" + (f", {stdev(values):.1f}" if len(values) > 1 else ""))
        lines.append(f"| {command} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def table_of_other_users() -> str:
    """A line per configuration: mean score over its seeds; mean and standard deviation of the gain over the cold start."""
    lines = [f"| command | {' | '.join(USERS)} |", "|---" * (len(USERS) + 1) + "|"]
    for command, found in other_users().items():
        cells = []
        for users in USERS:
            scores, gains = zip(*found[users]) if found[users] else ((), ())
            spread = f", {stdev(gains):.1f}" if len(gains) > 1 else ""
            cells.append(f"{mean(scores):.1f}; {mean(gains):+.1f}{spread} ({len(gains)})" if gains else "")
        lines.append(f"| {command} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_learning(runs: dict[str, list[list[dict]]], path: Path) -> None:
    """One panel per quantity: for each of `runs` the mean over its seeds, with a band of one standard deviation."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for number, (name, seeds) in enumerate(runs.items()):
            values = [[row[key] for row in rows] for rows in zip(*seeds)]  # by step
            if not any(map(any, values)):
                continue  # a KL that nobody has measured: --kl 0 keeps no reference
            steps, middle = range(1, 1 + len(values)), [mean(value) for value in values]
            spread = [stdev(value) if len(seeds) > 1 else 0 for value in values]
            axis.plot(steps, middle, LOOKS[number][0], color="black", label=f"{name}, seeds: {len(seeds)}")
            low, high = ([m + sign * s for m, s in zip(middle, spread)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color="grey", alpha=0.3, linewidth=0)
        axis.set(xlabel="step", ylabel=label)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", frameon=False)
    figure.savefig(path, dpi=110)


def dots(number: int) -> dict:
    return dict(color="black", markerfacecolor=LOOKS[number][1], linestyle="", marker="o", markersize=5)


def offset(number: int, count: int) -> float:
    """Of the dots of one of `count` configurations, from the middle of their row."""
    return 0.25 * (number - (count - 1) / 2)


def name_rows(axis, names) -> None:
    axis.set_yticks(range(len(names)), names)
    axis.invert_yaxis()
    axis.grid(axis="y", color="lightgrey")


def draw_intentions(runs: dict[str, list[dict]], path: Path) -> None:
    """The final emotion by hidden intention, and the replies by act: a dot per seed, in another grey for each of `runs`."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    by_intention, by_act = figure.subplots(1, 2)
    kinds = (*ACTS, "again")
    for number, (name, results) in enumerate(runs.items()):
        look, aside = dots(number), offset(number, len(runs))
        for result in (run["after"] for run in results):
            emotions = [result["per_intention"][task][1] for task in INTENTIONS.values()]  # of [persons, score, error]
            by_intention.plot(emotions, [place + aside for place in range(len(emotions))], **look)
            shares = [result["strategies"].get(kind, {"share": 0.0})["share"] for kind in kinds]
            by_act.plot(shares, [place + aside for place in range(len(kinds))], **look)
        by_act.plot([], [], **look, label=f"{name}, a dot per seed")
    by_intention.set(xlabel="final emotion, 0 to 100", ylabel="hidden intention", xlim=(0, 100))
    by_act.set(xlabel="% of replies", ylabel="act")
    name_rows(by_intention, INTENTIONS)
    name_rows(by_act, kinds)
    figure.legend(loc="outside upper center", frameon=False)
    figure.savefig(path, dpi=110)


def draw_users(runs: dict[str, dict[str, list[tuple[float, float]]]], path: Path) -> None:
    """The final emotion of several kinds of users: a dot per seed, in another grey for each of `runs`."""
    figure = Figure(figsize=(9, 3), layout="constrained")
    axis = figure.subplots()
    shown = [users for users in USERS if all(found[users] for found in runs.values())]
    for number, (name, found) in enumerate(runs.items()):
        for place, users in enumerate(shown):
            scores = [score for score, _ in found[users]]
            axis.plot(scores, [place + offset(number, len(runs))] * len(scores), **dots(number))
        axis.plot([], [], **dots(number), label=f"{name}, a dot per seed")
    axis.set(xlabel="final emotion, 0 to 100", ylabel="held-out users", xlim=(0, 100))
    name_rows(axis, shown)
    figure.legend(loc="outside upper center", frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    print(f"{table()}\n\n{table_of_other_users()}\n\n{table(COSTS)}")
    stored, others = configurations(), other_users()
    for name, commands in FIGURES.items():
        draw_learning({c: [metrics for _, metrics in stored[c]] for c in commands}, LAPTOP / f"{name}.png")
        draw_intentions({c: [result for result, _ in stored[c]] for c in commands}, LAPTOP / f"{name}_whom.png")
        if all(command in others for command in commands):
            draw_users({command: others[command] for command in commands}, LAPTOP / f"{name}_users.png")


if __name__ == "__main__":
    main()
