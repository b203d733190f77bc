"""Decides once, when a request arrives, whether and how it will be compressed."""

from typing import Any

from vllm.logger import init_logger
from vllm.v1.request import Request

from vllm_kvcompress.core.planner import Planner
from vllm_kvcompress.core.task import RequestClassifier
from vllm_kvcompress.core.tracked_request import TrackedRequest
from vllm_kvcompress.errors import one_line
from vllm_kvcompress.host.checks import check_reuse, check_setting
from vllm_kvcompress.metrics import CompressionStats
from vllm_kvcompress.plans import RequestOptions
from vllm_kvcompress.request_options import (
    check_fits_server,
    choose_task,
    named_config,
    parse_request,
)

logger = init_logger(f"vllm.{__name__}")


class Admission:
    """The one judge of requests; workers are told what it decided.

    Parameters
    ----------
    planner : Planner
        Where requests are registered.
    vllm_config : VllmConfig
        vLLM's.
    max_model_len : int
        Tokens of the longest sequence.
    stats : CompressionStats
        Where to count.

    Attributes
    ----------
    classifier : RequestClassifier
        Asked for the task of requests whose setting depends on it.
    """

    def __init__(
        self, planner: Planner, vllm_config: Any, max_model_len: int, stats: CompressionStats
    ) -> None:
        self.planner, self.vllm_config = planner, vllm_config
        self.max_model_len, self.stats = max_model_len, stats
        self.classifier = RequestClassifier(vllm_config.model_config)

    def admit(self, request: Request) -> None:
        """Register a request, and count it if it will not be compressed."""
        tracked = self._judge(request)
        if tracked.skip_reason is not None:
            self.stats.record_uncompressed(tracked.skip_reason)

    def _judge(self, request: Request) -> TrackedRequest:
        """Read a request's options. API servers have checked them, but not all ways lead there."""
        name, prompt_len, server = (
            request.request_id,
            request.num_prompt_tokens,
            self.planner.config,
        )
        extra = request.sampling_params.extra_args if request.sampling_params else None
        try:
            options = parse_request(extra, prompt_len)
            if options != RequestOptions():
                check_fits_server(server, options)
                check_reuse(self.vllm_config, options)
                named = named_config(server, options)
                if named is not None and named is not server:
                    check_setting(named, self.vllm_config)
            task, decided_by = choose_task(
                server, options, lambda: self.classifier.classify(request)
            )
            tracked = self.planner.add(
                name, prompt_len, options, bool(request.resumable), task,
                min(request.max_tokens, self.max_model_len - prompt_len),
            )  # fmt: skip
        except Exception as error:  # the engine's loop ends with whatever is raised here
            logger.warning(
                "KV compression: request %s is served uncompressed; its options did not work out "
                "(%s: %s)", one_line(name), type(error).__name__, one_line(str(error)),
            )  # fmt: skip
            return self.planner.add_invalid(name, prompt_len)
        if task is not None and decided_by is not None:
            self.stats.record_task(task, decided_by)
        return tracked
