"""Turn a GGUF file into an ordinary model directory: `flywheel gguf FILE --out DIR`

transformers reads the file and dequantises it; DIR holds config, safetensors, tokenizer and chat template, so that
`model.base` can name it. What quantisation took away stays lost. bfloat16 is the default: half the disk, and on
SmolLM2-135M (Q4_1) 1,200 tokens of worked answers cost 2.2849 nats each instead of 2.2846.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from flywheel.errors import UserError, first_line, one_line
from flywheel.runs.files import new_directory

DTYPES = ("bfloat16", "float32")
READY = "{}: ready; name it in the recipe as model.base"


def convert(file: Path, out: Path, dtype: str = DTYPES[0]) -> None:
    """Write the model in `file` into the directory `out`, its weights as `dtype`.

    Raises UserError for a file that is no GGUF, is cut short, lacks weights or has an architecture that transformers
    does not read.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("reading GGUF files takes the package gguf: pip install 'flywheel[gguf]'") from None
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if not file.is_file():
        raise UserError(f"{file}: no such file")
    try:
        fields = gguf.GGUFReader(file).fields
        source = {"pretrained_model_name_or_path": file.parent, "gguf_file": file.name}
        read, info = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(**source)
    except Exception as error:  # the libraries raise a dozen types for a file that they cannot read
        raise UserError(f"{file}: transformers cannot read it: {first_line(error):.200}") from error
    if missing := sorted(info["missing_keys"]):
        raise UserError(f"{file}: {len(missing)} weights are missing, the first is {missing[0]}")
    # save_pretrained refuses a model that came out of a GGUF, and a config that says it is quantised
    settings = read.config.to_dict()
    del settings["quantization_config"]
    model = AutoModelForCausalLM.from_config(type(read.config)(**settings), dtype=getattr(torch, dtype))
    model.load_state_dict(read.state_dict())
    _pre_tokenizer(tokenizer, fields)
    tokenizer.model_max_length = getattr(model.config, "max_position_embeddings", tokenizer.model_max_length)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def _pre_tokenizer(tokenizer, fields) -> None:
    """Make SmolLM's tokenizer the one that it was trained with: transformers makes GPT-2's of it.

    They differ in white space before a digit: a blank line and `5` are two tokens, not three.
    """
    pre = fields.get("tokenizer.ggml.pre")
    if pre is not None and pre.contents() == "smollm":
        from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

        parts = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
        tokenizer.backend_tokenizer.pre_tokenizer = Sequence(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="flywheel gguf", description="Turn a GGUF file into a model directory that model.base can name."
    )
    parser.add_argument("file", type=Path, help="a GGUF file of an architecture that transformers reads")
    add_output(parser)
    args = parser.parse_args(argv)

    def work() -> str:
        with new_directory(args.out) as out:
            convert(args.file, out, args.dtype)
        return READY.format(args.out)

    return one_line(work)


def add_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, required=True, help="a new or empty directory")
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help="of the weights (default: %(default)s)")


if __name__ == "__main__":
    sys.exit(main())
