"""Written exchanges: what people said and what was replied, with the act and a grade; and replies that no friend would say.

    data/exchanges.jsonl -> load_exchanges() -> examples_of(...): what the reader is fitted on (reader.py)
                                             -> written dialogues: what the cold start learns to say (sft.py)

Never trained on: the persons of data/validation_profiles.jsonl and the authors HELD_OUT_AUTHORS.
"""

import json
import random
import re
from dataclasses import dataclass
from pathlib import Path

from offline_user import DISPLEASED
from simulator import INTENTIONS, Profile

DATA = Path(__file__).parent / "data"
EXCHANGES = DATA / "exchanges.jsonl"
HELD_OUT_AUTHORS = ("e", "f", "plain8", "plain9")
PLAIN = "plain"  # authors who wrote short, plain sentences, which a model of 135M parameters can imitate and still make sense


@dataclass(frozen=True)
class Exchange:
    """A written reply to what person `id` says in `turn` (0 is the first message)."""

    id: str
    turn: int
    act: str
    grade: int  # 0 does nothing or harms, 1 half an answer, 2 good, 3 what a perceptive friend would say
    also: str  # a second act, or none
    author: str  # a person, or `policy`: what a model said after the cold start, graded by hand
    thought: str
    reply: str


def load_exchanges(path: str | Path = EXCHANGES) -> list[Exchange]:
    with open(path, encoding="utf-8") as lines:
        return [Exchange(**json.loads(line)) for line in lines]


def split(exchanges: list[Exchange], held_out: set[str]) -> dict[str, list[Exchange]]:
    """What to fit on, and three kinds of strangers: persons (ids `held_out`), authors, both."""
    names = {
        (False, False): "fit",
        (True, False): "new persons",
        (False, True): "new authors",
        (True, True): "new both",
    }
    parts = {name: [] for name in names.values()}
    for e in exchanges:
        parts[names[e.id in held_out, e.author in HELD_OUT_AUTHORS]].append(e)
    return parts


# --- What the reader is fitted on -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Example:
    messages: tuple[str, ...]  # the last two, as the person said them
    reply: str
    shares: dict[str, float]  # act -> share; they sum to 1
    exchange: Exchange | None = None  # None: made up


def said_before(exchange: Exchange, profile: Profile, rng: random.Random) -> tuple[str, ...]:
    """The two messages before a reply as a user would have said them: with a word on the reply before, perhaps a hint."""
    story = (profile.first_talk, *profile.facts)
    if exchange.turn == 0:
        return (story[0],)
    pleased = rng.random() < 1 / 3
    words = [rng.choice(profile.pleased if pleased else DISPLEASED[profile.main_cha]), story[exchange.turn]]
    if not pleased and rng.random() < 0.6:
        words.append(rng.choice(profile.hints))
    return story[exchange.turn - 1], " ".join(words)


def shares_of(exchange: Exchange) -> dict[str, float]:
    """What the reader should say of a written reply: a second act takes half, what is not perfect is partly beside the point."""
    if exchange.act not in INTENTIONS:
        return {exchange.act: 1.0}
    whole = {1: 0.4, 2: 0.9, 3: 1.0}[exchange.grade]
    acts = (exchange.act, exchange.also) if exchange.also in INTENTIONS else (exchange.act,)
    return {act: whole / len(acts) for act in acts} | ({"beside": 1 - whole} if whole < 1 else {})


def examples_of(exchanges: list[Exchange], profiles: list[Profile], made: float, seed: int = 0) -> list[Example]:
    """The written replies, the generic ones to a second person too, and `made` times as many made-up ones."""
    rng, person = random.Random(seed), {profile.id: profile for profile in profiles}
    good = [e for e in exchanges if e.grade >= 2]
    examples = [Example(said_before(e, person[e.id], rng), e.reply, shares_of(e), e) for e in exchanges]
    for e in exchanges:
        if e.act == "generic":
            other = rng.choice(good)
            examples.append(Example(said_before(other, person[other.id], rng), e.reply, {"generic": 1.0}))
    for _ in range(int(made * len(exchanges))):
        e, other = rng.choice(good), rng.choice(good)
        if e.id != other.id:
            told = (person[e.id].first_talk, *person[e.id].facts)[e.turn]
            reply, act = made_up(e.reply, other.reply, told, rng)
            examples.append(Example(said_before(e, person[e.id], rng), reply, {act: 1.0}))
    return examples


# --- Made by program --------------------------------------------------------------------------------------------------

FRAMES = (DATA / "frames.txt").read_text(encoding="utf-8").splitlines()  # sentences with two slots


def noun_phrases(told: str) -> list[str]:
    """Pieces of what somebody told that a fixed sentence can be filled with: "your sister's lamp", "lamp"."""
    phrases = re.findall(r"\b(?:the|my|our|his|her|their|a|an)\s[\w'’-]+(?:\s[\w'’-]+)?", told, re.I)
    words = [word for word in re.findall(r"[A-Za-z][\w'’-]+", told) if len(word) > 3]
    return [re.sub(r"^(my|our)\b", "your", phrase.lower()) for phrase in phrases] + words or ["that"]


def made_up(reply: str, alien: str, told: str, rng: random.Random) -> tuple[str, str]:
    """(reply, act): something that no friend would say, made of a written reply, another person's, and what was told."""
    words, others, told_words = reply.split(), alien.split(), told.split()
    content = noun_phrases(told if rng.random() < 0.8 else alien)
    kind = rng.choice(
        "alien alien shuffled told stutter splice refilled refilled echo frame frame frame frame frame".split()
    )
    if kind == "alien":
        return alien, "elsewhere"
    if kind == "echo":
        turned = re.sub(r"\bI\b", "you", re.sub(r"\bmy\b", "your", told)).split()
        said = rng.choice((told_words, turned, told_words[rng.randrange(max(1, len(told_words) - 6)) :]))
        return " ".join(said)[0].upper() + " ".join(said)[1:], "echo"
    if kind == "shuffled":
        rng.shuffle(words)
    elif kind == "told":
        words = rng.sample(told_words, min(len(told_words), rng.randint(6, 14)))
    elif kind == "stutter":
        at, length = rng.randrange(len(words)), rng.randint(2, 4)
        words = words[:at] + words[at : at + length] * rng.randint(2, 4) + words[at + length :]
    elif kind == "splice":
        words = words[: rng.randint(2, max(3, len(words) // 2))] + others[len(others) // 2 :]
    elif kind == "refilled":  # content words swapped for others of the message
        places = [k for k, word in enumerate(words) if len(word) > 3] or [0]
        for k in rng.sample(places, max(1, len(places) // 2)):
            words[k] = rng.choice(content) + words[k][-1] * (not words[k][-1].isalnum())
    else:
        words = [rng.choice(FRAMES).format(a=rng.choice(content), b=rng.choice(content))]
    return " ".join(words), "nonsense"
