"""Many questions about one text, which the server compresses once, with OpenAI's package.

    vllm serve MODEL --kv-compression shared_prefix
    python examples/questions.py http://127.0.0.1:8000

`kv_shared_prefix` says how many tokens all the prompts begin with; docs/shared_prefixes.md says
what that is good for, and what it costs.
"""

import sys
from concurrent.futures import ThreadPoolExecutor
from urllib.request import urlopen

import httpx
from openai import OpenAI

TEXT = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again. "
QUESTIONS = ("In short, the grass is", "In short, the sky is", "In short, the sun is")


def not_computed(url: str) -> int:
    """Prompt tokens that no request had to compute, because their text was compressed before."""
    with urlopen(f"{url}/metrics") as response:
        lines = response.read().decode().splitlines()
    name = "vllm:kv_compression_shared_prefix_tokens_total"
    return int(sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(name)))


def main(url: str) -> None:
    """Ask some questions at once, and print what had not to be computed for them."""
    client = OpenAI(base_url=f"{url}/v1", api_key="none")
    model = client.models.list().data[0].id
    text = [{"role": "system", "content": TEXT * 40}]
    # What a template puts behind the text is no part of it.
    begin = {"model": model, "messages": text, "add_generation_prompt": False}
    num_tokens = httpx.post(f"{url}/tokenize", json=begin).json()["count"]
    print(f"all prompts begin with the same {num_tokens} tokens")

    def ask(question: str) -> str:
        answer = client.chat.completions.create(
            model=model,
            messages=[*text, {"role": "user", "content": question}],  # type: ignore[list-item]
            max_tokens=16,
            temperature=0,
            extra_body={
                "vllm_xargs": {
                    "kv_compression": "shared_prefix",
                    "kv_shared_prefix": num_tokens,
                }
            },
        )
        return answer.choices[0].message.content or ""

    before = not_computed(url)
    with ThreadPoolExecutor(len(QUESTIONS)) as pool:
        for question, answer in zip(QUESTIONS, pool.map(ask, QUESTIONS), strict=True):
            print(f"{question} ...{answer!r}")
    print(f"{not_computed(url) - before} prompt tokens had not to be computed")


if __name__ == "__main__":
    main(sys.argv[1].rstrip("/") if len(sys.argv) > 1 else "http://127.0.0.1:8000")
