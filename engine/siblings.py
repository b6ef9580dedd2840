"""Choices of one request share the full pages of their prompt: one computes them, the others wait for it. Pure."""

from __future__ import annotations

from penstock.engine.pages import PageManager
from penstock.engine.request import Request


class Siblings:
    """Which choice of each request computes their prompt's pages now."""

    def __init__(self, pages: PageManager) -> None:
        self._pages = pages
        self._leading: dict[str, Request] = {}  # by request id

    def __bool__(self) -> bool:
        """Whether anybody leads."""
        return bool(self._leading)

    def computes_for(self, request_id: str) -> bool:
        """Whether a choice of this request computes the pages that all of them share."""
        return request_id in self._leading

    def shared_tokens(self, request: Request) -> int:
        """Tokens in the full pages that all choices of a request may share."""
        return (request.prompt_len - 1) // self._pages.page_size * self._pages.page_size

    def waits(self, request: Request) -> bool:
        """Another choice of the request computes the full pages of their prompt: it will find them in the cache."""
        leader = self._leading.get(request.source.request_id)
        return leader is not None and not request.scores_prompt and not self._pages.table(request.key)

    def lead(self, request: Request) -> None:
        """A request joins the batch: if it computes pages of its prompt, its siblings wait for them."""
        if self._pages.caching and request.computed < self.shared_tokens(request):
            self._leading.setdefault(request.source.request_id, request)

    def stop(self, request: Request) -> None:
        """The pages are there, or will not be: siblings need not wait for this one."""
        if self._leading.get(request.source.request_id) is request:
            del self._leading[request.source.request_id]
