"""What a run needs of memory and disk, counted before anything is loaded (`python train.py --plan`)."""

import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from generator import bytes_per_token, check_architecture, columns_for
from policy import LOGITS_AT_ONCE, compute_dtype, load_config, train_upper_layers

HEAD_TOKENS = 40  # before a dialogue
PADDED = 1.5  # a dense pass over several rows beside its tokens, about: they are as wide as the widest
USER_TOKENS = 4096  # of one question to a user played in this process: rules, person, conversation


def count(module, trained=False) -> int:
    return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)


def dialogue_tokens(args) -> int:
    """Of one dialogue at most: its own replies and, where a group shares its history, those from which that goes on."""
    return HEAD_TOKENS + args.turns * (min(2, args.together) * args.max_new_tokens + 45)


def update_memory(args, model, gpus: int, dtype: torch.dtype) -> dict[str, float]:
    """Bytes per device that an update needs beside weights, gradients and moments, at the longest possible micro-batch."""
    config, ranks, layers = model.config, max(1, gpus), model.config.num_hidden_layers
    head, width, token = HEAD_TOKENS, dtype.itemsize, bytes_per_token(config, dtype)
    dense = not gpus or args.eager
    tokens = max(args.micro_tokens, dialogue_tokens(args))  # of a micro-batch
    reply_tokens = args.together * args.max_new_tokens  # in a turn, where a group shares its history
    columns = min(tokens, head + args.turns * (reply_tokens + 45))  # of a row
    sampled = tokens * reply_tokens // (reply_tokens + 45)
    rows = tokens / columns
    if dense and rows > 1:
        tokens *= PADDED
    shared = 0 if args.checkpointing or ranks > 1 else head  # computed once for all rows
    # Numbers that a layer keeps of each token for its backward pass; with checkpointing that one does which is at work, the
    # others keep their input.
    per_token = 12 * config.hidden_size + 4 * config.intermediate_size
    kept_layers = layers if args.train_layers is None else min(layers, args.train_layers)
    kept = layers * config.hidden_size if args.checkpointing else kept_layers * per_token
    gradients = 2 * config.intermediate_size + 4 * config.hidden_size
    at_work = tokens * width * (args.checkpointing * per_token + gradients)
    activations = tokens * width * kept + token * rows * shared
    if dense:
        activations += 4 * tokens * columns  # the mask
    # Float32, four times: logits, log-probs, probabilities, gradient.
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
    check_architecture(config)
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
        # On a CPU with the reader, and what the allocator keeps of freed memory, a cold start's for one, were it made in this run.
        "process": 1.0e9 if gpus else 3.0e9 + 1.5e9 * (args.cold_start != "none"),
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
    alone = 0.0
    if args.cold_start != "none" and ranks > 1:  # one process makes it: gradients, and copies for autocast
        trained = (4 + dtype.itemsize) * count(model, True)
        alone = plan["cold start: all weights"] = plan["process"] + (state(model) + copy + trained) / 1e9
    plan["peak"] = max(total("rollout"), total("update"), alone)
    waiting = sum(plan.get(f"rollout: {name}", 0) for name in ("sampler", "user"))
    saved = state(model) + ppo * state(model.base_model) + (1 + bool(args.eval_every)) * copy
    return plan | {"host, of all ranks": ranks * waiting, "disk": 2 * saved / 1e9}, fitting


def check_memory(plan: dict[str, float], args) -> None:
    """Raise ValueError with advice where the plan does not fit."""
    if plan["peak"] > args.gpu_memory:
        cold = plan["peak"] == plan.get("cold start: all weights")
        here = list(plan)[: list(plan).index("peak")]
        here = [name for name in here if name != "process" and name.startswith("cold") == cold]
        most = sorted(here, key=plan.get, reverse=True)[:2]
        # A micro-batch is a dialogue at least.
        alone = args.micro_tokens <= dialogue_tokens(args)
        shorter = "lower --max-new-tokens or --turns" if alone else "lower --micro-tokens"
        advice = {"KV": "lower --max-new-tokens or --batch", "at work": shorter, "cold": "choose --cold-start none"}
        advice |= {"activations": shorter if args.checkpointing else "choose --checkpointing"}
        if not args.gpus:
            advice |= {"critic": "choose --algo grpo"}
        otherwise = "take a smaller model or more GPUs"
        change = [next((a for key, a in advice.items() if key in name), otherwise) for name in most]
        raise ValueError(
            f"needs about {plan['peak']:.0f} GB of {args.gpu_memory:.0f} GB per device, most of it for "
            + " and ".join(f"{name} ({plan[name]:.0f} GB)" for name in most)
            + ": "
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
