"""Record what transformers' own Qwen2 tokenizer makes of some texts and conversations.

    python tests/golden_models/make_tokens.py DIRECTORY

DIRECTORY holds the vocab.json, merges.txt and tokenizer_config.json of JetLM/SDAR-4B-Chat (Qwen3's vocabulary).
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import transformers

TEXTS = [
    "Hello, world! It's 2024.",
    "naïve 漢字 🙂\r\n\tx  y",
    "def f(x):\n    return x**2  # √",
    "e\u0301 I'LL \u00a0 x",
    " <think>\nok</think>\n",
    "",
]


def main() -> None:
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(sys.argv[1])
    cases = []
    for text in TEXTS:
        messages = [
            {"role": "system", "content": "Be <b>"},
            {"role": "user", "content": text},
            {"role": "assistant", "content": "y "},
            {"role": "user", "content": "\n" + text},
        ]
        chat = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
        ids = tokenizer.encode(text, add_special_tokens=False)
        cases.append({"text": text, "ids": ids, "messages": messages, "chat": chat})
    out = {"script": "tests/golden_models/make_tokens.py", "transformers": transformers.__version__, "cases": cases}
    (Path(__file__).parent / "qwen_tokens.json").write_text(json.dumps(out) + "\n")


if __name__ == "__main__":
    main()
