"""Folders that merges write here, loaded by another version of transformers: what ``.ci/slow`` runs.

``python -m tests.support.older_transformers write FOLDER`` merges tiny models of several classes;
``python tests/support/older_transformers.py read FOLDER`` loads them, in whatever environment it runs.
"""

import sys
from pathlib import Path

CLASSES = (
    "LlamaForCausalLM",
    "Qwen2ForCausalLM",
    "GPT2LMHeadModel",
    "T5ForConditionalGeneration",
    "MixtralForCausalLM",
)
IMAGES = ("ViTForImageClassification", "SegformerForSemanticSegmentation")


def write(folder: Path) -> None:
    """Merge tiny models, export them, and keep their outputs; mixtures of experts go through the library."""
    import torch
    import transformers

    from adamerge.commands.cli import main
    from tests.support.model_folders import save_family

    def run(*arguments: str) -> None:
        try:
            main([*arguments])
        except SystemExit as left:
            if left.code:
                raise

    for name in (*CLASSES, *IMAGES):
        family = save_family(name, folder / name / "family")
        lines = [f"base: {family['base']}", "experts:", f"  one: {family['one']}", f"  two: {family['two']}"]
        pool = folder / name / "pool.yaml"
        pool.write_text("\n".join(lines), encoding="utf-8")
        if name.startswith("Mixtral"):
            run("pool", "pack", str(pool), "--through", "transformers", "--out", str(folder / name / "packed"))
            pool = folder / name / "packed" / "pool.yaml"
        run("merge", "--rule", "weight_average", "--pool", str(pool), "--out", str(folder / name / "merged"))
        run("export", str(folder / name / "merged"), "--to", "hf", "--out", str(folder / name / "export"))
        model = getattr(transformers, name).from_pretrained(folder / name / "export").eval()
        with torch.no_grad():
            torch.save(model(**_inputs(model))[0], folder / name / "outputs.pt")


def read(folder: Path) -> None:
    """Load what :func:`write` wrote, compare outputs, and let generative models go on with a prompt."""
    import torch
    import transformers

    print("transformers", transformers.__version__)
    for name in (*CLASSES, *IMAGES):
        model = getattr(transformers, name).from_pretrained(folder / name / "export").eval()
        inputs = _inputs(model)
        with torch.no_grad():
            torch.testing.assert_close(
                model(**inputs)[0], torch.load(folder / name / "outputs.pt"), rtol=1e-4, atol=1e-5
            )
            if name in CLASSES:
                tokenizer = transformers.AutoTokenizer.from_pretrained(folder / name / "export")
                tokens = tokenizer("a good film", return_tensors="pt")
                known = {key: tokens[key] for key in ("input_ids", "attention_mask")}
                model.generate(**known, max_new_tokens=3, do_sample=False)
        print(name, "loads and computes the same")


def _inputs(model):
    import torch

    generator = torch.Generator().manual_seed(0)
    if model.main_input_name == "pixel_values":
        size = getattr(model.config, "image_size", 32)
        size = size if isinstance(size, int) and size <= 32 else 32
        return {"pixel_values": torch.randn(1, 3, size, size, generator=generator)}
    ids = torch.randint(6, 20, (2, 7), generator=generator)
    return {"input_ids": ids, **({"decoder_input_ids": ids[:, :3]} if model.config.is_encoder_decoder else {})}


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
