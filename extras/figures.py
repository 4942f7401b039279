"""The table and the figures of results/, from the runs that are stored there: `python -m extras.figures`.

A run is results/laptop/NAME.json (its result.json, before that its command, dtype, machine and seconds) and NAME_metrics.jsonl (its
metrics.jsonl). Runs of one dtype whose commands differ by --seed alone are one configuration.
"""

import json
import re
from collections import defaultdict
from pathlib import Path
from statistics import mean, stdev

from matplotlib.figure import Figure

LAPTOP = Path(__file__).parent.parent / "results" / "laptop"
PANELS = {
    "change_per_turn": "emotion per reply, points",
    "serves": "right act, % of replies",
    "kl": "KL to the cold start, nats/token",
    "entropy": "entropy, nats/token",
}
FIGURES = {  # name: the commands that it compares
    "learning": ("python train.py (bfloat16)", "python train.py --algo grpo (bfloat16)"),
    "thinking": ("python train.py (bfloat16)", "python train.py --think (bfloat16)"),
}
LINES = "-", "--"  # readable in grey
COLUMNS = {  # of the table: what it holds of one seed's result
    "score": lambda run: run["after"]["score"],
    "gain over the cold start": lambda run: run["after - before"]["difference"],
    "success, %": lambda run: run["after"]["success"],
    "failure, %": lambda run: run["after"]["failure"],
    "right act, once hinted, %": lambda run: run["after"]["found_out"]["serves_after_hint"],
    "words of a thought": lambda run: run["after"]["thinking_words_per_reply"],
    "of a reply": lambda run: run["after"]["words_per_reply"],
    "broken formats, %": lambda run: run["after"]["broken_formats"],
}


def configurations() -> dict[str, list[tuple[dict, list[dict]]]]:
    """{command without its seed (dtype): [(result, metrics of each step), one per seed]}"""
    found = defaultdict(list)
    for file in sorted(LAPTOP.glob("*_metrics.jsonl")):
        result = json.loads(file.with_name(file.name.replace("_metrics.jsonl", ".json")).read_text(encoding="utf-8"))
        metrics = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        found[f"{re.sub(' --seed [0-9]+', '', result['command'])} ({result['dtype']})"].append((result, metrics))
    return found


def table() -> str:
    """A line per configuration: the mean over its seeds, then their standard deviation; of the gain the smallest, too."""
    lines = [f"| command | seeds | {' | '.join(COLUMNS)} | smallest gain |", "|---" * (len(COLUMNS) + 3) + "|"]
    for command, runs in configurations().items():
        results, cells = [result for result, _ in runs], []
        for of in COLUMNS.values():
            values = [of(result) for result in results]
            cells.append(f"{mean(values):.1f}" + (f", {stdev(values):.1f}" if len(values) > 1 else ""))
        cells.append(f"{min(result['after - before']['difference'] for result in results):.1f}")
        lines.append(f"| {command} | {len(runs)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def draw_learning(runs: dict[str, list[list[dict]]], path: Path) -> None:
    """One panel per quantity: for each of `runs` the mean over its seeds, with a band of one standard deviation."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for (name, seeds), line in zip(runs.items(), LINES):
            values = [[row[key] for row in rows] for rows in zip(*seeds)]  # by step
            steps, middle = range(1, 1 + len(values)), [mean(value) for value in values]
            spread = [stdev(value) if len(seeds) > 1 else 0 for value in values]
            axis.plot(steps, middle, line, color="black", label=f"{name}, seeds: {len(seeds)}")
            low, high = ([m + sign * s for m, s in zip(middle, spread)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color="grey", alpha=0.3, linewidth=0)
        axis.set(xlabel="step", ylabel=label)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    print(table())
    stored = configurations()
    for name, commands in FIGURES.items():
        if all(command in stored for command in commands):
            runs = {command: [metrics for _, metrics in stored[command]] for command in commands}
            draw_learning(runs, LAPTOP / f"{name}.png")


if __name__ == "__main__":
    main()
