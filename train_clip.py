"""How does a text encoder learn what a sentence means in images?

Presets, contrastive loss, training loop, release, command line. The networks are in core/nn/clip.py, the tokenizer in
core/nn/tokenizer.py. Captions and images are contrasted with *soft* targets, because one caption ("a smiling woman")
is true of many images in a batch. It does not know about diffusion.

    python train_clip.py --train      tokenizer, caption bank, both towers, release to the model folder
    python train_clip.py --eval       retrieval and zero-shot attribute accuracy on people never seen

Sources: CLIP https://arxiv.org/abs/2103.00020, soft targets (PyramidCLIP) https://arxiv.org/abs/2204.14095; here the
targets come from the facts that each caption states.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from core.command import Command, alone, run_command, run_one
from core.nn.checkpoint import file_hash, git_commit, save_component, write_json
from core.nn.clip import CLIP, CLIPConfig, load_clip
from core.nn.layers import to_images
from core.nn.tokenizer import Tokenizer, train_tokenizer
from core.quiet import keep_quiet

if TYPE_CHECKING:
    from dataset import FaceStore

EXAMPLES = 32  # of a person's own captions, kept beside the model: prompts that it can read

PRESETS = {
    "celeba128": CLIPConfig(),
    "tiny": CLIPConfig(pieces=512, text_width=32, text_layers=1, text_heads=2, image_channels=(8, 12, 16),
                       image_blocks=(1, 1, 1), embed_dim=32),
}
RUNS = {  # how long a run of each preset is
    "celeba128": {"steps": 4000, "batch_size": 256, "warmup_steps": 100},
    "tiny": {"steps": 10, "batch_size": 8, "warmup_steps": 1},
}


# ---------------------------------------------------------------------------------------------------------------- loss


def soft_targets(facts: Tensor, attributes: Tensor, sharpness: float = 2.0) -> Tensor:
    """How well each image satisfies each caption: exp(-sharpness * number of violated facts).

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
    from core.training.accelerator import (
        attention_kernel,
        average_gradients,
        gather_with_gradient,
        make_accelerator,
        mean_over_processes,
        process_slice,
        send,
    )
    from core.training.augmentation import load_pixels, mirror
    from core.training.caption_cache import cached_bank, check_contrast, count_cut, draw_texts, own_captions
    from core.training.ema import PowerEMA
    from core.training.optim import StepGuard, learning_rate
    from core.training.randomness import EpochSampler, step_generator
    from core.training.release import check_release, releasing
    from core.training.run_folder import RunFolder, circumstances
    from dataset import FaceStore

    accelerator = make_accelerator(args.device, args.precision)
    device = accelerator.device
    store = FaceStore.open(args.data)
    indices = store.select(split="train", px=None)
    if not check_contrast(store, indices):
        print(f"nothing is said of the pictures in {args.data}: the text encoder is released as it begins")
        args.steps = args.warmup_steps = 0
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
    own = own_captions(store, indices)
    if accelerator.is_main_process and (cut := count_cut(own, tokenizer)):
        print(f"{cut:,} of {len(own):,} captions are longer than the {config.max_length} pieces that are read: their "
              "ends are not learned")

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
                    report_to=args.report_to, main=accelerator.is_main_process, how=circumstances(args, accelerator),
                    parts={"model": model, "optimizer": optimizer, "ema": ema})
    first, mine = run.resume(), process_slice(accelerator, args.batch_size)
    guard = StepGuard(skipped=run.extra.get("skipped", 0))
    held_rows = store.sharp("val")[: args.batch_size]

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
        # every process contrasts its own texts and images with the images and texts of all
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
        from core.text.captions import vocabulary, vocabulary_of

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


@torch.inference_mode()
def held_out_excess(model: CLIP, tokenizer: Tokenizer, store: FaceStore, rows: np.ndarray, accelerator: Any
                    ) -> float | None:
    """What ``excess`` is in training, on one batch of held-out images and one caption each, the same every time; None
    where the store has fewer than two of them."""
    from core.training.augmentation import load_pixels
    from core.training.caption_cache import draw_texts

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
    from core.evaluation.metrics import retrieval
    from core.evaluation.zero_shot import zero_shot
    from core.training.accelerator import make_accelerator
    from core.training.augmentation import load_pixels
    from core.training.caption_cache import captions_fit, draw_texts
    from dataset import DataError, FaceStore

    device = make_accelerator(args.device, "no").device
    model, tokenizer = load_clip(args.model, device)
    store = FaceStore.open(args.data)
    indices = store.sharp("test")[: args.samples]
    if len(indices) < 2:
        raise DataError(f"{args.data} has {len(indices)} test images of 128 px, and at least 2 are needed; "
                        "a list_eval_partition beside the images says which are for the test")
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


# ------------------------------------------------------------------------------------------------------------ commands


def train_options(parser: argparse.ArgumentParser) -> None:
    """Those of --train."""
    from core.training.options import RunDefaults, add_run
    from core.training.release import add_release_options

    add_run(parser, RUNS, RunDefaults("runs/clip", learning_rate=1e-3, decay_share=0.4, log_every=10, save_every=100,
                                      picture_every=None))
    add_release_options(parser)
    parser.add_argument("--captions-per-image", type=int, default=8)
    parser.add_argument("--validate-every", type=int, default=100, help="steps between two points of the validation "
                        "curve")


def check_train(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Fill in what --train leaves open."""
    from core.training.options import fill_from_preset
    from core.training.release import fill_model

    fill_from_preset(parser, args, RUNS)
    fill_model(args)


def eval_options(parser: argparse.ArgumentParser) -> None:
    """Those of --eval."""
    from core.training.options import add_evaluation

    add_evaluation(parser, "runs/clip")


COMMANDS = (
    Command("--train", "learn tokenizer and both towers, and release them", train_options, alone(train), check_train),
    Command("--eval", "measure retrieval and zero-shot accuracy", eval_options, evaluate),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    keep_quiet()
    return run_one("Train or measure the text encoder and the image tower.", COMMANDS, argv)


if __name__ == "__main__":
    raise SystemExit(run_command(main))
