"""The cold start: a few minutes of supervised learning on written exchanges, before any reward.

    data/exchanges.jsonl, data/hints.jsonl -> what was said, a hint, the reply that it asks for
                                           -> maximise the replies' log-probs -> the initial policy

The paper starts from Qwen2.5-7B-Instruct, which can hold such a talk already; SmolLM2-135M cannot, and what is never sampled is
never rewarded. Every training person is here with every hidden intention (data/hints.jsonl), or the model would learn by heart who
wants what. Persons and authors that the reader holds out are not trained on. The result is kept in the user's cache.
"""

import hashlib
import json
import random
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from distributed import clip_gradients, micro_batches
from exchanges import EXCHANGES, HELD_OUT_AUTHORS, Exchange, load_exchanges
from offline_user import DISPLEASED, WORDS_FILE
from policy import Chat, Policy, cache_folder, load_model, save_model, train_upper_layers
from rollout import Dialogue, Turn, instructions, make_batch, next_prompt
from simulator import HINTS, RLVER, Appraisal, Profile, Reaction, User, with_every_intention, write_whole

EPOCHS, PERSONS_A_STEP, LEARNING_RATE, MICRO_TOKENS = 1, 1, 4e-4, 3000
LONGEST, TOLD = 15, 5  # words of a reply, messages of a person: what a laptop run has time for
PLEASED, HINTED = 1 / 3, 0.8  # share of replies after one that did the same; of the others, how many come after a hint


def written_dialogues(profiles: list[Profile], chat: Chat, think: bool, seed: int = 0) -> list[Dialogue]:
    """One dialogue with each person, of the good, short replies of data/exchanges.jsonl."""
    rng, replies_of = random.Random(seed), defaultdict(list)
    for e in load_exchanges():
        if e.author not in HELD_OUT_AUTHORS and e.grade >= 2 and len(e.reply.split()) <= LONGEST:
            replies_of[e.id].append(e)
    wishes = {(profile.id, profile.intention): profile for profile in with_every_intention(profiles)}
    return [written_dialogue(p, replies_of[p.id], wishes, chat, think, rng) for p in profiles if replies_of[p.id]]


def written_dialogue(profile: Profile, replies: list[Exchange], wishes: dict, chat: Chat, think: bool, rng) -> Dialogue:
    """A tree: each message of the person in as many versions as replies were written to it, as the offline user would say it:
    pleased with a reply that did the same, or displeased with one that did something else, and mostly with a hint."""
    story, past = (profile.first_talk, *profile.facts), Dialogue(User(profile, RLVER.start), RLVER.start)
    turns, replies_before = [], {}  # act: a reply to the message before
    past_reply, past_act = None, ""  # what the person was displeased with
    for told in sorted({e.turn for e in replies})[:TOLD]:
        here = [e for e in replies if e.turn == told]
        displeased = rng.choice(DISPLEASED[profile.main_cha])  # the same for all: what begins alike is computed once
        replies_here = {}
        for e in rng.sample(here, len(here)):
            wish, message = wishes.get((profile.id, e.act), profile), [story[told]]
            pleased = e.act in replies_before and (e.act == past_act or rng.random() < PLEASED)
            if past_reply:
                message.insert(0, rng.choice(wish.pleased) if pleased else displeased)
            if not pleased and e.act == wish.intention and rng.random() < HINTED:
                message.append(rng.choice(wish.hints))
            if past_reply:
                past.turns = [replies_before[e.act] if pleased else past_reply]
                past.turns[0].reaction = Reaction(Appraisal(0), RLVER.start, " ".join(message), False)
            else:
                past.user.messages = [" ".join(message)]
            prompt_ids, _ = next_prompt(chat, past, think)
            ids = chat.text_ids(f"{e.thought}</think>\n{e.reply}" if think else e.reply) + [chat.stop_id]
            turns.append(Turn(prompt_ids, ids, [0.0] * len(ids), True, e.thought, e.reply, True))
            replies_here[e.act], last_act = turns[-1], e.act
        replies_before, past_reply, past_act = replies_here, turns[-1], last_act
    return Dialogue(past.user, RLVER.start, turns)


def train_on(policy: Policy, dialogues: list[Dialogue], seed: int = 0) -> None:
    """AdamW on the replies' tokens alone, the learning rate falling to 0."""
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    order = [d for epoch in range(EPOCHS) for d in random.Random(f"{seed} {epoch}").sample(dialogues, len(dialogues))]
    steps = range(0, len(order), PERSONS_A_STEP)
    with tqdm(steps, desc="cold start", unit="step", leave=False) as bar:
        for first in bar:
            batch, loss = make_batch(order[first : first + PERSONS_A_STEP], "terminal"), 0.0
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


def cold_start(
    model: str, think: bool, layers: int | None, dtype: torch.dtype, profiles: list[Profile], strangers: list[Profile]
) -> Path:
    """The folder of the model after supervised learning of its upper `layers` on what was written for `profiles`; made at most
    once for the same data, code, model and dtype. `strangers` are persons to tell the loss on."""
    here = Path(__file__).parent
    parts = [
        EXCHANGES.read_bytes(),
        HINTS.read_bytes(),
        WORDS_FILE.read_bytes(),
        *(
            here.joinpath(f"{name}.py").read_bytes()
            for name in ("sft", "exchanges", "simulator", "policy", "rollout", "prefix_tree")
        ),
    ]
    parts += [repr((model, think, layers, dtype, torch.__version__, profiles)).encode()]
    folder = cache_folder() / f"cold-start-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    loaded, tokenizer = load_model(model)
    train_upper_layers(loaded, layers)
    chat, policy = Chat(tokenizer, instructions(think)), Policy(loaded, dtype=dtype)
    written, held_out = written_dialogues(profiles, chat, think), written_dialogues(strangers, chat, think)
    if not written or not held_out:
        raise ValueError("--cold-start: nothing was written for these profiles; use --cold-start none")
    before = loss_on(policy, held_out)
    train_on(policy, written)
    save_model(loaded, tokenizer, folder)
    write_whole(folder / "loss.json", json.dumps({"before": before, "after": loss_on(policy, held_out)}))
    return folder
