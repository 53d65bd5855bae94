"""Text <-> codes: a byte-level BPE for small models, or any `tokenizers` JSON file (published: joint ids).

Words are split off before the merges, so a frequent word with its leading space is one token; the alphabet is
all 256 bytes, so every text encodes. Training depends on the set of texts alone, not on order or counts.
"""

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Self

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from worldvla.files import reading, write_text


class TextTokenizer:
    """`encode` gives codes, 0-based in `vocab.text`, without specials (the sample builder writes BOS)."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._unknown = getattr(tokenizer.model, "unk_token", None)

    @classmethod
    def train(cls, texts: Iterable[str], size: int) -> Self:
        """Train on the set of `texts`; at most `size` tokens, fewer when every word is one token already."""
        alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
        if size < len(alphabet):
            raise ValueError(
                f"a text vocabulary needs at least the {len(alphabet)} bytes, got size {size}: raise num_text"
            )
        tokenizer = Tokenizer(models.BPE())
        words = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = words  # pyright: ignore[reportAttributeAccessIssue]
        tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
        trainer = trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=alphabet, min_frequency=1, show_progress=False
        )
        tokenizer.train_from_iterator(sorted(set(texts)), trainer)
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> Self:
        """Read a `tokenizers` JSON file; a missing or foreign file raises ValueError."""
        path = Path(path)
        with reading(path, "text tokenizer", "expected `tokenizers` JSON"):
            text = path.read_text(encoding="utf-8")
            if "type" not in json.loads(text)["model"]:
                raise ValueError("a model without a type")
            return cls(Tokenizer.from_str(text))

    def save(self, path: Path) -> None:
        """Write the JSON file atomically."""
        write_text(path, self._tokenizer.to_str(pretty=True))

    def encode(self, text: str) -> list[int]:
        """Return the codes of `text`; a character that the vocabulary cannot spell raises ValueError."""
        encoding = self._tokenizer.encode(text, add_special_tokens=False)
        covered = {i for start, stop in encoding.offsets for i in range(start, stop)}
        lost = [c for i, c in enumerate(text) if i not in covered and not c.isspace()]
        if lost or (self._unknown is not None and self._unknown in encoding.tokens):
            raise ValueError(f"the text tokenizer cannot spell {lost or 'a letter'} in {text!r}: rephrase it")
        return encoding.ids

    def decode(self, codes: Iterable[int]) -> str:
        """Return the text of `codes`."""
        return self._tokenizer.decode(list(codes), skip_special_tokens=False)

    def table(self) -> dict[str, int]:
        """Return every token's name and code."""
        return self._tokenizer.get_vocab(with_added_tokens=True)

    @property
    def size(self) -> int:
        return self._tokenizer.get_vocab_size()

    def digest(self) -> str:
        """Sixteen hex digits that change whenever the vocabulary or the merges do."""
        canonical = json.dumps(json.loads(self._tokenizer.to_str()), sort_keys=True)
        return hashlib.sha256(canonical.encode()).hexdigest()[:16]
