"""Kills processes in the midst of fmxnn.activations.store, by fork; `python killed_stores.py FOLDER KILLS SEED` prints
what it did as JSON.

A process of its own, because it must import torch and then fork before torch has made a thread. A kill is placed at the
n-th file operation below the folder, between the halves of what is written among them: never by the clock.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from killed_saves import finish, forked
from sources import random_stream

import fmxnn.activations.storing.writing as writing

CHANGES = {"open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod"}
STREAM = {"count": 40, "batch": 8, "block": 4, "pairs": True, "roles": True}
HOW = {"dtype": "int8", "shard_bytes": 700}


def write(folder, progress=lambda: None):
    """Stores all of it, and says each file operation to `progress`."""
    save, sync = writing.save_file, os.fsync

    def halves(path, whole):
        path.write_bytes(whole[: len(whole) // 2])
        progress()
        path.write_bytes(whole)

    def save_file(tensors, path):
        save(tensors, path)
        halves(path, path.read_bytes())

    def audit(event, given):
        if event in CHANGES and str(given[0]).startswith(str(folder)):
            progress()

    def fsync(handle):
        progress()
        sync(handle)

    writing.save_file, Path.write_text = save_file, lambda path, body, **_: halves(path, body.encode())
    os.fsync = fsync
    sys.addaudithook(audit)
    writing.store(random_stream(**STREAM), folder, **HOW)


class Counter:
    """Counts, and kills this process at one of them."""

    def __init__(self, at=0):
        self.seen, self.at = 0, at

    def __call__(self):
        self.seen += 1
        if self.seen == self.at:
            os.kill(os.getpid(), signal.SIGKILL)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()} if folder.exists() else {}


def counted(folder):
    """How many operations an uninterrupted run has, and what it leaves."""
    note = folder.with_name("count")

    def work():
        counter = Counter()
        write(folder, counter)
        note.write_bytes(str(counter.seen).encode())

    code = finish(forked(work))
    return code, int(note.read_bytes()), contents(folder)


def life(folder, draw, most, stops, whole):
    """A store killed up to `stops` times and called again each time, to its end: where, and what is wrong."""
    shutil.rmtree(folder, ignore_errors=True)
    places = []
    while True:
        at = draw.randint(1, most) if len(places) < stops else 0
        mine = {"notes.txt": b"mine"} if folder.exists() else {}
        for name, body in mine.items():
            (folder / name).write_bytes(body)
        code = finish(forked(lambda at=at: write(folder, Counter(at))))
        if code not in (0, -signal.SIGKILL):
            return places, f"the store ended with {code}"
        if contents(folder).items() < mine.items():
            return places, "a file of the user's was touched"
        if code == 0:
            found = contents(folder)
            found.pop("notes.txt", None)
            wrong = sorted(name for name in {*found, *whole} if found.get(name) != whole.get(name))
            return places, f"other bytes or files: {wrong}" if wrong else ""
        places.append(at)


def main():
    folder, kills, seed = Path(sys.argv[1]).resolve(), int(sys.argv[2]), int(sys.argv[3])
    code, most, whole = counted(folder / "whole")
    draw, lives, left = random.Random(seed), [], kills
    while left > 0:
        places, wrong = life(folder / "killed", draw, most, min(left, draw.randint(1, 6)), whole)
        lives.append({"places": places, "wrong": wrong})
        left -= len(places)
        if wrong:
            break
    json.dump({"whole": code, "operations": most, "files": len(whole), "lives": lives}, sys.stdout)


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _handle: None  # no kill takes from the system what was written, and a shared disk makes it wait
    main()
