"""Stage `soup`: one dense model with the mean of the experts' weights, at the cost of one of them.

The baseline for a graft whose routers choose between experts that lie close together (model soups, arXiv:2203.05482).
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from clipgraft.checkpoint import load_model, save_model
from clipgraft.config import ConfigError
from clipgraft.models.averages import mean_of_states

log = logging.getLogger(__name__)


def soup(experts: list[Path], out: Path) -> dict[str, Any]:
    """Write the mean of some models.

    Args:
        experts: model folders, expert 0 (the base) first; dense, of one architecture.
        out: folder for the model.
    Returns:
        Facts for the manifest.
    Raises:
        ConfigError: if there is none, or they are not of one architecture.
    """
    if not experts:
        raise ConfigError("soup needs experts. Hint: --input expert_0=MANIFEST")
    base = load_model(experts[0])
    states = ((str(folder), load_model(folder).model.state_dict()) for folder in experts[1:])
    base.model.load_state_dict(mean_of_states(base.model.state_dict(), states))
    save_model(out, base.model, base.spec, base.tokenizer)
    log.info("mean of %d models", len(experts))
    return {
        "parameters": sum(p.numel() for p in base.model.parameters()),
        "num_experts": len(experts),
    }
