"""Everything with weights: how a run builds it, saves it, and finds it again."""

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import PartialState
from torch.distributed import checkpoint as dcp
from torch.distributed.checkpoint import CheckpointException
from torch.distributed.checkpoint import state_dict as sd

from distributed import copy_weights, shard, world_size
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

warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process saves alone


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


# --- Checkpoints ------------------------------------------------------------------------------------------------------


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
    try:
        dcp.load(state, checkpoint_id=folder, no_dist=world_size() == 1)
    except CheckpointException as error:  # no Exception, but a BaseException
        reason, _ = next(iter(error.failures.values()))
        problem = f"does not fit; another --algo, --model or --train-layers? ({reason!r:.160})"
        raise ValueError(f"--resume: {folder} {problem}") from None
    for *pair, weights, moments in zip(models.modules, models.optimizers, state["modules"], state["optimizers"]):
        sd.set_state_dict(*pair, model_state_dict=weights, optim_state_dict=moments)
    models.follow()
    return state["step"]
