"""Runs that end before their time: whose blocks fail, or that are killed (``kill -9``) at random
moments, as by a crash or a power cut."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import numpy as np

from znni_dask.job import BlockMaker

SLOW = """
import itertools, sys, time
from znni_dask import cli, job, pyramid
LOG, PAUSE, MOST = sys.argv.pop(1), float(sys.argv.pop(1)), int(sys.argv.pop(1))
maker, turns = {maker}, itertools.count()
honest = maker.make
def slow(self, moment, block, *kind):
    if next(turns) >= MOST:
        time.sleep(3600)
    made = honest(self, moment, block, *kind)
    with open(LOG, "a") as log:
        log.write(f"{{getattr(self, 'level', 0)}} {{moment}} {{block.start}}\\n")
    time.sleep(PAUSE)
    return made
maker.make = slow
{before}
sys.exit(cli.main(sys.argv[1:]))
"""


def failing_after(count, monkeypatch, message):
    """Blocks beyond the first ``count`` fail; returns the blocks begun."""
    honest, seen, lock = BlockMaker.make, [], threading.Lock()

    def make(self, moment, block, *kind):
        with lock:
            seen.append(block.start)
            beyond = len(seen) > count
        if beyond:
            raise RuntimeError(message)
        return honest(self, moment, block, *kind)

    monkeypatch.setattr(BlockMaker, "make", make)
    return seen


class SlowCommand:
    """`znni` in processes of their own; every block takes a moment and is noted in a log.

    ``maker`` is the class whose blocks are meant, ``before`` what else is run first.
    """

    def __init__(self, folder, *arguments, maker="job.BlockMaker", before="", pause=0.02):
        self.script, self.log = folder / "slow.py", folder / "log"
        self.script.write_text(SLOW.format(maker=maker, before=before))
        self.pause, self.arguments = pause, arguments

    def words(self, most=1 << 30):
        """The command; beyond ``most`` blocks it waits, to be killed."""
        return [
            *(sys.executable, str(self.script), str(self.log), str(self.pause), str(most)),
            *map(str, self.arguments),
        ]

    def blocks(self):
        """The blocks made so far, in all processes."""
        return self.log.read_text().split("\n")[:-1] if self.log.exists() else []

    def killed(self, kills, most):
        """Run it and kill it ``kills`` times: at a random moment after it made its first block,
        every fourth time at one after it was started, whatever it does then. Of no more than
        ``most`` blocks each time, it never comes to its end."""
        random = np.random.default_rng(1)
        for number in range(kills):
            begun = len(self.blocks())
            quiet = subprocess.DEVNULL
            run = subprocess.Popen(self.words(most), stdout=quiet, stderr=quiet)
            while run.poll() is None and number % 4 < 3 and len(self.blocks()) == begun:
                time.sleep(0.01)
            time.sleep(float(random.uniform(0, 0.4 if number % 4 < 3 else 3)))
            assert run.poll() is None, "it ended by itself"
            run.send_signal(signal.SIGKILL)
            run.wait()

    def finished(self):
        """Run it to its end; what it printed."""
        done = subprocess.run(self.words(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        return done.stdout
