"""The page at /ui in a real browser, over a real fleet: a message typed, tokens streamed, the waterfall drawn.

Needs Chromium (Debian's `chromium`, which .ci/run installs). Two pictures are kept: test-artifacts/ui*.png.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from playwright.sync_api import ConsoleMessage, Locator, Page, Route, expect, sync_playwright

from penstock.demo_model import CHECKPOINT
from tests.system.fleets import fleet

ARTIFACTS = Path(__file__).resolve().parents[2] / "test-artifacts"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")

WITHIN_MS = 60_000  # for what a browser does at once where nobody else is busy
expect.set_options(timeout=WITHIN_MS)

pytestmark = pytest.mark.skipif(
    CHROMIUM is None and not os.environ.get("TEST_BROWSER"),
    reason="needs Chromium; TEST_BROWSER=1 makes its absence a failure",
)


@pytest.fixture
def page() -> Iterator[Page]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=CHROMIUM, timeout=WITHIN_MS, args=["--no-sandbox", "--disable-gpu"]
        )
        page = browser.new_page(viewport={"width": 1280, "height": 800})
        page.set_default_timeout(WITHIN_MS)
        faults: list[str] = []
        page.on("pageerror", lambda error: faults.append(str(error)))
        page.on("console", lambda message: faults.append(message.text) if _is_fault(message) else None)
        yield page
        browser.close()
        assert not faults, faults


def _is_fault(message: ConsoleMessage) -> bool:
    """The browser also notes answers that are errors; the page shows those itself."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def test_a_conversation(page: Page) -> None:
    options = {
        "routing_policy": "round-robin",
        "served_model_name": ("penstock-demo",),
    }  # hands the prompt off for sure
    with fleet(CHECKPOINT, prefill_workers=1, decode_workers=1, **options) as running:
        page.goto(f"{running.url}/ui")
        expect(page.locator("#model option")).to_have_text("penstock-demo")
        expect(page.locator("#workers tr")).to_have_count(2)
        page.fill("#temperature", "0")
        page.fill("#limit", "120")
        page.fill("#prompt", "What is a penstock?")
        page.press("#prompt", "Enter")
        answer = page.locator(".message[data-role=assistant]")
        expect(answer).to_contain_text(re.compile("assistant.{5,}"))
        expect(page.locator(".waterfall")).to_have_count(1)
        assert said(answer) == running_answer(running.url, 120), "the page shows what the API says"
        expect(answer.locator("small")).to_contain_text(
            re.compile(r"tokens in, \d+ out · first after \d+ ms · then \d+")
        )
        for name in ("prefill", "transfer", "decode"):
            expect(page.locator(f".waterfall .lane .{name}")).to_have_count(1)
        boxes = page.locator(".waterfall .lane i").all()
        assert all((box.bounding_box() or {"width": 0})["width"] > 0 for box in boxes)
        expect(page.locator("#totals")).to_contain_text("2 finished")

        page.fill("#limit", "100000")
        page.fill("#prompt", "And a mill?")
        page.click("#send")
        expect(answer.last).to_contain_text("maximum context length is 2048")
        expect(page.locator("#prompt")).to_have_value("And a mill?")  # to be sent again
        page.fill("#limit", "1500")
        page.route("**/v1/chat/completions", never_ending)
        page.click("#send")
        expect(answer.last).to_contain_text(re.compile("assistant.{5,}"))
        page.click("#stop")
        expect(answer.last.locator("small")).to_have_text("stopped")
        expect(page.locator("#totals")).to_contain_text("0 in flight")
        page.screenshot(path=ARTIFACTS / "ui.png")
        page.click("#new")
        expect(page.locator(".message")).to_have_count(0)

        page.route("**/fleet", twenty_workers)
        expect(page.locator("#workers tr")).to_have_count(20)
        expect(page.locator("#workers tr").nth(1)).to_contain_text("draining")
        expect(page.locator(".waterfall").first).to_be_in_viewport()
        page.screenshot(path=ARTIFACTS / "ui-20-workers.png")


def said(answer: Locator) -> str:
    """A message's text without what stands around it."""
    script = "message => [...message.childNodes].filter(n => n.nodeType === Node.TEXT_NODE).map(n => n.data).join('')"
    return str(answer.evaluate(script)).strip()


def never_ending(route: Route) -> None:
    route.continue_(post_data=json.dumps({**route.request.post_data_json, "ignore_eos": True}))


def twenty_workers(route: Route) -> None:
    answer = route.fetch()
    fleet = answer.json()
    one = fleet["workers"][0]
    fleet["workers"] = [
        {**one, "worker_id": f"{one['role']}-of-host-{number}", "state": "draining" if number == 1 else "up"}
        for number in range(20)
    ]
    route.fulfill(response=answer, json=fleet)


def running_answer(url: str, max_tokens: int) -> str:
    body = {
        "messages": [{"role": "user", "content": "What is a penstock?"}],
        "max_tokens": max_tokens,
        "temperature": 0,
    }
    answer = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=60).raise_for_status().json()
    return str(answer["choices"][0]["message"]["content"]).strip()


def test_a_key_is_asked_for(page: Page) -> None:
    with fleet(CHECKPOINT, decode_workers=1, prefill_workers=0, api_key=("secret",)) as running:
        page.goto(f"{running.url}/ui")
        expect(page.locator("#state")).to_contain_text("API key is missing or wrong")
        page.fill("#key", "secret")
        expect(page.locator("#workers tr")).to_have_count(1)
        expect(page.locator("#state")).to_be_empty()
