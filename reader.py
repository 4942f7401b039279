"""The reader: (what the person said, a reply) -> what the reply does for this person.

    last two messages + reply -> SmolLM2's lower layers, frozen -> a small trained head -> share of each act

    python reader.py --fit            fit the head anew on data/exchanges.jsonl; print how good it is on what it has not seen
    python reader.py --fit --judge    a second reader: other persons, other authors, another layer (evaluate.py --reader)

Acts: the eight that can serve, one per hidden intention (simulator.INTENTIONS), and seven that do not:
    generic    could be said to anybody            twisted    the facts are wrong: who did what
    beside     kind, and beside the point          nonsense   nothing that a person would write
    elsewhere  about something else                echo       their own words
    hurtful    blames, belittles, dismisses
A written reply of grade 3 is its act; one of grade 1 is mostly `beside`, so half an answer is worth less than half.

Never fitted on: the persons and authors that exchanges.py holds out. The judge is fitted on them alone.
"""

import argparse
import sys
import time
from collections import Counter
from functools import cache
from pathlib import Path

import torch
from torch import nn

from exchanges import DATA, Example, examples_of, load_exchanges, split
from policy import SMOLLM2, ModelError, compute_dtype, frozen_copy, load_model
from simulator import INTENTIONS, load_profiles

WEIGHTS, JUDGE = DATA / "reader.pt", DATA / "judge.pt"
ACTS = (*INTENTIONS, "generic", "beside", "elsewhere", "twisted", "nonsense", "echo", "hurtful")


# --- 1. What the head sees: hidden states of three frozen lower layers --------------------------------------------------


class Features:
    """Of a text, from each of `layers`: the hidden state at its last token, and of the reply's tokens mean, maximum, last."""

    TEXT = ("Person: {}\nReply:", " {}", "\nThis reply is")
    MOST_TOKENS = (44, 64)  # of what the person said (its end), of the reply (its beginning)

    def __init__(self, model: str, layers: tuple[int, ...]):
        model, self.tokenizer = load_model(model)
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        self.layers, self.trunk = layers, frozen_copy(model, self.device, compute_dtype(self.device)).base_model
        self.trunk.layers = self.trunk.layers[: max(layers)]  # the others are not needed
        self.trunk.norm = nn.Identity()

    def tokens(self, messages: tuple[str, ...], reply: str) -> tuple[list[int], int, int]:
        """(ids, where the reply begins, where it ends)."""
        texts = [part.format(text) for part, text in zip(self.TEXT, (" ".join(messages[-2:]), reply, ""))]
        said, replied, asked = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        said, replied = said[-self.MOST_TOKENS[0] :], replied[: self.MOST_TOKENS[1]]
        return said + replied + asked, len(said), len(said) + len(replied)

    @torch.no_grad()
    def __call__(self, texts: list[tuple[tuple[str, ...], str]], at_once: int = 16) -> torch.Tensor:
        """(messages, reply) of N texts -> (N, 4 L D) float32, L layers."""
        tokens = [self.tokens(*text) for text in texts]
        order = sorted(range(len(texts)), key=lambda n: len(tokens[n][0]))
        features_N = [None] * len(texts)
        for first in range(0, len(order), at_once):
            rows = order[first : first + at_once]
            width = max(len(tokens[n][0]) for n in rows)
            ids_B_T = torch.tensor([tokens[n][0] + [0] * (width - len(tokens[n][0])) for n in rows], device=self.device)
            states = self.trunk(input_ids=ids_B_T, use_cache=False, output_hidden_states=True).hidden_states
            hidden_B_T_D = torch.cat([states[layer] for layer in self.layers], -1).float().cpu()  # side by side
            for n, hidden_T_D in zip(rows, hidden_B_T_D):  # causal: what is padded on the right is seen by nobody
                ids, start, end = tokens[n]
                reply_T_D = hidden_T_D[start:end]
                pooled = (hidden_T_D[len(ids) - 1], reply_T_D.mean(0), reply_T_D.amax(0), reply_T_D[-1])
                features_N[n] = torch.cat(pooled)
        return torch.stack(features_N)


# --- 2. The head ------------------------------------------------------------------------------------------------------


class Head(nn.Module):
    """Standardised features (N, F) -> logits of the acts (N, A)."""

    def __init__(self, features: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("deviation", torch.ones(features))
        self.linear = nn.Linear(features, len(ACTS))

    def forward(self, features_N_F):
        return self.linear((features_N_F - self.mean) / self.deviation)


def fit_head(features_N_F, shares_N_A, l2: float = 0.1) -> Head:
    """Multinomial logistic regression by LBFGS; the targets are shares of acts. Acts that serve weigh twice: to take
    a friend's words for nonsense does more harm than the reverse."""
    weight_N = 1 + shares_N_A[:, : len(INTENTIONS)].sum(-1)
    head = Head(features_N_F.shape[1])
    head.mean, head.deviation = features_N_F.mean(0), features_N_F.std(0) + 1e-5
    nn.init.zeros_(head.linear.weight)
    optimizer = torch.optim.LBFGS(head.linear.parameters(), max_iter=100, line_search_fn="strong_wolfe")

    def loss():
        optimizer.zero_grad()
        loss_N = nn.functional.cross_entropy(head(features_N_F), shares_N_A, reduction="none")
        value = (weight_N * loss_N).sum() / weight_N.sum() + l2 / 2 * head.linear.weight.square().sum()
        value.backward()
        return value

    optimizer.step(loss)
    return head


class Reader:
    """Reads replies: `read([(messages, reply), ...])` -> [{act: share in percent}, ...], shares from 1 on."""

    def __init__(self, weights: str | Path = WEIGHTS):
        if not Path(weights).is_file():
            raise ModelError(f"--reader {weights}: no such file; `python reader.py --fit` makes one")
        saved = torch.load(weights, weights_only=True)
        if saved.get("acts") != ACTS:
            raise ModelError(
                f"--reader {weights}: not fitted on the acts in reader.ACTS; fit it anew, `python reader.py --fit`"
            )
        self.features, self.head = Features(saved["model"], saved["layers"]), Head(len(saved["head"]["mean"]))
        self.head.load_state_dict({name: value.float() for name, value in saved["head"].items()})

    @torch.no_grad()
    def read(self, texts: list[tuple[tuple[str, ...], str]]) -> list[dict[str, int]]:
        if not texts:
            return []
        shares_N_A = (100 * self.head(self.features(texts)).softmax(-1)).round().int().tolist()
        return [{act: share for act, share in zip(ACTS, shares_A) if share} for shares_A in shares_N_A]


load_reader = cache(Reader)  # a process needs a reader once


def save_reader(path: Path, model: str, layers: tuple[int, ...], head: Head) -> None:
    state = {name: value.half() if "linear" in name else value for name, value in head.state_dict().items()}
    draft = path.with_suffix(".tmp")
    torch.save({"model": model, "layers": layers, "acts": ACTS, "head": state}, draft)
    draft.replace(path)


# --- 3. Fitting and measuring -----------------------------------------------------------------------------------------


def measure(head: Head, features_N_F, examples: list[Example]) -> dict:
    """Shares in percent: of good replies whose act (or second act) was read; of good and bad replies taken for what they are.

    Good: written, grade 2 or 3, read as any of the eight acts by more than half; bad: grade 0 or made up.
    """
    shares_N_A = head(features_N_F).softmax(-1)
    read = [ACTS[k] for k in shares_N_A.argmax(-1).tolist()]
    serves = (shares_N_A[:, : len(INTENTIONS)].sum(-1) > 0.5).tolist()
    grades = [example.exchange.grade if example.exchange else 0 for example in examples]
    right = [read[n] in (e.exchange.act, e.exchange.also) for n, e in enumerate(examples) if grades[n] >= 2]
    told_apart = [serves[n] == (grade >= 2) for n, grade in enumerate(grades) if grade != 1]
    return {
        "acts right": round(100 * sum(right) / len(right), 1),
        "good from bad": round(100 * sum(told_apart) / len(told_apart), 1),
        "replies": len(examples),
        "confusion": Counter((max(e.shares, key=e.shares.get), read[n]) for n, e in enumerate(examples)),
    }


def print_confusion(confusion: Counter) -> None:
    print("\nheld out, in percent: a row is what a reply is, a column what was read")
    print(" " * 10, *(act[:5].rjust(5) for act in ACTS))
    for act in ACTS:
        total = sum(count for (true, _), count in confusion.items() if true == act)
        shares = (f"{100 * confusion[act, read] / max(1, total):5.0f}" for read in ACTS)
        print(act.ljust(10), *shares, f"  of {total}")


def fit(path: Path, layers: tuple[int, ...], judge: bool, made: float = 0.4) -> None:
    started = time.perf_counter()
    kept, held_out = (load_profiles(DATA / f"{name}_profiles.jsonl") for name in ("train", "validation"))
    parts = split(load_exchanges(), {profile.id for profile in held_out})
    if judge:  # the other way round: fitted on what the reader has not seen
        parts = {"fit": [e for name in parts if name != "fit" for e in parts[name]], "new both": parts["fit"]}
    features = Features(SMOLLM2, layers)
    examples = {name: examples_of(part, [*kept, *held_out], made) for name, part in parts.items()}
    features_of = {name: features([(e.messages, e.reply) for e in part]) for name, part in examples.items()}
    targets_N_A = torch.tensor([[e.shares.get(act, 0.0) for act in ACTS] for e in examples["fit"]])
    head = fit_head(features_of["fit"], targets_N_A)
    found = {name: measure(head, features_of[name], part) for name, part in examples.items()}
    print_confusion(sum((row["confusion"] for name, row in found.items() if name != "fit"), Counter()))
    for name, row in found.items():
        print(
            f"{name:12} acts right {row['acts right']} %, good from bad {row['good from bad']} %, of {row['replies']} replies"
        )
    save_reader(path, SMOLLM2, layers, head)
    print(f"written: {path.name} ({path.stat().st_size / 1e3:.0f} kB), {time.perf_counter() - started:.0f} s")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--fit", action="store_true", required=True, help="fit the head anew")
    add("--judge", action="store_true", help="the second reader, on what the first has not seen")
    add("--layers", type=int, nargs="+", help="of SmolLM2's 30, to be read (default: 10 14 18, the judge 22)")
    add("--out", help="where the weights go")
    args = parser.parse_args(argv)
    path = Path(args.out or (JUDGE if args.judge else WEIGHTS))
    try:
        fit(path, tuple(args.layers or ((22,) if args.judge else (10, 14, 18))), args.judge)
    except (ValueError, OSError) as error:
        print(f"reader.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
