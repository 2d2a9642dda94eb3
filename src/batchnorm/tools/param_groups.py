"""param_groups(): an optimizer's parameter groups, without weight decay on gamma, beta, biases and other scales."""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

_NORMALIZATIONS = (nn.modules.batchnorm._NormBase, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


def param_groups(
    model: nn.Module, weight_decay: float, *, spared: tuple[type[nn.Module], ...] = ()
) -> list[dict[str, Any]]:
    """Return two parameter groups for an optimizer: parameters that decay, and parameters that do not.

    Decay pulls a weight toward 0. The scale of a weight before batch normalization does not affect its output, so decay
    of that weight only sets the effective learning rate. Gamma and beta are the scale and shift of that output, and
    their decay makes it fade. Not decayed are:

    - every parameter of a normalization: batch, instance, layer, group, RMS, and subclasses of these;
    - every bias: "bias" is a word in its name (bias, bias_ih_l0, in_proj_bias);
    - every parameter with one dimension or none, in any module: LayerScale's gamma, lambda_1, a temperature, the scale
      of a custom normalization (not in FullyShardedDataParallel, which flattens all parameters);
    - every parameter of a module whose class is in `spared`, and of its children.

    All parameters of the model are in the groups, each once, in the order of `model.parameters()`; a shared one does
    not decay if this holds at any of its places. Parameters with requires_grad=False are included: optimizers skip them
    while they have no gradient, and train them once they are unfrozen.

    Args:
        model: any module.
        weight_decay: for everything else; not negative.
        spared: classes of further modules that must not decay, such as nn.Embedding.

    Returns:
        Two groups, either of which may be empty: with `weight_decay` as given, and with 0.

    Raises:
        ValueError: weight_decay is negative.
        TypeError: `model` is not a module. Parameters alone do not show which module they belong to.

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
