"""What the pages of a run that is served are told: looked up, and made, once for all of them."""

from __future__ import annotations

import asyncio
import json
import os
import secrets
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..runs.tail import Tail
from .facts import progress
from .page import SCRIPTS, chart_specs, dress, environment, markup, own_script, vega_bundle
from .payload import first_look, payload
from .sections import Below, below
from .select import Selection, select

if TYPE_CHECKING:
    from ..runs.reader import Run

LOOK_SECONDS = 1.0  # from one look at the files to the next, at least
BUSY_SHARE = 0.1  # of a processor, that making the page may take: the training needs it
MOST_SECONDS = 10.0  # from one look to the next
BEAT_SECONDS = 5.0  # from one word to a page to the next, at most
PINNED = 32  # channels that readers look at, which stay when others are chosen


class Feed:
    """What the pages of one run are told: looked up, and made, once for all of them.

    Files are read and pages made in one thread, so that streams go on meanwhile.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self._path = Path(path)
        self._tail = Tail(path)
        self._thread = ThreadPoolExecutor(1, "batchnorm-live")
        self._aside = ThreadPoolExecutor(1, "batchnorm-bundle")
        self._bundle = self._aside.submit(vega_bundle)  # takes seconds, without Python's lock
        self._series = secrets.token_hex(4)  # a server that was started again has other versions
        self._number = 0
        self._changed = asyncio.Event()
        self._made: dict[str, tuple[str, Any]] = {}  # what was made of which version
        self._making = asyncio.Lock()
        self._cost = 0.0  # seconds that making it took
        self._chosen = _Chosen()
        self._specs: tuple[str, dict[str, Any]] = "", {}

    @property
    def version(self) -> str:
        """The name of the run's present state."""
        return f"{self._series}-{self._number}"

    def close(self) -> None:
        """End the threads, once they have done what they do."""
        for pool in (self._thread, self._aside):
            pool.shutdown(wait=False, cancel_futures=True)

    async def watch(self) -> None:
        """Look for changes, for ever: the less often, the longer it takes to make the page."""
        before: object = ()
        while True:
            stamp = await self._in_thread(self._look)
            if stamp != before:
                before = stamp
                self._number += 1
                self._changed.set()
                self._changed = asyncio.Event()
            if not self._made:
                await self.page()  # the history is read before anybody asks for it
            await asyncio.sleep(min(max(LOOK_SECONDS, self._cost / BUSY_SHARE), MOST_SECONDS))

    async def events(self, is_ending: Callable[[], bool]) -> AsyncIterator[str]:
        """The stream to one page."""
        yield "retry: 1000\n\n"
        said, at = "", 0.0
        while not is_ending():
            changed = self._changed
            if said != self.version or time.monotonic() - at > BEAT_SECONDS:
                said, at = self.version, time.monotonic()
                yield f"data: {said}\n\n"
            with suppress(asyncio.TimeoutError):
                await asyncio.wait_for(changed.wait(), 0.5)

    async def page(self) -> tuple[str, str]:
        """The page, and the policy that its scripts run under."""
        return await self._once("page", self._page)

    async def news(self) -> bytes:
        """What a page that is open needs, as JSON: {"data", "html"}; {} when there is no run any more."""
        return await self._once("news", self._news)

    def pin(self, layer: str, channel: int) -> None:
        """Go on showing this channel: a reader looks at it."""
        self._chosen.pin(layer, channel)

    async def _once(self, name: str, make: Callable[[str], Any]) -> Any:
        """What `make` returns, made once a version however many ask for it."""
        async with self._making:
            version, made = self._made.get(name, ("", None))
            if version != self.version:
                version = self.version
                made = await self._in_thread(partial(make, version))
                self._made[name] = version, made
            return made

    async def _in_thread(self, function: Callable[[], Any]) -> Any:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    def _look(self) -> object:
        try:
            return self._tail.stamp()
        except (OSError, ValueError) as error:
            return str(error)

    def _run(self) -> Run | str:
        """The run, or why there is none."""
        try:
            run = self._tail.refresh()
        except (OSError, ValueError) as error:
            return str(error)
        return run or f"Nothing is recorded in {self._path} yet. This page shows it once a training writes there."

    def _page(self, version: str) -> tuple[str, str]:
        run = self._run()
        if isinstance(run, str):
            worn = dress([own_script("live.js")], connects=True)
            told = {"said": run, "version": version, "path": self._path}
            return environment().get_template("waiting.html").render(told | worn), worn["policy"]
        selection, sections, data, specs = self._shown(run, version)
        worn = dress([self._bundle.result(), own_script(*SCRIPTS, "live.js")], connects=True)
        data |= {"specs": specs}
        content = markup(run, selection, sections, specs, live=progress(run), data=data, **worn)
        return content, worn["policy"]

    def _news(self, version: str) -> bytes:
        begin = time.thread_time()
        run = self._run()
        if isinstance(run, str):
            return b"{}"
        selection, sections, data, specs = self._shown(run, version)
        html = markup(run, selection, sections, specs, live=progress(run))
        news = json.dumps({"data": data, "html": html}, allow_nan=False, separators=(",", ":")).encode()
        self._cost = time.thread_time() - begin
        return news

    def _shown(self, run: Run, version: str) -> tuple[Selection, Below, dict[str, Any], dict[str, Any]]:
        selection = self._chosen.select(run)
        sections = below(run, selection, first_look(selection)[0])
        # The specifications hold no data, and making them takes most of a second.
        kind = json.dumps([_kind(selection), _kind(run.results), _kind(sections)])
        if kind != self._specs[0]:
            self._specs = kind, chart_specs(run, selection) | sections.specs()
        specs = self._specs[1]
        layers = [[view.info.name, view.info.channels] for view in selection.layers]
        data = (
            payload(run, selection)
            | sections.payload()
            | {
                "version": version,
                "running": run.status == "running",
                "shape": [selection.run.path.name, layers, sorted(specs)],
            }
        )
        return selection, sections, data, specs


def _kind(value: Any) -> Any:
    """What there is in a value, and what of it is empty, but none of the numbers."""
    if is_dataclass(value):
        return [_kind(getattr(value, each.name)) for each in fields(value)]
    if isinstance(value, dict):
        return {str(key): _kind(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_kind(each) for each in value if is_dataclass(each)] or len(value) > 0
    return value.size > 0 if isinstance(value, np.ndarray) else value is None


class _Chosen:
    """The channels that are shown: those that moved most, chosen again whenever the run is twice as long.

    In between they stay, so that a reader's channel is not taken away; those that readers look at stay always.
    """

    def __init__(self) -> None:
        self._of: object = None
        self._steps = 0
        self._channels: dict[str, list[int]] = {}
        self._pinned: dict[tuple[str, int], None] = {}  # the last one asked for at the end

    def pin(self, layer: str, channel: int) -> None:
        self._pinned.pop((layer, channel), None)
        self._pinned[layer, channel] = None
        if len(self._pinned) > PINNED:
            del self._pinned[next(iter(self._pinned))]

    def select(self, run: Run) -> Selection:
        main = run.main
        of = main.path, main.created, [(layer.name, layer.channels) for layer in main.layers]
        if of != self._of or not self._steps or not self._steps <= len(main.steps) < 2 * self._steps:
            self._of, self._steps, self._channels = of, len(main.steps), {}
        selection = select(run, shown=self._channels)
        if self._channels:
            return selection
        self._channels = {view.info.name: view.channels.tolist() for view in selection.layers}
        channels = {layer.name: layer.channels for layer in main.layers}
        more = [
            (layer, channel)
            for layer, channel in list(self._pinned)
            if channel < channels.get(layer, 0) and channel not in self._channels[layer]
        ]
        for layer, channel in more:
            self._channels[layer].append(channel)
        return select(run, shown=self._channels) if more else selection
