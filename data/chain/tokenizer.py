"""The laboratory's tokenizer: one token per number, operation, result, keyword and newline.

It is an ordinary ``tokenizer.json``: AutoTokenizer, vLLM and TRL load it without code from here.
Spaces only separate words: they are dropped by encoding and put back by decoding, so that
``encode(a) + encode(b) == encode(a + b)`` wherever a or b ends at a word's edge.
"""

from __future__ import annotations

from pathlib import Path

from .domain import OPS, P

PAD, EOS = "<pad>", "<eos>"
KEYWORDS = ("Q", "?", "Try", "Check", "Again", "Answer", "ok", "no")
WORDS = (PAD, EOS, "\n", *KEYWORDS, *OPS, *(str(n) for n in range(P)), *(f"={n}" for n in range(P)))
ID = {word: i for i, word in enumerate(WORDS)}


def to_text(words: list[str]) -> str:
    """Words -> text, as the tokenizer decodes them."""
    return " ".join(words).replace(" \n ", "\n").replace(" \n", "\n").replace("\n ", "\n")


def build():
    """A transformers fast tokenizer over WORDS; text with any other word raises when encoded."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = (PAD, EOS)
    vocab = {word if word in special else "▁" + word: i for word, i in ID.items()}
    tokenizer = Tokenizer(models.WordLevel(vocab))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split("\n", "isolated"),
            pre_tokenizers.Split(Regex(" +"), "removed"),
            pre_tokenizers.Metaspace(prepend_scheme="always", split=False),
        ]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Metaspace(prepend_scheme="always"), decoders.Fuse(), decoders.Replace(Regex(" ?\n ?"), "\n")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=EOS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )


def save(folder: Path | str) -> None:
    build().save_pretrained(folder)
