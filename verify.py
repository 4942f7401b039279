"""Transcripts: a dialogue in the public SAGE schema; and what one holds, derived again: every change from what was read in the
reply, every emotion from the changes.

`python evaluate.py --verify out/transcripts.jsonl` calls it; with --read the reader reads once more every reply that the offline
user appraised.
"""

import json
from pathlib import Path

from extras.probes import intention_of
from offline_user import TABLE, change_of, guards, points_for, shares_of
from rollout import Dialogue
from simulator import User, emotion_state, replay


def transcript_of(dialogue: Dialogue, others: list[Dialogue] = ()) -> dict:
    """The public SAGE schema, plus the fired rules, the thinking and how each turn ended; and what `others`, which share the
    dialogue's history, said instead of it, and how that landed (unless the format or the user broke)."""
    profile, user = dialogue.user.profile, dialogue.user
    hinted = lambda message: {"hinted": True} if any(hint in message for hint in profile.hints) else {}
    landed = lambda appraisal: {"change": appraisal.change, "fired": appraisal.fired} | appraisal.sections
    said = lambda turn: {"content": turn.reply, "thinking": turn.thinking, "stopped": turn.stopped}
    opening = user.messages[0] if user.messages else ""
    history = [{"role": "user", "content": opening, "emotion-point": dialogue.start} | hinted(opening)]
    for t, turn in enumerate(dialogue.turns):
        message = {"role": "assistant"} | said(turn)
        if others:
            turns = [other.turns[t] for other in others]
            message["instead"] = [said(o) | (landed(o.reaction.appraisal) if o.reaction else {}) for o in turns]
        history.append(message)
        if turn.reaction:
            planning = landed(turn.reaction.appraisal)
            message = {"role": "user", "content": turn.reaction.message, "emotion-point": turn.reaction.emotion}
            history.append(message | {"planning": planning} | hinted(turn.reaction.message))
    return {
        "id": profile.id,
        "emo_point": dialogue.final_emotion,
        "emo_state": f"Emotion-{emotion_state(dialogue.final_emotion)}",
        "character": profile.main_cha,
        "task": profile.task,
        "difficulty": user.difficulty,
        "behaviour": user.behaviour,
        "dropped": dialogue.dropped,
        "format_ok": dialogue.format_ok,
        "history": history,
    }


def read_transcripts(path: str) -> list[tuple[dict, list[str]]]:
    """(transcript, what in it does not add up) for each of a file: JSON lines, one list (before.json), or the
    first model's in a result of this program.

    Per reply, the change must follow from the acts and guards that were read (a prompted user logs its reasons instead). Per
    dialogue, the emotions must follow from the changes, and the final one, 0 after a broken format, is the score.
    Raises ValueError naming file and line.
    """
    content, checked = Path(path).read_text(encoding="utf-8").strip("\n"), []
    try:
        whole = json.loads(content)
    except ValueError:
        whole = None  # JSON lines
    if isinstance(whole, dict) and whole.get("dialogues"):
        whole = next(iter(whole["dialogues"].values()))
    rows = whole if isinstance(whole, list) else content.split("\n")
    for number, row in enumerate(rows, 1):
        try:
            transcript = row if isinstance(whole, list) else json.loads(row)
            transcript["emo_point"] = int(transcript["emo_point"])
            where = f"{path}: line {number}: {transcript['id']}"
            checked.append((transcript, [f"{where}: {problem}" for problem in problems_in(transcript)]))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise ValueError(f"{path}: line {number}: not a transcript ({error!r:.80})") from None
    return checked


def problems_in(transcript: dict) -> list[str]:
    problems, changes = [], []
    users = [message for message in transcript["history"] if message["role"] == "user"]
    for turn, message in enumerate(users[1:], 1):
        change, fired = message["planning"]["change"], message["planning"].get("fired")
        if fired and change != derived_change(transcript, fired, users[turn - 1]["emotion-point"]):
            problems.append(f"turn {turn}: the change {change:+d} does not follow from the acts that were read")
        explained = fired or in_words(message["planning"])
        if not explained and "difficulty" in transcript:  # the public dialogues give neither
            problems.append(f"turn {turn}: no reason is given for the change {change:+d}")
        changes.append(change)
    for before, message in zip(transcript["history"], transcript["history"][1:]):
        for other in message.get("instead", ()):
            if other.get("fired") and other["change"] != derived_change(
                transcript, other["fired"], before["emotion-point"]
            ):
                problems.append(
                    f"{other['content']!r:.60}: the change {other['change']:+d} does not follow from its acts"
                )
    emotions = replay(users[0]["emotion-point"], changes)
    for turn, (message, emotion) in enumerate(zip(users, emotions)):
        if message["emotion-point"] != emotion:
            problems.append(f"turn {turn}: the logged emotion {message['emotion-point']} should be {emotion}")
    final = emotions[-1] if transcript.get("format_ok", True) else 0
    if transcript["emo_point"] != final and not transcript.get("dropped"):
        problems.append(f"the final emotion {transcript['emo_point']} should be {final}")
    return problems


def in_words(planning: dict) -> bool:
    """Whether the reasons are those of a prompted user, not acts and guards."""
    return not planning.get("fired") and bool(set(planning) - {"change", "fired"})


def derived_change(transcript: dict, fired: list, emotion: int) -> int | None:
    """The offline user's change, from the shares of acts and the guards that a transcript holds; None: of no known intention."""
    intention = intention_of(transcript)
    if not intention:
        return None
    shares = [(name, share) for name, _, share in fired if name in TABLE]
    return change_of(points_for(shares, intention, transcript["character"], transcript["difficulty"], emotion))


def read_again(transcripts: list[dict], reader) -> list[str]:
    """What the reader now reads otherwise: replies whose acts would move the emotion by more than a point less or more."""
    problems = []
    for transcript in transcripts:
        turns = appraised_turns(transcript)
        readings = reader.read([(said, reply) for _, said, reply, *_ in turns])
        for (turn, _, _, found, emotion, logged), reading in zip(turns, readings):
            fired = [(name, 0, share) for name, share in shares_of(found, reading)]
            change = derived_change(transcript, fired, emotion)
            if change is None or abs(change - logged) > 1:
                problems.append(f"{transcript['id']}: turn {turn}: logged {logged:+d}, read again {change}")
    return problems


def appraised_turns(transcript: dict) -> list[tuple]:
    """Of each reply that the offline user appraised: (turn, the user's messages so far, reply, its guards, emotion before it,
    logged change)."""
    user, turns = User(None, 0), []
    for message, after in zip(transcript["history"], transcript["history"][1:]):
        if message["role"] == "user":
            user.messages.append(message["content"])
            user.emotion = message["emotion-point"]
        elif "planning" in after and not in_words(after["planning"]):
            said = message | {"change": after["planning"]["change"]}
            for other in (said, *(other for other in message.get("instead", ()) if "change" in other)):
                found = guards(user, other["content"])
                before = len(user.messages), tuple(user.messages), other["content"], found, user.emotion
                turns.append((*before, other["change"]))
            user.replies.append(message["content"])
    return turns


def transcripts_that_add_up(path: str) -> list[dict]:
    checked = read_transcripts(path)
    for _, problems in checked:
        if problems:
            raise ValueError(problems[0])
    return [transcript for transcript, _ in checked]
