"""GSM8K as prompts and completions for ``unveil pretrain``: questions and worked answers that fit a short canvas.

    python examples/gsm8k_pairs.py gsm8k_train.jsonl models/smollm2 pairs.jsonl --prompt 64 --completion 80

The calculator's marks (``<<48/2=24>>``) are left out, and ``#### 72`` becomes ``\\boxed{72}``, which the task checks.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file", type=Path)
    parser.add_argument("model", help="folder whose tokenizer counts")
    parser.add_argument("out", type=Path)
    parser.add_argument("--prompt", type=int, required=True, help="most tokens of a question")
    parser.add_argument("--completion", type=int, required=True, help="most tokens of an answer")
    args = parser.parse_args()
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(args.model)
    kept, rows = [], [json.loads(line) for line in args.file.read_text(encoding="utf-8").splitlines()]
    for row in rows:
        answer = re.sub(r"#### (.*)", r"\\boxed{\1}", re.sub(r"<<[^<>]*>>", "", row["answer"]))
        pair = {"prompt": row["question"] + "\n", "completion": answer}
        if all(len(tokenizer(pair[key]).input_ids) <= getattr(args, key) for key in pair):
            kept.append(json.dumps(pair, ensure_ascii=False) + "\n")
    args.out.write_text("".join(kept), encoding="utf-8")
    print(f"{len(kept)} of {len(rows)} fit")


if __name__ == "__main__":
    main()
