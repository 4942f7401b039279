"""PPO and GRPO against slow, obvious oracles."""

import copy
from types import SimpleNamespace

import pytest
import torch
from conftest import tiny_model

import grpo
import ppo
import train
from distributed import deal, micro_batches
from models import load_models
from policy import (
    Critic,
    Policy,
    checkpoint_activations,
    frozen_copy,
    sampled_hidden,
    token_log_probs,
    train_upper_layers,
)
from prefix_tree import common_prefix, pack
from rollout import Batch

ARGS = SimpleNamespace(
    epochs=1, micro_tokens=64, temperature=0.8, clip=0.2, value_clip=0.5, kl=0.1, entropy=0.01, max_grad_norm=1e9, gamma=1.0, lam=0.95,
    importance_cap=2.0,
    group=1,
)  # fmt: skip


def make(turns_of, rewards_of, prefix=5, seed=0):
    """A batch: turns_of[d] lists the sampled tokens per turn of dialogue d, rewards_of[d] the reward per turn."""
    rng = torch.Generator().manual_seed(seed)
    ids = lambda n: torch.randint(3, 250, (n,), generator=rng).tolist()
    opening = ids(prefix)
    sequences, rows = [], []
    for d, (turns, rewards) in enumerate(zip(turns_of, rewards_of)):
        sequence = opening + ids(2 + d % 3)
        for t, (count, reward) in enumerate(zip(turns, rewards)):
            for k in range(count):
                sequence += ids(1)
                rows.append((d, len(sequence) - 1, d, sequence[-1], t, 0.0, reward if k == count - 1 else 0.0))
            sequence = sequence + ids(3)
        sequences.append(sequence)
    return Batch(sequences, *(torch.tensor(column) for column in zip(*rows)))


def ragged():
    return make([[3, 2], [1], [4, 1, 2], [2, 2]], [[0.1, 0.3], [0.5], [0.0, -0.2, 0.4], [0.2, 0.2]])


def slow_log_probs(model, batch, temperature):
    """One sequence at a time, all logits."""
    values = []
    for row, column in zip(batch.row_N.tolist(), batch.column_N.tolist()):
        ids = torch.tensor([batch.sequences[row]])
        logits = model(input_ids=ids).logits[0, column - 1] / temperature
        values.append(torch.log_softmax(logits, -1)[ids[0, column]])
    return torch.stack(values)


def fast_log_probs(model, batch, micro_tokens, group=1, temperature=0.8):
    result = torch.zeros(len(batch))
    for members, _ in micro_batches(batch, micro_tokens, group):
        hidden, index = sampled_hidden(model, batch, members, torch.float32)
        result = result.index_put((index,), token_log_probs(model, hidden, batch.id_N[index], temperature)[0])
    return result


def assert_equal_to_single_sequences(model, batch, micro_tokens, atol, group=1):
    """Log-probs to 1e-5, and gradients of a weighted sum to `atol`: they flow through shared prefixes too."""
    weights = torch.randn(len(batch), generator=torch.Generator().manual_seed(1))
    slow, fast = slow_log_probs(model, batch, 0.8), fast_log_probs(model, batch, micro_tokens, group)
    assert torch.allclose(fast, slow, atol=1e-5)
    parameters = list(model.parameters())
    for a, b in zip(
        torch.autograd.grad((slow * weights).sum(), parameters), torch.autograd.grad((fast * weights).sum(), parameters)
    ):
        assert torch.allclose(a, b, atol=atol)


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("micro_tokens", [1, 30, 1000])
def test_packed_and_shared_prefix_log_probs_equal_single_sequences(kind, micro_tokens):
    model, batch = tiny_model(kind), ragged()
    assert_equal_to_single_sequences(model, batch, micro_tokens, atol=1e-4)


def thinking(turns=4, dialogues=3):
    """Turns that share a history and leave it again, as with --think: trunk, branch, trunk, branch, ..."""
    rng = torch.Generator().manual_seed(3)
    ids = lambda n: torch.randint(3, 250, (n,), generator=rng).tolist()
    sequences, rows, opening = [], [], ids(5)
    for d in range(dialogues):
        history = opening + ids(2 + d)
        for t in range(turns):
            sequence = history + ids(1)
            for k in range(2 + (d + t) % 3):
                sequence = sequence + ids(1)
                rows.append((len(sequences), len(sequence) - 1, d, sequence[-1], t, 0.0, 0.1 * k))
            sequences.append(sequence)
            history = history + ids(4)
    return Batch(sequences, *(torch.tensor(column) for column in zip(*rows)))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("micro_tokens", [1, 90, 1000])
def test_merged_think_turns_have_the_log_probs_and_gradients_of_single_sequences(kind, micro_tokens):
    model, batch = tiny_model(kind), thinking()
    assert_equal_to_single_sequences(model, batch, micro_tokens, atol=1e-5)
    assert len(batch.sizes) == 3 and sum(batch.sizes.values()) < 0.6 * sum(map(len, batch.sequences))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_one_row_for_all_with_flex_attention(kind, checkpointing, monkeypatch):
    """The GPU's way: a GRPO group is one tree, each prefix is computed once, opening included."""
    # FlexAttention has no compiled backward pass on a CPU; uncompiled its arithmetic runs everywhere.
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    model = tiny_model(kind)
    model.set_attn_implementation("flex_attention")
    if checkpointing:
        checkpoint_activations(model)
    rows = []
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: rows.append(kwargs["input_ids"]), with_kwargs=True
    )
    for batch in (ragged(), thinking()):
        with torch.compiler.set_stance("force_eager"):
            fast = fast_log_probs(model, batch, 1000)
            fast_gradients = torch.autograd.grad((fast * torch.arange(len(batch))).sum(), list(model.parameters()))
        together = batch.merge(tuple(sorted(batch.sizes, key=lambda d: -batch.sizes[d])))[0]
        assert len(together) == sum(batch.sizes.values()) - 5 * (len(batch.sizes) - 1), "the opening once"
        assert [list(row.shape) for row in rows] == [[1, 128]] and len(together) <= 128
        rows.clear()
        plain = tiny_model(kind)
        slow = slow_log_probs(plain, batch, 0.8)
        assert torch.allclose(fast, slow, atol=1e-5)
        slow_gradients = torch.autograd.grad((slow * torch.arange(len(batch))).sum(), list(plain.parameters()))
        for a, b in zip(fast_gradients, slow_gradients):
            assert torch.allclose(a, b, atol=1e-4 * max(1, b.abs().max().item()))


def test_activation_checkpointing_changes_no_gradient_and_leaves_dropout_off():
    batch, gradients = thinking(), []
    for checkpointing in (False, True):
        model = tiny_model()
        for layer in model.base_model.layers:
            layer.self_attn.attention_dropout = 0.9  # off outside training mode
        if checkpointing:
            checkpoint_activations(model)
        fast_log_probs(model, batch, 90).sum().backward()
        gradients.append([p.grad for p in model.parameters()])
    for a, b in zip(*gradients):
        assert torch.allclose(a, b, atol=1e-5)


def test_packed_trees_do_not_see_each_other():
    """Short trees share a row with others; nothing is computed for padding but the end of a row."""
    assert pack([5, 3, 2, 2]) == [[0], [1, 2], [3]]
    assert pack([3, 2, 2]) == [[0], [1], [2]], "no row is wider than the largest"
    model, batch = tiny_model(), make([[9, 8], [1], [2], [3], [2]], [[0.1] * 2] + [[0.1]] * 4)
    assert len(pack(list(batch.sizes.values()))) < len(batch.sizes) - 1
    assert_equal_to_single_sequences(model, batch, 1000, atol=1e-4)


def sharing(groups=2, together=3, turns=4):
    """Groups whose dialogues reply to one history, which goes on from the first one's replies."""
    rng = torch.Generator().manual_seed(5)
    ids = lambda n: torch.randint(3, 250, (n,), generator=rng).tolist()
    opening, said = ids(5), {}
    for first in range(0, groups * together, together):
        history = opening + ids(2 + first)
        for t in range(turns):
            for d in range(first, first + together):
                said[d, t] = history, ids(2 + (d + t) % 3)
            history = history + said[first, t][1] + ids(4)
    sequences, rows = [], []
    for (d, t), (history, reply) in sorted(said.items()):
        rows += [(len(sequences), len(history) + k, d, token, t, 0.0, 0.1 * k) for k, token in enumerate(reply)]
        sequences.append(history + reply)
    return Batch(sequences, *(torch.tensor(column) for column in zip(*rows)))


@pytest.mark.parametrize("micro_tokens, count", [(1, 6), (50, 4), (55, 3), (80, 2), (1000, 1)])
def test_a_group_that_shares_its_history_is_one_tree(micro_tokens, count):
    """Two groups are two rows behind what all begin with; one group is one row, in a single pass; one too large for a micro-batch is cut."""
    model, batch, passes = tiny_model(), sharing(), []
    micros = [members for members, _ in micro_batches(batch, micro_tokens, 3)]
    assert len(micros) == count and all(batch.size(some) <= micro_tokens or len(some) == 1 for some in micros)
    assert_equal_to_single_sequences(model, batch, micro_tokens, atol=1e-5, group=3)
    assert sorted(batch.lay_out([0, 1, 2, 3, 4, 5])) == [[0, 1, 2], [3, 4, 5]]
    model.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(list(kwargs["input_ids"].shape)), with_kwargs=True
    )
    sampled_hidden(model, batch, [0, 1, 2, 3, 4, 5], torch.float32)
    opening, width = 5, max(batch.size(group) for group in ((0, 1, 2), (3, 4, 5)))
    assert passes == [[1, opening], [2, width - opening]]
    passes.clear()
    sampled_hidden(model, batch, [0, 1, 2], torch.float32)
    assert passes == [[1, len(batch.merge((0, 1, 2))[0])]] and passes[0][1] < 0.5 * sum(
        batch.sizes[d] for d in range(3)
    )


def test_work_is_dealt_evenly_and_a_part_is_the_batch_of_some_dialogues():
    assert deal([5, 3, 2, 4], 2) == [[0, 2], [3, 1]] and deal([0, 0, 7], 2) == [[2], [0, 1]]
    batch = ragged()
    part, index_n = batch.part([1, 3])
    assert part.dialogue_N.tolist() == [1] + [3] * 4 and part.id_N.tolist() == batch.id_N[index_n].tolist()
    assert list(part.sizes) == [1, 3] and part.sizes[3] == batch.sizes[3]
    model = tiny_model()
    assert torch.allclose(fast_log_probs(model, part, 1000), fast_log_probs(model, batch, 1000)[index_n], atol=1e-5)


def test_micro_batches_cover_everything_and_start_with_the_longest():
    batch = ragged()
    micros = [members for members, _ in micro_batches(batch, 40)]
    assert sorted(row for micro in micros for row in micro) == [0, 1, 2, 3]
    longest = max(range(4), key=batch.sizes.get)
    assert longest in micros[0]
    groups = make([[1], [6], [2], [9], [1], [1]], [[0.5]] * 6)
    tokens = {group: groups.size(group) for group in ((0, 1), (2, 3), (4, 5))}
    assert [members for members, _ in micro_batches(groups, 10_000, 2)] == [[2, 3, 0, 1, 4, 5]], "the longest first"
    most = tokens[2, 3] + tokens[0, 1]
    assert [members for members, _ in micro_batches(groups, most, 2)] == [[2, 3, 0, 1], [4, 5]], "groups stay whole"
    torn = [members for members, _ in micro_batches(groups, tokens[2, 3] - 1, 2)]
    assert torn == [[0, 1], [4, 5], [3], [2]], "but for those that do not fit"
    many = make([[3]] * 12, [[0.5]] * 12)
    for limit in (40, 48):
        at_once = limit // max(many.sizes.values())
        assert at_once > 1 and [len(members) for members, _ in micro_batches(many, limit)][:3] == [at_once] * 3
    assert len(micro_batches(batch, 10_000)) == 1 and len(micro_batches(batch, 10, 2)) == 4
    assert common_prefix([[1, 2, 3], [1, 2], [1, 2, 4]]) == 2


@pytest.mark.parametrize("module", [ppo, grpo])
def test_clip(module):
    """At A = -1 the gradient in the ratio is 0 at 0.5 and 1 at 1.5 (loss = -A ratio); at A = +1 the other way round."""

    def slope(ratio, advantage):
        log_ratio = torch.tensor([ratio]).log().requires_grad_()
        module.policy_loss(log_ratio, torch.zeros(1), torch.tensor([advantage]), 0.2)[0].sum().backward()
        return log_ratio.grad.item() / ratio

    assert slope(0.5, -1.0) == 0 and slope(1.5, -1.0) == pytest.approx(1.0)
    assert slope(1.5, 1.0) == 0 and slope(0.5, 1.0) == pytest.approx(-1.0)


def test_kl_estimators_have_the_exact_value_and_gradient():
    """Averaged over a small softmax, k1 and ratio * k3 equal KL(pi || ref); the gradient of ratio * k3 is the KL's."""
    logits = torch.tensor([0.3, -1.0, 0.8, 0.1], requires_grad=True)
    ref = torch.log_softmax(torch.tensor([0.0, 0.5, -0.5, 0.2]), -1)
    log_pi = torch.log_softmax(logits, -1)
    exact = (log_pi.exp() * (log_pi - ref)).sum()
    (exact_gradient,) = torch.autograd.grad(exact, logits, retain_graph=True)
    weights = log_pi.exp().detach()  # expectation over samples from pi
    assert (weights * ppo.kl_penalty(log_pi, ref)).sum().item() == pytest.approx(exact.item())
    ratio = (log_pi - log_pi.detach()).exp()
    estimate = (weights * grpo.kl_loss(log_pi, ref, ratio)).sum()
    assert estimate.item() == pytest.approx(exact.item()) and (grpo.kl_loss(log_pi, ref, ratio) >= 0).all()
    assert torch.allclose(torch.autograd.grad(estimate, logits)[0], exact_gradient, atol=1e-6)


def test_the_kl_draws_every_token_back_by_its_distance():
    """Its gradient in pi is -ratio (ref - pi), and so points to the reference also where the policy has all but given a token up."""
    log_pi = torch.tensor([-0.5, -2.0, -6.0, -9.0], requires_grad=True)
    ref, old = torch.tensor([-3.0, -1.0, -2.0, -1.0]), torch.tensor([-0.6, -2.2, -6.0, -8.0])
    ratio = (log_pi - old).exp()
    grpo.kl_loss(log_pi, ref, ratio).sum().backward()
    assert torch.allclose(log_pi.grad, (-ratio * (ref - log_pi)).detach(), rtol=1e-4)


def test_gae_against_the_sum():
    """A_t = sum_k (gamma lambda)^k delta_(t+k), dialogue by dialogue; user tokens in between leave no trace."""
    batch, gamma, lam = ragged(), 0.7, 0.9
    values = torch.randn(len(batch), generator=torch.Generator().manual_seed(3))
    advantages, returns = ppo.gae(batch.reward_N, values, batch, gamma=gamma, lam=lam)
    for d in range(4):
        index = (batch.dialogue_N == d).nonzero().squeeze(1).tolist()
        assert index == list(range(index[0], index[0] + len(index)))
        step = [
            (1.0 if batch.turn_N[a] == batch.turn_N[b] else gamma) for a, b in zip(index, index[1:])
        ] + [0.0]  # fmt: skip
        next_value = [values[n].item() for n in index[1:]] + [0.0]
        delta = [batch.reward_N[n].item() + step[k] * next_value[k] - values[n].item() for k, n in enumerate(index)]
        for k, n in enumerate(index):
            expected, weight = 0.0, 1.0
            for j in range(k, len(index)):
                expected += weight * delta[j]
                weight *= step[j] * lam
            assert advantages[n].item() == pytest.approx(expected, abs=1e-5)
    assert torch.allclose(returns, advantages + values)


def test_gae_with_the_papers_settings_is_return_minus_value():
    batch = make([[3, 2]], [[0.0, 0.8]])
    advantages, _ = ppo.gae(batch.reward_N, torch.full((5,), 0.3), batch)
    assert torch.allclose(advantages, torch.full((5,), 0.5))


def test_whitening():
    assert ppo.whiten(torch.tensor([2.0])).item() == 0.0
    white = ppo.whiten(torch.tensor([1.0, 2.0, 6.0]))
    assert white.mean().abs() < 1e-6 and white.square().mean().sqrt() == pytest.approx(1.0, abs=1e-5)


def test_value_loss_clip():
    loss = ppo.value_loss(torch.tensor([2.0, 0.1]), torch.zeros(2), torch.tensor([2.0, 1.0]), 0.5)
    assert torch.allclose(loss, torch.tensor([0.5 * 1.5**2, 0.5 * 0.9**2]))


def test_group_baseline_is_over_dialogues_not_tokens():
    """Returns 1 (one token) and 0 (ten tokens): the mean is 0.5, whatever the lengths."""
    batch = make([[1], [5, 5]], [[1.0], [0.0, 0.0]])
    advantages, flat = grpo.group_advantages(batch, 2, per_turn=False, std=False)
    assert flat == 0 and advantages[0] == 0.5 and (advantages[1:] == -0.5).all()
    normalised, _ = grpo.group_advantages(batch, 2, per_turn=False, std=True)
    assert normalised[0] == pytest.approx(0.5 / 0.5**0.5)


def test_per_turn_baseline_and_discount():
    batch = make([[2, 1], [1, 2], [1]], [[0.2, 0.6], [0.4, 0.0], [0.3]])
    advantages, _ = grpo.group_advantages(batch, 3, per_turn=True, gamma=0.5, std=False)
    of = {(d, t): a for d, t, a in zip(batch.dialogue_N.tolist(), batch.turn_N.tolist(), advantages.tolist())}
    first = [0.2 + 0.5 * 0.6, 0.4, 0.3]
    for d in range(3):
        assert of[d, 0] == pytest.approx(first[d] - sum(first) / 3, abs=1e-6)
    assert of[0, 1] == pytest.approx(0.3) and of[1, 1] == pytest.approx(-0.3)


def test_a_group_without_variance_is_counted_and_moves_nothing():
    batch = make([[2], [3], [1], [2]], [[0.4], [0.4], [0.1], [0.9]])
    advantages, flat = grpo.group_advantages(batch, 2, per_turn=False)
    assert (
        flat == 1 and (advantages[batch.dialogue_N < 2] == 0).all() and (advantages[batch.dialogue_N >= 2] != 0).all()
    )


def run_update(algo, micro_tokens, *, epochs=1, lr=1e-2):
    model = tiny_model()
    reference = frozen_copy(tiny_model(seed=1))
    args = SimpleNamespace(**(vars(ARGS) | {"micro_tokens": micro_tokens, "epochs": epochs}))
    batch = ragged()
    batch.sampler_log_probs_N = slow_log_probs(model, batch, args.temperature).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    if algo == "grpo":
        advantages, _ = grpo.group_advantages(batch, 2, per_turn=False)
        metrics = grpo.update(Policy(model, 0.8), Policy(reference, 0.8), optimizer, batch, advantages, args)
        return model, None, metrics
    critic = Critic(model)
    critic_optimizer = torch.optim.SGD(critic.parameters(), lr=lr)
    metrics = ppo.update(Policy(model, 0.8), Policy(reference, 0.8), critic, optimizer, critic_optimizer, batch, args)
    return model, critic, metrics


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_micro_batch_size_does_not_change_the_update(algo):
    whole, critic, _ = run_update(algo, 10_000)
    pieces, other_critic, _ = run_update(algo, 1)
    for a, b in zip(whole.parameters(), pieces.parameters()):
        assert torch.allclose(a, b, atol=1e-6)
    if critic:
        assert torch.allclose(critic.value_head.weight, other_critic.value_head.weight, atol=1e-6)
        assert critic.value_head.weight.abs().sum() > 0


@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_first_ratio_is_one_and_the_sampler_agrees(algo):
    _, _, metrics = run_update(algo, 64)
    assert metrics["approx_kl"] == 0.0 and metrics["clip_fraction"] == 0.0
    assert metrics["sampler_gap"] < 1e-5
    _, _, second = run_update(algo, 64, epochs=2, lr=1.0)
    assert second["approx_kl"] > 0.0, "the second epoch has moved away from the old log-probs"


def test_grpo_update_equals_the_formula():
    """One SGD step against the loss written out with slow log-probs."""
    model, reference = tiny_model(), tiny_model(seed=1)
    batch = ragged()
    advantages, _ = grpo.group_advantages(batch, 2, per_turn=False)
    log_pi, log_ref = slow_log_probs(model, batch, 0.8), slow_log_probs(reference, batch, 0.8).detach()
    entropies = []
    for row, column in zip(batch.row_N.tolist(), batch.column_N.tolist()):
        log_p = torch.log_softmax(model(input_ids=torch.tensor([batch.sequences[row]])).logits[0, column - 1] / 0.8, -1)
        entropies.append(-(log_p.exp() * log_p).sum())
    surrogate = -(log_pi - log_pi.detach()).exp() * advantages
    kl = 0.5 * (log_pi - log_ref).square()  # k2 has the same gradient as ratio * k3
    loss = (surrogate + 0.1 * kl - 0.01 * torch.stack(entropies)).sum() / len(batch)
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    updated, _, _ = run_update("grpo", 64)
    for before, gradient, after in zip(model.parameters(), gradients, updated.parameters()):
        assert torch.allclose(before - 1e-2 * gradient, after, atol=1e-5)


def test_logits_in_parts_change_nothing(monkeypatch):
    import policy

    results = []
    for at_once in (10_000, 3):
        monkeypatch.setattr(policy, "LOGITS_AT_ONCE", at_once)
        model, batch = tiny_model(), ragged()
        log_probs, entropy, _ = Policy(model, 0.8)(batch, [0, 1, 2, 3])
        (log_probs + entropy).sum().backward()
        results.append([log_probs, entropy, *(p.grad for p in model.parameters())])
    for a, b in zip(*results):
        assert torch.allclose(a, b, atol=1e-5)


def test_log_softmax_is_float32_and_the_value_head_starts_at_zero(model):
    half = copy.deepcopy(model).to(torch.bfloat16)
    log_probs, entropy = token_log_probs(half, torch.randn(3, 32, dtype=torch.bfloat16), torch.tensor([1, 2, 3]), 1.0)
    assert log_probs.dtype == entropy.dtype == torch.float32
    batch = ragged()
    values, _ = Critic(model)(batch, [0, 1])
    assert (values == 0).all()
    assert not any(module.training for module in Critic(model).base_model.modules())


def test_models_in_bfloat16_keep_their_rotary_frequencies(tiny_folder, tmp_path):
    """Rounded like the weights, they would turn late positions by a radian: the sampler would be another model."""
    flags = ["--preset", "laptop", "--model", str(tiny_folder), "--simulator", "self", "--out", str(tmp_path)]
    models = load_models(train.parse_args(flags), "cpu", torch.bfloat16, 1)
    for model in (models.sampler, models.local_llm.model):
        assert model is not models.policy.model and model.lm_head.weight.dtype == torch.bfloat16
        assert not any(parameter.requires_grad for parameter in model.parameters())
        assert model.model.rotary_emb.inv_freq.dtype == torch.float32


def test_lower_layers_stay_frozen(model):
    train_upper_layers(model, 1)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert trained and all("layers.2" in name or name == "model.norm.weight" for name in trained)
