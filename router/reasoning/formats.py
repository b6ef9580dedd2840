"""The reasoning formats that are known. Sources: the models' chat templates and cards."""

from __future__ import annotations

from penstock.router.reasoning.parser import Marked


class DeepSeekR1(Marked):
    """`<think>…</think>`; the start is often the template's. DeepSeek-R1 and its distillations, QwQ."""

    names = ("deepseek_r1",)
    starts, ends = ("<think>",), ("</think>",)
    markers = starts + ends
    inside = True


class Qwen3(DeepSeekR1):
    """`<think>…</think>`, where a tool call may come without the end. Qwen3 and later."""

    names = ("qwen3",)
    implied_ends = ("<tool_call>",)


class Mistral(Marked):
    """`[THINK]…[/THINK]`. Magistral and later."""

    names = ("mistral",)
    starts, ends = ("[THINK]",), ("[/THINK]",)
    markers = starts + ends


class Granite(Marked):
    """Two sentences of plain text, which quantised models shorten. IBM Granite 3.2 and 3.3."""

    names = ("granite",)
    starts = ("Here is my thought process:", "Here's my thought process:")
    ends = ("Here is my response:", "Here's my response:")
