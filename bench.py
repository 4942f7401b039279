"""Benchmarks: `python bench.py NAME` prints its figures with their ratios and stores them in results/bench_NAME.json.

    python bench.py simulator     32 prompted users on a server with 200 ms per call: all at once against one by one
    python bench.py update        think mode, 8 turns: turns merged into a tree against every turn by itself
    python bench.py trl           a GRPO step of one turn against TRL's GRPOTrainer (needs `pip install trl`)

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
        for concurrency in (1, dialogues):
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


def trl(profiles: int = 3, group: int = 8, new_tokens: int = 24, steps: int = 4) -> None:
    """Seconds of a GRPO step of SmolLM2: same prompts, group size, tokens per completion, KL and trained weights. Float32,
    one turn, because that is what TRL's trainer does; the first step of each is left out as warm-up."""
    from types import SimpleNamespace

    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    import grpo
    from policy import SMOLLM2, Chat, Policy, frozen_copy, load_model, model_folder
    from rollout import instructions, make_batch, rollout
    from simulator import Protocol, RulesSimulator, load_profiles

    people = load_profiles(ROOT / "data" / "train_profiles.jsonl")[:profiles]
    system, examples = instructions(False, 8)
    count = profiles * group
    settings = dict(lr=1e-6, temperature=0.7, kl=0.05)

    model, tokenizer = load_model(SMOLLM2)
    chat = Chat(tokenizer, system, examples)
    chat.stop_ids = []  # every completion has all its tokens, there as here
    policy, reference = Policy(model, settings["temperature"]), Policy(frozen_copy(model), settings["temperature"])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings["lr"])
    args = SimpleNamespace(epochs=1, micro_tokens=10**6, clip=0.2, kl=settings["kl"], entropy=0.0, max_grad_norm=1.0)
    ours = []
    for _ in range(steps):
        start = time.perf_counter()
        dialogues = rollout(
            model, chat, RulesSimulator(), [p for p in people for _ in range(group)], list(range(count)),
            Protocol(30, 1), max_new_tokens=new_tokens, temperature=settings["temperature"],
        )  # fmt: skip
        batch = make_batch(dialogues, "terminal")
        advantages_N, _ = grpo.group_advantages(batch, group, per_turn=False)
        grpo.update(policy, reference, optimizer, batch, advantages_N, args)
        ours.append(time.perf_counter() - start)
    tokens = len(batch)
    del model, policy, reference, optimizer

    clock, theirs = [0.0], []

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            clock[0] = time.perf_counter()

        def on_step_end(self, *args, **kwargs):
            theirs.append(time.perf_counter() - clock[0])

    turns = [{"role": "system", "content": system}]
    for message, reply in examples:
        turns += [{"role": "user", "content": message}, {"role": "assistant", "content": reply}]
    prompts = [{"prompt": [*turns, {"role": "user", "content": person.first_talk}]} for person in people]
    trainer = GRPOTrainer(
        model=str(model_folder(SMOLLM2)),
        reward_funcs=lambda completions, **_: [float(len(set(c[0]["content"].split()))) for c in completions],
        args=GRPOConfig(
            output_dir="/tmp/bench_trl", per_device_train_batch_size=count, num_generations=group, max_steps=steps,
            max_completion_length=new_tokens, generation_kwargs={"min_new_tokens": new_tokens}, beta=settings["kl"],
            temperature=settings["temperature"], learning_rate=settings["lr"], use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(prompts * steps),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    figures = {"dialogues": count, "group": group, "sampled_tokens": tokens}
    figures |= {"seconds_ours": sum(ours[1:]) / (steps - 1), "seconds_trl": sum(theirs[1:]) / (steps - 1)}
    store("trl", figures | {"ratio": figures["seconds_trl"] / figures["seconds_ours"]})


BENCHMARKS = {"simulator": simulator, "update": update, "trl": trl}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    BENCHMARKS[parser.parse_args().name]()
