"""Does Muon equalise singular values, agree with torch's own, and leave alone what it should?"""

from __future__ import annotations

import pytest
import torch
from torch import nn

import conditional_ldm
from core.training.optim import COEFFICIENTS, ITERATIONS, Muon, matrices, orthogonalised


@pytest.mark.parametrize("shape", [(24, 24), (20, 180), (96, 32)])
def test_singular_values_become_alike_and_vectors_stay(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    u, _, vt = torch.linalg.svd(torch.randn(shape), full_matrices=False)
    spread = torch.logspace(0, -2, len(vt))
    (result,) = orthogonalised([u @ torch.diag(spread) @ vt * 50])
    inner = u.T @ result @ vt.T
    assert torch.allclose(inner, torch.diag(inner.diagonal()), atol=1e-3)
    assert 0.5 < float(inner.diagonal().min()) and float(inner.diagonal().max()) < 1.25
    assert not orthogonalised([torch.zeros(shape)])[0].any()


def test_the_short_way_is_the_published_iteration() -> None:
    torch.manual_seed(1)
    x = start = torch.randn(12, 70, dtype=torch.float64)
    x = x / x.norm()
    p1, p2, p3 = COEFFICIENTS
    for _ in range(ITERATIONS):
        gram = x @ x.T
        x = p1 * x + (p2 * gram + p3 * gram @ gram) @ x
    other = torch.randn(30, 12, dtype=torch.float64)  # as high as the first is, the other way round
    ours, upright, alone = orthogonalised([start, start.T, other])
    assert torch.allclose(ours, x, atol=1e-4) and torch.allclose(upright, x.T, atol=1e-4)
    assert torch.allclose(alone, orthogonalised([other])[0], atol=1e-5)


def walk(optimizer: torch.optim.Optimizer, weight: nn.Parameter, target: torch.Tensor, steps: int = 5) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        ((weight - target) ** 2).sum().backward()
        optimizer.step()


def test_it_walks_as_torchs_own_does() -> None:
    """torch's iterates in bf16, hence the tolerance; its default learning rates are not those of AdamW."""
    torch.manual_seed(2)
    start, target = torch.randn(16, 40), torch.randn(16, 40)
    ours, theirs = nn.Parameter(start.clone()), nn.Parameter(start.clone())
    walk(Muon([ours], lr=0.02, weight_decay=0.1), ours, target)
    walk(torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"), theirs, target)
    moved, difference = (theirs.detach() - start).norm(), (ours - theirs).detach().norm()
    assert float(moved) > 0.3 and float(difference / moved) < 0.03


def test_a_kernel_is_the_matrix_of_its_rows() -> None:
    torch.manual_seed(3)
    start, target = torch.randn(8, 5, 3, 3), torch.randn(8, 5, 3, 3)
    kernel, matrix = nn.Parameter(start.clone()), nn.Parameter(start.flatten(1).clone())
    last = nn.Parameter(start.clone().contiguous(memory_format=torch.channels_last))
    walk(Muon([kernel]), kernel, target)
    walk(Muon([last]), last, target)
    walk(Muon([matrix]), matrix, target.flatten(1))
    assert torch.allclose(kernel.flatten(1), matrix) and torch.allclose(kernel, last, atol=1e-6)


def test_a_refused_step_leaves_weight_and_momentum() -> None:
    weight = nn.Parameter(torch.randn(4, 6))
    optimizer = Muon([weight])
    walk(optimizer, weight, torch.zeros(4, 6), steps=1)
    before, momentum = weight.detach().clone(), optimizer.state[weight]["momentum"].clone()
    weight.grad = torch.full_like(weight, float("nan"))
    optimizer.found_inf = torch.ones(())
    optimizer.step()
    assert torch.equal(weight, before) and torch.equal(optimizer.state[weight]["momentum"], momentum)
    with pytest.raises(ValueError, match=r"shape \[\(7,\)\]; give them to AdamW"):
        Muon([nn.Parameter(torch.zeros(7))])


def test_every_weight_of_the_unet_has_one_optimizer() -> None:
    model = conditional_ldm.ConditionalUNet(conditional_ldm.PRESETS["tiny"])
    inner = {id(weight) for weight in matrices(model, conditional_ldm.EDGES)}
    names = {name for name, weight in model.named_parameters() if id(weight) in inner}
    assert "mid_block.res.0.conv1.weight" in names and "mid_block.attention.0.cross_attention.kv.weight" in names
    assert not any(name.startswith(conditional_ldm.EDGES) or name.endswith("bias") or "null" in name for name in names)
