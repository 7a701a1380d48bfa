"""The page in a real browser, where there is one."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import pliant
from serving import Server, running_server, wait_until
from tiny import roomy, write_tiny_pack

BROWSER = shutil.which("chromium") or shutil.which("chromium-browser")
sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
sync_api.expect.set_options(timeout=30_000)  # a busy machine is no failure
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no chromium on this machine")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    path = write_tiny_pack(tmp_path_factory.mktemp("page") / "tiny.pack", least=2, layers=30)
    with (
        pliant.load(path, memory=f"{roomy(320)}MiB", sessions=4, answers=16) as model,
        running_server(model) as running,
    ):
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(
            executable_path=BROWSER, args=["--no-sandbox", "--disable-gpu"]
        )
        yield found
        found.close()


@pytest.fixture
def page(browser: Any, server: Server) -> Iterator[Any]:
    context = browser.new_context(viewport={"width": 1200, "height": 900})
    made = context.new_page()
    mistakes: list[str] = []
    strangers: list[str] = []
    made.on("pageerror", lambda error: mistakes.append(str(error)))
    made.on("console", lambda said: mistakes.append(said.text) if said.type == "error" else None)
    made.on(
        "request",
        lambda asked: (
            None if asked.url.startswith((server.url, "data:")) else strangers.append(asked.url)
        ),
    )
    made.goto(server.url)
    sync_api.expect(made.locator("#model")).to_have_text("tiny")
    yield made
    context.close()
    assert strangers == []
    # A refused budget is an answer of 409, and the browser's console says so.
    assert [text for text in mistakes if "409" not in text] == []


def test_a_chat_on_the_page(page: Any, server: Server) -> None:
    page.locator("#temperature").fill("0")
    page.locator("#length").fill("12")
    page.locator("#prompt").fill("hi")
    page.keyboard.press("Enter")
    sync_api.expect(page.locator(".message.assistant .made")).to_contain_text("12 tokens")
    prompt = server.model.chat_prompt([{"role": "user", "content": "hi"}])
    expected = "".join(server.model.generate(prompt, max_tokens=12))
    assert page.locator(".message.assistant span:nth-child(2)").text_content() == expected
    assert page.locator(".message.user").inner_text().endswith("hi")
    page.locator("#length").fill("200")
    page.locator("#prompt").fill("again")
    page.locator("#send").click()
    sync_api.expect(page.locator("#send")).to_be_enabled()
    page.locator("#clear").click()
    assert page.locator(".message").count() == 0


@pytest.mark.own_process
def test_the_budget_is_moved_by_hand_by_keys_and_by_text(page: Any, server: Server) -> None:
    model = server.model
    least, most = model.least_plan().total, model.plan_for().total
    line = page.locator("#line")
    assert line.get_attribute("role") == "slider"
    size = min(roomy(290), 1023)  # so that it is shown in MiB
    page.locator("#size").fill(f"{size}MiB")
    page.locator("#size").press("Enter")
    wait_until(lambda: model.budget == size * 2**20)
    sync_api.expect(page.locator("#line-text")).to_have_text(f"{size} MiB")
    middle = (least + most) // 2
    box, held = page.locator("#chart").bounding_box(), line.bounding_box()
    top = 1.06 * size * 2**20
    page.mouse.move(held["x"] + 50, held["y"] + held["height"] / 2)
    page.mouse.down()
    page.mouse.move(held["x"] + 50, box["y"] + box["height"] * (1 - middle / top), steps=5)
    page.mouse.up()
    wait_until(lambda: model.budget is not None and abs(model.budget - middle) < 20 * 2**20)
    sync_api.expect(page.locator("#budget-note")).to_contain_text("bits per weight")
    line.focus()
    page.keyboard.press("Home")
    wait_until(lambda: model.budget == -(-least // 2**20) * 2**20)
    page.locator("#size").fill("1MiB")
    page.locator("#budget-form button").first.click()
    sync_api.expect(page.locator("#budget-note")).to_contain_text("too little")
    page.locator("#no-limit").click()
    wait_until(lambda: model.budget is None)
    sync_api.expect(page.locator("#line-text")).to_have_text("no limit")
    page.locator("#size").fill(f"{size + 20}MiB")
    page.locator("#size").press("Enter")
    wait_until(lambda: model.budget == (size + 20) * 2**20)


def test_the_memory_is_a_picture_and_a_table(page: Any, server: Server) -> None:
    sync_api.expect(page.locator("#areas polygon").first).to_be_attached()
    assert page.locator("#areas polygon").count() == len(server.model.ledger.owners())
    page.locator("summary").click()
    owners = page.locator("#ledger tbody th").all_inner_texts()
    assert {"weights", "kv", "interpreter"} <= set(owners)
    rows = page.locator("#depth tbody tr")
    assert rows.count() == 8  # seven kinds of matrices, and the embedding
    assert page.locator("#depth tbody tr").nth(1).locator("td").count() == 30
    assert "plies" in page.locator("#depth tbody td").first.get_attribute("title")


def test_everything_has_a_name_and_the_keyboard_reaches_it(page: Any) -> None:
    unnamed = page.evaluate("""() => [...document.querySelectorAll('input,textarea,button,[role]')]
        .filter((one) => !one.hidden && !one.closest('[hidden]')
            && !(one.labels && one.labels.length) && !one.textContent.trim()
            && !one.getAttribute('aria-label') && !one.getAttribute('aria-labelledby')
            && one.getAttribute('role') !== 'status')
        .map((one) => one.outerHTML)""")
    assert unnamed == []
    seen = set()
    page.locator("body").focus()
    for _ in range(20):
        page.keyboard.press("Tab")
        seen.add(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
    assert {"prompt", "send", "line", "size", "log", "temperature"} <= seen


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1200, 400])
def test_it_fits_and_can_be_read(page: Any, scheme: str, width: int, tmp_path: Path) -> None:
    page.emulate_media(color_scheme=scheme)
    page.set_viewport_size({"width": width, "height": 900})
    page.wait_for_timeout(50)
    assert page.evaluate("document.documentElement.scrollWidth <= window.innerWidth")
    contrast = page.evaluate("""() => {
        const rgb = (text) => text.match(/[\\d.]+/g).slice(0, 3).map(Number);
        const light = (text) => rgb(text).map((v) => v / 255)
            .map((v) => v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
        const ratio = (a, b) => (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        const style = (id) => getComputedStyle(document.querySelector(id));
        const back = light(style('section').backgroundColor);
        return ['body', '.hint', '#work dt', '#line-text']
            .map((id) => ratio(light(style(id).color), back))
            .concat([...document.querySelectorAll('#depth tbody td')].map((cell) =>
                ratio(light(cell.style.color), light(cell.style.background))));
    }""")
    assert min(contrast) >= 3.0
    assert min(contrast[:4]) >= 4.5  # WCAG 2.2, AA
    page.screenshot(path=tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size > 10_000
