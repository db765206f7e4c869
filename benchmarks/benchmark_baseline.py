"""How far do diffusers' own parts come on the same data, at the same compute?

`UNet2DConditionModel` (64, 128, 256) with DDPM noise prediction learns from the same latents, captions, levels and
order of images as `conditional_ldm.py --train` with these flags, for as many steps (the same command resumes), then
generates for the prompts that `evaluate.py` generates for, by DPM++ 2M, and is measured by the same judge:

    python benchmarks/benchmark_baseline.py train --model models/next --steps S --batch-size 512
    python benchmarks/benchmark_baseline.py measure --model models/next --samples 2500 --guidance 2.5
    python benchmarks/benchmark_baseline.py measure --ours --model models/next --samples 2500 --guidance 2.5

The first writes `runs/baseline/report.json`: the distance beside the floor at the same n; the second, for the folder's
own UNet by the same sampler, without emphasis and correction, `ours.json`. diffusers is needed on the machine that
trains it; nothing of the product is. On a CPU, OpenVINO computes both networks where it is installed.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # finds the modules of the root

from conditional_ldm import open_data
from core.diffusion.conditioning import Condition, Flat
from core.diffusion.sampling import sample
from core.diffusion.schedule import NoiseSchedule
from core.diffusion.schedulers import make_scheduler, scheduler_config
from core.diffusion.unet import encode_prompts
from core.nn.openvino_backend import CompileError, Compiler
from core.training.accelerator import average_gradients, make_accelerator, process_slice
from core.training.ema import PowerEMA
from core.training.optim import StepGuard, learning_rate
from core.training.run_folder import RunFolder, run_steps
from core.training.unet_data import DataOptions


class Baseline(nn.Module):
    """diffusers' UNet on our condition: text by cross-attention, a learned token where there is none."""

    def __init__(self, channels: int, text_width: int) -> None:
        super().__init__()
        import diffusers

        self.null = nn.Parameter(torch.randn(1, 1, text_width) * 0.5)
        self.unet = diffusers.UNet2DConditionModel(
            sample_size=16, in_channels=channels, out_channels=channels, layers_per_block=2,
            block_out_channels=(64, 128, 256), cross_attention_dim=text_width, attention_head_dim=8,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))

    def forward(self, x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
        """The noise [B, C, 16, 16] in x."""
        tokens = torch.where(condition.null[:, None, None], self.null.to(condition.tokens.dtype), condition.tokens)
        first = torch.arange(tokens.shape[1], device=x.device) == 0
        mask = torch.where(condition.null[:, None], first[None], condition.mask)
        return self.unet(x, timestep, encoder_hidden_states=tokens, encoder_attention_mask=mask).sample.float()

    @staticmethod
    def velocity(noise: Any, schedule: NoiseSchedule) -> Any:
        """A prediction of the noise as one of v, which the samplers here expect."""

        def predict(x: Tensor, timestep: Tensor, condition: Condition) -> Tensor:
            alpha, sigma = (one.view(-1, 1, 1, 1) for one in schedule.coefficients(timestep))
            return (noise(x, timestep, condition) - sigma * x) / alpha

        return predict


def train(args: argparse.Namespace) -> None:
    """Noise prediction with unweighted squares (https://arxiv.org/abs/2006.11239, eq. 14)."""
    accelerator, schedule = make_accelerator(args.device, args.precision), NoiseSchedule()
    device, data = accelerator.device, open_data(DataOptions.of(args), args.model, schedule, accelerator)
    torch.manual_seed(args.seed)
    channels = data.encoders.vae.config.latent_channels
    model = Baseline(channels, data.encoders.clip.config.text_width).to(device, memory_format=torch.channels_last)
    network = torch.compile(model) if args.compile else model
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = PowerEMA(model, relative_std=0.05)
    settings = {"component": "baseline", "batch_size": args.batch_size, "seed": args.seed,
                "learning_rate": args.learning_rate}
    run = RunFolder(Path(args.run), settings, total_steps=args.steps, decay_share=args.decay_share,
                    main=accelerator.is_main_process, parts={"model": model, "optimizer": optimizer, "ema": ema})
    first, mine, guard = run.resume(), process_slice(accelerator, args.batch_size), StepGuard()
    for step, progress in run_steps(first, args.steps, stop_at=args.stop_at, enabled=run.main, label="baseline"):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, peak=args.learning_rate, total_steps=args.steps,
                                        warmup_steps=args.warmup_steps, decay_share=args.decay_share)
        for batch in data.batches.batch(step, mine, accelerator):
            with accelerator.autocast():
                answer = network(schedule.add_noise(batch.z, batch.noise, batch.timestep), batch.timestep,
                                 batch.condition)
            loss = (answer - batch.noise).square().mean((1, 2, 3)).sum() / (mine.stop - mine.start)
            loss.backward()
        average_gradients(accelerator, parameters)
        guard.step(optimizer, parameters)
        ema.update(model, step + 1)
        if (step + 1) % args.log_every == 0 or step + 1 == args.steps:
            run.log(step + 1, {"loss": float(loss.detach()), "images_seen": (step + 1) * args.batch_size})
        if (step + 1) % args.save_every == 0 or progress.last:
            run.save(step + 1)
    run.finish()


@torch.inference_mode()
def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Generate for held-out captions with the averaged weights, and compare with real images of other people."""
    from safetensors.torch import load_file

    from core.diffusion.unet import load_unet
    from core.evaluation.attribute_classifier import extract_features
    from core.evaluation.suite import Evaluation, Settings
    from core.nn import layers
    from dataset import FaceStore
    from train_clip import load_clip
    from vae import load_vae

    settings = Settings(model=args.model, data=args.data, judge=args.judge, out=args.run, samples=args.samples,
                        cache=f"{args.run}/judge", guidance=args.guidance, device=args.device, parts=("ladder",),
                        split=args.split)
    evaluation, schedule = Evaluation(settings,
                                      FaceStore.open(args.data)), NoiseSchedule(initial_timestep=tuple(args.begin))
    device, prompts = evaluation.device, evaluation.prompts.texts
    vae, (clip, tokenizer) = load_vae(args.model, device), load_clip(args.model, device)
    shape = (vae.config.latent_channels, 16, 16)
    if args.ours:
        step, network = 0, load_unet(args.model, device)
    else:
        step, folder = RunFolder(Path(args.run), {}, {}, 1, 0.5, main=False).checkpoints()[-1]
        network = Baseline(shape[0], clip.config.text_width)
        network.load_state_dict(load_file(folder / "ema.safetensors"))
        network = network.eval().to(device)
    denoise = network
    if device == "cpu":
        denoise = quick(network, encode_prompts(clip, tokenizer, ["a face", ""]), shape)
    predict, pictures = denoise if args.ours else Baseline.velocity(denoise, schedule), []
    for start in range(0, len(prompts), 64):
        condition = encode_prompts(clip, tokenizer, prompts[start : start + 64])
        generators = [torch.Generator().manual_seed(start + i) for i in range(len(condition))]
        noise = torch.stack([torch.randn(shape, generator=one) for one in generators]).to(device)
        scheduler = make_scheduler("DPM++ 2M", scheduler_config(schedule))
        z = sample(predict, condition, scheduler, noise, args.n_inf_steps, args.guidance, schedule=schedule,
                   generators=generators)
        pictures.append(layers.to_pixels(vae.decode(vae.denormalize(z))))
    drawn = np.concatenate(pictures)
    found = evaluation.distance(extract_features(evaluation.judge, drawn), drawn)
    report = {"step": step, "guidance": args.guidance, "n_inf_steps": args.n_inf_steps, "begin": args.begin, **found}
    name = "ours.json" if args.ours else "report.json"
    (Path(args.run) / name).write_text(json.dumps(report, indent=2) + "\n")
    return report


def quick(network: nn.Module, condition: Condition, shape: tuple[int, ...]) -> Any:
    """The network, computed by OpenVINO where that is installed."""
    try:
        compiler = Compiler(None, torch.get_num_threads())
    except CompileError:
        return network
    example = Flat.inputs(torch.randn(2, *shape), torch.tensor([900.0, 100.0]), condition)
    return compiler.compile("baseline", Flat(network), example, "", pairs=True).denoise


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("train", "measure"))
    for name, default in (("model", "models/celeba128"), ("data", "archive/prepared"), ("run", "runs/baseline"),
                          ("cache", "runs/latents"), ("judge", "models/judge")):
        parser.add_argument(f"--{name}", default=default)
    for name, number in (("steps", 50000), ("batch-size", 64), ("accumulate", 1), ("captions-per-image", 8),
                         ("warmup-steps", 200), ("log-every", 50), ("save-every", 500), ("samples", 2500),
                         ("n-inf-steps", 50), ("seed", 0), ("favour-times", 1)):
        parser.add_argument(f"--{name}", type=int, default=number)
    for name, share in (("learning-rate", 1e-3), ("decay-share", 0.3), ("caption-dropout", 0.12), ("guidance", 2.5)):
        parser.add_argument(f"--{name}", type=float, default=share)
    parser.add_argument("--split", choices=("test", "val"), default="test")
    parser.add_argument("--ours", action="store_true", help="measure: the UNet of the model folder instead")
    parser.add_argument("--begin", nargs=2, type=float, default=(1000.0, 0.0), metavar=("A", "B"),
                        help="measure: n steps begin at timestep A - B / (n + 2); near pure noise a prediction of "
                        "noise says little of the image")
    parser.add_argument("--stop-at", type=int)
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto")
    parser.add_argument("--precision", choices=("auto", "bf16", "no"), default="auto")
    args = parser.parse_args(argv, argparse.Namespace(favour=[], px=None, sharp_times=1, soft_from=None))
    if args.what == "train":
        train(args)
    else:
        print(json.dumps(measure(args), indent=2))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
