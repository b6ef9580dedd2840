"""The page at /ui in a real browser, over a real fleet: a message typed, tokens streamed, the waterfall drawn.

Needs Chromium (Debian's `chromium`, which .ci/run installs). The last picture is kept: test-artifacts/ui.png.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import ConsoleMessage, Page, expect, sync_playwright

from penstock.demo_model import CHECKPOINT
from tests.system.fleets import fleet

ARTIFACTS = Path(__file__).resolve().parents[2] / "test-artifacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("TEST_BROWSER"),
    reason="needs Chromium; TEST_BROWSER=1 makes its absence a failure",
)


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if _is_fault(message) else None)
        yield page
        browser.close()
        assert not faults, faults


def _is_fault(message: ConsoleMessage) -> bool:
    """The browser also notes answers that are errors; the page shows those itself."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


@pytest.mark.timeout(180)
def test_a_conversation(page: Page) -> None:
    with fleet(CHECKPOINT, prefill_workers=1, decode_workers=1, served_model_name=("penstock-demo",)) as running:
        page.goto(f"{running.url}/ui")
        expect(page.locator("#model option")).to_have_text("penstock-demo")
        expect(page.locator("#workers tr")).to_have_count(2)
        page.fill("#temperature", "0")
        page.fill("#limit", "120")
        page.fill("#prompt", "What is a penstock?")
        page.press("#prompt", "Enter")
        answer = page.locator(".message[data-role=assistant]")
        expect(answer).to_contain_text(re.compile("assistant.{5,}"), timeout=60_000)
        expect(page.locator(".waterfall")).to_have_count(1, timeout=60_000)
        text = answer.inner_text().removeprefix("assistant").strip()
        told = running_answer(running.url, 120)
        assert text == told, "the page shows what the API says"
        for name in ("prefill", "transfer", "decode"):
            expect(page.locator(f".waterfall .lane .{name}")).to_have_count(1)
        boxes = page.locator(".waterfall .lane i").all()
        assert all((box.bounding_box() or {"width": 0})["width"] > 0 for box in boxes)
        expect(page.locator("#totals")).to_contain_text("2 finished")

        page.fill("#prompt", "And a mill?")
        page.fill("#limit", "100000")
        page.click("#send")
        expect(answer.last).to_contain_text("maximum context length is 2048")
        ARTIFACTS.mkdir(exist_ok=True)
        page.screenshot(path=ARTIFACTS / "ui.png")


def running_answer(url: str, max_tokens: int) -> str:
    body = {
        "messages": [{"role": "user", "content": "What is a penstock?"}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"]).strip()


@pytest.mark.timeout(120)
def test_a_key_is_asked_for(page: Page) -> None:
    with fleet(CHECKPOINT, decode_workers=1, prefill_workers=0, api_key=("secret",)) as running:
        page.goto(f"{running.url}/ui")
        expect(page.locator("#state")).to_contain_text("API key is missing or wrong")
        page.fill("#key", "secret")
        expect(page.locator("#workers tr")).to_have_count(1)
        expect(page.locator("#state")).to_be_empty()
