"""What a transcript holds, derived again: every change from what was read in the reply, every emotion from the changes.

`python evaluate.py --verify out/transcripts.jsonl` calls it; with --read the reader reads every reply once more.
"""

import json
from pathlib import Path

from extras.probes import intention_of
from offline_user import TABLE, change_of, guards, points_for, shares_of
from simulator import User, replay


def read_transcripts(path: str) -> list[tuple[dict, list[str]]]:
    """(transcript, what in it does not add up) for each of a file: JSON lines, one list (before.json), or the
    first model's in a result of this program.

    Per reply, the change must follow from the acts and guards that were read (a prompted user logs its reasons instead). Per
    dialogue, the emotions must follow from the changes, and the final one, 0 after a broken format, is the reward x 100.
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
        reasons = set(message["planning"]) - {"change", "fired"}  # a prompted user's
        if fired and change != derived_change(transcript, fired, users[turn - 1]["emotion-point"]):
            problems.append(f"turn {turn}: the change {change:+d} does not follow from the acts that were read")
        if not fired and not reasons and "difficulty" in transcript:  # the public dialogues give neither
            problems.append(f"turn {turn}: no reason is given for the change {change:+d}")
        changes.append(change)
    emotions = replay(users[0]["emotion-point"], changes)
    for turn, (message, emotion) in enumerate(zip(users, emotions)):
        if message["emotion-point"] != emotion:
            problems.append(f"turn {turn}: the logged emotion {message['emotion-point']} should be {emotion}")
    final = emotions[-1] if transcript.get("format_ok", True) else 0
    if transcript["emo_point"] != final and not transcript.get("dropped"):
        problems.append(f"the final emotion {transcript['emo_point']} should be {final}")
    return problems


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
        readings = reader.read([(said, reply) for said, reply, *_ in turns])
        for turn, ((_, _, found, emotion, logged), reading) in enumerate(zip(turns, readings), 1):
            fired = [(name, 0, share) for name, share in shares_of(found, reading)]
            change = derived_change(transcript, fired, emotion)
            if change is None or abs(change - logged) > 1:
                problems.append(f"{transcript['id']}: turn {turn}: logged {logged:+d}, read again {change}")
    return problems


def appraised_turns(transcript: dict) -> list[tuple]:
    """(the user's messages so far, reply, its guards, emotion before it, logged change) of each reply that was appraised."""
    user, turns = User(None, 0), []
    for message, after in zip(transcript["history"], transcript["history"][1:]):
        if message["role"] == "user":
            user.messages.append(message["content"])
            user.emotion = message["emotion-point"]
        elif "planning" in after:
            reply = message["content"]
            turns.append((tuple(user.messages), reply, guards(user, reply), user.emotion, after["planning"]["change"]))
            user.replies.append(reply)
    return turns


def transcripts_that_add_up(path: str) -> list[dict]:
    checked = read_transcripts(path)
    for _, problems in checked:
        if problems:
            raise ValueError(problems[0])
    return [transcript for transcript, _ in checked]
