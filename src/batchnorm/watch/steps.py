"""Hooks on the model and on optimizers that tell when a step's forward and gradients are ready, and when it ends."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Protocol

from torch import nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook
from torch.utils.hooks import RemovableHandle

from .hooks import Hook

Closure = Callable[[], Any]


class Listener(Protocol):
    """Who wants to know of the steps."""

    def ran(self) -> bool:
        """Whether a watched layer ran in train mode since the step began."""
        ...

    def may_have_run(self) -> bool:
        """The same; True where there is no such layer to tell."""
        ...

    def is_listening(self) -> bool:
        """Whether a forward is one of the training's."""
        ...

    def take(self, optimizer: Optimizer | None) -> None:
        """The step's forward is there, and, with an optimizer, the gradients as it is about to use them."""
        ...

    def add_gradients(self, optimizer: Optimizer | None) -> None:
        """The gradients of the step that was taken without are there."""
        ...

    def moved(self, optimizer: Optimizer) -> None:
        """The optimizer has taken its step, whose gradients were there."""
        ...

    def end(self, evaluations: int) -> None:
        """The step is over, after so many forwards and backwards of its closure, or 0."""
        ...


class Steps:
    """Hears of the training's steps, and tells the listener.

    With an optimizer, a step is one of its `step()`. Without, a step ends when any optimizer that holds a parameter of
    the model steps, or when model(x) is called the next time. What runs in a closure belongs to the step whose it is.

    Args:
        model: as it is called.
        optimizer: whose steps are counted; None for any.
        listener: whom to tell.
        hears_calls: hear of model(x) even where steps are counted without it, to know when one is under way.
    """

    def __init__(
        self, model: nn.Module, optimizer: Optimizer | None, listener: Listener, hears_calls: bool = True
    ) -> None:
        self._listener = listener
        self._given = optimizer is not None
        self._own = set(model.parameters())
        self._called = False  # model(x), since the step began
        self._taken = False  # the step's forward is over, and what it measured is with the listener
        self._lacks_gradients = False
        self._evaluations = 0  # of a closure
        self._in_closure = False
        self._handles: list[RemovableHandle] = []
        if hears_calls or optimizer is None:
            self._handles.append(model.register_forward_pre_hook(Hook(self._on_forward)))
        if optimizer is not None:
            self._handles.append(optimizer.register_step_pre_hook(self._before_step))
            self._handles.append(optimizer.register_step_post_hook(self._after_step))
        else:
            self._handles.append(model.register_forward_hook(Hook(self._on_forwarded)))
            self._handles.append(register_optimizer_step_pre_hook(self._before_step))
            self._handles.append(register_optimizer_step_post_hook(self._after_step))

    @property
    def is_under_way(self) -> bool:
        """Whether a forward of the step to come has begun."""
        return self._called or self._listener.ran()

    @property
    def is_past(self) -> bool:
        """Whether the step under way is over but for its gradients, which nobody may come to read."""
        return self._taken and not self._given

    @property
    def why_none(self) -> str:
        """Why there was no step, for a warning."""
        if self._given:
            return "the optimizer took no step"
        return (
            "no torch.optim optimizer that holds parameters of the model stepped, nor was model(x) called in train "
            "mode. Watch the model that is trained, and pass optimizer="
        )

    def close(self) -> None:
        """Take the hooks out, and end a step that is past."""
        for handle in self._handles:
            handle.remove()
        if self.is_past:
            self._end()

    def _on_forward(self, model: nn.Module, args: Any) -> None:
        if model.training and self._listener.is_listening():
            if self.is_past and not self._in_closure:
                self._end()
            self._called = True

    def _on_forwarded(self, model: nn.Module, args: Any, output: Any) -> None:
        if model.training and self._listener.is_listening() and not self._in_closure:
            self._take(None)

    def _before_step(
        self, optimizer: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        if not self._counts(optimizer):
            return None
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if callable(closure):  # an optimizer of somebody else's may take something else
            if self.is_past:  # what was computed before is no part of this step
                self._end()
            evaluate = self._observed(closure, optimizer)
            if len(args) > 1:
                return (args[0], evaluate, *args[2:]), kwargs
            return args, {**kwargs, "closure": evaluate}
        if self.is_past:
            self._add_gradients(optimizer)
        elif self._given or self._listener.may_have_run():
            self._take(optimizer)
        return None

    def _after_step(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if self._counts(optimizer):
            self._in_closure = False
            if self._given or self._taken:
                self._listener.moved(optimizer)
                self._end()

    def _observed(self, closure: Closure, optimizer: Optimizer) -> Closure:
        """The closure, whose first evaluation is the step: parameters have not moved yet, and gradients are there."""
        self._in_closure, self._taken, self._evaluations = True, False, 0

        def evaluate() -> Any:
            try:
                loss = closure()
            except BaseException:
                self._in_closure = False  # step() raises, and nobody hears of its end
                raise
            if not self._evaluations and (self._given or self._listener.may_have_run()):
                self._take(optimizer)
            self._evaluations += 1
            return loss

        return evaluate

    def _take(self, optimizer: Optimizer | None) -> None:
        self._taken, self._lacks_gradients = True, optimizer is None
        self._listener.take(optimizer)

    def _add_gradients(self, optimizer: Optimizer | None) -> None:
        if self._lacks_gradients:
            self._lacks_gradients = False
            self._listener.add_gradients(optimizer)

    def _end(self) -> None:
        if self._taken:
            self._add_gradients(None)
        evaluations, self._evaluations = self._evaluations, 0
        self._taken = self._called = False
        self._listener.end(evaluations)

    def _counts(self, optimizer: Optimizer) -> bool:
        return self._given or holds(optimizer, self._own)


def holds(optimizer: Optimizer, parameters: Iterable[nn.Parameter]) -> bool:
    """Whether it moves any of the parameters."""
    own = parameters if isinstance(parameters, set) else set(parameters)
    return any(parameter in own for group in optimizer.param_groups for parameter in group["params"])


def innermost(optimizer: Any) -> Any:
    """The optimizer inside the wrappers of accelerate, Lightning and the like, which have it as `optimizer`."""
    while "_optimizer_step_pre_hooks" not in getattr(optimizer, "__dict__", {}) and hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    return optimizer
