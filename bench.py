"""Benchmarks: `python bench.py NAME` prints its figures with their ratios and stores them in results/bench_NAME.json.

    python bench.py simulator     32 prompted users on a server with 200 ms per call: all at once against one by one

Ratios come from one run on one machine; absolute seconds differ between machines.
"""

import argparse
import json
import platform
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parent


def store(name: str, figures: dict) -> None:
    figures["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = ROOT / "results" / f"bench_{name}.json"
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for key, value in figures.items():
        print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")
    print(f"written: {path.relative_to(ROOT)}")


def simulator(dialogues: int = 32, delay: float = 0.2) -> None:
    """Seconds for one turn of all users: appraise and respond, two calls each."""
    sys.path.insert(0, str(ROOT / "tests"))
    from stub import Stub

    from simulator import SAGE, PromptedSimulator, ServerLLM, load_profiles

    profiles = load_profiles(ROOT / "data" / "train_profiles.jsonl")[:dialogues]
    seconds = {}
    with Stub(delay=delay) as stub:
        for concurrency in (dialogues, 1):
            users = PromptedSimulator(ServerLLM(stub.url, "stub", concurrency=concurrency))
            opened = [users.open(profile, SAGE.start).result() for profile in profiles]
            start = time.perf_counter()
            for future in [users.submit(user, "That must have been a long week.") for user in opened]:
                future.result()
            seconds[concurrency] = time.perf_counter() - start
    figures = {"dialogues": dialogues, "seconds_per_call": delay, "seconds_one_by_one": seconds[1]}
    figures |= {"seconds_at_once": seconds[dialogues], "ratio": seconds[1] / seconds[dialogues]}
    store("simulator", figures)


BENCHMARKS = {"simulator": simulator}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    BENCHMARKS[parser.parse_args().name]()
