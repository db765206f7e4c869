"""How does a text become numbers that a text encoder reads?

Byte-level BPE over lower-cased text: trained, kept as ``tokenizer.json`` and run by the library `tokenizers`. It does
not know what reads the numbers.

Source: byte-level BPE with dropout https://arxiv.org/abs/1910.13267.
"""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from core.nn.checkpoint import write_atomically

PAD, START, END = "[PAD]", "[START]", "[END]"


class Tokenizer:
    """Lower-cased byte-level BPE; every string has tokens, whatever its script, so nothing is ever "unknown".

    Calling it gives ids [B, L] int64 and mask [B, L] bool (True = real token), padded to the longest of the batch.
    """

    def __init__(self, backend: Any, max_length: int) -> None:
        self.backend, self.max_length = backend, max_length
        backend.enable_truncation(max_length)
        backend.no_padding()
        backend.encode_special_tokens = True  # a prompt that says "[END]" means those five characters

    @property
    def size(self) -> int:
        """Number of pieces, special ones included."""
        return int(self.backend.get_vocab_size())

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of each text, with start and end, truncated to ``max_length``."""
        clean = [text.encode("utf-8", "replace").decode() for text in texts]  # JSON can carry half a surrogate pair
        return [encoding.ids for encoding in self.backend.encode_batch(clean)]

    def encoded_length(self, text: str) -> int:
        """How many characters of a text are among its tokens; those after them are cut off at ``max_length``."""
        lost = self.backend.encode(text.encode("utf-8", "replace").decode()).overflowing
        return int(lost[0].offsets[1][0]) if lost else len(text)  # offsets[0] is that of the start token

    def dropout_ids(self, texts: Sequence[str], seeds: Sequence[int], dropout: float, variants: int = 32
                    ) -> list[list[int]]:
        """Like `ids` with every merge left out with probability ``dropout``: text i depends on seeds[i] alone.

        The library has this dropout too, but its random numbers cannot be seeded, so a resumed run would read others.
        Each word is drawn from a table of ``variants`` ways to split it.
        """
        model = json.loads(self.backend.to_str())["model"]
        vocabulary, ranks = model["vocab"], {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
        table: dict[str, list[list[int]]] = {}

        def split(word: str, rng: random.Random) -> list[int]:
            pieces = list(word)
            while True:
                merges = [(ranks[pair], i) for i, pair in enumerate(zip(pieces, pieces[1:], strict=False))
                          if pair in ranks and rng.random() >= dropout]
                if not merges:
                    return [vocabulary[piece] for piece in pieces]
                _, i = min(merges)
                pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]

        rows = []
        for text, seed in zip(texts, seeds, strict=True):
            rng, row = random.Random(seed), []
            clean = self.backend.normalizer.normalize_str(text)
            for word, _ in self.backend.pre_tokenizer.pre_tokenize_str(clean):
                if word not in table:
                    table[word] = [split(word, random.Random(f"{word} {i}")) for i in range(variants)]
                row += table[word][int(rng.random() * variants)]
            rows.append([vocabulary[START], *row[: self.max_length - 2], vocabulary[END]])
        return rows

    def __call__(self, texts: Sequence[str]) -> tuple[Tensor, Tensor]:
        rows = self.ids(texts)
        ids = torch.zeros(len(rows), max(len(row) for row in rows), dtype=torch.int64)
        mask = torch.zeros_like(ids, dtype=torch.bool)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
            mask[i, : len(row)] = True
        return ids, mask

    def save(self, path: Path) -> None:
        """Write ``tokenizer.json``."""
        write_atomically(path, self.backend.to_str(pretty=True).encode())

    @staticmethod
    def readable(path: Path) -> bool:
        """Whether there is a file that `load` can read; says so where there is one that it cannot."""
        from tokenizers import Tokenizer as Backend

        if not path.exists():
            return False
        try:
            Backend.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            print(f"{path} is damaged ({error}); it is learned anew")
            return False
        return True

    @staticmethod
    def load(path: Path, max_length: int) -> Tokenizer:
        """Read ``tokenizer.json``."""
        from tokenizers import Tokenizer as Backend

        return Tokenizer(Backend.from_file(str(path)), max_length)


def train_tokenizer(texts: Sequence[str], max_pieces: int, max_length: int) -> Tokenizer:
    """Learn at most ``max_pieces`` (<= 4096) sub-words from texts."""
    from tokenizers import Tokenizer as Backend
    from tokenizers import models, normalizers, pre_tokenizers, processors, trainers

    backend = Backend(models.BPE())
    backend.normalizer = normalizers.Sequence([normalizers.NFKD(), normalizers.StripAccents(), normalizers.Lowercase()])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    trainer = trainers.BpeTrainer(vocab_size=max_pieces, special_tokens=[PAD, START, END], show_progress=False,
                                  initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
                                  min_frequency=min(20, max(2, len(texts) // 2000)))  # 20 for CelebA
    backend.train_from_iterator(texts, trainer)
    backend.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(piece, backend.token_to_id(piece)) for piece in (START, END)])
    return Tokenizer(backend, max_length)
