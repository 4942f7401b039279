"""Everything with weights: how a run builds it, saves it, and finds it again."""

from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed.checkpoint import state_dict as sd

from distributed import copy_weights, shard
from llm import LocalLLM
from policy import (
    Critic,
    Policy,
    checkpoint_activations,
    frozen_copy,
    load_model,
    save_model,
    train_upper_layers,
)


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

    def follow(self) -> None:
        """Give the sampler the policy's weights."""
        if self.sampler is not self.policy.model:
            copy_weights(self.policy, self.sampler)


def load_models(args, device: str, dtype: torch.dtype, ranks: int, start: str = "") -> Models:
    """`start`: the model after the cold start, where there was one."""
    # Weights that are trained are float32. What will be sharded waits in the CPU's memory.
    home = "cpu" if ranks > 1 else device
    model, tokenizer = load_model(start or args.model, home, torch.float32)
    local_llm = None
    if args.simulator == "self":
        local_llm = LocalLLM(frozen_copy(model, device, dtype), tokenizer, args.eager)
    copied = ranks > 1 or args.checkpointing or dtype != torch.float32
    sampler = frozen_copy(model, device, dtype) if copied else model
    if device == "cuda" and not args.eager:
        model.set_attn_implementation("flex_attention")  # in updates; the generator has its own
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
    return Models(tokenizer, policy, reference, critic, sampler, local_llm, modules, optimizers)


# --- Checkpoints ------------------------------------------------------------------------------------------------------

WHOLE = sd.StateDictOptions(full_state_dict=True, cpu_offload=True)  # unsharded, so that any number of ranks can go on


def save_checkpoint(out: Path, step: int, models) -> None:
    """out/checkpoint for `from_pretrained`, out/trainer.pt for --resume; each whole or not at all, trainer.pt last.

    Every rank must call this; rank 0 writes."""
    pairs = zip(models.modules, models.optimizers)
    states, optimizer_states = zip(*(sd.get_state_dict(*pair, options=WHOLE) for pair in pairs))
    if PartialState().is_main_process:
        save_model(models.policy.model, models.tokenizer, out / "checkpoint", plain_weights(states[0]))
        torch.save({"step": step, "modules": states, "optimizers": optimizer_states}, out / "trainer.tmp.pt")
        (out / "trainer.tmp.pt").replace(out / "trainer.pt")
    PartialState().wait_for_everyone()


def save_best(out: Path, models) -> None:
    """out/best: the model with the best validation score so far. Every rank must call this."""
    state = sd.get_model_state_dict(models.policy, options=WHOLE)
    if PartialState().is_main_process:
        save_model(models.policy.model, models.tokenizer, out / "best", plain_weights(state))
    PartialState().wait_for_everyone()


def plain_weights(state: dict) -> dict:
    """Weights of a Policy as those of a model that `from_pretrained` loads."""
    return {name.removeprefix("model."): value for name, value in state.items()}


def load_checkpoint(out: Path, models) -> int:
    """Put the state of out/trainer.pt into the models, sharded or not; return the next step."""
    state = torch.load(out / "trainer.pt", map_location="cpu", weights_only=True, mmap=True)
    saved = zip(models.modules, models.optimizers, state["modules"], state["optimizers"], strict=True)
    for *pair, weights, moments in saved:
        sd.set_state_dict(*pair, model_state_dict=weights, optim_state_dict=moments, options=WHOLE)
    models.follow()
    return state["step"]
