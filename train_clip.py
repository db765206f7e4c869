"""What does a sentence mean in pictures? The text encoder, its tokenizer, and the image tower it learns with.

A small CLIP trained from scratch: a transformer over sub-words and a convolutional tower over pixels, contrasted with
*soft* targets, because one caption ("a smiling woman") is true of many pictures in a batch. The text side conditions
the UNet; the feature maps of the image side serve the VAE as a perceptual loss. It does not know about diffusion.

    python train_clip.py --train      tokenizer, caption bank, both towers, release to the model folder
    python train_clip.py --eval       retrieval and zero-shot attribute accuracy on people never seen

Sources: CLIP https://arxiv.org/abs/2103.00020, byte-level BPE with dropout https://arxiv.org/abs/1910.13267, soft
targets (PyramidCLIP) https://arxiv.org/abs/2204.14095; here the targets come from the facts that each caption states.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.checkpoint import (
    build,
    file_hash,
    git_commit,
    load_component,
    save_component,
    write_atomically,
    write_json,
)
from core.command import check_numbers, run_command, run_lock
from core.quiet import keep_quiet
from vae import PixelNorm, ResBlock

if TYPE_CHECKING:
    from dataset import FaceStore

EXAMPLES = 32  # of a person's own captions, kept beside the model: prompts that it can read

# ----------------------------------------------------------------------------------------------------------- tokenizer

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

    def read_to(self, text: str) -> int:
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


# ------------------------------------------------------------------------------------------------------------ networks


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of both towers; ``pieces`` is set from the trained tokenizer."""

    pieces: int = 4096
    max_length: int = 80
    text_width: int = 192
    text_layers: int = 4
    text_heads: int = 4
    image_channels: tuple[int, int, int] = (64, 128, 256)  # at H/4, H/8, H/16
    image_blocks: tuple[int, int, int] = (1, 1, 2)
    embed_dim: int = 192


PRESETS = {
    "celeba128": CLIPConfig(),
    "tiny": CLIPConfig(pieces=512, text_width=32, text_layers=1, text_heads=2, image_channels=(8, 12, 16),
                       image_blocks=(1, 1, 1), embed_dim=32),
}
RUNS = {  # how long a run of each preset is
    "celeba128": {"steps": 4000, "batch_size": 256, "warmup_steps": 100},
    "tiny": {"steps": 10, "batch_size": 8, "warmup_steps": 1},
}


@dataclass
class TextEmbedding:
    """tokens [B, L, E], mask [B, L] (True = real token), pooled [B, E]."""

    tokens: Tensor
    mask: Tensor
    pooled: Tensor


class TextBlock(nn.Module):
    """Pre-norm self-attention over real tokens, then a feed-forward of four times the width. [B, L, E] -> same."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.feed = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4)  # [B, H, L, D]
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :])
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, width))
        return x + self.feed(self.norm2(x))


class TextEncoder(nn.Module):
    """Token ids [B, L] and mask [B, L] -> TextEmbedding; the start token's output is the pooled embedding."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.tokens = nn.Embedding(config.pieces, config.text_width)
        self.positions = nn.Parameter(torch.randn(config.max_length, config.text_width) * 0.02)
        self.blocks = nn.ModuleList(TextBlock(config.text_width, config.text_heads) for _ in range(config.text_layers))
        self.norm = nn.LayerNorm(config.text_width)
        nn.init.normal_(self.tokens.weight, std=0.05)

    def forward(self, ids: Tensor, mask: Tensor) -> TextEmbedding:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x).float()
        return TextEmbedding(x, mask, x[:, 0])


class ImageTower(nn.Module):
    """Images [B, 3, H, W] in [-1, 1] -> embedding [B, embed_dim] (not normalised)."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        widths = config.image_channels
        self.door = nn.Conv2d(48, widths[0], 3, padding=1)
        self.stages = nn.ModuleList(
            nn.Sequential(*(ResBlock(width) for _ in range(blocks)))
            for width, blocks in zip(widths, config.image_blocks, strict=True)
        )
        self.downs = nn.ModuleList(nn.Conv2d(4 * a, b, 1) for a, b in zip(widths, widths[1:], strict=False))
        self.norm = PixelNorm(widths[-1])
        self.head = nn.Linear(widths[-1], config.embed_dim)

    def features(self, images: Tensor) -> list[Tensor]:
        """Feature maps at H/4, H/8 and H/16, each [B, C, h, w]; the VAE's perceptual loss compares these."""
        x = self.door(F.pixel_unshuffle(images, 4))
        maps = [self.stages[0](x)]
        for down, stage in zip(self.downs, list(self.stages)[1:], strict=True):
            maps.append(stage(down(F.pixel_unshuffle(maps[-1], 2))))
        return maps

    def forward(self, images: Tensor) -> Tensor:
        return self.head(F.silu(self.norm(self.features(images)[-1])).mean((2, 3)))


class CLIP(nn.Module):
    """Both towers and the learned temperature."""

    def __init__(self, config: CLIPConfig) -> None:
        super().__init__()
        self.config = config
        self.text = TextEncoder(config)
        self.text_head = nn.Linear(config.text_width, config.embed_dim, bias=False)
        self.image = ImageTower(config)
        self.log_temperature = nn.Parameter(torch.tensor(2.3))  # similarity is multiplied by exp of this

    def encode_text(self, ids: Tensor, mask: Tensor) -> TextEmbedding:
        """Ids and mask [B, L] -> token and pooled embeddings for conditioning."""
        return self.text(ids, mask)

    def embed_text(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Ids and mask [B, L] -> unit vectors [B, embed_dim] in the space shared with pictures."""
        return F.normalize(self.text_head(self.text(ids, mask).pooled).float(), dim=-1)

    def encode_image(self, images: Tensor) -> Tensor:
        """Images [B, 3, H, W] in [-1, 1] -> unit vectors [B, embed_dim]."""
        return F.normalize(self.image(images).float(), dim=-1)


def load_clip(folder: str | Path, device: torch.device | str = "cpu") -> tuple[CLIP, Tokenizer]:
    """The trained CLIP and its tokenizer of a model folder, ready for inference (no gradients)."""
    config, state = load_component(folder, "clip")
    fields = {key: tuple(value) if isinstance(value, list) else value for key, value in config["network"].items()}
    model = build(lambda: CLIP(CLIPConfig(**fields)), state, "CLIP")
    tokenizer = Tokenizer.load(Path(folder) / "clip" / "tokenizer.json", model.config.max_length)
    return model.eval().requires_grad_(False).to(device, memory_format=torch.channels_last), tokenizer


# ---------------------------------------------------------------------------------------------------------------- loss


def soft_targets(facts: Tensor, attributes: Tensor, sharpness: float = 2.0) -> Tensor:
    """How well each picture satisfies each caption: exp(-sharpness * number of violated facts).

    Shapes: facts [T, A] in {-1, 0, +1} (0 = not stated), attributes [I, A] in {-1, +1}, result [T, I] in (0, 1].
    """
    violations = 0.5 * (facts.abs().sum(1, keepdim=True) - facts @ attributes.T)
    return torch.exp(-sharpness * violations)


def same_captions(rows: Tensor, own: Tensor, pick: Tensor) -> Tensor:
    """Targets for captions that state no facts: 1 where an image has this very caption, or is the image it is of.

    Shapes: rows [B] (which image), own [B, K] numbers of the captions of each image (equal: the same words), pick [B]
    which of those is the text of the row; result [B, B] in {0, 1}, texts down and images across.
    """
    texts = own.gather(1, pick[:, None])  # [B, 1]
    found = rows[:, None] == rows[None]
    for captions in own.T:
        found = found | (texts == captions[None])
    return found.float()


def contrastive_loss(text: Tensor, image: Tensor, scale: Tensor, targets: Tensor) -> Tensor:
    """Symmetric cross-entropy between softmax(scale * text @ image^T) and the row- and column-normalised targets.

    Shapes: text [T, E] and image [I, E] unit vectors, targets [T, I].
    """
    logits = scale * text @ image.T
    by_text = -(targets / targets.sum(1, keepdim=True) * logits.log_softmax(1)).sum(1).mean()
    by_image = -(targets / targets.sum(0, keepdim=True) * logits.log_softmax(0)).sum(0).mean()
    return 0.5 * (by_text + by_image)


# ------------------------------------------------------------------------------------------------------------ training


def train(args: argparse.Namespace) -> None:
    """The training loop of CLIP; the same command resumes. Ends by releasing weights, tokenizer and vocabulary."""
    from core.caption_bank import cached_bank, check_contrast, draw_texts, own_captions
    from core.release import check_release, releasing
    from core.training import (
        EpochSampler,
        PowerEMA,
        RunFolder,
        StepGuard,
        attention_kernel,
        average_gradients,
        circumstances,
        learning_rate,
        make_accelerator,
        mean_over_processes,
        process_slice,
        send,
        step_generator,
    )
    from dataset import FaceStore
    from vae import load_pixels, mirror, to_images

    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    store = FaceStore.open(args.data)
    indices = store.select(split="train", px=None)
    check_contrast(store, indices)
    check_release(args.model, "clip", replace=args.replace, run=args.run)
    run_folder, preset = Path(args.run), PRESETS[args.preset]

    tokenizer_path = run_folder / "tokenizer.json"
    if accelerator.is_main_process and not Tokenizer.readable(tokenizer_path):
        sample = indices[np.random.default_rng(args.seed).permutation(len(indices))[:20000]]
        texts, _ = draw_texts(store, sample, 2, args.seed + 1, 0.0)
        train_tokenizer(texts, preset.pieces, preset.max_length).save(tokenizer_path)
    accelerator.wait_for_everyone()
    tokenizer = Tokenizer.load(tokenizer_path, preset.max_length)
    config = CLIPConfig(**{**asdict(preset), "pieces": tokenizer.size})

    bank = cached_bank(run_folder / "captions.npz", store, indices, tokenizer, accelerator, seed=args.seed,
                       captions_per_image=args.captions_per_image, empty_share=0.0,
                       dropout=0.05).to(device)  # so rare pieces are trained: typos are not noise
    pixels = load_pixels(store, indices, device)
    attributes = torch.from_numpy(store.attributes[indices].astype(np.float32) * 2 - 1).to(device)

    torch.manual_seed(args.seed)
    model = CLIP(config).to(device, memory_format=torch.channels_last)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.98), weight_decay=0.05, fused=True)
    ema = PowerEMA(model, relative_std=0.05)
    sampler = EpochSampler(len(indices), args.batch_size, args.seed)
    settings = {"component": "clip", "preset": args.preset, "seed": args.seed, "batch_size": args.batch_size,
                "learning_rate": args.learning_rate, "captions_per_image": args.captions_per_image,
                "data": store.fingerprint, "tokenizer": file_hash(tokenizer_path),
                "network": json.loads(json.dumps(asdict(config)))}
    run = RunFolder(run_folder, settings, total_steps=args.steps, decay_share=args.decay_share,
                    main=accelerator.is_main_process, how=circumstances(args, accelerator),
                    parts={"model": model, "optimizer": optimizer, "ema": ema})
    first, mine = run.resume(), process_slice(accelerator, args.batch_size)
    guard = StepGuard(skipped=run.extra.get("skipped", 0))
    held_rows = store.select(split="val", px=128)[: args.batch_size]

    for step, show in run.steps(first, args, accelerator, "CLIP"):
        rate = learning_rate(step, peak=args.learning_rate, total_steps=args.steps, warmup_steps=args.warmup_steps,
                             decay_share=args.decay_share)
        for group in optimizer.param_groups:
            group["lr"] = rate
        generator = step_generator(args.seed, step)
        rows = send(sampler.batch(step), device)
        images = mirror(to_images(pixels[rows]), generator)
        pick = bank.pick(rows, generator)
        ids, mask, facts, _ = bank.at(rows, pick)
        targets = (soft_targets(facts, attributes[rows]) if bank.states_facts
                   else same_captions(rows, bank.same[rows], pick))
        with accelerator.autocast(), attention_kernel(device):
            text = model.embed_text(ids[mine], mask[mine])
            image = model.encode_image(images[mine].contiguous(memory_format=torch.channels_last))
        # every process contrasts its own texts and pictures with the pictures and texts of all
        all_text, all_image = gather_with_gradient(accelerator, text), gather_with_gradient(accelerator, image)
        scale = model.log_temperature.clamp(max=4.6).exp()
        loss = contrastive_loss(all_text, all_image, scale, targets)
        (loss * accelerator.num_processes).backward()
        average_gradients(accelerator, parameters)
        model.log_temperature.grad.div_(accelerator.num_processes)  # every process has all of it, not a share
        norm = guard.step(optimizer, parameters)
        ema.update(model, step + 1)
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            floor = float(contrastive_floor(targets))
            values = {"loss": float(loss.detach()), "excess": float(loss.detach()) - floor, "grad_norm": float(norm),
                      "lr": rate, "scale": float(scale.detach()), "skipped": guard.skipped}
            values = mean_over_processes(accelerator, values)
            run.log(step + 1, values)
            show(f"loss {values['loss']:.3f}, {values['excess']:.3f} above the targets' own entropy")
        if run.main and ((step + 1) % args.validate_every == 0 or step + 1 == args.steps):
            found = held_out_excess(model, tokenizer, store, held_rows, accelerator)
            run.log(step + 1, {} if found is None else {"val_excess": found})
        if (step + 1) % args.save_every == 0 or show.last:
            run.save(step + 1, {"skipped": guard.skipped})
    run.finish()
    if run.main and run.finished:
        from core.captions import vocabulary, vocabulary_of

        own = own_captions(store, indices)
        final = CLIP(config)
        final.load_state_dict(ema.state, strict=True)
        folder = Path(args.model)
        with releasing(folder, "clip", replace=args.replace, run=args.run):
            save_component(folder, "clip", final.state_dict(),
                           {"network": asdict(config), "training": settings | {"steps": args.steps}},
                           extra={"commit": git_commit(Path(__file__).parent)})
        tokenizer.save(folder / "clip" / "tokenizer.json")
        write_json(folder / "vocabulary.json", vocabulary_of(own) if own else vocabulary())
        (folder / "examples.json").unlink(missing_ok=True)
        if own:
            write_json(folder / "examples.json", random.Random(args.seed).sample(sorted(set(own)), k=min(
                EXAMPLES, len(set(own)))))
        print(f"released to {args.model}/clip")


def gather_with_gradient(accelerator: Any, values: Tensor) -> Tensor:
    """Rows of all processes in order; the gradient flows into this process's own rows."""
    if accelerator.num_processes == 1:
        return values
    whole = accelerator.gather(values.detach()).clone()
    whole[accelerator.process_index * len(values) : (accelerator.process_index + 1) * len(values)] = values
    return whole


@torch.inference_mode()
def held_out_excess(model: CLIP, tokenizer: Tokenizer, store: FaceStore, rows: np.ndarray, accelerator: Any
                    ) -> float | None:
    """What ``excess`` is in training, on one batch of held-out pictures and one caption each, the same every time; None
    where the store has fewer than two of them."""
    from core.caption_bank import draw_texts
    from vae import load_pixels, to_images

    if len(rows) < 2:
        return None
    device = accelerator.device
    texts, facts = draw_texts(store, rows, 1, 99, 0.0)
    if store.text_labels:  # a person's own captions: they fit the images that have them
        targets = torch.tensor([[float(one == other) for other in texts] for one in texts], device=device)
    else:
        attributes = torch.from_numpy(store.attributes[rows].astype(np.float32) * 2 - 1).to(device)
        targets = soft_targets(torch.from_numpy(facts).float().to(device), attributes)
    with accelerator.autocast():
        text = model.embed_text(*(each.to(device) for each in tokenizer(texts)))
        image = model.encode_image(to_images(load_pixels(store, rows, device)))
    loss = contrastive_loss(text, image, model.log_temperature.clamp(max=4.6).exp(), targets)
    return float(loss - contrastive_floor(targets))


def contrastive_floor(targets: Tensor) -> Tensor:
    """The lowest value that ``contrastive_loss`` can take: the mean entropy of the normalised targets, both ways."""
    def entropy(p: Tensor, axis: int) -> Tensor:
        p = p / p.sum(axis, keepdim=True)
        return -(p * p.clamp_min(1e-12).log()).sum(axis).mean()

    return 0.5 * (entropy(targets, 1) + entropy(targets, 0))


# ---------------------------------------------------------------------------------------------------------- evaluation


@torch.inference_mode()
def evaluate(args: argparse.Namespace) -> dict[str, Any]:
    """Retrieval and zero-shot attribute accuracy on the sharp test images; writes ``metrics.json`` to the run.

    Every figure stands beside what chance would give. A figure that chance would give too, whatever the model, is
    refused: it is null, and ``not_measurable`` says why. Captions that a person wrote fit the images that have them;
    zero-shot accuracy needs attributes. Raises DataError where no figure can be measured.
    """
    from core.caption_bank import captions_fit, draw_texts
    from core.metrics import retrieval
    from core.training import make_accelerator
    from dataset import DataError, FaceStore
    from vae import load_pixels, to_images

    device = make_accelerator(args.device, "no").device
    model, tokenizer = load_clip(args.model, device)
    store = FaceStore.open(args.data)
    indices = store.select(split="test", px=128)[: args.samples]
    if len(indices) < 2:
        raise DataError(f"{args.data} has {len(indices)} test images of 128 px, and at least 2 are needed; "
                        "a list_eval_partition beside the pictures says which are for the test")
    pixels = load_pixels(store, indices, device)
    image = torch.cat([model.encode_image(to_images(pixels[i : i + 64])) for i in range(0, len(pixels), 64)])
    texts, facts = draw_texts(store, indices, 1, 12345, 0.0)
    text = torch.cat([model.embed_text(*(t.to(device) for t in tokenizer(texts[i : i + 64])))
                      for i in range(0, len(texts), 64)])
    attributes = torch.from_numpy(store.attributes[indices].astype(np.float32) * 2 - 1).to(device)
    if store.text_labels is None:  # every fact of the caption is true of the image
        fits = soft_targets(torch.from_numpy(facts).float().to(device), attributes, sharpness=1e9) > 0.5
    else:
        fits = captions_fit(store, indices, texts).to(device)
    similarity = text @ image.T
    result: dict[str, Any] = {"n": len(indices), "captions": "drawn" if store.text_labels is None else "own"}
    result |= retrieval("text_to_image", similarity, fits) | retrieval("image_to_text", similarity.T, fits.T)
    if store.text_labels is None:
        scores = zero_shot(model, tokenizer, image, attributes)
        result["zero_shot_auc"] = scores
        result["zero_shot_auc_mean"] = round(sum(scores.values()) / len(scores), 4) if scores else None
        result["zero_shot_auc_chance"] = 0.5
    whys = {"zero_shot_auc_mean": "no attribute differs between the test images"}
    result["not_measurable"] = {
        name: whys.get(name, "every answer fits, or all are given: chance would do the same")
        for name, value in result.items() if value is None}
    if all(value is None for name, value in result.items() if "precision" in name or name == "zero_shot_auc_mean"):
        raise DataError(f"the {len(indices)} test images of {args.data} cannot tell a trained model from chance: every "
                        "caption fits every image")
    Path(args.run).mkdir(parents=True, exist_ok=True)
    (Path(args.run) / "metrics.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))
    measured = result["text_to_image_precision_at_1"]
    if measured is not None and measured <= result["chance_at_1"] + 2 * (measured * (1 - measured) / len(texts)) ** 0.5:
        print(f"text to image is no better than chance: {measured} of the first answers fit, and "
              f"{result['chance_at_1']} of any", file=sys.stderr)
    return result


def zero_shot(model: CLIP, tokenizer: Tokenizer, image: Tensor, attributes: Tensor) -> dict[str, float]:
    """How well the difference between two kinds of captions tells the images [I, E] that have an attribute from those
    that lack it (area under the ROC curve), for each attribute [I, 40] in {-1, 1} of which both are there."""
    from core.captions import ATTRIBUTES

    scores = {}
    for column, name in enumerate(ATTRIBUTES):
        sides = []
        for prompts in attribute_prompts(name):
            embedded = model.embed_text(*(t.to(image.device) for t in tokenizer(prompts)))
            sides.append(F.normalize(embedded.mean(0), dim=0))
        truth = attributes[:, column] > 0
        if bool(truth.any()) and not bool(truth.all()):
            scores[name] = round(rank_auc(image @ (sides[0] - sides[1]), truth), 4)
    return scores


def rank_auc(scores: Tensor, truth: Tensor) -> float:
    """Area under the ROC curve of scores [N] for booleans [N] (Mann-Whitney; 0.5 = chance)."""
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.cpu().argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    positives = truth.cpu()
    count, others = int(positives.sum()), int((~positives).sum())
    return float((ranks[positives].sum() - count * (count + 1) / 2) / (count * others))


def attribute_prompts(name: str, count: int = 16, seed: int = 0) -> tuple[list[str], list[str]]:
    """Pairs of captions that differ in this one fact and agree in every other: those with it, and those without."""
    from core.captions import draw_caption

    rng = random.Random(seed)
    sides: tuple[list[str], list[str]] = ([], [])
    for _ in range(2000):
        attributes = {"Male": rng.random() < 0.5}  # what a caption is not told, it does not mention
        pair = [draw_caption(attributes | {name: wanted}, rng, length="short") for wanted in (True, False)]
        others = [{key: value for key, value in caption.facts.items() if key != name} for caption in pair]
        if others[0] == others[1] and all(name in caption.facts for caption in pair):
            for side, caption in zip(sides, pair, strict=True):
                side.append(caption.text)
            if len(sides[0]) == count:
                break
    if not sides[0]:  # the grammar never says this fact alone: contrast its plain name with silence
        sides[0].append(f"a person, {name.replace('_', ' ').lower()}")
        sides[1].append("a person")
    return sides


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    from core.release import add_release_options, of_preset, settle

    keep_quiet()
    parser = argparse.ArgumentParser(description="Train or measure the text encoder and the image tower.",
                                     allow_abbrev=False)
    mode = parser.add_mutually_exclusive_group(required=True)
    mode.add_argument("--train", action="store_true")
    mode.add_argument("--eval", action="store_true")
    parser.add_argument("--data", default="archive/prepared", help="prepared store (python dataset.py --prepare)")
    add_release_options(parser)
    parser.add_argument("--run", "--run-folder", default="runs/clip",
                        help="folder of this run; the same command resumes from it (torchrun has a --run of its own)")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="celeba128")
    parser.add_argument("--steps", type=int, help=of_preset(RUNS, "steps"))
    parser.add_argument("--stop-at", type=int, help="stop early after this many steps, resumable")
    parser.add_argument("--stop-after", type=float, metavar="SECONDS", help="the same by the clock")
    parser.add_argument("--batch-size", type=int, help=of_preset(RUNS, "batch_size"))
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--warmup-steps", type=int, help=of_preset(RUNS, "warmup_steps"))
    parser.add_argument("--decay-share", type=float, default=0.4)
    parser.add_argument("--captions-per-image", type=int, default=8)
    parser.add_argument("--samples", type=int, default=100000, help="--eval: at most this many test images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto")
    parser.add_argument("--log-every", type=int, default=10)
    parser.add_argument("--save-every", type=int, default=100)
    parser.add_argument("--validate-every", type=int, default=100, help="steps between two points of the validation "
                        "curve")
    args = parser.parse_args(argv)
    settle(parser, args, RUNS)
    check_numbers(parser, args)
    if args.train:
        with run_lock(args.run):
            train(args)
    else:
        evaluate(args)
    return 0


if __name__ == "__main__":
    raise SystemExit(run_command(main))
