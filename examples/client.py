"""A client of a server that compresses, with OpenAI's package, which vLLM installs too.

    vllm serve MODEL --kv-compression auto
    python examples/client.py http://127.0.0.1:8000

Only `vllm_xargs` is new to a client.
"""

import sys
from urllib.request import urlopen

from openai import BadRequestError, OpenAI

FILLER = (
    "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
)


def main(url: str) -> None:
    """Send a long prompt with several options, and print what the server counted."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id

    def ask(topic: str, **xargs: object) -> str:
        answer = client.completions.create(
            model=model,
            prompt=f"About the {topic}. {FILLER * 40}\nIn short, the grass is",
            max_tokens=8,
            temperature=0,
            extra_body={"vllm_xargs": xargs},
        )
        return answer.choices[0].text.strip()

    print("as the server was started:", ask("meadow"))
    print("a quarter kept:", ask("field", kv_budget_ratio=0.25))
    print("first 64 tokens pinned:", ask("valley", kv_pin=[0, 64]))
    print("another preset:", ask("garden", kv_compression="keydiff"))
    print("all kept:", ask("forest", kv_compression="none"))
    try:
        ask("lake", kv_budget_ratio=2)
    except BadRequestError as error:
        print("refused:", error.body["message"] if isinstance(error.body, dict) else error)

    with urlopen(f"{url}/metrics") as response:
        for line in response.read().decode().splitlines():
            if "kv_compression_requests_total{" in line and not line.endswith(" 0.0"):
                print(line)


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000")
