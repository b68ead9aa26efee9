"""The chat page in a real, headless Chromium, beside a server that answers by a script."""

from __future__ import annotations

import asyncio
import json
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.sync_api import Browser, ConsoleMessage, Locator, Page, expect, sync_playwright
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

import tulle
from tulle.serve.static import HEADERS, page_files, page_routes

PAGE = Path(__file__).parents[2] / "src" / "tulle" / "serve" / "page"
FACTS = {
    "name": "tiny",
    "parameters": 134_515_008,
    "bits_per_weight": 4.51,
    "sparsity": 0.5,
    "file_bytes": 78_400_000,
    "weight_bytes": 61_200_000,
    "context": 2048,
    "threads": 2,
    "cache": "bfloat16",
    "chat": True,
    "defaults": {"temperature": 0.7, "top_p": 0.95},
}
expect.set_options(timeout=5000)

Part = str | float | bytes | threading.Event | dict[str, Any]
"""Of a scripted answer: text, a pause in seconds, raw bytes, a gate that the test opens, or a delta."""


@dataclass
class Server:
    """What the page asked, and what it is to be answered."""

    origin: str = ""
    known: dict[str, Any] = field(default_factory=lambda: dict(FACTS))
    models: list[str] = field(default_factory=lambda: ["tiny"])
    script: list[Part] = field(default_factory=lambda: ["Hello."])
    usage: dict[str, Any] | None = None
    finish: str | None = "stop"
    refusal: tuple[int, dict[str, str], Any] | None = None
    """Status, headers and body instead of an answer."""
    key: str | None = None
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """The client went away before the answer's end."""

    def refused(self, request: Request) -> Response | None:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": {"message": "invalid API key"}}, 401)
        return None

    async def list_models(self, request: Request) -> Response:
        return self.refused(request) or JSONResponse({"data": [{"id": name} for name in self.models]})

    async def facts(self, request: Request) -> Response:
        return self.refused(request) or JSONResponse(self.known | {"version": "0.1.0"})

    async def chat(self, request: Request) -> Response:
        refused = self.refused(request)
        if refused is not None:
            return refused
        self.bodies.append(await request.json())
        if self.refusal is not None:
            status, headers, body = self.refusal
            return JSONResponse(body, status, headers)
        return StreamingResponse(self.answer(request.url.path), media_type="text/event-stream")

    async def answer(self, path: str) -> AsyncIterator[bytes]:
        chat = path == "/v1/chat/completions"

        def event(delta: dict[str, Any] | str, finish: str | None = None) -> bytes:
            choice = {"delta": delta} if chat else {"text": delta}
            return b"data: " + json.dumps({"choices": [choice | {"finish_reason": finish}]}).encode() + b"\n\n"

        whole = False
        try:
            if chat:
                yield event({"role": "assistant", "content": ""})
            for part in list(self.script):
                if isinstance(part, threading.Event):
                    while not part.is_set():
                        await asyncio.sleep(0.005)
                elif isinstance(part, float):
                    await asyncio.sleep(part)
                elif isinstance(part, bytes):
                    yield part
                else:
                    yield event({"content": part} if chat and isinstance(part, str) else part)
            if self.finish is not None:
                yield event({} if chat else "", self.finish)
                usage = self.usage or {"prompt_tokens": 7, "completion_tokens": len(self.script)}
                yield b"data: " + json.dumps({"choices": [], "usage": usage}).encode() + b"\n\ndata: [DONE]\n\n"
            whole = True
        finally:
            if not whole:  # Starlette cancels what it sends to a client that went away
                self.left.set()


class Served:
    """A server on a thread, on a free port. Its ``server`` is a fresh one for every test."""

    def __init__(self) -> None:
        self.server = Server()

        async def models(request: Request) -> Response:
            return await self.server.list_models(request)

        async def facts(request: Request) -> Response:
            return await self.server.facts(request)

        async def chat(request: Request) -> Response:
            return await self.server.chat(request)

        routes = [
            Route("/v1/models", models),
            Route("/v1/tulle/info", facts),
            Route("/v1/chat/completions", chat, methods=["POST"]),
            Route("/v1/completions", chat, methods=["POST"]),
        ]
        self.socket = socket.create_server(("127.0.0.1", 0))
        config = uvicorn.Config(Starlette(routes=[*page_routes(), *routes]), log_level="error", lifespan="off")
        self.uvicorn = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.uvicorn.run, kwargs={"sockets": [self.socket]}, daemon=True)
        self.thread.start()
        self.origin = f"http://127.0.0.1:{self.socket.getsockname()[1]}"

    def stop(self) -> None:
        self.uvicorn.should_exit = self.uvicorn.force_exit = True
        self.thread.join(10)
        self.socket.close()


def chromium() -> str:
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        with sync_playwright() as playwright:
            found = playwright.chromium.executable_path
    if not Path(found).exists():
        pytest.fail("expected a Chromium to test the page with, found none; apt-get install chromium", pytrace=False)
    return found


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    served = Served()
    yield served
    served.stop()


@pytest.fixture
def server(served: Served) -> Server:
    served.server = Server(served.origin)
    return served.server


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    executable = chromium()
    with sync_playwright() as playwright:
        # A container has no sandbox to give, and /dev/shm may be small.
        browser = playwright.chromium.launch(
            executable_path=executable, args=["--no-sandbox", "--disable-dev-shm-usage"]
        )
        yield browser
        browser.close()


class Visit:
    """A tab. Whatever it asks for and whatever the browser complains about is held, and judged at the end."""

    def __init__(self, browser: Browser, server: Server, **settings: Any) -> None:
        settings = {"viewport": {"width": 1320, "height": 760}, **settings}
        self.context = browser.new_context(base_url=server.origin, **settings)
        self.context.set_default_timeout(5000)
        self.origin = server.origin
        self.asked: list[str] = []
        self.complaints: list[str] = []
        self.page = self.context.new_page()
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.on("console", self.hear)
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))

    def hear(self, message: ConsoleMessage) -> None:
        # A refused request is logged by the browser itself; violations of the policy and our faults are, too.
        if message.type in ("error", "warning") and not message.text.startswith("Failed to load resource"):
            self.complaints.append(message.text)

    def judge(self) -> None:
        """Nothing left the origin, the browser complained about nothing."""
        assert self.asked
        assert [url for url in self.asked if not url.startswith((self.origin + "/", f"blob:{self.origin}/"))] == []
        assert self.complaints == []

    def end(self) -> None:
        self.context.close()
        self.judge()


@pytest.fixture(scope="module")
def tab(browser: Browser, served: Served) -> Visit:
    """One tab for many tests: a fresh one costs half of what a test does."""
    return Visit(browser, Server(served.origin))


@pytest.fixture
def visit(tab: Visit, server: Server) -> Iterator[Visit]:
    tab.page.goto("/page/icon.svg")  # of the same origin, and without a script that would write again
    tab.page.evaluate("localStorage.clear(), sessionStorage.clear()")
    tab.asked.clear()
    tab.complaints.clear()
    yield tab
    tab.judge()


@pytest.fixture
def page(visit: Visit) -> Page:
    visit.page.goto("/")
    expect(visit.page.locator("#model")).to_be_enabled()
    return visit.page


def send(page: Page, text: str) -> None:
    page.locator("#prompt").fill(text)
    page.locator("#prompt").press("Enter")


def answers(page: Page) -> Locator:
    return page.locator(".answer")


def done(page: Page, count: int = 1) -> Locator:
    """The last of so many answers, when it is complete."""
    expect(answers(page)).to_have_count(count)
    expect(page.locator("#send")).to_be_visible()
    return answers(page).last


def settings(page: Page) -> Locator:
    if not page.locator("#settings").is_visible():
        page.locator("#show-settings").click()
    return page.locator("#settings")


# Files and headers


def test_headers_types_and_caching(server: Server) -> None:
    def get(path: str, **headers: str) -> tuple[int, Any, bytes]:
        try:
            with urllib.request.urlopen(urllib.request.Request(server.origin + path, headers=headers)) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    types = {"html": "text/html; charset=utf-8", "css": "text/css; charset=utf-8", "svg": "image/svg+xml"}
    for file in [*PAGE.iterdir()]:
        path = "/" if file.name == "index.html" else f"/page/{file.name}"
        status, headers, content = get(path)
        assert (status, content) == (200, file.read_bytes())
        assert headers["content-type"] == types.get(file.suffix[1:], "text/javascript; charset=utf-8")
        for name, value in HEADERS.items():
            assert headers[name] == value
        assert get(path, **{"If-None-Match": f'"other", W/{headers["etag"]}'})[0] == 304
        assert get(path, **{"If-None-Match": '"other"'})[0] == 200
    policy = HEADERS["Content-Security-Policy"]
    assert "default-src 'none'" in policy and "frame-ancestors 'none'" in policy and "unsafe" not in policy
    for path in ["/page/index.html", "/page/absent.js", "/page/..%2Fstatic.py", "/page/__init__.py", "/page/"]:
        status, headers, _ = get(path)
        assert status == 404, path


def test_nothing_inline_and_small() -> None:
    """The page keeps to its policy by construction, and what it loads is small."""
    html = (PAGE / "index.html").read_text("utf-8")
    assert not re.search(r"<style|\sstyle=|\son\w+=|javascript:|<script(?![^>]*\ssrc=)", html)
    assert not re.search(r"https?://", html)
    for file in PAGE.glob("*.js"):
        text = file.read_text("utf-8")
        assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text), (
            file.name
        )
    assert sum(len(file.content) for file in page_files().values()) < 100_000


# Chat


def test_text_appears_as_it_streams(server: Server, page: Page) -> None:
    gates = [threading.Event(), threading.Event()]
    server.script = ["Once upon", gates[0], " a time", gates[1], " there **was**."]
    send(page, "Tell me\nsomething")
    prose = answers(page).locator(".prose").last
    expect(prose).to_have_text("Once upon")
    expect(page.locator("#stop")).to_be_visible()
    gates[0].set()
    expect(prose).to_have_text("Once upon a time")
    gates[1].set()
    expect(prose).to_have_text("Once upon a time there was.")
    expect(prose.locator("strong")).to_have_text("was")
    done(page)
    assert page.locator(".bubble").inner_text() == "Tell me\nsomething"
    (body,) = server.bodies
    assert body["messages"] == [{"role": "user", "content": "Tell me\nsomething"}]
    assert body["stream"] is True and body["stream_options"] == {"include_usage": True} and body["model"] == "tiny"
    # What was not set is the server's to choose.
    assert set(body) == {"model", "messages", "stream", "stream_options"}


def test_speed_is_of_the_tokens_after_the_first(server: Server, page: Page) -> None:
    gates = [threading.Event(), threading.Event()]
    server.script = [gates[0], "a", gates[1], "b"]
    server.usage = {"prompt_tokens": 1200, "completion_tokens": 6, "prompt_tokens_details": {"cached_tokens": 1000}}
    page.evaluate("window.clock = 0; performance.now = () => window.clock")
    send(page, "Go")
    expect(page.locator("#stop")).to_be_visible()
    page.evaluate("window.clock = 150")
    gates[0].set()
    expect(answers(page).locator(".prose").last).to_have_text("a")
    page.evaluate("window.clock = 400")
    gates[1].set()
    # Five tokens in the quarter of a second between the first text and the last.
    expect(done(page).locator(".stats")).to_have_text(
        "20 tokens/s · first token 0.15 s · 6 tokens · prompt 1,200, 1,000 from the cache"
    )


def test_stop_reaches_the_server(server: Server, page: Page) -> None:
    server.script = ["Some", threading.Event(), "more"]
    send(page, "Go")
    expect(answers(page).locator(".prose").last).to_have_text("Some")
    page.locator("#stop").click()
    assert server.left.wait(5)
    answer = done(page)
    expect(answer).to_contain_text("stopped")
    expect(page.locator("#prompt")).to_be_focused()
    server.script = ["Fine."]
    send(page, "And now?")
    expect(done(page, 2).locator(".prose").last).to_have_text("Fine.")
    assert [message["content"] for message in server.bodies[1]["messages"]] == ["Go", "Some", "And now?"]


def test_edit_and_regenerate_cut_what_follows(server: Server, page: Page) -> None:
    for number, text in enumerate(["one", "two", "three"]):
        server.script = [f"Answer {text}."]
        send(page, text)
        done(page, number + 1)
    page.locator(".user").nth(1).hover()
    page.get_by_role("button", name="Edit this message").nth(1).click()
    field = page.get_by_label("Edit your message")
    expect(field).to_be_focused()
    assert field.input_value() == "two"
    field.fill("deux")
    server.script = ["Réponse."]
    field.press("Enter")
    expect(done(page, 2).locator(".prose").last).to_have_text("Réponse.")
    assert page.locator(".bubble").all_inner_texts() == ["one", "deux"]
    assert [message["content"] for message in server.bodies[-1]["messages"]] == ["one", "Answer one.", "deux"]
    server.script = ["Another."]
    answers(page).first.hover()
    page.get_by_role("button", name="Regenerate this answer").first.click()
    expect(done(page, 1).locator(".prose").last).to_have_text("Another.")
    assert server.bodies[-1]["messages"] == [{"role": "user", "content": "one"}]


def test_settings_reach_the_request(server: Server, page: Page) -> None:
    panel = settings(page)
    values = {
        "Temperature": 0.7, "Top p": 0.9, "Top k": 40, "Min p": 0.05, "Max tokens": 64, "Seed": 7,
        "Presence penalty": -0.5, "Frequency penalty": 0.25, "Repetition penalty": 1.1,
    }  # fmt: skip
    for label, value in values.items():
        panel.get_by_label(label, exact=True).fill(str(value))
    panel.get_by_label("System prompt").fill("Be brief.")
    send(page, "Hi")
    done(page)
    sent = {label.lower().replace(" ", "_"): value for label, value in values.items()}
    assert {name: server.bodies[0].get(name) for name in sent} == sent
    assert server.bodies[0]["messages"][0] == {"role": "system", "content": "Be brief."}
    # What is out of range is said, and not sent; an empty field is the server's default.
    panel.get_by_label("Temperature").fill("9")
    expect(panel.get_by_text("Expected 0 to 5.")).to_be_visible()
    panel.get_by_label("Seed").fill("1.5")
    expect(panel.get_by_text("Expected a whole number.")).to_be_visible()
    panel.get_by_label("Top k").fill("")
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    send(page, "Again")
    done(page, 2)
    assert server.bodies[1]["temperature"] == 0.7 and server.bodies[1]["seed"] == 7 and "top_k" not in server.bodies[1]
    settings(page).get_by_role("button", name="Back to defaults").click()
    send(page, "Once more")
    done(page, 3)
    assert set(server.bodies[2]) == {"model", "messages", "stream", "stream_options"}


def test_models_and_facts(server: Server, page: Page) -> None:
    tiles = page.locator("#tiles")
    for text in ["135 million", "4.51", "50 %", "78.4 MB", "61.2 MB", "2,048", "bfloat16"]:
        expect(tiles).to_contain_text(text)
    expect(page.locator("#welcome-note")).to_have_text("Served by Tulle 0.1.0.")
    expect(page.locator("#set-temperature")).to_have_attribute("placeholder", "0.7")
    expect(page.locator("#set-min_p")).to_have_attribute("placeholder", "default")
    server.models = ["tiny", "<b>big</b>"]
    page.reload()
    page.get_by_label("Model").select_option("<b>big</b>")
    expect(page.locator("#welcome-title")).to_have_text("<b>big</b>")
    send(page, "Hi")
    expect(done(page).locator(".stats")).to_contain_text("<b>big</b>")
    assert server.bodies[0]["model"] == "<b>big</b>"
    expect(settings(page).locator("#facts")).to_contain_text("bfloat16")


def test_a_model_without_chat_template_continues(server: Server, page: Page) -> None:
    server.known = {"chat": False}
    page.reload()
    expect(page.locator("#welcome-note")).to_contain_text("It has no chat template: it continues what you write.")
    expect(page.locator("#tiles .tile")).to_have_count(0)  # what a server does not say is not shown
    server.script = [" there was ", "a loom."]
    send(page, "Once upon a time")
    expect(done(page).locator(".prose").last).to_have_text("there was a loom.")
    send(page, "It was")
    done(page, 2)
    assert server.bodies[0]["prompt"] == "Once upon a time" and server.bodies[0]["max_tokens"] == 256
    assert server.bodies[1]["prompt"] == "Once upon a time there was a loom.\nIt was"
    assert "messages" not in server.bodies[0]


def test_reasoning_and_tool_calls(server: Server, page: Page) -> None:
    tools = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
    panel = settings(page)
    panel.locator("summary").click()
    panel.locator("#tools").fill("{")
    expect(panel.get_by_text("Expected JSON")).to_be_visible()
    panel.locator("#tools").fill(json.dumps(tools))
    gate = threading.Event()
    call = {"index": 0, "id": "c1", "function": {"name": "weather", "arguments": ""}}
    server.script = [
        {"reasoning_content": "Where is "}, {"reasoning_content": "Ghent?"}, gate, 0.06, "Let me look.",
        {"tool_calls": [call]}, {"tool_calls": [{"index": 0, "function": {"arguments": '{"city":'}}]},
        {"tool_calls": [{"index": 0, "function": {"arguments": '"Ghent"}'}}]},
    ]  # fmt: skip
    server.finish = "tool_calls"
    send(page, "Weather?")
    thoughts = answers(page).locator("details")
    expect(thoughts.locator("summary")).to_have_text("Thinking…")
    expect(thoughts.locator(".prose")).to_be_hidden()
    thoughts.locator("summary").click()
    expect(thoughts.locator(".prose")).to_have_text("Where is Ghent?")
    gate.set()
    answer = done(page)
    expect(thoughts.locator("summary")).to_have_text(re.compile(r"Thought for [\d.]+ s"))
    expect(answer.locator(".call")).to_contain_text('"city": "Ghent"')
    server.script, server.finish = ["Rain."], "stop"
    answer.get_by_label("Result of weather").fill('{"sky": "rain"}')
    answer.get_by_role("button", name="Send the result").click()
    done(page, 2)
    assert server.bodies[1]["tools"] == tools
    assert server.bodies[1]["messages"] == [
        {"role": "user", "content": "Weather?"},
        {
            "role": "assistant",
            "content": "Let me look.",
            "tool_calls": [
                {"id": "c1", "type": "function", "function": {"name": "weather", "arguments": '{"city":"Ghent"}'}}
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": '{"sky": "rain"}'},
    ]


# Faults


REFUSALS: list[tuple[int, dict[str, str], Any, str]] = [
    (
        400,
        {},
        {"error": {"message": "expected fewer than 2048 tokens, found 3000"}},
        "Expected fewer than 2048 tokens, found 3000. Change the settings or the message, then try again.",
    ),
    (503, {"Retry-After": "3"}, {"error": {"message": "The queue is full."}}, "The queue is full. Try again in 3 s."),
    (
        500,
        {},
        None,
        "The server answered 500 Internal Server Error. Try again; if it happens again, look at the server's log.",
    ),
]


def test_refusals(server: Server, page: Page) -> None:
    server.refusal = REFUSALS[0][:3]
    send(page, "Hi")
    for status, headers, body, line in REFUSALS:
        server.refusal = (status, headers, body)
        page.get_by_role("button", name="Try again").click()
        expect(done(page).locator(".error")).to_contain_text(line)
    server.refusal = None
    page.get_by_role("button", name="Try again").click()
    expect(done(page).locator(".prose").last).to_have_text("Hello.")
    expect(page.locator(".error:visible")).to_have_count(0)


def test_broken_streams(server: Server, page: Page) -> None:
    server.script = ["He", b"data: {nonsense\n\n", b": ping\n\n", b'data: 5\n\ndata:{"choices": []}\r\n\r\n', "llo"]
    send(page, "Malformed")
    answer = done(page)
    expect(answer.locator(".prose").last).to_have_text("Hello")
    expect(answer.locator(".stats")).to_contain_text("1 unreadable part left out")
    server.script, server.finish = ["Half an ans"], None
    send(page, "Cut")
    expect(done(page, 2).locator(".error")).to_have_text("The answer broke off before its end. Try again.")
    expect(answers(page).last.locator(".prose").last).to_have_text("Half an ans")
    server.script = ["Par", b'data: {"error": {"message": "out of pages"}}\n\n']
    send(page, "Error within")
    expect(done(page, 3).locator(".error")).to_have_text("Out of pages. Try again.")
    server.script, server.finish = ["Long"], "length"
    send(page, "Limit")
    expect(done(page, 4)).to_contain_text("raise Max tokens")


def test_no_server(server: Server, page: Page) -> None:
    page.route("**/v1/**", lambda route: route.abort("connectionrefused"))
    send(page, "Hi")
    expect(done(page).locator(".error")).to_have_text(
        re.compile("No answer from the server. See that .tulle serve. runs")
    )
    page.reload()
    expect(page.get_by_role("alert")).to_contain_text("No answer from the server")
    page.unroute("**/v1/**")
    page.get_by_role("alert").get_by_role("button", name="Try again").click()
    expect(page.get_by_role("alert")).to_be_hidden()
    expect(page.locator("#welcome-title")).to_have_text("tiny")


def test_api_key(server: Server, visit: Visit) -> None:
    server.key = "secret"
    page = visit.page
    page.goto("/")
    expect(page.get_by_role("alert")).to_have_text("The server wants an API key. Enter it below.")
    page.get_by_label("API key").fill("wrong")
    page.get_by_role("button", name="Use it").click()
    expect(page.get_by_role("alert")).to_have_text("The server does not know this API key. Enter another one below.")
    page.get_by_label("API key").fill("secret")
    page.get_by_label("API key").press("Enter")
    expect(page.get_by_label("API key")).to_be_hidden()
    send(page, "Hi")
    expect(done(page).locator(".prose").last).to_have_text("Hello.")
    # The key changes while the page is open: the answer comes as soon as the new one is given.
    server.key = "other"
    send(page, "More")
    expect(done(page, 2).locator(".error")).to_contain_text("Enter another one below.")
    page.get_by_label("API key").fill("other")
    page.get_by_label("API key").press("Enter")
    expect(answers(page).last.locator(".prose").last).to_have_text("Hello.")
    kept = page.evaluate("JSON.stringify([localStorage, sessionStorage])")
    local, session = json.loads(kept)
    assert "other" not in json.dumps(local) and session["tulle.key"] == "other"


# What a model writes stays text


HOSTILE = [
    "<script>window.hacked = 1</script>",
    '<img src="https://evil.test/a.png" onerror="window.hacked = 1">',
    "[click](javascript:window.hacked=1) [data](data:text/html,hi) [x](vbscript:1)",
    "![picture](https://evil.test/b.png)",
    "<svg onload=window.hacked=1> <iframe src=//evil.test>",
    '[a](https://ok.test/"onmouseover="window.hacked=1)',
    "```html\n</code></pre><script>window.hacked = 1</script>\n```",
    "| <b>a</b> | b |\n|---|---|\n| <script>window.hacked=1</script> | c |",
]


def test_hostile_text_stays_text(server: Server, page: Page) -> None:
    text = "\n\n".join(HOSTILE)
    server.script = [
        {"reasoning_content": text},
        text,
        {"tool_calls": [{"index": 0, "id": "1", "function": {"name": HOSTILE[0], "arguments": HOSTILE[1]}}]},
    ]
    server.models = ["tiny", HOSTILE[1]]
    page.reload()
    send(page, HOSTILE[0] + HOSTILE[1])
    answer = done(page)
    answer.locator("summary").click()
    prose = answer.locator(".prose").last
    for part in ["<script>window.hacked = 1</script>", "<iframe src=//evil.test>", "</code></pre><script>", "<b>a</b>"]:
        expect(prose).to_contain_text(part)
    assert page.locator("#turns :is(script, img, iframe, svg, b, object, embed, style, link, meta, base)").count() == 0
    assert page.evaluate("window.hacked") is None
    links = page.locator("#turns a").evaluate_all(
        "links => links.map(a => [a.protocol, a.rel, a.target, a.getAttributeNames().length])"
    )
    assert links and {tuple(found) for found in links} == {("https:", "noopener noreferrer", "_blank", 3)}


def a(href: str, text: str) -> str:
    return f'<a href="{href}" target="_blank" rel="noopener noreferrer">{text}</a>'


MARKDOWN = [
    ("one\ntwo\n\nthree", "<p>one<br>two</p><p>three</p>"),
    ("a **b *c* d** `e * f` ~~g~~", "<p>a <strong>b <em>c</em> d</strong> <code>e * f</code> <s>g</s></p>"),
    ("***h***", "<p><strong><em>h</em></strong></p>"),
    ("2 * 3 * 4, snake_case_name, a*b, **open, 5 ~ 6", "<p>2 * 3 * 4, snake_case_name, a*b, **open, 5 ~ 6</p>"),
    ("*a **b* c**", "<p><em>a **b</em> c**</p>"),
    (r"\*not\* `` ` `` `open", "<p>*not* <code>`</code> `open</p>"),
    ("# A #\n### B *c*\n#no", '<h3 class="level-1">A</h3><h5 class="level-3">B <em>c</em></h5><p>#no</p>'),
    (
        "a\n---\n> b\n> > c",
        "<p>a</p><hr><blockquote><p>b</p><blockquote><p>c</p></blockquote></blockquote>",
    ),
    (
        "- a\n- b\n  - c\n    more\n- d",
        '<ul class="tight"><li><p>a</p></li><li><p>b</p><ul class="tight"><li><p>c<br>more</p></li></ul></li>'
        "<li><p>d</p></li></ul>",
    ),
    (
        "3. a\n\n   b\n4. c\n\nend",
        '<ol class="loose" start="3"><li><p>a</p><p>b</p></li><li><p>c</p></li></ol><p>end</p>',
    ),
    (
        "1. a\n    - b\n  - c\n2. d",
        '<ol class="tight"><li><p>a</p><ul class="tight"><li><p>b</p></li><li><p>c</p></li></ul></li>'
        "<li><p>d</p></li></ol>",
    ),
    (
        "1. a\n\n- b\n\n\ntext",
        '<ol class="tight"><li><p>a</p></li></ol><ul class="tight"><li><p>b</p></li></ul><p>text</p>',
    ),
    ("in\n1984. Then", "<p>in<br>1984. Then</p>"),
    ("[a *b*](https://x.test/(1))", f"<p>{a('https://x.test/(1)', 'a <em>b</em>')}</p>"),
    (
        '[a](https://x.test "title") <https://y.test/_z_>',
        f"<p>{a('https://x.test/', 'a')} {a(*['https://y.test/_z_'] * 2)}</p>",
    ),
    (
        "[a [b](https://x.test) c](https://y.test) [d] [e](f)",
        f"<p>[a {a('https://x.test/', 'b')} c]({a('https://y.test/', 'https://y.test')}) [d] [e](f)</p>",
    ),
    ("See https://x.test/a_b_c.", f"<p>See {a(*['https://x.test/a_b_c'] * 2)}.</p>"),
    (
        "| a | b |\n|:-:|--:|\n| `x` | 1 \\| 2 | 3 |",
        '<div class="table" tabindex="0"><table>'
        '<thead><tr><th class="center">a</th><th class="right">b</th></tr></thead>'
        '<tbody><tr><td class="center"><code>x</code></td><td class="right">1 | 2</td></tr></tbody></table></div>',
    ),
    (r"\(a_1 * b_1\)", r'<p><span class="formula">\(a_1 * b_1\)</span></p>'),
    ("$$x_{*}$$ $5", '<p><span class="formula">$$x_{*}$$</span> $5</p>'),
    ("&amp; <b> &lt;", "<p>&amp;amp; &lt;b&gt; &amp;lt;</p>"),
    ("", ""),
]


def code(language: str, text: str) -> str:
    button = '<button type="button" class="quiet" aria-label="Copy this code">Copy</button>'
    head = f'<div class="code-head"><span>{language}</span>{button}</div>'
    return f'<div class="code">{head}<pre tabindex="0"><code>{text}</code></pre></div>'


MARKDOWN += [
    ("```py\na = 1\n\n  *b*\n```\nend", code("py", "a = 1\n\n  *b*") + "<p>end</p>"),
    ("~~~\nopen ```\n", code("code", "open ```\n")),
    ("- x\n  ```\n  y\n    z\n  ```", '<ul class="tight"><li><p>x</p>' + code("code", "y\n  z") + "</li></ul>"),
]


def test_markdown(server: Server, page: Page) -> None:
    found = page.evaluate(
        """async (texts) => {
            const { Markdown } = await import("/page/markdown.js");
            return texts.map((text) => {
                const [whole, growing] = [document.createElement("div"), document.createElement("div")];
                new Markdown(whole).show(text);
                const markdown = new Markdown(growing);
                for (let i = 0; i <= text.length; i++) markdown.show(text.slice(0, i));
                return [whole.innerHTML, growing.innerHTML];
            });
        }""",
        [text for text, _ in MARKDOWN],
    )
    for (text, expected), (whole, growing) in zip(MARKDOWN, found, strict=True):
        assert whole == expected, text
        # However the text arrived, it looks the same.
        assert growing == expected, text


def test_markdown_is_linear(server: Server, page: Page) -> None:
    """Texts that make careless renderers slow: each is drawn in well under the time of a quadratic one."""
    units = (
        "*a |a* |**a_ |[|[a](|](|`|`` ` |> |- |  - a\n|\\(|$$ |~~a|![|_a*|#|<|http://a|1. |<http://|** |\n\n|- a\n\n"
    ).split("|") + ["| a ", "|-"]
    slow = page.evaluate(
        """async (units) => {
            const { Markdown } = await import("/page/markdown.js");
            const time = (text) => {
                const started = performance.now();
                new Markdown(document.createElement("div")).show(text);
                return performance.now() - started;
            };
            // Tens of milliseconds each; a quadratic one takes many seconds, a busy machine delays one of three.
            return units.filter((unit) => {
                const text = unit.repeat(60000 / unit.length);
                return time(text) > 1000 && time(text) > 1000 && time(text) > 1000;
            });
        }""",
        units,
    )
    assert slow == []
    # Neither does a list of arguments overflow the stack.
    nodes = """async () => {
        const { Markdown } = await import("/page/markdown.js");
        const target = document.createElement("div");
        new Markdown(target).show("a\\n".repeat(200000));
        return target.firstChild.childNodes.length;
    }"""
    assert page.evaluate(nodes) == 399_999


def test_finished_blocks_keep_their_nodes(server: Server, page: Page) -> None:
    gate = threading.Event()
    server.script = ["```py\nx = 1\n```\n\nThen", gate, " more"]
    send(page, "Go")
    button = page.get_by_role("button", name="Copy this code")
    button.evaluate("button => button.mark = 1")
    gate.set()
    expect(done(page).locator(".prose").last).to_contain_text("Then more")
    assert button.evaluate("button => button.mark") == 1


# Chats that last


def test_reload_keeps_the_chat(server: Server, page: Page) -> None:
    server.script = [{"reasoning_content": "hm"}, "Kept **well**."]
    send(page, "Remember this")
    before = done(page).inner_text()
    page.reload()
    assert done(page).inner_text() == before
    expect(page.locator(".answer strong")).to_have_text("well")
    # In the middle of an answer: what came is kept, and said to be a part.
    server.script = ["Only a", threading.Event()]
    send(page, "Next")
    expect(answers(page).last.locator(".prose").last).to_have_text("Only a")
    page.reload()
    expect(done(page, 2)).to_contain_text("broke off when the page was left")
    expect(answers(page).last.locator(".prose").last).to_have_text("Only a")


def test_several_chats_export_and_clear(server: Server, page: Page) -> None:
    send(page, "First chat")
    done(page)
    page.keyboard.press("Control+k")
    expect(page.locator("#welcome")).to_be_visible()
    expect(page.locator("#prompt")).to_be_focused()
    send(page, "Second chat")
    done(page)
    chats = page.locator("#chat-list .chat")
    assert chats.all_inner_texts() == ["Second chat", "First chat"]
    with page.expect_download() as download:
        page.get_by_role("button", name="Export this chat").click()
    assert download.value.suggested_filename == "second-chat.json"
    exported = json.loads(Path(download.value.path()).read_text("utf-8"))
    assert exported["messages"] == [
        {"role": "user", "content": "Second chat"},
        {"role": "assistant", "content": "Hello."},
    ]
    chats.nth(1).click()
    expect(page.locator(".bubble")).to_have_text("First chat")
    expect(chats.nth(1)).to_have_attribute("aria-current", "true")
    # Deleted in the middle of an answer, it does not come back.
    page.locator("#chat-list li").first.locator(".chat").click()
    server.script = ["Some", threading.Event()]
    send(page, "More")
    expect(answers(page).last.locator(".prose").last).to_have_text("Some")
    page.locator("#chat-list li").first.hover()
    page.get_by_role("button", name="Delete “Second chat”").click()
    assert server.left.wait(5)
    expect(page.locator("#welcome")).to_be_visible()
    assert chats.all_inner_texts() == ["First chat"]
    page.get_by_role("button", name="Clear all chats").click()
    expect(chats).to_have_count(1)  # it asks first
    page.get_by_role("button", name="Really delete all chats?").click()
    expect(chats).to_have_count(0)
    assert not [key for key in page.evaluate("Object.keys(localStorage)") if key.startswith("tulle.chat.")]


def test_damaged_storage_is_survived(server: Server, page: Page) -> None:
    page.evaluate("""() => {
        for (const [name, value] of Object.entries({ "tulle.chat.a": "{", "tulle.chat.b": '{"id": "b", "turns": [1]}',
            "tulle.chat.c": "null", "tulle.settings": "[1]", "tulle.theme": "pink", "tulle.model": '"gone"' }))
            localStorage.setItem(name, value);
    }""")
    page.reload()
    expect(page.locator("#model")).to_be_enabled()
    expect(page.locator("#chat-list .chat")).to_have_count(0)
    send(page, "Hi")
    done(page)
    page.evaluate(
        "() => { Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); }; }"
    )
    send(page, "More")
    done(page, 2)
    expect(page.get_by_role("alert")).to_contain_text("The browser keeps no more")


# Keys, looks, access


def test_keyboard(server: Server, page: Page) -> None:
    prompt = page.locator("#prompt")
    expect(prompt).to_be_focused()
    page.keyboard.type("line one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("line two")
    assert prompt.input_value() == "line one\nline two" and not server.bodies
    server.script = ["Some", threading.Event()]
    page.keyboard.press("Enter")
    expect(answers(page).locator(".prose").last).to_have_text("Some")
    page.keyboard.press("Escape")
    assert server.left.wait(5)
    expect(prompt).to_be_focused()
    page.keyboard.press("ArrowUp")
    expect(page.get_by_label("Edit your message")).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.get_by_label("Edit your message")).to_have_count(0)
    expect(prompt).to_be_focused()
    # Composing (Japanese, Chinese …) uses Enter for itself.
    prompt.fill("に")
    prompt.evaluate(
        "f => f.dispatchEvent(new KeyboardEvent('keydown', {key: 'Enter', isComposing: true, cancelable: true}))"
    )
    assert len(server.bodies) == 1
    # From the top of the page everything is reached by Tab, the skip link first.
    skip = page.get_by_role("link", name="Skip to the message")
    skip.focus()
    order = []
    while "send" not in order and len(order) < 30:
        page.keyboard.press("Tab")
        order.append(page.evaluate("document.activeElement.id"))
    named = ["new-chat", "export", "clear", "show-chats", "model", "theme", "show-settings", "scroll", "prompt", "send"]
    assert [name for name in order if name in named] == [name for name in named if name in order]
    assert {*named} - {*order} <= {"scroll"}
    skip.press("Enter")
    expect(prompt).to_be_focused()


def test_announcements_and_names(server: Server, page: Page) -> None:
    server.script = ["It is **done**."]
    send(page, "Go")
    done(page)
    settings(page)
    expect(page.get_by_role("status")).to_have_text("Answer: It is **done**.")
    nameless = page.evaluate("""() =>
        [...document.querySelectorAll("button, input, select, textarea, a, dialog, summary")]
            .filter((e) => !(e.getAttribute("aria-label") || e.getAttribute("aria-labelledby") || e.labels?.length))
            .filter((e) => !e.textContent.trim() || /INPUT|SELECT|TEXTAREA|DIALOG/.test(e.tagName))
            .map((e) => e.outerHTML)""")
    assert nameless == []
    ids = page.evaluate("[...document.querySelectorAll('[id]')].map((e) => e.id)")
    assert len(ids) == len(set(ids))
    dangling = page.evaluate("""() => ["aria-labelledby", "aria-describedby", "aria-controls", "for"].flatMap((name) =>
        [...document.querySelectorAll(`[${name}]`)].map((e) => e.getAttribute(name))
            .filter((id) => !document.getElementById(id)))""")
    assert dangling == []


CONTRAST = """() => {
    const canvas = document.createElement("canvas").getContext("2d", { willReadFrequently: true });
    const rgba = (color) => {
        canvas.clearRect(0, 0, 1, 1);
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data];
    };
    const linear = (v) => (v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    const luminance = ([r, g, b]) => 0.2126 * linear(r / 255) + 0.7152 * linear(g / 255) + 0.0722 * linear(b / 255);
    const ground = (e) => {
        for (; e; e = e.parentElement) {
            const color = rgba(getComputedStyle(e).backgroundColor);
            if (color[3] === 255) return color;
        }
    };
    const poor = [];
    let seen = 0;
    for (const e of document.querySelectorAll("body *")) {
        const text = [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim());
        if (!text || !e.checkVisibility({ opacityProperty: true }) || e.closest(".unseen, :disabled, option")) continue;
        const [a, b] = [rgba(getComputedStyle(e).color), ground(e)].map(luminance).sort((x, y) => y - x);
        seen++;
        if ((a + 0.05) / (b + 0.05) < 4.5) poor.push([e.outerHTML.slice(0, 80), (a + 0.05) / (b + 0.05)]);
    }
    return [seen, poor];
}"""
"""How many texts are seen, and those whose contrast is below WCAG's AA."""

RICH = (
    "# Title\n\nText with `code`, a [link](https://x.test) and\n\n> a quote\n\n```py\nx = 1\n```\n\n"
    "| a | b |\n|---|---|\n| 1 | 2 |"
)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_contrast(browser: Browser, server: Server, scheme: str) -> None:
    visit = Visit(browser, server, color_scheme=scheme, viewport={"width": 1400, "height": 900})
    page = visit.page
    page.goto("/")
    expect(page.locator("#tiles .tile")).to_have_count(8)
    checked = [page.evaluate(CONTRAST)]
    server.script = [{"reasoning_content": "hm"}, RICH]
    send(page, "Go")
    done(page).locator("summary").click()
    server.refusal = (500, {}, {"error": {"message": "no"}})
    send(page, "And an error")
    done(page, 2)
    settings(page).get_by_label("Temperature").fill("99")
    page.evaluate("document.querySelectorAll('.actions').forEach((e) => e.style.opacity = 1)")
    checked.append(page.evaluate(CONTRAST))
    for seen, poor in checked:
        assert seen > 15 and poor == []
    visit.end()


def test_theme_follows_and_is_remembered(browser: Browser, server: Server) -> None:
    visit = Visit(browser, server, color_scheme="light")
    page = visit.page

    def ground() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    page.goto("/")
    light = ground()
    page.emulate_media(color_scheme="dark")
    dark = ground()
    assert (light, dark) == ("rgb(252, 252, 250)", "rgb(22, 23, 26)")
    toggle = page.get_by_role("button", name="Dark theme")
    expect(toggle).to_have_attribute("aria-pressed", "true")
    toggle.click()
    assert ground() == light
    page.reload()
    assert ground() == light
    toggle.click()  # back to the system's, which is followed again
    assert ground() == dark and page.evaluate("localStorage.getItem('tulle.theme')") is None
    page.emulate_media(color_scheme="light")
    assert ground() == light
    visit.end()


def test_phone(browser: Browser, server: Server) -> None:
    visit = Visit(browser, server, viewport={"width": 360, "height": 640}, has_touch=True, is_mobile=True)
    page = visit.page

    def fits() -> None:
        assert page.evaluate(
            "[document.documentElement.scrollWidth, document.getElementById('scroll').scrollWidth]"
        ) == [360, 360]
        too_wide = page.evaluate("""() => [...document.querySelectorAll("#stage *, dialog[open] *")]
            .filter((e) => e.checkVisibility() && !e.closest("pre, .table, .unseen"))
            .filter((e) => e.getBoundingClientRect().right > 360.5).map((e) => e.outerHTML.slice(0, 80))""")
        assert too_wide == []

    server.models = ["a-model-with-a-really-very-long-name-that-does-not-fit-on-a-phone-at-all"]
    page.goto("/")
    expect(page.locator("#tiles .tile")).to_have_count(8)
    fits()
    server.script = [
        RICH
        + "\n\n```\n"
        + "wide " * 60
        + "\n```\n\n"
        + "unbroken" * 30
        + "\n\n| a | b |\n|--|--|\n|"
        + " wide" * 30
        + "|x|"
    ]
    send(page, "long" * 40)
    done(page)
    fits()
    expect(page.locator("#chats")).to_be_hidden()
    page.get_by_role("button", name="Chats", exact=True).tap()
    expect(page.locator("#chats")).to_be_visible()
    fits()
    page.locator("#chat-list .chat").tap()
    expect(page.locator("#chats")).to_be_hidden()
    settings(page)
    fits()
    page.keyboard.press("Escape")
    expect(page.locator("#settings")).to_be_hidden()
    expect(page.locator("#show-settings")).to_be_focused()
    # Fingers need room; what is aimed at is at least 24 CSS pixels high (WCAG 2.2, 2.5.8).
    low = page.evaluate("""() => [...document.querySelectorAll("button")]
        .filter((b) => b.checkVisibility() && b.getBoundingClientRect().height < 24).map((b) => b.outerHTML)""")
    assert low == []
    visit.end()


def test_follows_the_end_unless_scrolled_away(server: Server, page: Page) -> None:
    gates = [threading.Event(), threading.Event()]
    lines = "\n\n".join(f"Paragraph {i}" for i in range(60))
    server.script = [lines, gates[0], "\n\nmore\n\n" + lines, gates[1], "\n\nend"]
    send(page, "Go")
    left = "((s) => s.scrollHeight - s.scrollTop - s.clientHeight)(document.getElementById('scroll'))"
    page.wait_for_function(f"document.querySelectorAll('.answer p').length > 60 && {left} < 2")
    page.locator("#scroll").evaluate("s => s.scrollTop = 100")
    latest = page.get_by_role("button", name="Latest")
    expect(latest).to_be_visible()
    gates[0].set()
    expect(answers(page)).to_contain_text("more")
    assert page.locator("#scroll").evaluate("s => s.scrollTop") == 100
    latest.click()
    gates[1].set()
    done(page)
    page.wait_for_function(f"{left} < 2")
    expect(latest).to_be_hidden()


def test_copy(browser: Browser, server: Server) -> None:
    visit = Visit(browser, server, permissions=["clipboard-read", "clipboard-write"])
    page = visit.page
    page.goto("/")
    server.script = ["Take **this**:\n\n```py\nx = 1\n```"]
    send(page, "Go")
    done(page)
    for button, text in [
        ("Copy this answer", server.script[0]),
        ("Copy this code", "x = 1"),
        ("Copy this message", "Go"),
    ]:
        page.locator(".turn").first.hover()
        page.get_by_role("button", name=button).click()
        expect(page.get_by_text("Copied").first).to_be_visible()
        assert page.evaluate("navigator.clipboard.readText()") == text
    # Plain HTTP from elsewhere has no clipboard interface: the old way serves.
    page.evaluate("Object.defineProperty(window, 'isSecureContext', { value: false })")
    page.get_by_role("button", name="Copy this answer").click()
    page.wait_for_timeout(50)
    assert page.evaluate("navigator.clipboard.readText()") == server.script[0]
    visit.end()


# The real server


@pytest.fixture(scope="module")
def real(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of ``tulle serve`` with the packaged model, which gets a chat template."""
    folder = tmp_path_factory.mktemp("real") / "little"
    folder.mkdir()
    for file in (Path(tulle.__file__).parent / "reference").iterdir():
        (folder / file.name).symlink_to(file)
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
    (folder / "chat_template.jinja").write_text(template)
    options = ["--port", "0", "--threads", "1", "--sequences", "2", "--context", "512"]
    command = [sys.executable, "-c", "from tulle.cli.main import main; main()", "serve", str(folder), *options]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        said = []
        for line in process.stderr:
            said.append(line)
            if found := re.search(r" on (http://\S+)$", line.strip()):
                break
        else:
            pytest.fail("".join(said))
        reader = threading.Thread(target=process.stderr.read, daemon=True)  # a full pipe would stop it
        reader.start()
        yield found[1]
        process.terminate()
        process.wait(20)
        reader.join(20)


def ask(url: str, body: Any = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    with urllib.request.urlopen(urllib.request.Request(url, data, {"Content-Type": "application/json"})) as response:
        return response.read().decode()


def test_with_the_real_server(browser: Browser, real: str) -> None:
    visit = Visit(browser, Server(real))
    page = visit.page
    page.goto("/")
    expect(page.locator("#welcome-title")).to_have_text("little")
    for label in ["Parameters", "Bits per weight", "Size", "Read per token", "Context", "KV cache", "Threads"]:
        expect(page.locator("#tiles")).to_contain_text(label)
    panel = settings(page)
    panel.get_by_label("Temperature").fill("0")
    panel.get_by_label("Max tokens").fill("24")
    send(page, "import the module and define a function that reads a file")
    answer = done(page)
    stats = answer.locator(".stats")
    # Where all tokens come at once, on a busy machine, there is no speed to tell.
    expect(stats).to_have_text(re.compile(r"^([\d.,]+ tokens/s · )?first token [\d.]+ s · \d+ tokens · prompt \d+"))
    chat = json.loads(page.evaluate("localStorage[Object.keys(localStorage).find((k) => k.startsWith('tulle.chat.'))]"))
    messages = [{"role": "user", "content": chat["turns"][0]["text"]}]
    body = {"messages": messages, "temperature": 0, "max_tokens": 24}
    direct = json.loads(ask(f"{real}/v1/chat/completions", body))["choices"][0]["message"]["content"]
    assert chat["turns"][1]["text"] == direct and direct.strip()
    # The second turn begins with the first one, whose keys and values are held.
    send(page, "and another one")
    expect(done(page, 2).locator(".stats")).to_contain_text("from the cache")
    # Stopped, the engine works for nobody.
    panel.get_by_label("Max tokens").fill("400")
    send(page, "and a long one")
    expect(answers(page).last.locator(".prose").last).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(done(page, 3)).to_contain_text("stopped")
    until = time.monotonic() + 5
    while not re.search(r"^tulle_sequences_running\S* 0", ask(f"{real}/metrics"), re.MULTILINE):
        assert time.monotonic() < until
    visit.end()
