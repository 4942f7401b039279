"""The generator: one slot of KV cache per dialogue; ragged, unpadded, history is prefilled once."""

import inspect
from contextlib import nullcontext
from dataclasses import dataclass
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

from policy import ModelError, autocast

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
