"""What only a GPU can show, with random weights of Qwen2.5-7B's shape: `python -m extras.gpu_check [--layers 28]`.

decode    the passes of a CUDA graph draw the same tokens as those passes launched one by one; milliseconds of each; how far
          the log-probs are from those by `generator.products`, which attends without FlashAttention
update    log-probs and gradients by compiled FlexAttention, in float32, bfloat16 and with activation checkpoints, and by
          plain attention in bfloat16, against plain attention in float32
"""

import argparse
import sys
import time

import torch
import torch.nn.functional as F
from transformers import Qwen2Config, Qwen2ForCausalLM

from distributed import micro_batches
from generator import Generator
from policy import Policy, checkpoint_activations
from rollout import Dialogue, Turn, make_batch
from settings import positive_int
from simulator import User

SHAPE = dict(
    vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_attention_heads=28, num_key_value_heads=4
)
# name: (FlexAttention, dtype, activation checkpoints); the first is what the others are compared with
WAYS = {
    "plain float32": (False, torch.float32, False),
    "flex float32": (True, torch.float32, False),
    "flex bfloat16": (True, torch.bfloat16, False),
    "flex bfloat16, checkpoints": (True, torch.bfloat16, True),
    "plain bfloat16": (False, torch.bfloat16, False),
}


def random_model(layers: int, dtype: torch.dtype, device: str, **shape):
    torch.manual_seed(0)
    with torch.device(device):
        model = Qwen2ForCausalLM._from_config(Qwen2Config(**(SHAPE | shape), num_hidden_layers=layers), dtype=dtype)
    return model.eval()


def decode(model, slots: int, columns: int, passes: int = 40, graphs: bool = True, eager: bool = False):
    """([(token, its log-prob)], milliseconds a pass) of slots that hold 30 to 299 random tokens each. What is fed does not depend
    on what is drawn, so that one draw that rounding has turned does not turn the others."""
    vocabulary, numbers = model.config.vocab_size, torch.Generator().manual_seed(1)
    draw_ids = lambda count: torch.randint(0, vocabulary, (count,), generator=numbers).tolist()
    generator = Generator(model, slots=slots, columns=columns, temperature=1.0, eager=eager)
    generator.graphs = generator.graphs and graphs
    every, drawn = list(range(slots)), []
    generator.feed(every, [draw_ids(count) for count in torch.randint(30, 300, (slots,), generator=numbers).tolist()])
    for k in range(passes + 3):
        if k == 3:  # captured and warm; every pass ends with its tokens on the host
            started = time.perf_counter()
        uniforms = torch.rand(slots, generator=numbers).tolist()
        drawn += generator.sample(every, [draw_ids(1) for _ in every], uniforms)
    return drawn, 1000 * (time.perf_counter() - started) / passes


def random_batch(vocabulary: int, dialogues: int = 9, turns: int = 3):
    """Dialogues that grow turn by turn; in threes they begin alike."""
    numbers, held = torch.Generator().manual_seed(2), []
    draw_ids = lambda count: torch.randint(0, vocabulary, (count,), generator=numbers).tolist()
    for i in range(dialogues):
        dialogue = Dialogue(User(None, 60), 60)
        prompt = draw_ids(60) if i % 3 == 0 else held[-1].turns[0].prompt_ids
        for _ in range(turns):
            ids = draw_ids(50)
            dialogue.turns.append(Turn(prompt, ids, [0.0] * len(ids), True, "", "", True))
            prompt = prompt + ids + draw_ids(30)
        held.append(dialogue)
    return make_batch(held, "terminal")


def log_probs_and_gradient(model, batch, dtype: torch.dtype):
    """Of a loss that weighs each sampled token differently: ((N,), all gradients in one row), float32, on the CPU."""
    policy = Policy(model, dtype=dtype)
    weight_N, log_probs_N = torch.linspace(-1, 1, len(batch)), torch.zeros(len(batch))
    for members, _ in micro_batches(batch, 3000):
        log_probs_n, _, index_n = policy(batch, members)
        (log_probs_n * weight_N[index_n].to(log_probs_n.device)).sum().backward()
        log_probs_N[index_n] = log_probs_n.detach().cpu()
    return log_probs_N, torch.cat([p.grad.flatten().cpu() for p in model.parameters()])


def check(layers: int) -> None:
    model = random_model(layers, torch.bfloat16, "cuda")
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, {layers} layers of Qwen2.5-7B")
    for slots, columns in ((72, 700), (32, 4000)):
        drawn, graph = decode(model, slots, columns)
        others, plain = decode(model, slots, columns, graphs=False)
        products, _ = decode(model, slots, columns, passes=3, eager=True)
        same = sum(a == b for (a, _), (b, _) in zip(drawn, others))
        apart = [abs(a - b) for (token, a), (other, b) in zip(drawn, products) if token == other]
        print(
            f"decode {slots} x {columns}: graph {graph:.1f} ms, plain {plain:.1f} ms, {same} of {len(drawn)} tokens alike"
        )
        print(f"    log-probs apart from those by products: {sum(apart) / len(apart):.4f} on average of {len(apart)}")
    del model
    layers, batch = min(layers, 3), random_batch(32000)  # in float32, with gradients
    for name, (flex, dtype, checkpoints) in WAYS.items():
        model = random_model(layers, torch.float32, "cuda", vocab_size=32000)
        if flex:
            model.set_attn_implementation("flex_attention")
        if checkpoints:
            checkpoint_activations(model)
        log_probs_N, gradient = log_probs_and_gradient(model, batch, dtype)
        if name == next(iter(WAYS)):
            expected_N, expected = log_probs_N, gradient
        apart, off = (log_probs_N - expected_N).abs().max(), (gradient - expected).norm() / expected.norm()
        cosine = F.cosine_similarity(gradient, expected, 0)
        print(f"update {name:27} log-probs apart {apart:.5f}, gradient {off:.5f} of its norm, cosine {cosine:.6f}")


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=positive_int, default=3, help="28 are the whole model")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        print("gpu_check: this machine has no GPU that torch can use", file=sys.stderr)
        return 2
    check(args.layers)
    return 0


if __name__ == "__main__":
    sys.exit(main())
