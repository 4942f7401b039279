"""The cold start: what is learned from, and hints for every hidden intention."""

import copy
import json
import random
import re
import shutil

import pytest
import torch
from conftest import ROOT, tiny_model
from transformers import AutoModelForCausalLM

import sft
from exchanges import HELD_OUT_AUTHORS, PLAIN, Exchange, load_exchanges
from offline_user import DISPLEASED
from policy import Policy, load_model
from rollout import Dialogue, Turn
from sft import STORY_TOKENS, cold_start, loss_on, stories, train_on, written_dialogues
from simulator import INTENTIONS, User, load_profiles, with_every_intention


@pytest.fixture(scope="module")
def persons():
    return load_profiles(ROOT / "data" / "train_profiles.jsonl")


def test_every_training_person_comes_with_every_intention_and_its_own_hints(persons):
    everyone = with_every_intention(persons)
    assert {(p.id, p.intention) for p in everyone} == {(p.id, key) for p in persons for key in INTENTIONS}
    assert len(everyone) == len(INTENTIONS) * len(persons) and everyone[: len(persons)] == persons
    held_out = [p for name in ("validation", "test") for p in load_profiles(ROOT / "data" / f"{name}_profiles.jsonl")]
    for lines in (lambda p: p.hints, lambda p: p.pleased):
        meant = {(line.lower(), p.intention) for p in everyone for line in lines(p)}
        assert len({line for line, _ in meant}) == len(meant), "a line tells one intention"
        assert not {line for line, _ in meant} & {line.lower() for p in held_out for line in lines(p)}
    assert not any(p.task in line for p in [*everyone, *held_out] for line in p.hints + p.pleased)
    assert with_every_intention(held_out) == held_out, "who is held out keeps to what is in its file"


def test_only_plain_replies_are_learned(persons, chat, monkeypatch):
    reply = lambda text, author=PLAIN, at=0: Exchange(persons[at].id, 0, "advice", 2, "", author, "Hm.", text)
    kept = [reply("Two."), reply("Three.", PLAIN + "2")]
    others = [reply("Another's.", at=2), reply("Richer.", "a"), reply("Said.", "policy")]
    monkeypatch.setattr(sft, "load_exchanges", lambda: [*others, *kept])
    (dialogue,) = written_dialogues(persons[:2], chat, think=False)
    assert dialogue.user.profile is persons[0]
    assert {turn.reply for turn in dialogue.turns} == {e.reply for e in kept}


@pytest.mark.parametrize("think", (False, True))
def test_the_person_tells_the_story_in_order_and_is_displeased_where_it_hints(persons, chat, think):
    """What the model learns to answer is what the offline user says: a word on the reply before, one more piece, a hint."""
    everyone = with_every_intention(persons)
    hints = {(p.id, hint) for p in everyone for hint in p.hints}
    pleased = {(p.id, p.intention): p.pleased for p in everyone}
    written, hinted = {(e.id, e.reply): e for e in load_exchanges()}, 0
    for dialogue in written_dialogues(persons[:8], chat, think):
        person, told = dialogue.user.profile, []
        story = (person.first_talk, *person.facts)
        for turn in dialogue.turns:
            at, act = (getattr(written[person.id, turn.reply], name) for name in ("turn", "act"))
            told += [at] * (at not in told)
            said = re.findall(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", chat.tokenizer.decode(turn.prompt_ids), re.S)
            assert [next(k for k, piece in enumerate(story) if piece in text) for text in said] == told
            hint = any(hint in said[-1] for who, hint in hints if who == person.id)
            words = [*DISPLEASED[person.main_cha], *([] if hint else pleased[person.id, act])]
            assert said[-1].startswith(tuple(words) if len(told) > 1 else person.first_talk)
            hinted += hint and len(told) > 1
    assert told == sorted(told) and len(told) > 3 and hinted > 20


@pytest.mark.parametrize("think", (False, True))
def test_a_hint_comes_before_a_reply_that_does_what_it_asks_for(persons, chat, think):
    """Plain replies, each once; about eight in ten after a hint, which is its act's."""
    written = {(e.id, e.reply): e for e in load_exchanges()}
    everyone = with_every_intention(persons)
    hints = {(p.id, hint): p.intention for p in everyone for hint in p.hints}
    pleased = {(p.id, line): p.intention for p in everyone for line in p.pleased}
    hinted = replies = 0
    for dialogue in written_dialogues(persons[:20], chat, think):
        name, seen = dialogue.user.profile.id, set()
        for turn in dialogue.turns:
            e, prompt = written[name, turn.reply], chat.decode(turn.prompt_ids)
            assert e.grade >= 2 and e.author.startswith(PLAIN) and e.author not in HELD_OUT_AUTHORS
            asked = prompt.rpartition("<|im_start|>user\n")[2]
            acts = {act for (who, hint), act in hints.items() if who == name and hint in asked}
            assert acts in (set(), {e.act}) and turn.reply not in seen
            assert {act for (who, line), act in pleased.items() if who == name and asked.startswith(line)} <= {e.act}
            text = chat.decode(turn.sampled_ids)
            assert text == (f"{e.thought}</think>\n{e.reply}" if think else e.reply)
            assert prompt.endswith("<think>\n" if think else "assistant\n") and turn.sampled_ids[-1] == chat.stop_id
            seen.add(turn.reply)
            hinted, replies = hinted + bool(acts), replies + 1
    assert replies > 200 and 0.6 < hinted / replies < 0.8


def test_the_cold_start_learns_the_replies_and_nothing_else(persons, model, chat):
    """The loss is on replies alone: their log-probs rise, and what the person says is not in it."""
    dialogues = written_dialogues(persons[:2], chat, think=False)
    policy = Policy(model)
    before = loss_on(policy, dialogues)
    ids = [turn.prompt_ids + turn.sampled_ids for dialogue in dialogues for turn in dialogue.turns]
    lost = tokens = 0.0
    for row, turn in zip(ids, [turn for dialogue in dialogues for turn in dialogue.turns]):
        with torch.no_grad():
            log_probs = model(torch.tensor([row])).logits[0].log_softmax(-1)
        start = len(turn.prompt_ids)
        lost -= sum(log_probs[k - 1, row[k]].item() for k in range(start, len(row)))
        tokens += len(row) - start
    assert before == pytest.approx(lost / tokens, abs=1e-4)
    train_on(policy, dialogues * 4, stories(persons[:2], chat))
    assert loss_on(policy, dialogues) < before - 0.1


def test_a_step_of_the_cold_start_is_adam_on_the_replies_log_prob_and_the_kl_to_the_start_on_a_text(monkeypatch):
    """A few replies of one person a step, persons in a shuffled order, the gradient clipped at norm 1, a learning rate that falls
    to 0."""
    monkeypatch.setattr(sft, "REPLIES_A_STEP", 2)
    rng = torch.Generator().manual_seed(0)
    ids = lambda count: torch.randint(3, 250, (count,), generator=rng).tolist()
    turn = lambda told, said: Turn(ids(told), ids(said), [0.0] * said, True, "", "", True)
    sizes = ((9, 3), (22, 9), (4, 1), (30, 2), (12, 6))
    dialogues = [Dialogue(User(None, 30), 30, [turn(*size), turn(*size)]) for size in sizes]
    dialogues[0].turns.append(turn(8, 5))
    model = tiny_model()
    model.lm_head.weight.data *= 15
    start, slow = copy.deepcopy(model), copy.deepcopy(model)
    texts = [ids(7), ids(12)]
    train_on(Policy(model), dialogues, texts, seed=5)
    optimizer = torch.optim.AdamW(slow.parameters(), lr=sft.LEARNING_RATE, weight_decay=0.0)
    parts, norms = [], []
    for dialogue in random.Random("5 0").sample(dialogues, 5):
        parts += [dialogue.turns[:2], dialogue.turns[2:]] if dialogue is dialogues[0] else [dialogue.turns]
    for step, part in enumerate(parts):
        log_probs = []
        for turn in part:
            logits = slow(torch.tensor([turn.prompt_ids + turn.sampled_ids])).logits[0, len(turn.prompt_ids) - 1 : -1]
            log_probs.append(logits.log_softmax(-1)[range(len(turn.sampled_ids)), turn.sampled_ids])
        optimizer.zero_grad()
        text = torch.tensor([texts[step % 2]])
        was, now = (net(text).logits[0].log_softmax(-1) for net in (start.requires_grad_(False), slow))
        (-torch.cat(log_probs).mean() + (was.exp() * (was - now)).sum(-1).mean()).backward()
        norms.append(torch.nn.utils.clip_grad_norm_(slow.parameters(), 1.0).item())
        optimizer.param_groups[0]["lr"] = sft.LEARNING_RATE * (1 - step / 6)
        optimizer.step()
    moved, apart = (
        sum((a - b).abs().sum().item() for a, b in zip(slow.parameters(), other.parameters()))
        for other in (start, model)
    )
    assert max(norms) > 1.2 * min(norms) > 1.2 and apart < 1e-3 * moved


def test_what_must_not_be_forgotten_is_each_persons_story_as_plain_text(persons, chat):
    texts = stories(persons[:9], chat)
    for person, text in zip(persons, texts):
        assert text == chat.text_ids(" ".join((person.first_talk, *person.facts)))[:STORY_TOKENS]
    assert len({tuple(text) for text in texts}) == 9 and max(map(len, texts)) == STORY_TOKENS


def test_a_cold_start_is_made_once_for_the_same_settings_and_told_on_strangers(
    persons, chat, tiny_folder, tmp_path, monkeypatch
):
    """Only the upper layers learn; loss.json is of persons that were not trained on."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    model, tokenizer = load_model(str(tiny_folder))
    settings = dict(model=str(tiny_folder), think=False, layers=1, device="cpu", dtype=torch.float32)
    settings |= dict(profiles=persons[:1], strangers=persons[1:2])
    folder = cold_start(**settings)
    learned = AutoModelForCausalLM.from_pretrained(folder)
    moved = {name for (name, a), b in zip(learned.named_parameters(), model.parameters()) if (a != b).any()}
    assert moved and all(name.startswith(("model.layers.2.", "model.norm.")) for name in moved)
    loss = json.loads((folder / "loss.json").read_text())
    told = sft.Chat(tokenizer, sft.instructions(False))
    strangers = written_dialogues(persons[1:2], told, False)
    assert loss["before"] == pytest.approx(loss_on(Policy(model), strangers), abs=1e-4)
    assert loss["after"] == pytest.approx(loss_on(Policy(learned), strangers), abs=1e-4)
    made = []
    monkeypatch.setattr(sft, "train_on", lambda policy, dialogues, texts: made.append(texts))
    monkeypatch.setattr(sft, "loss_on", lambda policy, dialogues: 0.0)
    assert cold_start(**settings) == folder and not made
    others = [dict(think=True), dict(layers=2), dict(dtype=torch.bfloat16), dict(profiles=persons[2:3])]
    assert len({folder, *(cold_start(**settings | other) for other in others)}) == 5 and len(made) == 4
    assert made[0] == stories(persons[:1], told) and made[3] == stories(persons[2:3], told), "not the strangers'"
    with pytest.raises(ValueError, match="--cold-start none"):
        cold_start(**settings | dict(profiles=persons[3:4], strangers=[]))


def test_a_folder_with_another_model_in_it_gets_another_cold_start(persons, tiny_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sft, "train_on", lambda policy, dialogues, texts: None)
    model = shutil.copytree(tiny_folder, tmp_path / "model")
    make = lambda: cold_start(str(model), False, 1, "cpu", torch.float32, persons[:1], persons[1:2])
    assert (first := make()) == make()
    tiny_model(seed=1).save_pretrained(model)
    assert make() != first


def test_a_cold_start_asks_no_other_process(persons, tiny_folder, tmp_path, monkeypatch):
    """On several ranks one makes it while the others wait for it: a question to them would never be answered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("distributed.world_size", lambda: 2)  # without a process group a question raises
    assert cold_start(str(tiny_folder), False, 1, "cpu", torch.float32, persons[:1], persons[1:2]).is_dir()


def test_hints_are_read_from_one_file(persons, tmp_path):
    row = {"id": persons[0].id, "intention": "advice", "hints": ["What now?"], "pleased": ["Ah."]}
    (tmp_path / "hints.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "nobody"}))
    *same, other = with_every_intention(persons, tmp_path / "hints.jsonl")
    assert same == persons and (other.id, other.intention, other.hints) == (persons[0].id, "advice", ("What now?",))
