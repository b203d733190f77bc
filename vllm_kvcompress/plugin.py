"""Entry point of group ``vllm.general_plugins``: runs in every vLLM process, often repeatedly."""


def register() -> None:
    """Install the hooks. Without ``--kv-compression`` they change nothing."""
    from vllm_kvcompress.host.hooks import install_hooks

    install_hooks()
