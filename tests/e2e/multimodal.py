"""Tiny multimodal models of real classes, prompts with images, and their reference.

The text parts are those of `lab.random_models`; the vision towers are small and random. All images
have one size, and become `TOKENS` tokens each.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    DynamicCache,
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

from lab.random_models import VOCAB_SIZE, write_random_model
from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.evaluation.replay_states import rows_of, states_of

PIXELS = 224  # height and width
PATCH = 14
TOKENS = (PIXELS // PATCH // 2) ** 2


@dataclass(frozen=True)
class Tiny:
    """A model's folder, and how its prompts have images.

    Attributes
    ----------
    folder : str
        Of model, tokenizer and processor.
    before, after : list[int]
        Token ids that users write around an image's own.
    written : int
        The token that users write for an image.
    becomes : list[int]
        What vLLM's processor, and transformers', put in its place.
    seen : int
        The token among these that has no embedding of its own.
    """

    folder: str
    before: list[int]
    written: int
    after: list[int]
    becomes: list[int]
    seen: int

    def prompt(self, tokens: Sequence[int], places: dict[int, int]) -> "Prompt":
        """Text with images before some of its places; by place the number of the image."""
        token_ids: list[int] = []
        for place, token in enumerate(tokens):
            if place in places:
                token_ids += [*self.before, self.written, *self.after]
            token_ids.append(token)
        return Prompt(self, token_ids, [image(seed) for _, seed in sorted(places.items())])


@dataclass(frozen=True)
class Prompt:
    """What a user sends: token ids, a token for each image, and the images in this order."""

    model: Tiny
    token_ids: list[int]
    images: list[Image.Image]

    def for_vllm(self) -> dict[str, Any]:
        """The prompt as vLLM takes it."""
        return {
            "prompt_token_ids": list(self.token_ids),
            "multi_modal_data": {"image": list(self.images)},
        }

    def expanded(self) -> list[int]:
        """Its tokens as the model sees them."""
        tokens = (
            [each] if each != self.model.written else self.model.becomes for each in self.token_ids
        )
        return [token for some in tokens for token in some]


def image(seed: int) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.RandomState(seed).randint(0, 256, (PIXELS, PIXELS, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


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
    name : {"qwen2.5", "qwen3"}
        Which.
    """
    is_third = name == "qwen3"
    base, text = _text_part(folder, "qwen3" if is_third else "llama")
    words = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    named = {"image_token": words[2], "video_token": words[3]}
    start, end, image_id, video = _ids_of(_write_tokenizer(folder, words, **named), words)
    text["rope_parameters"]["mrope_section"] = [4, 6, 6]
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
        vision |= {"depth": 3, "num_position_embeddings": 256, "deepstack_visual_indexes": [0, 1]}
        config = transformers.Qwen3VLConfig(text_config=text, vision_config=vision, **fields)
        model = transformers.Qwen3VLForConditionalGeneration(config)
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
    kinds[0](pixels, tokenizer, kinds[1](patch_size=PATCH)).save_pretrained(folder)
    return Tiny(str(folder), [start], image_id, [end], [image_id] * TOKENS, image_id)


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


# --- parts --------------------------------------------------------------------------------

# Not Pixtral's, whose names stayed.
_PUBLISHED = re.compile(
    r"^((?:model\.)?)vision_tower\.(?!vision_model|transformer|patch_conv|ln_pre)"
)
_INPUTS = ("pixel_values", "image_grid_thw", "image_sizes")
_VISION = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": PIXELS, "patch_size": PATCH,
}  # fmt: skip


def _text_part(folder: Path, name: str) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Weights and configuration of a random language model."""
    base = write_random_model(folder / "text", name)
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
    weights = {
        _PUBLISHED.sub(r"\1vision_tower.vision_model.", k): w for k, w in load_file(path).items()
    }
    save_file(weights, path, metadata={"format": "pt"})


# --- reference ----------------------------------------------------------------------------


@dataclass
class Seen(Prefilled):
    """A prompt with images after its forward pass.

    Attributes
    ----------
    ahead : int
        What positions of the tokens behind it are ahead of their places, with M-RoPE.
    """

    ahead: int = 0


class MultimodalReplay(Replay):
    """`Replay` over a prompt with images, whose tokens see what is before them.

    Parameters
    ----------
    model : Tiny
        The model.
    block_size : int
        Tokens per block.
    """

    def __init__(self, model: Tiny, block_size: int) -> None:
        super().__init__(model.folder, block_size)
        self.processor = AutoImageProcessor.from_pretrained(model.folder)
        self._ahead = 0

    def _load(self, model_dir: str, dtype: torch.dtype, attention: str) -> Any:
        kinds = {"text_config": attention, "vision_config": "sdpa"}
        return AutoModelForImageTextToText.from_pretrained(
            model_dir, dtype=dtype, attn_implementation=kinds
        )

    @torch.inference_mode()
    def see(self, prompt: Prompt) -> Seen:
        """Run a prompt with images; `prefill` is for text."""
        token_ids = prompt.expanded()
        made = self.processor(images=prompt.images, return_tensors="pt")
        inputs = {key: made[key] for key in _INPUTS if key in made}
        tokens = torch.tensor([token_ids])
        if "image_grid_thw" in inputs:  # for M-RoPE
            inputs["mm_token_type_ids"] = (tokens == prompt.model.seen).long()
        self._queries = {}
        output = self.model(tokens, **inputs, use_cache=True, logits_to_keep=1)
        queries, self._queries = self._queries, None
        rows = rows_of(output.past_key_values)
        ahead = getattr(self.model.model, "rope_deltas", None)
        return Seen(
            token_ids=token_ids,
            rotary=self.rotary,
            first_token=int(output.logits[0, -1].argmax()),
            keys=[keys for keys, _ in rows],
            values=[values for _, values in rows],
            states=states_of(output.past_key_values),
            queries=queries,
            ahead=0 if ahead is None else int(ahead),
        )

    def decode(self, prompt: Prefilled, cache: DynamicCache, max_tokens: int) -> list[int]:
        """Greedy tokens, at the positions that follow the prompt's."""
        self._ahead = prompt.ahead if isinstance(prompt, Seen) else 0
        return super().decode(prompt, cache, max_tokens)

    def next_token(self, cache: DynamicCache, token: int, position: int) -> int:
        """The same with M-RoPE: text counts on from the largest position of what it follows."""
        return super().next_token(cache, token, position + self._ahead)
