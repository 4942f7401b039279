"""RLVER, the whole loop: simulated users -> rollouts -> reward -> PPO or GRPO -> a policy that users like better.

    for each step:
        1. draw profiles; a group of dialogues with each (PPO: of one, unless they share their history)
        2. rollout: policy and users take turns until every dialogue has ended
        3. reward: final emotion / 100, or the change per turn; the batch to train on
        4. advantages and update (ppo.py, grpo.py)
        5. log metrics, transcripts, curves; save a checkpoint

Flags and presets are in settings.py: `python train.py --help`.
"""

import json
import random
import sys
import time
from argparse import Namespace
from itertools import zip_longest

from accelerate.utils import broadcast_object_list, gather_object
from tqdm import tqdm

import grpo
import ppo
from distributed import deal
from evaluate import summarize, write_json
from extras import logs
from extras.plan import print_plan
from models import last_checkpoint, save_checkpoint
from policy import save_model
from rollout import Batch, Dialogue, make_batch, rollout
from run import Run, held_out, prepare, score_after, score_before, seed_of
from settings import parse_args
from simulator import RLVER, Profile, Protocol, UserBroken
from verify import transcript_of

MOST_DROPPED = 0.5  # share of a step's dialogues whose user may break down


def train(args: Namespace) -> None:
    run = prepare(args)
    if not args.no_eval and run.first_step == 0:
        score_before(run)
    steps = range(run.first_step, args.steps)
    for step in tqdm(steps, "training", args.steps, initial=run.first_step, unit="step", disable=not run.main):
        clock = [time.perf_counter()]
        profiles = draw_profiles(run.train_profiles, step, args.batch // args.group, args.seed)  # 1
        dialogues = hold_dialogues(run, step, profiles)  # 2
        transcripts = write_transcripts(run, step, dialogues)
        saved = step % args.save_every == 0  # by the step before
        stop_if_broken(run, step, [d.dropped for d in dialogues], run.ranks, saved, kind="simulated")
        batch = make_batch(dialogues, args.reward)  # 3
        clock.append(time.perf_counter())
        metrics = update(run, step, batch)  # 4
        clock.append(time.perf_counter())
        log(run, step, dialogues, transcripts, metrics, clock)  # 5
        stop = validate(run, step)
        if stop or (step + 1) % args.save_every == 0 or step + 1 == args.steps:
            save_checkpoint(run.out, step + 1, run.models)
        if stop:
            break
    if not args.no_eval:
        score_after(run)
    run.accelerator.end_training()


def draw_profiles(profiles: list[Profile], step: int, count: int, seed: int) -> list[Profile]:
    """The profiles of one step: the training set in an order shuffled anew each epoch, the hidden intentions in turn, so that no
    step rewards one act more than another. Depends on nothing but the arguments."""
    epoch, start = divmod(step * count, len(profiles))
    order = []
    while len(order) < start + count:
        shuffled = list(profiles)
        random.Random(f"{seed} {epoch}").shuffle(shuffled)
        by_task = {}
        for profile in shuffled:
            by_task.setdefault(profile.task, []).append(profile)
        for one_of_each in zip_longest(*by_task.values()):
            order += [profile for profile in one_of_each if profile]
        epoch += 1
    return order[start : start + count]


def hold_dialogues(run: Run, step: int, profiles: list[Profile]) -> list[Dialogue]:
    """--group dialogues with each profile, whose history they share where each reply is credited with what it caused itself.
    Every rank holds its share; all ranks get them all."""
    args = run.args
    share = args.batch // run.ranks  # whole groups: their opening is computed once
    mine = range(run.rank * share, (run.rank + 1) * share)
    people = [profiles[i // args.group] for i in mine]
    seeds = [seed_of(args, step, i) for i in mine]
    protocol = Protocol(RLVER.start, args.turns)
    with tqdm(total=share, desc="dialogues", unit="dialogue", leave=False, disable=not run.main) as bar:
        settings = run.sampling | dict(temperature=args.temperature, slots=run.slots, together=args.together)
        dialogues = rollout(
            run.models.sampler, run.chat, run.simulator, people, seeds, protocol, on_end=bar.update, **settings
        )
    return gather_object(dialogues)


def write_transcripts(run: Run, step: int, dialogues: list[Dialogue]) -> list[dict]:
    groups = [dialogues[first : first + run.args.together] for first in range(0, len(dialogues), run.args.together)]
    transcripts = [transcript_of(group[0], group[1:]) for group in groups]
    if run.main:
        logs.append_jsonl(run.out / "transcripts.jsonl", [{"step": step} | row for row in transcripts])
    return transcripts


def stop_if_broken(run: Run, step: int, dropped: list[str], needed: int, saved: bool, kind: str) -> None:
    """Save, unless that is done, and raise UserBroken when too many dialogues were dropped, or fewer than `needed` are left.
    `dropped`: of each dialogue with users of this `kind` the reason or ""."""
    reasons = [reason for reason in dropped if reason]
    if len(reasons) <= min(MOST_DROPPED * len(dropped), len(dropped) - needed):
        return
    if step > run.first_step and not saved:
        save_checkpoint(run.out, step, run.models)
    again = "go on with --resume" if last_checkpoint(run.out) else "start again"
    problem = f"{len(reasons)} of {len(dropped)} {kind} users broke down, most recently: {reasons[-1]}"
    raise UserBroken(f"step {step}: {problem}; mend the simulator and {again}")


def update(run: Run, step: int, batch: Batch) -> dict:
    """Advantages, then an update on them. Dialogues are dealt anew: as many tokens for every rank."""
    args, models = run.args, run.models
    models.make_room()
    set_learning_rates(models.optimizers, step, args)
    sampled = batch.dialogue_N.bincount().tolist()
    kept = [dialogue for dialogue, tokens in enumerate(sampled) if tokens]  # their users did not break down
    dealt = deal([sampled[dialogue] for dialogue in kept], run.ranks)
    part, index_n = batch.part([kept[piece] for piece in dealt[run.rank]])
    if args.algo == "grpo":
        settings = dict(per_turn=args.reward != "terminal", gamma=args.gamma, std=args.std)
        advantages_N, flat_groups = grpo.group_advantages(batch, args.group, **settings)
        advantages_n = advantages_N[index_n]
        metrics = grpo.update(models.policy, models.reference, *models.optimizers, part, advantages_n, args)
        metrics["zero_variance_groups"] = flat_groups
    else:
        metrics = ppo.update(models.policy, models.reference, models.critic, *models.optimizers, part, args)
    models.follow()
    return metrics


def set_learning_rates(optimizers: list, step: int, args: Namespace) -> None:
    """A linear warm-up, times a linear decay from 1 at the first step to --lr-end after the last."""
    warm = min(1.0, (step + 1) / max(1, args.warmup))
    for optimizer, lr in zip(optimizers, (args.lr, args.critic_lr)):
        for group in optimizer.param_groups:
            group["lr"] = lr * warm * (1 - (1 - args.lr_end) * step / args.steps)


def log(run: Run, step: int, dialogues: list[Dialogue], transcripts: list[dict], metrics: dict, clock: list) -> None:
    sampled = sum(len(turn.sampled_ids) for dialogue in dialogues if not dialogue.dropped for turn in dialogue.turns)
    metrics = logs.rollout_metrics(dialogues, transcripts, run.args.reward) | metrics
    metrics["rollout_seconds"], metrics["update_seconds"] = clock[1] - clock[0], clock[2] - clock[1]
    metrics["tokens_per_second"] = sampled / metrics["rollout_seconds"]
    metrics["peak_memory_gb"] = logs.peak_memory_gb()
    run.accelerator.log(metrics, step=step)
    if run.main:
        logs.append_jsonl(run.out / "metrics.jsonl", [{"step": step} | metrics])
        logs.draw_curves(run.out)
        logs.print_step(step, metrics)


def validate(run: Run, step: int) -> bool:
    """With --eval-every: keep the model in out/best if it has the best score so far; True when the run should stop."""
    args, best = run.args, run.out / "best.json"  # [score, step] of out/best
    if not args.eval_every or (step + 1) % args.eval_every:
        return False
    transcripts = held_out(run, run.models.sampler, run.validation_profiles)
    stop_if_broken(run, step + 1, [t["dropped"] for t in transcripts], needed=1, saved=False, kind="validation")
    score = summarize(transcripts)["score"]
    so_far = json.loads(best.read_text()) if run.main and best.exists() else [-1.0, 0]
    best_score, best_step = broadcast_object_list(so_far)  # a shared disk may still show others an old one
    if run.main and score > best_score:
        save_model(run.models.sampler, run.models.tokenizer, run.out / "best")
        write_json(best, [score, step + 1])
    if run.main:
        tqdm.write(f"step {step:3d}  validation score {score:.1f}, best before {best_score:.1f}")
    return score <= best_score and step + 1 - best_step >= args.patience * args.eval_every


def main(argv=None) -> int:
    args = parse_args(argv)
    try:
        if args.plan:
            print_plan(args)
            return 0
        train(args)
    except (ValueError, UserBroken, OSError) as error:  # ProfileError and ModelError are ValueErrors
        print(f"train.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
