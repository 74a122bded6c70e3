"""CPU seconds and peak memory of merges, transforms and exports of a large model, each a whole process on one thread.

    python tests/benchmarks/merge_memory.py --rows linear ties --mergekit /path/to/mergekit-yaml --repeats 2

Base and experts are Llamas with random weights in bfloat16, as transformers saves them. The rows of one repetition
follow one another, so that what is busy on the machine besides counts for all. Peak RSS counts mapped files, too;
RssAnon, sampled 50 times a second, does not. `adapt` takes two steps of imitation on 2 x 32 tokens per task, by stream
and in bfloat16, and exports; its imports take about 0.5 GB. mergekit is in an environment of its own; nothing else
needs it.
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
# Of hidden states and of the feed-forward layer, layers, heads, heads of keys and values, vocabulary.
SIZES = {"268m": (1024, 2752, 16, 16, 16, 32_000), "1.1b": (2048, 5632, 22, 32, 4, 32_000),
         "63m": (768, 2048, 8, 12, 12, 4_000), "tiny": (16, 32, 2, 2, 2, 64)}  # fmt: skip


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="268m", help="parameters of the Llama")
    parser.add_argument("--experts", type=int, default=3)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=["linear", "ties", "transform", "export"])
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--mergekit", type=Path, help="mergekit-yaml, to compare with")
    parser.add_argument("--folder", type=Path, help="for the models, which are kept there; default a temporary one")
    parser.add_argument("--make", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def make(folder: Path, size: str, experts: int) -> None:
    """Write base, experts and texts; in a process of its own, whose memory does not count."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.append(str(Path(__file__).parents[2]))
    from tests.support.language import tokenizer

    torch.manual_seed(0)
    width, inner, layers, heads, groups, vocabulary = SIZES[size]
    words = [f"w{number}" for number in range(vocabulary - 3)]
    config = LlamaConfig(
        hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=groups, vocab_size=vocabulary, pad_token_id=0, bos_token_id=2, eos_token_id=2,
    )  # fmt: skip
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder / "base")
    tokenizer(words).save_pretrained(folder / "base")
    base = {name: tensor.clone() for name, tensor in model.named_parameters()}
    for expert in range(experts):
        for name, parameter in model.named_parameters():
            parameter.data = base[name] + 0.002 * torch.randn(base[name].shape)
        model.save_pretrained(folder / f"expert{expert}")
        texts = [" ".join(words[int(i)] for i in torch.randint(0, 61, (32,))) for _ in range(4)]
        (folder / f"texts{expert}.txt").write_text("\n".join(texts) + "\n")


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
        values = {
            "format": 1,
            "granularity": "task",
            "experts": names,
            "coefficients": {name: {"all": 0.3} for name in names},
        }
        (out.parent / "coefficients.json").write_text(json.dumps(values))
        return [*ADAMERGE, "export", *pool, "--coefficients", str(out.parent / "coefficients.json"), "--out", str(out)]
    if row == "adapt":
        return adaptation(models, out, experts)
    return [*ADAMERGE, "merge", "--rule", *RULES[row], *pool, "--out", str(out)]


def adaptation(models: Path, out: Path, experts: int) -> list[str]:
    """Return our command of two steps, and an export."""
    names = {f"e{expert}": expert for expert in range(experts)}
    files = ", ".join(f"{name}: '{models / f'expert{expert}'}'" for name, expert in names.items())
    pool = [f"pool.base={models / 'base'}", f"pool.experts={{{files}}}", "pool.storage=stream"]
    tasks = ", ".join(
        f"{name}: {{_target_: adamerge.data.Task, dataset: {{_target_: adamerge.data.Texts, "
        f"source: '{models / f'texts{expert}.txt'}'}}}}" for name, expert in names.items()
    )  # fmt: skip
    run = [
        "steps=2",
        "data.batch_size=2",
        f"data.tasks={{{tasks}}}",
        "granularity=layer",
        "report=false",
        "references=false",
    ]
    options = ["encoder.compute_dtype=bfloat16", "trainer=cpu", "logger=none", f"run_dir={out}"]
    groups = ["backbone=transformers", "pool=files", "data=texts", "objective=imitation"]
    return [*ADAMERGE, "adapt", *groups, *pool, *run, *options]


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
        make(options.make, options.size, options.experts)
        return
    with TemporaryDirectory(dir=options.folder) as temporary:
        models = options.folder or Path(temporary)
        if not (models / f"expert{options.experts - 1}").is_dir():
            sizes = ["--size", options.size, "--experts", str(options.experts)]
            subprocess.run([sys.executable, __file__, "--make", str(models), *sizes], check=True)
        for repetition in range(options.repeats):
            for row in options.rows:
                commands = {
                    "adamerge": command_of(row, models, Path(temporary, f"ours{repetition}{row}"), options.experts)
                }
                if options.mergekit and row in METHODS:
                    out = Path(temporary, f"theirs{repetition}{row}")
                    commands["mergekit"] = theirs(row, models, out, options.experts, options.mergekit)
                for name, command in commands.items():
                    result = measured(command)
                    line = f"{row:12} {name:9} {result['cpu']:6.1f} CPU s  RSS {result['rss']:5.2f} GB"
                    print(f"{line}  RssAnon {result['anon']:5.2f} GB", flush=True)


if __name__ == "__main__":
    main()
