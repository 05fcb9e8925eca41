"""Writes the tokenizer of the bundled model: `python -m train.microcode_tokenizer DIRECTORY`.

Words, digits and punctuation of microcode are one token each. Any other text becomes its bytes. The
special tokens and the chat template are those of LLaDA, so the bundled model and the released ones
use the same code.
"""

from __future__ import annotations

import argparse
import json
import sys

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

from xflow_jax.checkpoints import make_directory, write_atomic
from xflow_jax.errors import UserError, disk_errors
from xflow_jax.input_files import to_path
from xflow_jax.tasks import microcode

SAMPLES = 20_000

SPECIAL = (
    ["<|startoftext|>", "<|endoftext|>", "[CLS]", "[gMASK]"]
    + [f"<|reserved_token_{i}|>" for i in range(6)]
    + ["<|mdm_mask|>"]
    + [f"<|reserved_token_{i}|>" for i in range(253, 256)]
    + [
        "<role>",
        "</role>",
        "<|arithmetic_start|>",
        "<|arithmetic_end|>",
        "<|number_start|>",
        "<|number_end|>",
    ]
    + ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
)
# Line breaks are inside expressions, because Jinja drops one at the end of a template.
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ (bos_token if loop.first else '')"
    " + '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    " + (message['content'] | trim) + '<|eot_id|>' }}{% endfor %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
)


def build() -> Tokenizer:
    """Builds the tokenizer.

    Returns:
        A tokenizer of 256 bytes, then the words of microcode in alphabetical order, then the
        special tokens.
    """
    words = {"\n\n", "user", "assistant", "system"}
    for index in range(SAMPLES):
        for text in microcode.training_pair(0, index, microcode.WIDE_STYLE):
            words.update(microcode.split_words(text))
    to_unicode = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)

    def spell(word: str) -> str:
        return to_unicode.pre_tokenize_str(word)[0][0]

    entries = sorted(pre_tokenizers.ByteLevel.alphabet()) + sorted(
        {spell(w) for w in words if len(w.encode()) > 1}
    )
    # Without merges and with `ignore_merges`, a known word is one token, an unknown one its bytes.
    tokenizer = Tokenizer(
        models.BPE({e: i for i, e in enumerate(entries)}, merges=[], ignore_merges=True)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(microcode.WORD), "isolated"), to_unicode]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    return tokenizer


def main(directory: str) -> None:
    """Writes tokenizer.json, tokenizer_config.json and special_tokens_map.json.

    Args:
        directory: the destination. It is made if necessary.
    """
    out = to_path(directory)
    tokenizer = build()
    names = {
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
    }
    config = names | {
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "model_input_names": ["input_ids", "attention_mask"],
        "model_max_length": 256,
        "tokenizer_class": "PreTrainedTokenizerFast",
    }
    with disk_errors(out):
        make_directory(out)
    write_atomic(out / "tokenizer.json", tokenizer.to_str(pretty=True))
    write_atomic(out / "tokenizer_config.json", json.dumps(config, indent=2) + "\n")
    write_atomic(out / "special_tokens_map.json", json.dumps(names, indent=2) + "\n")
    print(
        f"{out}: {tokenizer.get_vocab_size()} tokens, mask {tokenizer.token_to_id('<|mdm_mask|>')}"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m train.microcode_tokenizer",
        description="Writes the tokenizer of the bundled model.",
    )
    parser.add_argument("directory", help="destination, made if necessary")
    try:
        main(parser.parse_args().directory)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
