"""From a sample to token ids: chat template, beginning of the answer, BOS."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from vllm_kvcompress.errors import ConfigError
from vllm_kvcompress.evaluation.quality.longbench import middle_cut
from vllm_kvcompress.evaluation.quality.sample import Sample
from vllm_kvcompress.evaluation.quality.words import words_of


@dataclass(frozen=True)
class Prompt:
    """Token ids of a sample; both protocols see the same ones.

    Attributes
    ----------
    context : list[int]
        The long text, with what the template puts in front of it.
    rest : list[int]
        The question, the template's end of turn, and the answer's beginning.
    """

    context: list[int]
    rest: list[int]

    @property
    def token_ids(self) -> list[int]:
        """The whole prompt."""
        return self.context + self.rest


class Prompter:
    """Makes prompts for one tokenizer.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
        Of Hugging Face.
    use_template : bool
        Put context and question into the chat template, if there is one.
    """

    def __init__(self, tokenizer: Any, use_template: bool = True) -> None:
        self.tokenizer = tokenizer
        self.has_template = use_template and bool(getattr(tokenizer, "chat_template", None))

    @cached_property
    def words(self) -> list[str]:
        """Words for generated tasks."""
        return words_of(self.tokenizer)

    def _parts(self, context: str, question: str, answer_prefix: str) -> tuple[str, str]:
        if not self.has_template:
            between = "\n" if answer_prefix and question else ""
            return context, question + between + answer_prefix
        message = {"role": "user", "content": context + question}
        text = self.tokenizer.apply_chat_template(
            [message], tokenize=False, add_generation_prompt=True
        )
        first = text.find(context)
        if first < 0 or not context:
            raise ConfigError(
                "--chat: the model's chat template changes the text that it is given; "
                "measure without it: --no-chat."
            )
        end = first + len(context)
        return text[:end], text[end:] + answer_prefix

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def encode(self, context: str, question: str, answer_prefix: str) -> Prompt:
        """Token ids of such a prompt; a BOS token in front where no template takes care of it."""
        before, behind = self._parts(context.strip(), question, answer_prefix)
        bos = None if self.has_template else self.tokenizer.bos_token_id
        return Prompt(([] if bos is None else [bos]) + self._ids(before), self._ids(behind))

    def of(self, sample: Sample, longest: int | None = None) -> Prompt:
        """Token ids of a sample.

        Parameters
        ----------
        longest : int or None
            Tokens the model takes, the answer included. A text of somebody else's that is longer
            loses its middle, as in LongBench; a generated one was asked for in this length.

        Raises
        ------
        ConfigError
            If the prompt is longer than the model.
        """
        prompt = self.encode(sample.context, sample.question, sample.answer_prefix)
        if longest is None:
            return prompt
        spare = longest - sample.max_tokens - len(prompt.token_ids)
        room = len(prompt.context) + spare
        if spare >= 0:
            return prompt
        if sample.length or room < 2:
            raise ConfigError(
                f"the prompt has {len(prompt.token_ids)} tokens and its answer up to "
                f"{sample.max_tokens}; the model takes {longest}."
            )
        return Prompt(middle_cut(prompt.context, room), prompt.rest)

    def count(self, context: str, question: str, answer_prefix: str) -> int:
        """Tokens of such a prompt."""
        return len(self.encode(context, question, answer_prefix).token_ids)

    def tokens(self, text: str) -> int:
        """Tokens of a text, special ones not counted."""
        return len(self._ids(text))

    def continuation(self, text: str) -> list[int]:
        """Token ids of a text that goes on behind a prompt."""
        return self._ids(text)

    def text(self, token_ids: list[int]) -> str:
        """The text of generated tokens."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)
