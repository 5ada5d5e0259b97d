"""Kills processes in the midst of fx.save_pretrained, by fork; `python killed_saves.py FOLDER TRIES` prints what it did
as JSON.

A process of its own, because it must import torch and then fork before torch has made a thread. A kill is placed at the
n-th time that Python opens, makes, renames or removes a file below the folder, or has written half of the weights:
never by the clock.
"""

import json
import os
import random
import shutil
import signal
import sys
from pathlib import Path

import torch

import fmxnn as fx
import fmxnn.saving.hub
from fmxnn.core.errors import LockedError

WATCHED = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "half"}
STARTS = ("nothing", "a save", "notes", "a save and notes", "shards and notes")


def module(seed):
    torch.manual_seed(seed)
    weight = fx.DenseWeight(2, 9, 50) if seed % 2 else fx.CPWeight(2, 9, 50, rank=3)
    return fx.Crosscoder(fx.CrossLayerEncoder(weight, fx.TopK(2 + seed)), fx.CrossLayerDecoder(weight))


def same(one, other):
    mine, theirs = one.state_dict(), other.state_dict()
    return (
        mine.keys() == theirs.keys()
        and all(map(torch.equal, mine.values(), theirs.values()))
        and fx.describe(one) == fx.describe(other)
    )


def forked(work):
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = work() or 0
        finally:
            os._exit(code)
    return child


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at(nth, parent):
    """Kills this process at the n-th event below `parent`."""
    seen, save = [], fmxnn.saving.hub.save_file

    def watch(event, given):
        if (event in WATCHED and str(given[0] if given else "").startswith(str(parent))) or event == "os.rmdir":
            seen.append(event)
            if len(seen) > nth:
                os.kill(os.getpid(), signal.SIGKILL)

    def in_halves(tensors, path, **options):
        save(tensors, path, **options)
        whole = path.read_bytes()
        path.write_bytes(whole[: len(whole) // 2])
        sys.audit("half", str(path))
        path.write_bytes(whole)

    fmxnn.saving.hub.save_file = in_halves
    sys.addaudithook(watch)


def begin(parent, start):
    folder, old = parent / "m", None
    if "save" in start or "shards" in start:
        old = module(1)
        fx.save_pretrained(old, folder, max_shard_size="1KB" if "shards" in start else "5GB")
    if "notes" in start:
        (folder / "step-00000001").mkdir(parents=True)
        (folder / "step-00000001" / "model.safetensors").write_text("a checkpoint")
        (folder / "notes.txt").write_text("mine")
    return folder, old


def others(folder):
    return {
        name: (folder / name).read_text()
        for name in ("notes.txt", "step-00000001/model.safetensors")
        if (folder / name).exists()
    }


def attack(parent, start, nth):
    """Whether the save was killed, and a word for what went wrong."""
    parent.mkdir()
    folder, old = begin(parent, start)
    mine, new, last = others(folder), module(2), module(4)

    def work():
        killed_at(nth, parent)
        fx.save_pretrained(new, folder)

    code = finish(forked(work))
    if code not in (0, -signal.SIGKILL):
        return False, f"the save ended with {code}"
    if others(folder) != mine:
        return True, "a file of the user's was touched"
    try:
        found = fx.from_pretrained(folder)
        if not any(same(found, each) for each in ([old] if old else []) + [new]):
            return True, "what loads is neither old nor new"
    except (OSError, ValueError) as error:
        if old or code == 0:
            return True, f"nothing loads: {error}"
    if code == 0 and not same(found, new):
        return True, "what loads is not what was saved"
    fx.save_pretrained(last, folder)
    left = {path.name for path in (*parent.iterdir(), *folder.iterdir())} - {"m", "notes.txt", "step-00000001"}
    if left != {"README.md", "about.json", "config.json", "manifest.json", "model.safetensors"}:
        return True, f"left: {sorted(left)}"
    if others(folder) != mine or not same(fx.from_pretrained(folder), last):
        return True, "the next save is not whole"
    shutil.rmtree(parent)
    return code != 0, ""


def kills(parent, tries):
    """Every place in every start where there are enough tries, else a draw of them."""
    places = []
    for start in STARTS:
        nth = 0
        while attack(parent / f"{start} to {nth}", start, nth)[0]:
            nth += 8
        places += [(start, n) for n in range(nth)]
    drawn = places if tries >= len(places) else random.Random(tries).sample(places, tries)
    return [(start, nth, *attack(parent / f"{start} {nth}", start, nth)) for start, nth in drawn]


def replaced(parent, loads):
    """Loads while two processes save in turn, two modules of other recipes; what was loaded that is neither, and what
    was raised.
    """
    folder, both = parent / "replaced", [module(1), module(2)]
    fx.save_pretrained(both[0], folder)

    def keep_saving():
        while not (parent / "stop").exists():
            for each in both:
                try:
                    fx.save_pretrained(each, folder, max_shard_size=random.choice(("1KB", "5GB")))
                except LockedError as error:
                    if "process" not in str(error):
                        return 1
        return 0

    writers = [forked(keep_saving) for _ in range(2)]
    wrong, seen = [], set()
    for _ in range(loads):
        try:
            found = fx.from_pretrained(folder)
            which = [n for n, each in enumerate(both) if same(found, each)]
            seen |= set(which)
            wrong += [] if which else ["a mixture"]
        except (OSError, ValueError, RuntimeError) as error:
            wrong.append(f"{type(error).__name__}: {error}")
    (parent / "stop").touch()
    codes = [finish(writer) for writer in writers]
    return {
        "wrong": wrong,
        "seen": sorted(seen),
        "codes": codes,
        "left": sorted(path.name for path in folder.iterdir() if path.name[0] == "."),
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    os.fsync = lambda _handle: None  # no kill takes from the system what was written, and a shared disk makes it wait
    where, count = Path(sys.argv[1]).resolve(), int(sys.argv[2])
    json.dump({"kills": kills(where, count), "loads": 3 * count, "replaced": replaced(where, 3 * count)}, sys.stdout)
