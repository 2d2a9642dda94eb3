"""The arms of the experiment: what becomes of gamma and beta. Learned, fixed, one pair a batch, or no batch norm."""

from __future__ import annotations

import torch
from torch import Tensor, nn

ARMS = {
    "learned": "standard batch norm: one learned gamma and beta per channel, shared by all batches",
    "fixed": "batch norm with gamma = 1 and beta = 0, never learned",
    "per-batch": "every batch owns a gamma and beta, learned when its turn comes and remembered between epochs",
    "none": "no batch norm",
}
BATCH_NORM = nn.modules.batchnorm._BatchNorm


class PairPerBatch(nn.Module):
    """A gamma and a beta of its own for each of a number of fixed batches, in every batch-norm layer of a model.

    Each pair is two `nn.Parameter`s, so an optimizer, momentum included, moves the pair that was used in a step and
    leaves the others alone. `select` makes a layer's `weight` and `bias` *be* a batch's pair: the model, its layers and
    whoever watches them need not know.

    Args:
        model: its batch-norm layers' own gamma and beta are replaced: every pair starts as they are.
        batches: how many batches there are.

    Example:
        >>> model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
        >>> pairs = PairPerBatch(model, batches=4)
        >>> pairs.select(2)
        >>> model[1].weight is pairs.gamma[0][2]
        True
    """

    def __init__(self, model: nn.Module, batches: int) -> None:
        super().__init__()
        # A tuple, so that the layers do not become submodules: the pairs are kept here, the rest in the model.
        self._layers = tuple(m for m in model.modules() if isinstance(m, BATCH_NORM))
        self.gamma = nn.ModuleList(_copies(layer.weight, batches) for layer in self._layers)
        self.beta = nn.ModuleList(_copies(layer.bias, batches) for layer in self._layers)
        self.batches = batches

    def select(self, batch: int) -> None:
        """Use the pair of that batch."""
        for layer, gamma, beta in zip(self._layers, self.gamma, self.beta, strict=True):
            layer.weight, layer.bias = gamma[batch], beta[batch]  # pyright: ignore[reportIndexIssue]

    def select_average(self) -> None:
        """Use the mean of all pairs: the fairest guess for a sample that belongs to no batch."""
        for layer, gamma, beta in zip(self._layers, self.gamma, self.beta, strict=True):
            layer.weight, layer.bias = (nn.Parameter(_stack(v).mean(0), requires_grad=False) for v in (gamma, beta))

    def spread(self) -> dict[str, float]:
        """How unlike the pairs are: the standard deviation over batches, averaged over channels and layers."""
        gamma, beta = (torch.cat([_stack(v).std(0, correction=0) for v in side]) for side in (self.gamma, self.beta))
        return {"gamma_std": gamma.mean().item(), "beta_std": beta.mean().item()}


def _copies(parameter: Tensor, count: int) -> nn.ParameterList:
    return nn.ParameterList(nn.Parameter(parameter.detach().clone()) for _ in range(count))


def _stack(vectors: nn.Module) -> Tensor:
    """(batches, C), outside of autograd."""
    return torch.stack([v.detach() for v in vectors.parameters()])


def fix_affine(model: nn.Module) -> None:
    """Keep gamma and beta of every batch-norm layer as they are, at 1 and 0, whatever is learned elsewhere."""
    for module in model.modules():
        if isinstance(module, BATCH_NORM):
            module.weight.requires_grad_(False)
            module.bias.requires_grad_(False)


def freeze_all_else(model: nn.Module) -> None:
    """Keep everything but gamma and beta of the batch-norm layers as it is."""
    own = {id(p) for module in model.modules() if isinstance(module, BATCH_NORM) for p in module.parameters(False)}
    for parameter in model.parameters():
        if id(parameter) not in own:
            parameter.requires_grad_(False)
