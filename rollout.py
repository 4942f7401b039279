"""Rollouts: N dialogues at once, each with its own user; sampled token ids kept exactly, and what to train on.

    profiles -> Dialogue (turns: what the policy saw, sampled ids, log-probs, thinking, reply, reaction) -> Batch

Sections
    1. Dialogue      one conversation and its reward (RLVER, arXiv 2507.03112, section 2: final emotion / 100)
    2. Generator     one slot of KV cache per dialogue: ragged, unpadded, history is prefilled once
    3. LocalLLM      the same generator plays the prompted user (--simulator self)
    4. rollout()     continuous batching: every dialogue goes on as soon as its user has answered
    5. Batch         trained tokens as flat vectors, in dialogue order; padding exists only inside a forward pass

Deliberate deviations from the paper
    - With --think the prompt already opens the thinking ("<think>"), as in the templates of today's reasoning models.
    - A reply that breaks the think format ends its dialogue at emotion 0: there is nothing that the user could read.
    - A turn cut by the token limit is closed with a stop token that is not trained on, and shown to the user as it is.
    - A dialogue that reaches the turn limit ends there: its emotion is the final one, nothing is bootstrapped.
"""

import inspect
import re
from collections import deque
from concurrent.futures import FIRST_COMPLETED, Future, wait
from contextlib import nullcontext
from dataclasses import dataclass, field, fields
from itertools import accumulate

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface
from transformers.cache_utils import Cache

try:
    from flash_attn import flash_attn_with_kvcache
except ImportError:  # optional, GPU only
    flash_attn_with_kvcache = None
try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # an older torch
    varlen_attn = None

from policy import Chat, ModelError, Sequences, autocast, common_prefix
from simulator import Profile, Protocol, Reaction, User, UserBroken, emotion_state

SYSTEM = "You are a close friend who listens."
THINK_SYSTEM = (
    "You are a close friend who listens. First think about what the other person feels and needs, inside <think> and "
    "</think>. Then reply."
)
THINK_OPENING = "<think>\n"
# Exchanges shown before the dialogue (--examples): a 135M model needs to see what a reply is.
EXAMPLES = (
    ("I failed my driving test again on Friday.", "That must be frustrating after all those lessons."),
    ("My boss took my name off the report.", "Maybe your boss was afraid that the report would make you shine."),
    ("The landlord still won't fix our boiler.", "You could send the landlord a photo of the boiler and a date."),
    ("I said yes to the extra shift again.", "What made you say yes to one more shift?"),
    ("They blame me for the broken van.", "The van was old, so it was not your fault that it broke."),
    ("My daughter gave up the violin I love.", "While you miss the violin, she may feel free without it."),
    ("I found my father's letters in the attic.", "I'd like to hear about those letters, take your time."),
    (
        "I drove my grandfather to the hospital every week.",
        "It shows real loyalty to drive to that hospital every week.",
    ),
)
THOUGHTS = (  # before each of these replies, with --think
    "So many lessons for nothing. They must be frustrated.",
    "They cannot see why. What was the boss afraid of?",
    "They need one thing that they can do today.",
    "They wonder about themselves. A question may help.",
    "It was not their fault, and nobody says so.",
    "Both of them have a point.",
    "They want to talk about him.",
    "Nobody thanked them for it.",
)


def instructions(think: bool, examples: int) -> tuple[str, list[tuple[str, str]]]:
    """(system prompt, example exchanges): what the policy is told before every dialogue; the arguments of `Chat`."""
    if not think:
        return SYSTEM, list(EXAMPLES[:examples])
    pairs = zip(EXAMPLES[:examples], THOUGHTS)
    return THINK_SYSTEM, [(said, f"{THINK_OPENING}{thought}</think>\n{reply}") for (said, reply), thought in pairs]


# --- 1. Dialogue ------------------------------------------------------------------------------------------------------


@dataclass
class Turn:
    """One reply of the policy. `prompt_ids` is exactly what the policy saw, `sampled_ids` exactly what it sampled."""

    prompt_ids: list[int]
    sampled_ids: list[int]
    log_probs: list[float]  # the sampler's: for PPO's KL, and for the gap to the trainer's
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
            said = {"role": "assistant", "content": turn.reply, "thinking": turn.thinking}
            history.append(said | {"stopped": turn.stopped})
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


# --- 2. Generator -----------------------------------------------------------------------------------------------------


MESSAGE_TOKENS = 64  # of a user's message, foreseen in a slot


class Slots(Cache):
    """The KV cache of many dialogues: one slot each, with its own length, so that nobody waits for a longer one.

    What every prompt begins with (system prompt and examples: the trunk) is held once for all slots. transformers' attention
    layers write to it through `update`; a backend takes the place of their attention: FlashAttention's kernels on a GPU,
    which want each slot whole, the trunk included; elsewhere matrix products.
    """

    def __init__(self, model, slots: int, columns: int, dtype: torch.dtype, trunk_ids: list[int], eager: bool = False):
        super().__init__(layers=[])
        self.device = next(model.parameters()).device
        config = model.config
        windowed = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
        other = set(getattr(config, "layer_types", None) or windowed) - {"full_attention"}
        if other:
            other = ", ".join(other)
            raise ModelError(f"{config.name_or_path}: has layers of {other}; only full attention is supported")
        self.backend = products if eager else backend_for(self.device, dtype)
        columns += len(trunk_ids) if self.backend is not products else 0
        kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        self.shape = config.num_hidden_layers, slots, kv_heads, width
        self.keys = self.values = torch.empty(0)
        self._make_room(columns, dtype)
        self.length = [0] * slots  # tokens that each slot holds, without the trunk
        self.trunk_length = len(trunk_ids)
        nothing = self.keys[0, 0, :0].transpose(0, 1)
        self.trunk = [(nothing, nothing)] * config.num_hidden_layers  # keys, values (K, P, width)
        if trunk_ids:
            ids_1_P = torch.tensor([trunk_ids], device=self.device)
            with torch.no_grad(), autocast(self.device.type, dtype):
                past = model(input_ids=ids_1_P, use_cache=True, logits_to_keep=1).past_key_values
            self.trunk = [(layer.keys[0].to(dtype), layer.values[0].to(dtype)) for layer in past.layers]
        if self.backend is not products:
            for layer, (trunk_keys, trunk_values) in enumerate(self.trunk):
                self.keys[layer, :, : self.trunk_length] = trunk_keys.transpose(0, 1)
                self.values[layer, :, : self.trunk_length] = trunk_values.transpose(0, 1)
            self.length, self.trunk_length = [self.trunk_length] * slots, 0

    def _make_room(self, columns: int, dtype: torch.dtype) -> None:
        """Keys and values (layers, slots, columns, K, width); in memory a head's columns lie together for `products`, which
        reads them head by head, and a column's heads for the kernels. The last column is scratch: nobody reads it."""
        layers, slots, kv_heads, width = self.shape
        for name in ("keys", "values"):  # one after the other, so that one is held twice, not both
            if self.backend is products:
                larger = torch.zeros(layers, slots, kv_heads, columns + 1, width, dtype=dtype, device=self.device)
                larger = larger.transpose(2, 3)
            else:
                larger = torch.zeros(layers, slots, columns + 1, kv_heads, width, dtype=dtype, device=self.device)
            if (old := getattr(self, name)).numel():
                larger[:, :, : old.shape[2] - 1] = old[:, :, :-1]
            setattr(self, name, larger)
        self.columns = columns
        every = columns + 1
        self.slot_starts_S1 = torch.arange(0, slots * every + 1, every, dtype=torch.int32, device=self.device)

    def hold(self, slot: int, tokens: int) -> None:
        """Forget all but a slot's first tokens, the trunk counted; they must have been fed, or be the trunk."""
        self.length[slot] = tokens - self.trunk_length

    def grow(self, slots: list[int], counts: list[int]) -> None:
        """Count new tokens into slots[k], and make room where that is needed."""
        for slot, count in zip(slots, counts):
            self.length[slot] += count
        longest = max(self.length[slot] for slot in slots)
        if longest > self.columns:  # a user who talks longer than foreseen
            self._make_room(longest + 4 * MESSAGE_TOKENS, self.keys.dtype)

    def expect(self, slots: list[int], counts: list[int]) -> torch.Tensor:
        """Make room for counts[k] new tokens in slots[k], N in all, slots ascending; return their positions (N,)."""
        columns = [self.length[slot] + k for slot, count in zip(slots, counts) for k in range(count)]
        self.grow(slots, counts)
        owners = [slot for slot, count in zip(slots, counts) for _ in range(count)]
        self.slot_N = torch.tensor(owners, device=self.device)
        self.column_N = torch.tensor(columns, device=self.device)
        if self.backend is varlen:
            count_of = dict(zip(slots, counts))
            starts = list(accumulate((count_of.get(slot, 0) for slot in range(len(self.length))), initial=0))
            tensors = (torch.tensor(x, dtype=torch.int32, device=self.device) for x in (starts, self.length))
            self.pieces = Ragged(*tensors, max(counts))
        else:
            first = list(accumulate(counts, initial=0))  # place of each piece among the N
            alone, longer = ([k for k, count in enumerate(counts) if (count > 1) is many] for many in (False, True))
            # Replies that grow by one token are attended to apart from new pieces: they are not padded to the pieces' length.
            self.pieces = [self._pad(slots, counts, first, members) for members in (alone, longer) if members]
        return self.column_N + self.trunk_length

    def expect_one_each(self, column_S, length_S) -> torch.Tensor:
        """The same for one token of every slot, counted in its length, from tensors alone: nothing here asks the host."""
        every_S = torch.arange(len(self.length), device=self.device)
        self.slot_N, self.column_N = every_S, column_S
        if self.backend is varlen:
            starts = torch.arange(len(self.length) + 1, dtype=torch.int32, device=self.device)
            self.pieces = Ragged(starts, length_S.int(), 1)
        else:
            unseen_S_1_L = torch.arange(self.columns, device=self.device) >= length_S[:, None, None]
            every = slice(len(self.length))
            self.pieces = [Padded(every, every_S[:, None], every_S, unseen_S_1_L, every_S.int(), length_S.int())]
        return length_S - 1 + self.trunk_length

    def _pad(self, slots, counts, first, members):
        width = max(counts[k] for k in members)
        slots = [slots[k] for k in members]
        place_B_W = [[first[k] + max(0, counts[k] - width + w) for w in range(width)] for k in members]
        real = [b * width + w for b, k in enumerate(members) for w in range(width - counts[k], width)]
        place_B_W, real_n = (torch.tensor(x, device=self.device) for x in (place_B_W, real))
        # Slots in a row are a view of the cache, others a copy.
        in_a_row = slots == list(range(slots[0], slots[0] + len(slots)))
        index_B = slice(slots[0], slots[-1] + 1) if in_a_row else torch.tensor(slots, device=self.device)
        column_L = torch.arange(max(self.length[slot] for slot in slots), device=self.device)
        column_B_W = self.column_N[place_B_W]
        unseen_B_W_L = column_L > column_B_W[:, :, None]
        slot_B, length_B = self.slot_N[place_B_W[:, -1]].int(), (column_B_W[:, -1] + 1).int()
        return Padded(index_B, place_B_W, real_n, unseen_B_W_L, slot_B, length_B)

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write keys and values (1, K, N, width) of the expected tokens."""
        self.keys[layer_idx][self.slot_N, self.column_N] = key_states[0].transpose(0, 1).to(self.keys.dtype)
        self.values[layer_idx][self.slot_N, self.column_N] = value_states[0].transpose(0, 1).to(self.values.dtype)
        return key_states, value_states

    def attend(self, layer: int, query, scaling: float):
        """Attention of the expected tokens, query (heads, N, width), each to the trunk and to its own slot up to itself;
        returns (N, heads, width)."""
        if self.backend is varlen:
            return varlen(self, layer, self.pieces, query.transpose(0, 1).to(self.keys.dtype), scaling).to(query.dtype)
        out_N = query.new_empty(query.shape[1], query.shape[0], query.shape[2])
        for pieces in self.pieces:
            query_B_W = query[:, pieces.place_B_W].permute(1, 2, 0, 3).to(self.keys.dtype)  # (B, W, heads, width)
            read_B_W = self.backend(self, layer, pieces, query_B_W, scaling)
            out_N[pieces.place_B_W.flatten()[pieces.real_n]] = read_B_W.flatten(0, 1)[pieces.real_n].to(out_N.dtype)
        return out_N

    def copy(self, source: int, targets: list[int]) -> None:
        """Let slots begin with what `source` holds: the opening that a group shares."""
        length = self.length[source]
        for target in targets:
            self.keys[:, target, :length] = self.keys[:, source, :length]
            self.values[:, target, :length] = self.values[:, source, :length]
            self.length[target] = length


@dataclass
class Padded:
    """New tokens of B slots, W at most. For attention alone they are padded, on the left, by repeating the first."""

    slots: slice | torch.Tensor  # (B,)
    place_B_W: torch.Tensor  # among the N tokens of this pass
    real_n: torch.Tensor  # which of the B x W are no padding
    unseen_B_W_L: torch.Tensor  # columns of the slot that come after the token; L is the longest slot's length
    slot_B: torch.Tensor  # the same as `slots`, int32
    length_B: torch.Tensor  # of each slot, int32


@dataclass
class Ragged:
    """New tokens of all S slots, one slot's after the other's; none for some."""

    starts_S1: torch.Tensor  # where each slot's begin among the N, int32; the last is N
    length_S: torch.Tensor  # of each slot, int32
    longest: int  # of the pieces


def products(slots: Slots, layer: int, pieces: Padded, query_B_W, scaling: float):
    """Attention written out, (B, W, heads, width) -> the same shape. The trunk is one matrix product for all slots."""
    B, W, heads, width = query_B_W.shape
    L = pieces.unseen_B_W_L.shape[2]
    trunk_keys, trunk_values = slots.trunk[layer]  # (K, P, width): K key-value heads, each of G query heads
    K, P, _ = trunk_keys.shape
    G = heads // K
    keys = slots.keys[layer][pieces.slots, :L].transpose(1, 2)  # (B, K, L, width)
    values = slots.values[layer][pieces.slots, :L].transpose(1, 2)
    query_B_K = query_B_W.view(B, W, K, G, width).permute(0, 2, 3, 1, 4).reshape(B, K, G * W, width) * scaling
    on_own = (query_B_K @ keys.transpose(2, 3)).view(B, K, G, W, L)
    on_own = on_own.masked_fill(pieces.unseen_B_W_L[:, None, None], float("-inf")).view(B, K, G * W, L)
    on_trunk = query_B_K.transpose(0, 1).reshape(K, B * G * W, width) @ trunk_keys.transpose(1, 2)
    on_trunk = on_trunk.view(K, B, G * W, P).transpose(0, 1)
    weights = torch.cat([on_trunk, on_own], dim=-1).float().softmax(-1).to(values.dtype)
    trunk_weights, own_weights = weights.split([P, L], dim=-1)
    from_trunk = trunk_weights.transpose(0, 1).reshape(K, B * G * W, P) @ trunk_values
    read = from_trunk.view(K, B, G * W, width).transpose(0, 1) + own_weights @ values  # (B, K, G W, width)
    return read.view(B, K, G, W, width).permute(0, 3, 1, 2, 4).reshape(B, W, heads, width)


def flash(slots: Slots, layer: int, pieces: Padded, query_B_W, scaling: float):
    """The same by flash-attn's decoding kernel, which reads slots in place; the trunk must be in each of them."""
    settings = dict(cache_seqlens=pieces.length_B, cache_batch_idx=pieces.slot_B, softmax_scale=scaling)
    # causal: aligned at the last token, so that padding on the left sees too little, and is dropped.
    return flash_attn_with_kvcache(query_B_W, slots.keys[layer], slots.values[layer], causal=True, **settings)


def varlen(slots: Slots, layer: int, pieces: Ragged, query_N, scaling: float):
    """The same by PyTorch's FlashAttention, (N, heads, width) -> the same shape: the cache is one long row of all slots, of
    which each token reads its own up to itself."""
    keys, values = slots.keys[layer].flatten(0, 1), slots.values[layer].flatten(0, 1)  # (slots x columns, K, width)
    rows = query_N, keys, values, pieces.starts_S1, slots.slot_starts_S1, pieces.longest, slots.columns + 1
    # The window (-1, 0): causal, aligned at the last token.
    return varlen_attn(*rows, scale=scaling, window_size=(-1, 0), enable_gqa=True, seqused_k=pieces.length_S)


def backend_for(device: torch.device, dtype: torch.dtype):
    """FlashAttention on a GPU that has it: flash-attn where installed, else PyTorch's own (from 2.12 on)."""
    if device.type != "cuda" or dtype == torch.float32 or torch.cuda.get_device_capability(device) < (8, 0):
        return products
    if flash_attn_with_kvcache:
        return flash
    return varlen if varlen_attn and "seqused_k" in inspect.signature(varlen_attn).parameters else products


def attend_to_slots(module, query, key, value, attention_mask, scaling, slots, **kwargs):
    """transformers' attention interface: query (1, heads, N, width) -> (1, N, heads, width), no attention weights."""
    return slots.attend(module.layer_idx, query[0], scaling)[None], None


AttentionInterface.register("slots", attend_to_slots)


class FewRows(TorchFunctionMode):
    """On a CPU, x W^T of a few rows in float32 is up to three times slower than the same product as (W x^T)^T."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function is not F.linear or kwargs or args[0].dtype != torch.float32:
            return function(*args, **(kwargs or {}))
        x, weight, bias = (*args, None)[:3]
        if not 4 <= x.shape[:-1].numel() <= 64:
            return function(*args)
        product = (weight @ x.flatten(0, -2).T).T.reshape(*x.shape[:-1], -1)
        return product if bias is None else product + bias


class Generator:
    """A causal LM with `Slots`. The `trunk_ids` are what every slot begins with; `columns` are the tokens that a slot holds
    beyond them without growing. On a GPU a pass that feeds no more than one token of each slot is a CUDA graph."""

    def __init__(
        self, model, dtype=torch.float32, *, slots: int, columns: int = 256, trunk_ids: list[int] = (),
        temperature: float = 0.0, eager: bool = False,
    ):  # fmt: skip
        self.model, self.dtype, self.temperature = model, dtype, temperature
        self.cache = Slots(model, slots, columns, dtype, list(trunk_ids), eager)
        self.device = self.cache.device
        self.graphs = self.device.type == "cuda" and self.cache.backend is not products
        # Of each slot: next id, its column, length with it, a number in [0, 1).
        self.inputs_4_S = torch.zeros(4, slots, dtype=torch.float64, device=self.device)
        self.captured = None  # (columns of the cache, replay, what it draws)

    @torch.no_grad()
    def feed(self, slots: list[int], pieces: list[list[int]]):
        """One pass over new ids of some slots, ascending, all pieces in one row without padding; logits (B, V) after each."""
        counts = list(map(len, pieces))
        position_N = self.cache.expect(slots, counts)
        id_N = torch.tensor([token for piece in pieces for token in piece], device=self.device)
        return self._forward(id_N, position_N, torch.tensor(counts, device=self.device).cumsum(0) - 1)

    @torch.no_grad()
    def sample(self, slots: list[int], pieces: list[list[int]], uniforms: list[float]) -> list[tuple[int, float]]:
        """Feed, then draw: (id, log-prob) for each slot. The host waits once, for the result."""
        if not self.graphs or max(map(len, pieces)) > 1:
            logits_B_V = self.feed(slots, pieces)
            token_B, log_prob_B = draw(logits_B_V, self.temperature, torch.tensor(uniforms, device=self.device))
            return list(zip(token_B.tolist(), log_prob_B.tolist()))
        self.inputs_4_S.copy_(self._inputs(slots, pieces, uniforms))
        if self.captured is None or self.captured[0] != self.cache.columns:  # slots that have grown lie elsewhere
            self.captured = self.cache.columns, *capture(self._one_each)
        _, replay, drawn_2_S = self.captured
        replay()
        tokens, log_probs = drawn_2_S.tolist()
        return [(int(tokens[slot]), log_probs[slot]) for slot in slots]

    def _inputs(self, slots, pieces, uniforms) -> torch.Tensor:
        """Slots that have nothing to say compute in vain: they see one token, and write to the scratch column."""
        cache = self.cache
        columns = [cache.length[slot] for slot in slots]
        cache.grow(slots, [1] * len(slots))
        idle_4_1 = torch.tensor([[0.0], [cache.columns], [1.0], [0.0]], dtype=torch.float64)
        inputs_4_S = idle_4_1.repeat(1, len(cache.length))
        lengths = [cache.length[slot] for slot in slots]
        said = [[piece[0] for piece in pieces], columns, lengths, uniforms]
        inputs_4_S[:, slots] = torch.tensor(said, dtype=torch.float64)
        return inputs_4_S

    def _one_each(self):
        """One token of every slot, always with the same shapes at the same addresses: (ids, log-probs) as (2, S)."""
        id_S, column_S, length_S = self.inputs_4_S[:3].long()
        logits_S_V = self._forward(id_S, self.cache.expect_one_each(column_S, length_S), 0)
        return torch.stack([x.double() for x in draw(logits_S_V, self.temperature, self.inputs_4_S[3].float())])

    def _forward(self, id_N, position_N, logits_to_keep):
        config = self.model.config
        config._attn_implementation, usual = "slots", config._attn_implementation
        inputs = dict(input_ids=id_N[None], position_ids=position_N[None], logits_to_keep=logits_to_keep)
        try:
            with autocast(self.device.type, self.dtype), FewRows() if self.device.type == "cpu" else nullcontext():
                output = self.model(**inputs, past_key_values=self.cache, use_cache=True, slots=self.cache)
        finally:
            config._attn_implementation = usual
        return output.logits[0].float()


def capture(function):
    """(replay, result) of a CUDA graph of `function`: each replay() does its work anew, on the same addresses."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        function()  # what kernels set up at first use is no part of the graph
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # NCCL's watchdog thread may do as it likes
        result = function()
    return graph.replay, result


def draw(logits_B_V, temperature: float, uniform_B):
    """One token for each row: (ids (B,), log-probs (B,)). temperature 0 is greedy.

    `uniform_B` are numbers in [0, 1): the token is the one at which the cumulative distribution passes it, so that a row
    does not depend on its neighbours' draws.
    """
    log_probs_B_V = torch.log_softmax(logits_B_V / (temperature or 1.0), dim=-1)
    if temperature == 0:
        token_B = logits_B_V.argmax(-1)
    else:
        cdf_B_V = log_probs_B_V.exp().cumsum(-1)
        token_B = torch.searchsorted(cdf_B_V, uniform_B[:, None] * cdf_B_V[:, -1:], right=True).squeeze(1)
        token_B = token_B.clamp(max=cdf_B_V.shape[1] - 1)
    return token_B, log_probs_B_V.gather(1, token_B[:, None]).squeeze(1)


# --- 3. The model as its own simulated user ---------------------------------------------------------------------------


class LocalLLM:
    """Answers a PromptedSimulator's questions with a model in this process, all waiting dialogues in one batch, greedily.

    The sections' headings are written for the model, a section ends at the end of its line, and only a change from -10 to 10
    can be spelled, so that even a small model's answer can be read.
    """

    def __init__(self, model, tokenizer, dtype=torch.float32, eager: bool = False, max_section_tokens: int = 48):
        self.model, self.tokenizer, self.dtype, self.eager = model, tokenizer, dtype, eager
        self.max_section_tokens = max_section_tokens
        self.name = f"self {model.config.name_or_path}"
        self.waiting = []  # (steps, Future) of turns that wait for `work`
        self.chats = {}  # system prompt -> Chat
        vocabulary = tokenizer.batch_decode([[i] for i in range(len(tokenizer))])
        self.line_ends = [i for i, text in enumerate(vocabulary) if "\n" in text]
        self.changes = [tokenizer(f" {n}\n", add_special_tokens=False)["input_ids"] for n in range(-10, 11)]

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
        stop_ids = {*self.line_ends, *self.chats[questions[0][0]].stop_ids}
        trunk = min(common_prefix(prompts), min(map(len, prompts)) - 1)
        settings = dict(slots=len(prompts), trunk_ids=prompts[0][:trunk], eager=self.eager)
        generator = Generator(self.model, self.dtype, **settings)
        pieces = [prompt[trunk:] for prompt in prompts]
        answers = [""] * len(prompts)
        for name in sections:
            heading = self.chats[questions[0][0]].text_ids(f"{name}:")
            pieces = [piece + heading for piece in pieces]
            choices = self.changes if name == sections[-1] == "Change" else ()
            written = self._write(generator, pieces, stop_ids, choices)
            for row, ids in enumerate(written):
                text = self.tokenizer.decode(ids, skip_special_tokens=True).strip()
                answers[row] += f"{name}: {text}\n"
            # The last token is not in the cache yet. A section that was cut, or ended by a stop token, still ends its line.
            pieces = [ids[-1:] + ([] if ids[-1] in self.line_ends else self.line_ends[:1]) for ids in written]
        return answers

    def _write(self, generator, pieces, stop_ids, choices=()) -> list[list[int]]:
        """Greedy decoding of every row up to a stop id or `max_section_tokens`; with `choices`, until it spells one of them."""
        written = [[] for _ in pieces]
        rows = list(range(len(pieces)))
        while rows:
            logits_B_V = generator.feed(rows, pieces)
            for row, token, logits_V in zip(rows, logits_B_V.argmax(-1).tolist(), logits_B_V):
                ids = written[row]
                if choices:
                    allowed = sorted({c[len(ids)] for c in choices if c[: len(ids)] == ids})
                    token = allowed[int(logits_V[allowed].argmax())]
                ids.append(token)
            ended = lambda ids: ids[-1] in stop_ids or len(ids) == self.max_section_tokens
            rows = [row for row in rows if not (written[row] in choices if choices else ended(written[row]))]
            pieces = [written[row][-1:] for row in rows]
        return written


# --- 4. Policy and users take turns -----------------------------------------------------------------------------------


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


def share_openings(generator: Generator, replies: list[Reply]) -> None:
    """What dialogues that begin now have in common (in a GRPO group all but the sampling) is computed once."""
    groups = {}
    for reply in replies:
        groups.setdefault(tuple(reply.piece), []).append(reply)
    groups = sorted((group for group in groups.values() if len(group) > 1), key=lambda group: group[0].slot)
    if groups:
        generator.feed([group[0].slot for group in groups], [group[0].piece[:-1] for group in groups])
    for first, *others in groups:
        generator.cache.copy(first.slot, [reply.slot for reply in others])
        for reply in (first, *others):
            reply.piece = reply.piece[-1:]


def rollout(
    model, chat, simulator, profiles: list[Profile], seeds: list[int], protocol: Protocol, *, think: bool = False,
    max_new_tokens: int = 40, temperature: float = 1.0, dtype: torch.dtype = torch.float32, slots: int | None = None,
    eager: bool = False, on_end=lambda: None,
) -> list[Dialogue]:  # fmt: skip
    """Hold one dialogue per profile; `seeds[i]` alone decides dialogue i's sampling. temperature 0 is greedy. `on_end` is
    called at each dialogue's end (for a progress bar).

    There is no barrier between turns: each pass takes one more token of every reply in the making, and the messages of the
    users who have answered meanwhile (users played in this process answer when nobody speaks, all at once). At most `slots`
    dialogues are held at once (None: all); the next one takes the slot of one that has ended.
    """
    dialogues = [Dialogue(User(profile, protocol.start), protocol.start) for profile in profiles]
    if not profiles:
        return []
    randoms = [torch.Generator().manual_seed(seed) for seed in seeds]
    free = list(range(min(slots or len(profiles), len(profiles))))
    columns = protocol.turns * (max_new_tokens + MESSAGE_TOKENS)
    generator = Generator(
        model, dtype, slots=len(free), columns=columns, trunk_ids=chat.head, temperature=temperature, eager=eager
    )
    listening = {simulator.open(profile, protocol.start): (i, None) for i, profile in enumerate(profiles)}
    waiting, speaking = deque(), []  # dialogues that wait for a slot, replies in the making

    def speak(i, slot):
        prompt_ids, held = next_prompt(chat, dialogues[i], think)
        generator.cache.hold(slot, held)
        uniforms = torch.rand(max_new_tokens, generator=randoms[i]).tolist()
        speaking.append(Reply(i, slot, prompt_ids, prompt_ids[held:], uniforms))

    def end(slot):
        if slot is not None:
            free.append(slot)
        on_end()

    while listening or waiting or speaking:
        for future in [future for future in listening if future.done()]:
            i, slot = listening.pop(future)
            try:
                answer = future.result()
            except UserBroken as error:
                dialogues[i].dropped = str(error)
                end(slot)
                continue
            if slot is None:
                dialogues[i].user = answer
                waiting.append(i)
                continue
            dialogues[i].turns[-1].reaction = answer
            if answer.goodbye or len(dialogues[i].turns) == protocol.turns:
                end(slot)
            else:
                speak(i, slot)
        old = len(speaking)
        while waiting and free:
            speak(waiting.popleft(), free.pop(0))
        share_openings(generator, speaking[old:])
        if not speaking:
            simulator.work()
            wait(listening, return_when=FIRST_COMPLETED)
            continue

        speaking.sort(key=lambda reply: reply.slot)  # neighbours in the cache are read without a copy
        taken, pieces = [reply.slot for reply in speaking], [reply.piece for reply in speaking]
        drawn = generator.sample(taken, pieces, [reply.uniforms[len(reply.sampled_ids)] for reply in speaking])
        spoken, speaking = speaking, []
        for reply, (token, log_prob) in zip(spoken, drawn):
            reply.sampled_ids.append(token)
            reply.log_probs.append(log_prob)
            reply.piece = [token]
            stopped = token in chat.stop_ids
            if not stopped and len(reply.sampled_ids) < max_new_tokens:
                speaking.append(reply)
                continue
            thinking, text, format_ok = split_thinking(chat.decode(reply.sampled_ids), think)
            ids = reply.prompt_ids, reply.sampled_ids, reply.log_probs
            dialogues[reply.dialogue].turns.append(Turn(*ids, stopped, thinking, text, format_ok))
            if format_ok:  # every user answers its own dialogue, whatever has ended meanwhile
                listening[simulator.submit(dialogues[reply.dialogue].user, text)] = (reply.dialogue, reply.slot)
            else:
                end(reply.slot)
    return dialogues


# --- 5. What to train on ----------------------------------------------------------------------------------------------


@dataclass
class Batch(Sequences):
    """Token sequences, and the N sampled tokens as flat vectors in dialogue order, then turn order.

    A dialogue whose turns each extend the one before is one sequence; with --think every turn is a sequence of its own,
    built from the history that the policy really saw.
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
    sequences, rows = [], []
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
                rows.append((len(sequences) - 1, start + k, d, token, t, log_prob, turn_reward if last else 0.0))
    return Batch(sequences, *map(torch.tensor, zip(*rows) if rows else [()] * 7))
