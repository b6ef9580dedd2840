"""Small tokenizers of the three kinds that matter, trained or written down on the spot."""

from __future__ import annotations

from functools import cache

import tokenizers
from tokenizers import AddedToken, decoders, models, pre_tokenizers, processors, trainers

from penstock.common.tokenizer import Tokenizer

TEXT = [
    "The gate of the penstock opens and the water falls to the turbine, and the wheel turns again.",
    "Hello, how are you? I am fine. What is the answer to the question? It is the water.",
    "def gate(x): return x + 1  # 0123456789",
]
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SETTINGS = {"bos_token": "<s>", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}


@cache
def byte_level_backend() -> tokenizers.Tokenizer:
    """GPT-2 style byte-level BPE with 400 tokens: emoji and CJK take one token a byte."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ["<s>", "<|im_start|>", "<|im_end|>"]
    backend.train_from_iterator(
        TEXT * 20,
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.add_tokens([AddedToken("<tool call>", special=False)])  # not special, with a space in it
    return backend


@cache
def byte_level() -> Tokenizer:
    return Tokenizer(byte_level_backend(), SETTINGS)


@cache
def sentencepiece_backend() -> tokenizers.Tokenizer:
    """Llama-2 style: spaces as U+2581, bytes as <0xNN>, one leading space stripped from the text."""
    words = ["▁", "▁the", "▁wa", "ter", "a", "b", "▁a", "ß", "."]
    vocab = {
        token: i for i, token in enumerate(["<unk>", "<s>", "</s>", *(f"<0x{n:02X}>" for n in range(256)), *words])
    }
    backend = tokenizers.Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>", byte_fallback=True))
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend


@cache
def sentencepiece() -> Tokenizer:
    return Tokenizer(sentencepiece_backend(), {"bos_token": "<s>", "eos_token": {"content": "</s>"}})


@cache
def wordpiece() -> Tokenizer:
    """BERT style: a token's text depends on its neighbours."""
    vocab = {token: i for i, token in enumerate(["[UNK]", "[SEP]", "the", "wa", "##ter", "gate", "##s", ".", ",", "a"])}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab=vocab, unk_token="[UNK]"))
    backend.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    backend.add_special_tokens(["[UNK]", "[SEP]"])
    return Tokenizer(backend)
