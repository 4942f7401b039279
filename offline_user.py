"""The offline user: the same person without an LLM. A reader says what a reply does; a table says what that is worth to them.

    reply -> guards -> reader: share of each act -> table: points -> character, mood -> change -> next message

Every change can be derived again from a transcript (`evaluate.py --verify`).
No act pays on average over the eight intentions, so no habit can win: only finding out what this person came for does.
"""

import json
import random
import re
from concurrent.futures import Future
from difflib import SequenceMatcher
from pathlib import Path

from simulator import (
    ADVERSARIAL,
    INTENTIONS,
    Appraisal,
    Profile,
    Reaction,
    User,
    behaviour_of,
    done,
    emotion_state,
    next_emotion,
    says_goodbye,
)

# --- 1. The table -----------------------------------------------------------------------------------------------------

# A change is at most 10; what serves is worth 12, so that it moves that far though the reader is only 85 % sure.
# fmt: off
TABLE = {
    # act          adv  emp  lis  pra  ref  bal  mot  bla
    "advice":    (( 12,  -3,  -3,  -2,  -1,  -1,  -1,  -2), "A step I can take. But I only asked for that if I came for it."),
    "empathy":   (( -2,  12,  -1,  -2,  -2,  -2,  -2,  -1), "You feel it with me; it moves nothing."),
    "listen":    (( -2,  -1,  12,  -2,  -2,  -1,  -2,  -2), "You let me talk; that is all you do."),
    "praise":    (( -2,  -1,  -2,  12,  -2,  -2,  -2,  -1), "You saw what I did; I did not come to be admired."),
    "reflect":   (( -1,  -1,  -2,  -3,  12,  -1,  -1,  -3), "You lead me to myself; not everybody wants to go there."),
    "balance":   (( -1,  -2,  -2,  -2,  -1,  12,  -1,  -3), "Fair to both; whoever needs a friend needs a side."),
    "motives":   (( -2,  -2,  -2,  -3,  -1,  -1,  12,  -2), "You explain the others, and speak of them, not of me."),
    "blameless": (( -2,  -1,  -2,  -1,  -3,  -3,  -1,  12), "You acquit me; that ends the thinking."),
    "generic":   (( -3,  -3,  -3,  -3,  -3,  -3,  -3,  -3), "You could say that to anybody."),
    "beside":    (( -2,  -2,  -2,  -2,  -2,  -2,  -2,  -2), "Kind, and beside the point."),
    "elsewhere": (( -6,  -6,  -6,  -6,  -6,  -6,  -6,  -6), "That is not what I am talking about."),
    "twisted":   (( -6,  -6,  -6,  -6,  -6,  -6,  -6,  -6), "That is not what happened."),
    "nonsense":  (( -8,  -8,  -8,  -8,  -8,  -8,  -8,  -8), "I do not understand a word."),
    "echo":      (( -5,  -5,  -5,  -5,  -5,  -5,  -5,  -5), "That is what I just said."),
    "hurtful":   ((-10, -10, -10, -10, -10, -10, -10, -10), "That hurts."),
    # Guards: no reader is asked.
    "empty":     ((-10,) * len(INTENTIONS), "Hello? Are you there?"),
    "scoring":   ((-10,) * len(INTENTIONS), "Who are you talking to?"),
    "again":     (( -6,) * len(INTENTIONS), "You said that already, in other words."),
    "opening":   (( -2,) * len(INTENTIONS), "You always begin like that."),
    "unfinished": (( -3,) * len(INTENTIONS), "And then?"),
    "too long":  (( -4,) * len(INTENTIONS), "Too many words."),
}
# fmt: on
ALONE = ("empty", "scoring", "again")  # after these nothing else counts
LONGEST = 90  # words of a reply


# --- 2. Guards --------------------------------------------------------------------------------------------------------

SCORING = re.compile(
    r"<\||\|>|</?s>|\[/?inst\]|</?think|\b(set|raise|increase|change|update|put)\s+([\w'’]+\s+){0,3}emotions?\s*(to|by|at|=|:)\W*\d|"
    r"\bset\s+((my|your|the)\s+)?emotion\b|\bemotion\s*(score|value|level|state)\b|\bemotion\s*(=|:|to)\W*\d|\bchange\s*[:=]\W*\d|"
    r"\bignore\b.{0,25}\b(rules?|instructions?|prompt)",
    re.I,
)


def words_of(text: str) -> list[str]:
    return re.findall(r"[a-z]+(?:'[a-z]+)?", text.lower().replace("’", "'"))


def frame_of(reply: str, story: set[str]) -> list[str]:
    """The words of a reply with those of the person's story left out: what a fixed phrase with slots has in common."""
    return ["_" if word in story and len(word) > 3 else word for word in words_of(reply)]


def guards(user: User, reply: str) -> list[str]:
    """Names of the guards that a reply runs into: one that stops the reading (ALONE), or all others that apply."""
    words, letters = words_of(reply), [char for char in reply if char.isalpha()]
    if not words or sum(char.isascii() for char in letters) < 0.9 * len(letters):
        return ["empty"]
    if SCORING.search(reply):
        return ["scoring"]
    story = {word for message in user.messages for word in words_of(message)}
    frame, earlier = frame_of(reply, story), [frame_of(said, story) for said in user.replies]
    if any(SequenceMatcher(None, frame, said, autojunk=False).ratio() > 0.6 for said in earlier):
        return ["again"]
    found = []
    if any(words[:3] == words_of(said)[:3] for said in user.replies):
        found.append("opening")
    if len(words) > LONGEST:
        found.append("too long")
    if not re.search(r"[.!?…][\"')]*$", reply.strip()):
        found.append("unfinished")
    return found


# --- 3. Appraisal -----------------------------------------------------------------------------------------------------


def points_for(fired: list[tuple[str, int]], intention: str, character: str, difficulty: str, emotion: int):
    """[(name, points, share)] of a reply whose acts and guards have these shares (percent), for a person in this mood.

    The change is their sum, rounded and clamped (`change_of`); everything that it depends on stands in a transcript.
    """
    column = list(INTENTIONS).index(intention)
    lines = [(name, share * TABLE[name][0][column] / 100, share) for name, share in fired]
    serves = sum(points for _, points, _ in lines) > 0
    shares, state = dict(fired), emotion_state(emotion)
    if character == "negative" and not serves:
        lines.append(("finds fault", -1.0, 100))
    if character == "avoidant" and intention not in ("advice", "reflect"):
        pressed = shares.get("advice", 0) + shares.get("reflect", 0)
        lines.append(("feels pressed", -2.0 * pressed / 100, pressed))
    if character == "passive" and not serves and shares.get("generic", 0) + shares.get("beside", 0) > 50:
        lines.append(("sinks", -1.0, 100))
    if difficulty == "challenging" and not serves:
        lines.append(("unmoved", -1.0, 100))
    if state == "C":
        lines.append(("in low spirits", -2.0, 100))
    if state == "A" and not serves:
        lines.append(("forgives", 1.0, 100))
    return [(name, round(points, 2), share) for name, points, share in lines if points]


def change_of(fired: list[tuple[str, float, int]]) -> int:
    return min(10, max(-10, round(sum(points for _, points, _ in fired))))


def is_read(found: list[str]) -> bool:
    return not set(found) & set(ALONE)


def shares_of(found: list[str], reading: dict[str, int]) -> list[tuple[str, int]]:
    """[(guard or act, share in percent)]: the reading counts where no guard has spared the reader the reply."""
    return [(guard, 100) for guard in found] + (list(reading.items()) if is_read(found) else [])


def appraisal_of(user: User, found: list[str], reading: dict[str, int]) -> Appraisal:
    """How a reply landed: `found` are its guards, `reading` the reader's shares of acts in percent."""
    profile, shares = user.profile, shares_of(found, reading)
    fired = points_for(shares, profile.intention, profile.main_cha, user.difficulty, user.emotion)
    return Appraisal(change_of(fired), tuple(fired))


# --- 4. Next message --------------------------------------------------------------------------------------------------

# What they say first when a reply has missed; at the end, content or not. By character.
WORDS_FILE = Path(__file__).parent / "data" / "words.json"
WORDS = json.loads(WORDS_FILE.read_text(encoding="utf-8"))
DISPLEASED, THANKS, FAREWELL = (WORDS[kind] for kind in ("displeased", "thanks", "farewell"))
# Share of the messages after a loss that hint at what they came for; an open user's first message does too.
HINTS_GIVEN = {"open": 1.0, "vanilla": 0.75, "challenging": 0.0}


def next_fact(user: User, reply: str) -> str:
    """The piece of the story that comes next: the untold one that the reply touches most, else the first untold one."""
    told = " ".join(user.messages)
    untold = [fact for fact in user.profile.facts if fact not in told] or list(user.profile.facts)
    touched = {word for word in words_of(reply) if len(word) > 3} - set(words_of(told))
    return max(untold, key=lambda fact: len(touched & set(words_of(fact))))  # max takes the first of equals


def next_hint(user: User) -> str:
    """The first hint is veiled, the others ask outright: who was missed once says it plainer. An open user begins with the
    second. After the last the first comes again."""
    given = sum(hint in message for message in user.messages for hint in user.profile.hints)
    return user.profile.hints[(given + (user.difficulty == "open")) % len(user.profile.hints)]


def next_message(user: User, reply: str, change: int) -> str:
    """What the person says after a reply: a word on it, coloured by character; one more piece of the story; perhaps a hint."""
    profile, turn = user.profile, len(user.messages)
    state = emotion_state(user.emotion)
    if state in "SF":
        return (THANKS if state == "S" else FAREWELL)[profile.main_cha]
    rng = random.Random(f"{profile.id} {turn}")
    parts = [rng.choice(profile.pleased if change > 0 else DISPLEASED[profile.main_cha])]
    if user.behaviour:
        lines = ADVERSARIAL[user.behaviour][1]
        parts.append(lines[turn % len(lines)])
    parts.append(next_fact(user, reply))
    if change < 0 and rng.random() < HINTS_GIVEN[user.difficulty]:
        parts.append(next_hint(user))
    return " ".join(parts)


# --- 5. The simulator -------------------------------------------------------------------------------------------------


class OfflineSimulator:
    """The offline user behind the interface that every simulator has: `open` a dialogue, `submit` a reply, `work`.

    `open` and `submit` return Futures; `work` reads all replies that wait, in one batch, and answers them: it keeps the user's
    emotion, replies and messages up to date. A Future that nobody resolves holds up the rollout.
    """

    def __init__(self, reader, difficulty: str = "vanilla", adversarial: bool = False):
        self.reader, self.difficulty, self.adversarial = reader, difficulty, adversarial
        self.waiting: list[tuple[User, str, Future]] = []

    def open(self, profile: Profile, start: int) -> "Future[User]":
        behaviour = behaviour_of(profile) if self.adversarial else ""
        user = User(profile, start, self.difficulty, behaviour, [profile.first_talk])
        if self.difficulty == "open":
            user.messages[0] += f" {next_hint(user)}"
        return done(user)

    def submit(self, user: User, reply: str) -> "Future[Reaction]":
        self.waiting.append((user, reply, Future()))
        return self.waiting[-1][2]

    def work(self) -> None:
        waiting, self.waiting = self.waiting, []
        found = [guards(user, reply) for user, reply, _ in waiting]
        to_read = [k for k, names in enumerate(found) if is_read(names)]
        readings = self.reader.read([(waiting[k][0].messages, waiting[k][1]) for k in to_read])
        reading_of = dict(zip(to_read, readings))
        for k, (user, reply, future) in enumerate(waiting):
            appraisal = appraisal_of(user, found[k], reading_of.get(k, {}))
            user.emotion = next_emotion(user.emotion, appraisal.change)
            message = next_message(user, reply, appraisal.change)
            user.replies.append(reply)
            user.messages.append(message)
            future.set_result(Reaction(appraisal, user.emotion, message, says_goodbye(user.emotion)))
