"""A headless chromium driven over its own protocol: what a page logs, asks for and answers."""

from __future__ import annotations

import asyncio
import itertools
import os
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

import aiohttp
import pytest

FLAGS = (
    "--headless --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --disable-dev-shm-usage --remote-debugging-port=0"
).split()
PATIENCE = 60.0


def chromium() -> str:
    """The browser's path; skips without one."""
    found = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chrome")
    if found is None:
        pytest.skip("no chromium on this machine (apt install chromium)")
    return found


def visit(
    page: Path, scripts: list[str], profile: Path, width: int = 1200, scheme: str = "light"
) -> dict[str, Any]:
    """Open a page, `width` pixels wide, for who prefers a light or dark `scheme`: the results of the
    scripts, run one after the other (a promise is waited for), and `problems`: whatever was logged,
    thrown or asked for over the network."""
    flags = [*FLAGS, f"--user-data-dir={profile}"]
    if os.geteuid() == 0:
        flags.append("--no-sandbox")
    browser = subprocess.Popen(
        [chromium(), *flags, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        return asyncio.run(_visit(page.as_uri(), scripts, _address(profile), width, scheme))
    finally:
        browser.kill()
        browser.wait()


def _address(profile: Path) -> str:
    """Where the browser listens on loopback: it writes its port to a file."""
    file, deadline = profile / "DevToolsActivePort", time.monotonic() + PATIENCE
    while not (file.exists() and file.read_text().strip()):
        assert time.monotonic() < deadline, "the browser did not start"
        time.sleep(0.1)
    return f"http://127.0.0.1:{file.read_text().split()[0]}"


async def _visit(
    url: str, scripts: list[str], address: str, width: int, scheme: str
) -> dict[str, Any]:
    problems: list[str] = []
    async with aiohttp.ClientSession() as session:
        async with session.get(f"{address}/json") as answer:
            targets = await answer.json()
        target = next(t for t in targets if t["type"] == "page")
        socket = await session.ws_connect(target["webSocketDebuggerUrl"], max_msg_size=0)
        numbers = itertools.count(1)

        async def call(method: str, **parameters: Any) -> dict[str, Any]:
            number = next(numbers)
            await socket.send_json({"id": number, "method": method, "params": parameters})
            return await until(lambda message: message.get("id") == number)

        async def until(wanted: Any) -> dict[str, Any]:
            while True:
                message = await socket.receive_json(timeout=PATIENCE)
                problems.extend(_problems(message, url))
                if wanted(message):
                    return message

        for domain in ("Page", "Runtime", "Log", "Network"):
            await call(f"{domain}.enable")
        # A window has a least width, an emulated screen has none.
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        await call("Emulation.setDeviceMetricsOverride", **screen)
        preference = [{"name": "prefers-color-scheme", "value": scheme}]
        await call("Emulation.setEmulatedMedia", features=preference)
        await call("Page.navigate", url=url)
        await until(lambda message: message.get("method") == "Page.loadEventFired")
        results = []
        for script in scripts:
            answer_ = await call(
                "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
            )
            assert "exceptionDetails" not in answer_["result"], answer_
            results.append(answer_["result"]["result"].get("value"))
    return {"results": results, "problems": problems}


def _problems(message: dict[str, Any], url: str) -> list[str]:
    method, found = message.get("method"), message.get("params", {})
    if method == "Network.requestWillBeSent":
        asked = found["request"]["url"]
        return [] if asked == url or asked.startswith("data:") else [f"asked for {asked}"]
    if method in ("Runtime.consoleAPICalled", "Runtime.exceptionThrown", "Log.entryAdded"):
        return [f"{method}: {found}"]
    return []
