"""Rollouts: N dialogues at once, each with its own user; sampled token ids kept exactly, and what to train on.

    profiles -> Dialogue (turns: what the policy saw, sampled ids, log-probs, thinking, reply, reaction) -> Batch

Sections
    1. Dialogue      one conversation and its reward (RLVER, arXiv 2507.03112, section 2: final emotion / 100)
    2. rollout()     continuous batching: every dialogue goes on as soon as its user has answered
    3. Batch         trained tokens as flat vectors, in dialogue order; padding exists only inside a forward pass

Deliberate deviations from the paper
    - With --think the prompt already opens the thinking ("<think>"), as in the templates of today's reasoning models.
    - A reply that breaks the think format counts as emotion 0: there is nothing that the user could read, and the dialogue ends.
    - A turn cut by the token limit is closed with a stop token that is not trained on, and shown to the user as it is.
    - A dialogue that reaches the turn limit ends there: its emotion is the final one, nothing is bootstrapped.
    - Dialogues can share their history, so that the replies which are compared answer the same message (`together`).
"""

import copy
from collections import deque
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import dataclass, field, fields

import torch

from generator import Generator, columns_for, slots_with_room
from prefix_tree import Sequences
from simulator import Profile, Protocol, Reaction, User, UserBroken

SYSTEM = "You are a close friend who listens."
THINK_SYSTEM = (
    "You are a close friend who listens. First think about what the other person feels and needs, inside <think> and "
    "</think>. Then reply."
)
THINK_OPENING = "<think>\n"


def instructions(think: bool) -> str:
    """The system prompt: what the policy is told before every dialogue."""
    return THINK_SYSTEM if think else SYSTEM


# --- 1. Dialogue ------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """One reply of the policy. `prompt_ids` is exactly what the policy saw, `sampled_ids` exactly what it sampled."""

    prompt_ids: list[int]
    sampled_ids: list[int]
    log_probs: list[float]  # the sampler's: for PPO's KL, and for the weight trainer / sampler
    stopped: bool  # ended by a stop token, not by the token limit
    thinking: str
    reply: str
    format_ok: bool
    reaction: Reaction | None = None  # None where no user has answered: the format or the user broke


@dataclass
class Dialogue:
    user: User
    start: int
    turns: list[Turn] = field(default_factory=list)
    first: "Dialogue | None" = None  # whose history this one shares; None where it has its own
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
        of a dialogue with a history of its own the sum is the gain over the start. mixed: the mean of both."""
        emotions = lambda dialogue: [turn.reaction.emotion if turn.reaction else 0 for turn in dialogue.turns]
        before = [self.start] + emotions(self.first or self)
        delta = [(after - before) / 100 for before, after in zip(before, emotions(self))]
        terminal = [0.0] * (len(self.turns) - 1) + [self.final_emotion / 100]
        return {"terminal": terminal, "delta": delta, "mixed": [(a + b) / 2 for a, b in zip(terminal, delta)]}[kind]


def split_thinking(text: str, think: bool) -> tuple[str, str, bool]:
    """(thinking, reply, format_ok). The prompt has opened the thinking; the text must close it once and then say something.

    split_thinking("She is sad.</think> Oh no.", True) -> ("She is sad.", "Oh no.", True)
    """
    if not think:
        return "", text.strip(), True
    thinking, _, reply = (part.strip() for part in text.partition("</think>"))
    if not thinking or not reply or "<think>" in text or "</think>" in reply:
        return text.strip(), "", False
    return thinking, reply, True


# --- 2. Policy and users take turns -----------------------------------------------------------------------------------


@dataclass
class Reply:
    """A reply in the making. `piece` are the ids that its slot does not hold yet."""

    dialogue: int
    slot: int
    prompt_ids: list[int]
    piece: list[int]
    uniforms: list[float]
    sampled_ids: list[int] = field(default_factory=list)
    log_probs: list[float] = field(default_factory=list)


def next_prompt(chat, dialogue: Dialogue, think: bool) -> tuple[list[int], int]:
    """(all ids that the policy sees next, how many of them are in its slot since the turn before)."""
    thinking_ids = chat.text_ids(THINK_OPENING) if think else []
    if not dialogue.turns:
        return chat.opening(dialogue.user.messages[0]) + thinking_ids, len(chat.head)
    turn = dialogue.turns[-1]
    closed = turn.sampled_ids[-1] == chat.stop_id and not think  # not by the token limit, nor by another stop id
    between = chat.between(turn.reaction.message, closed) + thinking_ids
    if think:  # later turns see the reply without its thinking
        history = turn.prompt_ids[: len(turn.prompt_ids) - len(thinking_ids)]
        return history + chat.text_ids(turn.reply) + between, len(history)
    history = turn.prompt_ids + turn.sampled_ids  # of which the last id was sampled, but never fed
    return history + between, len(history) - 1


def share_prompts(generator: Generator, replies: list[Reply]) -> None:
    """What replies that begin now have in common (in a group the opening, or all that was said) is computed once."""
    groups = {}
    for reply in replies:
        groups.setdefault(tuple(reply.prompt_ids), []).append(reply)
    groups = sorted((group for group in groups.values() if len(group) > 1), key=lambda group: group[0].slot)
    if groups:
        generator.feed([group[0].slot for group in groups], [group[0].piece[:-1] for group in groups])
    for first, *others in groups:
        generator.cache.copy(first.slot, [reply.slot for reply in others])
        for reply in (first, *others):
            reply.piece = reply.piece[-1:]


def rollout(
    model, chat, simulator, profiles: list[Profile], seeds: list[int], protocol: Protocol, *, think: bool = False,
    max_new_tokens: int = 40, temperature: float = 1.0, slots: int | None = None, eager: bool = False, on_end=lambda: None,
    together: int = 1,
) -> list[Dialogue]:  # fmt: skip
    """Hold one dialogue per profile; `seeds[i]` alone decides dialogue i's sampling. temperature 0 is greedy. `on_end` is
    called at each dialogue's end (for a progress bar).

    `together` dialogues in a row, with one profile, share their history: each says its own reply, then all go on from the first
    one's, so that their next replies answer the same message. They wait for each other, and all end when the first one ends. Another
    one whose user breaks down is dropped whole; one that breaks the format gets no answer in that turn and goes on with the rest.

    Each pass takes one more token of every reply in the making, and the messages of the users who have answered meanwhile: a slow
    user on a server delays nobody else. Users in this process answer together, when nobody speaks any more. At most `slots`
    dialogues, `together` at least, are held at once (None: all, or as many as a GPU has memory for); the next one takes the slot of
    one that has ended.
    """
    dialogues = [Dialogue(User(profile, protocol.start), protocol.start) for profile in profiles]
    if not profiles:
        return []
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    columns = columns_for(protocol.turns, max_new_tokens, think)
    at_once = min(slots or slots_with_room(model, columns), len(profiles))
    free = list(range(max(together, at_once - at_once % together)))
    generator = Generator(
        model, slots=len(free), columns=columns, trunk_ids=chat.head, temperature=temperature, eager=eager
    )
    for i, dialogue in enumerate(dialogues):
        dialogue.first = dialogues[i - i % together] if i % together else None
    opening = {simulator.open(profiles[i], protocol.start): i for i in range(0, len(profiles), together)}
    talks = Talks(
        chat, simulator, generator, protocol, think, max_new_tokens, on_end, together, dialogues, randoms, free, opening
    )
    while talks.opening or talks.waiting or talks.speaking or talks.listening:
        talks.hear()
        talks.seat_the_waiting()
        if talks.speaking:
            talks.speak_one_token()
        else:
            simulator.work()
            wait([*talks.opening, *talks.listening], return_when=FIRST_COMPLETED)
    # Free now: the traceback of a broken user's error holds on to this frame.
    generator.cache = generator.captured = None
    return dialogues


@dataclass
class Talks:
    """Where each dialogue is: its user opens it, it waits for a slot, the policy speaks, the user listens; or it has ended."""

    chat: object
    simulator: object
    generator: Generator
    protocol: Protocol
    think: bool
    max_new_tokens: int
    on_end: Callable
    together: int
    dialogues: list[Dialogue]
    randoms: list[torch.Generator]
    free: list[int]  # slots
    opening: dict[Future, int]  # the first dialogue of each group whose user is still opening
    waiting: deque[int] = field(default_factory=deque)  # first dialogues of groups that wait for slots
    slots: dict[int, list[int]] = field(default_factory=dict)  # first dialogue: the slots of its group
    unanswered: dict[int, int] = field(default_factory=dict)  # first dialogue: how many of its group have no answer yet
    speaking: list[Reply] = field(default_factory=list)
    listening: dict[Future, int] = field(default_factory=dict)

    def hear(self) -> None:
        """Take the messages of the users who have answered."""
        for future in [future for future in self.opening if future.done()]:
            i = self.opening.pop(future)
            try:
                self.dialogues[i].user = future.result()
                self.waiting.append(i)
            except UserBroken as error:
                for dialogue in self.dialogues[i : i + self.together]:
                    dialogue.dropped = str(error)
                self.end(i)
        for future in [future for future in self.listening if future.done()]:
            i = self.listening.pop(future)
            try:
                self.dialogues[i].turns[-1].reaction = future.result()
            except UserBroken as error:
                self.dialogues[i].dropped = str(error)
            self.go_on(i)

    def go_on(self, i: int) -> None:
        """A reply was answered, or cannot be: when it is the last of those that are held together, they go on or end."""
        first = i - i % self.together
        self.unanswered[first] -= 1
        if self.unanswered[first]:
            return
        dialogue = self.dialogues[first]
        reaction = dialogue.turns[-1].reaction
        if not reaction or reaction.goodbye or len(dialogue.turns) == self.protocol.turns:
            self.end(first)
        else:
            self.begin_replies(first)

    def seat_the_waiting(self) -> None:
        while self.waiting and len(self.free) >= self.together:
            first = self.waiting.popleft()
            self.slots[first] = [self.free.pop(0) for _ in range(self.together)]
            self.begin_replies(first)
        share_prompts(self.generator, [reply for reply in self.speaking if not reply.sampled_ids])

    def begin_replies(self, first: int) -> None:
        """One reply, or one of each dialogue that is held together, to the first one's user."""
        user = self.dialogues[first].user
        prompt_ids, held = next_prompt(self.chat, self.dialogues[first], self.think)
        for i, slot in enumerate(self.slots[first], first):
            self.generator.cache.hold(slot, held)
            uniforms = torch.rand(self.max_new_tokens, generator=self.randoms[i]).tolist()
            self.speaking.append(Reply(i, slot, prompt_ids, prompt_ids[held:], uniforms))
            if i > first:
                self.dialogues[i].user = copy.deepcopy(user)
        self.unanswered[first] = self.together

    def speak_one_token(self) -> None:
        """One more token of every reply in the making; those that are complete go to their users."""
        replies = sorted(self.speaking, key=lambda reply: reply.slot)  # neighbours in the cache are read without a copy
        slots, pieces = [reply.slot for reply in replies], [reply.piece for reply in replies]
        uniforms = [reply.uniforms[len(reply.sampled_ids)] for reply in replies]
        self.speaking = []
        for reply, (token, log_prob) in zip(replies, self.generator.sample(slots, pieces, uniforms)):
            reply.sampled_ids.append(token)
            reply.log_probs.append(log_prob)
            reply.piece = [token]
            stopped = token in self.chat.stop_ids
            if stopped or len(reply.sampled_ids) == self.max_new_tokens:
                self.say(reply, stopped)
            else:
                self.speaking.append(reply)

    def say(self, reply: Reply, stopped: bool) -> None:
        """Every user answers its own dialogue, whatever has ended meanwhile. A broken format, which nobody can read, ends it (where
        a history is shared, if it is the first one's)."""
        dialogue = self.dialogues[reply.dialogue]
        thinking, text, format_ok = split_thinking(self.chat.decode(reply.sampled_ids), self.think)
        ids = reply.prompt_ids, reply.sampled_ids, reply.log_probs
        dialogue.turns.append(Turn(*ids, stopped, thinking, text, format_ok))
        if format_ok:
            self.listening[self.simulator.submit(dialogue.user, text)] = reply.dialogue
        else:
            self.go_on(reply.dialogue)

    def end(self, first: int) -> None:
        self.free += self.slots.pop(first, [])
        for _ in range(self.together):
            self.on_end()


# --- 3. What to train on ----------------------------------------------------------------------------------------------


@dataclass
class Batch(Sequences):
    """Token sequences, and the N sampled tokens as flat vectors in dialogue order, then turn order.

    A dialogue whose turns each extend the one before is one sequence; with --think, or with another one's history, every turn is
    a sequence of its own, built from the history that the policy really saw.
    """

    id_N: torch.Tensor
    turn_N: torch.Tensor
    sampler_log_probs_N: torch.Tensor
    reward_N: torch.Tensor  # a turn's reward sits on its last sampled token, stop token included

    def __len__(self):
        return len(self.id_N)

    def part(self, dialogues: list[int]) -> "tuple[Batch, torch.Tensor]":
        """(the batch of these dialogues alone, indices into N (n,))."""
        index_n = self.tokens_of(dialogues)
        columns = [getattr(self, field.name)[index_n] for field in fields(self) if field.name.endswith("_N")]
        return Batch(self.sequences, *columns), index_n


def make_batch(dialogues: list[Dialogue], reward: str) -> Batch:
    sequences, row_N, column_N, dialogue_N, id_N, turn_N, log_probs_N, reward_N = ([] for _ in range(8))
    for d, dialogue in enumerate(dialogues):
        if dialogue.dropped:
            continue
        for t, (turn, turn_reward) in enumerate(zip(dialogue.turns, dialogue.rewards(reward))):
            if t > 0 and turn.prompt_ids[: len(sequences[-1])] == sequences[-1]:
                sequences[-1] = turn.prompt_ids + turn.sampled_ids  # this turn continues the sequence
            else:
                sequences.append(turn.prompt_ids + turn.sampled_ids)
            count = len(turn.sampled_ids)
            row_N += [len(sequences) - 1] * count
            column_N += range(len(turn.prompt_ids), len(turn.prompt_ids) + count)
            dialogue_N += [d] * count
            id_N += turn.sampled_ids
            turn_N += [t] * count
            log_probs_N += turn.log_probs
            reward_N += [0.0] * (count - 1) + [turn_reward]
    columns = row_N, column_N, dialogue_N, id_N, turn_N, log_probs_N, reward_N
    return Batch(sequences, *map(torch.tensor, columns))
