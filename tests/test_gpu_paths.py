"""What only a GPU runs, as far as a CPU can tell: shapes on the meta device, compilations counted, a group of eight pretended.

On the meta device a look at a tensor's value raises (a GPU would wait for it), and so does a tensor left on the CPU.
"""

import contextlib
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import transformers.integrations.flex_attention as hf_flex
from conftest import tiny_model
from test_algorithms import fast_log_probs, ragged, slow_log_probs, thinking
from torch._dynamo.testing import CompileCounterWithBackend
from torch.distributed.checkpoint.state_dict import get_model_state_dict
from torch.distributed.utils import _to_kwargs
from torch.nn.attention.flex_attention import create_block_mask, flex_attention
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen2Config, Qwen2ForCausalLM

import generator
from distributed import shard
from extras import gpu_check
from extras.plan import memory_plan, update_memory
from generator import Generator, Slots, columns_for, slots_with_room, varlen
from policy import Critic, ModelError, Policy, checkpoint_activations
from settings import parse_args

SHAPE = gpu_check.SHAPE | dict(num_hidden_layers=28, tie_word_embeddings=False)


@pytest.fixture
def plain(monkeypatch):
    """autocast knows no meta device."""
    monkeypatch.setattr("policy.autocast", lambda device, dtype: contextlib.nullcontext())


def on_meta(**shape):
    with torch.device("meta"):
        return Qwen2ForCausalLM(Qwen2Config(**SHAPE | shape)).eval().to(torch.bfloat16)


# --- Rollouts ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", [generator.flash, generator.varlen, generator.products])
def test_a_rollout_never_waits_for_the_gpu_inside_a_pass(backend, monkeypatch):
    """Qwen2.5-7B's shape; also after a slot has grown and one was copied."""
    monkeypatch.setattr("generator.backend_for", lambda device, dtype: backend)
    monkeypatch.setattr("generator.flash_attn_with_kvcache", lambda query, *args, **kwargs: torch.empty_like(query))
    sampler = Generator(on_meta(), slots=3, columns=32, trunk_ids=[1, 2, 3], temperature=1.0)
    for _ in range(2):
        assert sampler.feed([0, 2], [[5, 6, 7], [8]]).shape == (2, 152064)
        sampler.inputs_4_S.copy_(sampler._inputs([0, 2], [[3], [4]], [0.1, 0.2]))
        with torch.no_grad():
            drawn_2_S = sampler._one_each()
        assert drawn_2_S.shape == (2, 3) and drawn_2_S.device.type == "meta"
        sampler.cache.grow([0], [60])
        sampler.cache.copy(0, [1])
    with pytest.raises(RuntimeError):
        drawn_2_S.tolist()  # this is what raises


VIEWS = "view _unsafe_view transpose unsqueeze squeeze slice select expand t permute alias detach empty as_strided empty_like new_empty unbind split reshape _reshape_alias split_with_sizes".split()  # fmt: skip


class Kernels(TorchDispatchMode):
    """Counts what a GPU would launch."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function._schema.name.split("::")[1]
        self.count[name] += name not in VIEWS
        return function(*args, **(kwargs or {}))


def test_kernels_per_decoded_token(monkeypatch):
    """A regression test of speed without a GPU: about 40 a layer, 1,160 for Qwen2.5-7B."""
    monkeypatch.setattr("generator.backend_for", lambda device, dtype: varlen)
    totals = []
    for layers in (2, 3):
        sampler = Generator(on_meta(num_hidden_layers=layers), slots=4, columns=32, trunk_ids=[1], temperature=1.0)
        with torch.no_grad(), Kernels() as kernels:
            sampler._one_each()
        totals.append(kernels.count.total())
    per_layer = totals[1] - totals[0]
    assert per_layer <= 42 and totals[0] - 2 * per_layer <= 50


def test_slots_by_default_are_as_many_as_the_free_memory_holds(monkeypatch):
    head = SimpleNamespace(device=torch.device("cuda"), dtype=torch.bfloat16)
    model = SimpleNamespace(config=Qwen2Config(**SHAPE), get_output_embeddings=lambda: SimpleNamespace(weight=head))
    monkeypatch.setattr("torch.cuda.mem_get_info", lambda device: (60e9, 80e9))
    monkeypatch.setattr("torch.cuda.empty_cache", lambda: None)
    columns = columns_for(9, 5000, think=True)
    assert slots_with_room(model, columns) == int(0.9 * 60e9 / (columns * 57_344)) >= 48
    assert slots_with_room(model, columns_for(9, 5000, think=False)) == 20
    assert slots_with_room(tiny_model(), columns) > 10**6, "a CPU bounds nothing"


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_a_model_whose_rotary_frequencies_depend_on_others_is_refused(kind):
    model = tiny_model()
    model.config.rope_parameters = {"rope_type": kind, "factor": 2.0, "rope_theta": 10000.0}
    with pytest.raises(ModelError, match="longest dialogue"):
        Slots(model, 1, 8)


# --- Updates ----------------------------------------------------------------------------------------------------------


def test_an_update_of_policy_and_critic_stays_on_the_gpu(plain, monkeypatch):
    """Qwen2.5-7B's width: forward and backward, logits in parts; what is saved has the checkpoint's names."""
    monkeypatch.setattr("policy.LOGITS_AT_ONCE", 16)
    model, batch = on_meta(num_hidden_layers=2).float(), thinking()
    policy, critic = Policy(model), Critic(model)
    log_probs_n, entropy_n, index_n = policy(batch, [0, 1, 2])
    values_n, _ = critic(batch, [0, 1, 2])
    (log_probs_n.sum() + entropy_n.sum() + values_n.sum()).backward()
    assert {x.device.type for x in (log_probs_n, entropy_n, values_n)} == {"meta"} and len(index_n) == len(batch)
    for module in (policy, critic):
        assert all(parameter.grad.device.type == "meta" for parameter in module.parameters())
    assert set(get_model_state_dict(policy)) == {f"model.{name}" for name in model.state_dict()}
    assert _to_kwargs((batch, [0]), {}, torch.device("meta"), False)[0][0][0] is batch, "FSDP moves no batch"


@pytest.fixture
def compiled_flex(monkeypatch):
    """FlexAttention through Dynamo and AOTAutograd, forward and backward, with the generated code left out."""
    counters = {name: CompileCounterWithBackend("aot_eager") for name in ("mask", "attention")}
    attention = torch.compile(flex_attention, backend=counters["attention"])
    mask = torch.compile(create_block_mask, backend=counters["mask"])
    monkeypatch.setattr("torch.nn.attention.flex_attention._validate_device", lambda *tensors: None)
    monkeypatch.setattr(
        hf_flex, "compile_friendly_flex_attention", lambda *qkv, training=False, **kw: attention(*qkv, **kw)
    )
    monkeypatch.setattr("prefix_tree.create_block_mask", lambda *args, _compile, **settings: mask(*args, **settings))
    torch._dynamo.reset()
    yield counters
    torch._dynamo.reset()


@pytest.mark.slow
def test_flex_attention_is_compiled_a_few_times_and_not_for_every_length(compiled_flex):
    """With and without gradients, five lengths: fewer than the limit of eight, at which Dynamo would fall back to T x T scores."""
    model = tiny_model("qwen2")
    model.set_attn_implementation("flex_attention")
    checkpoint_activations(model)
    for batch in (ragged(), thinking(), thinking(8, 4), thinking(4, 9), thinking(12, 6)):
        with torch.no_grad():
            fast_log_probs(model, batch, 10_000)
        log_probs_N = fast_log_probs(model, batch, 10_000)
        log_probs_N.sum().backward()
    assert torch.allclose(log_probs_N, slow_log_probs(tiny_model("qwen2"), batch, 0.8), atol=1e-5)
    assert 2 <= compiled_flex["attention"].frame_count <= 6 and compiled_flex["mask"].frame_count <= 4


# --- The plan ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def planned(tmp_path):
    """(args, model) of the paper's run with Qwen2.5-7B's shape."""
    Qwen2Config(**SHAPE).save_pretrained(tmp_path)
    flags = f"--preset paper --algo ppo --think --model {tmp_path} --gpus 8 --gpu-memory 80 --plan"
    return parse_args(flags.split()), on_meta().float()


def test_eight_ranks_hold_what_the_plan_says(planned):
    args, model = planned
    plan, _ = memory_plan(args, 8)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        critic, policy = shard(Critic(model), torch.bfloat16), shard(Policy(model), torch.bfloat16)
        own = lambda module: sum(parameter.to_local().numel() for parameter in module.parameters()) / 1e9
        assert {parameter.dtype for parameter in policy.parameters()} == {torch.float32}
        assert plan["weights"] == plan["gradients"] == plan["optimizer"] / 2 == pytest.approx(4 * own(policy), rel=1e-3)
        assert plan["critic"] == pytest.approx(16 * own(critic), rel=1e-3)
    finally:
        dist.destroy_process_group()


def test_the_papers_run_with_the_policy_as_its_user_fits_eight_gpus(planned):
    args, _ = planned
    plan, slots = memory_plan(args, 8)
    assert args.simulator == "self" and slots >= 4 and plan["peak"] < 70
    offline = memory_plan(SimpleNamespace(**vars(args) | {"simulator": "offline"}), 8)[0]
    phase = lambda plan, name: sum(size for key, size in plan.items() if key.startswith(name))
    assert plan["rollout: user"] == plan["rollout: sampler"] == pytest.approx(15.2, abs=0.1)
    assert phase(plan, "update") == phase(offline, "update"), "the user's weights wait elsewhere meanwhile"
    assert plan["host, of all ranks"] == pytest.approx(8 * 30.5, abs=1)
    # Weights and moments of policy and critic in float32, the model in bfloat16; the new beside the old.
    assert plan["disk"] == pytest.approx(2 * (12 * (7.616 + 7.071) + 2 * 7.616), rel=1e-3)


@pytest.mark.parametrize("dtype, attention", [(torch.bfloat16, "flex_attention"), (torch.float32, "sdpa")])
def test_a_layer_keeps_as_much_as_the_plan_says(dtype, attention, compiled_flex, planned):
    """Bytes that one layer saves for its backward pass, for each token, to 10 %."""
    shape = SHAPE | dict(hidden_size=448, intermediate_size=2368, num_hidden_layers=2, vocab_size=100)
    model, T = Qwen2ForCausalLM(Qwen2Config(**shape)).eval().to(dtype), 256
    model.set_attn_implementation(attention)
    args = SimpleNamespace(**vars(planned[0]) | dict(turns=1, max_new_tokens=171, micro_tokens=1, checkpointing=False))
    expected = update_memory(args, model, 8, dtype)["update: activations"] / 2  # two layers
    ends_1_T = torch.full((1, T), T)
    mask = create_block_mask(lambda b, h, q, k: (k <= q) & (q < ends_1_T[b, k]), 1, None, T, T, device="cpu")
    if attention == "sdpa":
        mask = torch.zeros(1, 1, T, T)
    own, kept = {p.untyped_storage().data_ptr() for p in model.parameters()}, {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own and tensor is not mask:
            kept[storage.data_ptr()] = storage.nbytes(), tensor
        return tensor

    hidden = torch.randn(1, T, 448, dtype=dtype, requires_grad=True)
    angles = model.model.rotary_emb(hidden, torch.arange(T)[None])
    mixed = torch.autocast("cpu", dtype) if dtype == torch.bfloat16 else contextlib.nullcontext()
    with mixed, torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        model.model.layers[1](hidden, attention_mask=mask, position_embeddings=angles)
    assert sum(size for size, _ in kept.values()) == pytest.approx(expected, rel=0.1)


# --- The check to be run on a GPU -------------------------------------------------------------------------------------


def test_the_gpu_check_tells_the_same_model_from_another_one(capsys):
    shape = dict(vocab_size=300, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    model, batch = gpu_check.random_model(2, torch.float32, "cpu", **shape), gpu_check.random_batch(300)
    drawn, _ = gpu_check.decode(model, 4, 100, passes=3)
    log_probs_N, gradient = gpu_check.log_probs_and_gradient(model, batch, torch.float32)
    for scale, alike in ((1.0, True), (1.5, False)):
        other = gpu_check.random_model(2, torch.float32, "cpu", **shape)
        other.lm_head.weight.data *= scale
        assert (gpu_check.decode(other, 4, 100, passes=3)[0] == drawn) == alike
        found_N, found = gpu_check.log_probs_and_gradient(other, batch, torch.bfloat16)
        assert ((found_N - log_probs_N).abs().max() < 0.02) == alike
        assert ((found - gradient).norm() < 0.05 * gradient.norm()) == alike
    assert gpu_check.main([]) == 2 and "no GPU" in capsys.readouterr().err
