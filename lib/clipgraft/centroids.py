"""Routers that know the data before they are trained: clusters of what comes into each MLP of the base.

The inputs of an MLP are grouped by spherical k-means into as many clusters as there are experts, and the rows of the
router are the unit centroids times one factor: a token goes to the experts whose clusters it lies nearest to
(Cluster-aware Upcycling, arXiv:2604.13508). Experts are not made from the clusters here, so which cluster goes to which
expert is arbitrary; the largest goes to expert 0, the base. And the mean of the rows is taken off them: no softmax sees
it, but tokens have much in common, and the z-loss would first of all fight that.
"""

# Shapes: T tokens, E experts, D width

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable

import faiss
import torch
from torch import Tensor

from clipgraft.checkpoint import Loaded
from clipgraft.data.loader import Loader
from clipgraft.data.sampler import UniformBatches
from clipgraft.evaluation.encode import true_float32
from clipgraft.models.build import normalize
from clipgraft.models.moe import MoeMlp, router_parameters, upcycle
from clipgraft.settings import AssembleJob
from clipgraft.training_data import Data

log = logging.getLogger(__name__)

BATCH = 256
TOKENS_PER_SAMPLE = 4  # drawn from each batch, and at each layer: neighbours are alike
NUM_ITERATIONS, NUM_TRIES = 25, 3


def centroid_routers(
    settings: AssembleJob, base: Loaded, data: Data, *, threads: int = 1
) -> dict[str, Tensor]:
    """Rows of the routers [E, D], by the name that the router will have.

    Args:
        settings: layers, number of experts, samples and scale, seed.
        base: the dense model.
        data: training samples; as many as asked for, or all, but for what does not fill batches of one size.
        threads: for decoding.
    """
    # A mixture of one expert is the dense model, and its layers know which tokens are padding.
    model = copy.deepcopy(base.model)
    upcycle(
        model,
        [base.model.state_dict()],
        top_k=1,
        image_layers=settings.image_layers,
        text_layers=settings.text_layers,
        generator=torch.Generator().manual_seed(settings.seed),
    )
    inputs: dict[str, list[Tensor]] = {name: [] for name in router_parameters(model)}
    generator = torch.Generator().manual_seed(settings.seed)
    for name, module in model.named_modules():
        if isinstance(module, MoeMlp):
            module.register_forward_pre_hook(_keep_some(inputs[f"{name}.router"], generator))
    num_samples = _encode(settings, model, base, data, threads)
    log.info("routers are the centroids of the tokens of %s samples", f"{num_samples:,}")
    return {
        name: routers_of(
            torch.cat(parts).float(), settings.num_experts, settings.router_scale, settings.seed
        )
        for name, parts in inputs.items()
    }


def routers_of(x_TD: Tensor, num_experts: int, scale: float, seed: int) -> Tensor:
    """Unit centroids of a layer's inputs, largest cluster first, less their mean and times one factor.

    Args:
        x_TD: float32.
        num_experts: clusters.
        scale: root mean square of the logits, whose mean is 0 for every token.
        seed: of k-means.
    """
    kmeans = faiss.Kmeans(
        x_TD.shape[1],
        num_experts,
        niter=NUM_ITERATIONS,
        nredo=NUM_TRIES,
        seed=seed + 1,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(x_TD),
    )
    unit_TD = torch.nn.functional.normalize(x_TD, dim=1)
    kmeans.train(unit_TD.numpy())
    centroids_ED = torch.from_numpy(kmeans.centroids)
    sizes_E = (unit_TD @ centroids_ED.T).argmax(1).bincount(minlength=num_experts)
    rows_ED = centroids_ED[sizes_E.argsort(descending=True, stable=True)]
    rows_ED = rows_ED - rows_ED.mean(0)
    return rows_ED * (scale / (x_TD @ rows_ED.T).square().mean().sqrt())


def _keep_some(kept: list[Tensor], generator: torch.Generator) -> Callable[..., None]:
    """A hook that keeps some of the real tokens of each batch, in float16."""

    def hook(layer: MoeMlp, arguments: tuple[Tensor, ...]) -> None:
        x_BLD, real_BL = arguments[0], layer.state.real_BL
        x_TD = x_BLD.flatten(0, 1) if real_BL is None else x_BLD[real_BL]
        drawn = torch.randperm(len(x_TD), generator=generator)[: TOKENS_PER_SAMPLE * len(x_BLD)]
        kept.append(x_TD[drawn.to(x_TD.device)].half().cpu())

    return hook


@torch.no_grad()
def _encode(
    settings: AssembleJob, model: torch.nn.Module, base: Loaded, data: Data, threads: int
) -> int:
    """Send random samples through the model, never augmented; returns how many."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    vision, text = base.spec["config"]["vision_cfg"], base.spec["config"]["text_cfg"]
    num_samples = min(settings.router_samples, len(data.shards))
    num_steps = math.ceil(num_samples / BATCH)
    batch_size = num_samples // num_steps
    loader = Loader(
        data.shards,
        data.tokens,
        UniformBatches(len(data.shards), batch_size, settings.seed),
        image_size=vision["image_size"],
        text_length=text["context_length"],
        crop_scale=(1.0, 1.0),
        seed=settings.seed,
        num_threads=threads,
        num_steps=num_steps,
    )
    about = base.spec["preprocess"]
    model.to(device).eval()
    with true_float32():
        for batch in loader:
            images_BCHW = normalize(batch.images_BCHW.to(device), about["mean"], about["std"])
            model(images_BCHW, batch.text_BL.to(device))
    return num_steps * batch_size
