"""Live matching: what happens to a template's points happens to the query's at once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from uae.errors import CancelledError, ResourceError, UAEError
from UAECommonLib.i18n import _
from UAELandmarkLib.link import QUERY, TEMPLATE, TEMPLATE_POINTS, Link, find_links
from UAELandmarkLib.pairs import Pair
from UAELandmarkLib.preparation import Preparation

__all__ = ["LiveMatching"]

logger = logging.getLogger(__name__)

RETRIES = 1
"""Times that a match is sent again after the worker crashed."""


@dataclass
class _Live:
    """A link being followed: its observers, and the request on its way."""

    link: Link
    side: int
    observers: list[tuple[Any, int]] = field(default_factory=list)
    request: int | None = None
    shown: bool = False
    again: bool = False
    retries: int = 0


class LiveMatching:
    """Follows links; one request a link is on its way until its first answer, then the newest wins.

    Args:
        preparation: of the pairs.
        say: told what the user should know.
        jump: told the world place (3,) RAS mm of the point that was placed last.
    """

    def __init__(
        self, preparation: Preparation, say: Callable[[str], None], jump: Callable[[np.ndarray], None] | None
    ) -> None:
        self._preparation, self._say, self.jump = preparation, say, jump
        preparation.in_use = lambda pair: any(self._pair(live) is pair for live in self._lives.values())
        self._lives: dict[str, _Live] = {}
        self._writing = False

    def follow(self, link: Link, side: int = 5) -> None:
        """Follow a link from now on (also one that is followed already)."""
        self.stop(link.node_id)
        live = self._lives[link.node_id] = _Live(link, side)
        self._observe(live)
        self._catch_up(live)

    def restore(self, scene: Any) -> list[Link]:
        """Follow the links of a scene that were live when it was saved."""
        found = [link for link in find_links(scene) if link.live and link.complete]
        for link in found:
            if link.node_id not in self._lives:
                self.follow(link)
        return found

    def stop(self, node_id: str) -> None:
        """Follow a link no longer; what is on its way is dropped."""
        live = self._lives.pop(node_id, None)
        if live is not None:
            for node, tag in live.observers:
                node.RemoveObserver(tag)
            if live.request is not None:
                self._preparation.client.cancel(live.request)

    def stop_all(self) -> bool:
        """Follow nothing any more; returns whether anything was on its way."""
        busy = any(live.request is not None for live in self._lives.values())
        for node_id in list(self._lives):
            self.stop(node_id)
        return busy

    def stop_incomplete(self) -> None:
        """Follow no longer the links of which a node was removed."""
        for live in list(self._lives.values()):
            if not live.link.complete:
                if live.request is not None:
                    self._say(_("a match is dropped: its points or scans are no longer in the scene"))
                self.stop(live.link.node_id)

    def is_followed(self, node_id: str) -> bool:
        """Whether the link of a query markups node is followed."""
        return node_id in self._lives

    def waits(self) -> bool:
        """Whether an answer is on its way."""
        return any(live.request is not None for live in self._lives.values())

    def catch_up(self, pair: Pair | None = None) -> None:
        """Let all links follow, or those of a pair that became ready."""
        for live in list(self._lives.values()):
            if live.link.complete and (pair is None or self._pair(live) is pair):
                if pair is not None:
                    self._write(lambda live=live: live.link.renew(pair.answer["origin"]))
                self._catch_up(live)

    def _observe(self, live: _Live) -> None:
        link, markups = live.link, live.link.reference(TEMPLATE_POINTS)
        template, query = link.reference(TEMPLATE), link.reference(QUERY)

        def on_change(*_arguments: Any) -> None:
            self._catch_up(live)

        def on_query_moved(*_arguments: Any) -> None:
            if link.complete:
                self._write(link.place_again)

        def on_query_point(*_arguments: Any) -> None:
            if link.complete and not self._writing:
                link.placed_by_hand()

        moved = markups.TransformModifiedEvent
        changes = (
            markups.PointPositionDefinedEvent, markups.PointPositionUndefinedEvent, markups.PointModifiedEvent,
            markups.PointEndInteractionEvent, markups.PointRemovedEvent, moved,
        )  # fmt: skip
        pairs = [(markups, event, on_change) for event in changes]
        pairs += [(template, moved, on_change), (query, moved, on_query_moved)]
        pairs += [(link.node, moved, on_query_moved), (link.node, markups.PointEndInteractionEvent, on_query_point)]
        live.observers = [(node, node.AddObserver(event, call)) for node, event, call in pairs]

    def _catch_up(self, live: _Live) -> None:
        """Let removed and renamed points follow now, and send what has to be matched."""
        link = live.link
        if self._writing or not link.complete or self._lives.get(link.node_id) is not live:
            return
        changes = self._write(link.changes)
        pair = self._pair(live)
        if not changes.to_match or pair is None:
            return
        if live.request is not None and not live.shown:
            live.again = True  # its first answer is shown before the next request: a long drag stays visible
            return
        try:
            self._send(live, pair, changes.to_match)
        except UAEError as error:
            self._say(str(error))

    def _pair(self, live: _Live) -> Pair | None:
        return self._preparation.ready(live.link.reference(TEMPLATE), live.link.reference(QUERY))

    def _send(self, live: _Live, pair: Pair, asked: Mapping[str, tuple[str, np.ndarray]]) -> None:
        live.again, live.shown = False, False

        def mine() -> bool:
            return self._lives.get(live.link.node_id) is live and live.request == number

        def on_partial(record: dict[str, Any]) -> None:
            if mine():
                live.shown = True
                self._show(live, asked, record, final=False)
                if live.again:
                    self._catch_up(live)

        def on_result(record: dict[str, Any]) -> None:
            if mine():
                live.request, live.retries = None, 0
                self._show(live, asked, record, final=True)
                self._catch_up(live)

        def on_error(error: UAEError) -> None:
            if not mine():
                return
            live.request = None
            if isinstance(error, ResourceError) and live.retries < RETRIES:
                live.retries += 1
                logger.info("%s; the match is sent again", error)
                self._catch_up(live)
            elif not isinstance(error, CancelledError):
                self._say(str(error))

        number = live.request = self._preparation.client.match(
            pair.name,
            [place for _label, place in asked.values()],
            [label for label, _place in asked.values()],
            method=live.link.method,
            side=live.side,
            live=True,
            on_partial=on_partial,
            on_result=on_result,
            on_error=on_error,
        )

    def _show(
        self, live: _Live, asked: Mapping[str, tuple[str, np.ndarray]], record: Mapping[str, Any], final: bool
    ) -> None:
        link = live.link
        if not link.complete:
            self._say(_("a match is dropped: its points or scans are no longer in the scene"))
            return
        last = self._write(lambda: link.show(asked, record["matches"], final))
        pair = self._pair(live)
        if final and pair is not None:
            link.tell_origin(pair.answer)
        for match in record["matches"]:
            if final and match["point_mm"] is None:
                self._say(_("{label}: {reason}").format(label=match["label"], reason=match["reason"]))
        if last is not None and self.jump is not None:
            self.jump(link.world_of(last))

    def _write(self, change: Callable[[], Any]) -> Any:
        """Change our own nodes without hearing it as the user's doing."""
        before, self._writing = self._writing, True
        try:
            return change()
        finally:
            self._writing = before
