"""What stands beside a score: the report in a real browser, strategies, ordinary text, tracking, other users, judge, tasks."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
import torch
from conftest import ROOT, AnyReader, tiny_model
from markupsafe import escape
from stub import Stub

import evaluate
import train
from extras import probes
from extras.report import write_report
from offline_user import ALONE, TABLE, OfflineSimulator, change_of, points_for
from policy import ModelError
from reader import ACTS, Features, Head, Reader, save_reader
from rollout import Dialogue, Turn
from simulator import INTENTIONS
from verify import problems_in, transcript_of

CHROMIUM = shutil.which("chromium")
SCRIPT = "<script>document.title = 'hacked'</script><img src=x onerror=\"document.title='hacked'\">"


def transcript(
    name="p1", points=(40, 45, 40), fired=([("praise", 5.0, 50)], [("beside", -5.0, 90)]), reply="You cared.", **more
):
    history = [{"role": "user", "content": "The dog ran off.", "emotion-point": points[0]}]
    for before, after, lines in zip(points, points[1:], fired):
        history.append({"role": "assistant", "content": reply, "thinking": "Hm. A dog.", "stopped": True})
        planning = {"change": after - before, "fired": list(lines)}
        history.append({"role": "user", "content": "Well.", "emotion-point": after, "planning": planning})
    profile = {"id": name, "character": "passive", "task": "to be heard", "emo_point": points[-1], "dropped": ""}
    return profile | {"history": history} | more


def browse(path, tmp_path, *flags):
    if CHROMIUM is None:
        pytest.skip("needs chromium")
    quiet = "--no-first-run --disable-background-networking --disable-component-update --disable-sync".split()
    command = [
        CHROMIUM,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        *quiet,
        f"--user-data-dir={tmp_path / 'chromium'}",
    ]
    done = subprocess.run([*command, *flags, f"file://{path}"], capture_output=True, text=True, timeout=60)
    return done.stdout


# --- the report -------------------------------------------------------------------------------------------------------


@pytest.fixture
def page(tmp_path):
    """Two models; text that tries to be HTML wherever text can stand."""
    reasons = {"change": -5, "fired": [], "Analyse": f"felt alone {SCRIPT}"}
    models = {
        name: [transcript(), transcript("p2", reply=f"A {name} reply {SCRIPT}")] for name in ("one", f"two {SCRIPT}")
    }
    for t in models["one"]:
        t["task"] = f"{t['task']} {SCRIPT} {'x' * 300}"
        t["history"][1]["thinking"] += SCRIPT
        t["history"][2] |= {"content": f"The user {SCRIPT} \ud83d", "planning": reasons, "emotion-point": 35}
    path = tmp_path / "report.html"
    write_report(path, models, {name: evaluate.summarize(rows) for name, rows in models.items()}, [f"a note {SCRIPT}"])
    return path


def test_the_report_needs_nothing_else_and_escapes_everything(page):
    html = page.read_text(encoding="utf-8")
    assert "<script" not in html and "<img" not in html and 'onerror="' not in html
    assert not re.search(r"(src|href)=|url\(|@import|https?://", html.replace("src=x", ""))
    assert not list(page.parent.glob("*.tmp"))
    for part in ("A one reply", "The user", "felt alone", "Hm. A dog.", "praise +5.0", "beside -5.0", "a note", "<svg"):
        assert part in html
    assert html.count("<summary>thinking</summary>") == 8 and html.count("<details class='case' open>") == 1


def test_a_browser_shows_the_dialogues_as_text_and_runs_nothing(page, tmp_path):
    dom = browse(page, tmp_path, "--dump-dom")
    assert "<title>RLVER report</title>" in dom
    assert (
        "&lt;script&gt;document.title = 'hacked'&lt;/script&gt;" in dom and "<script" not in dom and "<img" not in dom
    )


@pytest.mark.parametrize("width", [1280, 400])
def test_nothing_is_wider_than_the_window(page, tmp_path, width):
    """The page with a script of the test's own, which the page's policy would forbid."""
    html = re.sub(r"<meta http-equiv[^>]*>", "", page.read_text(encoding="utf-8")).replace("<details", "<details open")
    measure = "Math.max(...[...document.querySelectorAll('body *')].map(e => e.getBoundingClientRect().right))"
    columns = "getComputedStyle(document.querySelector('.pair')).gridTemplateColumns.split(' ').length"
    script = f"<script>document.title = [innerWidth, {measure}, {columns}].join()</script></body>"
    copy = tmp_path / "measured.html"
    copy.write_text(html.replace("</body>", script), encoding="utf-8")
    dom = browse(copy, tmp_path, "--hide-scrollbars", f"--window-size={width},900", "--dump-dom")
    window, right, columns = map(float, re.search(r"<title>([\d.,]+)</title>", dom)[1].split(","))
    assert right <= window and columns == (2 if width > 700 else 1)


def held(chat, simulator, profiles, seed):
    """Transcripts of a tiny model's dialogues."""
    seeds = [seed + i for i in range(len(profiles))]
    settings = dict(think=False, max_new_tokens=6, temperature=1.0)
    dialogues = evaluate.evaluate(tiny_model(), chat, simulator, profiles, seeds, **settings)
    return [transcript_of(dialogue) for dialogue in dialogues]


def test_transcripts_alone_make_a_report_and_a_comparison(chat, simulator, profiles, tmp_path, capsys):
    stored = {name: held(chat, simulator, profiles[:6], seed) for name, seed in (("after", 0), ("before", 100))}
    files = [str(tmp_path / f"{name}.json") for name in stored]
    for path, rows in zip(files, stored.values()):
        evaluate.write_json(Path(path), rows)
    out = tmp_path / "result.json"
    assert evaluate.main(["--transcripts", *files, "--out", str(out), "--show", "0"]) == 0
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    paired = evaluate.compare(stored["after"], stored["before"])
    assert paired["pairs"] == 6 and paired["difference"] != 0
    assert result["results"]["difference"] == paired and evaluate.verdict("after", "before", paired) in said
    html, (first, *others) = (tmp_path / "result.html").read_text(encoding="utf-8"), result["dialogues"]["after"]
    assert str(escape(first["history"][1]["content"])) in html and html.count("class='case'") == 1 + len(others)


def test_training_ends_with_a_report_of_before_beside_after(tiny_folder, tmp_path):
    few = tmp_path / "few.jsonl"
    few.write_text("".join((ROOT / "data" / "test_profiles.jsonl").open(encoding="utf-8").readlines()[:2]))
    flags = "--preset laptop --batch 2 --group 2 --turns 1 --max-new-tokens 4 --steps 1 --train-layers 1".split()
    flags += ["--cold-start", "none"]
    out = tmp_path / "out"
    assert train.main([*flags, "--model", str(tiny_folder), "--test-profiles", str(few), "--out", str(out)]) == 0
    html, result = (out / "report.html").read_text(encoding="utf-8"), json.loads((out / "result.json").read_text())
    assert html.count("<h3 class='name'>before</h3>") == html.count("<h3 class='name'>after</h3>") == 2
    assert 0 <= result["after"]["guard"]["kl"] < 1 and result["after"]["guard"]["base_perplexity"] > 1


# --- how it won -------------------------------------------------------------------------------------------------------


def test_a_strategy_is_the_act_with_the_largest_share_or_a_guard():
    fired = (
        (("beside", -0.6, 30), ("praise", 7.0, 70), ("finds fault", -1.0, 100)),
        (("opening", -2.0, 100), ("listen", -1.2, 60), ("generic", -1.2, 40), ("unfinished", -3.0, 100)),
        (("again", -6.0, 100), ("in low spirits", -2.0, 100)),
        (("praise", -1.4, 70), ("reflect", -0.9, 30)),
    )
    one = transcript(points=(40, 46, 39, 31, 29), fired=fired)
    used = evaluate.summarize([one])["strategies"]
    assert list(used) == ["praise", "listen", "again"], "the commonest first"
    assert used["praise"] == {"share": 50.0, "mean_change": 2.0, "n": 2}
    assert used["listen"] == {"share": 25.0, "mean_change": -7.0, "n": 1} and used["again"]["mean_change"] == -8
    unread = transcript(points=(40, 45), fired=[[]])
    assert evaluate.summarize([unread])["strategies"] == {}, "a prompted user gives no acts"
    acts = [("praise", 6, False), ("listen", -7, False), ("again", -8, False), ("praise", -2, False)]
    assert probes.acts_of(one) == acts
    one["history"][4]["hinted"] = True  # from then on the person's wish could be known
    assert [hinted for _, _, hinted in probes.acts_of(one)] == [False, False, True, True]
    one["task"] = INTENTIONS["praise"]
    assert probes.found_out([one]) == {"serves": 50.0, "serves_after_hint": 50.0, "commonest_opening": 100.0}


def test_thinking_is_counted_beside_the_reply():
    result = evaluate.summarize([transcript()])
    assert result["words_per_reply"] == 2 and result["thinking_words_per_reply"] == 3


# --- ordinary text ----------------------------------------------------------------------------------------------------


def test_the_guard_is_zero_for_the_same_model_and_equals_a_direct_computation(tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("One plus one is two.\n\nA second\npassage.\n")
    a, b = tiny_model(seed=0), tiny_model(seed=1)
    assert probes.guard(a, tokenizer, tiny_model(seed=0), path)["kl"] == 0
    found = probes.guard(a, tokenizer, b, path)
    kl, nll, count = 0.0, 0.0, 0
    for passage in ("One plus one is two.", "A second\npassage."):
        ids = torch.tensor([tokenizer(passage)["input_ids"]])
        p, q = (torch.distributions.Categorical(logits=m(ids).logits[0, :-1]) for m in (b, a))
        kl += torch.distributions.kl_divergence(p, q).sum().item()
        nll -= q.log_prob(ids[0, 1:]).sum().item()
        count += ids.shape[1] - 1
    assert found["tokens"] == count and found["kl"] == pytest.approx(kl / count, abs=1e-5) and found["kl"] > 0
    assert found["perplexity"] == pytest.approx(2.718281828 ** (nll / count), rel=1e-4)
    assert "base_perplexity" not in probes.guard(a, tokenizer, path=path)


def test_the_ordinary_text_is_varied():
    passages = probes.ORDINARY_TEXT.read_text(encoding="utf-8").strip().split("\n\n")
    assert len(set(passages)) >= 40 and all(80 < len(passage) < 600 for passage in passages)


# --- tracking ---------------------------------------------------------------------------------------------------------


class Oracle(torch.nn.Module):
    """A model that hears "Thanks" in the user's last message: it says Yes to "better" after it, to "worse" otherwise."""

    def __init__(self, tokenizer, habit=0.0):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.ones(1))
        self.tokenizer, self.habit = tokenizer, habit
        self.yes, self.no = (tokenizer(word)["input_ids"][0] for word in ("Yes", "No"))

    def get_output_embeddings(self):
        return lambda hidden: hidden

    def answer(self, ids):
        text = self.tokenizer.decode(ids)
        last = text.rsplit("<|im_start|>user\n", 1)[1]
        assert text.endswith("<|im_start|>assistant\n") and "Answer Yes or No." in last
        logits = torch.zeros(258)
        logits[self.yes] = self.habit + (1.0 if ("Thanks" in last) == ("better" in last) else -1.0)
        return logits


@pytest.mark.parametrize("habit", [0.0, 9.0])
def test_tracking_is_100_for_an_oracle_even_if_it_likes_to_say_yes(tokenizer, chat, monkeypatch, habit):
    def hidden(
        model, batch, rows, dtype
    ):  # stands in for policy.sampled_hidden: the oracle reads the merged copies' text
        answers, indices = [], []
        for row in rows:
            tree, place_n, index_n = batch.merge((row,))
            for place in place_n.tolist():
                answers.append(model.answer([tree.ids[k] for k in range(place + 1) if tree.ends[k] > place]))
            indices.append(index_n)
        return torch.stack(answers), torch.cat(indices)

    monkeypatch.setattr(probes, "sampled_hidden", hidden)
    rows = [transcript(name, (40, 45, 40, 40), [[]] * 3) for name in ("p1", "p2", "p3")]
    for row in rows:
        row["history"][2]["content"] = "Thanks!"
    result = probes.track(Oracle(tokenizer, habit), chat, rows, torch.float32)
    assert result == {"messages": 6, "rose": 3, "score": [100.0, 0.0]}
    rows[0]["history"][2]["content"] = "Well."  # one of three rises is missed: (2/3 + 1) / 2
    score, error = probes.track(Oracle(tokenizer, habit), chat, rows, torch.float32)["score"]
    assert score == pytest.approx(83.33, abs=0.01) and error > 5


def test_tracking_by_the_merged_copies_equals_plain_forwards(tokenizer, chat):
    model = tiny_model()
    rows = [transcript(f"p{i}", (40, 45, 42), reply=f"Reply {i}.") for i in range(12)]
    beliefs = []
    for row in rows:
        for k in (2, 4):
            leaning = []
            for question in probes.QUESTIONS:
                ids = chat.opening(row["history"][0]["content"])
                for reply, user in zip(row["history"][1:k:2], row["history"][2 : k + 1 : 2]):
                    asked = (
                        f"{user['content']}\n\n{question} Answer Yes or No."
                        if user is row["history"][k]
                        else user["content"]
                    )
                    ids = ids + chat.text_ids(reply["content"]) + chat.between(asked, False)
                logits = model(torch.tensor([ids])).logits[0, -1]
                leaning.append(logits[tokenizer("Y")["input_ids"][0]] - logits[tokenizer("N")["input_ids"][0]])
            beliefs.append((row["id"], k == 2, (leaning[0] > leaning[1]).item() == (k == 2)))
    found = probes.track(model, chat, rows, torch.float32)
    assert found["score"][0] == pytest.approx(probes.balanced_accuracy(beliefs), abs=0.01) and found["messages"] == 24


def test_balanced_accuracy_is_chance_for_one_answer_to_everything():
    always_better = [("p", rose, rose) for rose in (True, True, True, False)]
    assert probes.balanced_accuracy(always_better) == 50 and probes.balanced_accuracy(always_better[:3]) is None


# --- the command line -------------------------------------------------------------------------------------------------


@pytest.fixture
def flags(tiny_folder, tmp_path):
    few = tmp_path / "few.jsonl"
    lines = (ROOT / "data" / "test_profiles.jsonl").read_text(encoding="utf-8").splitlines()[:3]
    few.write_text("\n".join(lines) + "\n", encoding="utf-8")
    text = tmp_path / "result.json"
    return f"--model {tiny_folder} --profiles {few} --max-new-tokens 6 --show 0 --out {text}".split()


RATING = {key: 3 for key in probes.CAPABILITIES} | {key: -1 for key in probes.COORDINATES}


def test_other_users_and_a_held_out_judge_in_one_call(flags, tiny_folder, tmp_path, capsys):
    rate = lambda count, system, text: json.dumps(RATING) if "empathic depth" in system else None
    with Stub(rate) as stub:
        more = ["--beyond", "--tracking", "--judge", stub.url, "--judge-model", "stub", "--against", str(tiny_folder)]
        assert evaluate.main([*flags, *more]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    ours = result["results"][str(tiny_folder)]
    assert list(ours["beyond"]) == ["vanilla", "challenging", "adversarial", "held-out judge"]
    assert all(ours["beyond"]["vanilla"][key] == ours[key] for key in ("score", "standard_error", "failure"))
    assert set(result["beyond"]) == {"challenging", "adversarial", "held-out judge"}
    assert all(t["behaviour"] for t in result["beyond"]["adversarial"][str(tiny_folder)])
    assert "Analyse" in result["beyond"]["held-out judge"][str(tiny_folder)][0]["history"][2]["planning"]
    assert ours["judged"]["capabilities"]["core insight"] == [3, 0] and ours["judged"]["judged"] == 3
    assert ours["judged"]["coordinates"]["empathy or solution"] == [-1, 0] and ours["guard"]["perplexity"] > 1
    asked = next(r for r in stub.requests if "empathic depth" in r["messages"][0]["content"])
    schema = asked["response_format"]["json_schema"]["schema"]
    assert asked["temperature"] == 0 and {kind["type"] for kind in schema["properties"].values()} == {"integer"}
    assert "emotion" not in asked["messages"][1]["content"]
    said, html = capsys.readouterr().out, (tmp_path / "result.html").read_text(encoding="utf-8")
    assert (
        "score with user: held-out judge" in said
        and "judge: core insight" in said
        and "tracking of the emotion" in said
    )
    assert (
        "score with user: held-out judge" in html and "judge: core insight" in html and "No held-out judge" not in html
    )


def test_without_a_judge_the_table_says_so(flags, capsys):
    assert evaluate.main([*flags, "--beyond"]) == 0
    assert "No held-out judge was asked" in capsys.readouterr().out


def test_a_judge_that_answers_badly_is_asked_once_more_then_skipped_and_counted():
    rows = [transcript(name, reply=f"I hear you, {name}.") for name in ("anna", "berta", "clara", "dora")]

    def fault(count, system, text):
        if "clara" in text:
            return (401, {}, b"", 0)
        if "berta" in text and "# Once more" in text or "anna" in text:
            return f"Here you are: ```json\n{json.dumps(RATING | {'core insight': 5 if 'anna' in text else 1})}\n```"
        return json.dumps(RATING | {"core insight": 9})

    with Stub(fault) as stub:
        judged = probes.judge(probes.ServerLLM(stub.url, "stub", attempts=2), rows)
    assert (judged["judged"], judged["skipped"]) == (2, 2) and judged["capabilities"]["core insight"] == [3.0, 2.0]
    assert sum("dora" in r["messages"][1]["content"] for r in stub.requests) == 2
    again = next(r["messages"][1]["content"] for r in stub.requests if "# Once more" in r["messages"][1]["content"])
    assert "'core insight' must be a whole number from 1 to 5" in again and "'core insight'" in judged["last_problem"]


def test_tasks_through_a_stubbed_lm_eval(flags, tiny_folder, tmp_path, monkeypatch, capsys):
    """Only the calls are tested: the real package and its data sets are not."""
    calls = []

    def simple_evaluate(**settings):
        calls.append(settings)
        if settings["tasks"] == ["nonsense"]:
            raise KeyError("no such task")
        return {"results": {task: {"alias": task, "exact_match,none": 0.25 * len(calls)} for task in settings["tasks"]}}

    package, folder, huggingface = (
        ModuleType("lm_eval"),
        ModuleType("lm_eval.models"),
        ModuleType("lm_eval.models.huggingface"),
    )
    package.simple_evaluate, huggingface.HFLM = simple_evaluate, lambda **settings: SimpleNamespace(**settings)
    for module in (package, folder, huggingface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    base = tmp_path / "base"
    shutil.copytree(tiny_folder, base)
    assert evaluate.main([*flags, "--tasks", "gsm8k,ifeval", "--against", str(base)]) == 0
    results = json.loads((tmp_path / "result.json").read_text())["results"]
    assert results[str(tiny_folder)]["tasks"] == {task: {"exact_match,none": 0.25} for task in ("gsm8k", "ifeval")}
    assert (
        results[str(base)]["tasks"]["gsm8k"] == {"exact_match,none": 0.5}
        and "gsm8k: exact_match,none" in capsys.readouterr().out
    )
    assert calls[0]["model"].pretrained.num_parameters() > 0 and calls[0]["confirm_run_unsafe_code"] is False
    assert results[str(tiny_folder)]["guard"]["kl"] == 0 and "kl" not in results[str(base)]["guard"]
    assert evaluate.main([*flags, "--tasks", "nonsense"]) == 2
    assert "--tasks nonsense: lm_eval stopped: KeyError" in capsys.readouterr().err


@pytest.mark.parametrize(
    "more, named",
    [
        (["--judge", "http://localhost:1/v1"], "--judge"),
        (["--judge", "http://me:secret@localhost:1/v1", "--judge-model", "m"], "--judge"),
        (["--transcripts", "x.jsonl", "--beyond"], "--transcripts: --beyond, --tracking and --tasks need a --model"),
        (["--tasks", "gsm8k"], "--tasks: package not installed; run `pip install"),
        (["--out", "."], "--out .: must be a file"),
        (["--out", "page.html"], "--out page.html: must be a file"),
    ],
)
def test_what_cannot_work_is_said_at_once(flags, tmp_path, capsys, monkeypatch, more, named):
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert evaluate.main([*flags, *more]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("evaluate.py: ") and named in error and "\n" not in error and "secret" not in error
    assert not (tmp_path / "result.json").exists()


def test_one_model_against_itself_under_other_seeds_shows_no_difference(chat, simulator, profiles):
    first, other = (
        [t for seed in (start, start + 50) for t in held(chat, simulator, profiles[:8], seed)] for start in (0, 100)
    )
    assert first != other
    assert "no difference between A and A is shown" in evaluate.verdict("A", "A", evaluate.compare(first, other))


# --- what can be derived again ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("difficulty", ["vanilla", "challenging"])
def test_every_change_follows_from_what_the_transcript_holds(difficulty, chat, profiles):
    rows = held(chat, OfflineSimulator(AnyReader(), difficulty), profiles[:12], 0)
    counted, named = 0, set()
    for row in rows:
        assert problems_in(json.loads(json.dumps(row))) == []
        intention = next(key for key, task in INTENTIONS.items() if task == row["task"])
        said = [message for message in row["history"] if message["role"] == "user"]
        for before, after in zip(said, said[1:]):
            fired = after["planning"]["fired"]
            acts = [(name, share) for name, _, share in fired if name in TABLE]
            points = points_for(acts, intention, row["character"], difficulty, before["emotion-point"])
            assert change_of(points) == change_of(fired) == after["planning"]["change"]
            named |= {name for name, _, _ in fired}
            counted += 1
    assert counted > 20 and named & set(ACTS) and named & set(ALONE) and named - set(TABLE), named


REPLIES = (
    "You cared for them when nobody else would.", "Maybe they were afraid of what comes.",
    "Tell me more about the day.", "Could you ask them on Sunday?", "Which part of it was yours?",
    "It must feel so lonely in that room.", "None of this was your fault.", "They have a case, and so have you.",
    "Cold soup is better than none.",
)  # fmt: skip


@pytest.fixture
def sharp_reader(tiny_folder, tmp_path):
    """A reader on a tiny model that is sure of what it reads, and reads most replies differently."""
    torch.manual_seed(0)
    head, features = Head(4 * 32), Features(str(tiny_folder), (2,))([(("Well.",), reply) for reply in REPLIES])
    head.mean, head.deviation = features.mean(0), features.std(0) + 1e-5
    head.linear.weight.data *= 10
    path = tmp_path / "sharp.pt"
    save_reader(path, str(tiny_folder), (2,), head)
    return path


def test_a_reader_of_other_acts_is_refused(sharp_reader):
    saved = torch.load(sharp_reader, weights_only=True)
    torch.save(saved | {"acts": (*ACTS[1:], ACTS[0])}, sharp_reader)
    with pytest.raises(ModelError, match="not fitted on the acts in reader.ACTS; fit it anew"):
        Reader(sharp_reader)


def test_verify_finds_what_was_forged(sharp_reader, profiles, tmp_path, capsys):
    """A change, an emotion, an act's share; and with --read a reply that another was put in for."""
    simulator = OfflineSimulator(Reader(sharp_reader))
    dialogues = [Dialogue(simulator.open(profile, 40).result(), 40) for profile in profiles[:6]]
    for text in REPLIES:
        going = [d for d in dialogues if not d.turns or not d.turns[-1].reaction.goodbye]
        futures = [simulator.submit(dialogue.user, text) for dialogue in going]
        simulator.work()
        for dialogue, future in zip(going, futures):
            dialogue.turns.append(Turn([], [], [], True, "", text, True, future.result()))
    rows, path = [transcript_of(dialogue) for dialogue in dialogues], tmp_path / "t.jsonl"

    def verify(forge=None, *flags):
        forged = json.loads(json.dumps(rows))
        if forge:
            forge(forged[1])
        path.write_text("".join(json.dumps(row) + "\n" for row in forged), encoding="utf-8")
        status = evaluate.main(["--verify", str(path), "--reader", str(sharp_reader), *flags])
        return status, capsys.readouterr().out

    assert verify()[0] == verify(None, "--read")[0] == 0

    def prompted(row):
        for message in row["history"][2::2]:
            message |= {"planning": {"change": 0, "Analyse": "Fine."}, "emotion-point": 40}
        row["emo_point"] = 40

    assert verify(prompted, "--read")[0] == 0, "no reader has appraised this one"
    turn = next(turn for turn in (1, 2, 3) if rows[1]["history"][2 * turn]["planning"]["change"] < 5)

    def another_change(row):
        row["history"][2 * turn]["planning"]["change"] += 3
        for message in row["history"][2 * turn :: 2]:
            message["emotion-point"] += 3
        row["emo_point"] += 3

    def another_emotion(row):
        row["history"][2 * turn]["emotion-point"] += 3

    def another_share(row):
        max(row["history"][2 * turn]["planning"]["fired"], key=lambda line: abs(line[1]))[2] = 0

    def another_alternative(row):
        message, after = row["history"][2 * turn - 1 : 2 * turn + 1]
        message["instead"] = [
            {"content": "Hm.", "fired": after["planning"]["fired"], "change": after["planning"]["change"] + 3}
        ]

    for forge, words in (
        (another_change, f"turn {turn}: the change"),
        (another_emotion, f"turn {turn}: the logged emotion"),
        (another_share, f"turn {turn}: the change"),
        (another_alternative, "'Hm.': the change"),
    ):
        status, out = verify(forge)
        assert status == 1 and f"line 2: {profiles[1].id}: {words}" in out and "line 1:" not in out

    def another_reply(row):
        changes = {m["planning"]["change"] for m in row["history"][2::2]}
        assert len(changes) > 1
        best = max(range(1, len(row["history"]), 2), key=lambda k: row["history"][k + 1]["planning"]["change"])
        worst = min(range(1, len(row["history"]), 2), key=lambda k: row["history"][k + 1]["planning"]["change"])
        row["history"][best]["content"] = row["history"][worst]["content"]

    assert verify(another_reply)[0] == 0, "what was read is not looked at"
    status, out = verify(another_reply, "--read")
    assert status == 1 and f"{profiles[1].id}: turn" in out and "read again" in out
