"""Do the networks keep their promises before any training? Sizes, shapes, invariances, losses with known answers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import decoders
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import conditional_ldm
import discriminator
import train_clip
import vae
from core.diffusion.conditioning import Condition, join_conditions
from core.diffusion.unet import Attention, ConditionalUNet, encode_prompts, load_unet, sinusoid
from core.evaluation.metrics import retrieval
from core.evaluation.reconstruction import reconstruction_metrics
from core.evaluation.zero_shot import rank_auc
from core.nn.autoencoder import Posterior
from core.nn.latent_statistics import measure_latents
from core.nn.layers import PixelNorm, ResBlock
from core.text.captions import Caption
from core.text.lexicon import ATTRIBUTES
from core.training.accelerator import make_accelerator
from core.training.caption_cache import (
    CaptionBank,
    build_caption_bank,
    cached_bank,
    caption_numbers,
    draw_texts,
    encode_captions,
)
from core.training.latent_cache import LatentCache
from core.training.unet_data import favoured_rows
from dataset import FaceStore, synthetic_store
from train_clip import CLIP, Tokenizer, load_clip
from vae import VAE, load_vae


@pytest.fixture(scope="module")
def clip_and_tokenizer(tiny_folder: Path) -> tuple[CLIP, Tokenizer]:
    return load_clip(tiny_folder)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> FaceStore:
    return synthetic_store(tmp_path_factory.mktemp("data") / "store", count=24)


def seeded(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def millions(network: nn.Module) -> float:
    return sum(parameter.numel() for parameter in network.parameters()) / 1e6


def gigaflops(run: Callable[[], object]) -> float:
    """Floating-point operations of the matrix products (a multiplication and an addition are two)."""
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 1e9


def told(batch: int, *, length: int, width: int, seed: int = 0, px: float = 128.0) -> Condition:
    mask, null = torch.ones(batch, length, dtype=torch.bool), torch.zeros(batch, dtype=torch.bool)
    return Condition(seeded(batch, length, width, seed=seed), mask, seeded(batch, width, seed=seed + 1),
                     torch.full((batch,), px), null)


# ---------------------------------------------------------------------------------------------------------------- sizes


def test_the_vae_is_as_small_as_promised() -> None:
    network = VAE(vae.PRESETS["celeba128"]).eval()
    assert 4.0 <= millions(network.decoder) <= 5.0
    assert gigaflops(lambda: network.decode(torch.zeros(1, 16, 16, 16))) <= 4.0
    assert gigaflops(lambda: network.encode(torch.zeros(1, 3, 128, 128))) <= 2.0


def test_clip_and_the_discriminator_are_as_small_as_promised() -> None:
    network = CLIP(train_clip.PRESETS["celeba128"]).eval()
    assert 2.0 <= millions(network.text) <= 4.0 and network.text.tokens.num_embeddings <= 4096
    critic = discriminator.PatchDiscriminator(discriminator.PRESETS["celeba128"])
    assert millions(critic) < 1 and gigaflops(lambda: critic(torch.zeros(1, 3, 128, 128))) < 0.5


@pytest.mark.parametrize(("preset", "least", "most", "flops"), [("celeba128", 18, 23, 2.1), ("small", 8, 11, 0.8)])
def test_the_unet_is_as_small_as_promised(preset: str, least: float, most: float, flops: float) -> None:
    config = conditional_ldm.PRESETS[preset]
    network = ConditionalUNet(config).eval()
    assert least <= millions(network) <= most
    prompt = told(1, length=24, width=config.text_width)  # "a smiling young woman with long wavy blond hair" has 11
    assert gigaflops(lambda: network(torch.zeros(1, config.latent_channels, 16, 16), torch.zeros(1), prompt)) <= flops


# ------------------------------------------------------------------------------------------------------------------ VAE


def test_vae_shapes_and_refusals(tiny_folder: Path) -> None:
    network = load_vae(tiny_folder)
    for height, width in ((128, 128), (64, 96), (8, 8)):
        posterior = network.encode(seeded(2, 3, height, width).clamp(-1, 1))
        assert posterior.mean.shape == posterior.logvar.shape == (2, 4, height // 8, width // 8)
        assert network.decode(posterior.mean).shape == (2, 3, height, width)
    for wrong in ((2, 3, 100, 128), (2, 1, 128, 128), (3, 128, 128)):
        with pytest.raises(ValueError, match="sides a multiple of 8, got"):
            network.encode(torch.zeros(wrong))


def test_nothing_leaks_between_places_or_depends_on_the_size(tiny_folder: Path) -> None:
    """Away from the border, a crop is coded like the whole: no statistic over the image enters anywhere."""
    network = load_vae(tiny_folder)
    images = seeded(1, 3, 192, 192).clamp(-1, 1)
    whole, crop = network.encode(images), network.encode(images[..., 32:160, 32:160])
    assert torch.allclose(whole.mean[..., 9:15, 9:15], crop.mean[..., 5:11, 5:11], atol=1e-5)
    z = seeded(1, 4, 24, 24)
    whole, crop = network.decode(z), network.decode(z[..., 4:20, 4:20])
    assert torch.allclose(whole[..., 80:112, 80:112], crop[..., 48:80, 48:80], atol=1e-5)
    norm = PixelNorm(6)
    x = 5 * seeded(2, 6, 4, 4) + 3
    assert torch.allclose(norm(x).mean(1), torch.zeros(2, 4, 4), atol=1e-5)
    assert torch.allclose(norm(x).var(1, unbiased=False), torch.ones(2, 4, 4), atol=1e-3)
    assert torch.equal(norm(x)[..., :2, 1:3], norm(x[..., :2, 1:3]))


def test_new_blocks_are_the_identity() -> None:
    x = seeded(2, 8, 4, 4)
    assert torch.equal(ResBlock(8)(x), x)
    network = ConditionalUNet(conditional_ldm.PRESETS["tiny"])
    prompt = told(2, length=5, width=32)
    assert not bool(network(seeded(2, 4, 16, 16), torch.tensor([3.0, 700.0]), prompt).any())  # starts by predicting 0
    attention = Attention(8, 8, 4)
    assert torch.equal(attention(x.flatten(2).mT), x.flatten(2).mT)


def test_kl_has_its_known_values() -> None:
    shape = (2, 3, 4, 4)
    zero = torch.zeros(shape)
    assert float(Posterior(zero, zero).kl()) == 0
    assert float(Posterior(zero + 1, zero).kl()) == 0.5
    assert float(Posterior(zero, zero + math.log(4)).kl()) == pytest.approx(0.5 * (3 - math.log(4)))
    posterior = Posterior(seeded(*shape), seeded(*shape, seed=1))
    reference = torch.distributions.kl_divergence(torch.distributions.Normal(posterior.mean, posterior.std),
                                                  torch.distributions.Normal(zero, zero + 1)).mean()
    assert torch.allclose(posterior.kl(), reference)


def test_posterior_samples_follow_mean_std_and_generator() -> None:
    posterior = Posterior(torch.full((1, 1, 200, 200), 3.0), torch.full((1, 1, 200, 200), math.log(0.25)))
    z = posterior.sample(torch.Generator().manual_seed(0))
    assert float(z.mean()) == pytest.approx(3, abs=0.01) and float(z.std()) == pytest.approx(0.5, abs=0.01)
    assert torch.equal(z, posterior.sample(torch.Generator().manual_seed(0)))
    assert not torch.equal(z, posterior.sample(torch.Generator().manual_seed(1)))


def test_whitening_is_measured_and_comes_back(tiny_folder: Path, store: FaceStore) -> None:
    network = load_vae(tiny_folder)
    pixels = torch.from_numpy(store.images[:16].copy())
    mean, std = measure_latents(network, pixels, batch_size=8)
    assert torch.allclose(mean, measure_latents(network, pixels, batch_size=8)[0], atol=0)
    network.latent_mean.copy_(mean)
    network.latent_std.copy_(std)
    posterior = network.encode(vae.to_images(pixels))
    x = network.normalize(posterior.sample(torch.Generator().manual_seed(9)))
    assert torch.allclose(x.mean((0, 2, 3)), torch.zeros(4), atol=0.06)
    assert torch.allclose(x.std((0, 2, 3)), torch.ones(4), atol=0.05)
    assert torch.allclose(network.denormalize(x), x * std[:, None, None] + mean[:, None, None])
    assert torch.allclose(network.normalize(network.denormalize(x)), x, atol=1e-5)


def test_the_encoder_hash_covers_encoder_and_whitening_and_nothing_else(tiny_folder: Path) -> None:
    first = vae.encoder_hash(load_vae(tiny_folder))
    assert len(first) == 64
    for change, same in (("decoder.conv_out.weight", True), ("encoder.conv_out.bias", False), ("latent_mean", False)):
        network = load_vae(tiny_folder)
        network.state_dict()[change][0] += 0.25
        assert (vae.encoder_hash(network) == first) is same, change


def test_pixel_losses_have_their_known_values() -> None:
    a, b = torch.zeros(1, 1, 4, 4), torch.full((1, 1, 4, 4), 0.5)
    assert float(vae.charbonnier(a, a)) == pytest.approx(0, abs=1e-8)
    assert float(vae.charbonnier(a, b)) == pytest.approx(math.sqrt(0.25 + 1e-4) - 0.01)
    ramp = torch.arange(4.0).expand(1, 1, 4, 4)  # rises by 1 a column, not at all down a row
    assert float(vae.gradient_loss(a, b)) == 0 and float(vae.gradient_loss(ramp, a)) == 0.5
    assert float(vae.gradient_loss(ramp, ramp + 7)) == 0


def test_perceptual_loss_teaches_only_the_prediction(clip_and_tokenizer: tuple[CLIP, Tokenizer]) -> None:
    clip, images = clip_and_tokenizer[0], seeded(2, 3, 64, 64).clamp(-1, 1)
    assert [tuple(f.shape) for f in clip.image.features(images)] == [(2, 8, 16, 16), (2, 12, 8, 8), (2, 16, 4, 4)]
    prediction, target = images.roll(1, -1).requires_grad_(), images.clone().requires_grad_()
    loss = vae.perceptual_loss(clip.image.features, prediction, target)
    loss.backward()
    assert loss.item() > 0.01 and bool(prediction.grad.any()) and target.grad is None  # type: ignore[union-attr]
    assert float(vae.perceptual_loss(clip.image.features, images, images)) == 0
    assert all(parameter.grad is None for parameter in clip.parameters())


def test_pixels_become_images_and_mirror_half_of_them() -> None:
    pixels = torch.tensor([0, 255], dtype=torch.uint8).view(1, 1, 2, 1).expand(64, 2, 2, 3)
    images = vae.to_images(pixels)
    assert images.shape == (64, 3, 2, 2) and images[0, 0].tolist() == [[-1, 1], [-1, 1]]
    flipped = vae.mirror(images, torch.Generator().manual_seed(0))
    share = float((flipped[:, 0, 0, 0] > 0).float().mean())
    assert 0.3 < share < 0.7
    assert torch.equal(flipped.sort(-1).values, images)
    assert torch.equal(flipped, vae.mirror(images, torch.Generator().manual_seed(0)))


def test_reconstruction_metrics_use_the_range_of_the_pixels(store: FaceStore) -> None:
    """A stand-in that moves every value by a tenth of the range must measure exactly 20 dB."""

    class Brighter(nn.Module):
        def encode(self, images: Tensor) -> Posterior:
            return Posterior(images * 0.8 - 0.1, torch.zeros(1))  # inside [-1, 1], so that nothing is clamped

        def decode(self, z: Tensor) -> Tensor:
            return (z + 0.1) / 0.8

    class Shifted(Brighter):
        def decode(self, z: Tensor) -> Tensor:
            images = (z + 0.1) / 0.8
            return torch.where(images < 0, images + 0.2, images - 0.2)

    pixels = torch.from_numpy(store.images[:2].copy())
    same = reconstruction_metrics(Brighter(), pixels)  # type: ignore[arg-type]
    assert same["psnr_db"] > 80 and same["ssim"] > 0.999 and same["ms_ssim"] > 0.999 and same["n"] == 2
    moved = reconstruction_metrics(Shifted(), pixels)  # type: ignore[arg-type]
    assert moved["psnr_db"] == pytest.approx(20, abs=0.01) and moved["ms_ssim"] < same["ms_ssim"]


# -------------------------------------------------------------------------------------------------------- discriminator


def test_hinge_losses_have_their_known_values() -> None:
    def patches(value: float) -> Tensor:
        return torch.full((2, 1, 3, 3), value)

    loss = discriminator.discriminator_loss
    assert float(loss(patches(1), patches(-1))) == 0 and float(loss(patches(5), patches(-3))) == 0
    assert float(loss(patches(0), patches(0))) == 1 and float(loss(patches(-1), patches(1))) == 2
    assert float(loss(patches(1), patches(0.5))) == 0.75
    assert float(discriminator.generator_loss(patches(0.25))) == -0.25
    real = [torch.zeros(1, 2, 2, 2), torch.zeros(1, 3, 1, 1)]
    fake = [torch.ones(1, 2, 2, 2), torch.full((1, 3, 1, 1), 3.0)]
    real[0].requires_grad_()
    fake[0].requires_grad_()
    matching = discriminator.feature_matching_loss(real, fake)
    matching.backward()
    assert matching.item() == 2 and real[0].grad is None and fake[0].grad is not None


def test_the_discriminator_sees_means_and_differences_of_every_block() -> None:
    flat = torch.full((1, 3, 4, 4), 0.25)
    bands = discriminator.haar_bands(flat)
    assert bands.shape == (1, 12, 2, 2) and bool((bands[:, :3] == 0.25).all()) and not bool(bands[:, 3:].any())
    stripes = flat + torch.tensor([1.0, -1.0, 1.0, -1.0])  # vertical stripes of amplitude 1: one band answers, 4 x gain
    horizontal, vertical, diagonal = (discriminator.haar_bands(stripes, detail_gain=0.5)[:, 3 * i : 3 * i + 3]
                                      for i in (1, 2, 3))
    assert bool((horizontal == 2.0).all()) and not bool(vertical.any()) and not bool(diagonal.any())


def test_the_discriminator_judges_patches_and_its_layers_have_unit_gain() -> None:
    torch.manual_seed(0)
    critic = discriminator.PatchDiscriminator(discriminator.PRESETS["celeba128"])
    with torch.no_grad():
        for layer in [*critic.stages, critic.conv_out]:
            layer.parametrizations.weight.original.mul_(30)
        for _ in range(60):  # each pass in training mode is one power iteration
            logits, features = critic(seeded(1, 3, 32, 32))
        assert logits.shape == (1, 1, 2, 2) and [f.shape[1] for f in features] == [48, 96, 160]
        assert critic(seeded(1, 3, 128, 128))[0].shape == (1, 1, 8, 8)
        for layer in [*critic.stages, critic.conv_out]:
            assert float(torch.linalg.matrix_norm(layer.weight.flatten(1), 2)) == pytest.approx(1, abs=0.02)
        before, moved = seeded(1, 3, 128, 128), seeded(1, 3, 128, 128)
        moved[..., :32, :32] += 1.0
        critic.eval()
        change = (critic(moved)[0] - critic(before)[0]).abs()
        assert float(change[..., :2, :2].max()) > 0 and not bool(change[..., 4:, 4:].any())  # far patches do not care


def test_the_adaptive_weight_balances_the_gradients() -> None:
    layer = seeded(4, 4).requires_grad_()
    inputs = seeded(8, 4, seed=1)
    reconstruction, adversarial = 3 * (inputs @ layer).square().mean(), -(inputs @ layer).tanh().mean()
    weight = discriminator.adaptive_weight(reconstruction, adversarial, layer)
    (g,) = torch.autograd.grad(reconstruction, layer, retain_graph=True)
    (h,) = torch.autograd.grad(weight * adversarial, layer, retain_graph=True)
    limited = discriminator.adaptive_weight(1e6 * reconstruction, adversarial, layer)
    assert not weight.requires_grad and float(limited) == 10
    quiet = discriminator.adaptive_weight(0.01 * reconstruction, adversarial, layer)
    (small,) = torch.autograd.grad(0.01 * reconstruction, layer)
    assert float(quiet) * float(h.norm() / weight) == pytest.approx(float(small.norm()), rel=1e-3)
    assert float(weight) == 10 or float(h.norm()) == pytest.approx(float(g.norm()), rel=1e-3)


# ----------------------------------------------------------------------------------------------------------------- CLIP


def test_soft_targets_count_violated_facts() -> None:
    facts = torch.tensor([[1.0, -1, 0], [0, 0, 0], [-1, -1, -1]])
    attributes = torch.tensor([[1.0, -1, 1], [1, 1, 1], [-1, 1, -1]])
    violations = torch.tensor([[0.0, 1, 2], [0, 0, 0], [2, 3, 1]])
    assert torch.allclose(train_clip.soft_targets(facts, attributes), torch.exp(-2 * violations))
    assert torch.allclose(train_clip.soft_targets(facts, attributes, sharpness=0.5), torch.exp(-0.5 * violations))


def test_contrastive_loss_has_its_known_values_and_its_floor() -> None:
    eye = torch.eye(2)
    for scale in (0.0, 1.0, 5.0):
        loss = train_clip.contrastive_loss(eye, eye, torch.tensor(scale), eye)
        assert float(loss) == pytest.approx(math.log(1 + math.exp(-scale)))  # two images: -log sigmoid(scale)
    assert float(train_clip.contrastive_floor(eye)) == pytest.approx(0, abs=1e-6)
    assert float(train_clip.contrastive_floor(torch.ones(4, 4))) == pytest.approx(math.log(4))  # all fit all
    ring = torch.tensor([0.5, 0.3, 0.2])
    targets = torch.stack([ring.roll(i) for i in range(3)])  # rows and columns sum to one: both sides can be perfect
    floor = train_clip.contrastive_floor(targets)
    assert float(floor) == pytest.approx(-float((ring * ring.log()).sum()))
    best = train_clip.contrastive_loss(targets.log() + 4, torch.eye(3), torch.tensor(1.0), targets)
    assert float(best) == pytest.approx(float(floor))
    for seed in range(20):
        text, image = (F.normalize(seeded(5, 8, seed=seed + offset), dim=1) for offset in (0, 99))
        some = seeded(5, 5, seed=seed).exp()
        loss = train_clip.contrastive_loss(text, image, torch.tensor(3.0), some)
        assert loss > train_clip.contrastive_floor(some)


def test_text_encoding_does_not_see_padding_or_neighbours(clip_and_tokenizer: tuple[CLIP, Tokenizer]) -> None:
    clip, tokenizer = clip_and_tokenizer
    texts = ["", "a smiling woman", "an old bald man with a grey beard, glasses and a hat, not smiling"]
    ids, mask = tokenizer(texts)
    together = clip.encode_text(ids, mask)
    longer = clip.encode_text(F.pad(ids, (0, 9), value=5), F.pad(mask, (0, 9)))  # whatever stands there is not read
    assert torch.allclose(longer.pooled, together.pooled, atol=1e-5)
    assert torch.allclose(longer.tokens[:, : ids.shape[1]][mask], together.tokens[mask], atol=1e-5)
    for i, text in enumerate(texts):
        alone = clip.encode_text(*tokenizer([text]))
        count = alone.tokens.shape[1]
        assert torch.allclose(alone.tokens[0], together.tokens[i, :count], atol=1e-5)
        assert torch.allclose(alone.pooled[0], together.pooled[i], atol=1e-5)
    assert not torch.allclose(together.pooled[1], together.pooled[2], atol=1e-2)
    for unit in (clip.embed_text(ids, mask), clip.encode_image(seeded(3, 3, 128, 128))):
        assert torch.allclose(unit.norm(dim=1), torch.ones(3), atol=1e-5)


def test_tokenizer_shapes_and_truncation(clip_and_tokenizer: tuple[CLIP, Tokenizer]) -> None:
    tokenizer = clip_and_tokenizer[1]
    ids, mask = tokenizer(["", "a man", "woman " * 500])
    assert ids.dtype == torch.int64 and mask.dtype == torch.bool and ids.shape == mask.shape == (3, 80)
    assert mask.sum(1).tolist()[::2] == [2, 80] and not bool(ids[0, 2:].any()) and int(ids.max()) < tokenizer.size
    start, end = ids[0, :2].tolist()
    assert ids[:, 0].tolist() == [start] * 3 and int(ids[2, -1]) == end
    assert torch.equal(tokenizer(["A  Man"])[0], tokenizer(["a  man"])[0])  # case carries nothing
    assert torch.equal(tokenizer(["café"])[0], tokenizer(["cafe"])[0])


@settings(max_examples=150, deadline=None, derandomize=True)
@given(text=st.text(max_size=60) | st.sampled_from(["[END]", "a [PAD] b [START]", "👩🏽‍🦱 女性 женщина", "\x00\n\t"]))
def test_every_string_has_tokens_that_spell_it(folder_of_tokenizer: Path, text: str) -> None:
    tokenizer = Tokenizer.load(folder_of_tokenizer, max_length=4000)
    encoding = tokenizer.backend.encode(text)
    assert encoding.ids == tokenizer.ids([text])[0] and 0 < min(encoding.ids) and max(encoding.ids) < tokenizer.size
    assert encoding.tokens[0] == "[START]" and encoding.tokens[-1] == "[END]"
    assert not {"[START]", "[END]", "[PAD]"} & set(encoding.tokens[1:-1])  # typed brackets are letters, not commands
    spelt = decoders.ByteLevel().decode(encoding.tokens[1:-1])
    clean = tokenizer.backend.normalizer.normalize_str(text)
    assert spelt in (clean, " " + clean)


@pytest.fixture(scope="module")
def folder_of_tokenizer(tiny_folder: Path) -> Path:
    return tiny_folder / "clip" / "tokenizer.json"


def test_half_a_surrogate_pair_is_no_crash(clip_and_tokenizer: tuple[CLIP, Tokenizer]) -> None:
    tokenizer = clip_and_tokenizer[1]
    assert tokenizer.ids(["a \ud83d man"]) == tokenizer.ids(["a ? man"])


def test_seeded_dropout_splits_words_otherwise_but_spells_the_same(clip_and_tokenizer: tuple[CLIP, Tokenizer]) -> None:
    tokenizer = clip_and_tokenizer[1]
    texts = ["a smiling woman with blonde hair and glasses", "", "an old man, " * 40]
    assert tokenizer.dropout_ids(texts, [0, 1, 2], 0.0) == tokenizer.ids(texts)
    seeds = list(range(200))
    rows = tokenizer.dropout_ids(texts[:1] * 200, seeds, 0.1)
    assert rows == tokenizer.dropout_ids(texts[:1] * 200, seeds, 0.1)
    assert rows[7] == tokenizer.dropout_ids(texts[:1], [7], 0.1)[0]  # its own seed alone decides
    assert len({tuple(row) for row in rows}) > 20
    usual = len(tokenizer.ids(texts)[0])
    assert usual < np.mean([len(row) for row in rows]) < 1.6 * usual
    pieces = {index: piece for piece, index in tokenizer.backend.get_vocab().items()}
    spelt = {decoders.ByteLevel().decode([pieces[i] for i in row[1:-1]]) for row in rows}
    assert spelt == {" " + texts[0]}
    assert len(tokenizer.dropout_ids(texts[2:], [0], 1.0)[0]) == tokenizer.max_length


def test_caption_bank_draws_one_caption_an_image() -> None:
    ids = torch.arange(2 * 3 * 5, dtype=torch.int16).view(2, 3, 5)
    lengths = torch.tensor([[2, 3, 4], [5, 2, 3]], dtype=torch.int16)
    facts = torch.tensor([[[0], [1], [-1]], [[1], [0], [-1]]], dtype=torch.int8)
    bank, rows = CaptionBank(ids, lengths, facts), torch.tensor([1, 0, 1, 0] * 16)
    drawn, mask, stated, empty = bank.draw(rows, torch.Generator().manual_seed(0))
    assert drawn.dtype == torch.int64 and drawn.shape == mask.shape == (64, int(mask.sum(1).max()))
    seen = set()
    for i, row in enumerate(rows.tolist()):
        k = (int(drawn[i, 0]) - 15 * row) // 5
        seen.add((row, k))
        length = int(lengths[row, k])
        assert drawn[i].tolist() == ids[row, k, : drawn.shape[1]].tolist()
        assert mask[i].tolist() == [place < length for place in range(drawn.shape[1])]
        assert stated[i].tolist() == facts[row, k].tolist() and bool(empty[i]) == (length == 2)
    assert len(seen) == 6  # every caption of both images is in use
    again = bank.draw(rows, torch.Generator().manual_seed(0))
    assert torch.equal(drawn, again[0])
    short = bank.draw(torch.tensor([0]), torch.Generator().manual_seed(3))
    assert short[0].shape[1] == int(short[1].sum())  # as long as this batch needs


def test_captions_depend_on_seed_and_image_alone(store: FaceStore, clip_and_tokenizer: tuple[CLIP, Tokenizer]) -> None:
    tokenizer, rows = clip_and_tokenizer[1], np.arange(8)

    def bank(chosen: np.ndarray, seed: int = 0, dropout: float = 0.3) -> CaptionBank:
        return build_caption_bank(store, chosen, tokenizer, captions_per_image=3, seed=seed, empty_share=0.2,
                                  dropout=dropout)

    def row(of: CaptionBank, i: int) -> list[list[int]]:
        return [ids[:length].tolist() for ids, length in zip(of.ids[i], of.lengths[i], strict=True)]

    whole, part = bank(rows), bank(rows[5:6])
    assert torch.equal(whole.ids, bank(rows).ids) and row(whole, 5) == row(part, 0)
    assert torch.equal(whole.facts[5], part.facts[0]) and whole.facts.shape == (8, 3, 40)
    assert row(bank(rows, seed=1), 5) != row(whole, 5) != row(bank(rows, dropout=0.0), 5)
    texts, facts = draw_texts(store, rows, 3, 0, 0.2)
    assert torch.equal(torch.from_numpy(facts).view(8, 3, 40), whole.facts) and "" in texts
    truth = np.where(store.attributes[rows], 1, -1).repeat(3, axis=0)
    assert np.all((facts == 0) | (facts == truth)) and not facts[[i for i, text in enumerate(texts) if not text]].any()


def test_captions_read_beforehand_are_the_captions_read_in_a_step(
    store: FaceStore, clip_and_tokenizer: tuple[CLIP, Tokenizer]
) -> None:
    clip, tokenizer = clip_and_tokenizer
    bank = build_caption_bank(store, np.arange(8), tokenizer, captions_per_image=3, seed=0, empty_share=0.2)
    read, rows = encode_captions(clip, bank, make_accelerator("cpu", "no"), batch_size=5), torch.randint(8, (12,))
    ids, mask, facts, empty = bank.draw(rows, torch.Generator().manual_seed(4))
    places, padded, same_facts, same_empty = read.draw(rows, torch.Generator().manual_seed(4))
    now, before, length = clip.encode_text(ids, mask), read.encode_text(places, padded), ids.shape[1]
    assert read.text.tokens.shape == (24, bank.ids.shape[2], clip.config.text_width) and places.shape == (12,)
    assert torch.equal(facts, same_facts) and torch.equal(empty, same_empty) and bool(facts.any())
    assert torch.equal(padded[:, :length], mask) and not padded[:, length:].any()
    assert torch.allclose(now.pooled, before.pooled, atol=1e-5)
    assert torch.allclose(now.tokens[mask], before.tokens[:, :length][mask], atol=1e-5)


def test_a_bank_is_made_anew_for_other_captions_only(
    store: FaceStore, clip_and_tokenizer: tuple[CLIP, Tokenizer], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, accelerator, made = clip_and_tokenizer[1], make_accelerator("cpu", "no"), []

    def build(*given: Any, **how: Any) -> CaptionBank:
        made.append(how)
        return build_caption_bank(*given, **how)

    def bank(rows: int = 8, seed: int = 0) -> CaptionBank:
        return cached_bank(tmp_path / "new" / "bank.npz", store, np.arange(rows), tokenizer, accelerator,
                           captions_per_image=2, seed=seed, empty_share=0.1)

    monkeypatch.setattr("core.training.caption_cache.build_caption_bank", build)
    first, again = bank(), bank()
    assert len(made) == 1
    assert all(torch.equal(getattr(first, one.name), getattr(again, one.name)) for one in fields(first))
    assert not torch.equal(bank(seed=1).ids, first.ids) and len(bank(rows=5).ids) == 5 and len(made) == 3
    monkeypatch.setattr("core.training.caption_cache.draw_caption", lambda *_, **__: Caption("a face", {}))
    assert not bank(rows=5).facts.any() and len(made) == 4  # the grammar is another


def test_captions_without_facts_are_told_apart_by_image_and_words() -> None:
    own = torch.tensor([[0, 1], [0, 2], [3, 3]])  # images 0 and 1 share a caption
    rows, pick = torch.tensor([0, 1, 2, 0]), torch.tensor([0, 1, 0, 1])
    assert train_clip.same_captions(rows, own[rows], pick).tolist() == [
        [1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 1, 0], [1, 0, 0, 1]]
    assert caption_numbers(["A  red\ncircle", "a red circle", "a circle"]).tolist() == [0, 0, 1]


def test_a_figure_that_chance_would_reach_too_is_refused() -> None:
    similarity = torch.eye(12)
    found = retrieval("text_to_image", similarity, torch.eye(12) > 0)
    assert found == {"text_to_image_precision_at_1": 1.0, "chance_at_1": 0.0833,
                     "text_to_image_precision_at_10": 0.1, "chance_at_10": 0.0833}
    everything = retrieval("image_to_text", similarity, torch.ones(12, 12) > 0)
    assert everything["image_to_text_precision_at_1"] is None and everything["image_to_text_chance_at_1"] == 1.0
    few = retrieval("text_to_image", torch.eye(3), torch.eye(3) > 0)
    assert few["text_to_image_precision_at_10"] is None and few["text_to_image_precision_at_1"] == 1.0


def test_rank_auc_has_its_known_values() -> None:
    scores, truth = torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([False, False, True, True])
    assert rank_auc(scores, truth) == 0.75
    assert rank_auc(-scores, truth) == 0.25
    assert rank_auc(truth.float() + torch.tensor([0, 0.1, 0, 0.1]), truth) == 1.0


# ----------------------------------------------------------------------------------------------------------------- UNet


@pytest.fixture(scope="module")
def unet(tiny_folder: Path) -> ConditionalUNet:
    return load_unet(tiny_folder)


def test_the_unet_does_not_see_padding_or_neighbours(unet: ConditionalUNet) -> None:
    x, t, prompt = seeded(8, 4, 16, 16), torch.linspace(0, 999, 8), told(8, length=7, width=32)
    prompt.mask[::2, 5:] = False
    together = unet(x, t, prompt)
    assert together.shape == x.shape and together.dtype == torch.float32 and float(together.std()) > 1e-3
    padded = join_conditions([prompt, told(1, length=20, width=32)])[slice(0, 8)]
    padded.tokens[:, 7:] = 1e3  # whatever stands there is not read
    assert torch.allclose(unet(x, t, padded), together, atol=1e-5)
    for i in range(8):
        one = slice(i, i + 1)
        assert torch.allclose(unet(x[one], t[one], prompt[one]), together[one], atol=1e-5)


def test_the_unet_hears_everything_it_is_told(unet: ConditionalUNet) -> None:
    x, t, prompt = seeded(2, 4, 16, 16), torch.tensor([400.0, 400.0]), told(2, length=6, width=32)
    base = unet(x, t, prompt)

    def change(other: Condition, time: Tensor = t) -> float:
        return float((unet(x, time, other) - base).abs().max())

    fields = (prompt.tokens, prompt.mask, prompt.pooled, prompt.px, prompt.null)
    assert change(Condition(*fields)) == 0
    assert change(prompt, t + 40) > 1e-4  # the noise level
    assert change(Condition(seeded(2, 6, 32, seed=8), *fields[1:])) > 1e-4  # the words
    assert change(Condition(*fields[:2], seeded(2, 32, seed=9), *fields[3:])) > 1e-4  # the sentence
    assert change(Condition(*fields[:3], torch.full((2,), 64.0), prompt.null)) > 1e-4  # the source's resolution
    assert change(prompt.nulled()) > 1e-4


def test_the_null_ignores_the_text_but_not_the_resolution(unet: ConditionalUNet) -> None:
    x, t = seeded(2, 4, 16, 16), torch.tensor([100.0, 800.0])
    first = unet(x, t, told(2, length=3, width=32).nulled())
    assert torch.allclose(first, unet(x, t, told(2, length=11, width=32, seed=5).nulled()), atol=1e-6)
    assert not torch.allclose(first, unet(x, t, told(2, length=3, width=32, px=60.0).nulled()), atol=1e-4)
    mixed = told(2, length=3, width=32)
    mixed.null[0] = True
    both = unet(x, t, mixed)
    assert torch.allclose(both[0], first[0], atol=1e-5) and not torch.allclose(both[1], first[1], atol=1e-4)


def test_prompts_become_conditions(clip_and_tokenizer: tuple[CLIP, Tokenizer]) -> None:
    clip, tokenizer = clip_and_tokenizer
    found = encode_prompts(clip, tokenizer, ["a man", "", "  \n"], px=90)
    assert found.null.tolist() == [False, True, True] and found.px.tolist() == [90.0] * 3 and len(found) == 3
    assert torch.allclose(found.pooled, clip.encode_text(*tokenizer(["a man", "", "  \n"])).pooled)


def test_sinusoids_tell_all_levels_apart() -> None:
    codes = sinusoid(torch.arange(1000), 128)
    assert codes.shape == (1000, 128) and torch.allclose(codes.square().sum(1), torch.full((1000,), 64.0), rtol=1e-4)
    distances = torch.cdist(codes, codes) + 9 * torch.eye(1000)
    assert float(distances.min()) > 0.3


def test_cached_latents_are_whitened_posterior_samples_of_either_view(tiny_folder: Path) -> None:
    mean, std = seeded(2, 5, 4, 16, 16).half(), seeded(2, 5, 4, 16, 16, seed=1).abs().half()
    cache = LatentCache(mean, std)
    rows, mirrored, eps = torch.tensor([4, 0, 4]), torch.tensor([0, 1, 1]), seeded(3, 4, 16, 16, seed=2)
    z = cache.draw(rows, mirrored, eps)
    for i, (row, view) in enumerate(zip(rows.tolist(), mirrored.tolist(), strict=True)):
        assert torch.equal(z[i], mean[view, row].float() + std[view, row].float() * eps[i])
    assert z.dtype == torch.float32


def test_favoured_pictures_are_seen_more_often() -> None:
    attributes = np.zeros((4, len(ATTRIBUTES)), bool)
    attributes[2, ATTRIBUTES.index("Eyeglasses")] = True
    assert favoured_rows(attributes, [], 3).tolist() == [0, 1, 2, 3]
    assert favoured_rows(attributes, ["Eyeglasses", "Bald"], 3).tolist() == [0, 1, 2, 2, 2, 3]
    assert favoured_rows(attributes, ["Eyeglasses"], 2, np.array([2, 1, 2, 1])).tolist() == [0, 0, 1, 2, 2, 2, 2, 3]
    with pytest.raises(ValueError, match="--favour Glasses"):
        favoured_rows(attributes, ["Glasses"], 3)
