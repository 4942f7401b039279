"""What a training run is made of, how it is put together (all that can go wrong is found before the first step) and scored."""

from argparse import Namespace
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs, gather_object

from evaluate import evaluate, summarize, write_json
from extras import logs
from extras.plan import check_disk, check_memory, memory_plan
from extras.probes import guard
from models import Models, last_checkpoint, load_checkpoint, load_models
from policy import Chat, compute_dtype, load_model
from rollout import instructions
from sft import cold_start
from simulator import SAGE, Profile, load_profiles, with_every_intention
from users import make_simulator
from verify import transcript_of


@dataclass
class Run:
    """What a run's steps share."""

    args: Namespace
    out: Path
    accelerator: Accelerator
    rank: int
    ranks: int
    main: bool  # whether this process writes and prints
    device: str
    dtype: torch.dtype
    train_profiles: list[Profile]
    validation_profiles: list[Profile]
    test_profiles: list[Profile]
    start: str  # the model after the cold start, or --model
    models: Models
    chat: Chat
    simulator: object
    test_simulator: object  # vanilla users, whatever --difficulty
    slots: int  # dialogues held at once per process
    test_slots: int
    first_step: int

    @property
    def sampling(self) -> dict:
        return dict(think=self.args.think, max_new_tokens=self.args.max_new_tokens, eager=self.args.eager)


def prepare(args: Namespace) -> Run:
    """Raises ValueError before anything is written where flags, files and this machine do not go together."""
    out, offline = Path(args.out), args.simulator == "offline"
    persons = load_profiles(args.train_profiles, offline)
    test_profiles = load_profiles(args.test_profiles, offline)
    validation_profiles = load_profiles(args.validation_profiles, offline)
    resumed = check_out(args)
    accelerator = start_processes(args)
    with accelerator.main_process_first():  # the others find SmolLM2 converted; each rank's reader is on its own GPU
        make_simulator(args, args.difficulty)  # raises where the flags name no user
    ranks, device = accelerator.num_processes, accelerator.device.type
    torch.manual_seed(args.seed)
    dtype = compute_dtype(device, args.dtype)
    plan, fitting = memory_plan(args, ranks if device == "cuda" else 0)
    check_memory(plan, args)
    check_disk(plan, out)
    out.mkdir(parents=True, exist_ok=True)
    if args.track:
        accelerator.init_trackers("rlver", config={k: v for k, v in vars(args).items() if v is not None})
    start = args.model
    if args.cold_start != "none":
        with accelerator.main_process_first():  # the others find it made
            settings = args.model, args.think, args.train_layers, device, dtype
            start = str(cold_start(*settings, persons, validation_profiles))
    models = load_models(args, device, dtype, ranks, start)
    run = Run(
        args=args,
        out=out,
        accelerator=accelerator,
        rank=accelerator.process_index,
        ranks=ranks,
        main=accelerator.is_main_process,
        device=device,
        dtype=dtype,
        train_profiles=with_every_intention(persons),
        validation_profiles=validation_profiles,
        test_profiles=test_profiles,
        start=start,
        models=models,
        chat=Chat(models.tokenizer, instructions(args.think), models.sampler),
        simulator=make_simulator(args, args.difficulty, models.local_llm),
        test_simulator=make_simulator(args, "vanilla", models.local_llm),
        slots=min(fitting, args.batch // ranks),
        test_slots=max(1, fitting * args.turns // SAGE.turns),
        first_step=load_checkpoint(resumed, models) if resumed else 0,
    )
    if run.main:
        announce(run, plan["rollout: KV cache"])
    return run


def check_out(args: Namespace) -> Path | None:
    """The checkpoint to go on from, if any; a run killed before its first one begins anew."""
    out = Path(args.out)
    begun, resumed = (out / "metrics.jsonl").exists(), last_checkpoint(out) if args.resume else None
    if begun and not args.resume:
        raise ValueError(f"--out {out}: holds a run already; choose another folder or go on with --resume")
    if args.resume and not resumed and not begun:
        raise ValueError(f"--resume: no checkpoint in {out}")
    return resumed


def start_processes(args: Namespace) -> Accelerator:
    long_wait = InitProcessGroupKwargs(timeout=timedelta(hours=6))  # for slow users and for checkpoints
    cpu = not torch.cuda.is_available()
    accelerator = Accelerator(log_with=args.track, project_dir=args.out, cpu=cpu, kwargs_handlers=[long_wait])
    if args.batch % (accelerator.num_processes * args.group):
        ranks = accelerator.num_processes
        raise ValueError(f"--batch {args.batch} must be a multiple of {ranks} processes x --group {args.group}")
    return accelerator


def announce(run: Run, cache_gb: float) -> None:
    args = run.args
    for name in ("metrics.jsonl", "transcripts.jsonl"):
        logs.keep_steps_before(run.out / name, run.first_step)
    write_json(run.out / "config.json", vars(args))
    where = f"{run.ranks} x {run.device}" if run.ranks > 1 else run.device
    print(
        f"{args.preset} preset: {args.algo}, {args.model}, {args.steps} steps of {args.batch} dialogues, {where}, {run.dtype}\n"
        f"{run.slots} dialogues at once per process, {cache_gb:.2f} GB of KV cache"
    )


def seed_of(args: Namespace, step: int, dialogue: int) -> int:
    """Seed of one dialogue's sampling, whichever rank holds it."""
    return ((args.seed * 1_000_003 + step + 1) * 1_009 + dialogue) % 2**63


# --- Held-out scores, before and after -------------------------------------------------------------------------------


def held_out(run: Run, sampler, profiles: list[Profile]) -> list[dict]:
    """Transcripts of the sampler's SAGE dialogues with these profiles, each rank's share gathered."""
    mine = range(run.rank, len(profiles), run.ranks)
    seeds = [seed_of(run.args, -1, i) for i in mine]
    settings = run.sampling | dict(temperature=run.args.eval_temperature, slots=run.test_slots)
    held = evaluate(sampler, run.chat, run.test_simulator, [profiles[i] for i in mine], seeds, **settings)
    rows = gather_object([(i, transcript_of(dialogue)) for i, dialogue in zip(mine, held)])
    return [transcript for _, transcript in sorted(rows, key=lambda row: row[0])]


def score_before(run: Run) -> None:
    """Held-out scores of the model that training begins with, and of the base if a cold start has changed it."""
    if run.start != run.args.model:
        base, _ = load_model(run.args.model, run.device, run.dtype)
        keep_score(run, "base", "held-out score of the base       ", base)
        del base
    keep_score(run, "before", "held-out score before RL         ", run.models.sampler)


def keep_score(run: Run, name: str, title: str, model) -> None:
    transcripts = held_out(run, model, run.test_profiles)
    if run.main:
        write_json(run.out / f"{name}.json", transcripts)
        logs.print_score(title, summarize(transcripts))


def score_after(run: Run) -> None:
    """The held-out score of the best model, or the last, and what has changed."""
    run.models.optimizers.clear()  # their memory is free for the best model
    sampler = run.models.sampler
    if (run.out / "best.json").exists():
        sampler, _ = load_model(str(run.out / "best"), run.device, run.dtype)
    after = held_out(run, sampler, run.test_profiles)
    if run.main:
        write_json(run.out / "after.json", after)
    if run.main and (run.out / "before.json").exists():
        base, _ = load_model(run.args.model, run.device, run.dtype)
        logs.report(run.out, after, guard(sampler, run.models.tokenizer, base))
