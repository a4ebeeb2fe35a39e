"""A bar on the terminal while weights are loaded."""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def loading_bar(total_bytes: int, *, shown: bool | None) -> Iterator[Callable[[int], None]]:
    """Give a function that is told of bytes as they are loaded, from any thread; the bar is on stderr.

    shown: None shows it where stderr is a terminal. Without tqdm, which comes with huggingface_hub, there is none.
    """
    if shown is None:
        shown = sys.stderr.isatty()
    try:
        from tqdm import tqdm
    except ImportError:
        shown = False
    if not shown or not total_bytes:
        yield lambda nbytes: None
        return
    lock = threading.Lock()
    with tqdm(total=total_bytes, desc="Loading weights", unit="B", unit_scale=True, file=sys.stderr) as bar:

        def loaded(nbytes: int) -> None:
            with lock:
                bar.update(nbytes)

        yield loaded
