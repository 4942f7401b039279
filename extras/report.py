"""An evaluation, shown: tables in the terminal, and one HTML page with every dialogue and what moved it.

The page (report.html.j2) opens offline and loads nothing: its Content-Security-Policy forbids scripts and every address.
"""

import io
import re
from collections import Counter
from pathlib import Path

import matplotlib
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from answers import without_surrogates
from simulator import SAGE, write_whole

MOST = 400  # profiles and thin lines shown: a browser still opens that at once
COLORS = ("#a8852c", "#4a7fd0", "#bf5594", "#3a9486")  # of the models in turn; legible on white and on black


def with_error(mean, error) -> str:
    return f"{mean:.1f} ± {error:.1f}" if error == error else f"{mean:.1f}"  # nan: one profile has no error


def measures(result: dict) -> dict[str, str]:
    """What was measured beside the score: {label: value in words}."""
    shown = {}
    if found := result.get("found_out"):
        shown["replies that serve the hidden intention"] = f"{found['serves']} %"
        shown["the same after a hint"] = f"{found['serves_after_hint']} %"
        shown["replies with the commonest opening"] = f"{found['commonest_opening']} %"
    if tracking := result.get("tracking"):
        score = with_error(*tracking["score"]) if tracking["score"] else "undefined"
        shown["tracking of the emotion, 50 is chance"] = score
    if ordinary := result.get("guard"):
        shown["perplexity on ordinary text"] = str(ordinary["perplexity"])
        if "kl" in ordinary:
            shown["KL from the base there, nats per token"] = str(ordinary["kl"])
    for user, row in result.get("beyond", {}).items():
        dropped = f" ({row['dropped']} dropped)" if row["dropped"] else ""
        shown[f"score with user: {user}"] = with_error(row["score"], row["standard_error"]) + dropped
    if judged := result.get("judged"):
        for key, pair in (judged["capabilities"] | judged["coordinates"]).items():
            shown[f"judge: {key}"] = with_error(*pair)
        shown["judge: dialogues rated"] = f"{judged['judged']} of {judged['judged'] + judged['skipped']}"
    for task, metrics in result.get("tasks", {}).items():
        for metric, value in metrics.items():
            shown[f"{task}: {metric}"] = f"{value:.4g}"
    return shown


# --- In the terminal --------------------------------------------------------------------------------------------------


def print_table(results: dict[str, dict]) -> None:
    print(f"{'':32}{'score':>7} {'+- SE':>6} {'success':>8} {'failure':>8} {'replies':>8} {'words':>6} {'thinking':>8}")
    for name, result in results.items():
        print(
            f"{name[-32:]:32}{result['score']:7.1f} {result['standard_error']:6.1f} {result['success']:7.1f}% "
            f"{result['failure']:7.1f}% {result['replies_per_dialogue']:8.1f} {result['words_per_reply']:6.1f} "
            f"{result['thinking_words_per_reply']:8.1f}"
        )


def print_groups(result: dict) -> None:
    for title in ("per_intention", "per_character"):
        print(f"\n{title.replace('_', ' ')}")
        for name, (count, score, error) in result[title].items():
            print(f"  {score:6.1f} +- {error:4.1f}  (n = {count})  {name}")


def print_probes(name: str, result: dict) -> None:
    print(f"\n{name}")
    for strategy, use in result["strategies"].items():
        print(f"  {strategy:18} {use['share']:5.1f}% of replies, change {use['mean_change']:+5.1f}  (n = {use['n']})")
    if not result["strategies"]:
        print("  acts: not read")
    for label, value in measures(result).items():
        print(f"  {label:42} {value}")


def print_dialogue(transcript: dict) -> None:
    print(f"\n--- {transcript['id']}: {transcript['character']}. {transcript['task']} -> {transcript['emo_point']}")
    for message in transcript["history"]:
        if message["role"] == "user":
            fired = ", ".join(
                f"{name} {points:+.1f}" for name, points, _ in message.get("planning", {}).get("fired", [])
            )
            print(f"  [{message['emotion-point']:3d}] user: {message['content']}" + (f"   ({fired})" if fired else ""))
        else:
            print(f"        model: {message['content']}")


# --- The page ---------------------------------------------------------------------------------------------------------


def write_report(path: str | Path, dialogues: dict[str, list[dict]], results: dict[str, dict], notes=()) -> None:
    """Write the page for models {name: transcripts} with their {name: evaluate.summarize(transcripts)}, and notes above it.

    It appears under its name whole or not at all. Raises OSError.
    """
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    results = {name: results[name] for name in dialogues}
    page = environment.get_template("report.html.j2").render(
        protocol=SAGE,
        colors={name: COLORS[i % len(COLORS)] for i, name in enumerate(dialogues)},
        summary=summary(results),
        notes=notes,
        trajectories=trajectories(dialogues),
        per_intention=score_bars(results, "per_intention"),
        per_character=score_bars(results, "per_character"),
        strategies=strategy_bars(results),
        cases=cases(dialogues),
        most=MOST,
    )
    write_whole(Path(path), without_surrogates(page))


def summary(results: dict) -> dict[str, list]:
    """{measure: its value for each model}"""
    columns = []
    for result in results.values():
        score = {
            "score": with_error(result["score"], result["standard_error"]),
            "success": f"{result['success']:.1f} %",
            "failure": f"{result['failure']:.1f} %",
            "dialogues": result["dialogues"],
            "dialogues dropped": result["dropped"],
            "replies per dialogue": result["replies_per_dialogue"],
            "words per reply": result["words_per_reply"],
            "words of thinking per reply": result["thinking_words_per_reply"],
        }
        columns.append(score | measures(result))
    labels = dict.fromkeys(label for column in columns for label in column)
    return {label: [column.get(label, "") for column in columns] for label in labels}


def trajectories(dialogues: dict[str, list[dict]]) -> Markup:
    """An SVG; across: replies so far, up: emotion. Thin: a dialogue. Thick: the mean."""
    figure = Figure(figsize=(9, 3.4), layout="constrained")
    figure.patch.set_alpha(0)
    axis = figure.subplots()
    axis.patch.set_alpha(0)
    curves = {name: [emotions(t) for t in rows if not t.get("dropped")] for name, rows in dialogues.items()}
    turns = max([1, *(len(curve) - 1 for model in curves.values() for curve in model)])
    for i, model in enumerate(curves.values()):
        color = COLORS[i % len(COLORS)]
        for curve in model[:MOST]:
            axis.plot(curve, color=color, linewidth=0.7, alpha=0.22, clip_on=False)
        lasting = [curve + curve[-1:] * (turns + 1 - len(curve)) for curve in model]
        axis.plot([sum(at) / len(at) for at in zip(*lasting)], color=color, linewidth=2.5, clip_on=False)
    axis.set(xlim=(0, turns), ylim=(0, 100), xticks=range(turns + 1), yticks=(0, 10, 40, 70, 100))
    axis.grid(axis="y", color="#888", alpha=0.4, clip_on=False)
    axis.tick_params(colors="#888", labelsize=8, left=False, bottom=False)
    axis.spines[:].set_color("#888")
    drawn = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "rlver"}):
        figure.savefig(drawn, format="svg", metadata=nothing)
    svg = drawn.getvalue()
    return Markup(re.sub(r' xmlns(:xlink)?="[^"]*"', "", svg[svg.index("<svg") :]))  # inside HTML it needs none


def emotions(transcript: dict) -> list[int]:
    return [message["emotion-point"] for message in transcript["history"] if "emotion-point" in message]


def score_bars(results: dict, field: str) -> dict[str, list[dict]]:
    """{group: a bar per model}; a bar is as wide as the score."""
    groups = {}
    for name, result in results.items():
        for group, (_, score, error) in result[field].items():
            bar = {"name": name, "percent": score, "words": with_error(score, error)}
            groups.setdefault(group, []).append(bar)
    return groups


def strategy_bars(results: dict) -> dict[str, list[dict]]:
    groups = {}
    for name, result in results.items():
        for act, use in result["strategies"].items():
            words = f"{use['share']:.1f} %, change {use['mean_change']:+.1f}"
            groups.setdefault(act, []).append({"name": name, "percent": use["share"], "words": words})
    return groups


def cases(dialogues: dict[str, list[dict]]) -> list[list[tuple[str, dict]]]:
    """For each profile and seed, the models' dialogues side by side: [(name of the model, transcript)]."""
    together = {}
    for name, transcripts in dialogues.items():
        seen = Counter()
        for transcript in transcripts:
            together.setdefault((transcript["id"], seen[transcript["id"]]), []).append((name, transcript))
            seen[transcript["id"]] += 1
    return list(together.values())
