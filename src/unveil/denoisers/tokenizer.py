"""Text to ids and back, on the ``tokenizers`` library (the same tokenizer.json that transformers opens)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers

from unveil.registry import UserError

MASK, PAD, END, UNKNOWN = "<mask>", "<pad>", "<end>", "<unk>"


def whole(text: str) -> str:
    """The text with every half of a surrogate pair, which no encoding has, as U+FFFD: bytes of a command line that are
    no UTF-8, escapes of a JSON file."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")
    return text


class TextTokenizer:
    """A thin, picklable face of one ``tokenizers.Tokenizer``."""

    def __init__(self, backend: Tokenizer, controls: Iterable[int] = (), unknown: int | None = None) -> None:
        """``controls`` are ids that text must never become, beside the tokens that the file calls special; ``unknown``
        stands for words that the vocabulary lacks, <unk> if there is one by default."""
        self.backend = backend
        self.backend.encode_special_tokens = True
        added = backend.get_added_tokens_decoder()
        self._special = {index for index, token in added.items() if token.special} | set(controls)
        self.unknown: int | None = backend.token_to_id(UNKNOWN) if unknown is None else unknown

    @classmethod
    def of_words(cls, words: Sequence[str]) -> TextTokenizer:
        """A whitespace tokenizer with one id per word; ids 0-3 are <mask>, <pad>, <end>, <unk>."""
        vocabulary = {word: index for index, word in enumerate((MASK, PAD, END, UNKNOWN, *words))}
        if len(vocabulary) != len(words) + 4:
            raise ValueError("words must be different from one another and from the four special tokens")
        backend = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
        backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        backend.add_special_tokens([MASK, PAD, END, UNKNOWN])
        return cls(backend)

    @classmethod
    def load(cls, path: Path) -> TextTokenizer:
        """Read tokenizer.json.

        Raises:
            UserError: the file is missing or is not a tokenizer.
        """
        if not path.is_file():
            raise UserError(
                f"{path}: no such file (a model folder holds config.json, model.safetensors, tokenizer.json)"
            )
        try:
            return cls(Tokenizer.from_file(str(path)))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{path}: not a tokenizer file: {error}") from error

    def save(self, path: Path) -> None:
        self.backend.save(str(path))

    def __len__(self) -> int:
        return self.backend.get_vocab_size()

    def __contains__(self, token: str) -> bool:
        return self.backend.token_to_id(token) is not None

    def id(self, token: str) -> int:
        found = self.backend.token_to_id(token)
        if found is None:
            raise KeyError(token)
        return found

    def encode(self, text: str) -> list[int]:
        """Ids of plain text. Special tokens written inside the text never become controls: a prompt that says
        <mask> must not open a hole in the canvas. Sub-word tokenizers spell them out; a word tokenizer, which knows
        them only as whole words, reads them as unknown, or leaves them out if it has no token for that."""
        ids = self.backend.encode(whole(text), add_special_tokens=False).ids
        if not self._special.intersection(ids):
            return ids
        replacement = [] if self.unknown is None else [self.unknown]
        return [kept for index in ids for kept in (replacement if index in self._special else [index])]

    def decode(self, ids: Sequence[int]) -> str:
        """Text of ids without special tokens and without places that hold no token yet (below 0)."""
        return self.decode_batch([ids])[0]

    def decode_batch(self, rows: Sequence[Sequence[int]]) -> list[str]:
        kept = [[index for index in row if index >= 0] for row in rows]
        return self.backend.decode_batch(kept, skip_special_tokens=True)

    def tokens(self, ids: Sequence[int]) -> list[str]:
        """The written form of every single id, for display."""
        return [self.backend.id_to_token(int(index)) or f"#{int(index)}" if index >= 0 else MASK for index in ids]
