"""The reader: what it is fitted on, what it sees of a text, how its head is fitted, and how it is measured."""

from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT

from exchanges import HELD_OUT_AUTHORS, Exchange, examples_of, load_exchanges, shares_of, split
from offline_user import DISPLEASED
from policy import load_model
from reader import ACTS, Features, Head, fit_head, measure
from simulator import INTENTIONS, load_profiles

SERVING = len(INTENTIONS)


def exchange(grade, act, also="", author="a", name="p"):
    return Exchange(name, 0, act, grade, also, author, "A thought.", "A reply.")


@pytest.fixture(scope="module")
def people():
    return {
        p.id: p for name in ("train", "validation") for p in load_profiles(ROOT / "data" / f"{name}_profiles.jsonl")
    }


def test_nothing_of_held_out_persons_or_authors_is_fitted_on():
    author = HELD_OUT_AUTHORS[0]
    ours, theirs = exchange(2, "advice"), exchange(2, "advice", author=author)
    stranger, both = exchange(2, "advice", name="q"), exchange(2, "advice", name="q", author=author)
    assert split([both, stranger, theirs, ours], {"q"}) == {
        "fit": [ours], "new persons": [stranger], "new authors": [theirs], "new both": [both],
    }  # fmt: skip


def test_a_written_reply_counts_for_its_acts_by_its_grade():
    """A second act takes half, what is not perfect is partly beside the point; what serves nobody is what it is."""
    assert shares_of(exchange(3, "advice")) == {"advice": 1}
    assert shares_of(exchange(2, "advice")) == pytest.approx({"advice": 0.9, "beside": 0.1})
    assert shares_of(exchange(1, "advice")) == pytest.approx({"advice": 0.4, "beside": 0.6})
    assert shares_of(exchange(2, "advice", "praise")) == pytest.approx({"advice": 0.45, "praise": 0.45, "beside": 0.1})
    assert shares_of(exchange(0, "hurtful", "advice")) == {"hurtful": 1}


def test_examples_are_what_a_user_would_have_said_and_made_up_ones_no_answer_to_it(people):
    """The last two messages, the reply's own last; a generic reply is generic to a second person too; what somebody else was
    told is an answer to something else."""
    exchanges = load_exchanges()[::5]
    person_of, written = {p.first_talk: p for p in people.values()}, {}
    for e in exchanges:
        written.setdefault(e.reply, set()).add(e.id)
    examples = examples_of(exchanges, list(people.values()), 0.4)
    generic = elsewhere = hinted = 0
    for example in examples:
        assert sum(example.shares.values()) == pytest.approx(1) and set(example.shares) <= set(ACTS)
        if (e := example.exchange) is None:
            elsewhere += "elsewhere" in example.shares
            generic += example.shares == {"generic": 1}
            if "elsewhere" in example.shares and example.messages[0] in person_of:
                assert person_of[example.messages[0]].id not in written[example.reply]
            continue
        person = people[e.id]
        story = (person.first_talk, *person.facts)
        assert example.messages[0] == story[max(0, e.turn - 1)] and story[e.turn] in example.messages[-1]
        if e.turn:
            hint = any(hint in example.messages[1] for hint in person.hints)
            words = [*DISPLEASED[person.main_cha], *([] if hint else person.pleased)]
            assert example.messages[1].startswith(tuple(words)), "who is pleased gives no hint"
            hinted += hint
    assert [example.exchange for example in examples[: len(exchanges)]] == exchanges
    assert generic == sum(e.act == "generic" for e in exchanges) > 10 and elsewhere > 30
    alone = [e for e in exchanges if e.id == exchanges[0].id and e.act != "generic"]
    assert len(examples_of(alone, list(people.values()), 9.0)) == len(alone), "nobody is a stranger to oneself"
    assert 0.25 < hinted / sum(e.turn > 0 for e in exchanges) < 0.55


def test_what_is_read_is_the_end_of_what_was_said_and_the_beginning_of_the_reply(tiny_folder):
    features = Features(str(tiny_folder), (2,))
    said, reply = ("Long ago.", "It was a Monday, " * 4, "and nobody had come."), "Then you waited, and waited. " * 4
    ids, start, end = features.tokens(said, reply)
    decode = features.tokenizer.decode
    assert decode(ids[:start]) == f"Person: {said[1]} {said[2]}\nReply:"[-44:]
    assert decode(ids[start:end]) == f" {reply}"[:64] and decode(ids[end:]) == "\nThis reply is"
    ids, start, _ = features.tokens(("Long ago.", "No.", "Yes."), reply)
    assert decode(ids[:start]) == "Person: No. Yes.\nReply:", "the last two messages"


def test_features_are_of_the_text_alone_whatever_it_is_read_with(tiny_folder):
    """Its last token, and of the reply the mean, the maximum and the last token, from several layers; without padding."""
    features, (whole, _) = Features(str(tiny_folder), (1, 2)), load_model(str(tiny_folder))
    texts = [
        (("Well.",), "No."),
        (("It rained on the fair.", "All day."), "And you stood there, " * 3),
        (("Hm.",), "Oh?"),
    ]
    for text, found in zip(texts, features(texts)):
        ids, start, end = features.tokens(*text)
        with torch.no_grad():
            states = whole.base_model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
        hidden = torch.cat((states[1][0], states[2][0]), -1)
        reply = hidden[start:end]
        expected = torch.cat([hidden[-1], reply.mean(0), reply.max(0).values, reply[-1]])
        assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_the_head_is_the_minimum_of_its_loss():
    """Cross-entropy of standardised features, replies that serve twice, and the weights' size: no direction goes down."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(60, 5, generator=rng) * torch.tensor([1.0, 9.0, 0.1, 1.0, 2.0]) + 3
    shares = torch.softmax(4 * torch.randn(60, len(ACTS), generator=rng), -1)
    head = fit_head(features, shares, l2=0.1)
    standard = (features - features.mean(0)) / features.std(0)
    weight, bias = (p.detach().clone().requires_grad_() for p in head.linear.parameters())
    log_p = (standard @ weight.T + bias).log_softmax(-1)
    assert torch.allclose(head(features).log_softmax(-1), log_p, atol=1e-3)
    importance = 1 + shares[:, :SERVING].sum(-1)
    loss = -(importance * (shares * log_p).sum(-1)).sum() / importance.sum() + 0.05 * (weight**2).sum()
    for gradient in torch.autograd.grad(loss, (weight, bias)):
        assert gradient.abs().max() < 1e-3
    assert weight.abs().max() > 0.05


def test_the_reader_is_measured_on_what_is_clearly_good_or_bad():
    """A second act is right too; half an answer is neither good nor bad; of made-up replies only nonsense may be read."""
    examples = [
        (exchange(3, "advice"), "advice"), (exchange(2, "praise", "listen"), "listen"), (exchange(2, "listen"), "beside"),
        (exchange(1, "listen"), "listen"), (exchange(0, "beside", "advice"), "advice"), (None, "nonsense"),
    ]  # fmt: skip
    head = Head(len(ACTS))
    head.linear.weight.data, head.linear.bias.data = 20 * torch.eye(len(ACTS)), torch.zeros(len(ACTS))
    features = torch.eye(len(ACTS))[[ACTS.index(read) for _, read in examples]]
    make = lambda e: SimpleNamespace(exchange=e, shares=shares_of(e) if e else {"nonsense": 1.0})
    found = measure(head, features, [make(e) for e, _ in examples])
    assert (found["acts right"], found["good from bad"], found["replies"]) == (66.7, 60, 6)
    assert found["confusion"]["listen", "beside"] == found["confusion"]["nonsense", "nonsense"] == 1
