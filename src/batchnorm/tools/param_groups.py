"""param_groups(): an optimizer's parameter groups, with gamma, beta, biases and other scales spared weight decay."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

_NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module, weight_decay: float, *, spared: tuple[type[nn.Module], ...] = ()
) -> list[dict[str, Any]]:
    """Two parameter groups for an optimizer: what decays, and what does not.

    Decay pulls a weight toward 0. The scale of a weight before batch normalization does not matter to its output, so
    there decay only sets the effective learning rate; gamma and beta are the scale and shift of that output, and decay
    makes a layer's output fade. Spared are:

    - every parameter of a normalization: batch, instance, layer, group, RMS, and subclasses of these;
    - every bias: "bias" is a word of its name (bias, bias_ih_l0, in_proj_bias);
    - every parameter of one dimension or none, whatever it belongs to: LayerScale's gamma, lambda_1, a temperature, the
      scale of a normalization of one's own (not in FullyShardedDataParallel, which shows all of them flattened);
    - every parameter of a module of the classes in `spared`, and of that module's children.

    All parameters of the model are in the groups, each once, in the order of `model.parameters()`; a shared one is
    spared if any of its places is. Those with requires_grad=False are kept: without a gradient optimizers pass them by,
    and one that is unfrozen later is trained without another optimizer.

    Args:
        model: any module.
        weight_decay: of everything else; not negative.
        spared: classes of other modules that shall not decay, such as nn.Embedding.

    Returns:
        Two groups, either of which may be empty: with `weight_decay` as given, and with 0.

    Raises:
        ValueError: weight_decay is negative.
        TypeError: `model` is no module, but its parameters, say: they do not tell what they belong to.

    Source: He et al. 2019, "Bag of tricks for image classification with convolutional neural networks": no bias decay.
        timm's param_groups_weight_decay: none of what has one dimension.

    Example:
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
        >>> optimizer = torch.optim.SGD(param_groups(model, 1e-4), lr=0.1, momentum=0.9)
        >>> [(len(group["params"]), group["weight_decay"]) for group in optimizer.param_groups]
        [(2, 0.0001), (4, 0.0)]
    """
    if not weight_decay >= 0.0:
        raise ValueError(f"Invalid weight_decay value: {weight_decay}; expected a number that is not negative")
    if not isinstance(model, nn.Module):
        raise TypeError(f"expected a torch.nn.Module, not its parameters or groups of them; got {type(model).__name__}")
    flattened = any(type(module).__name__ == "FullyShardedDataParallel" for module in model.modules())
    exempt = set() if flattened else {p for p in model.parameters() if not is_lazy(p) and p.dim() <= 1}
    for module in model.modules():
        recurse = isinstance(module, (*_NORMALIZATIONS, *spared))
        for name, parameter in module.named_parameters(recurse=recurse):
            if recurse or "bias" in name.split("_"):
                exempt.add(parameter)
    decay, no_decay = [], []
    for parameter in model.parameters():
        (no_decay if parameter in exempt else decay).append(parameter)
    return [{"params": decay, "weight_decay": weight_decay}, {"params": no_decay, "weight_decay": 0.0}]
