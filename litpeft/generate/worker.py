"""The thread that computes the answers of a server."""

import threading
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from litpeft.generate.batch import Batch, Request

T = TypeVar("T")


class Worker(threading.Thread):
    """Computes the answers to what is added to its batches, by turns, until it is stopped."""

    def __init__(self, batches: Sequence[Batch], failed: Callable[[Exception], None]):
        """`failed` is told of an error that is not the fault of one request; all those of its batch have failed."""
        super().__init__(name="answers", daemon=True)
        self.batches, self.failed = batches, failed
        self.changed = threading.Condition()
        self.stopped = False
        self.work: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()

    def add(self, batch: Batch, requests: Iterable[Request]) -> None:
        with self.changed:
            batch.waiting.extend(requests)
            self.changed.notify()

    def between_steps(self, work: Callable[[], T]) -> Future[T]:
        """Lets the thread do something while no answer is being computed; returns its result to come."""
        with self.changed:
            done: Future[T] = Future()
            self.work.put((done, work))
            self.changed.notify()
        return done

    def stop(self) -> None:
        """Ends the thread after its step, and waits for that."""
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.join()
        while not self.work.empty():
            self.work.get()[0].cancel()

    def has_work(self) -> bool:
        return self.stopped or not self.work.empty() or any(batch.count for batch in self.batches)

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(self.has_work)
                if self.stopped:
                    return
            while not self.work.empty():
                done, work = self.work.get()
                if not done.set_running_or_notify_cancel():
                    continue
                try:
                    done.set_result(work())
                except Exception as error:
                    done.set_exception(error)
            for batch in self.batches:
                try:
                    batch.step()
                except Exception as error:  # the server lives on: whoever waits is told
                    self.failed(error)
                    for request in batch.clear():
                        request.ended(error)
