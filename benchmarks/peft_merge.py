"""An adapter folded as PEFT does it: load both, merge, save. `peft_merge.py BASE ADAPTER OUT`."""

from __future__ import annotations

import sys

from peft import PeftModel
from transformers import AutoModelForCausalLM


def main(base: str, adapter: str, out: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(base, dtype="bfloat16")
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


if __name__ == "__main__":
    main(*sys.argv[1:4])
