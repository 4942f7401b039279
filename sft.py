"""The cold start: a few minutes of supervised learning on written exchanges, before any reward.

    data/exchanges.jsonl, data/hints.jsonl -> what was said, a hint, the reply that it asks for
                                           -> maximise the replies' log-probs, near the base on plain text -> the initial policy

The paper starts from Qwen2.5-7B-Instruct, which can hold such a talk already; SmolLM2-135M cannot, and what is never sampled is
never rewarded. Every training person is here with every hidden intention (data/hints.jsonl), or the model would learn by heart who
wants what. Persons that the reader holds out are not trained on. The result is kept in the user's cache.

On the persons' stories as plain text the model is held to what it predicted before, or it would forget ordinary language over two
thousand short replies (learning without forgetting: Li & Hoiem, arXiv 1606.09282).
"""

import hashlib
import json
import random
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from distributed import clip_gradients
from exchanges import EXCHANGES, PLAIN, Exchange, load_exchanges
from offline_user import DISPLEASED, WORDS_FILE
from policy import Chat, Policy, autocast, cache_folder, frozen_copy, load_model, save_model, train_upper_layers
from rollout import Dialogue, Turn, instructions, make_batch, next_prompt
from simulator import HINTS, RLVER, Appraisal, Profile, Reaction, User, with_every_intention, write_whole

EPOCHS, REPLIES_A_STEP, LEARNING_RATE = 1, 8, 4e-4
STORY_TOKENS = 128  # of a story, from its beginning
STRANGERS = 8  # persons that the loss is measured on
HINTED = 0.8  # share of replies before which the person hints at what the reply then does


def written_dialogues(profiles: list[Profile], chat: Chat, think: bool, seed: int = 0) -> list[Dialogue]:
    """One dialogue with each person, of the plain replies of data/exchanges.jsonl."""
    rng, replies_of = random.Random(seed), defaultdict(list)
    for e in load_exchanges():
        if e.author.startswith(PLAIN):
            replies_of[e.id].append(e)
    wishes = {(profile.id, profile.intention): profile for profile in with_every_intention(profiles)}
    return [written_dialogue(p, replies_of[p.id], wishes, chat, think, rng) for p in profiles if replies_of[p.id]]


def written_dialogue(profile: Profile, replies: list[Exchange], wishes: dict, chat: Chat, think: bool, rng) -> Dialogue:
    """A tree: each message of the person in as many versions as replies were written to it, as the offline user would say it:
    pleased where the reply before did the same as this one, else displeased, mostly with a hint. The next message follows the last."""
    story, past = (profile.first_talk, *profile.facts), Dialogue(User(profile, RLVER.start), RLVER.start)
    turns, past_act = [], ""
    for told in sorted({e.turn for e in replies}):
        here = [e for e in replies if e.turn == told]
        displeased = rng.choice(DISPLEASED[profile.main_cha])  # the same for all: what begins alike is computed once
        for e in (shuffled := rng.sample(here, len(here))):
            wish, message = wishes.get((profile.id, e.act), profile), [story[told]]
            if past.turns:
                message.insert(0, rng.choice(wish.pleased) if e.act == past_act else displeased)
            if e.act == wish.intention != past_act and rng.random() < HINTED:
                message.append(rng.choice(wish.hints))
            if past.turns:
                past.turns[-1].reaction = Reaction(Appraisal(0), RLVER.start, " ".join(message), False)
            else:
                past.user.messages = [" ".join(message)]
            prompt_ids, _ = next_prompt(chat, past, think)
            ids = chat.text_ids(f"{e.thought}</think>\n{e.reply}" if think else e.reply) + [chat.stop_id]
            turns.append(Turn(prompt_ids, ids, [0.0] * len(ids), True, e.thought, e.reply, True))
        past.turns, past_act = turns[-1:], shuffled[-1].act
    return Dialogue(past.user, RLVER.start, turns)


def stories(profiles: list[Profile], chat: Chat) -> list[list[int]]:
    """How each person's story begins, as plain text: token ids."""
    return [chat.text_ids(" ".join((profile.first_talk, *profile.facts)))[:STORY_TOKENS] for profile in profiles]


def kl_to_start(policy: Policy, start, ids: list[int]) -> torch.Tensor:
    """KL(start || policy) of the next token, nats, mean over the places of a text (scalar, float32)."""
    ids_1_T = torch.tensor([ids], device=policy.model.device)
    with autocast(ids_1_T.device.type, policy.dtype):
        log_probs_T_V = F.log_softmax(policy.model(ids_1_T).logits[0].float(), dim=-1)
        with torch.no_grad():
            start_log_probs_T_V = F.log_softmax(start(ids_1_T).logits[0].float(), dim=-1)
    return F.kl_div(log_probs_T_V, start_log_probs_T_V, log_target=True, reduction="batchmean")


def train_on(policy: Policy, dialogues: list[Dialogue], texts: list[list[int]], seed: int = 0) -> None:
    """AdamW, the learning rate falling to 0. A step's loss: minus the mean log-prob of the tokens of a few replies of one person,
    plus the KL to the start on one of `texts`."""
    start = frozen_copy(policy.model, dtype=policy.dtype)  # in bfloat16 rounded to it
    trained = [p for p in policy.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    order = [d for epoch in range(EPOCHS) for d in random.Random(f"{seed} {epoch}").sample(dialogues, len(dialogues))]
    parts = [
        replace(d, turns=d.turns[k : k + REPLIES_A_STEP]) for d in order for k in range(0, len(d.turns), REPLIES_A_STEP)
    ]
    with tqdm(parts, desc="cold start", unit="step", leave=False) as bar:
        for step, part in enumerate(bar):
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * (1 - step / len(parts))
            log_probs_n, _, _ = policy(make_batch([part], "terminal"), [0])
            loss = -log_probs_n.mean() + kl_to_start(policy, start, texts[step % len(texts)])
            loss.backward()
            clip_gradients(policy, 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            bar.set_postfix(loss=f"{loss.item():.2f}")


@torch.no_grad()
def loss_on(policy: Policy, dialogues: list[Dialogue]) -> float:
    """Nats per token of the written replies."""
    log_probs = [policy(make_batch([dialogue], "terminal"), [0])[0] for dialogue in dialogues]
    return -torch.cat(log_probs).mean().item()


def cold_start(
    model: str, think: bool, layers: int | None, device: str, dtype: torch.dtype, profiles: list[Profile],
    strangers: list[Profile],
) -> Path:  # fmt: skip
    """The folder of the model after supervised learning of its upper `layers` on what was written for `profiles`; made at most
    once for the same data, code, model, device and dtype. The loss is measured on a few `strangers`."""
    here = Path(__file__).parent
    files = [(file.name, file.stat().st_mtime_ns) for file in sorted(Path(model).glob("*"))]  # a folder's may change
    parts = [
        EXCHANGES.read_bytes(),
        HINTS.read_bytes(),
        WORDS_FILE.read_bytes(),
        *(
            here.joinpath(f"{name}.py").read_bytes()
            for name in ("sft", "exchanges", "simulator", "policy", "rollout", "prefix_tree")
        ),
    ]
    parts += [repr((model, files, think, layers, device, dtype, torch.__version__, profiles)).encode()]
    folder = cache_folder() / f"cold-start-{hashlib.sha256(b''.join(parts)).hexdigest()[:16]}"
    if (folder / "config.json").is_file():
        return folder
    loaded, tokenizer = load_model(model, device)
    train_upper_layers(loaded, layers)
    chat, policy = Chat(tokenizer, instructions(think)), Policy(loaded, dtype=dtype)
    written = written_dialogues(profiles, chat, think)
    held_out = written_dialogues(strangers, chat, think)[:STRANGERS]
    if not written or not held_out:
        raise ValueError("--cold-start: nothing was written for these profiles; use --cold-start none")
    before = loss_on(policy, held_out)
    train_on(policy, written, stories([d.user.profile for d in written], chat))
    save_model(loaded, tokenizer, folder)
    after = loss_on(policy, held_out)
    write_whole(folder / "loss.json", json.dumps({"before": before, "after": after}))
    print(f"cold start: {before:.2f} -> {after:.2f} nats per token of what was written for persons held out")
    return folder
