"""Rollouts: N dialogues at once, each with its own user; sampled token ids kept exactly, and what to train on.

    profiles -> Dialogue (turns: what the policy saw, sampled ids, log-probs, thinking, reply, reaction) -> Batch

Sections
    1. Dialogue      one conversation and its reward (RLVER, arXiv 2507.03112, section 2: final emotion / 100)
    2. Generator     lock-step sampling over a KV cache that lives across turns: history is prefilled once
    3. LocalLLM      the same generator plays the prompted user (--simulator self)
    4. rollout()     policy and users take turns until every dialogue has ended
    5. Batch         trained tokens as flat vectors, in dialogue order; padding exists only inside a forward pass

Deliberate deviations from the paper
    - With --think the prompt already opens the thinking ("<think>"), as in the templates of today's reasoning models.
    - A reply that breaks the think format ends its dialogue at emotion 0: there is nothing that the user could read.
    - A turn cut by the token limit is closed with a stop token that is not trained on, and shown to the user as it is.
    - A dialogue that reaches the turn limit ends there: its emotion is the final one, nothing is bootstrapped.
"""

import re
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import cached_property

import torch

from policy import Chat, Tree, autocast, common_prefix, new_cache, prefix_tree
from simulator import Profile, Protocol, Reaction, User, UserBroken, emotion_state

SYSTEM = "You are a close friend who listens."
THINK_SYSTEM = (
    "You are a close friend who listens. First think about what the other person feels and needs, inside <think> and "
    "</think>. Then reply."
)
THINK_OPENING = "<think>\n"
# Exchanges shown before the dialogue (--examples): a 135M model needs to see what a reply is. (message, thinking, reply)
EXAMPLES = (
    (
        "I failed my driving test again on Friday.",
        "So many lessons for nothing. They must be frustrated.",
        "That must be frustrating after all those lessons.",
    ),
    (
        "My boss took my name off the report.",
        "They cannot see why. What was the boss afraid of?",
        "Maybe your boss was afraid that the report would make you shine.",
    ),
    (
        "The landlord still won't fix our boiler.",
        "They need one thing that they can do today.",
        "You could send the landlord a photo of the boiler and a date.",
    ),
    (
        "I said yes to the extra shift again.",
        "They wonder about themselves. A question may help.",
        "What made you say yes to one more shift?",
    ),
    (
        "They blame me for the broken van.",
        "It was not their fault, and nobody says so.",
        "The van was old, so it was not your fault that it broke.",
    ),
    (
        "My daughter gave up the violin I love.",
        "Both of them have a point.",
        "While you miss the violin, she may feel free without it.",
    ),
    (
        "I found my father's letters in the attic.",
        "They want to talk about him.",
        "I'd like to hear about those letters, take your time.",
    ),
    (
        "I drove my grandfather to the hospital every week.",
        "Nobody thanked them for it.",
        "It shows real loyalty to drive to that hospital every week.",
    ),
)


def instructions(think: bool, examples: int) -> tuple[str, list[tuple[str, str]]]:
    """(system prompt, example exchanges): what the policy is told before every dialogue; the arguments of `Chat`."""
    if think:
        shown = [(message, f"{THINK_OPENING}{thinking}</think>\n{reply}") for message, thinking, reply in EXAMPLES]
        return THINK_SYSTEM, shown[:examples]
    return SYSTEM, [(message, reply) for message, _, reply in EXAMPLES[:examples]]


# ----------------------------------------------------------------------------------------------------------------------
# 1. Dialogue
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """One reply of the policy. `prompt_ids` is exactly what the policy saw, `sampled_ids` exactly what it sampled."""

    prompt_ids: list[int]
    sampled_ids: list[int]
    log_probs: list[float]  # the sampler's, for measuring its gap to the trainer's
    stopped: bool  # ended by a stop token, not by the token limit
    thinking: str
    reply: str
    format_ok: bool
    reaction: Reaction | None = None  # None after a broken format: no user has read the reply


@dataclass
class Dialogue:
    user: User
    start: int
    turns: list[Turn] = field(default_factory=list)
    dropped: str = ""  # why the simulated user broke down; such a dialogue is neither rewarded nor scored

    @property
    def format_ok(self) -> bool:
        return all(turn.format_ok for turn in self.turns)

    @property
    def final_emotion(self) -> int:
        """Emotion in [0, 100] at the end; 0 after a reply that broke the format."""
        return self.user.emotion if self.format_ok else 0

    def rewards(self, kind: str) -> list[float]:
        """One reward per turn. terminal: final emotion / 100 on the last turn (the paper). delta: each turn's change / 100,
        so that the sum is the gain over the start. mixed: the mean of both."""
        emotions = [self.start] + [turn.reaction.emotion if turn.reaction else 0 for turn in self.turns]
        delta = [(after - before) / 100 for before, after in zip(emotions, emotions[1:])]
        terminal = [0.0] * (len(self.turns) - 1) + [self.final_emotion / 100]
        return {"terminal": terminal, "delta": delta, "mixed": [(a + b) / 2 for a, b in zip(terminal, delta)]}[kind]

    def transcript(self) -> dict:
        """The public SAGE schema, plus the fired rules, the thinking and how each turn ended."""
        profile = self.user.profile
        opening = self.user.messages[0] if self.user.messages else ""
        history = [{"role": "user", "content": opening, "emotion-point": self.start}]
        for turn in self.turns:
            history.append(
                {"role": "assistant", "content": turn.reply, "thinking": turn.thinking, "stopped": turn.stopped}
            )
            if turn.reaction:
                appraisal = turn.reaction.appraisal
                planning = {"change": appraisal.change, "fired": appraisal.fired} | appraisal.sections
                message = {"role": "user", "content": turn.reaction.message, "emotion-point": turn.reaction.emotion}
                history.append(message | {"planning": planning})
        return {
            "id": profile.id,
            "emo_point": self.final_emotion,
            "emo_state": f"Emotion-{emotion_state(self.final_emotion)}",
            "character": profile.main_cha,
            "task": profile.task,
            "difficulty": self.user.difficulty,
            "behaviour": self.user.behaviour,
            "dropped": self.dropped,
            "format_ok": self.format_ok,
            "history": history,
        }


def split_thinking(text: str, think: bool) -> tuple[str, str, bool]:
    """(thinking, reply, format_ok). The prompt has opened the thinking; the text must close it once and then say something.

    split_thinking("She is sad.</think> Oh no.", True) -> ("She is sad.", "Oh no.", True)
    """
    if not think:
        return "", text.strip(), True
    match = re.fullmatch(r"\s*(.*?\S.*?)</think>\s*(\S.*)", text, re.S)
    if match is None or "<think>" in text or "</think>" in match[2]:
        return text.strip(), "", False
    return match[1].strip(), match[2].strip(), True


# ----------------------------------------------------------------------------------------------------------------------
# 2. Generator
# ----------------------------------------------------------------------------------------------------------------------


class Generator:
    """Samples for B rows in lock-step, once `open` has made the rows. Each row's history stays in the KV cache; a mask says
    which columns are its own.

    Rows of different lengths are padded on the left of each *piece*; padded columns are masked and have no position, so
    a row's tokens do not depend on its neighbours.
    """

    def __init__(self, model, dtype: torch.dtype = torch.float32):
        self.model, self.dtype = model, dtype
        self.device = next(model.parameters()).device
        self.cache = new_cache(model)
        self.seen_B_L = torch.zeros(1, 0, dtype=torch.bool, device=self.device)  # columns that belong to the row
        self.length_B = torch.zeros(1, dtype=torch.long, device=self.device)

    def open(self, ids_B: list[list[int]]):
        """Prefill the rows' openings, what they have in common only once; return the logits (B, V) after them."""
        shared = min(common_prefix(ids_B), min(map(len, ids_B)) - 1)
        if shared:
            self.append([ids_B[0][:shared]])
        self.keep([0] * len(ids_B))
        return self.append([ids[shared:] for ids in ids_B])

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these; a row may be named more than once."""
        index = torch.tensor(rows, device=self.device)
        for layer in self.cache.layers:
            if layer.is_initialized:
                layer.keep_rows(index)
        self.seen_B_L, self.length_B = self.seen_B_L[index], self.length_B[index]

    def forget(self, row: int, columns: slice) -> None:
        """Take columns out of a row's history: its thinking, once the turn is over."""
        self.length_B[row] -= self.seen_B_L[row, columns].sum()
        self.seen_B_L[row, columns] = False

    def append(self, ids_B: list[list[int]]):
        """Prefill one piece per row (may be empty); return the logits (B, V) after each row's last token."""
        width = max(len(ids) for ids in ids_B)
        ids_B_W = torch.zeros(len(ids_B), width, dtype=torch.long)
        new_B_W = torch.zeros(len(ids_B), width, dtype=torch.bool)
        for row, ids in enumerate(ids_B):
            if ids:
                ids_B_W[row, -len(ids) :] = torch.tensor(ids)
                new_B_W[row, -len(ids) :] = True
        return self._forward(ids_B_W.to(self.device), new_B_W.to(self.device))

    @torch.no_grad()
    def _forward(self, ids_B_W, new_B_W):
        positions_B_W = (self.length_B[:, None] + new_B_W.long().cumsum(1) - 1).clamp(min=0)
        past = self.seen_B_L.shape[1]
        self.seen_B_L = torch.cat([self.seen_B_L, new_B_W], dim=1)
        self.length_B = self.length_B + new_B_W.sum(1)
        width = ids_B_W.shape[1]
        # (B, 1, W, L): a token sees its row's own columns up to itself. A padded query sees itself, or softmax has no input.
        column_L = torch.arange(past + width, device=self.device)
        causal_W_L = column_L[None, :] <= (past + torch.arange(width, device=self.device))[:, None]
        mask = (self.seen_B_L[:, None, None, :] & causal_W_L) | (column_L[None, :] == column_L[past:, None])
        with autocast(self.device.type, self.dtype):
            out = self.model(
                input_ids=ids_B_W,
                attention_mask=mask,
                position_ids=positions_B_W,
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
        return out.logits[:, -1].float()

    def sample(self, logits_B_V, stop_ids, max_new_tokens, temperature, uniforms_B_N):
        """Sample until every row has stopped or max_new_tokens are out. Returns per row (ids, log-probs, stopped).

        temperature 0 is greedy. `uniforms_B_N` are numbers in [0, 1), row i from dialogue i's own seed: token n is the one
        at which the cumulative distribution passes uniforms[i, n], so a row does not depend on its neighbours' draws.
        """
        rows = logits_B_V.shape[0]
        stop = torch.tensor(stop_ids, device=self.device)
        active_B = torch.ones(rows, dtype=torch.bool, device=self.device)
        ids, log_probs, alive = [], [], []
        for n in range(max_new_tokens):
            log_probs_B_V = torch.log_softmax(logits_B_V / (temperature or 1.0), dim=-1)
            if temperature == 0:
                token_B = logits_B_V.argmax(-1)
            else:
                cdf_B_V = log_probs_B_V.exp().cumsum(-1)
                threshold_B_1 = uniforms_B_N[:, n, None] * cdf_B_V[:, -1:]
                token_B = torch.searchsorted(cdf_B_V, threshold_B_1, right=True).squeeze(1)
                token_B = token_B.clamp(max=cdf_B_V.shape[1] - 1)
            ids.append(token_B)
            log_probs.append(log_probs_B_V.gather(1, token_B[:, None]).squeeze(1))
            alive.append(active_B)
            active_B = active_B & ~torch.isin(token_B, stop)
            # The last token is fed as well: the next piece continues from a cache that holds the whole turn.
            logits_B_V = self._forward(token_B[:, None], alive[-1][:, None])
            if not active_B.any():
                break
        ids_B_N, log_probs_B_N = torch.stack(ids, 1).tolist(), torch.stack(log_probs, 1).tolist()
        lengths = torch.stack(alive, 1).sum(1).tolist()
        return [
            (row_ids[:k], row_log_probs[:k], row_ids[k - 1] in stop_ids)
            for row_ids, row_log_probs, k in zip(ids_B_N, log_probs_B_N, lengths)
        ]


# ----------------------------------------------------------------------------------------------------------------------
# 3. The model as its own simulated user
# ----------------------------------------------------------------------------------------------------------------------


class LocalLLM:
    """Answers a PromptedSimulator's questions with a model in this process, all waiting dialogues in one batch, greedily.

    The sections' headings are written for the model, a section ends at the end of its line, and of the changes -10 to 10
    the likeliest is taken, so that even a small model's answer can be read.
    """

    CHANGES = [f" {change}\n" for change in range(-10, 11)]

    def __init__(self, model, tokenizer, dtype: torch.dtype = torch.float32, max_section_tokens: int = 48):
        self.model, self.tokenizer, self.dtype = model, tokenizer, dtype
        self.max_section_tokens = max_section_tokens
        self.name = f"self {model.config.name_or_path}"
        self.waiting = []  # (steps, Future) of turns that wait for `work`
        self.chats = {}  # system prompt -> Chat
        vocabulary = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.line_ends = [i for i, text in enumerate(vocabulary) if "\n" in text]

    def start(self, steps) -> Future:
        self.waiting.append((steps, Future()))
        return self.waiting[-1][1]

    def work(self) -> None:
        """Take every waiting turn to its end."""
        turns = [(steps, future, None) for steps, future in self.waiting]
        self.waiting = []
        while turns:
            asking = []
            for steps, future, answer in turns:
                try:
                    asking.append((steps, future, steps.send(answer)))
                except StopIteration as end:
                    future.set_result(end.value)
                except Exception as error:
                    future.set_exception(error)
            turns = []
            for sections in dict.fromkeys(question[2] for _, _, question in asking):
                same = [turn for turn in asking if turn[2][2] == sections]
                answers = self._fill([(system, text) for _, _, (system, text, _) in same], sections)
                turns += [(steps, future, answer) for (steps, future, _), answer in zip(same, answers)]

    def _fill(self, questions: list[tuple[str, str]], sections: tuple[str, ...]) -> list[str]:
        prompts = []
        for system, text in questions:
            if system not in self.chats:
                self.chats[system] = Chat(self.tokenizer, system)
            prompts.append(self.chats[system].opening(text))
        stop_ids = self.line_ends + self.chats[questions[0][0]].stop_ids
        generator = Generator(self.model, self.dtype)
        generator.open(prompts)
        answers = [""] * len(prompts)
        for name in sections:
            logits_B_V = generator.append([self.chats[system].text_ids(f"{name}:") for system, _ in questions])
            if name == sections[-1] == "Change":
                written = self._choose(generator, logits_B_V)
            else:
                written = [row[0] for row in generator.sample(logits_B_V, stop_ids, self.max_section_tokens, 0, None)]
            for row, ids in enumerate(written):
                text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
                answers[row] += f"{name}: {text}\n"
            # A section that was cut, or ended by a stop token, still ends its line.
            closing = [[] if ids[-1] in self.line_ends else self.line_ends[:1] for ids in written]
            if any(closing):
                generator.append(closing)
        return answers

    def _choose(self, generator, logits_B_V) -> list[list[int]]:
        """Greedy decoding in which only the tokens that spell one of CHANGES are allowed."""
        choices = [self.tokenizer(text, add_special_tokens=False)["input_ids"] for text in self.CHANGES]
        written = [[] for _ in range(len(logits_B_V))]
        while True:
            pieces = []
            for row, ids in enumerate(written):
                allowed = sorted({c[len(ids)] for c in choices if c[: len(ids)] == ids and len(c) > len(ids)})
                pieces.append([allowed[int(logits_B_V[row, allowed].argmax())]] if allowed else [])
                ids += pieces[-1]
            if not any(pieces):
                return written
            logits_B_V = generator.append(pieces)


# ----------------------------------------------------------------------------------------------------------------------
# 4. Policy and users take turns
# ----------------------------------------------------------------------------------------------------------------------


def rollout(
    model,
    chat,
    simulator,
    profiles: list[Profile],
    seeds: list[int],
    protocol: Protocol,
    *,
    think: bool = False,
    max_new_tokens: int = 40,
    temperature: float = 1.0,
    dtype: torch.dtype = torch.float32,
    on_end=lambda: None,
) -> list[Dialogue]:
    """Hold one dialogue per profile, all at once; `seeds[i]` alone decides dialogue i's sampling. `on_end` is called at
    each dialogue's end (for a progress bar). temperature 0 is greedy."""
    dialogues = []
    opened = [simulator.open(profile, protocol.start) for profile in profiles]
    simulator.work()
    for profile, future in zip(profiles, opened):
        dialogues.append(Dialogue(User(profile, protocol.start), protocol.start))
        try:
            dialogues[-1].user = future.result()
        except UserBroken as error:
            dialogues[-1].dropped = str(error)
            on_end()
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    opening_think = chat.text_ids(THINK_OPENING) if think else []
    generator = Generator(model, dtype)
    active = [i for i, dialogue in enumerate(dialogues) if not dialogue.dropped]  # row r of the generator is active[r]
    if not active:
        return dialogues
    pieces = [chat.opening(dialogues[i].user.messages[0]) + opening_think for i in active]
    history = [[] for _ in active]  # ids before the piece, as the policy sees them
    for turn_number in range(protocol.turns):
        logits = generator.append(pieces) if turn_number else generator.open(pieces)
        first_column = generator.seen_B_L.shape[1]
        uniforms = torch.stack([torch.rand(max_new_tokens, generator=randoms[i]) for i in active])
        sampled = generator.sample(logits, chat.stop_ids, max_new_tokens, temperature, uniforms.to(generator.device))
        waiting = {}
        for row, (i, (ids, log_probs, stopped)) in enumerate(zip(active, sampled)):
            thinking, reply, format_ok = split_thinking(chat.decode(ids), think)
            dialogues[i].turns.append(
                Turn(history[row] + pieces[row], ids, log_probs, stopped, thinking, reply, format_ok)
            )
            if format_ok:  # every user answers its own dialogue, whatever has ended meanwhile
                waiting[i] = simulator.submit(dialogues[i].user, reply)
        simulator.work()
        for i, future in waiting.items():
            try:
                dialogues[i].turns[-1].reaction = future.result()
            except UserBroken as error:
                dialogues[i].dropped = str(error)
        stays = []
        for row, i in enumerate(active):
            reaction = dialogues[i].turns[-1].reaction
            if reaction is None or reaction.goodbye or turn_number + 1 == protocol.turns:
                on_end()
            else:
                stays.append(row)
        if not stays:
            break
        history = [history[row] + pieces[row] for row in stays]
        pieces = []
        for k, row in enumerate(stays):
            turn = dialogues[active[row]].turns[-1]
            between = chat.between(turn.reaction.message, turn.stopped and not think) + opening_think
            if think:  # later turns see the reply without its thinking
                generator.forget(row, slice(first_column - len(opening_think), None))
                history[k] = history[k][: len(history[k]) - len(opening_think)]
                pieces.append(chat.text_ids(turn.reply) + between)
            else:
                history[k] = history[k] + turn.sampled_ids
                pieces.append(between)
        if len(stays) < len(active):
            generator.keep(stays)
        active = [active[row] for row in stays]
    return dialogues


# ----------------------------------------------------------------------------------------------------------------------
# 5. What to train on
# ----------------------------------------------------------------------------------------------------------------------


@dataclass
class Batch:
    """Token sequences, and the N sampled tokens as flat vectors in dialogue order, then turn order.

    A dialogue whose turns each extend the one before is one sequence; with --think every turn is a sequence of its own,
    built from the history that the policy really saw. `trees` has them merged, one tree per dialogue.
    """

    sequences: list[list[int]]
    row_N: torch.Tensor  # sequence of each sampled token
    column_N: torch.Tensor  # its place there; it was predicted at column - 1
    id_N: torch.Tensor
    dialogue_N: torch.Tensor
    turn_N: torch.Tensor
    sampler_log_probs_N: torch.Tensor
    reward_N: torch.Tensor  # a turn's reward sits on its last sampled token, stop token included

    def __len__(self):
        return len(self.id_N)

    @cached_property
    def _merged(self):
        of_dialogue = {}  # dialogue -> its sequences
        for dialogue, row in sorted(set(zip(self.dialogue_N.tolist(), self.row_N.tolist()))):
            of_dialogue.setdefault(dialogue, []).append(row)
        trees, place = [], {}
        for rows in of_dialogue.values():
            tree, paths = prefix_tree([self.sequences[row] for row in rows])
            place |= {row: (len(trees), path) for row, path in zip(rows, paths)}
            trees.append(tree)
        predictors = [
            (place[row][0], place[row][1][column - 1])
            for row, column in zip(self.row_N.tolist(), self.column_N.tolist())
        ]
        return trees, *torch.tensor(predictors).T

    @property
    def trees(self) -> list[Tree]:
        return self._merged[0]

    @property
    def tree_N(self) -> torch.Tensor:
        """Tree of each sampled token."""
        return self._merged[1]

    @property
    def predictor_N(self) -> torch.Tensor:
        """Place there of the token that predicted it."""
        return self._merged[2]


def make_batch(dialogues: list[Dialogue], reward: str) -> Batch:
    sequences, columns = [], {key: [] for key in ("row", "column", "id", "dialogue", "turn", "log_prob", "reward")}
    for d, dialogue in enumerate(dialogues):
        if dialogue.dropped:
            continue
        for t, (turn, turn_reward) in enumerate(zip(dialogue.turns, dialogue.rewards(reward))):
            if t > 0 and turn.prompt_ids[: len(sequences[-1])] == sequences[-1]:
                sequences[-1] = list(turn.prompt_ids)  # this turn continues the sequence
            else:
                sequences.append(list(turn.prompt_ids))
            start = len(sequences[-1])
            sequences[-1].extend(turn.sampled_ids)
            for k, (token, log_prob) in enumerate(zip(turn.sampled_ids, turn.log_probs)):
                last = k == len(turn.sampled_ids) - 1
                row = (len(sequences) - 1, start + k, token, d, t, log_prob, turn_reward if last else 0.0)
                for column, value in zip(columns.values(), row):
                    column.append(value)
    return Batch(sequences, *(torch.tensor(column) for column in columns.values()))
