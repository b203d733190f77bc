"""What may be kept of a request for others, as far as settings say."""

from vllm_kvcompress.config.reading import preset, preset_names
from vllm_kvcompress.config.settings import CompressionConfig
from vllm_kvcompress.errors import ConfigError


def check_session(server: CompressionConfig, config: CompressionConfig | None) -> None:
    """Refuse to continue what cannot be kept, or cannot be compressed a second time.

    Parameters
    ----------
    server, config : CompressionConfig
        The server's setting, and the request's; None where it is not compressed.

    Raises
    ------
    ConfigError
        With the first reason found.
    """
    _check_server("kv_session", server, "between turns")
    for each in _variants(config):
        if each.codebook is not None:
            raise ConfigError(
                "kv_session: codebooks are made when a prompt ends and are not continued; choose a "
                "preset without a codebook, or leave it out."
            )
        if each.waits_for_pressure:
            raise ConfigError(
                "kv_session: with the trigger pressure a conversation may end whole, and nothing "
                "is kept of it; choose a preset with another trigger, or leave it out."
            )
        policy = each.build_policy()
        if policy.queries.value == "prompt" or not policy.runs_while_decoding:
            raise ConfigError(
                f"kv_session: {each.policy.name} scores whole prompts, and a later turn computes "
                "its own part alone; choose another preset, or leave it out."
            )


def check_shared_prefix(server: CompressionConfig, config: CompressionConfig | None) -> None:
    """Refuse to share what depends on more than the prefix, or is written again.

    Parameters and errors as those of `check_session`.
    """
    _check_server("kv_shared_prefix", server, "for others")
    for each in _variants(config):
        if not _reads_no_queries(each):
            allowed = ", ".join(name for name in preset_names() if _is_shareable(name))
            raise ConfigError(
                f"kv_shared_prefix: {each.policy.name} ranks tokens by queries, and a prefix that "
                f"others share has no question in it; name one of these in kv_compression: "
                f"{allowed}; or leave it out."
            )
        if each.codebook is not None:
            raise ConfigError(
                "kv_shared_prefix: codebooks are made when a prompt ends and are not shared; "
                "choose a preset without a codebook, or leave it out."
            )


def _check_server(key: str, server: CompressionConfig, for_whom: str) -> None:
    if not server.sessions.max_blocks_ratio:
        raise ConfigError(
            f"{key}: this server keeps nothing {for_whom}; start it with "
            "--kv-compression-config.sessions.max_blocks_ratio=0.5, or leave it out."
        )
    if server.drafts:
        raise ConfigError(
            f"{key}: this server drafts over views, which are not kept {for_whom}; leave it "
            "out, or start the server without draft mode and draft.budget."
        )


def _variants(config: CompressionConfig | None) -> list[CompressionConfig]:
    return [] if config is None else [config, *config.by_task.values()]


def _reads_no_queries(config: CompressionConfig) -> bool:
    return config.build_policy().queries.value == "none"


def _is_shareable(name: str) -> bool:
    variants = _variants(preset(name))
    return all(_reads_no_queries(each) and each.codebook is None for each in variants)
