"""One HTML file that shows an evaluation: scores, emotion curves, what worked, and every dialogue with what moved it.

    write_report(path, {name: transcripts}, {name: summary})      evaluate.py and train.py call it

The file opens offline and loads nothing: its Content-Security-Policy forbids scripts and every address. Whatever a model or a
user said is escaped where it enters the page (`text`), and enters it nowhere else.
"""

from collections import Counter
from html import escape
from pathlib import Path

from answers import without_surrogates
from simulator import SAGE, write_whole

STYLE = """
:root { color-scheme: light dark; --back: #fff; --ink: #1c1c1e; --soft: #666; --line: #ddd; --box: #f4f4f6; --user: #e4eefb;
  --up: #14783c; --down: #b3261e; --m0: #8a6d1d; --m1: #2459b8; --m2: #a03070; --m3: #2b7a6d; }
@media (prefers-color-scheme: dark) { :root { --back: #17181b; --ink: #e9e9ec; --soft: #a0a0a8; --line: #3a3b40; --box: #222328;
  --user: #20303f; --up: #6fce93; --down: #ff9a90; --m0: #dcb85a; --m1: #7ea9f5; --m2: #e58cbc; --m3: #6cc7b7; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1200px; padding: 16px; background: var(--back); color: var(--ink);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 24px; margin: 0 0 4px; } h2 { font-size: 19px; margin: 32px 0 8px; } h3 { font-size: 15px; margin: 0 0 4px; }
p, figcaption { color: var(--soft); margin: 4px 0 12px; } figure { margin: 0; } dl { margin: 4px 0; } dd { margin: 0 0 6px; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 8px; border-bottom: 1px solid var(--line); text-align: right; vertical-align: top; }
td { white-space: nowrap; } summary { cursor: pointer; }
th:first-child { text-align: left; font-weight: normal; overflow-wrap: normal; } tr:first-child th { font-weight: bold; }
.name { border-bottom: 3px solid var(--c); }
.chart { position: relative; height: 300px; margin: 8px 0 28px 34px; border: 1px solid var(--line); }
.chart svg { width: 100%; height: 100%; display: block; }
.chart path, .chart line { fill: none; stroke: var(--c); vector-effect: non-scaling-stroke; }
.chart .one { stroke-width: 1; opacity: .22; } .chart .mean { stroke-width: 3; } .chart line { stroke: var(--line); }
.chart span { position: absolute; font-size: 12px; color: var(--soft); white-space: nowrap; }
.bars { display: grid; grid-template-columns: minmax(180px, 1fr) 2fr; gap: 2px 12px; align-items: center; margin-bottom: 12px; }
.bars .group { display: grid; gap: 2px; padding: 3px 0; }
.bar { display: flex; align-items: center; gap: 6px; font-size: 13px; font-variant-numeric: tabular-nums; }
.bar i { display: block; height: 12px; min-width: 1px; background: var(--c); border-radius: 2px; }
.case { border: 1px solid var(--line); border-radius: 8px; margin: 8px 0; padding: 8px 12px; }
.case > summary b { margin-right: 8px; } .case > summary .end { margin-left: 4px; color: var(--c); }
.pair { display: grid; gap: 20px; margin-top: 10px; } .pair > div { min-width: 0; } .two { grid-template-columns: 1fr 1fr; }
.said { border-radius: 8px; padding: 6px 10px; margin: 6px 0; white-space: pre-wrap; background: var(--box); }
.from-user { background: var(--user); margin-right: 24px; } .from-model { margin-left: 24px; }
.why { font-size: 13px; color: var(--soft); margin: 6px 0; } .why summary { color: var(--soft); }
.emotion { font-weight: bold; color: var(--ink); } .up { color: var(--up); } .down { color: var(--down); }
.rule { display: inline-block; border: 1px solid var(--line); border-radius: 10px; padding: 0 8px; margin: 2px 2px 0 0; }
@media (max-width: 700px) { .two, .bars { grid-template-columns: minmax(0, 1fr); } .bars .group { padding: 0 0 8px; }
  th, td { padding: 4px; } .from-user { margin-right: 8px; } .from-model { margin-left: 8px; } .chart { height: 220px; } }
"""

MOST = 400  # profiles and thin lines shown: a browser still opens that at once
PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>RLVER report</title>
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'">
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>STYLE</style></head>
<body>
BODY
</body></html>
"""


def text(value) -> str:
    """Anything as text of the page: <, >, & and quotes escaped."""
    return escape(str(value), quote=True)


def write_report(path: str | Path, dialogues: dict[str, list[dict]], results: dict[str, dict], notes=()) -> None:
    """Write the page for models {name: transcripts} with their {name: evaluate.summarize(transcripts)}, and notes above it.

    It appears under its name whole or not at all. Raises OSError.
    """
    names = list(dialogues)
    body = f"""<h1>Emotion scores</h1>
<p>Every dialogue starts at {SAGE.start} of 100 and has at most {SAGE.turns} appraised replies. Success is an end at 100, failure
one below 10. Errors are standard errors over profiles.</p>
{summary_table(names, results)}
{"".join(f"<p>{text(note)}</p>" for note in notes)}
<h2>Emotion over the dialogue</h2>
{trajectories(dialogues)}
<h2>Score per hidden intention</h2>
{bars(names, results, "per_intention", *SCORE)}
<h2>Score per character</h2>
{bars(names, results, "per_character", *SCORE)}
<h2>What the replies do</h2>
<p>Share of the replies that do each thing, as the offline user's reader saw it, and the mean change of the emotion after them.</p>
{bars(names, results, "strategies", *USE)}
<h2>Dialogues</h2>
{cases(dialogues)}"""
    write_whole(Path(path), PAGE.replace("STYLE", STYLE).replace("BODY", without_surrogates(body)))


def color(i: int) -> str:
    return f"style='--c:var(--m{i % 4})'"


def with_error(mean, error) -> str:
    return f"{mean:.1f} ± {error:.1f}" if error == error else f"{mean:.1f}"  # nan: one profile has no error


# What `bars` shows of a score (n, mean, error) and of a strategy's use: (width in percent, words).
SCORE = lambda entry: entry[1], lambda entry: with_error(*entry[1:])
USE = lambda use: use["share"], lambda use: f"{use['share']:.1f} %, change {use['mean_change']:+.1f}"


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
        shown |= {f"{task}: {metric}": f"{value:.4g}" for metric, value in metrics.items()}
    return shown


def summary_table(names: list[str], results: dict) -> str:
    """Measures down, models across."""
    columns = []
    for result in map(results.get, names):
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
    lines = "".join(f"<th {color(i)}><span class='name'>{text(name)}</span></th>" for i, name in enumerate(names))
    for label in dict.fromkeys(label for column in columns for label in column):
        cells = "".join(f"<td>{text(column.get(label, ''))}</td>" for column in columns)
        lines += f"<tr><th>{text(label)}</th>{cells}</tr>"
    return f"<table><tr><th></th>{lines}</table>"


def emotions(transcript: dict) -> list[int]:
    return [message["emotion-point"] for message in transcript["history"] if "emotion-point" in message]


def trajectories(dialogues: dict) -> str:
    """x: replies so far, y: emotion. Thin: a dialogue. Thick: the mean, in which an ended dialogue keeps its last emotion."""
    turns = max(1, *(len(emotions(t)) - 1 for transcripts in dialogues.values() for t in transcripts))

    def line(points, kind):
        path = " ".join(f"{'L' if k else 'M'}{100 * k / turns:.1f} {100 - y:.1f}" for k, y in enumerate(points))
        return f'<path class="{kind}" d="{path}"/>'

    drawn = "".join(f'<line x1="0" x2="100" y1="{100 - y}" y2="{100 - y}"/>' for y in (10, 40, 70))
    means = ""
    for i, transcripts in enumerate(dialogues.values()):
        curves = [emotions(t) for t in transcripts if not t.get("dropped")]
        padded = [curve + curve[-1:] * (turns + 1 - len(curve)) for curve in curves]
        drawn += f"<g {color(i)}>{''.join(line(curve, 'one') for curve in curves[:MOST])}</g>"
        means += f"<g {color(i)}>{line([sum(c) / len(c) for c in zip(*padded)], 'mean')}</g>"
    left, below = "right:calc(100% + 6px);bottom:calc({}% - 9px)", "top:100%;left:calc({}% - 4px)"
    labels = [(left.format(y), y) for y in (0, 10, 40, 70, 100)]
    labels += [(below.format(100 * k / turns), k) for k in range(turns + 1)]
    labels = "".join(f"<span style='{place}'>{number}</span>" for place, number in labels)
    chart = f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{drawn}{means}</svg>{labels}'
    caption = "Thin: one dialogue. Thick: the mean, in which a dialogue that has ended keeps its last emotion. Across: replies."
    return f'<figure><div class="chart">{chart}</div><figcaption>{caption}</figcaption></figure>'


def bars(names: list[str], results: dict, field: str, value, words) -> str:
    """A group of bars per key of results[name][field], a bar per model: as wide as value(entry) percent, with words(entry)."""
    html = ""
    for group in dict.fromkeys(group for name in names for group in results[name][field]):
        html += f"<div>{text(group)}</div><div class='group'>"
        for i, name in enumerate(names):
            if entry := results[name][field].get(group):
                bar = f"<i style='width:{0.6 * value(entry):.1f}%'></i>{text(words(entry))}"
                html += f"<div class='bar' {color(i)} title='{text(name)}'>{bar}</div>"
        html += "</div>"
    return f"<div class='bars'>{html}</div>"


def cases(dialogues: dict) -> str:
    """One folded box per profile (and seed), the models' dialogues side by side; the first is open."""
    together = {}  # (profile, its how manieth seed) -> [(number of the model, its name, transcript)]
    for i, (name, transcripts) in enumerate(dialogues.items()):
        seen = Counter()
        for t in transcripts:
            together.setdefault((t["id"], seen[t["id"]]), []).append((i, name, t))
            seen[t["id"]] += 1
    html = ""
    for models in list(together.values())[:MOST]:
        first = models[0][2]
        title = f"<b>{text(first['id'])}</b> {text(first['character'])}. {text(first['task'])}"
        ends = "".join(f"<span {color(i)}><b class='end'>{text(t['emo_point'])}</b></span>" for i, _, t in models)
        columns = "".join(f"<div {color(i)}><h3 class='name'>{text(n)}</h3>{dialogue(t)}</div>" for i, n, t in models)
        opening = "" if html else " open"
        columns = f"<div class='pair{' two' if len(models) > 1 else ''}'>{columns}</div>"
        html += f"<details class='case'{opening}><summary>{title}{ends}</summary>{columns}</details>\n"
    return html + (f"<p>{len(together) - MOST} more are not shown.</p>" if len(together) > MOST else "")


def dialogue(transcript: dict) -> str:
    html = f"<p>Dropped: {text(transcript['dropped'])}</p>" if transcript.get("dropped") else ""
    if transcript.get("behaviour"):
        html += f"<p>Adversarial user: {text(transcript['behaviour'])}</p>"
    for message in transcript["history"]:
        if message["role"] == "user":
            html += moved(message) + f'<div class="said from-user">{text(message["content"])}</div>'
        else:
            if message.get("thinking"):
                thinking = text(message["thinking"])
                html += f'<details class="why"><summary>thinking</summary><div class="said">{thinking}</div></details>'
            cut = " <small>[cut]</small>" if message.get("stopped") is False else ""
            html += f'<div class="said from-model">{text(message["content"])}{cut}</div>'
    return html


def moved(message: dict) -> str:
    """The emotion at a user's message, the change, and why: the fired rules with their points, or an LLM's reasons."""
    planning = message.get("planning", {})
    html = f'<span class="emotion">{text(message["emotion-point"])}</span> '
    if change := planning.get("change"):
        html += f'<span class="{"up" if change > 0 else "down"}">{change:+d}</span> '
    for rule, points, words in planning.get("fired", ()):
        html += f'<span class="rule" title="{text(words)} %">{text(rule)} {points:+.1f}</span>'
    reasons = {name: words for name, words in planning.items() if name not in ("change", "fired")}
    if reasons:
        listed = "".join(f"<dt><b>{text(name)}</b></dt><dd>{text(words)}</dd>" for name, words in reasons.items())
        html += f"<details><summary>why</summary><dl>{listed}</dl></details>"
    return f'<div class="why">{html}</div>'
