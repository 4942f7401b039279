"""PPO on multi-turn dialogue: a critic says what to expect; a token is compared with that expectation.

Sections, the same as in grpo.py, to be read side by side
    1. Advantages    GAE: delta_t = r_t + gamma V_(t+1) - V_t, A_t = sum_k (gamma lambda)^k delta_(t+k)  (arXiv 1506.02438, eq. 16)
    2. Losses        clipped surrogate (PPO, arXiv 1707.06347, eq. 7), clipped value loss; KL to the reference in the reward
    3. update()      one batch of dialogues -> one or more optimizer steps -> metrics

Deliberate deviations from the paper
    - GAE runs over the sampled tokens of a dialogue, in order, as if nothing lay between them: the user's words are the
      environment and take no step. `gamma` applies once, from a turn's last token to the next turn's first; the paper's is 1.
    - Advantages get mean 0 and deviation 1 over the whole batch (`whiten`).
    - A dialogue at the turn limit is treated as ended: its emotion is final and nothing is bootstrapped.
    - Sampler and trainer round differently: the surrogate is weighted by trainer / sampler (--importance-cap 0: the paper's).
    - With `delta` and gamma 0, a group's dialogues share their history: no return reaches that far, and it costs less.
"""

import torch

from distributed import clip_gradients, global_sum, micro_batches, world_size
from policy import token_diagnostics

# --- 1. Advantages ----------------------------------------------------------------------------------------------------


def gae(rewards_N, values_N, batch, *, gamma: float = 1.0, lam: float = 1.0):
    """(advantages (N,), returns (N,)), float32, for the sampled tokens of all dialogues in order.

    delta_t = r_t + gamma_t V_(t+1) - V_t and A_t = delta_t + gamma_t lambda A_(t+1); gamma_t is `gamma` where the next
    sampled token belongs to the dialogue's next turn, 1 within a turn, 0 at the dialogue's last token.
    """
    dialogues, turns = batch.dialogue_N.tolist(), batch.turn_N.tolist()
    rewards, values = rewards_N.tolist(), values_N.tolist()
    advantages = [0.0] * len(rewards)
    for n in reversed(range(len(rewards))):
        advantages[n] = rewards[n] - values[n]
        if n + 1 < len(rewards) and dialogues[n + 1] == dialogues[n]:
            discount = 1.0 if turns[n + 1] == turns[n] else gamma
            advantages[n] += discount * (values[n + 1] + lam * advantages[n + 1])
    advantages_N = torch.tensor(advantages)
    return advantages_N, advantages_N + values_N.cpu()


def whiten(values_N, device="cpu"):
    """Mean 0 and standard deviation 1 over the sampled tokens of all ranks; equal values become 0, not magnified noise."""
    mean, variance = moments(values_N, device)
    return (values_N - mean) / (variance**0.5 + 1e-5)


def moments(values_N, device="cpu") -> tuple[float, float]:
    """(mean, variance) over the sampled tokens of all ranks."""
    total, count = global_sum([values_N.sum().item(), len(values_N)], device)
    (squares,) = global_sum([(values_N - total / count).square().sum().item()], device)
    return total / count, squares / count


# --- 2. Losses, one value per token -----------------------------------------------------------------------------------


def policy_loss(log_probs_n, old_log_probs_n, advantages_n, clip: float):
    """-min(ratio A, clip(ratio, 1 - c, 1 + c) A), and the ratio = pi / pi_old."""
    ratio_n = (log_probs_n - old_log_probs_n).exp()
    clipped_n = ratio_n.clamp(1 - clip, 1 + clip)
    return -torch.min(ratio_n * advantages_n, clipped_n * advantages_n), ratio_n


def importance(old_log_probs_n, sampler_log_probs_n, cap: float):
    """Weight trainer / sampler, at most `cap` (truncated importance sampling, Ionides 2008): they round differently.
    cap 0: no weights."""
    return (old_log_probs_n - sampler_log_probs_n).exp().clamp(max=cap) if cap else 1.0


def value_loss(values_n, old_values_n, returns_n, clip: float):
    """max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2) / 2"""
    clipped_n = old_values_n + (values_n - old_values_n).clamp(-clip, clip)
    return 0.5 * torch.max((values_n - returns_n).square(), (clipped_n - returns_n).square())


def kl_penalty(log_probs_n, ref_log_probs_n):
    """k1 = pi - ref on sampled tokens: its mean is KL(pi || ref). It belongs in the reward; in the loss its gradient is 0."""
    return log_probs_n - ref_log_probs_n


# --- 3. Update --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def _before(reference, critic, batch, args):
    """(reference log-probs, values), each (N,), before any step. Without a reference the KL is 0."""
    device = critic.value_head.weight.device
    ref_log_probs_N, values_N = batch.sampler_log_probs_N.to(device).clone(), torch.zeros(len(batch), device=device)
    for members, _ in micro_batches(batch, args.micro_tokens, args.group):
        if reference is not None:
            log_probs_n, _, index_n = reference(batch, members)
            ref_log_probs_N[index_n] = log_probs_n
        values_n, index_n = critic(batch, members)
        values_N[index_n] = values_n
    return ref_log_probs_N, values_N


def update(policy, reference, critic, optimizer, critic_optimizer, batch, args) -> dict:
    """`args.epochs` passes over one batch, one optimizer step each. Returns the last pass's metrics, averaged over the sampled
    tokens.

    The loss is a mean over the sampled tokens of all ranks: each rank divides its own sum by their number, and since
    sharding averages gradients over ranks, multiplies by the number of ranks.

    The old log-probs are those of the first pass, before any step: the trainer's own forward, so its ratio is exactly 1.
    The KL in the reward is that of the policy which sampled, and so uses the sampler's log-probs.
    """
    device = next(policy.parameters()).device
    (N,) = global_sum([len(batch)], device)
    scale = world_size() / N
    sampler_log_probs_N = batch.sampler_log_probs_N.to(device)
    old_log_probs_N = torch.zeros(len(batch), device=device)
    ref_log_probs_N, old_values_N = _before(reference, critic, batch, args)
    kl_N = kl_penalty(sampler_log_probs_N, ref_log_probs_N)
    rewards_N = batch.reward_N.to(device) - args.kl * kl_N
    advantages_N, returns_N = gae(rewards_N, old_values_N, batch, gamma=args.gamma, lam=args.lam)
    (_, left), (_, variance) = moments(returns_N - old_values_N.cpu(), device), moments(returns_N, device)
    explained = 1 - left / (variance + 1e-8)
    advantages_N, returns_N = whiten(advantages_N, device).to(device), returns_N.to(device)
    for epoch in range(args.epochs):
        sums = dict.fromkeys(("policy_loss", "value_loss", "entropy", "approx_kl", "clip_fraction", "sampler_gap"), 0.0)
        for members, weight in micro_batches(batch, args.micro_tokens, args.group):
            log_probs_n, entropy_n, index_n = policy(batch, members)
            if not args.entropy:
                entropy_n = entropy_n.detach()  # nothing would free its graph, n x V
            if epoch == 0:
                old_log_probs_N[index_n] = log_probs_n.detach()
            old_log_probs_n = old_log_probs_N[index_n]
            loss_n, ratio_n = policy_loss(log_probs_n, old_log_probs_n, advantages_N[index_n], args.clip)
            loss_n = loss_n * importance(old_log_probs_n, sampler_log_probs_N[index_n], args.importance_cap)
            sums["policy_loss"] += weight * loss_n.sum().item()
            (weight * scale * (loss_n - args.entropy * entropy_n).sum()).backward()

            values_n, index_n = critic(batch, members)
            critic_loss_n = value_loss(values_n, old_values_N[index_n], returns_N[index_n], args.value_clip)
            sums["value_loss"] += weight * critic_loss_n.sum().item()
            (weight * scale * critic_loss_n.sum()).backward()

            more = token_diagnostics(batch, index_n, ratio_n, entropy_n, old_log_probs_n, args.clip)
            sums |= {name: sums[name] + weight * value for name, value in more.items()}
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        clip_gradients(critic, args.max_grad_norm)
        for step_of in (optimizer, critic_optimizer):
            step_of.step()
            step_of.zero_grad(set_to_none=True)
    totals = global_sum([*sums.values(), kl_N.sum().item()], device)
    metrics = {name: total / N for name, total in zip([*sums, "kl"], totals)}
    return metrics | {"explained_variance": explained, "grad_norm": grad_norm}
