"""Prompts with images or videos for tiny multimodal models, and their reference.

All images have one size, and become `TOKENS` tokens each; so do every two frames of a video.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import (
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoVideoProcessor,
    DynamicCache,
)

from vllm_kvcompress.evaluation.replay import Prefilled, Replay
from vllm_kvcompress.evaluation.replay_states import rows_of, states_of

PIXELS = 224  # height and width
PATCH = 14
TOKENS = (PIXELS // PATCH // 2) ** 2
FRAMES = 4  # of a video
_METADATA = {
    "fps": 2.0, "duration": FRAMES / 2, "total_num_frames": FRAMES,
    "frames_indices": list(range(FRAMES)), "video_backend": "opencv", "do_sample_frames": False,
}  # fmt: skip


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
    kind : {"image", "video"}
        What a prompt shows.
    """

    folder: str
    before: list[int]
    written: int
    after: list[int]
    becomes: list[int]
    seen: int
    kind: str = "image"

    def prompt(self, tokens: Sequence[int], places: dict[int, int]) -> "Prompt":
        """Text with images before some of its places; by place the number of the image."""
        token_ids: list[int] = []
        for place, token in enumerate(tokens):
            if place in places:
                token_ids += [*self.before, self.written, *self.after]
            token_ids.append(token)
        make = video if self.kind == "video" else image
        return Prompt(self, token_ids, [make(seed) for _, seed in sorted(places.items())])


@dataclass(frozen=True)
class Prompt:
    """What a user sends: token ids, a token for each image, and the images in this order.

    Or videos, uint8 [frames, height, width, 3].
    """

    model: Tiny
    token_ids: list[int]
    images: list[Any]

    def for_vllm(self) -> dict[str, Any]:
        """The prompt as vLLM takes it."""
        shown = list(self.images)
        if self.model.kind == "video":
            shown = [(frames, _METADATA) for frames in shown]
        return {
            "prompt_token_ids": list(self.token_ids),
            "multi_modal_data": {self.model.kind: shown},
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


def video(seed: int) -> np.ndarray:
    """Pictures of noise."""
    return np.stack([np.asarray(image(FRAMES * seed + number)) for number in range(FRAMES)])


_INPUTS = (
    "pixel_values", "image_grid_thw", "image_sizes", "image_position_ids",
    "pixel_values_videos", "video_grid_thw",
)  # fmt: skip


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
        kind = AutoVideoProcessor if model.kind == "video" else AutoImageProcessor
        self.processor = kind.from_pretrained(model.folder)
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
        kind = prompt.model.kind
        made = self.processor(**{f"{kind}s": prompt.images}, return_tensors="pt")
        inputs = {key: made[key] for key in _INPUTS if key in made}
        tokens = torch.tensor([token_ids])
        if f"{kind}_grid_thw" in inputs:  # for M-RoPE
            number = 2 if kind == "video" else 1
            inputs["mm_token_type_ids"] = (tokens == prompt.model.seen).long() * number
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
