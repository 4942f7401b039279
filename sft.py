"""The cold start: a few minutes of supervised learning on written exchanges, before any reward.

    data/exchanges.jsonl -> dialogues whose replies were written, not sampled -> maximise their log-probs -> the initial policy

The paper starts from Qwen2.5-7B-Instruct, which can hold such a talk already; SmolLM2-135M cannot, and what is never sampled is
never rewarded. The replies are written for a message, whatever the person came for: seven in eight miss that. A hint comes more
often before one that does not, so that a reply after a hint serves it now and then, and there is something to reinforce. Persons and authors that the reader holds out are not trained on. The result is kept in the user's cache.
"""

import hashlib
import json
import random
from pathlib import Path

import torch
from tqdm import tqdm

from distributed import clip_gradients, micro_batches
from exchanges import EXCHANGES, Exchange, load_exchanges
from offline_user import DISPLEASED, PLEASED
from policy import Chat, Policy, cache_folder, load_model, save_model
from rollout import Dialogue, Turn, instructions, make_batch, next_prompt
from simulator import RLVER, Appraisal, Profile, Reaction, User, write_whole

EPOCHS, DIALOGUES_A_STEP, LEARNING_RATE, MICRO_TOKENS = 1, 8, 4e-4, 3000
AUTHORS, LONGEST = "adgijl", 20  # who writes plainly; words of a reply: what a laptop run has time to sample
HINTED = {
    True: 0.8,
    False: 0.3,
}  # share of displeased messages with a hint, before a reply that serves the person or not


def written_dialogues(profiles: list[Profile], chat: Chat, think: bool, seed: int = 0) -> list[Dialogue]:
    """Dialogues in which every good, short reply of data/exchanges.jsonl is said once, in the order of the story."""
    rng, dialogues = random.Random(seed), []
    good = [e for e in load_exchanges() if e.author in AUTHORS and e.grade >= 2 and len(e.reply.split()) <= LONGEST]
    for profile in profiles:
        left = [e for e in good if e.id == profile.id]
        while left:
            chosen = [rng.choice([e for e in left if e.turn == turn]) for turn in sorted({e.turn for e in left})]
            left = [e for e in left if e not in chosen]
            dialogues.append(written_dialogue(profile, chosen, chat, think, rng))
    return dialogues


def written_dialogue(profile: Profile, chosen: list[Exchange], chat: Chat, think: bool, rng: random.Random) -> Dialogue:
    """One dialogue. The person says before each reply what that reply answers, as the offline user would."""
    story, dialogue = (profile.first_talk, *profile.facts), Dialogue(User(profile, RLVER.start), RLVER.start)
    pleased = None
    for exchange in chosen:
        message, serves = story[exchange.turn], exchange.act == profile.intention
        if pleased is None:
            dialogue.user.messages.append(message)
        else:
            words = [rng.choice((PLEASED if pleased else DISPLEASED)[profile.main_cha])]
            words += [rng.choice(profile.hints)] if not pleased and rng.random() < HINTED[serves] else []
            dialogue.turns[-1].reaction = Reaction(Appraisal(0), RLVER.start, " ".join([*words, message]), False)
        prompt_ids, _ = next_prompt(chat, dialogue, think)
        text = f"{exchange.thought}</think>\n{exchange.reply}" if think else exchange.reply
        ids = chat.text_ids(text) + [chat.stop_id]
        dialogue.turns.append(Turn(prompt_ids, ids, [0.0] * len(ids), True, exchange.thought, exchange.reply, True))
        pleased = serves
    return dialogue


def train_on(policy: Policy, dialogues: list[Dialogue], seed: int = 0) -> None:
    """AdamW on the replies' tokens alone, the learning rate falling to 0."""
    optimizer = torch.optim.AdamW(policy.parameters(), lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    order = [d for epoch in range(EPOCHS) for d in random.Random(f"{seed} {epoch}").sample(dialogues, len(dialogues))]
    steps = range(0, len(order), DIALOGUES_A_STEP)
    with tqdm(steps, desc="cold start", unit="step", leave=False) as bar:
        for first in bar:
            batch, loss = make_batch(order[first : first + DIALOGUES_A_STEP], "terminal"), 0.0
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - first / len(order))
            for members, weight in micro_batches(batch, MICRO_TOKENS):
                log_probs_n, _, _ = policy(batch, members)
                part = -weight * log_probs_n.sum() / len(batch)
                part.backward()
                loss += part.item()
            clip_gradients(policy, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{loss:.2f}")


@torch.no_grad()
def loss_on(policy: Policy, dialogues: list[Dialogue]) -> float:
    """Nats per token of the written replies."""
    batch = make_batch(dialogues, "terminal")
    return -sum(policy(batch, members)[0].sum().item() for members, _ in micro_batches(batch, MICRO_TOKENS)) / len(
        batch
    )


def cold_start(model: str, think: bool, dtype: torch.dtype, profiles: list[Profile], strangers: list[Profile]) -> Path:
    """The folder of the model after supervised learning on what was written for `profiles`; made at most once for the same
    data, code, model and dtype. `strangers` are persons to tell the loss on."""
    here = Path(__file__).parent
    parts = [
        EXCHANGES.read_bytes(),
        *(here.joinpath(f"{name}.py").read_bytes() for name in ("sft", "policy", "rollout")),
    ]
    parts += [repr((model, think, dtype, torch.__version__, profiles)).encode()]
    folder = cache_folder() / f"cold-start-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    loaded, tokenizer = load_model(model)
    chat, policy = Chat(tokenizer, instructions(think)), Policy(loaded, dtype=dtype)
    written, held_out = written_dialogues(profiles, chat, think), written_dialogues(strangers, chat, think)
    if not written or not held_out:
        raise ValueError("--cold-start: nothing was written for these profiles; use --cold-start none")
    before = loss_on(policy, held_out)
    train_on(policy, written)
    save_model(loaded, tokenizer, folder)
    write_whole(folder / "loss.json", json.dumps({"before": before, "after": loss_on(policy, held_out)}))
    return folder
