"""What all adapters to published networks share: the folder, the tokenizer, the ids, the saving.

A published network keeps the names, shards and companion files of the folder that it came from, so that a tuned model
is written in the format in which it was read. Nothing of a folder is executed: the network is a class of the library
``transformers`` or one of ours, never the modelling code that lies beside the weights.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from unveil.denoisers.base import DenoiserSpec, MaskedDenoiser
from unveil.denoisers.folder import read_config
from unveil.denoisers.tokenizer import TextTokenizer
from unveil.registry import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Dtype = Literal["fp32", "bf16"]
WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
END_OF_TURN = ("<|eot_id|>", "<|im_end|>", "<|role_end|>", "<|endoftext|>")
"""Tokens that end an answer beside the end-of-sequence token, where the vocabulary has them."""
MASKS = ("<|mask|>", "<|mdm_mask|>", "<|MASK|>")
"""The mask's written forms, for folders in which nothing says which token it is."""
NO_SETTINGS = ("auto_map", "architectures", "torch_dtype", "dtype", "transformers_version")
"""Keys of config.json that say nothing of the network's shape."""
_COMPANIONS = {".json", ".txt", ".jinja", ".py", ".model"}
_TOKENIZER_FILES = {
    "Qwen2Tokenizer": ("vocab.json", "merges.txt"),
    "GPT2Tokenizer": ("vocab.json", "merges.txt"),
    "BertTokenizer": ("vocab.txt",),
}


class Part(NamedTuple):
    """A tensor of the network, or a slice of one."""

    name: str
    where: tuple[int | slice, ...] = ()

    def of(self, state: Mapping[str, Tensor]) -> Tensor:
        return state[self.name][self.where]


Names = Mapping[str, Sequence[Part]]
"""What each tensor of the files holds: parts of the network, one below the other; none if it is not read."""


class PublishedFolder:
    """config.json, the names and shapes of the weights, and the small files beside them. No weight is read yet.

    Raises:
        UserError: a file is missing or broken.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = read_config(folder)
        self.sharded = (folder / INDEX).is_file()
        self.shapes: dict[str, tuple[int, ...]] = {}
        """Shape of every tensor, by its name in the files."""
        self.shard: dict[str, str] = {}
        """File of every tensor."""
        for file in self._files():
            with _open(folder / file) as weights:
                for name in weights.keys():  # noqa: SIM118 (no mapping)
                    self.shapes[name] = tuple(weights.get_slice(name).get_shape())
                    self.shard[name] = file
        self.companions = {
            path.name: path.read_bytes()
            for path in sorted(folder.iterdir())
            if path.is_file()
            and (path.suffix in _COMPANIONS or path.name.startswith(("LICENSE", "NOTICE")))
            and path.name not in ("config.json", INDEX)
        }

    def _files(self) -> list[str]:
        if not self.sharded:
            if not (self.folder / WEIGHTS).is_file():
                raise UserError(f"{self.folder}: holds neither {WEIGHTS} nor {INDEX} (other formats are not read)")
            return [WEIGHTS]
        path = self.folder / INDEX
        try:
            files = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not an index of safetensors shards: {error!r}") from error
        for file in files:
            if Path(file).name != file or not (self.folder / file).is_file():
                raise UserError(f"{self.folder / file}: no such file ({INDEX} names it)")
        return files

    def pair(self, network: nn.Module, names: Names) -> None:
        """Check that the files hold exactly the network's weights.

        Raises:
            UserError: the first weight that is missing, unknown or of another shape.
        """
        own = network.state_dict()
        where = self.folder / "config.json"
        found: dict[int, int] = {}  # numbers that the files give, by place in memory: tied weights share one
        for name, parts in names.items():
            if not parts:
                continue
            file = self.folder / self.shard[name]
            try:
                views = [part.of(own) for part in parts]
            except (KeyError, IndexError):
                raise UserError(f"{file}: has {name!r}, which the model of {where} does not") from None
            wanted = tuple(views[0].shape)
            if len(views) > 1:
                wanted = (sum(len(view) for view in views), *wanted[1:])
            if (got := self.shapes[name]) != wanted:
                raise UserError(f"{file}: {name!r} is {got}, the model of {where} has {wanted}")
            for part, view in zip(parts, views, strict=True):
                place = own[part.name].data_ptr()
                found[place] = found.get(place, 0) + view.numel()
        lacking = sorted(name for name, value in own.items() if found.get(value.data_ptr(), 0) < value.numel())
        if lacking:
            raise UserError(f"{self.folder}: the weights lack what the model of {where} calls {lacking[0]!r}")

    @torch.no_grad()
    def load(self, network: nn.Module, names: Names) -> None:
        """Copy the weights into the network, shard by shard; it decides the dtype."""
        own = network.state_dict()
        for file in sorted(set(self.shard.values())):
            with _open(self.folder / file) as weights:
                for name, parts in names.items():
                    if not parts or self.shard[name] != file:
                        continue
                    views, value = [part.of(own) for part in parts], weights.get_tensor(name)
                    pieces = value.split([len(view) for view in views]) if len(views) > 1 else [value]
                    for view, piece in zip(views, pieces, strict=True):
                        view.copy_(piece)

    def save(self, folder: Path, network: nn.Module, names: Names) -> None:
        """Write the network in the format of this folder: the same names, shards and companion files."""
        folder.mkdir(parents=True, exist_ok=True)
        state, kept, size = network.state_dict(), [name for name, parts in names.items() if parts], 0
        for file in sorted(set(self.shard.values())):
            written, seen = {}, set()
            for name in kept:
                if self.shard[name] == file:
                    views = [part.of(state).detach().cpu() for part in names[name]]
                    value = torch.cat(views) if len(views) > 1 else views[0].contiguous()
                    owner = value.untyped_storage().data_ptr()
                    written[name] = value.clone() if owner in seen else value  # no shared memory in a file
                    seen.add(owner)
                    size += value.nbytes
            save_file(written, folder / file, metadata={"format": "pt"})
        if self.sharded:
            index = {"metadata": {"total_size": size}, "weight_map": {name: self.shard[name] for name in kept}}
            (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
        dtype = str(next(network.parameters()).dtype).removeprefix("torch.")
        stored = {key: dtype for key in ("torch_dtype", "dtype") if key in self.config}
        (folder / "config.json").write_text(json.dumps(self.config | stored, indent=2) + "\n", encoding="utf-8")
        for name, content in self.companions.items():
            (folder / name).write_bytes(content)


class PretrainedDenoiser(MaskedDenoiser):
    """A published network in the normal form. A subclass says how it is built, named and called."""

    tokenizer_class: ClassVar[str] = "Qwen2Tokenizer"
    """The class of ``transformers`` that reads a folder without tokenizer.json."""
    has_mask: ClassVar[bool] = True
    """False for networks whose noise is random tokens."""
    forbidden_bias: Tensor

    def __init__(self, network: nn.Module, published: PublishedFolder, text: Any, *, chat: bool = False) -> None:
        """``text`` is the tokenizer as ``transformers`` opens it; ``chat`` wraps prompts into its chat template."""
        super().__init__()
        self.network, self.published = network, published
        self.names = {name: self.parts(name) for name in published.shapes}
        self.frame = _Frame(text, chat, published.folder)
        self.spec = self._make_spec(text)
        spec = self.spec
        controls = {spec.mask_id, spec.pad_id, *spec.end_ids}
        self.tokenizer = TextTokenizer(
            text.backend_tokenizer,
            controls={*controls, *spec.forbidden_ids},
            unknown=None if text.unk_token_id in controls else text.unk_token_id,  # GPT-2's is its end token
        )
        bias = torch.zeros(self.spec.vocab_size)
        bias[list(self.spec.forbidden_ids)] = -torch.inf
        self.register_buffer("forbidden_bias", bias, persistent=False)

    @classmethod
    def from_pretrained(
        cls, folder: str | Path, *, dtype: Dtype = "fp32", chat: bool = False, gradient_checkpointing: bool = False
    ) -> PretrainedDenoiser:
        """Read a published folder.

        Raises:
            UserError: a file is missing or broken, the configuration is one that this adapter does not know, or the
                weights are of another architecture. All of it is found before a weight is read.
        """
        folder = Path(folder)
        if dtype not in DTYPES:
            raise UserError(f"dtype: {dtype!r} is not known (allowed: {', '.join(DTYPES)})")
        published = PublishedFolder(folder)
        text = read_tokenizer(cls.tokenizer_folder(folder), cls.tokenizer_class)
        network = cls.built(published, dtype)
        denoiser = cls(network, published, text, chat=chat)
        published.pair(network, denoiser.names)
        published.load(network, denoiser.names)
        if gradient_checkpointing:
            denoiser.checkpoint_gradients()
        return denoiser.eval()

    @classmethod
    def built(cls, published: PublishedFolder, dtype: Dtype) -> nn.Module:
        """The network of a folder, its weights not yet read.

        Raises:
            UserError: the configuration is one that this adapter does not know.
        """
        where = published.folder / "config.json"
        try:
            with empty_weights(DTYPES[dtype]):
                return cls.build(published.config)
        except UserError as error:
            raise UserError(f"{where}: {error}") from error
        except Exception as error:  # a configuration may break the library's constructors in any way
            raise UserError(f"{where}: {first_line(error)}") from error

    @classmethod
    @abstractmethod
    def build(cls, config: dict[str, Any]) -> nn.Module:
        """The network of a config.json, bidirectional and without any dropout, its weights not yet set.

        Dropout stays off in training too: the ratio of a policy to itself must be 1.
        """

    def rename(self, name: str) -> str | None:
        """The network's own name of a tensor in the files; None for one that nothing here reads."""
        return name

    def parts(self, name: str) -> list[Part]:
        """What a tensor in the files holds."""
        inner = self.rename(name)
        return [] if inner is None else [Part(inner)]

    @classmethod
    def tokenizer_folder(cls, folder: Path) -> Path:
        """Where the tokenizer lies."""
        return folder

    @abstractmethod
    def hidden(self, ids: Tensor, attendable: Tensor | None, position: Tensor, t: Tensor | None) -> Tensor:
        """Aligned features (B, L, D); keys (B, L) that may be attended to, None for all; ``position`` (B, L)."""

    @abstractmethod
    def logits(self, features: Tensor) -> Tensor:
        """Logits (..., V) of features (..., D)."""

    @abstractmethod
    def sizes(self) -> dict[str, int]:
        """vocab_size, context_length and feature_dim."""

    def checkpoint_gradients(self) -> None:
        """Recompute every layer in the backward pass instead of keeping its activations."""
        # The newer of the two names that the library has had for it.
        enable: Any = getattr(self.network, "activation_checkpointing_enable", None)
        enable = enable or self.network.gradient_checkpointing_enable
        enable()

    def features(self, ids: Tensor, valid: Tensor, t: Tensor | None = None) -> Tensor:
        length = ids.shape[1]
        if length > self.spec.context_length:
            raise UserError(f"the canvas has {length} tokens, the model's context_length is {self.spec.context_length}")
        if bool(valid.all()):
            return self.hidden(ids, None, torch.arange(length, device=ids.device).expand_as(ids), t)
        # A row without any valid key would make softmax 0/0; its outputs are never read, so let it see itself.
        attendable = valid | ~valid.any(1, keepdim=True)
        return self.hidden(ids, attendable, (valid.cumsum(1) - 1).clamp(min=0), t)

    def head(self, features: Tensor) -> Tensor:
        return self.logits(features).add_(self.forbidden_bias)  # in place: a second copy of the logits is much

    def encode_prompt(self, text: str) -> list[int]:
        """Ids of a prompt: what the tokenizer (or, if chosen, the chat template) puts around a text, and the text, in
        which nothing is a control token."""
        return self.frame.wrap(self.tokenizer.encode(self.frame.trim(text)))

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the folder in the format that it came in."""
        folder = Path(folder)
        self.published.save(folder, self.network, self.names)
        if not any((folder / file).is_file() for file in ("tokenizer.json", "vocab.json", "vocab.txt")):
            self.tokenizer.save(folder / "tokenizer.json")
        self.save_unmask(folder)

    def _make_spec(self, text: Any) -> DenoiserSpec:
        """The ids, from config.json, generation_config.json and the tokenizer, in this order.

        Never produced are the mask, padding, what opens a text or stands for unknown words, and ids without a token.
        """
        config, sizes, where = self.published.config, self.sizes(), self.published.folder
        config = {**config.get("text_config", {}), **config}
        known = text.get_vocab()
        generation = json.loads(self.published.companions.get("generation_config.json", b"{}"))
        own = [known.get(token) for token in MASKS]
        mask = _first(config.get("mask_token_id"), text.mask_token_id, self.default_mask(), *own)
        if not self.has_mask:
            mask = -1
        if mask is None:
            raise UserError(f"{where}: no mask token (neither config.json nor the tokenizer names one)")
        named: list[int | None] = []
        for given in (config.get("eos_token_id"), generation.get("eos_token_id"), text.eos_token_id):
            named += given if isinstance(given, list) else [given]
        named += [known.get(token) for token in END_OF_TURN]
        ends = [end for end in dict.fromkeys(named) if end is not None and end != mask]
        ends = ends or [end for end in (text.sep_token_id,) if end is not None]
        if not ends:
            raise UserError(f"{where}: no end token (neither config.json nor the tokenizer names one)")
        pad = _first(config.get("pad_token_id"), text.pad_token_id)
        pad = ends[0] if pad is None or pad == mask else pad
        named_ids = [("padding token", pad), *(("end token", end) for end in ends)]
        for what, index in [("mask token", mask), *named_ids] if self.has_mask else named_ids:
            if not (type(index) is int and 0 <= index < sizes["vocab_size"]):
                raise UserError(f"{where}: the {what} {index!r} is outside the {sizes['vocab_size']} ids of the model")
        openers = {text.cls_token_id, text.bos_token_id, text.unk_token_id} - {None, *ends}
        nameless = set(range(sizes["vocab_size"])) - set(known.values())
        return DenoiserSpec(
            mask_id=mask,
            pad_id=pad,
            end_ids=tuple(ends),
            forbidden_ids=tuple(sorted({mask, *({pad} - set(ends)), *openers, *nameless} - {-1})),
            **sizes,  # type: ignore[arg-type]
        )

    def default_mask(self) -> int | None:
        """The mask id where neither config.json nor the tokenizer names one."""
        return None


class _Frame:
    """What stands before and after a prompt: the tokenizer's own prefix, or the chat template up to the answer."""

    def __init__(self, text: Any, chat: bool, folder: Path) -> None:
        backend = text.backend_tokenizer
        backend.encode_special_tokens = False  # the frame is ours to write: here control tokens are meant
        self.stripped = False
        if not chat:
            bare, full = (backend.encode("a", add_special_tokens=added).ids for added in (False, True))
            places = [start for start in range(len(full)) if full[start : start + len(bare)] == bare]
            self.before, self.after = full[: places[0]] if places else [], []
            return
        marker = "PROMPT0"
        try:
            written, spaced = (
                text.apply_chat_template(
                    [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
                )
                for content in (marker, f"  {marker}  ")
            )
        except Exception as error:  # templates are programs
            raise UserError(f"{folder}: the chat template cannot be used: {first_line(error)}") from error
        if written.count(marker) != 1:
            raise UserError(f"{folder}: the chat template does not write the prompt exactly once")
        before, after = written.split(marker)
        self.stripped = f"  {marker}  " not in spaced
        self.before, self.after = (backend.encode(part, add_special_tokens=False).ids for part in (before, after))

    def trim(self, text: str) -> str:
        return text.strip() if self.stripped else text

    def wrap(self, ids: list[int]) -> list[int]:
        return [*self.before, *ids, *self.after]


def read_tokenizer(folder: Path, fallback: str) -> Any:
    """The tokenizer of a folder, by the ecosystem's own loader; never by code in the folder."""
    import transformers

    if (folder / "tokenizer.json").is_file():
        name = "PreTrainedTokenizerFast"
    elif all((folder / file).is_file() for file in _TOKENIZER_FILES[fallback]):
        name = fallback
    else:
        files = " and ".join(_TOKENIZER_FILES[fallback])
        raise UserError(f"{folder}: no tokenizer (allowed: tokenizer.json, or {files})")
    try:
        text = getattr(transformers, name).from_pretrained(str(folder), local_files_only=True)
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}: not a readable tokenizer: {first_line(error)}") from error
    text.backend_tokenizer.no_truncation()
    text.backend_tokenizer.no_padding()
    return text


@contextmanager
def empty_weights(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have weights of ``dtype`` that nobody has set: no time and no memory is spent on them."""
    from transformers.initialization import no_init_weights

    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with no_init_weights():
            yield
    finally:
        torch.set_default_dtype(before)


def _open(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file: {error}") from error


def _first(*given: int | None) -> int | None:
    return next((index for index in given if index is not None), None)


def first_line(error: Exception) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0]
