"""From which network does a run learn, when what it makes takes that network's place?

The run keeps a copy of its teacher, and knows what it released itself. It does not know networks.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from core.nn.checkpoint import ModelFolderError, component_hash, load_component, read_index, save_component
from core.training.run_folder import CheckpointMismatch


def keep_teacher(run: Path, model: Path, component: str, main: bool) -> tuple[dict[str, Any], dict[str, Tensor], str]:
    """Configuration and weights of the component that a run learns from, and the hash they had in the model folder.

    The run keeps a copy, so that it still learns from the same when what it made has been released in the same place
    (which then says so: ``distilled``). Where another has come there, its hash is another setting of the run.
    """
    config, state = load_component(model, component)
    source, kept = component_hash(model, component), run / "teacher"
    try:
        first = str(read_index(kept)["components"][component]["source"])
        copy = load_component(kept, component)
    except (ModelFolderError, KeyError, ValueError) as error:  # there is none yet, or it is damaged
        first, copy = "", None
        recorded = _recorded_teacher(run)
        if kept.exists() and recorded not in (None, source):
            raise CheckpointMismatch(
                f"{kept} is damaged ({error}), and {model} holds another {component} than the one that taught this "
                "run; put that one back into the model folder, or name another --run") from error
    if copy is not None and config.get("distilled", {}).get("teacher") == first:
        return *copy, first
    if main and (copy is None or (first != source and not any((run / "checkpoints").glob("step-*")))):
        if copy is None:  # what is left of a damaged one would be read by what writes the new one
            shutil.rmtree(kept, ignore_errors=True)
        save_component(kept, component, state, config, extra={"source": source})
    return config, state, source


def _recorded_teacher(run: Path) -> Any:
    try:
        return json.loads((run / "config.json").read_text(encoding="utf-8")).get("teacher")
    except (OSError, ValueError, AttributeError):
        return None
