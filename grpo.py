"""GRPO on multi-turn dialogue: no critic; a dialogue is compared with the other dialogues of its profile.

Sections, the same as in ppo.py, to be read side by side
    1. Advantages    A_i = (R_i - mean(R_group)) / std(R_group)                       (DeepSeekMath, arXiv 2402.03300, 4.1.2)
    2. Losses        clipped surrogate (PPO, arXiv 1707.06347, eq. 7), KL to the reference in the loss (its eq. 4)
    3. update()      one batch of dialogues -> one or more optimizer steps -> metrics

Deliberate deviations from the paper (settings.py has those of the laptop preset: no division by std)
    - The baseline is a mean over dialogues, taken before they are expanded into turns and tokens: a long dialogue weighs no
      more in its group than a short one.
    - With `delta` or `mixed` rewards the return is the discounted sum from a turn on, compared with the group's returns
      at the same turn. With `delta` and gamma 0 the group's replies of a turn answer the same message, so that nothing but
      the reply is compared (GiGPO, arXiv 2505.10978, compares where states happen to be the same).
    - The k3 estimate of the KL is multiplied by the importance ratio; without it the gradient is not that of the KL.
    - Sampler and trainer round differently: the surrogate is weighted by trainer / sampler (--importance-cap 0: the paper's).
    - The loss is divided by the number of sampled tokens of the whole batch, not per dialogue, so that a short reply's
      tokens weigh no more than a long one's.
"""

import torch

from distributed import clip_gradients, global_sum, micro_batches, world_size
from policy import token_diagnostics

# --- 1. Advantages ----------------------------------------------------------------------------------------------------


def group_advantages(batch, group_size: int, *, per_turn: bool, gamma: float = 1.0, std: bool = True):
    """(advantages (N,), number of groups without variance). Dialogues [k * group_size, (k + 1) * group_size) are group k.
    A dialogue without tokens was dropped: it is in no baseline, and a group without any is not counted.

    per_turn False: one return per dialogue, its sum of rewards; every token of the dialogue has the same advantage.
    per_turn True: one return per turn, sum_k gamma^k r_(t+k); the baseline is over the group's dialogues that reached turn t.
    """
    returns = turn_returns(batch, gamma if per_turn else 1.0)  # {(dialogue, turn): return}
    advantages, flat_groups = {}, 0
    for first in range(0, int(batch.dialogue_N.max()) + 1, group_size):
        members = [d for d in range(first, first + group_size) if (d, 0) in returns]
        variance = False
        last_turn = max((turn for dialogue, turn in returns if dialogue in members), default=-1)
        for turn in range(last_turn + 1):
            at = turn if per_turn else 0  # the return from the first turn on is the dialogue's
            reached = [d for d in members if (d, turn) in returns]
            baseline = [returns[d, at] for d in (reached if per_turn else members)]
            mean = sum(baseline) / len(baseline)
            spread = (sum((value - mean) ** 2 for value in baseline) / max(1, len(baseline) - 1)) ** 0.5
            variance |= spread > 1e-6
            for d in reached:
                centred = returns[d, at] - mean
                advantages[d, turn] = (centred / spread if std else centred) if spread > 1e-6 else 0.0
        flat_groups += bool(members) and not variance
    pairs = zip(batch.dialogue_N.tolist(), batch.turn_N.tolist())
    return torch.tensor([advantages[pair] for pair in pairs]), flat_groups


def turn_returns(batch, gamma: float) -> dict[tuple[int, int], float]:
    """Discounted sum of the rewards from each turn on: R_t = r_t + gamma R_(t+1)."""
    rewards = {}
    for d, t, reward in zip(batch.dialogue_N.tolist(), batch.turn_N.tolist(), batch.reward_N.tolist()):
        rewards[d, t] = rewards.get((d, t), 0.0) + reward
    returns = {}
    for d, t in sorted(rewards, reverse=True):
        returns[d, t] = rewards[d, t] + gamma * returns.get((d, t + 1), 0.0)
    return returns


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


def kl_loss(log_probs_n, ref_log_probs_n, ratio_n):
    """ratio * k3 with k3 = exp(x) - 1 - x >= 0 and x = ref - pi: its mean is KL(pi || ref), its gradient -ratio * x the KL's.

    Nothing is bounded: exp(x), huge for a token that the policy has all but given up, cancels in the gradient (in float32 up to x
    of about 15), though not in the value, which one such token can dominate."""
    log_ratio_n = ref_log_probs_n - log_probs_n
    return ratio_n * (log_ratio_n.exp() - 1 - log_ratio_n)


# --- 3. Update --------------------------------------------------------------------------------------------------------


def update(policy, reference, optimizer, batch, advantages_N, args) -> dict:
    """`args.epochs` passes over one batch, one optimizer step each. Returns the last pass's metrics, averaged over the sampled
    tokens.

    The loss is a mean over the sampled tokens of all ranks: each rank divides its own sum by their number, and since
    sharding averages gradients over ranks, multiplies by the number of ranks.

    The old log-probs are those of the first pass, before any step: the trainer's own forward, so its ratio is exactly 1.
    """
    device = next(policy.parameters()).device
    sampler_log_probs_N = batch.sampler_log_probs_N.to(device)
    old_log_probs_N = torch.zeros(len(batch), device=device)
    advantages_N = advantages_N.to(device)
    (N,) = global_sum([len(batch)], device)
    scale = world_size() / N
    for epoch in range(args.epochs):
        sums = dict.fromkeys(("policy_loss", "kl", "entropy", "approx_kl", "clip_fraction", "sampler_gap"), 0.0)
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
            if reference is not None:
                with torch.no_grad():
                    ref_log_probs_n, _, _ = reference(batch, members)
                kl_n = kl_loss(log_probs_n, ref_log_probs_n, ratio_n)
                loss_n = loss_n + args.kl * kl_n
                sums["kl"] += weight * kl_n.sum().item()
            (weight * scale * (loss_n - args.entropy * entropy_n).sum()).backward()

            more = token_diagnostics(batch, index_n, ratio_n, entropy_n, old_log_probs_n, args.clip)
            sums |= {name: sums[name] + weight * value for name, value in more.items()}
        grad_norm = clip_gradients(policy, args.max_grad_norm)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    totals = global_sum(list(sums.values()), device)
    return {name: total / N for name, total in zip(sums, totals)} | {"grad_norm": grad_norm}
