"""Runs fmxnn train in forked processes that stop themselves, and prints what became of them as JSON.

python tests/faults/killing.py FOLDER SEED KILLS TERMINATIONS

A process of its own, because it must import torch and then fork before torch has made a thread. Where a run ends is
drawn from what it does, the n-th file operation or the n-th step, and never from the clock: a busy machine changes
nothing.
"""

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

import fmxnn.activations.models as harvest
import fmxnn.training.checkpoint as checkpoint
from fmxnn.reports import command_line, train

STEPS, EVERY = 30, 3
CHANGES = {"open", "os.rename", "os.link", "os.mkdir", "os.rmdir", "os.remove", "os.chmod", "os.truncate"}


def make_model(folder):
    words = {f"w{i}": i + 1 for i in range(62)} | {"<eos>": 0, "<unk>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=3, n_head=2)).save_pretrained(folder)
    draw = random.Random(0)
    (folder / "text.txt").write_text(" ".join(f"w{draw.randrange(62)}" for _ in range(5_000)))


def warm(folder):
    """Reads the language model once for all the runs to come: what is attacked begins after that."""
    tokenizer, model = (
        harvest.open_tokenizer(folder),
        harvest.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32),
    )
    train.open_tokenizer = lambda _: tokenizer
    harvest.AutoModelForCausalLM = SimpleNamespace(from_pretrained=lambda _, dtype: model.to(dtype))


def arguments(folder, out, *, resume):
    sizes = (
        f"--layers 0 2 --latents 32 --k 3 --context 16 --batch 64 --tokens {64 * STEPS} --heldout 500 --auxiliary "
        "--dead-after 500"
    )
    often = f"--checkpoint-every {EVERY} --evaluate-every 10 --device cpu --dtype float32 --learning-rate 1e-2"
    where = f"--model {folder} --text {folder / 'text.txt'} --out {out}"
    return [*sizes.split(), *often.split(), *where.split(), *(["--resume"] if resume else [])]


class Progress:
    """Counts the steps and the file operations below `out`, and sends this process a signal at the drawn one."""

    def __init__(self, out, *, kind="", at=0, number=signal.SIGKILL):
        self.out, self.kind, self.at, self.number = str(out), kind, at, number
        self.counts = {"step": 0, "file": 0}

    def happened(self, kind):
        self.counts[kind] += 1
        if kind == self.kind and self.counts[kind] == self.at:
            os.kill(os.getpid(), self.number)

    def watch(self):
        """Before each operation, between the halves of what is written, and on both sides of a step."""
        register_optimizer_step_pre_hook(lambda *_: self.happened("step"))
        register_optimizer_step_post_hook(lambda *_: self.happened("step"))
        sync, save = os.fsync, checkpoint.save_file

        def fsync(handle):
            self.happened("file")
            sync(handle)

        def save_file(tensors, path):
            save(tensors, path)
            body = path.read_bytes()
            self.write(path, body)

        os.fsync, checkpoint.save_file = fsync, save_file
        Path.write_text = lambda path, text, **_: self.write(path, text.encode())
        sys.addaudithook(self.audit)

    def write(self, path, body):
        with path.open("wb") as file:
            file.write(body[: len(body) // 2])
            file.flush()
            self.happened("file")
            file.write(body[len(body) // 2 :])
        return len(body)

    def audit(self, event, given):
        if event not in CHANGES or (event == "open" and not given[2] & (os.O_WRONLY | os.O_RDWR)):
            return
        in_a_folder = (
            event in ("os.remove", "os.rmdir") and given[-1] != -1
        )  # as rmtree does it, by a name in an open folder
        if in_a_folder or str(given[0]).startswith(self.out):
            self.happened("file")


def forked(work):
    child = os.fork()
    if child == 0:
        log = os.open(os.environ["KILLING_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 99
        with contextlib.suppress(SystemExit):
            code = work() or 0
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def run(folder, out, progress):
    """Trains, or goes on from a checkpoint; the exit code."""

    def work():
        progress.watch()
        code = command_line.main(["train", *arguments(folder, out, resume=any(out.glob("step-*")))])
        (folder / "counts.json").write_bytes(json.dumps(progress.counts).encode())
        return code

    return forked(work)


def life(folder, draw, counts, stops, number):
    """A run stopped up to `stops` times and resumed each time, to its end: where it stopped, and what is not as in the
    whole run.
    """
    out, stopped, code = folder / "stopped", [], None
    shutil.rmtree(out, ignore_errors=True)
    while code != 0:
        kind, left = (
            draw.choice(["step", "file"]),
            min(1, 1 - newest(out) / STEPS + EVERY / STEPS),
        )  # the end of a run saves too
        at = draw.randint(1, round(left * counts[kind])) if len(stopped) < stops else 0
        began = time.perf_counter()
        code = run(folder, out, Progress(out, kind=kind, at=at, number=number))
        if code:
            stopped.append(
                {"at": f"{kind} {at} of {counts[kind]}", "code": code, "seconds": time.perf_counter() - began}
            )
        if code not in {0, -number, 128 + number}:
            return {"stops": stopped, "wrong": f"exit code {code}"}
    return {"stops": stopped, "wrong": difference(out, folder / "whole", signalled=number == signal.SIGTERM)}


def newest(out):
    return max((int(path.name[5:]) for path in out.glob("step-????????")), default=0)


def difference(out, whole, *, signalled):
    kept = [
        sorted(path.name for path in folder.iterdir() if path.name.startswith((".", "step-")))
        for folder in (out, whole)
    ]
    # a signal saves at the step where it comes, so that other steps may be the newest three
    if kept[0][-1:] != kept[1][-1:] or len(kept[0]) != len(kept[1]) or (kept[0] != kept[1] and not signalled):
        return f"it holds {kept[0]}"
    files = [f"{path}/{name}.safetensors" for path in kept[1] if path in kept[0] for name in ("crosscoder", "trainer")]
    for name in (*files, "crosscoder/model.safetensors", "crosscoder/config.json", "log.jsonl"):
        if (out / name).read_bytes() != (whole / name).read_bytes():
            return f"{name} has other bytes"
    return ""


def lives(folder, draw, counts, stops, number):
    made = []
    while stops > 0:
        made.append(life(folder, draw, counts, min(stops, draw.randint(2, 8)), number))
        stops -= len(made[-1]["stops"])
        if made[-1]["wrong"]:
            break
    return made


def main():
    folder, seed, kills, terminations = Path(sys.argv[1]), *map(int, sys.argv[2:])
    os.environ["KILLING_LOG"] = str(folder / "log.txt")
    model = folder / "model"
    model.mkdir()
    forked(lambda: make_model(model))
    warm(model)
    began = time.perf_counter()
    code = run(model, model / "whole", Progress(model / "whole"))
    result = {
        "whole": code,
        "seconds": time.perf_counter() - began,
        "counts": json.loads((model / "counts.json").read_text()),
    }
    draw = random.Random(seed)
    result["killed"] = lives(model, draw, result["counts"], kills, signal.SIGKILL)
    result["terminated"] = lives(model, draw, result["counts"], terminations, signal.SIGTERM)
    spent = os.times()
    json.dump(
        result
        | {
            "all seconds": time.perf_counter() - began,
            "processor seconds": spent.children_user + spent.children_system,
        },
        sys.stdout,
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
