"""Do a worker and a router read text alike? Both digest their tokenizer and chat template, and a router compares.

The model takes token ids: those of another tokenizer are other words to it, and a chat in another form is one it was
not trained on. A worker announces the digests of what lies with its model in its `WorkerInfo`. A router uses no worker
of another tokenizer, and warns of another template. The digests are of what text becomes, not of how a file is
written: libraries of different versions save one tokenizer differently.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import blake2b

from penstock.common.messages import WorkerInfo
from penstock.common.tokenizer import Tokenizer

# Case, blanks, digits, marks, scripts, combined characters, code: where tokenizers with one vocabulary still part.
PROBE_TEXTS = (
    "",
    "The quick brown fox can't jump over 1234567890 lazy dogs; we'll see, HE'LL SAY.",
    "  two blanks,\ttabs\t\tand\r\nlines\n\n\n   indented   \n",
    "def f(x):\n    return x**2 != 3.14e-10  # <|end|> </s> [INST]\n",
    "Grüße, señor! Ångström, Å, naïve café, e\u0301, ﬁne, ½ + ²",
    "水力発電は高い所の水を使う。 Вода течёт вниз. المياه تجري إلى أسفل. नदी बहती है।",
    "🙂👩‍🚒🇳🇴 \u200b\u00a0 https://example.org/a?b=c&d=%20e",
)
TEMPLATES = ("default", "tool_use")


@dataclass(frozen=True)
class TextProbe:
    """Digests, "" of what is missing: then nothing is compared."""

    tokenizer: str = ""
    template: str = ""

    @classmethod
    def of(cls, tokenizer: Tokenizer, *, with_template: bool = True) -> TextProbe:
        """What this tokenizer makes of the probes; its template, which a router may have been told to pass over."""
        vocabulary = sorted(tokenizer.vocabulary().items())
        texts = [
            str(tokenizer.encode(text, add_special_tokens=special)) for text in PROBE_TEXTS for special in (False, True)
        ]
        read = _digest([*(f"{token} {token_id}" for token, token_id in vocabulary), *texts])
        templates = [tokenizer.chat_templates.get(name, "") for name in TEMPLATES]
        if not with_template or not any(templates):
            return cls(read)
        named = [f"{name} {text}" for name, text in sorted(tokenizer.special_tokens.items())]
        return cls(read, _digest([*templates, *named]))

    def refusal(self, worker: WorkerInfo) -> str:
        """Why a router that reads text like this must not use the worker; "" if it may."""
        if not _differ(self.tokenizer, worker.tokenizer_probe):
            return ""
        return (
            f"its tokenizer is another: the probes give {worker.tokenizer_probe} there and {self.tokenizer} here; "
            f"give routers and workers the same model, or the same --tokenizer, and the same version of tokenizers"
        )

    def warning(self, worker: WorkerInfo) -> str:
        """What is to be said of a worker that may be used; "" if nothing is."""
        if not _differ(self.template, worker.template_probe):
            return ""
        return (
            f"the chat template or special tokens with its model are others ({worker.template_probe} there, "
            f"{self.template} here): if chats shall be rendered otherwise, name the file with --chat-template"
        )


def _differ(ours: str, theirs: str) -> bool:
    return bool(ours and theirs) and ours != theirs


def _digest(lines: Iterable[str]) -> str:
    digest = blake2b(digest_size=16)
    for line in lines:
        encoded = line.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(encoded) + encoded)
    return digest.hexdigest()
