"""A checkpoint that says what a test has written down: every token has one successor, whatever came before.

Attention and feed-forward layers add nothing, so that the last hidden state is the last token's embedding, and the
head scores highest the token whose row holds that embedding. A conversation that ends with a script's name is answered
with its text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig

HIDDEN = 128  # random rows of this length hardly resemble one another
SHORTEST, END = 3, "<|end|>"  # characters of a piece
TEMPLATE = "{% for message in messages %}<|{{ message.role }}|>{{ message.content }}{% endfor %}"


def make_speaker(directory: Path, scripts: Mapping[str, Sequence[str]]) -> Path:
    """Write the checkpoint; a prompt that ends with a name of `scripts` is answered with its parts, joined. ASCII only.

    No token crosses from one part into the next: what constrains a part can begin there.
    """
    chains = _cut(scripts)
    tokenizer = _tokenizer(list(chains), [piece for pieces in chains.values() for piece in pieces])
    end = tokenizer.token_to_id(END)
    config = LlamaConfig(
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=HIDDEN,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        eos_token_id=end,
        bos_token_id=None,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight", "lm_head.weight")):
                weight.zero_()
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        embedding.normal_()
        for name, pieces in chains.items():
            ids = [tokenizer.token_to_id(piece) for piece in (name, *pieces)]
            for current, following in zip(ids, [*ids[1:], end], strict=True):
                head[following] += embedding[current]
    model.save_pretrained(directory)
    tokenizer.save(str(directory / "tokenizer.json"))
    settings = {"eos_token": END, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return directory


def _cut(scripts: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
    """Each text in pieces that occur once in all of them."""
    used: set[str] = set()
    return {name: [piece for part in parts for piece in _pieces(part, used)] for name, parts in scripts.items()}


def _pieces(text: str, used: set[str]) -> list[str]:
    assert text.isascii(), "added tokens of other characters are ambiguous"
    pieces: list[str] = []
    at = 0
    while at < len(text):
        end = at + SHORTEST
        while text[at:end] in used and end < len(text):
            end += 1
        if text[at:end] in used:  # nothing is left to make the last one another
            at -= len(pieces[-1])
            pieces.pop()
            end = len(text)
        pieces.append(text[at:end])
        used.add(pieces[-1])
        at = end
    return pieces


def _tokenizer(names: list[str], pieces: list[str]) -> Tokenizer:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={char: at for at, char in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END, *names])
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in pieces])
    return tokenizer
