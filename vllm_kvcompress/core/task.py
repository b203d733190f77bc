"""Which task a request is, decided once when it arrives (WindowKV, arXiv 2503.17922)."""

from typing import Any

from vllm.tokenizers import cached_tokenizer_from_config
from vllm.v1.request import Request

from vllm_kvcompress.core.classifier import TaskClassifier, head_and_tail


class RequestClassifier:
    """Turns both ends of a prompt back into text and asks the classifier.

    Nothing is loaded until the first request that needs it.

    Parameters
    ----------
    model_config : ModelConfig
        vLLM's, for the tokenizer.
    """

    def __init__(self, model_config: Any) -> None:
        self._model_config = model_config
        self._loaded: tuple[Any, TaskClassifier] | None = None

    def classify(self, request: Request) -> str | None:
        """The request's task; None where there is no text.

        That is: embeddings, no tokenizer, or token ids that the tokenizer does not take.
        """
        token_ids = _text_of(request)
        if not token_ids or self._model_config.skip_tokenizer_init:
            return None
        if self._loaded is None:
            tokenizer = cached_tokenizer_from_config(self._model_config)
            self._loaded = tokenizer, TaskClassifier.load()
        tokenizer, classifier = self._loaded
        head, tail = head_and_tail(token_ids)
        try:
            texts = tokenizer.decode(head), tokenizer.decode(tail)
        except (OverflowError, TypeError, ValueError, IndexError):
            return None
        return classifier.classify(*texts)


def _text_of(request: Request) -> list[int]:
    """The prompt's tokens without those in the place of images, which would fill its ends."""
    rest: list[int] = []
    end = 0
    token_ids = request.prompt_token_ids or []
    for feature in request.mm_features:
        place = feature.mm_position
        rest += token_ids[end : place.offset]
        end = place.offset + place.length
    return rest + token_ids[end:]
