"""Several processes: two gloo ranks train to the same parameters as one process; a killed run goes on as if it had not been."""

import os
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest
import torch
from conftest import ROOT, byte_tokenizer, metrics_of, parameters_of, tiny_model
from stub import Stub
from transformers import AutoModelForCausalLM, Qwen2Config

import train
from extras.plan import memory_plan

TINY = "--preset laptop --batch 8 --turns 3 --max-new-tokens 9 --no-eval --train-layers 3 --micro-tokens 600 --warmup 1 --cold-start none".split()


@pytest.fixture(scope="module")
def ragged_folder(tiny_reader, tmp_path_factory):
    """A checkpoint whose replies are of uneven length: the stop token's logit swings widely. Beside it a reader."""
    folder = tmp_path_factory.mktemp("ragged") / "model"
    tokenizer, model = byte_tokenizer(), tiny_model()
    model.get_output_embeddings().weight.data[tokenizer.eos_token_id] *= -60
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    shutil.copy(tiny_reader, folder.parent / "reader.pt")
    return folder


def command(folder, out, *flags, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    own = [*TINY, "--model", str(folder), "--reader", str(folder.parent / "reader.pt"), "--out", str(out)]
    return [sys.executable, *launcher, str(ROOT / "train.py"), *own, *map(str, flags)]


def run(*arguments, ranks=1):
    if ranks == 1:  # in this process: no imports anew
        assert train.main(command(*arguments)[2:]) == 0
        return
    done = subprocess.run(command(*arguments, ranks=ranks), capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]


# What a dtype can hold: of metrics absolutely, of the parameters' movement as a share. In bfloat16 a gradient that is all but
# 0 may round to either sign, and Adam's first steps go by the sign alone; a sharded layer keeps its residual in bfloat16 too.
HOLDS = {"float32": (1e-4, 0.01), "bfloat16": (0.25, 0.6)}


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HOLDS)
def test_two_ranks_equal_one_process(dtype, ragged_folder, tmp_path):
    """GRPO; PPO: below, by the paper's command."""
    person = tmp_path / "person.jsonl"
    person.write_text((ROOT / "data" / "validation_profiles.jsonl").read_text(encoding="utf-8").splitlines()[0])
    flags = ("--algo", "grpo", "--group", "2", "--dtype", dtype)
    with Stub() as stub:  # a user whose changes differ, so that advantages do
        flags = (*flags, "--steps", "3", "--lr", "1e-5", "--critic-lr", "1e-5", "--simulator", stub.url)
        flags = (*flags, "--simulator-model", "stub", "--simulator-cache", tmp_path / "cache")
        flags = (*flags, "--eval-every", "3", "--validation-profiles", person)  # who are fewer than ranks
        run(ragged_folder, tmp_path / "one", *flags)
        run(ragged_folder, tmp_path / "two", *flags, ranks=2)
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert one[0]["reply_tokens"] == two[0]["reply_tokens"] and 0 < one[0]["stopped"] < 1, "uneven replies"
    same_draws = (
        len(one) if dtype == "float32" else 1
    )  # then weights that differ in the last digit may draw another token
    for a, b in zip(one[:same_draws], two):
        assert a == pytest.approx(b, abs=HOLDS[dtype][0], rel=HOLDS[dtype][0])
    assert one[0]["grad_norm"] > 0.01 and one[0].get("zero_variance_groups", 0) < 4
    start = AutoModelForCausalLM.from_pretrained(ragged_folder).state_dict()
    moved = apart = 0.0
    for module_a, module_b in zip(parameters_of(tmp_path / "one"), parameters_of(tmp_path / "two")):
        assert module_a.keys() == module_b.keys()
        for name, value in module_a.items():
            before = start.get(name.removeprefix("model."), start.get(name.replace("base_model.", "model."), 0.0))
            moved += (value - before).abs().sum().item()
            apart += (value - module_b[name]).abs().sum().item()
    assert moved > 0.01 and apart < HOLDS[dtype][1] * moved
    # Resuming on another number of ranks, with another user.
    flags = (*flags, "--simulator", "offline")
    run(ragged_folder, tmp_path / "two", *flags, "--steps", "4", "--resume")
    assert [row["step"] for row in metrics_of(tmp_path / "two")] == [0, 1, 2, 3]


KILLED = ("--algo", "grpo", "--group", "2", "--steps", "4", "--save-every", "1", "--dtype", "bfloat16")


@pytest.fixture(scope="module")
def whole(ragged_folder, tmp_path_factory):
    """The uninterrupted run."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(ragged_folder, out, *KILLED)
    return out


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["rollout", "checkpoint"])
def test_a_run_killed_at_any_moment_goes_on_as_if_it_had_not_been(moment, whole, ragged_folder, tmp_path):
    """kill -9 in the third step; the finished run then equals an uninterrupted one, metric by metric."""
    hook = tmp_path / "hook"
    hook.mkdir()
    # Wait for the signal inside the function where the run is to die.
    target = {"rollout": "train.rollout", "update": "grpo.clip_gradients", "checkpoint": "models.dcp.save"}[moment]
    (hook / "die.py").write_text(
        f"import runpy, sys, time, pathlib\nsys.path.insert(0, {str(ROOT)!r})\nimport grpo, models, train\n"
        f"real, count = {target}, 0\n"
        "def dying(*args, **kwargs):\n"
        "    global count\n"
        "    count += 1\n"
        "    if count == 3:\n"
        "        if 'checkpoint_id' in kwargs:\n"
        "            kwargs['checkpoint_id'].mkdir()\n"
        "            (kwargs['checkpoint_id'] / '__0_0.distcp').write_bytes(b'half a checkpoint')\n"
        f"        pathlib.Path({str(hook / 'now')!r}).touch()\n"
        "        time.sleep(600)\n"
        "    return real(*args, **kwargs)\n"
        f"{target} = dying\n"
        "sys.exit(train.main(sys.argv[1:]))\n"
    )
    arguments = command(ragged_folder, tmp_path / "killed", *KILLED)[2:]
    process = subprocess.Popen([sys.executable, str(hook / "die.py"), *arguments], stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (hook / "now").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert (hook / "now").exists()
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    run(ragged_folder, tmp_path / "killed", *KILLED, "--resume")
    assert metrics_of(tmp_path / "killed") == metrics_of(whole)
    for a, b in zip(parameters_of(tmp_path / "killed"), parameters_of(whole)):
        assert all(torch.equal(a[name], b[name]) for name in a)
    read = lambda folder: (folder / "transcripts.jsonl").read_text()
    assert read(tmp_path / "killed") == read(whole)


# --- The paper's own command ------------------------------------------------------------------------------------------

PAPER = (
    "--preset paper --algo ppo --think --batch 8 --turns 1 --max-new-tokens 12 --steps 3 --no-eval --save-every 1 "
    "--lr 1e-5 --critic-lr 1e-5 --micro-tokens 600"
).split()


@pytest.fixture(scope="module")
def thinker_folder(tmp_path_factory):
    """A tiny random Qwen2 in bfloat16, as such models are stored, that closes its thinking now and then: "</think>" is one token."""
    folder = tmp_path_factory.mktemp("thinker") / "model"
    tokenizer, model = byte_tokenizer(), tiny_model("qwen2", seed=3)
    special = ["<|im_start|>", "<|im_end|>", "</think>"]
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    model.resize_token_embeddings(259, mean_resizing=False)
    torch.manual_seed(3)
    model.get_output_embeddings().weight.data[258] = torch.randn(32) * 0.9
    model.bfloat16().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def paper(folder, out, *flags, ranks=1):
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)] if ranks > 1 else []
    return [
        sys.executable,
        *launcher,
        str(ROOT / "train.py"),
        *PAPER,
        "--model",
        str(folder),
        "--out",
        str(out),
        *flags,
    ]


def kill_once_there_is(path, process):
    deadline = time.monotonic() + 120
    while not path.exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    for ours in [*psutil.Process(process.pid).children(recursive=True), process]:  # the ranks first
        ours.kill()
    process.wait()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HOLDS)
def test_the_papers_command_on_two_ranks_equals_one_and_survives_a_kill(dtype, thinker_folder, tmp_path):
    """PPO with thinking, the user played by the frozen policy. In bfloat16 killed after its second checkpoint: it goes on."""
    flags = ("--dtype", dtype)
    assert train.main(paper(thinker_folder, tmp_path / "one", *flags)[2:]) == 0
    two = paper(thinker_folder, tmp_path / "two", *flags, ranks=2)
    if dtype == "bfloat16":
        kill_once_there_is(
            tmp_path / "two" / "trainer-2" / ".metadata", subprocess.Popen(two, stderr=subprocess.DEVNULL)
        )
        two.append("--resume")
    done = subprocess.run(two, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-3000:]
    one, two = metrics_of(tmp_path / "one"), metrics_of(tmp_path / "two")
    assert [row["step"] for row in two] == [0, 1, 2]
    assert 0 < one[0]["format_errors"] < 8 and one[0]["dropped"] == 0, "some reach the user"
    for a, b in zip(one if dtype == "float32" else one[:1], two):
        assert b == pytest.approx(a, abs=HOLDS[dtype][0], rel=HOLDS[dtype][0])
    start = AutoModelForCausalLM.from_pretrained(thinker_folder).state_dict()
    (policy, critic), (our_policy, our_critic) = parameters_of(tmp_path / "one"), parameters_of(tmp_path / "two")
    moved = sum((policy[f"model.{name}"] - before).abs().sum() for name, before in start.items())
    apart = sum((policy[f"model.{name}"] - our_policy[f"model.{name}"]).abs().sum() for name in start)
    assert moved > 0 and apart < HOLDS[dtype][1] * moved
    if dtype == "float32":
        for ours, theirs in ((our_policy, policy), (our_critic, critic)):
            assert all(torch.allclose(ours[name], theirs[name], atol=1e-5) for name in theirs)


def test_the_plan_says_what_fits_and_what_to_change(tmp_path, capsys):
    """Qwen2.5-7B's shape from its config.json alone: fits on 8 x 80 GB with PPO and think, not on one."""
    shape = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    Qwen2Config(**shape, num_key_value_heads=4, vocab_size=152064, tie_word_embeddings=False).save_pretrained(tmp_path)
    flags = ["--plan", "--preset", "paper", "--think", "--model", str(tmp_path), "--gpu-memory", "80"]
    assert train.main([*flags, "--gpus", "8"]) == 0
    out = capsys.readouterr().out
    assert "fits into 80 GB" in out and "critic" in out
    assert train.main([*flags, "--gpus", "1"]) == 2
    assert "more GPUs" in capsys.readouterr().err
    flags_cold = [*flags, "--gpus", "8", "--cold-start", "exchanges"]
    assert train.main(flags_cold) == 2
    assert "cold start: all weights" in (error := capsys.readouterr().err) and "choose --cold-start none" in error
    assert train.main([*flags_cold, "--train-layers", "1", "--micro-tokens", "900000"]) == 2
    assert "cold start" not in capsys.readouterr().err, "what needs most is the update's"
    peaks = [memory_plan(train.parse_args([*flags, *more]), 8)[0]["peak"] for more in ([], ["--eager"])]
    assert peaks[1] > peaks[0] + 2, "a dense mask of 40,000 x 40,000"
