"""Tiny multimodal models of real classes, prompts with images, and their reference.

The text parts are those of `lab.random_models`; the vision towers are small and random. Images are
of `PIXELS` and become a few dozen tokens each.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    DynamicCache,
    PaddleOCRVLConfig,
    PaddleOCRVLForConditionalGeneration,
    PaddleOCRVLImageProcessor,
    PaddleOCRVLProcessor,
    PreTrainedTokenizerFast,
)

from lab.random_models import VOCAB_SIZE, write_random_model
from vllm_kvcompress.evaluation.replay import Prefilled, Replay

PIXELS = (224, 224)  # height and width
PIXELS_PER_TOKEN = 28
_TEXT_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "vocab_size", "max_position_embeddings", "rms_norm_eps",
    "hidden_act", "tie_word_embeddings", "bos_token_id", "eos_token_id",
)  # fmt: skip


def image(seed: int) -> Image.Image:
    """A picture of noise."""
    pixels = np.random.RandomState(seed).randint(0, 256, (*PIXELS, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


@dataclass(frozen=True)
class Prompt:
    """What a user sends: token ids, each image a token in its place.

    Attributes
    ----------
    token_ids : list[int]
        As given; vLLM puts as many tokens in the place of an image as it has.
    images : list of Image
        In the order of their tokens.
    """

    token_ids: list[int]
    images: list[Image.Image]

    def for_vllm(self) -> dict[str, Any]:
        """The prompt as vLLM takes it."""
        return {
            "prompt_token_ids": list(self.token_ids),
            "multi_modal_data": {"image": list(self.images)},
        }


# --- PaddleOCR-VL: M-RoPE -----------------------------------------------------------------

PADDLE_TOKENS = (
    "<|IMAGE_START|>", "<|IMAGE_END|>", "<|IMAGE_PLACEHOLDER|>", "<|video|>",
)  # fmt: skip


def write_paddleocr_vl(folder: Path) -> str:
    """Write model, tokenizer and processor of a tiny PaddleOCR-VL: Ernie 4.5 with M-RoPE."""
    base = write_random_model(folder / "text", "llama")
    text = json.loads((base / "config.json").read_text())
    ids = _write_tokenizer(folder, PADDLE_TOKENS, image_token="<|IMAGE_PLACEHOLDER|>")
    rope = {**text["rope_parameters"], "mrope_section": [4, 6, 6]}
    start, end, image, video = (ids[word] for word in PADDLE_TOKENS)
    config = PaddleOCRVLConfig(
        text_config={key: text[key] for key in _TEXT_FIELDS} | {"rope_parameters": rope},
        vision_config={
            "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
            "num_attention_heads": 2, "image_size": PIXELS[0], "patch_size": 14,
        },
        image_token_id=image, video_token_id=video, vision_start_token_id=start,
        vision_end_token_id=end, tie_word_embeddings=False, dtype="float32",
    )  # fmt: skip
    torch.manual_seed(0)
    model = PaddleOCRVLForConditionalGeneration(config)
    _fill(model, load_file(base / "model.safetensors"), "projector.linear_2.weight")
    model.save_pretrained(folder)
    pixels = PaddleOCRVLImageProcessor(
        size={"shortest_edge": PIXELS_PER_TOKEN**2, "longest_edge": PIXELS[0] * PIXELS[1]}
    )
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    PaddleOCRVLProcessor(pixels, tokenizer).save_pretrained(folder)
    return str(folder)


# --- parts --------------------------------------------------------------------------------


def _write_tokenizer(folder: Path, special: Sequence[str], **named: str) -> dict[str, int]:
    """A word per token id, the last ones special; returns the ids of all words."""
    words = [f"w{number}" for number in range(VOCAB_SIZE - len(special))] + list(special)
    ids = {word: number for number, word in enumerate(words)}
    tokenizer = Tokenizer(WordLevel(ids, unk_token="w2"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="w1", pad_token="w1",
        additional_special_tokens=list(special), **named,
    ).save_pretrained(folder)  # fmt: skip
    return ids


@torch.no_grad()
def _fill(model: Any, text: dict[str, torch.Tensor], last: str) -> None:
    """Put the text part into a model, and make what its images become as large as its words.

    `last` names the weight that makes tokens of an image.
    """
    for name, weight in model.named_parameters():
        own = text.get(name.replace("model.language_model.", "model."))
        if own is not None:
            weight.copy_(own)
        elif name.endswith("bias"):
            weight.zero_()
        elif name.endswith(last):
            weight.normal_(0, 4 / weight.shape[1] ** 0.5)
        elif weight.dim() > 1:
            weight.normal_(0, weight[0].numel() ** -0.5)


class MultimodalReplay(Replay):
    """`Replay` over a prompt with images.

    Parameters
    ----------
    model_dir : str
        Folder of the model.
    block_size : int
        Tokens per block.
    """

    def __init__(self, model_dir: str, block_size: int) -> None:
        super().__init__(model_dir, block_size)
        self.processor = AutoImageProcessor.from_pretrained(model_dir)
        self.image_token, self._ahead = self.model.config.image_token_id, 0

    def _load(self, model_dir: str, dtype: torch.dtype, attention: str) -> Any:
        kinds = {"text_config": attention, "vision_config": "sdpa"}
        return AutoModelForImageTextToText.from_pretrained(
            model_dir, dtype=dtype, attn_implementation=kinds
        )

    @torch.inference_mode()
    def see(self, prompt: Prompt) -> "Seen":
        """Run a prompt with images; `prefill` is for text."""
        pixels = self.processor(images=prompt.images, return_tensors="pt")
        token_ids = self._expand(prompt, pixels)
        placed = torch.tensor([token_ids])
        kinds = (placed == self.image_token).long()
        self._queries = []
        output = self.model(
            placed, **pixels, mm_token_type_ids=kinds, use_cache=True, logits_to_keep=1
        )
        queries, self._queries = self._queries, None
        cache = output.past_key_values
        ahead = getattr(self.model.model, "rope_deltas", None)
        return Seen(
            token_ids=token_ids,
            rotary=self.rotary,
            first_token=int(output.logits[0, -1].argmax()),
            keys=[layer.keys[0] for layer in cache.layers],
            values=[layer.values[0] for layer in cache.layers],
            queries=queries,
            ahead=0 if ahead is None else int(ahead),
        )

    def _expand(self, prompt: Prompt, pixels: Any) -> list[int]:
        """Token ids with as many image tokens as vLLM puts in the place of each."""
        sizes = iter((pixels["image_grid_thw"].prod(-1) // self.processor.merge_size**2).tolist())
        return [
            token
            for each in prompt.token_ids
            for token in [each] * (next(sizes) if each == self.image_token else 1)
        ]

    def decode(self, prompt: Prefilled, cache: DynamicCache, max_tokens: int) -> list[int]:
        """Greedy tokens, at the positions that follow the prompt's."""
        self._ahead = prompt.ahead if isinstance(prompt, Seen) else 0
        return super().decode(prompt, cache, max_tokens)

    def next_token(self, cache: DynamicCache, token: int, position: int) -> int:
        """The same with M-RoPE: text counts on from the largest position of what it follows."""
        return super().next_token(cache, token, position + self._ahead)


@dataclass
class Seen(Prefilled):
    """A prompt with images after its forward pass.

    Attributes
    ----------
    ahead : int
        What positions of the tokens behind it are ahead of their places, with M-RoPE.
    """

    ahead: int = 0
