"""Benchmarks: `python bench.py NAME` prints its figures with their ratios and stores them in results/bench_NAME.json.

    python bench.py simulator     32 prompted users on a server with 200 ms per call: all at once against one by one
    python bench.py update        think mode, 8 turns: turns merged into a tree against every turn by itself

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


def update(dialogues: int = 4, turns: int = 8, message: int = 35, thinking: int = 60, reply: int = 20) -> None:
    """Forward and backward of one GRPO micro-batch of SmolLM2 in float32, same tokens both ways; gradients compared."""
    from policy import SMOLLM2, Policy, load_model, micro_batches
    from rollout import Batch

    torch.manual_seed(0)
    model, _ = load_model(SMOLLM2)
    policy = Policy(model)
    ids = lambda n: torch.randint(100, 40_000, (n,)).tolist()  # noqa: E731
    sequences, rows, opening = [], [], ids(60)
    for d in range(dialogues):
        history = opening
        for t in range(turns):
            history = history + ids(message)
            sampled = ids(thinking + reply)
            start = len(history)
            rows += [(len(sequences), start + k, token, d, t, 0.0, 0.0) for k, token in enumerate(sampled)]
            sequences.append(history + sampled)
            history = history + sampled[thinking:]
    columns = [torch.tensor(column) for column in zip(*rows)]
    figures, gradients = {"dialogues": dialogues, "turns": turns, "sampled_tokens": len(rows)}, {}
    for name in ("merged", "expanded", "merged", "expanded"):  # the first round warms up
        batch = Batch(sequences, *columns)
        if name == "expanded":
            batch.dialogue_N = batch.row_N  # every turn for itself
        model.zero_grad(set_to_none=True)
        start = time.perf_counter()
        for micro, _ in micro_batches(batch, 4096):
            log_probs_n, entropy_n, _ = policy(batch, micro)
            ((log_probs_n + 0.01 * entropy_n).sum() / len(batch)).backward()
        figures[f"seconds_{name}"] = time.perf_counter() - start
        figures[f"tokens_{name}"] = sum(map(len, batch.trees))
        gradients[name] = [p.grad for p in model.parameters()]
    pairs = list(zip(gradients["merged"], gradients["expanded"]))
    figures["largest_gradient_difference"] = max((a - b).abs().max().item() for a, b in pairs)
    figures["largest_gradient"] = max(a.abs().max().item() for a, _ in pairs)
    figures["token_ratio"] = figures["tokens_merged"] / figures["tokens_expanded"]
    figures["speed_ratio"] = figures["seconds_expanded"] / figures["seconds_merged"]
    store("update", figures)


BENCHMARKS = {"simulator": simulator, "update": update}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    BENCHMARKS[parser.parse_args().name]()
