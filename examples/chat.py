"""A chat whose later turns go on from the compressed cache, with OpenAI's package.

    vllm serve MODEL --kv-compression auto
    python examples/chat.py http://127.0.0.1:8000

`kv_session` names the conversation; docs/sessions.md says what that is good for, and what it costs.
"""

import sys
from urllib.request import urlopen

from openai import OpenAI

TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "


def taken_over(url: str) -> int:
    """Prompt tokens that turns of all chats did not have to compute, so far."""
    with urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    found = [line for line in lines if line.startswith("vllm:kv_compression_session_tokens_total")]
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in found))


def main(url: str) -> None:
    """Ask three questions about one text, and print what had not to be computed for each."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    messages = [{"role": "user", "content": f"{TEXT * 40}\nIn short, the grass is"}]
    for question in ("And the sky is", "And the sun is", ""):
        before = taken_over(url)
        answer = client.chat.completions.create(
            model=model,
            messages=messages,  # type: ignore[arg-type]
            max_tokens=16,
            temperature=0,
            extra_body={"vllm_xargs": {"kv_session": "example"}},
        )
        assert answer.usage is not None
        reused = taken_over(url) - before
        print(f"a prompt of {answer.usage.prompt_tokens} tokens, {reused} of them taken over")
        messages.append({"role": "assistant", "content": answer.choices[0].message.content or ""})
        messages.append({"role": "user", "content": f"\n{TEXT}{question}"})


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000")
