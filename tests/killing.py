"""Runs examples/train.py in forked processes and kills them; `python tests/killing.py FOLDER KILLS` prints what it did as JSON.

A process of its own, because it must import torch and then fork before torch has made a thread.
"""

import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
train = importlib.import_module("train")


def make_model(folder):
    words = {f"w{i}": i + 1 for i in range(62)} | {"<eos>": 0, "<unk>": 63}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>").save_pretrained(folder)
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(vocab_size=64, n_positions=16, n_embd=8, n_layer=3, n_head=2)).save_pretrained(folder)
    draw = random.Random(0)
    (folder / "text.txt").write_text(" ".join(f"w{draw.randrange(62)}" for _ in range(40_000)))


def arguments(folder, out, *, resume):
    sizes = "--layers 0 2 --latents 32 --k 3 --context 16 --batch 64 --tokens 32000 --heldout 1000 --auxiliary --dead-after 500"
    often = "--checkpoint-every 3 --evaluate-every 100 --device cpu --dtype float32 --learning-rate 1e-2"
    where = f"--model {folder} --text {folder / 'text.txt'} --out {out}"
    return [*sizes.split(), *often.split(), *where.split(), *(["--resume"] if resume else [])]


def forked(work):
    child = os.fork()
    if child == 0:
        log = os.open(os.environ["KILLING_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = 99
        with contextlib.suppress(BaseException):
            code = work() or 0
        os._exit(code)
    return child


def run(folder, out):
    return forked(lambda: train.main(arguments(folder, out, resume=any(out.glob("step-*")))))


def finish(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def killed_at_random(folder, kills, draw):
    """How many of the kills found a checkpoint to go on from, and the exit code of the last run, which is left alone."""
    out, done, resumable = folder / "killed", 0, 0
    while done < kills:
        child = run(folder, out)
        time.sleep(draw.uniform(0.05, 0.6))
        if os.waitpid(child, os.WNOHANG)[0]:
            shutil.rmtree(out)  # a fast machine finished it: begin anew
            continue
        os.kill(child, signal.SIGKILL)
        finish(child)
        done, resumable = done + 1, resumable + any(out.glob("step-*"))
    return resumable, finish(run(folder, out))


def terminated(folder):
    """The exit codes of a run stopped by SIGTERM after its first checkpoint, and of the run that resumed it."""
    out = folder / "terminated"
    child = run(folder, out)
    while not any(out.glob("step-*")):
        time.sleep(0.005)
    os.kill(child, signal.SIGTERM)
    return finish(child), finish(run(folder, out))


def main():
    folder, kills = Path(sys.argv[1]), int(sys.argv[2])
    os.environ["KILLING_LOG"] = str(folder / "log.txt")
    folder.joinpath("model").mkdir()
    finish(forked(lambda: make_model(folder / "model")))
    began = time.time()
    whole = finish(run(folder / "model", folder / "model" / "whole"))
    seconds = time.time() - began
    resumable, final = killed_at_random(folder / "model", kills, random.Random(7))
    json.dump(
        {"whole": whole, "seconds": seconds, "resumable": resumable, "final": final, "terminated": terminated(folder / "model")}, sys.stdout
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
