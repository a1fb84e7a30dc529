"""``demo.trained.model``: a Llama under a Qwen2's names computes what it computed."""

from __future__ import annotations

import pytest

from demo.trained.model import KEPT, as_qwen2

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


def test_a_llama_as_a_qwen2_gives_the_same_logits() -> None:
    torch.manual_seed(0)
    theta = {"rope_parameters": {"rope_theta": 5e4, "rope_type": "default"}}
    config = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        pad_token_id=0,
        **({"rope_theta": 5e4} if transformers.__version__ < "5" else theta),
    )
    llama = transformers.LlamaForCausalLM(config).eval()
    about = {name: value for name, value in config.to_dict().items() if name in KEPT}
    qwen2 = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**about)).eval()
    missing, unexpected = qwen2.load_state_dict(as_qwen2(llama.state_dict()), strict=False)
    assert missing == ["lm_head.weight"] and unexpected == []
    qwen2.tie_weights()
    ids = torch.randint(0, 96, (2, 11))
    with torch.no_grad():
        assert torch.equal(llama(ids).logits, qwen2(ids).logits)
