"""A text step against fine-tuning, and the memory of experts' answers: before, padded and twice; now, rows once.

python tests/benchmarks/text_step.py --threads 1 --clock cpu
python tests/benchmarks/text_step.py --answers --texts 64 --positions 512 --vocabulary 32000

The step: a transformer of MiniLM's shape (6 layers of 384, 12 heads, 30,522 tokens; 22.6 M parameters, random values),
E tasks of 16 texts of 32 to 48 tokens, a classifier of 4 classes for each. Ours: merge, forward and backward passes of
all tasks by their own padded batches, gradient of the coefficients, Adam. Fine-tuning: the same network, batches and
loss, gradients of all weights, and Adam on them.
"""

import argparse
import time

import torch
from torch import nn
from workload import alternate, machine, median

from adamerge import Coefficients, ExpertPool, MergedModel, Outputs
from adamerge.data.batch import Inputs, pad, read_output, to
from adamerge.model.teachers import TeacherCache
from adamerge.objectives.entropy import softmax_entropy

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def network() -> nn.Module:
    """A BERT of MiniLM's shape."""
    import transformers

    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=384, num_hidden_layers=6, num_attention_heads=12, intermediate_size=1536, vocab_size=30522
    )
    return transformers.BertModel(config, add_pooling_layer=False).eval()


def batches(tasks: list[str], texts: int, shortest: int = 32, longest: int = 48) -> dict[str, Inputs]:
    samples = {}
    for task in tasks:
        lengths = torch.randint(shortest, longest + 1, (texts,)).tolist()
        lengths[0] = longest
        ids = [torch.randint(1000, 30000, (length,)) for length in lengths]
        samples[task] = pad(
            [{"input_ids": one, "attention_mask": torch.ones(len(one), dtype=torch.long)} for one in ids]
        )
    return samples


def pooled(output: object, inputs: Inputs) -> Outputs:
    """The mean over a text's tokens."""
    hidden = read_output(output, inputs, ("last_hidden_state",)).logits
    mask = inputs["attention_mask"].unsqueeze(-1)
    features = (hidden * mask).sum(1) / mask.sum(1)
    return Outputs(features, features)


def steps(experts: int, texts: int, granularity: str, device: str) -> dict[str, object]:
    """Return the two steps by name."""
    encoder = network()
    base = {name: parameter.detach().clone() for name, parameter in encoder.named_parameters()}
    tasks = [f"task{number}" for number in range(experts)]
    others = {task: {name: tensor + 0.01 * torch.randn_like(tensor) for name, tensor in base.items()} for task in tasks}
    pool = ExpertPool.from_state_dicts(base, others)
    heads = {task: nn.Linear(384, 4) for task in tasks}
    model = MergedModel(encoder, pool, Coefficients(pool, granularity), heads, read=pooled).to_device(device)
    data = {task: to(batch, device) for task, batch in batches(tasks, texts).items()}
    optimizer = torch.optim.Adam([model.coefficients.raw], 1e-3)

    def ours() -> None:
        values = model.coefficients()
        with model.merged(values) as merged:
            for group in merged.groups(data):
                outputs = merged(group).values()
                merged.backward(torch.stack([softmax_entropy(part.rows()).mean() for part in outputs]).sum())
        values.backward(merged.gradient)
        optimizer.step()
        optimizer.zero_grad()

    tuned = network().to(device)
    tuned.load_state_dict(base, strict=False)
    of_weights = torch.optim.Adam(tuned.parameters(), 1e-6)

    def fine_tuning() -> None:
        for task, inputs in data.items():
            features = pooled(tuned(**inputs), inputs).logits
            softmax_entropy(model.heads[task](features)).mean().backward()
        of_weights.step()
        of_weights.zero_grad()

    return {"ours": ours, "fine-tuning": fine_tuning}


def answers(texts: int, positions: int, vocabulary: int) -> None:
    """Print the bytes that a cache of causal answers takes, against those of logits and features kept padded."""
    torch.manual_seed(0)
    cache, lengths = TeacherCache(), torch.randint(positions // 4, positions + 1, (texts,))
    for start in range(0, texts, 8):
        some = lengths[start : start + 8]
        valid = torch.arange(int(some.max())).expand(len(some), -1) < (some - 1).unsqueeze(1)
        logits = torch.zeros(len(some), int(some.max()), vocabulary)
        cache.put("task", torch.arange(start, start + len(some)), Outputs(logits, valid=valid))
    padded = 2 * texts * positions * vocabulary * 4  # as tensors of one length, features and logits alike
    held = sum(block.nbytes for store in cache._rows["task"].values() for block in store.blocks)
    rows = sum(max(0, int(length) - 1) for length in lengths) * vocabulary * 4
    print(f"{texts} texts of up to {positions} tokens, {vocabulary} classes: padded and twice {padded / 1e9:.2f} GB; ")
    print(f"rows once {rows / 1e9:.2f} GB; held {held / 1e9:.2f} GB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--texts", type=int, default=16, help="per task")
    parser.add_argument("--granularity", default="layer")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--threads", type=int)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu with --threads 1 where others compete")
    parser.add_argument("--answers", action="store_true", help="the memory of answers instead")
    parser.add_argument("--positions", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32000)
    options = parser.parse_args()
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.answers:
        answers(options.texts, options.positions, options.vocabulary)
        return
    both = steps(options.experts, options.texts, options.granularity, options.device)
    seconds = alternate(both, options.repeats, CLOCKS[options.clock])
    ours, plain = (median(seconds[name]) for name in both)
    print(machine())
    print(f"E={options.experts}, {options.texts} texts of 48 tokens per task, {options.granularity}, {options.device}:")
    print(f"ours {ours:.3f} s, fine-tuning {plain:.3f} s, ratio {ours / plain:.3f} (medians of {options.repeats})")


if __name__ == "__main__":
    main()
