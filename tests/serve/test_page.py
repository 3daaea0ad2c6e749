"""The chat page in headless Chromium, with a real server; malicious answers are mocked."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from headless import browser  # noqa: F401  (a fixture)
from live_server import LiveServer, live_server, tiny_engine, wait_for
from lmchat.serve.limits import Limits

Open = Callable[..., Any]


SHORT_ANSWERS = """try { localStorage["lmchat.settings"] ??= '{"max_tokens": 24}'; } catch { /* about:blank */ }"""


@pytest.fixture(scope="module")
def tab(browser: Any) -> Iterator[Any]:  # noqa: F811
    """The tab of all tests, since a new one costs a second; it has answers of few tokens."""
    context = browser.new_context(accept_downloads=True)
    context.add_init_script(SHORT_ANSWERS)
    context.set_default_timeout(15_000)
    yield context.new_page()
    context.close()


@pytest.fixture
def empty_tab(tab: Any, live: LiveServer) -> Any:
    """The tab without the storage, routes, sizes and further tabs of earlier tests."""
    for other in tab.context.pages:
        if other != tab:
            other.close()
    tab.unroute_all()
    tab.goto(f"{live.url}/health")
    tab.evaluate("localStorage.clear(); sessionStorage.clear()")
    tab.set_viewport_size({"width": 1280, "height": 800})
    tab.mouse.move(0, 0)
    return tab


@pytest.fixture
def open_page(browser: Any, empty_tab: Any, live: LiveServer) -> Iterator[Open]:  # noqa: F811
    """Opens the page; at the end asserts that there were no errors and no requests to other servers.

    With a script, which runs before the page's own, in a new context.
    """
    problems: list[str] = []
    listeners: dict[str, Callable[..., Any]] = {
        "pageerror": lambda error: problems.append(str(error)),
        "console": lambda message: problems.append(message.text) if is_problem(message) else None,
        "dialog": lambda dialog: dialog.accept(),
        "request": lambda request: (
            None if request.url.startswith((live.url, "blob:")) else problems.append(request.url)
        ),
    }
    pages = []

    def open_it(width: int = 1280, color_scheme: str = "light", script: str = "") -> Any:
        page = empty_tab
        if script:
            page = browser.new_page()
            page.add_init_script(script)
        pages.append(page)
        for event, listener in listeners.items():
            page.on(event, listener)
        page.set_viewport_size({"width": width, "height": 800})
        page.emulate_media(color_scheme=color_scheme)
        page.goto(live.url)
        page.wait_for_selector("#model-details:not(:empty)")
        return page

    yield open_it
    for page in pages:
        if page == empty_tab:
            for event, listener in listeners.items():
                page.remove_listener(event, listener)
        else:
            page.context.close()
    assert not problems


def is_problem(message: Any) -> bool:
    """Whether a console message is an error other than a response's status, which the browser also logs."""
    return message.type == "error" and not message.text.startswith("Failed to load resource")


def ask(page: Any, text: str) -> None:
    page.fill("#question", text)
    page.keyboard.press("Enter")
    page.wait_for_selector(".message.assistant .tools >> nth=-1")
    page.wait_for_selector("#send:not([hidden])", state="visible")


def texts(page: Any, role: str) -> list[str]:
    return [str(text) for text in page.locator(f".message.{role} > .body").all_inner_texts()]


def stored(page: Any) -> list[dict[str, Any]]:
    script = "Object.keys(localStorage).filter(k => k.startsWith('lmchat.conversation.')).map(k => localStorage[k])"
    return [json.loads(text) for text in page.evaluate(script)]


def answer_with(page: Any, *parts: tuple[str, str], reason: str = "stop") -> list[dict[str, Any]]:
    """Mocks the server's answer to the page; returns the bodies of its requests."""
    chunks: list[dict[str, Any]] = [
        {"choices": [{"index": 0, "delta": {"parts": [{"type": kind, "text": text}]}, "finish_reason": None}]}
        for kind, text in parts
    ]
    chunks.append({"choices": [{"index": 0, "delta": {}, "finish_reason": reason}]})
    body = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in chunks) + "data: [DONE]\n\n"
    bodies: list[dict[str, Any]] = []

    def reply(route: Any) -> None:
        bodies.append(json.loads(route.request.post_data))
        route.fulfill(status=200, content_type="text/event-stream", body=body)

    page.route("**/v1/chat/completions", reply)
    return bodies


def test_several_turns_are_kept_and_sent(open_page: Open) -> None:
    page = open_page()
    assert "tiny-sft-7" in page.inner_text("header") and "step 7" in page.inner_text("header")
    ask(page, "One")
    bodies = answer_with(page, ("text", "Two?"))
    ask(page, "Two")
    assert texts(page, "user") == ["One", "Two"] and texts(page, "assistant")[1] == "Two?"
    assert [message["role"] for message in bodies[0]["messages"]] == ["user", "assistant", "user"]
    [conversation] = stored(page)
    assert bodies[0]["messages"][1]["content"] == conversation["messages"][1]["parts"] != []
    page.reload()
    assert texts(page, "user") == []
    page.click("#conversations .open")
    assert texts(page, "user") == ["One", "Two"]


def test_stop_keeps_the_partial_answer_and_frees_the_slot(open_page: Open, live: LiveServer) -> None:
    page, step = open_page(), live.server.engine.step

    def slow_step() -> Any:
        time.sleep(0.05)
        return step()

    live.server.engine.step = slow_step  # type: ignore[method-assign]
    try:
        page.fill("#question", "Hello")
        page.click("#send")
        wait_for(lambda: page.evaluate("document.querySelector('.busy > .body')?.textContent.length > 2"))
        page.keyboard.press("Escape")
        page.wait_for_selector("text=stopped")
        assert texts(page, "assistant")[0]
        wait_for(lambda: len(live.server.engine.scheduler.running) == 0)
    finally:
        live.server.engine.step = step  # type: ignore[method-assign]
    assert page.evaluate("document.activeElement.id") == "question"


def test_regenerate_and_edit(open_page: Open) -> None:
    page = open_page()
    ask(page, "First")
    ask(page, "Second")
    bodies = answer_with(page, ("text", "Again"))
    page.locator(".message.assistant").nth(0).get_by_label("Regenerate").click()
    page.wait_for_selector("text=Again")
    assert texts(page, "user") == ["First"] and texts(page, "assistant") == ["Again"]
    page.locator(".message.user").hover()
    page.get_by_label("Edit", exact=True).click()
    page.fill(".editor textarea", "Other")
    page.keyboard.press("Enter")
    wait_for(lambda: texts(page, "user") == ["Other"] and page.is_visible("#send"))
    assert [body["messages"][-1]["content"] for body in bodies] == ["First", "Other"]
    assert [len(each["messages"]) for each in stored(page)] == [2]


def test_a_reload_keeps_the_partial_answer(open_page: Open, live: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    page, step = open_page(), live.server.engine.step
    monkeypatch.setattr(live.server.engine, "step", lambda: time.sleep(0.05) or step())
    page.fill("#question", "Hello")
    page.keyboard.press("Enter")
    wait_for(lambda: page.evaluate("document.querySelector('.busy > .body')?.textContent.length > 2"))
    page.reload()
    wait_for(lambda: len(live.server.engine.scheduler.running) == 0)
    page.click("#conversations .open")
    assert texts(page, "assistant")[0] and "stopped" in page.inner_text(".note") and not page.locator(".error").count()


def test_the_end_of_an_answer_does_not_scroll_a_reader_down(
    open_page: Open, live: LiveServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    page, step = open_page(), live.server.engine.step
    answer_with(page, ("text", "line\n\n" * 100))
    ask(page, "One")
    page.unroute("**/v1/chat/completions")
    monkeypatch.setattr(live.server.engine, "step", lambda: time.sleep(0.05) or step())
    for reads_on, position in ((True, 0), (False, 1)):
        page.fill("#question", "Two")
        page.keyboard.press("Enter")
        wait_for(lambda: page.evaluate("document.querySelector('.busy > .body')?.textContent.length > 2"))
        page.evaluate(f"document.getElementById('log').scrollTop = {0 if reads_on else 10**6}")
        page.keyboard.press("Escape")
        page.wait_for_selector("#send:not([hidden])")
        place = "(log => log.scrollTop / (log.scrollHeight - log.clientHeight))(document.getElementById('log'))"
        assert page.evaluate(place) == pytest.approx(position, abs=0.01)


def test_a_second_tab_does_not_lose_the_first_ones_turns(open_page: Open) -> None:
    page = open_page()
    ask(page, "One")
    with page.context.expect_page() as opened:
        page.evaluate("open(location.href)")
    other = opened.value
    other.click("#conversations .open")
    ask(other, "Two")
    wait_for(lambda: texts(page, "user") == ["One", "Two"] and texts(page, "assistant") == texts(other, "assistant"))
    ask(page, "Three")
    assert [len(each["messages"]) for each in stored(page)] == [6]


NO_STORAGE = """for (const name of ["localStorage", "sessionStorage"])
    Object.defineProperty(window, name, { get() { throw new DOMException("denied", "SecurityError"); } });"""
NO_ROOM = "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };"


@pytest.mark.parametrize("script", [NO_STORAGE, NO_ROOM], ids=["denied", "full"])
def test_without_storage_the_page_answers_and_warns(open_page: Open, script: str) -> None:
    page = open_page(script=script)
    answer_with(page, ("text", "Ok"))
    assert not page.is_visible("#notice")
    ask(page, "Hi")
    assert texts(page, "assistant") == ["Ok"]
    page.wait_for_selector("[role=alert] >> text=cannot keep the conversation")
    page.click("#new")
    assert not page.is_visible("#notice")


def test_damaged_storage_is_left_out(open_page: Open) -> None:
    page = open_page()
    answer_with(page, ("text", "Ok"))
    ask(page, "Kept")
    [kept] = stored(page)
    damaged = [{"id": "../x"}, {"title": 7}, {"updated": "x"}, {"created": None}, {"messages": kept["messages"][:1]}]
    damaged += [{"messages": kept["messages"][::-1]}, {"messages": [None]}, {"messages": 5}]
    values = [json.dumps({**kept, "id": str(number), **each}) for number, each in enumerate(damaged)]
    settings = ["{", "5", "[]", '{"system": 7, "temperature": "hot", "seed": "x", "max_tokens": null}']
    set_item = "([key, value]) => localStorage.setItem(key, value)"
    for number, value in enumerate([*values, "5", "null", "{", "[]"]):
        page.evaluate(set_item, [f"lmchat.conversation.{number}", value])
    without_settings = json.dumps({**kept, "settings": {"system": 3}})
    page.evaluate(set_item, [f"lmchat.conversation.{kept['id']}", without_settings])
    for value in settings:
        page.evaluate(set_item, ["lmchat.settings", value])
        page.reload()
        assert page.locator("#conversations .open").all_inner_texts() == ["Kept"]
        bodies = answer_with(page, ("text", "Ok"))
        ask(page, "New")
        assert (bodies[0]["temperature"], bodies[0]["max_tokens"]) == (0.6, 256) and len(bodies[0]["messages"]) == 1
        page.get_by_label("Delete New").click(force=True)
    page.click("#conversations .open")
    ask(page, "More")
    assert len(bodies[-1]["messages"]) == 3


def test_a_server_that_comes_back_with_another_model(open_page: Open) -> None:
    page = open_page()
    page.route("**/v1/*", lambda route: route.abort())
    page.route("**/v1/chat/completions", lambda route: route.abort())
    page.fill("#question", "Hi")
    page.keyboard.press("Enter")
    assert "does not answer" in page.inner_text(".error") and "no connection" in page.inner_text("header")
    card = {"id": "other-1", "max_model_len": 9, "details": {"stage": "rl", "step": 1, "parameters": 5e6}}
    page.route("**/v1/models", lambda route: route.fulfill(json={"data": [card]}))
    bodies = answer_with(page, ("text", "Here again"))
    page.click("text=Try again")
    page.wait_for_selector("text=Here again")
    assert bodies[0]["model"] == "other-1" and "other-1" in page.inner_text(".note")
    assert "other-1" in page.inner_text("header")
    missing = {"error": {"message": "there is no model 'other-1' here", "code": "model_not_found"}}
    page.route("**/v1/chat/completions", lambda route: route.fulfill(status=404, json=missing))
    card["id"] = "third-1"
    page.fill("#question", "Hi")
    page.keyboard.press("Enter")
    page.wait_for_selector(".error")
    assert "third-1" in page.inner_text("header")


HOSTILE = (
    """<script>window.hacked = 1</script><img src=x onerror="window.hacked = 1">
[click](javascript:window.hacked=1) [data](data:text/html,<script>window.hacked=1</script>)
**<svg onload="window.hacked=1">** `<iframe src="javascript:window.hacked=1">` ![x](http://example.org/a.png)

```html"><script>window.hacked=1</script>
</code></pre><script>window.hacked = 1</script>
```

<https://example.org/"onmouseover="window.hacked=1> http://example.org/"><script>window.hacked=1</script>
"""
    + ">" * 5000
    + "\n"
    + "*" * 3000
    + "a"
    + "[" * 3000
    + "\n"
    + "- " * 2000
)


def test_hostile_answers_stay_text(open_page: Open) -> None:
    page = open_page()
    answer_with(
        page, ("text", HOSTILE), ("python", "<img src=x onerror=window.hacked=1>"), ("python_output", "<b>1</b>")
    )
    ask(page, "<img src=x onerror=window.hacked=1>")
    page.wait_for_timeout(100)
    assert page.evaluate("window.hacked") is None
    assert page.locator("#log script, #log img, #log iframe, #log b").count() == 0
    assert page.locator("#log svg:not(:has(use))").count() == 0
    schemes = page.locator("#log a").evaluate_all("links => links.map(link => new URL(link.href).protocol)")
    assert set(schemes) <= {"http:", "https:"}
    assert "<script>window.hacked = 1</script>" in texts(page, "assistant")[0]


def test_markdown_and_calculator_calls(open_page: Open) -> None:
    page = open_page()
    source = (
        "# Head\n\n1. one **bold**\n2. two\n   - inner *em*\n\n> quote\n\n```py\nx = '<b>'\n```\n\n"
        "| a | b |\n|---|---|\n| 1 | `c` |\n\n---\n"
        "line one\nline two [link](https://example.org/a_(b)) \\*not em\\* snake_case_name 2*3*4\n\n7·7 is "
    )
    answer_with(page, ("text", source), ("python", "7*7"), ("python_output", "49"), ("text", "49."), reason="length")
    ask(page, "Go")
    body = page.locator(".message.assistant > .body")
    selectors = ["h1", "ol > li", "ul > li", "strong", "li em", "blockquote", "pre code", "th", "td code", "hr", "br"]
    found = [[text.strip() for text in body.locator(css).all_inner_texts()] for css in selectors]
    assert found[0] == ["Head"] and found[2] == ["inner em"] and len(found[1]) == 2
    assert found[3][0] == "bold" and found[4] == ["em"] and found[5] == ["quote"] and found[6] == ["x = '<b>'"]
    assert found[7] == ["a", "b"] and found[8] == ["c"] and len(found[9]) == 1
    assert body.locator("a").get_attribute("href") == "https://example.org/a_(b)"
    assert "*not em* snake_case_name" in body.inner_text()
    assert " ".join(page.locator(".call").inner_text().split()) == "calculator: 7*7 = 49"
    assert "cut at the longest answer" in page.inner_text("#log")


def test_settings_system_prompt_and_export(open_page: Open) -> None:
    page = open_page()
    page.click("#settings")
    page.fill("[name=system]", "Be brief.")
    for name, value in {"temperature": "0", "top_k": "7", "top_p": "0.9", "max_tokens": "11", "seed": "3"}.items():
        page.fill(f"[name={name}]", value)
    page.fill("[name=seed]", str(2**53))  # JavaScript would send another number for some of these
    page.click("#settings-dialog .main")
    assert page.is_visible("#settings-dialog")
    page.fill("[name=seed]", "3")
    page.click("#settings-dialog .main")
    bodies = answer_with(page, ("text", "Ok"))
    ask(page, "Hi")
    expected = {"temperature": 0, "top_k": 7, "top_p": 0.9, "max_tokens": 11, "seed": 3, "calculator": True}
    assert expected.items() <= bodies[0].items()
    assert bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    with page.expect_download() as download:
        page.click("#export")
    exported = json.loads(download.value.path().read_text())
    assert exported["messages"] == [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": [{"type": "text", "text": "Ok"}]},
    ]
    page.click("#new")
    ask(page, "Next")
    assert bodies[1]["messages"][0]["content"] == "Be brief."
    assert len(stored(page)) == 2
    page.get_by_label("Delete Hi").click(force=True)
    assert len(stored(page)) == 1


def test_a_too_long_conversation_drops_its_oldest_turns(open_page: Open) -> None:
    page = open_page()
    for number in range(3):
        answer_with(page, ("text", f"{number}" * 190))
        ask(page, "q" * 10)
    page.unroute("**/v1/chat/completions")
    ask(page, "Now a real one")
    assert "without the oldest" in page.locator(".message.assistant .note").last.inner_text()


def test_errors_are_shown_with_a_retry(open_page: Open) -> None:
    page = open_page()
    page.route("**/v1/chat/completions", lambda route: route.fulfill(
        status=200, content_type="text/event-stream",
        body='data: {"error": {"message": "The engine is gone", "code": "engine_failure"}}\n\ndata: [DONE]\n\n',
    ))  # fmt: skip
    page.fill("#question", "Hi")
    page.keyboard.press("Enter")
    assert "The engine is gone" in page.locator(".error").inner_text()
    page.unroute("**/v1/chat/completions")
    page.click("text=Try again")
    page.wait_for_selector(".message.assistant .tools")
    assert page.locator(".error").count() == 0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_screen_and_colours_have_contrast(open_page: Open, width: int, scheme: str) -> None:
    page = open_page(width=width, color_scheme=scheme)
    answer_with(page, ("text", "x" * 300 + "\n\n```\n" + "y" * 300 + "\n```\n\n" + "|a" * 60 + "|\n" + "|-" * 60 + "|"))
    ask(page, "w" * 200)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for selector in ("#log", "header", "#composer"):
        assert (
            page.evaluate(
                f"(({{scrollWidth, clientWidth}}) => scrollWidth - clientWidth)(document.querySelector('{selector}'))"
            )
            <= 0
        )
    colours = page.evaluate("""() => { const get = (css, name) => getComputedStyle(document.querySelector(css))[name];
        return [[get('.assistant > .body', 'color'), get('body', 'backgroundColor')],
                [get('.user > .body', 'color'), get('.user > .body', 'backgroundColor')],
                [get('.note', 'color'), get('body', 'backgroundColor')]] }""")
    assert all(contrast(*pair) >= 4.5 for pair in colours)
    assert (luminance(colours[0][1]) > 0.5) == (scheme == "light")
    page.click("#theme")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "dark"


def test_a_phone_shows_whole_words_and_equal_fields(open_page: Open) -> None:
    page = open_page(width=390)
    cut = page.locator("#model-details").evaluate("shown => shown.scrollWidth - shown.clientWidth")
    assert cut <= 0
    answer_with(page, ("text", "|number|explanation|a column with several words|result|\n|-|-|-|-|\n|1|2|3|4|"))
    ask(page, "Go")
    lines = """cells => cells.map(cell => { const range = document.createRange(); range.selectNodeContents(cell);
        return new Set([...range.getClientRects()].map(rect => rect.top)).size })"""
    one, two, _, four = page.locator(".assistant th").evaluate_all(lines)
    assert one == two == four == 1
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    page.click("#settings")
    fields = page.locator("#settings-dialog input[type=number]")
    assert len(set(fields.evaluate_all("fields => fields.map(field => field.offsetHeight)"))) == 1


def luminance(colour: str) -> float:
    """Relative luminance of WCAG."""
    channels = [int(value) / 255 for value in colour.strip("rgb()").split(",")[:3]]
    linear = [value / 12.92 if value <= 0.04045 else ((value + 0.055) / 1.055) ** 2.4 for value in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: str, b: str) -> float:
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def test_keyboard_and_screen_reader(open_page: Open) -> None:
    page = open_page(width=390)
    named = "each => each.getAttribute('aria-label') || each.textContent.trim() || each.labels.length"
    assert all(page.locator("button, input, textarea").evaluate_all(f"all => all.map({named})"))
    answer_with(page, ("text", "Fine"))
    ask(page, "Hi")
    assert page.inner_text("#status") == "Answer: Fine"
    page.focus("#menu")
    page.keyboard.press("Enter")
    assert page.get_attribute("#menu", "aria-expanded") == "true"
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "open"
    page.keyboard.press("Escape")
    assert page.get_attribute("#menu", "aria-expanded") == "false"
    assert page.evaluate("document.activeElement.id") == "menu"


def test_a_server_with_a_key_asks_for_it(empty_tab: Any) -> None:
    with live_server(tiny_engine(), Limits(max_running=8, max_new_tokens=24), api_key="s3cret") as locked:
        page = empty_tab
        page.goto(locked.url)
        page.fill("#token-dialog input", "€")  # no header can have it
        with page.expect_response("**/v1/models"):
            page.keyboard.press("Enter")
        page.wait_for_selector("#token-dialog[open]")
        page.keyboard.press("Escape")
        assert not page.is_visible("#token-dialog")
        page.fill("#question", "Hi")
        page.keyboard.press("Enter")
        page.wait_for_selector(".error")
        page.fill("#token-dialog input", "s3cret")
        page.keyboard.press("Enter")
        page.wait_for_selector("#model-details:not(:empty)")
        page.click("text=Try again")
        page.wait_for_selector(".message.assistant .note:not(:empty)")
        assert texts(page, "assistant")[0] and page.locator(".error").count() == 0


def test_a_question_refused_after_a_new_key_was_given_is_sent_again(empty_tab: Any) -> None:
    """The dialog opened a second time, for the key before."""
    with live_server(tiny_engine(), api_key="s3cret") as locked:
        page, held = empty_tab, []
        page.route("**/v1/chat/completions", lambda route: route.continue_() if held else held.append(route))
        page.goto(locked.url)
        page.wait_for_selector("#token-dialog[open]")
        page.keyboard.press("Escape")
        page.fill("#question", "Hi")
        page.keyboard.press("Enter")
        page.fill("#token-dialog input", "s3cret")
        wait_for(lambda: page.evaluate("true") and held)
        page.keyboard.press("Enter")
        page.wait_for_selector("#model-details:not(:empty)")
        held[0].continue_()
        page.wait_for_selector(".message.assistant .note:not(:empty)")
        assert texts(page, "assistant")[0] and page.locator(".error").count() == 0
        assert not page.is_visible("#token-dialog")
