"""From pairs to fine-tune on: the prompt and the chosen answer of each record of a file of "chosen" and "rejected" (docs/DATA.md).

    python examples/chosen_only.py pairs.jsonl chosen.jsonl
"""

import json
import os
import sys

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
from llama_rlhf.records import located, preference_of, read_records  # noqa: E402


def main(pairs_file, save_file):
    os.makedirs(os.path.dirname(save_file) or ".", exist_ok=True)
    with open(save_file, "w", encoding="utf-8") as file:
        for _, where, record in located(read_records(pairs_file)):
            prompt, chosen, _ = preference_of(record, where)
            for answer in chosen:
                messages = [*prompt, {"role": "assistant", "content": answer}] if isinstance(prompt, list) else None
                file.write(json.dumps({"messages": messages} if messages else {"prompt": prompt, "completion": answer}, ensure_ascii=False) + "\n")
    print(f"written: {save_file}")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
