"""A Router's sign of life to its stages."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any, cast

from flexpipe_serve.engine.pipeline_keeper import PipelineKeeper

WAIT_S = 10.0


def test_stages_that_are_ready_hear_of_the_router_while_others_are_brought_up() -> None:
    """They end themselves when nobody speaks to them for a while, and another one may load for minutes."""
    asked, heard, brought_up = threading.Semaphore(0), threading.Event(), threading.Event()

    def reports() -> dict[str, Any]:
        asked.release()
        return {}

    with ThreadPoolExecutor(1) as control:
        busy = control.submit(brought_up.wait, WAIT_S)
        keeper = PipelineKeeper(
            cast(Any, SimpleNamespace(reports=reports)),
            cast(Any, None),
            cast(Any, None),
            cast(Any, SimpleNamespace(update=lambda reports: None)),
            control=control,
            changing=threading.Lock(),
            sign_of_life_s=0.01,
            on_heard=heard.set,
            on_down=lambda: None,
            on_settled=lambda: None,
            note=lambda kind, message: None,
        )
        keeper.start_heartbeat()
        try:
            assert all(asked.acquire(timeout=WAIT_S) for _ in range(3))
            assert not busy.done()
            assert not heard.is_set()
            brought_up.set()
            assert heard.wait(WAIT_S)
        finally:
            brought_up.set()
            keeper.stop()
