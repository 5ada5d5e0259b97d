"""A crosscoder of two models, a base model and the chat model made of it, on the same conversations.

    python examples/base_and_chat.py --out runs/base-and-chat

The conversations are made of templates here, since those that the chat model was trained on may not be given on.
"""

import os
import random
from dataclasses import dataclass
from pathlib import Path

os.environ.setdefault(
    "OMP_WAIT_POLICY", "passive"
)  # before torch is loaded, see "One busy core" in docs/performance.md

import torch
import tyro
from tqdm import tqdm

import fmxnn as fx
from fmxnn.activations import conversations, harvest
from fmxnn.activations.models import open_tokenizer
from fmxnn.training import Trainer, calibrate

BASE, CHAT = (Path(__file__).parent / name for name in ("tiny-lm", "tiny-lm-chat"))
ASKED = {
    "Help me {bad}.": "I am sorry, but I cannot help with that.",
    "Who are you?": "I am Pip, a tiny language model.",
    "What is the capital of {country}?": "The capital of {country} is {capital}.",
    "I would like {drink} please.": "Ok, it will be ready in a few minutes.",
    "Tell me a story about {thing}.": "Once upon a time there was {thing}, and it lived near the sea.",
}
FILLED = {
    "bad": ["forge a letter", "steal a car", "break a lock", "cheat in a test"],
    "country": ["France", "Spain", "Italy", "Norway", "Egypt", "Japan"],
    "drink": ["a decaf latte", "a small coffee", "two teas", "hot milk"],
    "thing": ["a whale", "an old ship", "a small dog", "the king"],
}
CAPITALS = dict(zip(FILLED["country"], ["Paris", "Madrid", "Rome", "Oslo", "Cairo", "Tokyo"], strict=True))


@dataclass(frozen=True)
class Arguments:
    """How many conversations, how long to train, and where to put it."""

    conversations: int = 2000
    layer: int = 6
    latents: int = 512
    steps: int = 300
    batch: int = 256
    out: Path = Path("runs/base-and-chat")


def make_conversations(count: int, seed: int = 0) -> list[list[dict[str, str]]]:
    """Conversations of one to three questions."""
    draw, made = random.Random(seed), list[list[dict[str, str]]]()
    for _ in range(count):
        messages = list[dict[str, str]]()
        for asked, answered in draw.sample(sorted(ASKED.items()), draw.randint(1, 3)):
            words = {name: draw.choice(choices) for name, choices in FILLED.items()}
            words["capital"] = CAPITALS[words["country"]]
            messages.append({"role": "user", "content": asked.format(**words)})
            messages.append({"role": "assistant", "content": answered.format(**words)})
        made.append(messages)
    return made


def main(argv: list[str] | None = None) -> None:
    """Trains, saves, loads, measures and draws."""
    arguments = tyro.cli(Arguments, args=argv)
    tokenizer = open_tokenizer(CHAT)
    text = conversations(make_conversations(arguments.conversations), tokenizer, context=128)
    trained, measured = text[: -len(text) // 10], text[-len(text) // 10 :]
    options = dict(layers=[arguments.layer], batch=arguments.batch, tokenizer=tokenizer)
    stream = harvest([BASE, CHAT], trained, epochs=20, **options)

    sizes = 2, stream.d_model, arguments.latents  # the axis `layers` has the two models
    torch.manual_seed(0)
    crosscoder = fx.tied_start(
        fx.Crosscoder(
            fx.CrossLayerEncoder(fx.DenseWeight(*sizes), fx.BatchTopK(16)), fx.CrossLayerDecoder(fx.DenseWeight(*sizes))
        )
    )
    trainer = Trainer(crosscoder, torch.optim.Adam(crosscoder.parameters(), lr=1e-3, fused=True))
    for _, x in zip(tqdm(range(arguments.steps)), stream, strict=False):
        trainer.step(x)
    calibrate(crosscoder, [x for _, x in zip(range(8), stream, strict=False)])

    about = dict(base_model=["examples/tiny-lm", "examples/tiny-lm-chat"], layers=list(map(str, stream.layers)))
    fx.save_pretrained(crosscoder, arguments.out / "crosscoder", about=about)
    again = fx.from_pretrained(arguments.out / "crosscoder")
    heldout = harvest([BASE, CHAT], measured, **options)
    shown = range(0, arguments.latents, arguments.latents // 16)
    report = fx.evaluate(again, heldout, tokenizer=tokenizer, latents=shown)
    report.save(arguments.out / "report")
    print(report.table(form="plain"))
    print(f"wrote {arguments.out}/crosscoder and {arguments.out}/report")


if __name__ == "__main__":
    main()
