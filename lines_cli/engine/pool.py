"""Threads that do one job to every item of a stream."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Generator, Iterable
from contextlib import closing
from typing import Generic, TypeVar

import torch

from lines_cli.engine.devices import Devices, first_line, give_back, is_out_of_memory
from lines_cli.engine.read_ahead import ReadAhead
from lines_cli.engine.workers import Reader
from lines_cli.errors import LinesError, printable

Item = TypeVar("Item")
Result = TypeVar("Result")
Thread = TypeVar("Thread", bound="Reader")


class Pool(Generic[Thread, Item, Result]):
    """Threads that do one job to every item of a stream.

    Args:
        new_worker: makes a thread's worker, in that thread, given its device.
        items: what there is to do, in order.
        job: what is done with each; it can be done again, from the start.
        devices: the device of each thread.
        at_end: is called when no thread is to begin anything more, before they are waited for: what a job waits for
            may come from one that has failed.
    """

    def __init__(
        self,
        new_worker: Callable[[torch.device], Thread],
        items: Iterable[Item],
        job: Callable[[Thread, Item], Result],
        devices: Devices,
        *,
        at_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._new_worker, self._job, self._crew, self._at_end = new_worker, job, devices, at_end
        self._items = ReadAhead(items)
        self._take = threading.Lock()
        self._stop = threading.Event()
        self._done: queue.SimpleQueue[tuple[int, Result] | BaseException | None] = queue.SimpleQueue()

    def run(self) -> Generator[tuple[int, Result], None, None]:
        """Run it; yields every item's number and result as it is done. The first failure stops all and is raised."""
        workers = [
            threading.Thread(target=self._work, args=[device], name=f"lines-worker-{n}", daemon=True)
            for n, device in enumerate(self._crew.members)
        ]
        try:
            for worker in workers:
                try:
                    worker.start()
                except RuntimeError as error:
                    if isinstance(error.__context__, KeyboardInterrupt):  # it came while the thread began
                        raise error.__context__ from None
                    raise MemoryError(str(error)) from error  # Python's way to say that there is none for its stack
            running = len(workers)
            while running:
                found = self._done.get()
                if isinstance(found, BaseException):
                    raise found
                if found is None:
                    running -= 1
                else:
                    yield found
        finally:
            self._stop.set()
            self._at_end()
            for worker in workers:
                if worker.ident is not None:
                    worker.join()
            torch.set_num_threads(torch.get_num_threads())  # the workers' setting is the default of new threads, too
            for device in dict.fromkeys(self._crew.members):
                give_back(device)

    def in_order(self) -> Generator[Result, None, None]:
        """Run it; yields the results in the order of the items, so that sums do not depend on who was faster."""
        early: dict[int, Result] = {}
        due = 0
        with closing(self.run()) as results:
            for number, result in results:
                early[number] = result
                while due in early:
                    yield early.pop(due)
                    due += 1

    def _work(self, device: torch.device) -> None:
        worker = None
        try:
            torch.set_num_threads(1)  # for this thread alone; the workers are the parallelism
            with torch.inference_mode():
                worker = self._new_worker(device)
                while not self._stop.is_set():
                    with self._take:
                        item = self._items.take(worker.sources)
                    if item is None:
                        break
                    self._done.put((item[0], self._do(worker, item[1])))
            self._done.put(None)
        except BaseException as error:  # noqa: BLE001 - handed over to the thread that waits, which raises it
            if not isinstance(error, (LinesError, MemoryError)) and worker is not None and worker.at is not None:
                error.args = (*error.args, f"at tensor {printable(worker.at)}")
            self._done.put(error)

    def _do(self, worker: Thread, item: Item) -> Result:
        """Do the job to one item; in smaller steps, if the device has no memory for it."""
        while True:
            try:
                return self._job(worker, item)
            except RuntimeError as error:
                why = first_line(error)
                if not is_out_of_memory(error):
                    if "alloc" not in str(error):  # torch's way to say it of the host
                        raise
                    raise MemoryError(why) from error
            worker.halve(why)  # here, where no traceback holds the tensors of the attempt any more
