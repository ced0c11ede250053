"""Train the reference model's tokenizer: a byte-level BPE of 4096 tokens.

Run ``python -m lightning_moe.reference.tokenizer --corpus DIR --out DIR/tokenizer``.
The result loads with ``AutoTokenizer.from_pretrained`` and puts ``<s>`` before
every text.  Bytes are the alphabet, so there is no unknown token and decoding
gives back exactly the encoded text.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lightning_moe.reference.corpus import SEPARATOR

VOCABULARY = 4096
CONTEXT = 256
SPECIAL = ("<s>", "</s>", "<pad>")  # their places are their ids
SAMPLE = 1_200_000  # characters of each domain


def sample(corpus: Path, characters: int = SAMPLE) -> Iterator[str]:
    """Yield each domain's leading training documents, the same amount from every domain."""
    for path in sorted((corpus / "train").glob("*.txt")):
        # The documents are stored in shuffled order, so the leading ones are a fair sample.
        yield from path.read_text("utf-8")[:characters].split(SEPARATOR)


def train(texts: Iterator[str], vocabulary: int = VOCABULARY) -> PreTrainedTokenizerFast:
    """Train the tokenizer on ``texts``."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        # Digits stand alone: otherwise years and addresses eat a small vocabulary.
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocabulary:
        raise ValueError(f"the sample is too small for {vocabulary} tokens")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s>:1 $B:1", special_tokens=[("<s>", SPECIAL.index("<s>"))]
    )
    tokenizer_class: Callable[..., PreTrainedTokenizerFast] = PreTrainedTokenizerFast  # untyped upstream
    return tokenizer_class(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        # Text that spells a special token, as code can, is encoded as text and decodes to itself.
        split_special_tokens=True,
    )


def main() -> None:
    """Train and save the tokenizer from the command line."""
    parser = argparse.ArgumentParser(description="Train the reference model's tokenizer.")
    parser.add_argument("--corpus", type=Path, required=True, help="folder that the corpus was written to")
    parser.add_argument("--out", type=Path, required=True, help="folder to save the tokenizer in")
    options = parser.parse_args()
    train(sample(options.corpus)).save_pretrained(options.out)


if __name__ == "__main__":
    main()
