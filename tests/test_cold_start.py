"""The cold start: what is learned from, and hints for every hidden intention."""

import json

import pytest
import torch
from conftest import ROOT

from exchanges import HELD_OUT_AUTHORS, load_exchanges
from policy import Policy
from sft import LONGEST, loss_on, train_on, written_dialogues
from simulator import INTENTIONS, load_profiles, with_every_intention


@pytest.fixture(scope="module")
def persons():
    return load_profiles(ROOT / "data" / "train_profiles.jsonl")


def test_every_training_person_comes_with_every_intention_and_its_own_hints(persons):
    everyone = with_every_intention(persons)
    assert {(p.id, p.intention) for p in everyone} == {(p.id, key) for p in persons for key in INTENTIONS}
    assert len(everyone) == 8 * len(persons) and everyone[: len(persons)] == persons
    held_out = [p for name in ("validation", "test") for p in load_profiles(ROOT / "data" / f"{name}_profiles.jsonl")]
    for lines in (lambda p: p.hints, lambda p: p.pleased):
        meant = {(line.lower(), p.intention) for p in everyone for line in lines(p)}
        assert len({line for line, _ in meant}) == len(meant), "a line tells one intention"
        assert not {line for line, _ in meant} & {line.lower() for p in held_out for line in lines(p)}
    assert not any(p.task in line for p in [*everyone, *held_out] for line in p.hints + p.pleased)
    assert with_every_intention(held_out) == held_out, "who is held out keeps to what is in its file"


@pytest.mark.parametrize("think", (False, True))
def test_a_hint_comes_before_a_reply_that_does_what_it_asks_for(persons, chat, think):
    """Good, short replies of authors that are not held out, each once; about seven in ten after a hint, which is its act's."""
    written = {(e.id, e.reply): e for e in load_exchanges()}
    everyone = with_every_intention(persons)
    hints = {(p.id, hint): p.intention for p in everyone for hint in p.hints}
    pleased = {(p.id, line): p.intention for p in everyone for line in p.pleased}
    hinted = replies = 0
    for dialogue in written_dialogues(persons[:20], chat, think):
        name, seen = dialogue.user.profile.id, set()
        for turn in dialogue.turns:
            e, prompt = written[name, turn.reply], chat.decode(turn.prompt_ids)
            assert e.grade >= 2 and e.author not in HELD_OUT_AUTHORS and len(e.reply.split()) <= LONGEST
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
    train_on(policy, dialogues * 4)
    assert loss_on(policy, dialogues) < before - 0.1


def test_hints_are_read_from_one_file(persons, tmp_path):
    row = {"id": persons[0].id, "intention": "advice", "hints": ["What now?"], "pleased": ["Ah."]}
    (tmp_path / "hints.jsonl").write_text(json.dumps(row) + "\n" + json.dumps(row | {"id": "nobody"}))
    *same, other = with_every_intention(persons, tmp_path / "hints.jsonl")
    assert same == persons and (other.id, other.intention, other.hints) == (persons[0].id, "advice", ("What now?",))
