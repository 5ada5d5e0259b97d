"""Hidden states that vLLM wrote, as a source: a folder with one safetensors file for each prompt."""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from fmxnn.activations.layer_reader import LayerReader
from fmxnn.activations.places import Layer
from fmxnn.activations.source import Sides
from fmxnn.activations.text import Contexts
from fmxnn.core.errors import FormatError, IntegrityError
from fmxnn.core.excerpt import cut, excerpt
from fmxnn.core.modes import evaluating
from fmxnn.core.sizes import places_of

_STATES, _TOKENS = "hidden_states", "token_ids"
_ALIKE = 0.1
"""Two readings of one place differ by less than this share of their norm, also in bfloat16."""


class VllmSource:
    """`tokens layers d_model`: what vLLM's `ExampleHiddenStatesConnector` wrote, a file for each prompt.

    Each file holds `hidden_states`, `tokens layers d_model`, and `token_ids`. A prompt is a context; they come in the
    order of the files' names, or in yours.

    - `files`: the folder (`shared_storage_path` in vLLM), or paths in the order of your prompts
    - `layer_ids`: `eagle_aux_hidden_state_layer_ids` as vLLM was given them. vLLM counts what a block reads: its
      layer 1 is what block 0 gives, which is layer 0 here, and its layer 0 is -1 here, the embeddings
    - `tokenizer`: its special tokens are dropped; the first token of a prompt always is, since its norm is far larger
    - `name`: the language model's, for reports

    ```python
    from safetensors.torch import save_file

    from fmxnn.activations import Activations, Shuffle, VllmSource

    save_file({"hidden_states": torch.randn(9, 2, 4), "token_ids": torch.arange(9)}, "prompt-0.safetensors")
    stream = Activations(VllmSource(["prompt-0.safetensors"], [1, 2]), Shuffle(batch=4))
    stream.layers  # 0, 1
    ```
    """

    def __init__(
        self,
        files: str | Path | Sequence[str | Path],
        layer_ids: Sequence[int],
        *,
        tokenizer: Any = None,
        name: str = "vLLM",
    ):
        ids = places_of(layer_ids)
        if not ids or min(ids) < 0 or len(set(ids)) < len(ids):
            raise ValueError(
                "layer_ids are different whole numbers, as vLLM's eagle_aux_hidden_state_layer_ids, got "
                f"{excerpt(layer_ids)}"
            )
        self.files, self.layer_ids, self.name = _paths(files), ids, name
        headers = [_header(path, len(ids)) for path in self.files]
        self.d_model, tokens = headers[0][1], [tokens for tokens, _ in headers]
        for path, (_, d_model) in zip(self.files, headers, strict=True):
            if d_model != self.d_model:
                raise FormatError(
                    f"{path} has d_model={d_model}, and {self.files[0]} has {self.d_model}; give the files of one model"
                )
        ids_of = pad_sequence(tokens, batch_first=True)
        special = torch.tensor(getattr(tokenizer, "all_special_ids", []), dtype=torch.int32)
        keep = (torch.arange(ids_of.shape[1]) < torch.tensor([[len(each)] for each in tokens])) & ~torch.isin(
            ids_of, special
        )
        keep[:, 0] = False
        self.contexts = Contexts(ids_of, keep)

    @property
    def layers(self) -> tuple[Layer, ...]:
        """The layers of x as fmxnn counts them: the block that gives it."""
        return tuple(number - 1 for number in self.layer_ids)

    @property
    def device(self) -> torch.device:
        """Files are read into the memory of the processor."""
        return torch.device("cpu")

    def read(self, start: int, stop: int) -> Sides:
        """`tokens layers d_model`: the kept tokens of the prompts from `start` to before `stop`, in order."""
        some = list[Tensor]()
        for path, keep in zip(self.files[start:stop], self.contexts.keep[start:stop], strict=True):
            states = _tensor(path, _STATES)
            some.append(states[keep[: len(states)]])
        return (torch.cat(some),)

    def identity(self) -> dict[str, Any]:
        """A digest of the token ids, and the layers; the files' numbers are not in it."""
        return {"text": self.contexts.digest, "layers": list(self.layers)}


class LastLayer(NamedTuple):
    """What vLLM wrote as the last layer, and how far it is from either reading, as a share of its norm.

    - `place`: "block_out" (what the last block gives), "final_norm" (after the norm behind it), or "neither", which
      means another model or other tokens

    ```python
    from fmxnn.activations import LastLayer

    LastLayer("block_out", block_out=0.002, final_norm=1.3).place
    ```
    """

    place: Literal["block_out", "final_norm", "neither"]
    block_out: float
    final_norm: float


@torch.no_grad()
def compare_last_layer(source: VllmSource, model: nn.Module, *, prompts: int = 4) -> LastLayer:
    """Whether vLLM's last layer is from before or after the final norm, by what `model` gives on the first prompts.

    Versions of vLLM differ in this. `model` is a transformers causal language model, the one that vLLM ran. Raises
    ValueError where the source lacks the last layer.
    """
    last = int(cast("Any", model).config.num_hidden_layers) - 1
    if last not in source.layers:
        raise ValueError(
            f"the last layer of {type(model).__name__} is {last}, vLLM's layer id {last + 1}, and the files hold the "
            f"ids {', '.join(map(str, source.layer_ids))}; let vLLM write it too"
        )
    axis, reader, device = source.layers.index(last), LayerReader(model, [last]), next(model.parameters()).device
    written, before, after = list[Tensor](), list[Tensor](), list[Tensor]()
    with evaluating(model):
        for path in source.files[:prompts]:
            ids = _tensor(path, _TOKENS).to(device).long().unsqueeze(0)
            written.append(_tensor(path, _STATES)[1:, axis].double())
            before.append(reader(ids)[0, 1:, 0].cpu().double())
            after.append(model(input_ids=ids, output_hidden_states=True).hidden_states[-1][0, 1:].cpu().double())
    found = torch.cat(written)
    apart = [float((found - torch.cat(own)).norm() / torch.cat(own).norm()) for own in (before, after)]
    if not min(apart) < _ALIKE:
        return LastLayer("neither", *apart)
    return LastLayer("block_out" if apart[0] <= apart[1] else "final_norm", *apart)


def _paths(files: str | Path | Sequence[str | Path]) -> list[Path]:
    if not isinstance(files, (str, Path)):
        return [Path(path) for path in files]
    folder = Path(files)
    if not folder.is_dir():
        raise FileNotFoundError(
            f"there is no folder {excerpt(str(folder))}; give the shared_storage_path that vLLM wrote into, or a list "
            "of its files"
        )
    found = sorted(folder.glob("*.safetensors"))
    if not found:
        packed = " (its .zst files are compressed: unpack them)" if list(folder.glob("*.zst")) else ""
        raise FormatError(f"{folder} holds no .safetensors file of vLLM{packed}; give its shared_storage_path")
    return found


def _header(path: Path, layers: int) -> tuple[Tensor, int]:
    """The token ids of a prompt, and d_model; the states are not read."""
    ids = _tensor(path, _TOKENS)
    with safe_open(path, framework="pt") as file:
        shape = tuple(file.get_slice(_STATES).get_shape()) if _STATES in cast("Iterable[str]", file.keys()) else ()
    if ids.ndim != 1 or len(shape) != 3 or shape[:2] != (len(ids), layers) or not len(ids):
        raise FormatError(
            f"{path} holds {_STATES} {shape} and {_TOKENS} {tuple(ids.shape)}, expected (tokens, layers={layers}, "
            "d_model) and (tokens,); give the layer_ids that vLLM was given, and only the files that it wrote"
        )
    return ids.to(torch.int32), int(shape[2])


def _tensor(path: Path, name: str) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            if name not in cast("Iterable[str]", file.keys()):
                raise FormatError(
                    f"{path} holds no {name}, so vLLM's hidden-state connector did not write it; leave it out"
                )
            return file.get_tensor(name)
    except (OSError, SafetensorError) as error:
        raise IntegrityError(
            f"{path} cannot be read: {cut(str(error))}; wait until vLLM is done, or leave the file out"
        ) from error
