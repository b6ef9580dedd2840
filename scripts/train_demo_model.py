"""Trains penstock/demo_model/checkpoint/ on what scripts/demo_text.py writes: about twenty minutes on one core.

Run by hand after a change of the text: `.venv/bin/python scripts/train_demo_model.py [--steps N]`. It trains the
byte-level BPE tokenizer first, then a small Llama in plain PyTorch (bfloat16 where it multiplies, on a GPU if there is
one), and writes both as an ordinary Hugging Face checkpoint in bfloat16. The seed is fixed: the same versions on the
same machine write the same bytes.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from demo_text import ALL, FACTS, TALES, Turn, Writer
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from tqdm import tqdm

HOME = Path(__file__).resolve().parent.parent / "penstock" / "demo_model"
BEGIN, END, SYSTEM, USER, ASSISTANT = "<|begin|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"
IGNORED = -100
VOCABULARY = 3072
# From which step on what is read: tales are long and soon known, facts take time, in the end it is all of them.
COURSE = ((0, TALES), (300, FACTS), (1200, ALL))
# The model has learnt three roles: what a tool says is read as the user's, a developer is the system.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{% set role = {'tool': 'user', 'developer': 'system'}.get(message['role'], message['role']) %}"
    "{% if role not in ['system', 'user', 'assistant'] %}"
    "{{ raise_exception('The demo model knows the roles system, user and assistant, not ' + role) }}"
    "{% endif %}"
    "{{ '<|' + role + '|>' + (message['content'] or '') | trim + '<|end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """The model's sizes, under the names that config.json gives them."""

    vocab_size: int
    hidden_size: int = 256
    intermediate_size: int = 640
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
        """tokens: [batch, length] -> what the head reads: [batch, length, hidden]."""
        half = torch.arange(0, self.shape.head_dim, 2, device=tokens.device) / self.shape.head_dim
        angles = torch.outer(torch.arange(tokens.shape[1], device=tokens.device), self.shape.rope_theta**-half)
        angles = torch.cat((angles, angles), dim=-1)
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
        out: Tensor = self.norm(x)
        return out

    def loss(self, states: Tensor, targets: Tensor) -> Tensor:
        """states: [n, hidden], targets: [n] -> sum of the losses."""
        logits = functional.linear(states, self.embed_tokens.weight)
        return functional.cross_entropy(logits.float(), targets, reduction="sum")


def rotate_half(x: Tensor) -> Tensor:
    """(a, b) -> (-b, a) over the halves of the last dimension."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat((-b, a), dim=-1)


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE tokenizer that begins each text with BEGIN, as Llama 3's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    specials = [AddedToken(t, special=True, normalized=False) for t in (BEGIN, END, SYSTEM, USER, ASSISTANT)]
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
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


def marked(document: list[Turn]) -> Iterator[tuple[str, bool]]:
    """The pieces of a document as the chat template writes it, and whether the model shall learn to write them."""
    yield BEGIN, False
    for turn in document:
        if not turn.role:
            yield f"{turn.text}{END}", True
        else:
            yield f"<|{turn.role}|>", False
            yield f"{turn.text}{END}", turn.role == "assistant"


def make_tokenizer() -> Tokenizer:
    """That of the checkpoint."""
    writer = Writer(seed=0)
    return train_tokenizer([turn.text for _ in range(10000) for turn in writer.document()])


class Rows:
    """Documents in token ids, one after another, cut into rows."""

    def __init__(self, tokenizer: Tokenizer, seed: int) -> None:
        self.tokenizer = tokenizer
        self.writer = Writer(seed)
        self.tokens: list[int] = []
        self.targets: list[int] = []

    def batch(self, size: int, length: int) -> tuple[Tensor, Tensor]:
        """Tokens and, shifted by one, what shall be learnt after each of them: [size, length]."""
        wanted = size * length
        while len(self.tokens) <= wanted:
            for text, learnt in marked(self.writer.document()):
                ids = self.tokenizer.encode(text, add_special_tokens=False).ids
                self.tokens += ids
                self.targets += ids if learnt else [IGNORED] * len(ids)
        tokens, targets = torch.tensor(self.tokens[:wanted]), torch.tensor(self.targets[1 : wanted + 1])
        del self.tokens[:wanted], self.targets[:wanted]
        return tokens.view(size, length), targets.view(size, length)


def backward(model: Llama, tokens: Tensor, targets: Tensor) -> float:
    """Mean loss of the targets that are not IGNORED; leaves its gradients. The head goes in pieces that fit a cache."""
    learnt = targets != IGNORED
    total = 0.0
    with torch.autocast(tokens.device.type, torch.bfloat16):
        states = model(tokens)[learnt]
        leaf = states.detach().requires_grad_()
        for part, expected in zip(leaf.split(256), targets[learnt].split(256), strict=True):
            loss = model.loss(part, expected) / len(leaf)
            loss.backward()
            total += loss.item()
    states.backward(leaf.grad)
    return total


def train(model: Llama, rows: Rows, steps: int, device: torch.device, state: Path | None) -> None:
    """Muon for the layers' matrices, AdamW for the embedding and the norms.

    The rate rises, stays, and falls in the last third. So a run that left its state can go on to any number of steps
    whose last third has not begun, and comes to what one run would.
    """
    matrices = [p for p in model.layers.parameters() if p.dim() == 2]
    others = [model.embed_tokens.weight, *(p for p in model.parameters() if p.dim() == 1)]
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.Muon(matrices, lr=0.006, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.005, betas=(0.9, 0.95), weight_decay=0.0),
    ]
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    parts: list[nn.Module | torch.optim.Optimizer] = [model, *optimizers]
    done = 0
    if state and state.exists():
        done, *saved = torch.load(state)
        for part, value in zip(parts, saved, strict=True):
            part.load_state_dict(value)
    progress = tqdm(range(steps), mininterval=10)
    for step in progress:
        rows.writer.mixture = [mixture for start, mixture in COURSE if step >= start][-1]
        # Mostly short rows, which cost less attention; the long ones teach the positions of a long conversation.
        tokens, targets = rows.batch(1, 2048) if step % 8 == 7 else rows.batch(8, 256)
        if step < done:
            continue
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * min((step + 1) / 40, 1.0, 3 * (steps - step) / steps)
        loss = backward(model, tokens.to(device), targets.to(device))
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        if step % 20 == 0:
            progress.set_postfix(loss=f"{loss:.3f}", refresh=False)
        if state and step % 50 == 49:
            torch.save([step + 1, *(part.state_dict() for part in parts)], state)


@torch.no_grad()
def held_out_loss(model: Llama, rows: Rows, device: torch.device) -> float:
    """Mean over documents of another seed."""
    total, count = 0.0, 0
    for _ in range(16):
        tokens, targets = (part.to(device) for part in rows.batch(12, 256))
        learnt = targets != IGNORED
        total += model.loss(model(tokens)[learnt], targets[learnt]).item()
        count += int(learnt.sum())
    return total / count


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
    write_json(directory / "generation_config.json", {**ids, "do_sample": True, "temperature": 0.4, "top_p": 0.9})
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
    weights = {
        f"model.{name}": value.detach().cpu().bfloat16().contiguous() for name, value in model.state_dict().items()
    }
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})
    (directory / "model.safetensors").chmod(0o644)


def main() -> None:
    """Trains and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=2400)
    parser.add_argument("--output", type=Path, default=HOME / "checkpoint")
    parser.add_argument("--state", type=Path, help="file in which the run is kept, and from which it goes on")
    arguments = parser.parse_args()

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer = make_tokenizer()
    model = Llama(Shape(vocab_size=tokenizer.get_vocab_size())).to(device)
    train(model, Rows(tokenizer, seed=1), arguments.steps, device, arguments.state)
    write_checkpoint(arguments.output, model, tokenizer)
    print(f"held-out loss {held_out_loss(model, Rows(tokenizer, seed=2), device):.3f} nats a token")


if __name__ == "__main__":
    main()
