"""What a run needs of memory and time, counted before anything is loaded (`python train.py --plan`)."""

import torch
from transformers import AutoModelForCausalLM

from generator import MESSAGE_TOKENS
from policy import LOGITS_AT_ONCE, compute_dtype, load_config, train_upper_layers


def memory_plan(args, gpus: int) -> tuple[dict[str, float], int]:
    """(GB per GPU and component, dialogues that there is room for), counted from the model's config.json alone; gpus 0: this computer's
    CPU, in float32.

    Weights, gradients and Adam's two moments are float32 and sharded; the sampler is whole and in bf16. Rollout and update
    never overlap, so the peak is what stays plus the larger of the two. Without --slots, all of a rank's dialogues are held
    at once where --gpu-memory has room for them, else as many as it has room for.
    """
    config = load_config(args.model)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    train_upper_layers(model, args.train_layers)

    def count(module, trained=False):
        return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained)

    ranks, width = max(1, gpus), compute_dtype("cpu", args.dtype or ("bfloat16" if gpus else None)).itemsize
    rows = max(1, args.batch // ranks)
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    key_width = heads * (getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
    head = 40  # tokens before the dialogue
    columns = head + args.turns * (args.max_new_tokens + 45)  # of a dialogue's history
    slot = head + args.turns * (args.max_new_tokens + MESSAGE_TOKENS)  # tokens that the cache holds of each dialogue
    together = max(1, args.micro_tokens // columns)  # dialogues in a forward pass
    shared = 0 if args.checkpointing or ranks > 1 else head  # computed once for all of them
    tokens = shared + together * (columns - shared)
    sampled = together * args.turns * args.max_new_tokens
    # Numbers that a layer keeps of each token for its backward pass; with checkpointing one layer does, the others their input.
    per_token = 8 * config.hidden_size + 3 * key_width + 4 * config.intermediate_size
    layers = config.num_hidden_layers
    kept_layers = layers if args.train_layers is None else min(layers, args.train_layers)
    per_token = per_token + layers * config.hidden_size if args.checkpointing else kept_layers * per_token
    per_token += 2 * config.intermediate_size + 4 * config.hidden_size  # gradients of the layer that is at work
    activations = tokens * width * per_token + 2 * layers * key_width * width * together * shared
    if not gpus or args.eager:
        activations += 4 * together * columns**2  # a dense mask
    # Float32, four times: logits, log-probs, probabilities, gradient.
    logits = 16 * min(sampled, LOGITS_AT_ONCE) * config.vocab_size
    ends = count(model) - count(model.base_model.layers)  # embedding, head, last norm
    two_layers = 2 * count(model.base_model.layers) / layers
    # Several GPUs gather weights and, for all ranks' sum, gradients; one has autocast's bf16 copies of the weights.
    gathered = width * (two_layers + 2 * ends) + 4 * two_layers if ranks > 1 else 0
    if gpus == 1:
        gathered = width * count(model)
    plan = {
        "weights": 4 * count(model) / ranks,
        "gradients": 4 * count(model, True) / ranks,
        "optimizer": 8 * count(model, True) / ranks,
        "critic": (args.algo == "ppo") * (4 * count(model.base_model) + 12 * count(model.base_model, True)) / ranks,
        "reference": 4 * count(model) / ranks if args.kl > 0 else 0,
        "sampler": width * count(model) if ranks > 1 or args.checkpointing or gpus else 0,
        "simulator": width * count(model) if args.simulator == "self" else 0,
        "process": 1.5e9 if gpus == 0 else 1.0e9,  # on a CPU with what the allocator keeps of freed memory
        "rollout: KV cache": 2 * layers * key_width * width * rows * slot,
        "update: activations": activations,
        "update: logits": logits,
        "update: gathered weights": gathered,
    }
    plan = {name: size / 1e9 for name, size in plan.items()}
    room = 0.9 * args.gpu_memory - sum(size for name, size in plan.items() if ":" not in name)
    fitting = args.slots or max(1, int(rows * room / plan["rollout: KV cache"]))
    plan["rollout: KV cache"] *= min(rows, fitting) / rows
    phases = [sum(size for name, size in plan.items() if name.startswith(phase)) for phase in ("rollout", "update")]
    return plan | {"peak": sum(size for name, size in plan.items() if ":" not in name) + max(phases)}, fitting


def check_memory(plan: dict[str, float], memory_gb: float) -> None:
    """Raise ValueError with advice where the plan does not fit."""
    if plan["peak"] > memory_gb:
        most = sorted((name for name in plan if name != "peak"), key=plan.get, reverse=True)[:2]
        advice = {"KV": "--max-new-tokens or --batch", "activations": "--micro-tokens, or --checkpointing"}
        advice |= {"logits": "--micro-tokens", "gathered": "the model"}
        otherwise = "the model, or more GPUs"
        change = [next((a for key, a in advice.items() if key in name), otherwise) for name in most]
        raise ValueError(
            f"needs about {plan['peak']:.0f} GB of {memory_gb:.0f} GB per device, most of it for "
            f"{most[0]} ({plan[most[0]]:.0f} GB) and {most[1]} ({plan[most[1]]:.0f} GB): lower {change[0]}; or {change[1]}"
        )


def print_plan(args) -> None:
    gpus = args.gpus
    plan, fitting = memory_plan(args, gpus)
    slots = min(fitting, max(1, args.batch // max(1, gpus)))
    what, where = args.algo + (" + think" if args.think else ""), f"{gpus} GPUs" if gpus else "CPU"
    print(f"{args.model}, {what}, {where}, {slots} dialogues at once: GB per device")
    for name, size in plan.items():
        print(f"  {name:26}{size:8.1f}")
    if gpus:  # an H100's rate, at the share of it that such code reaches: 40 % of 990 Tflop/s, 60 % of 3.35 TB/s
        history = 40 + args.turns * (args.max_new_tokens + 45)
        parameters = plan["weights"] * gpus * 1e9 / 4
        passes = (8 if args.checkpointing else 6) * (2 if args.algo == "ppo" else 1) + 2 * (args.kl > 0)
        update = passes * parameters * args.batch * history / (gpus * 0.4 * 990e12)
        cache = plan["rollout: KV cache"] * 1e9 / 2
        decode = args.turns * args.max_new_tokens * (2 * parameters + cache) / (0.6 * 3.35e12)
        seconds = f"rollout {decode:.0f}, update {update:.0f}"
        print(f"  seconds per step, at most: {seconds} (every reply at --max-new-tokens)")
    check_memory(plan, args.gpu_memory)
    print(f"  fits into {args.gpu_memory:.0f} GB")
