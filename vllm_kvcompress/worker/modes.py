"""The worker's modes. A further one is a folder with a feature in it, and a line here."""

from vllm_kvcompress.worker.codebook.feature import CodebookFeature
from vllm_kvcompress.worker.draft.feature import DraftFeature
from vllm_kvcompress.worker.features import Feature

MODES: list[type[Feature]] = [CodebookFeature, DraftFeature]
