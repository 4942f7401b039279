"""Benchmarks: `python -m extras.bench NAME` prints its figures with their ratios and stores them in results/bench_NAME.json.

    simulator     32 prompted users on a server with 200 ms per call: all at once against one by one
    rollout       24 dialogues of SmolLM2: the generator against `model.generate`; users who take their time
    decode        one token more of 4, 32 (GPU: 128) dialogues: `model.generate`, and what memory bandwidth allows
    update        think mode, 8 turns: turns merged into a tree against every turn by itself
    trl           a GRPO step of one turn against TRL's GRPOTrainer (needs `pip install trl`)

Ratios come from one run on one machine; absolute seconds differ between machines.
"""

import argparse
import json
import multiprocessing
import platform
import random
import sys
import threading
import time
from concurrent.futures import Future, ProcessPoolExecutor
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import torch

import grpo
from distributed import micro_batches
from extras.logs import host_peak_gb
from generator import Generator
from policy import DTYPES, SMOLLM2, Chat, Policy, frozen_copy, load_config, load_model, model_folder
from rollout import Batch, instructions, make_batch
from rollout import rollout as hold_dialogues
from simulator import Appraisal, Protocol, Reaction, User, done, load_profiles

ROOT = Path(__file__).parent.parent


def people(count: int) -> list:
    return load_profiles(ROOT / "data" / "train_profiles.jsonl")[:count]


def store(name: str, figures: dict) -> None:
    figures["machine"] = f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    path = ROOT / "results" / f"bench_{name}.json"
    path.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    for key, value in figures.items():
        print(f"{key}: {value:.3f}" if isinstance(value, float) else f"{key}: {value}")
    print(f"written: {path.relative_to(ROOT)}")


def alone(function, *args):
    """function(*args) in a process of its own, which has a peak of memory of its own."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *args).result()


def simulator(dtypes: list[str], dialogues: int = 32, delay: float = 0.2) -> None:
    """Seconds for one turn of all users: appraise and respond, two calls each."""
    sys.path.insert(0, str(ROOT / "tests"))
    from stub import Stub

    from llm import ServerLLM
    from prompted_user import PromptedSimulator
    from simulator import SAGE

    profiles = people(dialogues)
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


class Talkers:
    """Users who tell a fact a turn and never leave. Each answer takes up to `slowest` seconds, by profile and turn."""

    def __init__(self, slowest: float = 0.0):
        self.slowest, self.waited = slowest, {}

    def open(self, profile, start):
        return done(User(profile, start, messages=[profile.first_talk]))

    def submit(self, user, reply):
        future, turn = Future(), len(user.messages)
        user.messages.append(user.profile.facts[(turn - 1) % len(user.profile.facts)])
        reaction = Reaction(Appraisal(0), user.emotion, user.messages[-1], False)
        seconds = random.Random(f"{user.profile.id} {turn}").uniform(0.2, 1.0) * self.slowest
        self.waited[user.profile.id] = self.waited.get(user.profile.id, 0.0) + seconds
        if seconds:
            threading.Timer(seconds, future.set_result, [reaction]).start()
        else:
            future.set_result(reaction)
        return future

    def work(self):
        pass


def generate_anew(model, chat, talkers, people, turns, max_new_tokens, temperature) -> list[int]:
    """The usual way: in lock-step, each turn's whole prompts padded on the left for `model.generate`; lengths of replies."""
    users = [talkers.open(person, 40).result() for person in people]
    prompts, lengths = [chat.opening(user.messages[0]) for user in users], []
    for _ in range(turns):
        width = max(map(len, prompts))
        ids_B_T = torch.tensor([[chat.stop_id] * (width - len(prompt)) + prompt for prompt in prompts])
        mask_B_T = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts])
        out_B_T = model.generate(
            ids_B_T, attention_mask=mask_B_T, max_new_tokens=max_new_tokens, do_sample=True, temperature=temperature,
            top_k=0, top_p=1.0, eos_token_id=chat.stop_ids, pad_token_id=chat.stop_id,
        )  # fmt: skip
        for k, row in enumerate(out_B_T[:, width:].tolist()):
            row = row[: next((n + 1 for n, token in enumerate(row) if token in chat.stop_ids), len(row))]
            lengths.append(len(row))
            message = talkers.submit(users[k], "").result().message
            prompts[k] += row + chat.between(message, row[-1] in chat.stop_ids)
    return lengths


def hold(dtype: str, way: str, dialogues: int, turns: int, slowest: float = 0.0) -> dict:
    """Hold SmolLM2's dialogues with the laptop's prompt and temperature. Useful tokens: those up to the stop token."""
    torch.manual_seed(0)
    profiles = people(dialogues)
    model, tokenizer = load_model(SMOLLM2, "cpu", DTYPES[dtype])
    chat, talkers = Chat(tokenizer, instructions(False)), Talkers(slowest)
    loaded = host_peak_gb()
    start = time.perf_counter()
    if way == "generate":
        lengths = generate_anew(model, chat, talkers, profiles, turns, 32, 0.7)
    else:
        held = hold_dialogues(
            model, chat, talkers, profiles, list(range(dialogues)), Protocol(40, turns), max_new_tokens=32, temperature=0.7,
        )  # fmt: skip
        lengths = [len(turn.sampled_ids) for dialogue in held for turn in dialogue.turns]
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "tokens": sum(lengths),
        "tokens_per_second": sum(lengths) / seconds,
        "longest_wait": max(talkers.waited.values()),
        "gigabytes": host_peak_gb() - loaded,
    }


def rollout(dtypes: list[str], dialogues: int = 24) -> None:
    """Useful tokens per second, peak memory beside the model, and how far waiting users are hidden behind generation."""
    figures = {"dialogues": dialogues}

    def measure(dtype, name, *args):
        found = alone(hold, dtype, *args)
        figures.update({f"{dtype}_{name}_{key}": value for key, value in found.items()})
        return found

    for dtype in dtypes:
        for turns in (4, 8):
            ours = measure(dtype, f"{turns}_turns_ours", "ours", dialogues, turns)
            theirs = measure(dtype, f"{turns}_turns_generate", "generate", dialogues, turns)
            figures[f"{dtype}_{turns}_turns_ratio"] = ours["tokens_per_second"] / theirs["tokens_per_second"]
        slow = measure(dtype, "slow_users", "ours", dialogues, 8, 1.0)
        figures[f"{dtype}_slow_users_ratio"] = slow["seconds"] / max(ours["seconds"], slow["longest_wait"])
    store("rollout", figures)


def decode(dtypes: list[str], prompt: int = 256, tokens: int = 64) -> None:
    """Seconds of a decoding step on random weights: Qwen2.5-7B's shape in bf16 on a GPU, SmolLM2's on a CPU. The limit is
    the time in which weights and KV cache can be read once; bandwidth is that of a copy."""
    from transformers import AutoModelForCausalLM, Qwen2Config

    device = "cuda" if torch.cuda.is_available() else "cpu"
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    shape = dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28)
    shape |= dict(num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False)
    config = Qwen2Config(**shape) if device == "cuda" else load_config(SMOLLM2)

    def seconds(work, times=1):
        wait()
        start = time.perf_counter()
        for _ in range(times):
            work()
        wait()
        return (time.perf_counter() - start) / times

    source, target = torch.zeros(2, 2**28, dtype=torch.uint8, device=device)
    seconds(lambda: target.copy_(source))
    bandwidth = 2 * 2**28 / seconds(lambda: target.copy_(source), 10)
    figures = {"device": torch.cuda.get_device_name() if device == "cuda" else "cpu"}
    figures["gigabytes_per_second"] = bandwidth / 1e9

    def measure(model, dtype, rows):
        weights = sum(p.numel() * p.itemsize for p in model.parameters())
        ids_B_T = torch.randint(100, 40_000, (rows, prompt), device=device)
        generator = Generator(model, slots=rows, columns=prompt + tokens, temperature=1.0)
        slots, uniforms = list(range(rows)), [0.5] * rows
        drawn = generator.sample(slots, ids_B_T.tolist(), uniforms)

        def step():
            nonlocal drawn
            drawn = generator.sample(slots, [[token] for token, _ in drawn], uniforms)

        seconds(step, 4)  # what is captured, is captured here
        ours = seconds(step, tokens - 8)
        settings = dict(do_sample=True, top_k=0, attention_mask=torch.ones_like(ids_B_T), pad_token_id=0)
        generate = lambda n: model.generate(ids_B_T, min_new_tokens=n, max_new_tokens=n, **settings)
        theirs = (seconds(lambda: generate(tokens)) - seconds(lambda: generate(4))) / (tokens - 4)
        cache = generator.cache.keys[:, :, : prompt + tokens // 2]
        limit = (weights + 2 * cache.numel() * cache.itemsize) / bandwidth
        found = {"seconds_ours": ours, "seconds_generate": theirs, "ratio": theirs / ours}
        found |= {"seconds_limit": limit, "share_of_bandwidth": limit / ours}
        figures.update({f"{dtype}_{rows}_{name}": value for name, value in found.items()})

    for dtype in dtypes:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
        for rows in (4, 32, 128) if device == "cuda" else (4, 32):
            measure(model, dtype, rows)
    store("decode", figures)


def update(
    dtypes: list[str], dialogues: int = 4, turns: int = 8, message: int = 35, thinking: int = 60, reply: int = 20
) -> None:
    """Forward and backward of one GRPO micro-batch of SmolLM2 in float32, same tokens both ways; gradients compared."""
    torch.manual_seed(0)
    model, _ = load_model(SMOLLM2)
    policy = Policy(model)
    ids = lambda n: torch.randint(100, 40_000, (n,)).tolist()
    sequences, rows, opening = [], [], ids(60)
    for d in range(dialogues):
        history = opening
        for t in range(turns):
            history = history + ids(message)
            sampled = ids(thinking + reply)
            start = len(history)
            rows += [(len(sequences), start + k, d, token, t, 0.0, 0.0) for k, token in enumerate(sampled)]
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
        figures[f"tokens_{name}"] = sum(batch.sizes.values())
        gradients[name] = [p.grad for p in model.parameters()]
    pairs = list(zip(gradients["merged"], gradients["expanded"]))
    figures["largest_gradient_difference"] = max((a - b).abs().max().item() for a, b in pairs)
    figures["largest_gradient"] = max(a.abs().max().item() for a, _ in pairs)
    figures["token_ratio"] = figures["tokens_merged"] / figures["tokens_expanded"]
    figures["speed_ratio"] = figures["seconds_expanded"] / figures["seconds_merged"]
    store("update", figures)


def trl(dtypes: list[str], profiles: int = 3, group: int = 8, new_tokens: int = 24, steps: int = 4) -> None:
    """Seconds and peak memory of a GRPO step of SmolLM2: same prompts, group size, tokens per completion, KL and trained weights.
    Float32, one turn, because that is what TRL's trainer does; the first step of each is left out as warm-up."""
    settings = dict(lr=1e-6, temperature=0.7, kl=0.05)
    figures = {"trl": version("trl"), "dialogues": profiles * group, "group": group, "tokens_per_dialogue": new_tokens}
    for name, take in (("ours", our_steps), ("trl", trl_steps)):
        seconds, gigabytes = alone(take, people(profiles), group, new_tokens, steps, settings)
        phases = {phase: sum(taken[1:]) / (steps - 1) for phase, taken in seconds.items()}
        figures |= {f"{name}_{phase}_seconds": mean for phase, mean in phases.items()}
        figures |= {f"{name}_seconds": sum(phases.values()), f"{name}_gigabytes": gigabytes}
    store("trl", figures | {"ratio": figures["trl_seconds"] / figures["ours_seconds"]})


def our_steps(persons: list, group: int, new_tokens: int, steps: int, settings: dict) -> tuple[dict, float]:
    """({phase: its seconds in each step}, the process' peak of memory in GB)."""
    model, tokenizer = load_model(SMOLLM2)
    chat = Chat(tokenizer, instructions(False))
    chat.stop_ids = []  # every completion has all its tokens, there as here
    policy, reference = Policy(model, settings["temperature"]), Policy(frozen_copy(model), settings["temperature"])
    optimizer = torch.optim.AdamW(policy.parameters(), lr=settings["lr"])
    args = SimpleNamespace(epochs=1, micro_tokens=10**6, clip=0.2, kl=settings["kl"], entropy=0.0, max_grad_norm=1.0)
    args.importance_cap, args.group = 0.0, group
    everybody, seconds = [person for person in persons for _ in range(group)], {"rollout": [], "update": []}
    for _ in range(steps):
        start = time.perf_counter()
        dialogues = hold_dialogues(
            model, chat, Talkers(), everybody, list(range(len(everybody))), Protocol(30, 1), max_new_tokens=new_tokens,
            temperature=settings["temperature"],
        )  # fmt: skip
        rolled_out = time.perf_counter()
        batch = make_batch(dialogues, "terminal")
        advantages_N, _ = grpo.group_advantages(batch, group, per_turn=False)
        grpo.update(policy, reference, optimizer, batch, advantages_N, args)
        seconds["rollout"].append(rolled_out - start)
        seconds["update"].append(time.perf_counter() - rolled_out)
    return seconds, host_peak_gb()


def trl_steps(persons: list, group: int, new_tokens: int, steps: int, settings: dict) -> tuple[dict, float]:
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    began, seconds = [], {"rollout": [], "update": []}

    class Clock(TrainerCallback):
        def on_step_begin(self, *args, **kwargs):
            began.append(time.perf_counter())

        def on_step_end(self, *args, **kwargs):
            seconds["update"].append(time.perf_counter() - began[-1] - seconds["rollout"][-1])

    class Timed(GRPOTrainer):
        def _prepare_inputs(self, inputs):  # completions, rewards and the reference's log-probs
            start = time.perf_counter()
            prepared = super()._prepare_inputs(inputs)
            seconds["rollout"].append(time.perf_counter() - start)
            return prepared

    turns = [{"role": "system", "content": instructions(False)}]
    prompts = [{"prompt": [*turns, {"role": "user", "content": person.first_talk}]} for person in persons]
    trainer = Timed(
        model=str(model_folder(SMOLLM2)),
        reward_funcs=lambda completions, **_: [float(len(set(c[0]["content"].split()))) for c in completions],
        args=GRPOConfig(
            output_dir="/tmp/bench_trl", per_device_train_batch_size=len(persons) * group, num_generations=group, max_steps=steps,
            max_completion_length=new_tokens, generation_kwargs={"min_new_tokens": new_tokens}, beta=settings["kl"],
            temperature=settings["temperature"], learning_rate=settings["lr"], use_cpu=True, bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no", logging_strategy="no",
            model_init_kwargs={"dtype": "float32"},
        ),
        train_dataset=Dataset.from_list(prompts * steps),
        callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    return seconds, host_peak_gb()


BENCHMARKS = {"simulator": simulator, "rollout": rollout, "decode": decode, "update": update, "trl": trl}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=BENCHMARKS)
    parser.add_argument("--dtype", choices=DTYPES, help="rollout and decode: one alone (default: both, side by side)")
    flags = parser.parse_args()
    BENCHMARKS[flags.name]([flags.dtype] if flags.dtype else list(DTYPES))
