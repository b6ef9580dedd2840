"""Trains penstock/demo_model/checkpoint/ from the two texts beside it: about three minutes on two cores.

Run by hand after a change of the texts: `.venv/bin/python scripts/train_demo_model.py [--steps N]`. It trains the
byte-level BPE tokenizer first, then a small Llama in plain PyTorch, and writes both as an ordinary Hugging Face
checkpoint in bfloat16. The seed is fixed: the same versions on the same machine write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional

HOME = Path(__file__).resolve().parent.parent / "penstock" / "demo_model"
BEGIN, END, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You are the keeper of a mill.",
    "Answer in one sentence.",
    "Be brief.",
)
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The demo model knows the roles system, user and assistant, not ' + message['role']) }}"
    "{% endif %}"
    "{{ '<|' + message['role'] + '|>' + message['content'] | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The model's sizes, under the names that config.json gives them."""

    vocab_size: int
    hidden_size: int = 128
    intermediate_size: int = 384
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 32
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    initializer_range: float = 0.02


class Attention(nn.Module):
    """Causal attention with grouped queries and rotary positions."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        queries = shape.num_attention_heads * shape.head_dim
        keys = shape.num_key_value_heads * shape.head_dim
        self.q_proj = nn.Linear(shape.hidden_size, queries, bias=False)
        self.k_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.v_proj = nn.Linear(shape.hidden_size, keys, bias=False)
        self.o_proj = nn.Linear(queries, shape.hidden_size, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, length, hidden]; cos, sin: [length, head_dim]."""
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.shape.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin
        groups = self.shape.num_attention_heads // self.shape.num_key_value_heads
        k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        mixed: Tensor = self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))
        return mixed


class Mlp(nn.Module):
    """The gated feed-forward half of a layer."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.up_proj = nn.Linear(shape.hidden_size, shape.intermediate_size, bias=False)
        self.down_proj = nn.Linear(shape.intermediate_size, shape.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """x: [batch, length, hidden]."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Layer(nn.Module):
    """One transformer layer; attribute names are the checkpoint's."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.self_attn = Attention(shape)
        self.post_attention_layernorm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        self.mlp = Mlp(shape)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x: [batch, length, hidden]."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Llama(nn.Module):
    """The whole model, head tied to the embedding."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.vocab_size, shape.hidden_size)
        self.layers = nn.ModuleList(Layer(shape) for _ in range(shape.num_hidden_layers))
        self.norm = nn.RMSNorm(shape.hidden_size, shape.rms_norm_eps)
        for parameter in self.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=shape.initializer_range)

    def forward(self, tokens: Tensor) -> Tensor:
        """tokens: [batch, length] -> logits [batch, length, vocab]."""
        half = torch.arange(0, self.shape.head_dim, 2, dtype=torch.float32) / self.shape.head_dim
        angles = torch.outer(torch.arange(tokens.shape[1], dtype=torch.float32), self.shape.rope_theta**-half)
        angles = torch.cat((angles, angles), dim=-1)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos(), angles.sin())
        return functional.linear(self.norm(x), self.embed_tokens.weight)


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) over the halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def read_dialogues() -> list[tuple[str, str]]:
    """dialogues.txt: pairs of lines, a question and its answer, between blank lines."""
    blocks = (HOME / "dialogues.txt").read_text().strip().split("\n\n")
    return [(question, answer) for question, answer in (block.split("\n") for block in blocks)]


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that begins each text with BEGIN, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False) for t in (BEGIN, END, SYSTEM, USER, ASSISTANT)]
    trainer = trainers.BpeTrainer(
        vocab_size=2048,
        min_frequency=2,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A", pair=f"{BEGIN} $A {BEGIN} $B", special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))]
    )
    return tokenizer


class Samples:
    """Draws training sequences: half of them windows of the prose, half of them chats."""

    def __init__(self, tokenizer: Tokenizer, prose: str, dialogues: list[tuple[str, str]], seed: int) -> None:
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self.dialogues = dialogues
        self.paragraphs = [self._encode(f"{p}\n\n") for p in prose.strip().split("\n\n")]

    def _encode(self, text: str) -> list[int]:
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def _window(self, length: int) -> list[int]:
        """The prose from a random paragraph's start or middle, past the book's end to its beginning."""
        start = self.random.randrange(len(self.paragraphs))
        ids = [i for p in self.paragraphs[start:] + self.paragraphs[:start] for i in p]
        skip = self.random.choice((0, self.random.randrange(len(self.paragraphs[start]))))
        return [*self._encode(BEGIN), *ids[skip:]][:length]

    def _chat(self, length: int) -> list[int]:
        """Turns of random questions, now and then with a system message, lower case or no question mark."""
        text = BEGIN
        if self.random.random() < 0.4:
            text += f"{SYSTEM}{self.random.choice(SYSTEM_PROMPTS)}{END}"
        for question, answer in self.random.sample(self.dialogues, 16):
            if self.random.random() < 0.25:
                question = question[0].lower() + question[1:].rstrip("?.!")
            text += f"{USER}{question}{END}{ASSISTANT}{answer}{END}"
        return self._encode(text)[:length]

    def batch(self, size: int, length: int) -> Tensor:
        """[size, length + 1] token ids; every chat is long enough to fill its row, or is followed by prose."""
        rows = []
        for index in range(size):
            row = self._chat(length + 1) if index % 2 else []
            rows.append(row + self._window(length + 1 - len(row)))
        return torch.tensor(rows)


def train(model: Llama, samples: Samples, steps: int) -> None:
    """AdamW with warm-up and cosine decay."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3, betas=(0.9, 0.95), weight_decay=0.05)
    warmup = 20
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * min(1.0, step / steps)) + 0.01),
    )
    started = time.monotonic()
    for step in range(steps):
        # Mostly short rows; the long ones teach the rotary positions of a whole chapter.
        tokens = samples.batch(size=4, length=1024) if step % 4 == 3 else samples.batch(size=16, length=256)
        loss = functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step}  loss {loss.item():.3f}  {time.monotonic() - started:.0f} s", flush=True)


def write_json(path: Path, value: object) -> None:
    """One JSON file, readable and stable."""
    path.write_text(json.dumps(value, indent=2) + "\n")


def write_checkpoint(directory: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """config.json, model.safetensors, tokenizer.json, tokenizer_config.json, generation_config.json."""
    directory.mkdir(exist_ok=True)
    begin, end = tokenizer.token_to_id(BEGIN), tokenizer.token_to_id(END)
    ids = {"bos_token_id": begin, "eos_token_id": end}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", **vars(model.shape), **ids}
    config |= {"hidden_act": "silu", "tie_word_embeddings": True, "attention_bias": False, "mlp_bias": False}
    config |= {"attention_dropout": 0.0, "use_cache": True, "rope_scaling": None, "torch_dtype": "bfloat16"}
    write_json(directory / "config.json", config)
    write_json(directory / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.6, "top_p": 0.95})
    tokenizer.save(str(directory / "tokenizer.json"))
    write_json(
        directory / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "bos_token": BEGIN,
            "eos_token": END,
            "clean_up_tokenization_spaces": False,
            "model_max_length": model.shape.max_position_embeddings,
            "chat_template": CHAT_TEMPLATE,
        },
    )
    weights = {f"model.{name}": value.detach().bfloat16().contiguous() for name, value in model.state_dict().items()}
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)


def main() -> None:
    """Trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=360)
    parser.add_argument("--output", type=Path, default=HOME / "checkpoint")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    prose, dialogues = (HOME / "text.txt").read_text(), read_dialogues()
    tokenizer = train_tokenizer([prose, *SYSTEM_PROMPTS, *(text for pair in dialogues for text in pair)])
    model = Llama(Shape(vocab_size=tokenizer.get_vocab_size()))
    train(model, Samples(tokenizer, prose, dialogues, seed=0), arguments.steps)
    write_checkpoint(arguments.output, model, tokenizer)


if __name__ == "__main__":
    main()
