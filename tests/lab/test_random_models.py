"""Random models are the same everywhere and good for comparisons."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from lab.places import importable
from lab.random_models import (
    MODELS,
    VOCAB_SIZE,
    distinct_tokens,
    weights_digest,
    write_random_model,
)

# Stored results hold for these weights only: a new digest means new stored results.
DIGESTS = {
    "deepseek_v3": "97ad6215125985b466fde0f824c578bad0f729adebc635dcb5092c54be9523d9",
    "gemma3": "e02388abf6bfe62d8b0fd8eac218bf155eb3fb282aae071052c4a4915dcc0e71",
    "llama": "2b362b015027c1ceb7dc968dc5a9f19a803a291b75f92015cfe411a4a4d5e62d",
    "qwen3": "c45ebfc0d1f459264d451a321ccbc2b9eec9e172bfd6cf58fc40b96335d172d8",
    "gemma2": "1f698853575d73bf551d26260d64974a34241ed15e56ee0b86ea89b306c0320f",
    "gemma4": "cb7dc658dfd015db3dc1c11c56b99a6d23d4494f105afd8c6c71dbc879900247",
    "gpt_oss": "9ac20db16250f87be7b0be693e666e4b8a851c0f118bfd977645315818ad53ed",
    "exaone4": "ec91b3aa5b4ff886757e72deb5dbcff983b82cb103fd3f93f170668d109fdbf3",
    "cohere2": "142901c16e77fa476c77cc34069352147433c35042548845e222d672e6a56a89",
    "smollm3": "2b362b015027c1ceb7dc968dc5a9f19a803a291b75f92015cfe411a4a4d5e62d",
    "olmo2": "10aff28f86257ed48c1dad5a85bdeef7efe90724d4e06888bf6eef7f7519d30f",
    "olmo3": "10aff28f86257ed48c1dad5a85bdeef7efe90724d4e06888bf6eef7f7519d30f",
    "hunyuan": "3d0be2841f87e1516905f64d441072dcc0c952d5a0507230a3e435e6b4dc1449",
    "seed_oss": "01b2c01c5f50c62c0fc476f76feccdfe9f027d2c70f749b200f27f4230b7f1ae",
    "deepseek_v2": "c8525b20164e115a40c531282bfe954ac06ad7fdde8361cb03a6f365a3bfb067",
    "glm4_moe_lite": "51080519fe89aacbc3828dc04c2f7dbffbf273ba5eeaf61785ed5aecb757a0bb",
}


def test_every_model_has_a_digest() -> None:
    assert set(DIGESTS) == set(MODELS)


@pytest.mark.parametrize("name", DIGESTS)
def test_weights_are_the_same_on_every_machine(name: str, tmp_path: Path, root: Path) -> None:
    assert weights_digest(write_random_model(tmp_path, name)) == DIGESTS[name]
    reference = json.loads((root / "tests" / "data" / "kvpress_parity.json").read_text())
    if name in reference["models"]:
        assert reference["models"][name]["weights_sha256"] == DIGESTS[name]


def test_another_seed_gives_another_model(tmp_path: Path) -> None:
    folder = write_random_model(tmp_path / "made" / "here", "llama", seed=1)
    assert weights_digest(folder) != DIGESTS["llama"]


def test_an_unknown_name_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no random model 'gpt'; allowed are llama, qwen3"):
        write_random_model(tmp_path, "gpt")


def test_prompts_have_distinct_tokens() -> None:
    prompt = distinct_tokens(1280, seed=1)
    assert len(set(prompt)) == 1280
    assert min(prompt) >= 2 and max(prompt) < VOCAB_SIZE
    assert prompt[:640] == distinct_tokens(640, seed=1)
    assert prompt[:640] != distinct_tokens(640, seed=2)
    assert len(distinct_tokens(VOCAB_SIZE - 2)) == VOCAB_SIZE - 2


@pytest.mark.parametrize("num_tokens", [0, VOCAB_SIZE - 1])
def test_impossible_prompts_are_refused(num_tokens: int) -> None:
    with pytest.raises(ValueError, match=f"num_tokens must be in .*, got {num_tokens}"):
        distinct_tokens(num_tokens)


def test_no_framework_is_imported(root: Path) -> None:
    """Other engines' environments import the module too."""
    code = (
        "import sys, lab.random_models\n"
        "print(sorted({'torch', 'transformers', 'vllm'} & sys.modules.keys()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **importable()},
        cwd=root,
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("name", "kv_heads"),
    [
        ("llama", 2), ("qwen3", 4), ("deepseek_v3", 1), ("deepseek_v2", 1), ("smollm3", 2),
        ("olmo2", 4), ("hunyuan", 4), ("seed_oss", 4),
    ],
)  # fmt: skip
def test_attention_is_peaked_and_logits_are_clear(name: str, kv_heads: int, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM
    from vllm.config import set_current_vllm_config
    from vllm.engine.arg_utils import EngineArgs

    write_random_model(tmp_path, name)
    # Where vLLM's Transformers backend has served such a model, its class asks for vLLM's settings.
    options = {"dtype": "float32", "enforce_eager": True, "skip_tokenizer_init": True}
    plain = EngineArgs(model=str(tmp_path), **options).create_engine_config()
    with set_current_vllm_config(plain):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
        )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.inference_mode():
        output = model(torch.tensor([distinct_tokens(256)]), output_attentions=True)
    assert output.past_key_values.layers[0].keys.shape[1] == kv_heads
    for weights in output.attentions:  # [1, num_heads, n, n]; the first rows see few keys
        assert weights[0, :, 64:].amax(dim=-1).mean() > 0.15
    first, second = output.logits[0].topk(2).values.unbind(dim=-1)
    assert (first - second).median() > 1
