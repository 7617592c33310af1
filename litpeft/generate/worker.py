"""The thread that computes the answers of a server."""

import threading
from collections.abc import Callable, Iterable, Sequence

from litpeft.generate.batch import Batch, Request


class Worker(threading.Thread):
    """Computes the answers to what is added to its batches, by turns, until it is stopped."""

    def __init__(self, batches: Sequence[Batch], failed: Callable[[Exception], None]):
        """`failed` is told of an error that is not the fault of one request; all those of its batch have failed."""
        super().__init__(name="answers", daemon=True)
        self.batches, self.failed = batches, failed
        self.changed = threading.Condition()
        self.stopped = False

    def add(self, batch: Batch, requests: Iterable[Request]) -> None:
        with self.changed:
            batch.waiting.extend(requests)
            self.changed.notify()

    def stop(self) -> None:
        """Ends the thread after its step, and waits for that."""
        with self.changed:
            self.stopped = True
            self.changed.notify()
        self.join()

    def run(self) -> None:
        while True:
            with self.changed:
                self.changed.wait_for(lambda: self.stopped or any(batch.count for batch in self.batches))
                if self.stopped:
                    return
            for batch in self.batches:
                try:
                    batch.step()
                except Exception as error:  # the server lives on: whoever waits is told
                    self.failed(error)
                    for request in batch.clear():
                        request.ended(error)
