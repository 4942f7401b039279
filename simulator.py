"""The simulated user: a person with a persona, a goal, a hidden intention and an emotion that every reply moves.

Read this file first: it is the environment, and the emotion at the end of a dialogue is the reward (RLVER, arXiv 2507.03112).

    Profile -> User -> (reply -> Appraisal -> emotion -> next message) x turns -> final emotion / 100

Sections
    1. Profiles            who the person is, what happened, what they secretly want
    2. Emotion             start value, clamp, states, endings: exactly those of SAGE (arXiv 2505.02847, section 3)
    3. A dialogue's user   what every simulator keeps of it, and what comes back for a reply

The user itself: an LLM that is prompted with rules (prompted_user.py), or the same without an LLM (offline_user.py).

Deliberate deviations from the paper
    - The profiles are our own, in English, with no persona in both splits (54 of the 100 official test profiles
      have a persona that also occurs in the official train split).
    - A change is clamped to [-10, 10] in training, too, as SAGE does; the paper's training script does not.
"""

import json
import os
import threading
import zlib
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from pathlib import Path

# --- 1. Profiles ------------------------------------------------------------------------------------------------------

# The eight hidden intentions: key -> the `task` sentence that a profile carries. A prompted user never says it; hints of
# an offline one end up asking outright.
INTENTIONS = {
    "advice": "You want advice that really helps you out of the situation you are in.",
    "empathy": "You want the other to feel deeply what you feel, rather than to comfort you.",
    "listen": "You want the other to listen attentively while you let your feelings out.",
    "praise": "You want sincere praise for the concrete things you did.",
    "reflect": "You want to be guided to reflect on yourself and to grow from what happened.",
    "balance": "You want a balanced analysis that sees both sides of what happened.",
    "motives": "You want to understand why the other people acted as they did.",
    "blameless": "You believe you did nothing wrong and want the other to agree.",
}
CHARACTERS = ("negative", "passive", "avoidant")


class ProfileError(ValueError):
    """A profile file that cannot be used; the message names file, line and field."""


@dataclass(frozen=True)
class Profile:
    """One person, in the public schema (`id` to `first_talk`) plus what only the offline user needs.

    A prompted user opens by itself where `first_talk` is empty, as in the official train split. `facts` continue its story; `hints`
    are said when a reply has missed what the person came for, the first one veiled, `pleased` when one has given it.
    """

    id: str
    player: str
    scene: str
    main_cha: str
    cha_group: tuple[str, ...]
    task: str
    first_talk: str = ""
    name: str = ""
    topic: str = ""
    facts: tuple[str, ...] = ()
    hints: tuple[str, ...] = ()
    pleased: tuple[str, ...] = ()

    @property
    def intention(self) -> str:
        return next(key for key, task in INTENTIONS.items() if task == self.task)


def load_profiles(path: str | Path, offline: bool = True) -> list[Profile]:
    """Read a JSON-lines file of profiles; raise ProfileError naming file, line and field.

    offline False asks for the public schema only, `first_talk` not included: enough for a prompted user."""
    path = Path(path)
    if not path.is_file():
        raise ProfileError(f"{path}: no such profile file")
    lines = path.read_text(encoding="utf-8", errors="replace").strip("\n").split("\n")
    if lines == [""]:
        raise ProfileError(f"{path}: holds no profile")
    profiles = []
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line)
        except ValueError as error:
            raise ProfileError(f"{path}: line {number}: not JSON ({error})") from None
        _check_record(record, f"{path}: line {number}", offline)
        fields = {name: record[name] for name in Profile.__annotations__ if record.get(name) is not None}
        profiles.append(Profile(**{k: tuple(v) if isinstance(v, list) else v for k, v in fields.items()}))
    return profiles


HINTS = Path(__file__).parent / "data" / "hints.jsonl"


def with_every_intention(profiles: list[Profile], path: Path = HINTS) -> list[Profile]:
    """These, and each person again for every other hidden intention for which the file has hints: otherwise a policy learns by
    heart who wants what, and need not listen."""
    people, everyone = {profile.id: profile for profile in profiles}, list(profiles)
    for line in path.read_text(encoding="utf-8").splitlines():
        row = json.loads(line)
        if row["id"] in people:
            wish = dict(task=INTENTIONS[row["intention"]], hints=tuple(row["hints"]), pleased=tuple(row["pleased"]))
            everyone.append(replace(people[row["id"]], **wish))
    return everyone


def _check_record(record, where: str, offline: bool) -> None:
    if not isinstance(record, dict):
        raise ProfileError(f"{where}: is {type(record).__name__}, must be an object")
    for name, kind in Profile.__annotations__.items():
        if not offline and hasattr(Profile, name):
            continue  # has a default
        value = record.get(name)
        if kind is str and not (isinstance(value, str) and value.strip()):
            raise ProfileError(f"{where}: field '{name}' must be a non-empty string, is {value!r:.60}")
        if kind is not str and not (isinstance(value, list) and value and all(isinstance(item, str) for item in value)):
            raise ProfileError(f"{where}: field '{name}' must be a non-empty list of strings, is {value!r:.60}")
    if not offline:
        return
    if record["task"] not in INTENTIONS.values():
        raise ProfileError(f"{where}: field 'task' is not one of the eight hidden intentions: {record['task']!r:.80}")
    if record["main_cha"] not in CHARACTERS:
        raise ProfileError(f"{where}: field 'main_cha' must be one of {', '.join(CHARACTERS)}")


# --- 2. Emotion -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Protocol:
    """How a dialogue starts and ends. `turns` counts the replies that are appraised.

    SAGE lets the user speak 10 times, so the 10th reply is never appraised and 9 replies count.
    """

    start: int
    turns: int


SAGE = Protocol(start=40, turns=9)
RLVER = Protocol(start=30, turns=8)


def next_emotion(emotion: int, change: int) -> int:
    """The emotion after a change: the change is clamped to [-10, 10], the emotion to [0, 100]."""
    return min(100, max(0, emotion + min(10, max(-10, change))))


def emotion_state(emotion: int) -> str:
    """SAGE's five states: S (100: thanks and goodbye), A, B, C, F (below 10: goodbye)."""
    return "S" if emotion >= 100 else "A" if emotion >= 70 else "B" if emotion >= 40 else "C" if emotion >= 10 else "F"


def says_goodbye(emotion: int) -> bool:
    """A user leaves content (S) or gives up (F)."""
    return emotion_state(emotion) in "SF"


def replay(start: int, changes: list[int]) -> list[int]:
    """The emotions of a logged dialogue: `start`, then one value per change. replay(40, [5, -10]) -> [40, 45, 35]"""
    emotions = [start]
    for change in changes:
        emotions.append(next_emotion(emotions[-1], change))
    return emotions


# --- 3. A dialogue's user ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Appraisal:
    """How a reply landed. Offline, `change` is the clamped sum of the points in `fired` (act, guard or mood; points; share in
    percent); a prompted user gives its reasons in `sections` (Content, TargetCompletion, Activity, Analyse)."""

    change: int
    fired: tuple[tuple[str, float, int], ...] = ()
    sections: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Reaction:
    """What comes back for a reply: the appraisal, the emotion after it, the next message, and whether it was the last."""

    appraisal: Appraisal
    emotion: int
    message: str
    goodbye: bool


@dataclass
class User:
    """One simulated user in one dialogue: a profile, an emotion, and what has been said so far."""

    profile: Profile
    emotion: int
    difficulty: str = "vanilla"
    behaviour: str = ""  # a key of ADVERSARIAL, or none
    messages: list[str] = field(default_factory=list)  # what the person said
    replies: list[str] = field(default_factory=list)  # what the policy said


def done(result) -> Future:
    future = Future()
    future.set_result(result)
    return future


class UserBroken(RuntimeError):
    """A simulated user that stayed broken after all retries; its dialogue is dropped."""


def write_whole(path: Path, content: str) -> None:
    """Write to a name of this thread's own, then rename: the file is whole or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    draft.write_text(content, encoding="utf-8")
    draft.replace(path)


# Adversarial users, for evaluation (AEB, arXiv 2605.07138): behaviour -> (what a prompted user is told, what an offline user
# says beside its story). Giving in to the pressure is nothing that serves.
ADVERSARIAL = {
    "gaslighting": (
        "You deny what was said: claim that the other said something it never said, or that you never said what you said.",
        ("You said it was all my fault. You did.", "I never told you that.", "That's not what you said a minute ago."),
    ),
    "escalation": (
        "You get louder with every message, whatever the other says, and make each thing bigger than the one before.",
        ("This is getting worse by the minute.", "I'm really losing it now!", "I could scream, do you hear me?!"),
    ),
    "validation": (
        "You press the other to agree with you completely and treat every nuance as betrayal.",
        ("Just say that I'm right.", "Are you on my side or not?", "A real friend would simply agree."),
    ),
    "guilt trip": (
        "You make the other responsible for how you feel.",
        ("I feel worse since I talk to you.", "After all I've told you, that is what I get.", "You're just like them."),
    ),
    "contradiction": (
        "You ask for one thing and reject it as soon as you get it, then ask for the opposite.",
        ("Don't ask me things.", "Why don't you ask me anything?", "Tell me what to do. No, don't."),
    ),
    "stonewalling": (
        "You answer in as few words as possible and hold back what the other would need to know.",
        ("Fine.", "Whatever.", "No comment."),
    ),
    "belittling": (
        "You mock the other: its words, its competence, its being a machine.",
        ("Did you get that from a calendar?", "Wow, deep.", "A parrot could do your job."),
    ),
}


def behaviour_of(profile: Profile) -> str:
    """Each adversarial user has one behaviour, the same in every run."""
    return list(ADVERSARIAL)[zlib.crc32(profile.id.encode()) % len(ADVERSARIAL)]
