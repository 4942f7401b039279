"""What a training run leaves behind: a line of metrics per step, transcripts, curves, and the comparison at its end."""

import json
import resource
from contextlib import suppress
from pathlib import Path

import torch
from matplotlib.figure import Figure
from tqdm import tqdm

from evaluate import compare, print_dialogue, summarize, verdict, write_json
from extras.probes import draw_acts, found_out
from extras.report import write_report
from rollout import Dialogue
from simulator import write_whole


def append_jsonl(path: Path, rows: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def keep_steps_before(path: Path, step: int) -> None:
    """Drop what a killed run wrote after its last checkpoint, a line that it only half wrote included."""
    if not path.exists():
        return
    kept = []
    with suppress(ValueError):
        for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
            if json.loads(line)["step"] < step:
                kept.append(line + "\n")
    write_whole(path, "".join(kept))


def rollout_metrics(dialogues: list[Dialogue], transcripts: list[dict], reward: str) -> dict:
    """Means over the dialogues that were not dropped; `transcripts` are theirs, one of those that share a history."""
    kept = [dialogue for dialogue in dialogues if not dialogue.dropped]
    turns = [turn for dialogue in kept for turn in dialogue.turns]
    changes = [turn.reaction.appraisal.change for turn in turns if turn.reaction]
    emotions = [dialogue.final_emotion for dialogue in kept]
    return {
        "reward": sum(sum(dialogue.rewards(reward)) for dialogue in kept) / len(kept),
        "emotion": sum(emotions) / len(kept),
        "success": sum(emotion >= 100 for emotion in emotions) / len(kept),
        "failure": sum(emotion < 10 for emotion in emotions) / len(kept),
        "change_per_turn": sum(changes) / max(1, len(changes)),
        "serves": found_out([transcript for transcript in transcripts if not transcript["dropped"]])["serves"],
        "reply_tokens": sum(len(turn.sampled_ids) for turn in turns) / len(turns),
        "stopped": sum(turn.stopped for turn in turns) / len(turns),
        "truncated": sum(not turn.stopped for turn in turns),
        "format_errors": sum(not turn.format_ok for turn in turns),
        "dropped": len(dialogues) - len(kept),
    }


def peak_memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return host_peak_gb()


def host_peak_gb() -> float:
    """Of this process, so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def print_step(step: int, metrics: dict) -> None:
    tqdm.write(
        f"step {step:3d}  emotion {metrics['emotion']:5.1f}  change/turn {metrics['change_per_turn']:+5.2f}  "
        f"serves {metrics['serves']:3.0f}%  reply {metrics['reply_tokens']:4.1f} tokens  stopped {metrics['stopped']:4.0%}  "
        f"entropy {metrics['entropy']:.2f}"
    )


def draw_curves(out: Path) -> None:
    """Redraw out/curves.png from out/metrics.jsonl."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    panels = ("emotion", "change_per_turn", "serves", "reply_tokens", "stopped", "entropy")
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3).flat, panels):
        axis.plot([row["step"] for row in rows], [row.get(name) for row in rows], marker=".")
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(out / "curves.tmp.png", dpi=100)
    (out / "curves.tmp.png").replace(out / "curves.png")


def print_score(title: str, result: dict) -> None:
    print(
        f"{title}: {result['score']:.1f} +- {result['standard_error']:.1f}   success {result['success']}%   "
        f"failure {result['failure']}%   ({result['dialogues']} users, SAGE protocol)"
    )


TITLES = {"base": "base", "before": "before RL", "after": "after RL"}


def report(out: Path, after: list[dict], ordinary: dict) -> None:
    """Print and store what training has changed for the held-out users, and on ordinary text (probes.guard)."""
    earlier = [name for name in ("base", "before") if (out / f"{name}.json").exists()]
    dialogues = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in earlier}
    dialogues["after"] = after
    results = {name: summarize(transcripts) for name, transcripts in dialogues.items()}
    results["after"]["guard"] = ordinary
    for transcript in after[:3]:
        print_dialogue(transcript)
    print()
    for name, result in results.items():
        print_score(f"held-out score, {TITLES[name]:9}", result)
    notes, differences = [], {}
    for name in earlier:
        paired = compare(after, dialogues[name])
        print(f"after - {name}, paired by profile: {paired['difference']:+.1f} +- {paired['standard_error']:.1f}")
        notes.append(verdict("the trained model", TITLES[name], paired))
        differences[f"after - {name}"] = paired
    print("ordinary text:", ", ".join(f"{name} {value}" for name, value in ordinary.items()))
    write_json(out / "result.json", results | differences)
    draw_acts(out / "acts.png", {TITLES[name]: transcripts for name, transcripts in dialogues.items()})
    write_report(out / "report.html", dialogues, results, notes)
