"""Tiny random models and a byte tokenizer made on the fly: no network, no downloads."""

import json
import os
import sys
import zlib
from pathlib import Path

import pytest

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the comparisons are in float32, and two ranks share no GPU

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import policy  # noqa: E402
from offline_user import OfflineSimulator  # noqa: E402
from policy import Chat  # noqa: E402
from reader import ACTS, Head, save_reader  # noqa: E402
from simulator import load_profiles  # noqa: E402


def pytest_addoption(parser):
    parser.addoption("--dtype", choices=("float32", "bfloat16"), help="what the machine is taken to compute in fast")


def pytest_configure(config):
    if dtype := config.getoption("--dtype"):
        policy.cpu_has_bf16 = lambda: dtype == "bfloat16"


TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def byte_tokenizer():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: i for i, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|im_start|>", "<|im_end|>"]
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", additional_special_tokens=special
    )
    fast.pad_token = fast.eos_token
    fast.chat_template = TEMPLATE
    return fast


def tiny_model(kind="llama", seed=0):
    torch.manual_seed(seed)
    config_class, model_class = {
        "llama": (LlamaConfig, LlamaForCausalLM),
        "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    }[kind]
    config = config_class(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    return model_class(config).eval()


def metrics_of(out):
    """Rows of a run's metrics.jsonl without what depends on the machine."""
    timing = ("seconds", "tokens_per_second", "peak_memory")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not any(word in k for word in timing)} for row in rows]


def parameters_of(out):
    """Of each trained module, whole: {name: float32 weights}, from a run's last checkpoint."""
    (folder,) = out.glob("trainer-*")
    dcp_to_torch_save(folder, out / "whole.pt")
    return torch.load(out / "whole.pt")["modules"]


@pytest.fixture(scope="session")
def tokenizer():
    return byte_tokenizer()


@pytest.fixture
def model():
    return tiny_model()


@pytest.fixture(scope="session")
def chat(tokenizer):
    return Chat(tokenizer, "Be kind.")


@pytest.fixture(scope="session")
def profiles():
    return load_profiles(ROOT / "data" / "test_profiles.jsonl")


class AnyReader:
    """Stands in for a reader where it does not matter what is read, only that the same reply is read alike."""

    def read(self, texts):
        return [{ACTS[zlib.crc32(reply.encode()) % len(ACTS)]: 100} for _, reply in texts]


@pytest.fixture
def simulator():
    return OfflineSimulator(AnyReader())


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A checkpoint folder for command-line tests."""
    folder = tmp_path_factory.mktemp("tiny") / "model"
    tiny_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_reader(tiny_folder):
    """A reader on a tiny model, with a random head."""
    torch.manual_seed(0)
    path = tiny_folder.parent / "reader.pt"
    save_reader(path, str(tiny_folder), (2,), Head(4 * 32))
    return path


@pytest.fixture(autouse=True)
def usual_reader(tiny_reader, monkeypatch):
    """Commands that name no reader take the tiny one; tests of the real one name it."""
    monkeypatch.setattr("users.WEIGHTS", tiny_reader)
