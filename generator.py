"""The generator: one slot of KV cache per dialogue; ragged, unpadded, history is prefilled once."""

import inspect
from dataclasses import dataclass
from itertools import accumulate

import torch
import torch.nn.functional as F
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

from policy import ModelError

MESSAGE_TOKENS = 64  # of a user's message, foreseen in a slot
REPLY_TOKENS = 200  # of a reply whose thinking has left its slot again, likewise


def columns_for(turns: int, max_new_tokens: int, think: bool) -> int:
    """Tokens of a whole dialogue that a slot is made for: the longest replies, or with thinking one such and usual ones."""
    if think:
        return max_new_tokens + turns * (MESSAGE_TOKENS + min(REPLY_TOKENS, max_new_tokens))
    return turns * (MESSAGE_TOKENS + max_new_tokens)


def key_shape(config) -> tuple[int, int]:
    """(key-value heads, width of each)."""
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return kv_heads, getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def bytes_per_token(config, dtype: torch.dtype) -> int:
    """Of the cache: keys and values in all layers."""
    kv_heads, width = key_shape(config)
    return 2 * config.num_hidden_layers * kv_heads * width * dtype.itemsize


def slots_with_room(model, columns: int) -> int:
    """Slots of so many tokens for which a GPU has memory left, with a tenth to spare; a CPU bounds nothing."""
    head = model.get_output_embeddings().weight
    if head.device.type != "cuda":
        return 2**31
    torch.cuda.empty_cache()  # what the allocator keeps of freed memory is free
    free, _ = torch.cuda.mem_get_info(head.device)
    return max(1, int(0.9 * free / (columns * bytes_per_token(model.config, head.dtype))))


def check_architecture(config) -> None:
    """Raise ModelError for a model whose attention slots cannot hold, or whose head does not give the logits that are sampled from."""
    for name in ("num_attention_heads", "num_hidden_layers", "intermediate_size"):
        if not hasattr(config, name):
            raise ModelError(f"{config.name_or_path}: its config has no {name}; it must be built like Llama or Qwen2.5")
    scales = {getattr(config, name, None) or 1 for name in ("logits_scaling", "logit_scale", "lm_head_multiplier")}
    if scales != {1} or getattr(config, "final_logit_softcapping", None):
        raise ModelError(f"{config.name_or_path}: changes the logits after its head, which the update would not")
    windowed = ["sliding_attention"] if getattr(config, "sliding_window", None) else []
    other = set(getattr(config, "layer_types", None) or windowed) - {"full_attention"}
    if other:
        other = ", ".join(other)
        raise ModelError(f"{config.name_or_path}: has layers of {other}; only full attention is supported")
    if (getattr(config, "rope_parameters", None) or {}).get("rope_type") in ("dynamic", "longrope"):
        problem = "its rotary frequencies change with the longest dialogue, which would move all others"
        raise ModelError(f"{config.name_or_path}: {problem}")


class Slots(Cache):
    """The KV cache of many dialogues: one slot each, with its own length, so that nobody waits for a longer one.

    transformers' attention layers write to it through `update`, and its `attend` takes the place of their attention.
    """

    def __init__(self, model, slots: int, columns: int, eager: bool = False):
        super().__init__(layers=[])
        config, head = model.config, model.get_output_embeddings().weight
        self.device, self.dtype = head.device, head.dtype
        check_architecture(config)
        self.backend = products if eager else backend_for(self.device, self.dtype)
        self.shape = config.num_hidden_layers, slots, *key_shape(config)
        self.keys = self.values = torch.empty(0)
        self._make_room(columns)
        self.length = [0] * slots  # tokens that each slot holds

    def _make_room(self, columns: int) -> None:
        """Keys and values (layers, slots, columns, K, width). The last column is scratch: nobody reads it."""
        layers, slots, kv_heads, width = self.shape
        for name in ("keys", "values"):  # one after the other, so that one is held twice, not both
            shape = layers, slots, columns + 1, kv_heads, width
            larger = torch.zeros(shape, dtype=self.dtype, device=self.device)
            if (old := getattr(self, name)).numel():
                larger[:, :, : old.shape[2] - 1] = old[:, :, :-1]
            setattr(self, name, larger)
        self.columns = columns
        every = columns + 1
        self.slot_starts_S1 = torch.arange(0, slots * every + 1, every, dtype=torch.int32, device=self.device)

    def hold(self, slot: int, tokens: int) -> None:
        """Forget all but a slot's first tokens, which must have been fed."""
        self.length[slot] = tokens

    def copy(self, source: int, targets: list[int]) -> None:
        """Let slots begin with what `source` holds: the opening that a group shares."""
        length = self.length[source]
        for target in targets:
            self.keys[:, target, :length] = self.keys[:, source, :length]
            self.values[:, target, :length] = self.values[:, source, :length]
            self.length[target] = length

    def grow(self, slots: list[int], counts: list[int]) -> None:
        """Count new tokens into slots[k], and make room where that is needed."""
        for slot, count in zip(slots, counts):
            self.length[slot] += count
        longest = max(self.length[slot] for slot in slots)
        if longest > self.columns:  # a user who talks longer than foreseen
            self._make_room(longest + 4 * MESSAGE_TOKENS)

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
            self.pieces = self._pieces(slots, counts)
        return self.column_N

    def _pieces(self, slots: list[int], counts: list[int]) -> list["Piece"]:
        """A new message is attended to by itself; all replies that grow by one token together, read from the cache without a
        copy: from the first of their slots to the last, those between that have nothing new computing in vain."""
        pieces, alone, n = [], {}, 0
        for slot, count in zip(slots, counts):
            if count == 1:
                alone[slot] = n
            else:
                place_1_W = torch.arange(n, n + count, device=self.device)[None]
                pieces.append(self._piece(slot, place_1_W, self.length[slot]))
            n += count
        if alone:
            reach = range(min(alone), max(alone) + 1)
            place_B_1 = torch.tensor([[alone.get(slot, n)] for slot in reach], device=self.device)
            pieces.append(self._piece(min(alone), place_B_1, max(self.length[slot] for slot in alone)))
        return pieces

    def _piece(self, first: int, place_B_W, longest: int) -> "Piece":
        column_B_W = self.column_N[place_B_W.clamp(max=len(self.column_N) - 1)]
        unseen_B_W_L = torch.arange(longest, device=self.device) > column_B_W[:, :, None]
        slots = slice(first, first + len(place_B_W))
        return Piece(slots, place_B_W, self._mask(unseen_B_W_L), column_B_W[:, -1].int() + 1)

    def _mask(self, unseen_B_W_L):
        """What is added to scores, (B, 1, W, L)."""
        return torch.zeros_like(unseen_B_W_L, dtype=self.dtype).masked_fill(unseen_B_W_L, float("-inf"))[:, None]

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
            self.pieces = [Piece(every, every_S[:, None], self._mask(unseen_S_1_L), length_S.int())]
        return length_S - 1

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Write keys and values (1, K, N, width) of the expected tokens."""
        self.keys[layer_idx][self.slot_N, self.column_N] = key_states[0].transpose(0, 1)
        self.values[layer_idx][self.slot_N, self.column_N] = value_states[0].transpose(0, 1)
        return key_states, value_states

    def attend(self, layer: int, query, scaling: float):
        """Attention of the expected tokens, query (heads, N, width), each to its own slot up to itself; (N, heads, width)."""
        query_N = query.transpose(0, 1)
        if self.backend is varlen:
            return varlen(self, layer, self.pieces, query_N, scaling)
        N, heads, width = query_N.shape
        out_N1 = query.new_empty(N + 1, heads, width)  # the last: what slots with nothing new have computed in vain
        for piece in self.pieces:
            query_B_W = query_N[piece.place_B_W.clamp(max=N - 1)]  # (B, W, heads, width)
            out_N1[piece.place_B_W] = self.backend(self, layer, piece, query_B_W, scaling)
        return out_N1[:N]


@dataclass
class Piece:
    """New tokens that are attended to together: W of one slot, or one of each of B neighbouring slots."""

    slots: slice  # (B,)
    place_B_W: torch.Tensor  # among the N tokens of this pass; N for a slot with nothing new
    mask_B_1_W_L: torch.Tensor  # 0, or -inf for columns after the token; L covers the longest slot
    length_B: torch.Tensor  # of each slot, int32


@dataclass
class Ragged:
    """New tokens of all S slots, one slot's after the other's; none for some."""

    starts_S1: torch.Tensor  # where each slot's begin among the N, int32; the last is N
    length_S: torch.Tensor  # of each slot, int32
    longest: int  # of the pieces


# --- Three ways to attend: each gives the same answer -----------------------------------------------------------------


def products(slots: Slots, layer: int, piece: Piece, query_B_W, scaling: float):
    """PyTorch's own attention, anywhere: (B, W, heads, width) -> the same shape.

    The G query heads that share a key-value head are laid beside each other like tokens: no key is copied for them.
    """
    B, W, heads, width = query_B_W.shape
    L = piece.mask_B_1_W_L.shape[3]
    keys = slots.keys[layer][piece.slots, :L].transpose(1, 2)  # (B, K, L, width)
    values = slots.values[layer][piece.slots, :L].transpose(1, 2)
    K, G = keys.shape[1], heads // keys.shape[1]
    query_B_K = query_B_W.view(B, W, K, G, width).permute(0, 2, 3, 1, 4).reshape(B, K, G * W, width)
    mask = piece.mask_B_1_W_L.repeat(1, 1, G, 1) if W > 1 else piece.mask_B_1_W_L
    read_B_K = F.scaled_dot_product_attention(query_B_K, keys, values, attn_mask=mask, scale=scaling)
    return read_B_K.view(B, K, G, W, width).permute(0, 3, 1, 2, 4).reshape(B, W, heads, width)


def flash(slots: Slots, layer: int, piece: Piece, query_B_W, scaling: float):
    """The same by flash-attn's decoding kernel, which reads slots in place. causal: aligned at the last token."""
    keys, values = slots.keys[layer][piece.slots], slots.values[layer][piece.slots]
    settings = dict(cache_seqlens=piece.length_B, softmax_scale=scaling, causal=True)
    return flash_attn_with_kvcache(query_B_W, keys, values, **settings)


def varlen(slots: Slots, layer: int, pieces: Ragged, query_N, scaling: float):
    """The same by PyTorch's FlashAttention, (N, heads, width) -> the same shape: the cache is one long row of all slots, of
    which each token reads its own up to itself.

    The window (-1, 0) is causal, aligned at the last token. One query for every slot needs no mask, and only without one
    (-1, -1) does the kernel split long slots among its blocks and read a key once for all query heads that share it.
    """
    keys, values = slots.keys[layer].flatten(0, 1), slots.values[layer].flatten(0, 1)  # (slots x columns, K, width)
    rows = query_N, keys, values, pieces.starts_S1, slots.slot_starts_S1, pieces.longest, slots.columns + 1
    window = (-1, -1) if len(query_N) == len(pieces.length_S) and pieces.longest == 1 else (-1, 0)
    return varlen_attn(*rows, scale=scaling, window_size=window, enable_gqa=True, seqused_k=pieces.length_S)


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


class Generator:
    """A causal LM with `Slots`, in the dtype of its weights. Every slot begins with the `trunk_ids`; `columns` are the tokens
    that it holds beyond them without growing. On a GPU a pass of one token of each slot at most is a CUDA graph."""

    def __init__(
        self, model, *, slots: int, columns: int = 256, trunk_ids: list[int] = (), temperature: float = 0.0,
        eager: bool = False,
    ):  # fmt: skip
        self.model, self.temperature = model, temperature
        self.cache = Slots(model, slots, columns + len(trunk_ids), eager)
        self.device = self.cache.device
        self.graphs = self.device.type == "cuda" and not eager
        # Of each slot: next id, its column, length with it, a number in [0, 1).
        self.inputs_4_S = torch.zeros(4, slots, dtype=torch.float64, device=self.device)
        self.captured = None  # (columns of the cache, replay, what it draws)
        if trunk_ids:
            self.feed([0], [trunk_ids])
            self.cache.copy(0, range(1, slots))

    @torch.no_grad()
    def feed(self, slots: list[int], pieces: list[list[int]]):
        """One pass over new ids of some slots, ascending, all pieces in one row without padding; logits (B, V) after each."""
        counts = list(map(len, pieces))
        position_N = self.cache.expect(slots, counts)
        id_N = torch.tensor([token for piece in pieces for token in piece], device=self.device)
        return self._forward(id_N, position_N, torch.tensor(counts, device=self.device).cumsum(0) - 1)

    @torch.no_grad()
    def sample(self, slots: list[int], pieces: list[list[int]], uniforms: list[float]) -> list[tuple[int, float]]:
        """Feed, then draw: (id, log-prob) for each slot. With CUDA graphs the host waits once, for the result."""
        if not self.graphs or max(map(len, pieces)) > 1:
            logits_B_V = self.feed(slots, pieces)
            token_B, log_prob_B = draw(logits_B_V, self.temperature, torch.tensor(uniforms, device=self.device))
            return list(zip(token_B.tolist(), log_prob_B.tolist()))
        self.inputs_4_S.copy_(self._inputs(slots, pieces, uniforms))
        if self.captured is None or self.captured[0] != self.cache.columns:  # slots that have grown lie elsewhere
            self.captured = None  # its memory is free before the next graph is recorded
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
            output = self.model(**inputs, past_key_values=self.cache, use_cache=True, slots=self.cache)
        finally:
            config._attn_implementation = usual
        return output.logits[0].float()


def capture(function):
    """(replay, result) of a CUDA graph of `function`: each replay() does its work anew, on the same addresses."""
    function()  # what kernels set up at first use is no part of the graph
    torch.cuda.synchronize()
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
