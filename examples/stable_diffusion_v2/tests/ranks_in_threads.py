"""Several ranks of a script in one process: each a thread, their hub a list."""

import json
import threading

from ldm.parallel.ranks import Ranks


class InThreads(Ranks):
    """A rank that is a thread."""

    def __init__(self, rank, meeting, given):
        super().__init__(rank, len(given))
        self.meeting, self.given = meeting, given

    def gather(self, at, value=None):
        self.given[self.rank] = json.dumps(value)
        self.meeting.wait(60)
        values = [json.loads(value) for value in self.given]
        self.meeting.wait(60)
        return values


def run_ranks(monkeypatch, size: int, script, words: list[str]) -> None:
    """The `main` of a script's module as every rank of `size`, all at once."""
    meeting, given = threading.Barrier(size), [None] * size
    ranks = {f"rank {n}": InThreads(n, meeting, given) for n in range(size)}
    monkeypatch.setattr(script.runtime, "join", lambda use_parallel: ranks[threading.current_thread().name])
    words = [*words, "--use_parallel", "True"]
    threads = [threading.Thread(target=script.main, args=(words,), name=name) for name in ranks]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
