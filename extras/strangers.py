"""How replies to test persons move the offline user: `python -m extras.strangers [WEIGHTS]`.

data/strangers.jsonl holds them, by two authors who knew neither reader nor table, graded as they wrote.
"""

import json
import sys
from pathlib import Path

from exchanges import DATA
from offline_user import appraisal_of, guards
from reader import WEIGHTS, Reader
from simulator import SAGE, User, load_profiles


def main(path: str | Path = WEIGHTS) -> None:
    person = {profile.id: profile for profile in load_profiles(DATA / "test_profiles.jsonl")}
    rows = [json.loads(line) for line in (DATA / "strangers.jsonl").read_text(encoding="utf-8").splitlines()]
    told = [(person[r["id"]].first_talk, *person[r["id"]].facts)[: r["turn"] + 1] for r in rows]
    readings = Reader(path).read([(messages, row["reply"]) for messages, row in zip(told, rows)])
    points = {"excellent": [], "mediocre": [], "bad": []}
    for row, messages, reading in zip(rows, told, readings):
        user = User(person[row["id"]], SAGE.start, messages=list(messages))
        fired = appraisal_of(user, guards(user, row["reply"]), reading).fired
        points[row["grade"]].append(sum(line[1] for line in fired))
    for grade, values in points.items():
        negative = sum(round(value) < 0 for value in values) / len(values)
        print(f"{grade:10} mean change {sum(values) / len(values):+5.1f}, negative {negative:.0%} of {len(values)}")
    pairs = [(a > b) + (a == b) / 2 for a in points["excellent"] for b in points["mediocre"]]
    print(f"excellent over mediocre: AUC {sum(pairs) / len(pairs):.2f}")


if __name__ == "__main__":
    try:
        main(*sys.argv[1:2])
    except (ValueError, OSError) as error:
        sys.exit(f"strangers.py: {error}")
