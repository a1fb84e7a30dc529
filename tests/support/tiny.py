"""Models with random weights and their own tokenizers, made on the spot: tiny ones, and the shapes of real ones.

Run with the Python of the environment that will load them: a tokenizer saved by transformers 5 does not load in 4.

    python -m tests.support.tiny qwen2 FOLDER
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Of a processor: a message may be a list of parts, an image or a text each.
VISION_CHAT_TEMPLATE = CHAT_TEMPLATE.replace(
    "{{ message['content'] }}",
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}",
)
SPECIAL_TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
PROMPTS = [
    "Count to three.",
    "Name a colour of the sky.",
    "What is two plus two?",
    "Say hello to the reader.",
    "Which animal barks?",
    "Write one short word.",
    "Is water wet?",
    "Give me a number below ten.",
]


def make_tokenizer(folder: Path, special_tokens: list[str] = SPECIAL_TOKENS) -> int:
    """Save a byte-level BPE tokenizer of 512 entries with a chat template; return its vocabulary size."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=special_tokens, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    tokenizer.train_from_iterator(PROMPTS * 4 + ["system user assistant"], trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>", model_max_length=256
    )
    fast.chat_template = CHAT_TEMPLATE
    fast.save_pretrained(folder)
    # ms-swift and vLLM read the Qwen2 class name from here
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text())
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    path.write_text(json.dumps(config, indent=1))
    return 512


TINY = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=256,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=1024,
)
REAL_SHAPES = {
    "qwen2-1.5b": dict(hidden_size=1536, intermediate_size=8960, num_hidden_layers=28, num_attention_heads=12),
    "qwen2-7b": dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28),
}
REAL_VOCABULARY = 152064
REAL_KV_HEADS = {"qwen2-1.5b": 2, "qwen2-7b": 4}
SMALL_MOE = dict(  # Qwen3-30B-A3B with fewer layers and experts
    hidden_size=2048,
    intermediate_size=6144,
    moe_intermediate_size=768,
    num_hidden_layers=8,
    num_attention_heads=32,
    num_key_value_heads=4,
    head_dim=128,
    num_experts=32,
    num_experts_per_tok=8,
    norm_topk_prob=True,
)


def make_real_shape(name: str, folder: Path, *, seed: int = 0) -> Path:
    """Save a bf16 model of the shape ``name`` with random weights, made on the GPU where there is one."""
    import torch
    import transformers as hf

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    is_moe = name == "qwen3-moe"
    shape = SMALL_MOE if is_moe else {**REAL_SHAPES[name], "num_key_value_heads": REAL_KV_HEADS[name]}
    config = (hf.Qwen3MoeConfig if is_moe else hf.Qwen2Config)(
        vocab_size=REAL_VOCABULARY,
        max_position_embeddings=4096,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
        **shape,
    )
    torch.manual_seed(seed)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = (hf.Qwen3MoeForCausalLM if is_moe else hf.Qwen2ForCausalLM)(config)
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    return folder


VISION_TOKENS = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def make_vision_model(folder: Path, *, architecture: str = "qwen2_vl", seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Save a tiny random Qwen2-VL or Qwen2.5-VL with its processor in ``folder``, and a picture; needs torchvision."""
    import torch
    import transformers as hf

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder, SPECIAL_TOKENS + VISION_TOKENS)
    tokenizer = hf.Qwen2TokenizerFast.from_pretrained(folder)
    start, end, image, video = tokenizer.convert_tokens_to_ids(VISION_TOKENS)
    text = dict(**TINY, rope_scaling={"type": "mrope", "mrope_section": [4, 6, 6]}, bos_token_id=0, eos_token_id=2)
    older = architecture == "qwen2_vl"
    sight = dict(depth=2, embed_dim=64, hidden_size=128, mlp_ratio=2)
    if not older:
        sight = dict(depth=2, hidden_size=64, intermediate_size=128, out_hidden_size=128, fullatt_block_indexes=[1])
    config = (hf.Qwen2VLConfig if older else hf.Qwen2_5_VLConfig)(
        text_config=text,
        vision_config=dict(**sight, num_heads=2),
        image_token_id=image,
        video_token_id=video,
        vision_start_token_id=start,
        vision_end_token_id=end,
    )
    torch.manual_seed(seed)
    model = (hf.Qwen2VLForConditionalGeneration if older else hf.Qwen2_5_VLForConditionalGeneration)(config)
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_pictures(folder.parent)
    (hf.Qwen2VLProcessor if older else hf.Qwen2_5_VLProcessor)(
        image_processor=hf.Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=2 * 56 * 56),
        tokenizer=tokenizer,
        video_processor=hf.Qwen2VLVideoProcessor(),
        chat_template=VISION_CHAT_TEMPLATE,
    ).save_pretrained(folder)
    return folder


def make_model(architecture: str, folder: Path, *, seed: int = 0, dtype: str = "bfloat16") -> Path:
    """Save a tiny random model of ``architecture`` (qwen2, llama, qwen3, qwen2_moe) with a tokenizer in ``folder``."""
    import torch
    import transformers

    folder.mkdir(parents=True, exist_ok=True)
    make_tokenizer(folder)
    torch.manual_seed(seed)
    common = dict(
        **TINY,
        initializer_range=0.08,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=2,
        pad_token_id=0,
    )
    names = {
        "qwen2": ("Qwen2Config", "Qwen2ForCausalLM", {}),
        "llama": ("LlamaConfig", "LlamaForCausalLM", {}),
        "qwen3": ("Qwen3Config", "Qwen3ForCausalLM", {"head_dim": 32}),
        "qwen2_moe": (
            "Qwen2MoeConfig",
            "Qwen2MoeForCausalLM",
            {
                "num_experts": 4,
                "num_experts_per_tok": 2,
                "moe_intermediate_size": 64,
                "shared_expert_intermediate_size": 64,
            },
        ),
    }
    config_name, model_name, extra = names[architecture]
    config = getattr(transformers, config_name)(**common, **extra)
    model = getattr(transformers, model_name)(config).to(getattr(torch, dtype))
    model.generation_config.eos_token_id = 2
    model.generation_config.pad_token_id = 0
    model.save_pretrained(folder)
    return folder


def make_pictures(folder: Path, rows: int = 64) -> Path:
    """Write ``pictures.jsonl``, prompts of which every other one comes with an image, and two images."""
    from PIL import Image

    folder.mkdir(parents=True, exist_ok=True)
    for index, size in enumerate([(84, 56), (56, 112)]):
        image = Image.new("RGB", size, (200, 30, 60 * index))
        image.paste((10, 220, 90), (0, 0, size[0] // 2, size[1] // 3))
        image.save(folder / f"picture{index}.png")
    lines = []
    for row in range(rows):
        images = {"images": [str(folder / f"picture{row // 2 % 2}.png")]} if row % 2 else {}
        text = ("<image>" if images else "") + PROMPTS[row % len(PROMPTS)]
        lines.append(json.dumps({"messages": [{"role": "user", "content": text}], **images}))
    (folder / "pictures.jsonl").write_text("\n".join(lines) + "\n")
    return folder / "pictures.jsonl"


def make_dataset(path: Path, rows: int = 64) -> Path:
    """Write ``rows`` prompts in ms-swift's message format."""
    lines = [json.dumps({"messages": [{"role": "user", "content": PROMPTS[i % len(PROMPTS)]}]}) for i in range(rows)]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + "\n")
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("architecture")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bfloat16")
    args = parser.parse_args()
    if args.architecture in (*REAL_SHAPES, "qwen3-moe"):
        make_real_shape(args.architecture, args.folder, seed=args.seed)
    elif args.architecture in ("qwen2_vl", "qwen2_5_vl"):
        make_vision_model(args.folder, architecture=args.architecture, seed=args.seed, dtype=args.dtype)
    else:
        make_model(args.architecture, args.folder, seed=args.seed, dtype=args.dtype)
    make_dataset(args.folder.parent / "prompts.jsonl")


if __name__ == "__main__":
    main()
