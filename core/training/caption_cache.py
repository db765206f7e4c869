"""How does no training step run Python over strings?

Several captions of every image are drawn and tokenized before the first step, kept in a file whose key says of which
images, tokenizer and grammar they are, and, where an accelerator has room, read by the text encoder once for all. It
knows neither a network nor what captions are for.
"""

from __future__ import annotations

import io
import json
import random
import zipfile
import zlib
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core.command import FolderLock, SettingError
from core.nn.checkpoint import write_atomically
from core.text.captions import draw_caption
from core.text.lexicon import ATTRIBUTES
from core.training.accelerator import send
from core.training.randomness import mix_seed

if TYPE_CHECKING:
    from core.nn.clip import CLIP, TextEmbedding
    from core.nn.tokenizer import Tokenizer
    from dataset import FaceStore


@dataclass
class CaptionBank:
    """Several tokenized captions an image, so that no training step runs Python over strings.

    Shapes: ids [N, K, L] int16-sized, lengths [N, K], facts [N, K, A] int8 in {-1, 0, 1}; empty captions have length 2.
    Of captions that state no facts ``same`` [N, K] has numbers: equal numbers, equal words (empty: they state facts).
    """

    ids: Tensor
    lengths: Tensor
    facts: Tensor
    same: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))

    @property
    def states_facts(self) -> bool:
        """Whether captions say what is true of which images; a person's own are told apart by their words alone."""
        return not self.same.numel()

    def draw(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """For image rows [B]: ids [B, L], mask [B, L], facts [B, A] float, empty [B] bool.

        L is the batch's longest on a CPU, where padding costs time, and the bank's longest on an accelerator, which
        would wait for the host to learn another number (and be compiled for each).
        """
        return self.at(rows, self.pick(rows, generator))

    def at(self, rows: Tensor, pick: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What `draw` gives, for one chosen caption of each image: rows [B], pick [B]."""
        lengths = self.lengths[rows, pick].long()
        longest = int(lengths.max()) if rows.device.type == "cpu" else self.ids.shape[2]
        mask = torch.arange(longest, device=rows.device)[None] < lengths[:, None]
        return self.ids[rows, pick, :longest].long(), mask, self.facts[rows, pick].float(), lengths <= 2

    def pick(self, rows: Tensor, generator: torch.Generator) -> Tensor:
        """One of its captions for every image: [B]."""
        return send(torch.randint(self.ids.shape[1], (len(rows),), generator=generator), rows.device)

    def to(self, device: torch.device) -> CaptionBank:
        """The same on a device."""
        return CaptionBank(self.ids.to(device), self.lengths.to(device), self.facts.to(device), self.same.to(device))


@dataclass
class EncodedCaptions:
    """A bank whose captions were all read by the text encoder once: a step only looks them up.

    Takes the places of a bank and of its encoder: what `draw` gives for ids are places [B] in ``text``, all that the
    encoder said of the N * K captions, and `encode_text` takes those.
    """

    bank: CaptionBank
    text: TextEmbedding

    def draw(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """As the bank's, as long as its longest."""
        pick = self.bank.pick(rows, generator)
        places = rows * self.bank.ids.shape[1] + pick
        return places, self.text.mask[places], self.bank.facts[rows, pick].float(), self.bank.lengths[rows, pick] <= 2

    def encode_text(self, places: Tensor, mask: Tensor) -> TextEmbedding:
        """Places [B] and mask [B, L] -> what the encoder said of them."""
        return replace(self.text, tokens=self.text.tokens[places], mask=mask, pooled=self.text.pooled[places])


def encode_captions(clip: CLIP, bank: CaptionBank, accelerator: Any, batch_size: int = 4096) -> EncodedCaptions:
    """Read every caption of a bank, in the precision of the run, padded to the bank's longest."""
    ids = bank.ids.flatten(0, 1)
    mask = torch.arange(ids.shape[1], device=ids.device) < bank.lengths.flatten()[:, None]
    kind = torch.bfloat16 if accelerator.mixed_precision == "bf16" else torch.float32
    tokens = torch.empty(*ids.shape, clip.config.text_width, dtype=kind, device=ids.device)
    pooled = torch.empty(len(ids), clip.config.text_width, dtype=kind, device=ids.device)
    for start in range(0, len(ids), batch_size):
        part = slice(start, start + batch_size)
        with torch.no_grad(), accelerator.autocast():
            text = clip.encode_text(ids[part].long(), mask[part])
        tokens[part], pooled[part] = text.tokens, text.pooled
    return EncodedCaptions(bank, replace(text, tokens=tokens, mask=mask, pooled=pooled))


def fits_encoded(clip: CLIP, bank: CaptionBank) -> bool:
    """Whether a GPU has half as much again as all captions of a bank, read in bf16, would take."""
    device = bank.ids.device
    return device.type == "cuda" and 3 * bank.ids.numel() * clip.config.text_width < torch.cuda.mem_get_info(device)[0]


def cached_bank(path: Path, store: FaceStore, indices: np.ndarray, tokenizer: Tokenizer, accelerator: Any,
                **how: Any) -> CaptionBank:
    """`build_caption_bank`, from ``path`` where a run before made the same; the main process makes it anew otherwise.

    The same: of these images and attributes or labels, by this tokenizer, and as captions are drawn now.
    """
    key = _bank_key(store, indices, tokenizer, how)
    with FolderLock(path.parent, "writing captions", wait=True) if accelerator.is_main_process else nullcontext():
        if accelerator.is_main_process and _read_bank(path, key) is None:
            _keep_bank(path, key, build_caption_bank(store, indices, tokenizer, **how))
        accelerator.wait_for_everyone()
        bank = _read_bank(path, key)
        accelerator.wait_for_everyone()  # another run may write its own captions only when all have read these
    if bank is None:
        raise SettingError(f"{path} changed while it was read; give each run a --cache or --run of its own")
    return bank


def _bank_key(store: FaceStore, indices: np.ndarray, tokenizer: Tokenizer, how: dict[str, Any]) -> str:
    import hashlib

    drawn_now = draw_texts(store, indices[:64], 4, 0, 0.0)[0]  # other when the grammar changed
    digest = hashlib.sha256(b"2" + indices.tobytes() + store.attributes[indices].tobytes())
    for part in (how, tokenizer.backend.to_str(), store.image_id[indices].tolist(), store.text_labels, drawn_now):
        digest.update(json.dumps(part, sort_keys=True).encode())
    return digest.hexdigest()


def _read_bank(path: Path, key: str) -> CaptionBank | None:
    """The bank in ``path`` where it has this key; None where it has another, is absent or damaged."""
    if not path.exists():
        return None
    try:
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) != key:
                return None
            return CaptionBank(*(torch.from_numpy(kept[name]) for name in ("ids", "lengths", "facts", "same")))
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile, zlib.error):
        print(f"{path} is damaged; its captions are drawn anew", flush=True)
        return None


def _keep_bank(path: Path, key: str, bank: CaptionBank) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    packed = io.BytesIO()
    np.savez(packed, key=key, ids=bank.ids.numpy(), lengths=bank.lengths.numpy(), facts=bank.facts.numpy(),
             same=bank.same.numpy())
    write_atomically(path, packed.getvalue())


def build_caption_bank(store: FaceStore, indices: np.ndarray, tokenizer: Tokenizer, *, captions_per_image: int,
                       seed: int, empty_share: float, dropout: float = 0.0) -> CaptionBank:
    """Draw and tokenize captions for the chosen images; a store with its own text labels uses those instead.

    Every caption depends on (seed, image row, k) alone, and so does its tokens' ``dropout``.
    """
    texts, facts = draw_texts(store, indices, captions_per_image, seed, empty_share)
    if dropout > 0:
        seeds = [mix_seed(seed, int(row), k) for row in indices for k in range(captions_per_image)]
        rows = tokenizer.dropout_ids(texts, seeds, dropout)
    else:
        rows = tokenizer.ids(texts)
    longest = max(len(row) for row in rows)
    ids = np.zeros((len(rows), longest), np.int16)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row
    shape = (len(indices), captions_per_image)
    lengths = np.array([len(row) for row in rows], np.int16)
    same = (torch.empty(len(indices), 0, dtype=torch.int32) if store.text_labels is None
            else torch.from_numpy(caption_numbers(texts)).view(*shape))
    return CaptionBank(torch.from_numpy(ids).view(*shape, -1), torch.from_numpy(lengths).view(*shape),
                       torch.from_numpy(facts).view(*shape, -1), same)


def caption_numbers(texts: Sequence[str]) -> np.ndarray:
    """A number for each text, [len] int32: the same for texts of the same words, whatever their case and spaces."""
    numbers: dict[str, int] = {}
    return np.array([numbers.setdefault(" ".join(text.lower().split()), len(numbers)) for text in texts], np.int32)


def own_captions(store: FaceStore, indices: np.ndarray) -> list[str]:
    """All captions of these images that a person wrote; none where captions are drawn from attributes."""
    own = store.text_labels
    return [] if own is None else [text for row in indices for text in own[str(store.image_id[row])]]


def count_cut(texts: Sequence[str], tokenizer: Tokenizer) -> int:
    """How many texts end before they are read to their end: what comes after ``max_length`` pieces is never learned."""
    return sum(tokenizer.encoded_length(text) < len(text) for text in texts)


def captions_fit(store: FaceStore, indices: np.ndarray, texts: Sequence[str]) -> Tensor:
    """Which of a person's own captions [T] are captions of which images: bool [T, I]."""
    each = [own_captions(store, indices[i : i + 1]) for i in range(len(indices))]
    numbers = caption_numbers([*texts, *(one for captions in each for one in captions)])
    ends = len(texts) + np.cumsum([0, *map(len, each)])
    columns = [np.isin(numbers[: len(texts)], numbers[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
    return torch.from_numpy(np.stack(columns, axis=1))


def check_contrast(store: FaceStore, indices: np.ndarray) -> bool:
    """Can anything be learned from these captions? False for pictures of which nothing was said; raises DataError where
    every caption is true of every image."""
    from core.training.data_sources import DataError

    if store.says_nothing:
        return False
    own = own_captions(store, indices)
    if own and caption_numbers(own).max() == 0:
        raise DataError(f"all {len(indices)} training images of {store.folder} have the same caption {own[0]!r}; "
                        "captions must tell images apart")
    if not own and len(indices) and not (store.attributes[indices] != store.attributes[indices[0]]).any():
        raise DataError(f"all {len(indices)} training images of {store.folder} have the same attributes; captions "
                        "drawn from them tell no image from another")
    return True


def draw_texts(store: FaceStore, indices: np.ndarray, count: int, seed: int, empty_share: float
               ) -> tuple[list[str], np.ndarray]:
    """``count`` captions for each image, image after image, and their facts [len * count, 40] int8."""
    column = {name: i for i, name in enumerate(ATTRIBUTES)}
    own = store.text_labels
    texts, facts = [], np.zeros((len(indices) * count, len(ATTRIBUTES)), np.int8)
    for row in indices:
        rng = random.Random(mix_seed(seed, int(row)))
        attributes, written = store.attributes[row].tolist(), list[str]()
        for _ in range(count):
            if own is not None:  # every one of them before any comes again
                written = written or rng.sample(own[str(store.image_id[row])], len(own[str(store.image_id[row])]))
                texts.append("" if rng.random() < empty_share else written.pop())
                continue
            caption = draw_caption(attributes, rng, empty_share=empty_share)
            for name, value in caption.facts.items():
                facts[len(texts), column[name]] = 1 if value else -1
            texts.append(caption.text)
    return texts, facts
