"""Measured cells, a prediction of them and baselines, as on disk; and a browser for pages."""

from __future__ import annotations

import asyncio
import json
import shutil
import subprocess
import time

import aiohttp
import anndata as ad
import numpy as np
import pandas as pd
import pytest
from scipy import sparse

from phenoseq.evaluation.tables import BASELINES

N, G, K, MEDIAN = 300, 8, 5, 60.0
BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


@pytest.fixture(scope="session")
def cells() -> dict[str, ad.AnnData]:
    """300 cells of 8 genes in 6 blocks: truth, prediction and baselines.

    Three cells have too few counts, and the last gene is hardly ever seen. The model knows each
    cell's rate, up to noise. Baselines that are points are all the mean, the others have draws of
    random cells.
    """
    rng = np.random.default_rng(0)
    rate = (rng.gamma(2, 4, (N, G)) + 3) * np.array([1, 2, 1, 0.5, 3, 1, 1, 1e-4])
    counts = rng.poisson(rate).astype(np.float32)
    counts[:3] = 0
    counts[:3, 0] = 5
    obs = pd.DataFrame(
        {
            "group": [f"{i // 50}" for i in range(N)],
            "x_centroid": rng.uniform(0, 600, N),
            "y_centroid": rng.uniform(0, 300, N),
        },
        index=[f"cell {i}" for i in range(N)],
    )
    var = pd.DataFrame(
        {"symbol": [f"GENE{k}" for k in range(G)]}, index=[f"E{k}" for k in range(G)]
    )
    truth = ad.AnnData(
        sparse.csr_matrix(counts),
        obs=obs,
        var=var,
        obsm={"spatial": obs[["x_centroid", "y_centroid"]].to_numpy()},
    )

    def scaled(made):
        total = made.sum(axis=-1, keepdims=True)
        return np.log1p(made / np.maximum(total, 1) * MEDIAN).astype(np.float32)

    draws = scaled(rng.poisson(rate, (K, N, G)))
    model = ad.AnnData(scaled(rate), obs=obs[[]], var=var)
    for k, draw in enumerate(draws):
        model.layers[f"draw_{k}"] = sparse.csr_matrix(draw)
    model.layers["draw"] = model.layers["draw_0"]
    model.uns["phenoseq"] = {"median_library": MEDIAN, "model": "a model"}
    mean = np.broadcast_to(scaled(counts).mean(axis=0), (N, G)).copy()
    others = scaled(counts[rng.integers(3, N, (K, N))])
    layers = dict.fromkeys(BASELINES, mean)
    for name in ("regressor_nb", "random"):
        layers[name] = others.mean(axis=0)
        layers |= {f"{name}_draw_{k}": sparse.csr_matrix(one) for k, one in enumerate(others)}
    baselines = ad.AnnData(obs=obs[[]], var=var, layers=layers)
    baselines.var["scored"] = [True] * (G - 1) + [False]
    baselines.uns["phenoseq"] = {
        "baselines": list(BASELINES),
        "median_library": MEDIAN,
        "regressor": {"config": {"epochs": 3}, "encoder_weights": {}, "steps": 40},
    }
    return {"truth": truth, "model": model, "baselines": baselines}


class Browser:
    """Drives headless Chromium by its DevTools protocol."""

    def __init__(self, socket):
        self.socket, self.number, self.problems = socket, 0, []

    async def call(self, method, **params):
        self.number += 1
        await self.socket.send_json({"id": self.number, "method": method, "params": params})
        while True:
            message = json.loads((await self.socket.receive(timeout=60)).data)
            if message.get("method") == "Runtime.exceptionThrown":
                self.problems.append(message["params"])
            if message.get("method") == "Log.entryAdded":
                self.problems.append(message["params"]["entry"]["text"])
            if message.get("method") == "Runtime.consoleAPICalled":
                self.problems.append(message["params"])
            if message.get("method") == "Network.requestWillBeSent":
                url = message["params"]["request"]["url"]
                if not url.startswith(("file:", "data:", "blob:")):
                    self.problems.append(url)
            if message.get("id") == self.number:
                return message["result"]

    async def run(self, script):
        found = await self.call(
            "Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in found, found
        return found["result"].get("value")

    async def until(self, script):
        for _ in range(300):
            if await self.run(script):
                return
            await asyncio.sleep(0.1)
        raise AssertionError(f"never true: {script}")

    async def press(self, key, code, **more):
        how = {"key": key, "code": key, "windowsVirtualKeyCode": code}
        await self.call("Input.dispatchKeyEvent", type="keyDown", **how, **more)
        await self.call("Input.dispatchKeyEvent", type="keyUp", **how)

    async def wide(self, width):
        await self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )
        await asyncio.sleep(0.5)


@pytest.fixture
def browse(tmp_path):
    """Give a function that opens a page and lets a coroutine drive it."""
    if BROWSER is None:
        pytest.skip("no Chromium here: pages are not driven in a browser")
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync "
    flags += "--disable-background-networking --disable-component-update --remote-debugging-port=0"
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            [BROWSER, *flags.split(), f"--user-data-dir={tmp_path / 'profile'}", "about:blank"],
            stderr=log, stdout=log,
        )  # fmt: skip
    port = tmp_path / "profile" / "DevToolsActivePort"
    end = time.monotonic() + 60
    while not (port.exists() and "\n" in port.read_text()):
        assert time.monotonic() < end, (tmp_path / "log").read_text()
        time.sleep(0.1)

    async def drive(page, steps):
        root = f"http://127.0.0.1:{port.read_text().split()[0]}"
        async with aiohttp.ClientSession() as session:
            async with session.get(f"{root}/json") as answer:
                pages = await answer.json()
            target = next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"]
            async with session.ws_connect(target, max_msg_size=0) as socket:
                browser = Browser(socket)
                for domain in ("Page", "Runtime", "Log", "Network"):
                    await browser.call(f"{domain}.enable")
                await browser.wide(1280)
                await browser.call("Page.navigate", url=page.as_uri())
                await browser.until("document.body && document.body.dataset.ready === 'yes'")
                await steps(browser)
                assert browser.problems == []

    yield lambda page, steps: asyncio.run(drive(page, steps))
    process.terminate()
    process.wait(30)
