"""A step of LoRA experts beside the base, against the merged step, LoRA fine-tuning by peft, and fine-tuning.

python tests/benchmarks/lora_step.py --threads 1 --clock cpu
python tests/benchmarks/lora_step.py --device cuda --size 7b --autocast bfloat16 --rows beside "LoRA fine-tuning"

A Llama of random parameters (110 M: 12 layers of 768, vocabulary 16,000), E adapters of rank 8 on all linear layers,
8 x 64 tokens, one task an adapter: forward and backward passes of one batch, and Adam on what learns. Ours are the
coefficients; peft's one adapter; fine-tuning's all weights. The loss is the entropy of all positions.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn
from workload import alternate, machine, median, under_autocast

from adamerge import Coefficients, ExpertPool, MergedModel
from adamerge.data.batch import read_output
from adamerge.model.encoder import EncoderOptions
from adamerge.objectives.entropy import softmax_entropy

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
VOCABULARY = 16000
ROWS = ["beside", "merged", "LoRA fine-tuning", "fine-tuning"]


SIZES = {
    "110m": (768, 2048, 12, 12),
    "1b": (2048, 5632, 22, 32),
    "7b": (4096, 11008, 32, 32),
}  # width, hidden, layers, heads


def network(size: str, device: str) -> nn.Module:
    """A Llama of a size."""
    import transformers

    torch.manual_seed(0)
    width, hidden, layers, heads = SIZES[size]
    config = transformers.LlamaConfig(
        hidden_size=width, intermediate_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
        vocab_size=VOCABULARY, use_cache=False,
    )  # fmt: skip
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).eval()


def adapted(size: str, device: str, rank: int, seed: int) -> nn.Module:
    """The same with a random adapter on all linear layers, by peft."""
    import peft

    model = network(size, device)
    torch.manual_seed(seed)
    options = peft.LoraConfig(r=rank, target_modules="all-linear", init_lora_weights=False)
    return peft.get_peft_model(model, options)


def pool_of(size: str, device: str, experts: int, rank: int, folder: Path) -> ExpertPool:
    network(size, device).save_pretrained(folder / "base")
    names = [f"task{number}" for number in range(experts)]
    for number, name in enumerate(names):
        adapted(size, device, rank, number).save_pretrained(folder / name)
    return ExpertPool.from_files(folder / "base", {name: folder / name for name in names}).to(device)


def steps(pool: ExpertPool, options: argparse.Namespace) -> dict[str, object]:
    """Return the chosen steps by name."""
    names, device = pool.expert_names, options.device
    ids = torch.randint(0, VOCABULARY, (options.texts, options.tokens)).to(device)
    data = {name: {"input_ids": part} for name, part in zip(names, ids.chunk(len(names)), strict=True)}

    def ours(engine: str):
        coefficients = Coefficients(pool, options.granularity)
        model = MergedModel(
            network(options.size, device), pool, coefficients, {}, options=EncoderOptions(engine=engine),
            read=lambda output, inputs: read_output(output, inputs, ("logits",)),
        ).to_device(device)  # fmt: skip
        optimizer = torch.optim.Adam([coefficients.raw], 1e-3)

        def step() -> None:
            values = coefficients()
            with model.merged(values, micro_batch=None) as merged:
                for group in merged.groups(data):
                    parts = merged(group).values()
                    merged.backward(torch.cat([softmax_entropy(part.rows()) for part in parts]).mean())
            values.backward(merged.gradient)
            optimizer.step()
            optimizer.zero_grad()

        return step

    def tuned(model: nn.Module):
        optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 1e-6)

        def step() -> None:
            softmax_entropy(model(input_ids=ids).logits.flatten(0, 1)).mean().backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    makers = {
        "beside": lambda: ours("beside"),
        "merged": lambda: ours("merged"),
        "LoRA fine-tuning": lambda: tuned(adapted(options.size, device, options.rank, 0)),
        "fine-tuning": lambda: tuned(network(options.size, device)),
    }
    chosen = {name: make() for name, make in makers.items() if name in options.rows}
    return under_autocast(chosen, pool.device.type, options.autocast)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--texts", type=int, default=8, help="of all tasks together")
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--granularity", default="layer")
    parser.add_argument("--size", choices=SIZES, default="110m")
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--autocast", choices=["bfloat16", "float16"], help="mixed precision, of all rows")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu with --threads 1 where others compete")
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    with TemporaryDirectory() as folder:
        pool = pool_of(options.size, options.device, options.experts, options.rank, Path(folder))
        every = steps(pool, options)
        seconds = {name: median(s) for name, s in alternate(every, options.repeats, CLOCKS[options.clock]).items()}
    print(machine())
    sizes = (
        f"Llama {options.size}, E={options.experts} of rank {options.rank}, {options.texts} x {options.tokens} tokens"
    )
    print(f"{sizes}, {options.granularity}, {options.autocast or 'float32'}:")
    for name, value in seconds.items():
        ratio = seconds.get("beside", float("nan")) / value
        print(f"{name:18} {value:.3f} s, beside / it {ratio:.3f} (medians of {options.repeats})")


if __name__ == "__main__":
    main()
