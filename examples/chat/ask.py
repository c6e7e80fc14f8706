"""Asks the model with OpenAI's official client: python ask.py "What is a snowdrop?" [URL]."""

import sys

import openai

URL = "http://127.0.0.1:8000"


def main(question: str, url: str) -> None:
    # Without required keys any text will do as a key; with them it is what `snowdrop key create` printed.
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none")
    answer = client.chat.completions.create(
        model="chat", messages=[{"role": "user", "content": question}], max_tokens=100, stream=True
    )
    for chunk in answer:
        for choice in chunk.choices:
            print(choice.delta.content or "", end="", flush=True)
    print()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2] if len(sys.argv) > 2 else URL)
