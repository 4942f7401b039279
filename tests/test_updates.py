"""Updates against their formulas written out slowly, and what a training run does step by step with a stubbed user.

The oracles take full logits, one sequence at a time, and step by SGD: p - lr * grad.
"""

import copy
import json
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, byte_tokenizer, metrics_of, parameters_of, tiny_model
from stub import Stub
from test_algorithms import make

import evaluate
import grpo
import ppo
import train
from distributed import micro_batches
from extras import logs
from models import Models, load_models
from policy import Chat, Critic, Policy, checkpoint_activations, load_model
from rollout import make_batch, rollout
from simulator import (
    INTENTIONS,
    RLVER,
    SAGE,
    Appraisal,
    Profile,
    Protocol,
    Reaction,
    User,
    done,
    load_profiles,
    next_emotion,
    with_every_intention,
)
from verify import transcript_of

TEMPERATURE = 0.8
ARGS = dict(epochs=1, micro_tokens=10_000, clip=0.2, value_clip=0.5, kl=0.1, entropy=0.01, gamma=0.7, lam=0.9,
            max_grad_norm=1e9, importance_cap=2.0, lr=3e-4, group=1)  # fmt: skip


def sharp_model(seed=0):
    """Probabilities far from uniform, so that entropy, KL and temperature make a difference."""
    model = tiny_model(seed=seed)
    model.lm_head.weight.data *= 15
    return model


# --- The formulas -----------------------------------------------------------------------------------------------------


def log_probs_slowly(model, batch):
    """(log-probs (N,), entropies (N,)) of the sampled tokens."""
    logits = [model(torch.tensor([ids])).logits[0] / TEMPERATURE for ids in batch.sequences]
    places = zip(batch.row_N, batch.column_N)
    log_p_N_V = torch.log_softmax(torch.stack([logits[row][column - 1] for row, column in places]), -1)
    return log_p_N_V[torch.arange(len(batch)), batch.id_N], -(log_p_N_V.exp() * log_p_N_V).sum(-1)


def values_slowly(critic, batch):
    hidden = [critic.base_model(torch.tensor([ids])).last_hidden_state[0] for ids in batch.sequences]
    places = zip(batch.row_N, batch.column_N)
    return torch.stack([hidden[row][column - 1] @ critic.value_head.weight[0] for row, column in places])


def gae_slowly(rewards, values, batch, gamma, lam):
    """A_n = the deltas of the dialogue's tokens from n on, each discounted on its way back to n."""
    N, advantages = len(batch), []
    same = lambda kind, n: n + 1 < N and bool(kind[n] == kind[n + 1])
    discount = [same(batch.dialogue_N, n) * (1.0 if same(batch.turn_N, n) else gamma) for n in range(N)]
    delta = [rewards[n] - values[n] + (discount[n] * values[n + 1] if discount[n] else 0.0) for n in range(N)]
    for n in range(N):
        total, weight = 0.0, 1.0
        for m in range(n, N):
            total += weight * delta[m].item()
            weight *= discount[m] * lam
        advantages.append(total)
    return torch.tensor(advantages)


def surrogate_slowly(log_probs, old, batch, advantages, args):
    """(min(r A, clip(r) A), times the token's truncated weight; r; names of the bounds that some token has met)."""
    ratio = (log_probs - old).exp()
    clipped = ratio.clamp(1 - args.clip, 1 + args.clip)
    weight = (old - batch.sampler_log_probs_N).exp() if args.importance_cap else torch.ones(len(batch))
    met = {"ratio"} if (clipped * advantages < ratio * advantages).any() else set()
    met |= {"weight"} if 0 < (weight > args.importance_cap).sum() < len(batch) else set()
    weight = torch.tensor([min(w, args.importance_cap or 1.0) for w in weight.tolist()])
    return weight * torch.minimum(ratio * advantages, clipped * advantages), ratio, met


def sgd(module, loss, args) -> float:
    """One step, the norm of the whole gradient clipped; returns the norm before."""
    parameters = list(module.parameters())
    gradients = torch.autograd.grad(loss, parameters)
    norm = sum(gradient.square().sum() for gradient in gradients).sqrt().item()
    with torch.no_grad():
        for parameter, gradient in zip(parameters, gradients):
            parameter -= args.lr * min(1.0, args.max_grad_norm / norm) * gradient
    return norm


def means(**values):
    return {name: torch.as_tensor(value).detach().float().mean().item() for name, value in values.items()}


def diagnostics_slowly(surrogate, ratio, entropy, old, batch, args):
    gap, outside = (batch.sampler_log_probs_N - old).abs(), (ratio - 1).abs() > args.clip
    k3 = ratio - 1 - ratio.log()
    return means(policy_loss=-surrogate, entropy=entropy, approx_kl=k3, clip_fraction=outside, sampler_gap=gap)


def ppo_slowly(policy, reference, critic, batch, args):
    """(metrics, bounds met); policy and critic take their steps."""
    with torch.no_grad():
        old, old_values = log_probs_slowly(policy, batch)[0], values_slowly(critic, batch)
        ref = log_probs_slowly(reference, batch)[0] if reference else batch.sampler_log_probs_N
    kl = batch.sampler_log_probs_N - ref
    advantages = gae_slowly(batch.reward_N - args.kl * kl, old_values, batch, args.gamma, args.lam)
    returns = advantages + old_values
    explained = 1 - (returns - old_values).var() / returns.var()
    white = (advantages - advantages.mean()) / (advantages.std(correction=0) + 1e-5)
    for _ in range(args.epochs):
        log_probs, entropy = log_probs_slowly(policy, batch)
        surrogate, ratio, met = surrogate_slowly(log_probs, old, batch, white, args)
        values = values_slowly(critic, batch)
        near = old_values + (values - old_values).clamp(-args.value_clip, args.value_clip)
        value_loss = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
        norm = sgd(policy, -(surrogate + args.entropy * entropy).mean(), args)
        critic_norm = sgd(critic, value_loss.mean(), args)
    met |= {"value"} if ((near - returns) ** 2 > (values - returns) ** 2).any() else set()
    met |= {"norm"} if min(norm, critic_norm) > args.max_grad_norm else set()
    metrics = means(kl=kl, value_loss=value_loss, grad_norm=norm, explained_variance=explained)
    return metrics | diagnostics_slowly(surrogate, ratio, entropy, old, batch, args), met


def grpo_slowly(policy, reference, batch, advantages, args):
    """(metrics, bounds met); the policy takes its steps."""
    with torch.no_grad():
        old = log_probs_slowly(policy, batch)[0]
        ref = log_probs_slowly(reference, batch)[0] if reference else None
    for _ in range(args.epochs):
        log_probs, entropy = log_probs_slowly(policy, batch)
        surrogate, ratio, met = surrogate_slowly(log_probs, old, batch, advantages, args)
        x = ref - log_probs if reference else torch.zeros(len(batch))
        kl = ratio * (x.exp() - 1 - x)
        norm = sgd(policy, (-surrogate + args.kl * kl - args.entropy * entropy).mean(), args)
    met |= {"norm"} if norm > args.max_grad_norm else set()
    return means(kl=kl, grad_norm=norm) | diagnostics_slowly(surrogate, ratio, entropy, old, batch, args), met


def group_advantages_slowly(batch, size, *, per_turn, gamma=1.0, std=True):
    """Of every token: its dialogue's return (per_turn: discounted, from its turn on) against those of its group."""
    rewards = {}
    for d, t, reward in zip(batch.dialogue_N.tolist(), batch.turn_N.tolist(), batch.reward_N.tolist()):
        rewards[d, t] = rewards.get((d, t), 0.0) + reward
    if per_turn:
        returns = {(d, t): sum(gamma ** (s - t) * r for (e, s), r in rewards.items() if e == d and s >= t) for d, t in rewards}  # fmt: skip
    else:
        returns = {(d, t): sum(r for (e, _), r in rewards.items() if e == d) for d, t in rewards}
    result = {}
    for d, t in rewards:
        turn = t if per_turn else 0
        group = torch.tensor([returns[e, s] for e, s in rewards if e // size == d // size and s == turn])
        spread = group.std().item() if len(group) > 1 else 0.0
        centred = returns[d, t] - group.mean().item()
        result[d, t] = 0.0 if spread < 1e-6 else centred / spread if std else centred
    return torch.tensor([result[pair] for pair in zip(batch.dialogue_N.tolist(), batch.turn_N.tolist())])


# --- Updates equal the formulas ---------------------------------------------------------------------------------------

PER_TURN = [[3, 2], [1], [4, 1, 2], [2, 2]], [[0.1, 0.9], [0.5], [0.0, -0.6, 0.4], [0.2, -0.3]]
TERMINAL = [[3, 2], [1], [4, 1, 2], [2, 2]], [[0.0, 0.9], [0.5], [0.0, 0.0, -0.4], [0.0, 0.1]]
DROPPED = [[3, 2], [1], [], [4, 1, 2], [2, 2], [2]], [[0.1, 0.9], [0.5], [], [0.0, -0.6, 0.4], [0.2, -0.3], [0.7]]
CASES = {  # name: (turns and rewards, how far the sampler's log-probs are off, settings, bounds that must be met)
    "the sampler is the policy": (PER_TURN, 0.0, {}, set()),
    "another sampler": (PER_TURN, 0.7, {}, {"weight"}),
    "no weights": (PER_TURN, 0.7, {"importance_cap": 0}, set()),
    "one dialogue at a time": (PER_TURN, 0.7, {"micro_tokens": 1}, {"weight"}),
    "terminal reward": (TERMINAL, 0.0, {}, set()),
    "no reference": (TERMINAL, 0.7, {}, set()),
    "a dropped dialogue": (DROPPED, 0.7, {"micro_tokens": 30}, {"weight"}),
    "clipped gradients": (PER_TURN, 0.0, {"max_grad_norm": 0.5}, {"norm"}),
    "a group at a time": (PER_TURN, 0.7, {"group": 2, "micro_tokens": 45}, set()),
    "two groups at a time": (PER_TURN, 0.7, {"group": 2, "micro_tokens": 100}, set()),
    "no entropy bonus": (PER_TURN, 0.7, {"entropy": 0.0}, set()),
    "two epochs": (PER_TURN, 0.7, {"epochs": 2, "micro_tokens": 30}, {"ratio", "weight"}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("algo", ["ppo", "grpo"])
def test_updates_equal_the_formula(algo, case):
    """All signs, coefficients, masks and bounds of the losses, the step and the metrics; twice, so that nothing is left
    over from the first update. The reference and the critic's trunk are other models than the policy."""
    (turns, rewards), off, settings, bounds = CASES[case]
    args, batch, met = SimpleNamespace(**ARGS | settings), make(turns, rewards), set()
    model, reference, critic = sharp_model(), sharp_model(1), Critic(sharp_model(2))
    torch.nn.init.normal_(critic.value_head.weight, std=0.3, generator=torch.Generator().manual_seed(2))
    noise_N = off * torch.randn(len(batch), generator=torch.Generator().manual_seed(1))
    batch.sampler_log_probs_N = log_probs_slowly(model, batch)[0].detach() + noise_N
    slow_reference, slow_model, slow_critic = copy.deepcopy((reference, model, critic))
    modules = [model, critic] if algo == "ppo" else [model]
    optimizers = [torch.optim.SGD(module.parameters(), lr=args.lr) for module in modules]
    policies = [Policy(model, TEMPERATURE), Policy(reference, TEMPERATURE)]
    if case == "no reference":
        policies[1] = slow_reference = None
    for _ in range(2):
        if algo == "ppo":
            metrics = ppo.update(*policies, critic, *optimizers, batch, args)
            expected, more = ppo_slowly(slow_model, slow_reference, slow_critic, batch, args)
        else:
            advantages_N = group_advantages_slowly(batch, 2, per_turn=case != "terminal reward", gamma=args.gamma)
            metrics = grpo.update(*policies, *optimizers, batch, advantages_N, args)
            expected, more = grpo_slowly(slow_model, slow_reference, batch, advantages_N, args)
        assert metrics == pytest.approx(expected, rel=1e-4, abs=1e-5)
        for module, slow_module in zip(modules, [slow_model, slow_critic]):
            for a, b in zip(module.parameters(), slow_module.parameters()):
                assert torch.allclose(a, b, rtol=0, atol=2e-7)
        met |= more
    assert bounds <= met, "the case is there for these"


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("per_turn", [True, False])
def test_group_advantages_equal_the_formula(per_turn, std):
    """Groups of three: whole, without a dropped dialogue, dropped altogether, and with a single dialogue left. A return for
    the whole dialogue is not discounted, one from a turn on is."""
    turns = [[3, 2], [1], [4, 1, 2], [2, 2], [], [1, 1], [], [], [], [], [2], []]
    batch = make(turns, [[0.1, 0.9], [0.5], [0.0, -0.6, 0.4], [0.2, -0.3], [], [0.7, 0.3], [], [], [], [], [0.4], []])
    settings = dict(per_turn=per_turn, gamma=0.5, std=std)
    advantages_N, flat = grpo.group_advantages(batch, 3, **settings)
    assert torch.allclose(advantages_N, group_advantages_slowly(batch, 3, **settings), atol=1e-6) and flat == 1


def test_micro_batches_are_no_larger_than_allowed():
    """A dialogue that is too large goes alone; nothing else exceeds --micro-tokens."""
    batch = make(*DROPPED)
    assert min(batch.sizes.values()) < 30 and sum(batch.sizes.values()) > 45
    for members, weight in micro_batches(batch, 45):
        assert weight == 1 and (sum(batch.sizes[d] for d in members) <= 45 or len(members) == 1)


def test_bfloat16_computes_over_float32_weights():
    """--dtype bfloat16 rounds what is computed, a little, but neither the weights nor their gradients."""
    model, batch = sharp_model(), make(*PER_TURN)
    log_probs_n, _, index_n = Policy(model, TEMPERATURE, torch.bfloat16)(batch, [0, 1, 2, 3])
    assert 1e-4 < (log_probs_n - log_probs_slowly(model, batch)[0][index_n]).abs().max() < 0.3
    log_probs_n.sum().backward()
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())


def test_checkpointing_computes_a_layer_again_for_the_backward_pass():
    model, batch, passes = sharp_model(), make(*PER_TURN), []
    checkpoint_activations(model)
    model.base_model.layers[1].input_layernorm.register_forward_hook(lambda *_: passes.append(1))
    log_probs_n, _, _ = Policy(model)(batch, [0, 1, 2, 3])
    assert len(passes) == 1
    log_probs_n.sum().backward()
    assert len(passes) == 2


# --- A training run ---------------------------------------------------------------------------------------------------

PEOPLE = [
    dict(id=f"p{i}", player=f"Person {i}.", scene="A scene.", main_cha="passive", cha_group=("A group",),
         task=list(INTENTIONS.values())[i], first_talk=f"It is {i} again.") for i in range(6)
]  # fmt: skip
FLAGS = (
    "--preset laptop --dtype float32 --batch 4 --turns 2 --max-new-tokens 6 --cold-start none --no-eval --train-layers 2 "
    "--temperature 0.5 --lr 3e-3 --kl 0.1 --simulator-model stub --micro-tokens 300"
).split()
PPO = "--algo ppo --group 1 --checkpointing --steps 4 --warmup 3 --lr-end 1 --critic-lr 1e-2".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with a tiny model and six profiles."""
    home = tmp_path_factory.mktemp("home")
    sharp_model().save_pretrained(home / "model")
    byte_tokenizer().save_pretrained(home / "model")
    (home / "people.jsonl").write_text("\n".join(map(json.dumps, PEOPLE)))
    return home


def run(home, out, *flags):
    """train.main; what each rollout and each update was given."""
    seen = SimpleNamespace(out=out, rollouts=[], rates=[], batches=[], advantages=[], metrics=[], transcripts=[])

    def watched_rollout(model, chat, simulator, people, seeds, protocol, **settings):
        seen.rollouts.append(([person.id for person in people], list(seeds), protocol, settings["temperature"]))
        return rollout(model, chat, simulator, people, seeds, protocol, **settings)

    def watched(update):
        def watched_update(*given):
            seen.rates.append([x.param_groups[0]["lr"] for x in given if isinstance(x, torch.optim.Optimizer)])
            seen.batches.append(next(x for x in given if hasattr(x, "reward_N")))
            seen.advantages.append(given[-2])
            return update(*given)

        return watched_update

    with Stub() as stub, pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "rollout", watched_rollout)
        patch.setattr(logs, "draw_curves", lambda out: None)
        for algorithm in (ppo, grpo):
            patch.setattr(algorithm, "update", watched(algorithm.update))
        files = [x for split in ("train", "validation", "test") for x in (f"--{split}-profiles", home / "people.jsonl")]
        flags = [*FLAGS, "--model", home / "model", *files, "--simulator", stub.url, "--out", out, *flags]
        assert train.main(list(map(str, flags))) == 0
    seen.metrics = metrics_of(out)
    seen.transcripts = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    return seen


@pytest.fixture(scope="module")
def ppo_run(home, tmp_path_factory):
    return run(home, tmp_path_factory.mktemp("ppo") / "out", *PPO)


@pytest.fixture(scope="module", params=["terminal --no-std", "mixed --no-std", "mixed --std"])
def grpo_run(request, home, tmp_path_factory):
    flags = "--algo grpo --group 2 --steps 2 --warmup 1 --lr-end 0.5 --gamma 0.5".split()
    flags += ["--reward", *request.param.split()]
    return run(home, tmp_path_factory.mktemp("grpo") / "out", *flags), request.param


def test_learning_rates_warm_up_and_decay_and_the_critic_has_its_own(ppo_run, grpo_run):
    """The first step counts; the full rate comes at step --warmup; the decay is linear in the step."""
    assert ppo_run.rates == [pytest.approx([3e-3 * share, 1e-2 * share]) for share in (1 / 3, 2 / 3, 1, 1)]
    assert grpo_run[0].rates == [pytest.approx([3e-3]), pytest.approx([3e-3 * 0.75])]


def test_every_dialogue_has_its_own_seed_and_everybody_has_their_turn(ppo_run, grpo_run, home, tmp_path):
    """Seeds differ between dialogues, steps and --seed; profiles are drawn epoch by epoch, GRPO's for a whole group."""
    seeds = [seed for _, seeds, _, _ in ppo_run.rollouts for seed in seeds]
    other = run(home, tmp_path / "out", *PPO, "--steps", 1, "--seed", 1)
    seeds += other.rollouts[0][1]
    assert len(seeds) == 20 == len(set(seeds))
    drawn = [person for people, *_ in ppo_run.rollouts for person in people]
    assert sorted(drawn[:6]) == sorted(drawn[6:12]) == [person["id"] for person in PEOPLE]
    assert drawn[:6] != drawn[6:12] and other.rollouts[0][0] != drawn[:4]
    for people, *_ in grpo_run[0].rollouts:
        assert people[0] == people[1] != people[2] == people[3]


def test_everybody_is_drawn_once_in_each_epoch_wherever_a_step_begins():
    people, orders = [Profile(**person) for person in PEOPLE], set()
    for seed in range(3):
        drawn = [person.id for step in range(9) for person in train.draw_profiles(people, step, 4, seed)]
        epochs = [tuple(drawn[first : first + 6]) for first in range(0, 36, 6)]
        assert all(sorted(epoch) == [person["id"] for person in PEOPLE] for epoch in epochs)
        orders |= set(epochs)
    assert len(orders) > 15


def test_every_step_has_every_hidden_intention_equally_often():
    everybody = with_every_intention(load_profiles(ROOT / "data" / "train_profiles.jsonl"))
    for step in range(140):  # more than an epoch
        drawn = train.draw_profiles(everybody, step, len(INTENTIONS), seed=3)
        assert {profile.intention for profile in drawn} == set(INTENTIONS)
    assert train.draw_profiles(everybody, 5, 8, seed=3) != train.draw_profiles(everybody, 5, 8, seed=4)


def test_training_is_by_its_protocol(ppo_run):
    """RLVER's dialogues start at 30, with --turns replies (8 by default), at --temperature."""
    assert {(protocol, temperature) for *_, protocol, temperature in ppo_run.rollouts} == {(Protocol(30, 2), 0.5)}
    assert {transcript["history"][0]["emotion-point"] for transcript in ppo_run.transcripts} == {30}
    assert RLVER.turns == 8 == train.parse_args(["--preset", "paper"]).turns


def test_what_samples_is_what_trains(ppo_run, grpo_run):
    """The sampler follows the policy (with PPO here it is a copy, with GRPO the policy itself), at the same temperature."""
    for row in ppo_run.metrics + grpo_run[0].metrics:
        assert row["sampler_gap"] < 1e-4 and row["approx_kl"] == 0 and row["grad_norm"] > 0.01


def test_the_reference_is_the_initial_policy(ppo_run, grpo_run):
    """It equals the policy at first, at its temperature, and stays behind when the policy moves."""
    for rows in (ppo_run.metrics, grpo_run[0].metrics):
        assert abs(rows[0]["kl"]) < 1e-5 and abs(rows[1]["kl"]) > 1e-3


def test_policy_and_critic_move_from_the_same_start_but_not_below_the_upper_layers(ppo_run):
    """--train-layers 2 of 3: those and the last norm are trained, in the policy as in the critic's trunk; nothing else."""
    start = sharp_model().state_dict()
    trained = {name for name in start if name.startswith(("model.layers.1", "model.layers.2", "model.norm"))}
    policy, critic = parameters_of(ppo_run.out)
    critic = {name.replace("base_model", "model"): value for name, value in critic.items()}
    policy = {name.removeprefix("model."): value for name, value in policy.items()}
    for state, rate in ((policy, 3e-3), (critic, 1e-2)):
        moved = {name: (state[name] - start[name]).abs().max().item() for name in start if name in state}
        assert {name for name, most in moved.items() if most > 0} == trained
        assert max(moved.values()) < 3.3 * rate, (
            "Adam goes by no more than the rate in each of the first steps: nothing decays"
        )
    assert critic["value_head.weight"].abs().sum() > 0


def test_a_resumed_run_is_the_same_run(ppo_run, home, tmp_path):
    """Weights, Adam's moments and the schedule go on: the parameters at the end are those of the uninterrupted run."""
    run(home, tmp_path / "out", *PPO, "--steps", 2)
    resumed = run(home, tmp_path / "out", *PPO, "--resume")
    assert resumed.rates == ppo_run.rates[2:] and [row["step"] for row in resumed.metrics] == [0, 1, 2, 3]
    assert resumed.metrics[2:] == [pytest.approx(row, abs=1e-3, rel=1e-3) for row in ppo_run.metrics[2:]]
    start, moved, apart = sharp_model().state_dict(), 0.0, 0.0
    for ours, theirs in zip(*(parameters_of(at.out) for at in (resumed, ppo_run))):
        for name in theirs:
            before = start.get(name.removeprefix("model."), start.get(name.replace("base_model.", "model."), 0.0))
            moved += (theirs[name] - before).abs().sum().item()
            apart += (theirs[name] - ours[name]).abs().sum().item()
    assert apart < 0.01 * moved, "rounding apart: answers come in any order"


def test_rewards_and_advantages_follow_from_the_transcripts(grpo_run):
    """From the logged emotions: terminal, and mixed, which is half of it and half of each turn's change; --gamma and --std
    reach the advantages (divided by the deviation of a group of two, they would be the same whatever gamma is)."""
    seen, (kind, std) = grpo_run[0], grpo_run[1].split()
    for step, (batch, advantages_N) in enumerate(zip(seen.batches, seen.advantages)):
        for d, transcript in enumerate(row for row in seen.transcripts if row["step"] == step):
            start, first, last = (m["emotion-point"] for m in transcript["history"] if m["role"] == "user")
            mixed = [(first - start) / 200, (last - first + last) / 200]
            for t, reward in enumerate(mixed if kind == "mixed" else [0.0, last / 100]):
                rewards = batch.reward_N[(batch.dialogue_N == d) & (batch.turn_N == t)]
                assert rewards[-1] == pytest.approx(reward) and (rewards[:-1] == 0).all()
        settings = dict(per_turn=kind == "mixed", gamma=0.5, std=std == "--std")
        assert torch.allclose(advantages_N, group_advantages_slowly(batch, 2, **settings), atol=1e-6)
    assert max(advantages_N.abs().max() for advantages_N in seen.advantages) > 0


@pytest.mark.parametrize("algo", ["grpo", "ppo"])
def test_a_group_shares_its_history_where_a_reply_is_credited_with_its_own_change_alone(algo, home, tmp_path):
    """--reward delta --gamma 0: a transcript is a group's, and says what else was said and what that changed."""
    flags = "--group 2 --steps 1 --warmup 0 --reward delta --gamma 0".split()
    seen = run(home, tmp_path / "out", "--algo", algo, *flags)
    (batch,), transcripts = seen.batches, seen.transcripts
    assert len(transcripts) == 2 and batch.dialogue_N.unique().tolist() == [0, 1, 2, 3]
    for d, t in {(d, t) for d, t in zip(batch.dialogue_N.tolist(), batch.turn_N.tolist())}:
        before, said, after = transcripts[d // 2]["history"][2 * t : 2 * t + 3]
        change = said["instead"][0]["change"] if d % 2 else after["planning"]["change"]
        reward = next_emotion(before["emotion-point"], change) - before["emotion-point"]
        assert batch.reward_N[(batch.dialogue_N == d) & (batch.turn_N == t)].sum().item() == pytest.approx(reward / 100)


def test_ppo_holds_dialogues_together_only_where_they_share_their_history():
    flags = ["--preset", "laptop", "--algo", "ppo", "--group", "3"]
    args = train.parse_args(flags), train.parse_args([*flags, "--reward", "terminal"])
    assert [(a.group, a.together) for a in args] == [(3, 3), (1, 1)]


@pytest.mark.parametrize("flags", [["--dtype", "bfloat16"], ["--checkpointing"], []])
def test_the_sampler_follows_and_the_reference_does_not(flags, home):
    """Weights that have moved reach the sampler, a copy or the policy itself, and nobody else."""
    args = train.parse_args([*FLAGS, "--algo", "ppo", "--group", "1", "--model", str(home / "model"), *flags])
    models = load_models(args, "cpu", torch.bfloat16 if "bfloat16" in flags else torch.float32, 1)
    before = copy.deepcopy([models.reference.state_dict(), models.critic.state_dict()])
    ours, sampled = models.policy.model.parameters, models.sampler.parameters
    with torch.no_grad():
        for parameter in ours():
            parameter += 0.1 * parameter.requires_grad
    same = lambda: [torch.equal(a.to(b.dtype), b) for a, b in zip(ours(), sampled())]
    assert all(same()) == (not flags)
    models.follow()
    assert all(same())
    for module, states in zip((models.reference, models.critic), before):
        assert all(torch.equal(value, states[name]) for name, value in module.state_dict().items())
    assert not any(parameter.requires_grad for parameter in models.reference.parameters())


def test_a_checkpoint_is_what_samples_in_its_dtype(home, tmp_path):
    """bfloat16 where that is computed in; the trainer's own weights stay float32 for --resume."""
    seen = run(home, tmp_path / "out", *PPO, "--steps", 1, "--dtype", "bfloat16")
    loaded, _ = load_model(str(seen.out / "checkpoint"), dtype="auto")
    policy, _ = parameters_of(seen.out)
    for name, value in loaded.state_dict().items():
        master = policy[f"model.{name}"]
        assert value.dtype == torch.bfloat16 and master.dtype == torch.float32 and torch.equal(value, master.bfloat16())


def test_what_only_rollouts_need_leaves_the_gpu_for_the_update():
    class Elsewhere:
        """Weights that say where they were sent."""

        def __init__(self):
            self.model, self.sent, self.to = self, [], lambda device: self.sent.append(device)
            self.parameters = lambda: []

    sampler, user, policy = Elsewhere(), Elsewhere(), Elsewhere()
    models = Models(None, policy, None, None, sampler, user, [], [], "cuda")
    models.make_room()
    models.follow()
    assert sampler.sent == user.sent == ["cpu", "cuda"] and policy.sent == []
    models = Models(None, policy, None, None, policy.model, None, [], [], "cuda")  # what trains also samples
    models.make_room()
    models.follow()
    assert policy.sent == []


# --- Rollouts and scores ----------------------------------------------------------------------------------------------


class Steady:
    """A user whose emotion changes as told, who answers at once and never leaves."""

    def __init__(self, *changes):
        self.changes, self.asked = changes, False

    def open(self, profile, start):
        self.asked = True
        return done(User(profile, start, messages=[profile.first_talk]))

    def submit(self, user, reply):
        change = self.changes[len(user.replies)]
        user.emotion, self.asked = next_emotion(user.emotion, change), True
        user.replies.append(reply)
        return done(Reaction(Appraisal(change, sections={"Analyse": "Fair."}), user.emotion, "Go on.", False))

    def work(self):
        assert self.asked, "nobody speaks and nobody was asked: a slot is lost"
        self.asked = False


def test_both_the_templates_stop_token_and_the_tokenizers_end_a_reply(tokenizer):
    """Some models have two: a reply that ends with the other one must not run on."""
    other = copy.deepcopy(tokenizer)
    other.eos_token = "<|im_start|>"
    both = sorted(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|im_start|>"]))
    assert Chat(other, "Be kind.").stop_ids == both
    model = tiny_model()  # and those of its generation_config, one or a list
    for others in (both[1], both, [7, both[0]], None):
        model.generation_config.eos_token_id = others
        ends = {tokenizer.eos_token_id, *(others if isinstance(others, list) else [others])} - {None}
        assert Chat(tokenizer, "Be kind.", model).stop_ids == sorted(ends)


def test_rewards_of_all_kinds_but_not_of_a_dropped_dialogue(model, chat):
    """15 -> 20 -> 10, which is no failure. mixed is the mean of the others, not their sum; a dialogue whose user broke down
    is neither trained on nor measured."""
    people = [Profile(**person) for person in PEOPLE[:2]]
    dialogue, other = rollout(model, chat, Steady(5, -10), people, [0, 1], Protocol(15, 2), max_new_tokens=3)
    assert dialogue.rewards("terminal") == [0, 0.1] and dialogue.rewards("delta") == pytest.approx([0.05, -0.1])
    assert dialogue.rewards("mixed") == pytest.approx([0.025, 0])
    other.dropped, other.user.emotion = "its user broke down", 100
    assert set(make_batch([other, dialogue], "mixed").dialogue_N.tolist()) == {1}
    expected = {"dropped": 1, "emotion": 10, "change_per_turn": -2.5, "reward": -0.05, "failure": 0, "success": 0}
    expected |= {"reply_tokens": 3, "stopped": 0, "truncated": 2, "format_errors": 0}
    both = [other, dialogue]
    metrics = logs.rollout_metrics(both, [transcript_of(d) for d in both], "delta")
    assert {name: metrics[name] for name in expected} == pytest.approx(expected)


def test_a_broken_format_frees_its_slot_and_scores_zero(model, chat, tmp_path, capsys):
    """One slot: the second dialogue can only begin when the first has ended. `--verify` knows what it has to score."""
    scripted, texts = copy.copy(chat), iter(["no end", "A thought.</think> I see.", "Another.</think> And?"])
    scripted.decode = lambda ids: next(texts)
    people = [Profile(**person) for person in PEOPLE[:2]]
    ended = []
    settings = dict(think=True, slots=1, max_new_tokens=3, on_end=lambda: ended.append(1))
    broken, kept = rollout(model, scripted, Steady(5, 5), people, [0, 1], Protocol(30, 2), **settings)
    assert (broken.final_emotion, len(broken.turns)) == (0, 1) and (kept.final_emotion, len(kept.turns)) == (40, 2)
    assert len(ended) == 2 and transcript_of(broken)["emo_point"] == 0 and broken.user.emotion == 30
    assert make_batch([broken, kept], "delta").reward_N[:3].tolist() == pytest.approx([0, 0, -0.3])
    public = {name: value for name, value in transcript_of(kept).items() if name != "format_ok"}
    forged, path = transcript_of(broken) | {"emo_point": 30}, tmp_path / "transcripts.jsonl"
    for transcript, status in ((transcript_of(broken), 0), (forged, 1), (transcript_of(kept), 0), (public, 0)):
        path.write_text(json.dumps(transcript))
        assert evaluate.main(["--verify", str(path)]) == status
    assert "the final emotion 30 should be 0" in capsys.readouterr().out


def test_an_evaluation_is_by_sage(home, tmp_path):
    """Starts at 40, nine replies are appraised; every seed samples anew, and so does every dialogue."""
    still = lambda count, system, text: "Change: 0" if "Change: one whole number" in system else None
    out, users = tmp_path / "result.json", tmp_path / "twins.jsonl"
    users.write_text("\n".join(json.dumps(PEOPLE[0] | {"id": name}) for name in ("a", "b")))
    with Stub(still) as stub:
        flags = ["--model", home / "model", "--profiles", users, "--out", out, "--simulator", stub.url]
        flags += "--simulator-model stub --max-new-tokens 3 --seeds 2 --temperature 1 --show 0".split()
        assert evaluate.main(list(map(str, flags))) == 0
    assert SAGE == Protocol(40, 9)
    (transcripts,) = json.loads(out.read_text())["dialogues"].values()
    for transcript in transcripts:
        assert [m["emotion-point"] for m in transcript["history"] if m["role"] == "user"] == [40] * 10
    assert len({transcript["history"][1]["content"] for transcript in transcripts}) == 4


def test_seeds_of_one_profile_count_as_one_user():
    """Four seeds of two people: score and error are those of the two means, 20 and 40. 10 is no failure, 100 is success."""
    row = dict(character="passive", task="to be heard", history=[], dropped="")
    points = {"a": (10, 10, 30, 30), "b": (0, 0, 60, 100), "c": (90,)}
    rows = [row | {"id": name, "emo_point": point} for name in points for point in points[name]]
    rows[-1]["dropped"] = "its user broke down"
    rows[0]["format_ok"] = rows[-1]["format_ok"] = False  # the last is in no count
    result = evaluate.summarize(rows)
    assert (result["score"], result["standard_error"], result["dialogues"], result["dropped"]) == (30, 10, 8, 1)
    assert result["per_intention"]["to be heard"] == [2, 30, 10] == result["per_character"]["passive"]
    assert (result["success"], result["failure"], result["broken_formats"]) == (12.5, 25, 12.5)
    assert evaluate.score_of_profile(rows) == {"a": 20, "b": 40}
    assert evaluate.compare(rows, [row | {"id": name, "emo_point": 10} for name in "ab"])["interval"] == [0.4, 39.6]
