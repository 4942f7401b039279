"""Several processes: FSDP2 shards parameters, gradients and optimizer state; every rank trains on a share of the dialogues."""

import torch
import torch.distributed as dist
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def global_sum(values: list[float], device="cpu") -> list[float]:
    """Each value summed over all ranks."""
    if world_size() == 1:
        return values
    total = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(total)
    return total.tolist()


def shard(module, dtype: torch.dtype):
    """Shard a Policy or Critic over all ranks, layer by layer: float32 shards, gathered in `dtype` for a layer's compute."""
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for layer in module.base_model.layers:
        fully_shard(layer, mp_policy=precision)
    if hasattr(module, "value_head"):
        fully_shard(module.value_head)  # values in bf16 would be too coarse
    # Its inputs are batches, not tensors to be cast; critic and reference must not stay gathered while the policy works.
    precision = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    fully_shard(module, mp_policy=precision, reshard_after_forward=True)
    return module.float()


def copy_weights(policy, model) -> None:
    """Bring a rollout copy (whole, in the compute dtype, at stable addresses) up to date with the trained weights."""
    with torch.no_grad():
        for source, target in zip(policy.model.parameters(), model.parameters()):
            if source.requires_grad:
                target.copy_(source.full_tensor() if isinstance(source, DTensor) else source)


def clip_gradients(module, most: float) -> float:
    """Clip the global norm of all gradients, over all ranks; return the norm before."""
    norm = torch.nn.utils.clip_grad_norm_([p for p in module.parameters() if p.requires_grad], most)
    return (norm.full_tensor() if isinstance(norm, DTensor) else norm).item()


def micro_batches(batch, max_tokens: int, group_size: int = 1) -> list[tuple[list[int], float]]:
    """(dialogues, weight) in micro-batches of at most `max_tokens` tokens, what a group begins with counted once; the longest first,
    so that memory soon runs out or never does. A group, which shares much, is kept together as far as it fits. Sharded ranks must
    make the same number of passes: one that has fewer adds some of weight 0."""
    pieces, micros, room = [], [], 0
    for dialogue in sorted(batch.sizes):
        same_group = pieces and pieces[-1][0] // group_size == dialogue // group_size
        if same_group and batch.size([*pieces[-1], dialogue]) <= max_tokens:
            pieces[-1].append(dialogue)
        else:
            pieces.append([dialogue])
    for piece in sorted(pieces, key=batch.size, reverse=True):
        if batch.size(piece) > room:
            micros.append([])
            room = max_tokens
        micros[-1] += piece
        room -= batch.size(piece)
    weighted = [(micro, 1.0) for micro in micros]
    if world_size() > 1:
        count = torch.tensor(len(micros), device="cuda" if dist.get_backend() == "nccl" else "cpu")
        dist.all_reduce(count, dist.ReduceOp.MAX)
        weighted += [(micros[-1][-1:], 0.0)] * (int(count) - len(micros))
    return weighted


def deal(sizes: list[int], ranks: int) -> list[list[int]]:
    """Which pieces of work each rank takes, so that all are busy for about as long: the largest first, each to the rank that
    has least. deal([5, 3, 2, 4], 2) -> [[0, 2], [3, 1]]"""
    dealt, load = [[] for _ in range(ranks)], [0] * ranks
    for piece in sorted(range(len(sizes)), key=lambda piece: -sizes[piece]):
        rank = load.index(min(load))
        dealt[rank].append(piece)
        load[rank] += sizes[piece]
    return dealt
