"""Tiny multimodal models of real classes, by `multimodal.Tiny`.

The text parts are those of `lab.random_models` and `lab.random_hybrids`; the vision towers are
small and random. Images of one size become as many tokens in all of them.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessor,
    Gemma3Processor,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
)

from lab.random_hybrids import HYBRIDS, write_random_hybrid
from lab.random_models import VOCAB_SIZE, write_random_model
from tests.e2e.multimodal import FRAMES, PATCH, PIXELS, TOKENS, Tiny


def write_paddleocr_vl(folder: Path) -> Tiny:
    """Write a tiny PaddleOCR-VL: Ernie 4.5 with M-RoPE, layers that attend to everything."""
    base, text = _text_part(folder, "llama")
    words = ("<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|video|>")
    ids = _write_tokenizer(folder, words, image_token="<|IMAGE_PLACEHOLDER|>")
    start, end, image_id, video = _ids_of(ids, words)
    text["rope_parameters"]["mrope_section"] = [4, 6, 6]
    config = PaddleOCRVLConfig(
        text_config=text, vision_config=_VISION,
        image_token_id=image_id, video_token_id=video, vision_start_token_id=start,
        vision_end_token_id=end, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    _write(PaddleOCRVLForConditionalGeneration(config), base, folder, "linear_2.weight", 4.0)
    limits = {"shortest_edge": PATCH**2, "longest_edge": PIXELS**2}
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    pixels = PaddleOCRVLImageProcessor(size=limits)
    PaddleOCRVLProcessor(pixels, tokenizer).save_pretrained(folder)
    return Tiny(str(folder), [start], image_id, [end], [image_id] * TOKENS, image_id)


def write_gemma3(folder: Path) -> Tiny:
    """Write a tiny multimodal Gemma 3: every other layer with a window of 96 tokens."""
    base, text = _text_part(folder, "gemma3")
    lines = tuple("\n" * count for count in (1, 2, 3, 4))
    words = ("<start_of_image>", "<end_of_image>", "<image_soft_token>", *lines)
    named = dict(zip(("boi_token", "eoi_token", "image_token"), words, strict=False))
    ids = _write_tokenizer(folder, words, **named)
    start, _, image_id = (ids[word] for word in words[:3])
    config = Gemma3Config(
        text_config=text, vision_config={**_VISION, "vision_use_head": False},
        mm_tokens_per_image=TOKENS,
        boi_token_index=start, eoi_token_index=ids[words[1]], image_token_index=image_id,
        dtype="float32",
    )  # fmt: skip
    _write(Gemma3ForConditionalGeneration(config), base, folder, "mm_input_projection_weight", 1.0)
    pixels = Gemma3ImageProcessor(size={"height": PIXELS, "width": PIXELS})
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor = Gemma3Processor(pixels, tokenizer, image_seq_length=TOKENS)
    processor.save_pretrained(folder)
    becomes = tokenizer.encode(processor.full_image_sequence)  # and lines around it
    return Tiny(str(folder), [], start, [], becomes, image_id)


def write_qwen_vl(folder: Path, name: str) -> Tiny:
    """Write a tiny Qwen2.5-VL or, with another M-RoPE and with DeepStack, a tiny Qwen3-VL.

    Their processors need torchvision.

    Parameters
    ----------
    folder : Path
        Where to.
    name : {"qwen2.5", "qwen3", "qwen3.5"}
        Which; the last one has no DeepStack, and linear attention in every other layer.
    """
    is_third = name != "qwen2.5"
    parts = {"qwen2.5": "llama", "qwen3": "qwen3", "qwen3.5": "qwen3_5"}
    base, text = _text_part(folder, parts[name])
    words = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    named = {"image_token": words[2], "video_token": words[3]}
    start, end, image_id, video = _ids_of(_write_tokenizer(folder, words, **named), words)
    text["rope_parameters"].setdefault("mrope_section", [4, 6, 6])
    fields: dict[str, Any] = {
        "image_token_id": image_id, "video_token_id": video, "vision_start_token_id": start,
        "vision_end_token_id": end, "tie_word_embeddings": False, "dtype": "float32",
    }  # fmt: skip
    vision: dict[str, Any] = {
        "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "out_hidden_size": 256,
        "patch_size": PATCH,
    }  # fmt: skip
    if is_third:
        text["rope_parameters"]["mrope_interleaved"] = True
        vision |= {"depth": 3, "num_position_embeddings": 256}
        if name == "qwen3":
            vision["deepstack_visual_indexes"] = [0, 1]
            config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **fields)
            model = transformers.Qwen3VLForConditionalGeneration(config)
        else:
            config = transformers.Qwen3_5Config(text_config=text, vision_config=vision, **fields)
            model = transformers.Qwen3_5ForConditionalGeneration(config)
        kinds = (transformers.Qwen3VLProcessor, transformers.Qwen3VLVideoProcessor)
    else:
        del text["head_dim"]
        vision |= {"depth": 2, "fullatt_block_indexes": [1], "window_size": 56}
        config = transformers.Qwen2_5_VLConfig(text_config=text, vision_config=vision, **fields)
        model = transformers.Qwen2_5_VLForConditionalGeneration(config)
        kinds = (transformers.Qwen2_5_VLProcessor, transformers.Qwen2VLVideoProcessor)
    _write(model, base, folder, "linear_fc2.weight" if is_third else "merger.mlp.2.weight", 4.0)
    limits = {"shortest_edge": PATCH**2, "longest_edge": PIXELS**2}
    pixels = transformers.Qwen2VLImageProcessor(size=limits, patch_size=PATCH)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    videos = kinds[1](patch_size=PATCH, size=limits)
    kinds[0](pixels, tokenizer, videos).save_pretrained(folder)
    return Tiny(str(folder), [start], image_id, [end], [image_id] * TOKENS, image_id)


def write_qwen_of_videos(folder: Path) -> Tiny:
    """Write a tiny Qwen2.5-VL that is shown videos."""
    tiny = write_qwen_vl(folder, "qwen2.5")
    seen = json.loads((folder / "config.json").read_text())["video_token_id"]
    becomes = [seen] * (FRAMES // 2 * TOKENS)
    return replace(tiny, written=seen, becomes=becomes, seen=seen, kind="video")


def write_mistral3(folder: Path) -> Tiny:
    """Write a tiny Mistral 3: Pixtral's vision tower, layers that attend to everything.

    Its processor needs torchvision. Rows of an image's tokens end with a token of text.
    """
    base, text = _text_part(folder, "llama")
    words = ("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    image_id, newline, end = _ids_of(_write_tokenizer(folder, words), words)
    text["model_type"] = "mistral"
    vision = {**_VISION, "model_type": "pixtral"}
    config = transformers.Mistral3Config(
        text_config=text, vision_config=vision, image_token_index=image_id, spatial_merge_size=2,
        tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    model = transformers.Mistral3ForConditionalGeneration(config)
    _write(model, base, folder, "linear_2.weight", 4.0)
    pixels = transformers.PixtralImageProcessor(size={"longest_edge": PIXELS}, patch_size=PATCH)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    processor = transformers.PixtralProcessor(
        pixels, tokenizer, patch_size=PATCH, spatial_merge_size=2
    )
    processor.save_pretrained(folder)
    count = PIXELS // PATCH // 2  # of rows, and of tokens in one
    becomes = ([image_id] * count + [newline]) * count
    return Tiny(str(folder), [], image_id, [], [*becomes[:-1], end], image_id)


def write_llava(folder: Path) -> Tiny:
    """Write a tiny LLaVA: CLIP's vision tower, layers that attend to everything."""
    base, text = _text_part(folder, "llama")
    image_id = _write_tokenizer(folder, ("<image>",), image_token="<image>")["<image>"]
    patch = 2 * PATCH  # nothing merges patches
    vision = {**_VISION, "patch_size": patch, "model_type": "clip_vision_model"}
    config = transformers.LlavaConfig(
        text_config={**text, "model_type": "llama"}, vision_config=vision,
        image_token_index=image_id, image_seq_length=TOKENS, dtype="float32",
    )  # fmt: skip
    model = transformers.LlavaForConditionalGeneration(config)
    _write(model, base, folder, "linear_2.weight", 4.0)
    sizes = {"size": {"shortest_edge": PIXELS}, "crop_size": {"height": PIXELS, "width": PIXELS}}
    pixels = transformers.CLIPImageProcessor(**sizes)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    transformers.LlavaProcessor(
        pixels, tokenizer, patch_size=patch, vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return Tiny(str(folder), [], image_id, [], [image_id] * TOKENS, image_id)


def write_gemma4(folder: Path) -> Tiny:
    """Write a tiny multimodal Gemma 4: every other layer with a window of 96 tokens.

    Its processor needs torchvision.
    """
    base, text = _text_part(folder, "gemma4")
    names = ("boi_token", "eoi_token", "image_token", "boa_token", "eoa_token", "audio_token")
    words = ("<|image>", "<image|>", "<|image|>", "<|audio>", "<audio|>", "<|audio|>", "<|video|>")
    named = dict(zip(names, words, strict=False))
    start, end, image_id, *_, video = _ids_of(_write_tokenizer(folder, words, **named), words)
    vision = {
        **_VISION, "num_key_value_heads": 2, "head_dim": 32, "patch_size": 16,
        "position_embedding_size": 64, "default_output_length": 70,
    }  # fmt: skip
    config = transformers.Gemma4Config(
        text_config=text, vision_config=vision, boi_token_id=start, eoi_token_id=end,
        image_token_id=image_id, video_token_id=video, dtype="float32",
    )  # fmt: skip
    model = transformers.Gemma4ForConditionalGeneration(config)
    _write(model, base, folder, "embedding_projection.weight", 1.0)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(max_soft_tokens=70),
        tokenizer,
        transformers.Gemma4VideoProcessor(),
        image_seq_length=70,
    ).save_pretrained(folder)
    return Tiny(str(folder), [], image_id, [], [start, *[image_id] * TOKENS, end], image_id)


# --- parts --------------------------------------------------------------------------------

_PUBLISHED = re.compile(r"^((?:model\.)?)vision_tower\.(?!vision_model)")
_AS_THEY_WERE = ("pixtral", "gemma4_vision")  # towers whose names stayed
_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": PIXELS, "patch_size": PATCH,
}  # fmt: skip


def _text_part(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and configuration of a random language model."""
    write = write_random_hybrid if name in HYBRIDS else write_random_model
    base = write(folder / "text", name)
    config = json.loads((base / "config.json").read_text())
    del config["architectures"], config["model_type"]
    return load_file(base / "model.safetensors"), config


def _ids_of(ids: dict[str, int], words: Sequence[str]) -> list[int]:
    return [ids[word] for word in words]


def _write_tokenizer(folder: Path, special: Sequence[str], **named: str) -> dict[str, int]:
    """A word per token id, the last ones special; returns the ids of all words."""
    words = [f"w{number}" for number in range(VOCAB_SIZE - len(special))] + list(special)
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w1", pad_token="w1",
        additional_special_tokens=list(special), extra_special_tokens=named,
    ).save_pretrained(folder)  # fmt: skip
    return ids


@torch.no_grad()
def _write(model: Any, text: dict[str, torch.Tensor], folder: Path, last: str, size: float) -> None:
    """Save a model with this language model and a random vision tower.

    `last` names the weight that makes tokens of an image, and `size` how large they become: about
    as large as words, or images would count for nothing, or for everything.
    """
    torch.manual_seed(0)
    missing = set(text)
    for name, weight in model.named_parameters():
        own = name.replace("model.language_model.", "model.")
        if own in text:
            weight.copy_(text[own])
            missing.discard(own)
        elif name.endswith("bias"):
            weight.zero_()
        elif weight.dim() > 1:
            scale = size if name.endswith(last) else 1.0
            weight.normal_(0, scale * weight[0].numel() ** -0.5)
    assert not missing, missing
    model.save_pretrained(folder)
    # Transformers have dropped a part of names that published files have, and vLLM asks for.
    path = folder / "model.safetensors"
    if model.config.vision_config.model_type not in _AS_THEY_WERE:
        named = load_file(path).items()
        weights = {_PUBLISHED.sub(r"\1vision_tower.vision_model.", k): w for k, w in named}
        save_file(weights, path, metadata={"format": "pt"})
