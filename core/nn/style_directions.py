"""In which direction of w does a face grow older, and how without glasses growing on it?

Directions are regressed: the least squares of an attribute's score on w. One that is orthogonalised has no part of the
others left: to first order it changes its own attribute alone. How much anything moves is measured, not assumed. It
does not know networks; scores and faces are passed in.

Sources: linear directions and conditional manipulation by projection, https://arxiv.org/abs/1907.10786 (section 3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from core.command import SettingError
from core.nn.checkpoint import ModelFolderError, component_hash, load_component, save_component

COMPONENT, OF = "style_directions", "stylegan"


@dataclass(frozen=True)
class StyleDirections:
    """Unit vectors in w by attribute. Shapes: plain, orthogonal [A, D]; a row for each of ``names``."""

    names: tuple[str, ...]
    plain: Tensor
    orthogonal: Tensor

    def of(self, name: str, *, orthogonal: bool = True) -> Tensor:
        """The direction [D] of an attribute. Raises SettingError for one that has none."""
        if name not in self.names:
            raise SettingError(f"there is no direction {name!r}; there are {', '.join(self.names)}")
        return (self.orthogonal if orthogonal else self.plain)[self.names.index(name)]


def regressed(w: Tensor, scores: Tensor, ridge: float = 1e-3) -> Tensor:
    """The unit vectors along which scores rise: rows of (W^T W + ridge n I)^-1 W^T S, both centred, S in units of its
    deviation. Shapes: w [N, D], scores [N, A] -> [A, D]. Raises ValueError for fewer than 2 rows or a score that never
    varies."""
    if len(w) != len(scores) or len(w) < 2:
        raise ValueError(f"{len(w)} styles and {len(scores)} scores were given; as many, and at least 2, are needed")
    x, y = w.double() - w.double().mean(0), scores.double() - scores.double().mean(0)
    spread = y.std(0)
    if bool((spread < 1e-9).any()):
        raise ValueError(f"{int((spread < 1e-9).sum())} of {len(spread)} scores are the same for every style")
    scale = x.square().mean()
    gram = x.T @ x + ridge * len(x) * scale * torch.eye(x.shape[1], dtype=x.dtype)
    solution = torch.linalg.solve(gram, x.T @ (y / spread)).T
    return (solution / solution.norm(dim=1, keepdim=True)).float()


def orthogonalised(directions: Tensor) -> Tensor:
    """Each direction without its part in the span of the others, at unit length: d - Q Q^T d.

    Shapes: [A, D] -> [A, D]. Raises ValueError where one lies within the others, so that nothing of it is left.
    """
    found = []
    for i, one in enumerate(directions.double()):
        others = torch.cat([directions[:i], directions[i + 1 :]]).double()
        basis = torch.linalg.svd(others, full_matrices=False)
        span = basis.Vh[basis.S > 1e-6 * basis.S.max()] if len(others) else others
        rest = one - span.T @ (span @ one)
        if float(rest.norm()) < 1e-4 * float(one.norm()):
            raise ValueError(f"direction {i} lies within the span of the {len(others)} others; orthogonalise fewer")
        found.append(rest / rest.norm())
    return torch.stack(found).float()


def effects(score: Callable[[Tensor], Tensor], w: Tensor, directions: Tensor, step: float) -> Tensor:
    """By how much every score changes, on average, when w moves by +-``step`` / 2 along each direction, in units of the
    scores' deviation over ``w``: the entanglement table. Shapes: w [N, D], directions [A, D], score [N, D] -> [N, S];
    returns [A, S]."""
    spread = score(w).std(0).clamp_min(1e-9)
    return torch.stack([(score(w + step / 2 * one) - score(w - step / 2 * one)).mean(0) / spread
                        for one in directions])


def entanglement(table: Tensor) -> Tensor:
    """How much other scores move for each unit of one's own: mean |others| / |own|. Shapes: [A, A] -> [A]."""
    own = table.diagonal().abs()
    others = (table.abs().sum(1) - own) / max(1, len(table) - 1)
    return others / own.clamp_min(1e-9)


def save_directions(found: StyleDirections, folder: str | Path, facts: dict[str, object]) -> None:
    """Write them beside the generator they are of."""
    config = {"names": list(found.names), "generator": component_hash(folder, OF), **facts}
    save_component(folder, COMPONENT, {"plain": found.plain, "orthogonal": found.orthogonal}, config, half=False)


def load_directions(folder: str | Path) -> StyleDirections:
    """Those of a model folder. Raises ModelFolderError where there are none, or they are of another generator."""
    config, state = load_component(folder, COMPONENT)
    if config["generator"] != component_hash(folder, OF):
        raise ModelFolderError(f"the directions in {folder} are of another style generator; fit them again with "
                               "`python stylegan.py --directions`")
    return StyleDirections(tuple(config["names"]), state["plain"], state["orthogonal"])


def chosen(names: Sequence[str], scores: Tensor, wanted: Sequence[str]) -> Tensor:
    """The columns of ``scores`` [N, A], named ``names``, that ``wanted`` names."""
    if unknown := set(wanted) - set(names):
        raise ValueError(f"there is no attribute {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    return scores[:, [list(names).index(name) for name in wanted]]
