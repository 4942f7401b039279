"""The figures of results/, drawn from what is stored there: `python -m extras.figures`."""

import json
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


# label: files of its seeds, how its line is drawn (readable in grey)
RUNS = {"python train.py": ("seed?_*_metrics.jsonl", "-"), "python train.py --algo ppo": ("ppo?_*_metrics.jsonl", "--")}


def draw_learning(runs: dict[str, list[list[dict]]], path: Path) -> None:
    """One panel per quantity: for each of `runs` the mean over its seeds, with a band of one standard deviation."""
    figure = Figure(figsize=(9, 6), layout="constrained")
    for axis, (key, label) in zip(figure.subplots(2, 2).flat, PANELS.items()):
        for name, seeds in runs.items():
            values = [[row[key] for row in rows] for rows in zip(*seeds)]  # by step
            steps, style = range(1, 1 + len(values)), RUNS[name][1]
            middle = [mean(value) for value in values]
            spread = [stdev(value) if len(seeds) > 1 else 0 for value in values]
            axis.plot(steps, middle, style, color="black", label=f"{name}, seeds: {len(seeds)}")
            low, high = ([m + sign * s for m, s in zip(middle, spread)] for sign in (-1, 1))
            axis.fill_between(steps, low, high, color="grey", alpha=0.3, linewidth=0)
        axis.set(xlabel="step", ylabel=label)
    figure.axes[0].legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    runs = {}
    for name, (files, _) in RUNS.items():
        texts = [file.read_text(encoding="utf-8") for file in sorted(LAPTOP.glob(files))]
        runs[name] = [[json.loads(line) for line in text.splitlines()] for text in texts]
    draw_learning(runs, LAPTOP / "learning.png")


if __name__ == "__main__":
    main()
