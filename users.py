"""Which simulated user the flags name, and a chair to sit in: `python users.py` lets you answer one yourself."""

import argparse
import contextlib
import re
import sys
from pathlib import Path
from urllib.parse import urlsplit

from llm import ServerLLM
from offline_user import TABLE, OfflineSimulator
from prompted_user import DIFFICULTY, PromptedSimulator
from reader import WEIGHTS, load_reader
from simulator import SAGE, UserBroken, load_profiles


def add_simulator_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that train.py, evaluate.py and this file share."""
    add = parser.add_argument
    add(
        "--simulator",
        default="offline",
        help="who plays the user: offline, self (in training the frozen initial policy, in evaluate.py --model), or a server's URL",
    )
    add("--simulator-model", help="the model's name on that server")
    add("--simulator-concurrency", type=int, default=32, help="calls to the server at once")
    add("--simulator-cache", help="folder that keeps the LLM's answers, so that none is asked for twice")
    add("--reader", default=str(WEIGHTS), help="the offline user's reader (`python reader.py --fit`)")
    add("--difficulty", choices=tuple(DIFFICULTY), default="vanilla")


def make_simulator(args, difficulty: str, local_llm=None, adversarial: bool = False):
    """The simulator that the flags name. `local_llm` plays the user with `--simulator self`. Raises ValueError."""
    if args.simulator == "offline":
        return OfflineSimulator(load_reader(args.reader), difficulty, adversarial)
    if args.simulator == "self":
        llm = local_llm
    elif not re.match(r"https?://", args.simulator):
        raise ValueError(
            f"--simulator {args.simulator}: must be offline, self or a URL such as http://localhost:8000/v1"
        )
    elif "@" in urlsplit(args.simulator).netloc:
        raise ValueError("--simulator: put the key into RLVER_API_KEY, not into the URL")
    elif not args.simulator_model:
        raise ValueError(f"--simulator {args.simulator}: --simulator-model must name the model on that server")
    elif args.simulator_concurrency < 1:
        raise ValueError("--simulator-concurrency must be at least 1")
    else:
        llm = ServerLLM(args.simulator, args.simulator_model, args.simulator_concurrency)
    return PromptedSimulator(llm, difficulty, adversarial, args.simulator_cache)


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description="Answer a simulated user yourself. An empty line ends the talk.")
    parser.add_argument("--profiles", default=str(Path(__file__).parent / "data" / "test_profiles.jsonl"))
    parser.add_argument("--number", type=int, default=1, help="which profile of the file, from 1")
    parser.add_argument("--user", choices=("plain", "adversarial"), default="plain")
    add_simulator_flags(parser)
    args = parser.parse_args(argv)
    try:
        profiles = load_profiles(args.profiles, offline=args.simulator == "offline")
        if not 1 <= args.number <= len(profiles):
            raise ValueError(f"--number {args.number}: {args.profiles} holds {len(profiles)} profiles")
        if args.simulator == "self":
            raise ValueError("--simulator self: here you are the policy; choose offline or a URL")
        simulator = make_simulator(args, args.difficulty, adversarial=args.user == "adversarial")
        user = simulator.open(profiles[args.number - 1], SAGE.start).result()
        print(f"[{user.emotion:3d}] {user.messages[-1]}")
        for _ in range(SAGE.turns):
            reply = ""
            with contextlib.suppress(EOFError):
                reply = input("  you: ").strip()
            if not reply:
                break
            future = simulator.submit(user, reply)
            simulator.work()
            reaction = future.result()
            for name, points, share in reaction.appraisal.fired:
                print(f"        {points:+5.1f}  {name} ({share} %) {TABLE[name][1] if name in TABLE else ''}")
            for name, text in reaction.appraisal.sections.items():
                print(f"        {name}: {text}")
            print(f"[{user.emotion:3d}] {reaction.message}")
            if reaction.goodbye:
                break
        print(f"final emotion {user.emotion}; they wanted: {user.profile.task}")
    except (ValueError, OSError, UserBroken) as error:
        print(f"users.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
