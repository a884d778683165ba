"""Work done ahead of whoever needs its results, in threads, in order."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor


def ahead(work: Callable, items: Iterable, threads: int, most: int) -> Iterator[tuple]:
    """Each item with what `work` makes of it, or with the error that it raises.

    Args:
        work: of one item.
        items: any number; taken as results are.
        threads: that work.
        most: results that wait, which is what memory holds.
    """
    waiting: deque[tuple[object, Future]] = deque()
    pool = ThreadPoolExecutor(threads, "ahead")
    try:
        for item in items:
            waiting.append((item, pool.submit(work, item)))
            if len(waiting) >= most:
                yield _done(*waiting.popleft())
        while waiting:
            yield _done(*waiting.popleft())
    finally:
        pool.shutdown(cancel_futures=True)


def _done(item, future: Future) -> tuple:
    error = future.exception()
    return item, future.result() if error is None else error
