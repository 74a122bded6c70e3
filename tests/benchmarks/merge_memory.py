"""CPU seconds and peak memory of merges, transforms and exports of a large model, each a whole process on one thread.

    python tests/benchmarks/merge_memory.py --rows linear ties --mergekit /path/to/mergekit-yaml --repeats 2

Base and experts are Llamas with random weights in bfloat16, as transformers saves them. The rows of one repetition
follow one another, so that what is busy on the machine besides counts for all. Peak RSS counts mapped files, too;
RssAnon, sampled 50 times a second, does not. `adapt` takes two steps of imitation on 2 x 32 tokens per task, by stream
and in bfloat16, and counts above its imports. mergekit is in an environment of its own; nothing else needs it.
"""

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import yaml

ADAMERGE = [sys.executable, "-m", "adamerge.commands.cli"]
RULES = {"linear": ["weight_average"], "ties": ["ties", "--set", "scope=tensor"], "model_stock": ["model_stock"],
         "opcm": ["opcm"], "ties_model": ["ties"]}  # fmt: skip
METHODS = {"linear": ({"weight": 1.0}, "linear"), "ties": ({"weight": 1.0, "density": 0.2}, "ties")}
ROWS = (*RULES, "transform", "export", "adapt")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=16, help="of width 1024; 16 make 268 M parameters")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["linear", "ties", "transform", "export"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml, to compare with")
    parser.add_argument("--folder", type=Path, help="for the models, which are kept there; default a temporary one")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--adapt", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(folder: Path, layers: int, experts: int) -> None:
    """Write base and experts; in a process of its own, whose memory does not count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=1024, intermediate_size=2752, num_hidden_layers=layers, num_attention_heads=16, vocab_size=32000
    )
    model = LlamaForCausalLM(config).to(torch.bfloat16)
    model.save_pretrained(folder / "base")
    base = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for expert in range(experts):
        for name, parameter in model.named_parameters():
            parameter.data = (base[name] + 0.002 * torch.randn(base[name].shape)).bfloat16()
        model.save_pretrained(folder / f"expert{expert}")


def adapt(folder: Path, experts: int) -> None:
    """Take two steps, and print the peak above the imports and the bytes of it per parameter."""
    import torch
    from memory import Peak, rss_anon
    from transformers import AutoConfig, LlamaForCausalLM

    from adamerge import Coefficients, ExpertPool, MergedModel
    from adamerge.backbones.networks import new_network
    from adamerge.model.encoder import EncoderOptions

    network = new_network(LlamaForCausalLM, AutoConfig.from_pretrained(folder / "base"))
    imports, start = rss_anon(), time.process_time()
    with Peak() as peak:
        files = {f"e{expert}": folder / f"expert{expert}" for expert in range(experts)}
        pool = ExpertPool.from_files(folder / "base", files, mapped=True)
        coefficients = Coefficients(pool, "layer")
        options = EncoderOptions(compute_dtype="bfloat16")
        model = MergedModel(network, pool, coefficients, {}, {name: name for name in files}, options)
        texts = {name: {"input_ids": torch.randint(0, 32000, (2, 32))} for name in files}
        optimizer = torch.optim.Adam([coefficients.raw], 1e-3)
        for _ in range(2):
            answers = {}
            for name, inputs in texts.items():
                answers[name] = next(iter(model.expert_outputs(name, [(name, inputs)]))).rows().softmax(1)
            values = coefficients()
            with model.merged(values) as merged:
                for group in merged.groups(texts):
                    outputs = merged(group)
                    merged.backward(sum(
                        torch.nn.functional.cross_entropy(out.rows(), answers[name]) for name, out in outputs.items()
                    ))  # fmt: skip
            values.backward(merged.gradient)
            optimizer.step()
            optimizer.zero_grad()
    parameters = sum(parameter.numel() for parameter in network.parameters())
    line = f"adapt        adamerge  {time.process_time() - start:6.1f} CPU s above its imports"
    print(
        f"{line}  RssAnon {(peak.value - imports) / 1e9:.2f} GB: {(peak.value - imports) / parameters:.1f} B/parameter"
    )


def measured(command: list[str]) -> dict[str, float]:
    """Run a command on one thread; return its CPU seconds, and its peaks in GB."""
    one_thread = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen(command, env={**os.environ, **one_thread}, stdout=subprocess.DEVNULL)
    peak = [0]

    def sample() -> None:
        while peak[0] >= 0:
            status = Path(f"/proc/{process.pid}/status").read_text(encoding="ascii")
            if "RssAnon:" not in status:
                return
            peak[0] = max(peak[0], int(status.split("RssAnon:")[1].split()[0]))
            time.sleep(0.02)

    thread = threading.Thread(target=sample)
    thread.start()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    thread.join()
    _, code, used = os.wait4(process.pid, 0)
    if code:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return {"cpu": used.ru_utime + used.ru_stime, "rss": used.ru_maxrss / 1e6, "anon": peak[0] / 1e6}


def command_of(row: str, models: Path, out: Path, experts: int) -> list[str]:
    """Return our command of a row."""
    pool = ["--base", str(models / "base")]
    for expert in range(experts):
        pool += ["--expert", f"e{expert}={models / f'expert{expert}'}"]
    if row == "transform":
        return [*ADAMERGE, "transform", "--rule", "trim", "--dtype", "bfloat16", *pool, "--out", str(out)]
    if row == "export":
        names = [f"e{expert}" for expert in range(experts)]
        values = {"format": 1, "granularity": "task", "experts": names, "coefficients": dict.fromkeys(names, 0.3)}
        (out.parent / "coefficients.json").write_text(json.dumps(values))
        return [*ADAMERGE, "export", *pool, "--coefficients", str(out.parent / "coefficients.json"), "--out", str(out)]
    return [*ADAMERGE, "merge", "--rule", *RULES[row], *pool, "--out", str(out)]


def theirs(row: str, models: Path, out: Path, experts: int, program: Path) -> list[str]:
    """Return mergekit's command of a row."""
    options, method = METHODS[row]
    recipe = {
        "models": [{"model": str(models / f"expert{e}"), "parameters": options} for e in range(experts)],
        "merge_method": method,
        "dtype": "bfloat16",
    }
    if method != "linear":
        recipe["base_model"] = str(models / "base")
    path = out.parent / f"{row}.yml"
    path.write_text(yaml.safe_dump(recipe))
    return [str(program), str(path), str(out), "--no-copy-tokenizer", "--no-write-model-card"]


def main() -> None:
    options = arguments()
    if options.make:
        make(options.make, options.layers, options.experts)
        return
    if options.adapt:
        adapt(options.adapt, options.experts)
        return
    with TemporaryDirectory(dir=options.folder) as temporary:
        models = options.folder or Path(temporary)
        if not (models / f"expert{options.experts - 1}").is_dir():
            sizes = ["--layers", str(options.layers), "--experts", str(options.experts)]
            subprocess.run([sys.executable, __file__, "--make", str(models), *sizes], check=True)
        for repetition in range(options.repeats):
            for row in options.rows:
                if row == "adapt":
                    command = [sys.executable, __file__, "--adapt", str(models), "--experts", str(options.experts)]
                    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
                    continue
                commands = {"adamerge": command_of(row, models, Path(temporary, "ours"), options.experts)}
                if options.mergekit and row in METHODS:
                    out = Path(temporary, f"theirs{repetition}{row}")
                    commands["mergekit"] = theirs(row, models, out, options.experts, options.mergekit)
                for name, command in commands.items():
                    result = measured(command)
                    line = f"{row:12} {name:9} {result['cpu']:6.1f} CPU s  RSS {result['rss']:5.2f} GB"
                    print(f"{line}  RssAnon {result['anon']:5.2f} GB", flush=True)


if __name__ == "__main__":
    main()
