"""Methods of single modules replaced in place, after checks that they are the methods that one knows."""

import inspect
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

from torch import nn

from refsam_kernels.core.transforms import is_transformed

# The method that nn.DataParallel copies a module with.
_REPLICATE = "_replicate_for_data_parallel"


@dataclass(frozen=True)
class Replacement:
    """A function for a method of one module; it takes the module, then the method's arguments.

    `path` says in errors where the module stands in the model. `parameters` are what the class's method
    must take, if given: another version of the library, which takes others, may compute something else.
    """

    path: str
    module: Any
    function: Callable[..., Any]
    method: str = "forward"
    parameters: tuple[str, ...] | None = None

    def reasons(self) -> Iterator[str]:
        """Why the method cannot be replaced, in words."""
        names = tuple(inspect.signature(getattr(type(self.module), self.method)).parameters)[1:]
        if self.parameters is not None and names != self.parameters:
            library = type(self.module).__module__.partition(".")[0]
            yield (
                f"{self.path}.{self.method}: got parameters {', '.join(names)}, wanted "
                f"{', '.join(self.parameters)}: this version of {library} is not one that is known here"
            )
        if self.method in vars(self.module):
            yield (
                f"{self.path}.{self.method}: got one that was replaced before (by optimize() or another "
                "library), wanted the class's own"
            )


class Optimization:
    """The changes of `optimize` to a model; `undo()` reverts them. Usable in a `with` statement.

    Raises `ValueError`, and changes nothing, if another library has replaced one of the methods already.
    """

    def __init__(self, replacements: list[Replacement]) -> None:
        refuse([reason for item in replacements for reason in item.reasons()])
        self._applied: list[tuple[Replacement, partial[Any]]] = []
        for item in replacements:
            # A partial, unlike a bound method, survives pickle, and a deep copy of it calls the copied module.
            substitute = partial(_call, item.function, item.method, item.module)
            setattr(item.module, item.method, substitute)
            self._applied.append((item, substitute))
            if isinstance(item.module, nn.Module):
                setattr(item.module, _REPLICATE, partial(_replicate, item.module))

    def __repr__(self) -> str:
        return f"Optimization({len(self._applied)} methods replaced)"

    def undo(self) -> None:
        """Restore the model's own methods; a second call does nothing.

        Raises `ValueError`, and changes nothing, if another library has replaced a method since.
        """
        refuse(
            [
                f"{item.path}.{item.method}: got a method replaced after optimize(), wanted optimize()'s "
                "own: undo the later change first"
                for item, substitute in self._applied
                if vars(item.module).get(item.method) is not substitute
            ]
        )
        for item, _ in self._applied:
            delattr(item.module, item.method)
            vars(item.module).pop(_REPLICATE, None)
        self._applied.clear()

    def __enter__(self) -> "Optimization":
        return self

    def __exit__(self, *_: object) -> None:
        self.undo()


def _call(function: Callable[..., Any], method: str, module: Any, *args: Any, **kwargs: Any) -> Any:
    """The function in the method's place; the class's own method under transforms, for which operators have no rules."""
    if not is_transformed():
        return function(module, *args, **kwargs)
    say_that_own_code_computes()
    return getattr(type(module), method)(module, *args, **kwargs)


@cache
def say_that_own_code_computes() -> None:
    """Warns once that a model computes as before `optimize()`."""
    warnings.warn(
        "torch.func's transforms and forward-mode derivatives: the model's own code computes, as before optimize(); "
        "call torch.autograd.grad or backward() to be faster",
        stacklevel=2,
    )


def _replicate(module: nn.Module) -> nn.Module:
    """DataParallel's copy of a module, whose own methods are those of the copy."""
    replica = type(module)._replicate_for_data_parallel(module)
    for name, value in list(vars(replica).items()):
        if isinstance(value, partial):
            arguments = (replica if each is module else each for each in value.args)
            vars(replica)[name] = partial(value.func, *arguments, **value.keywords)
    return replica


def refuse(reasons: list[str]) -> None:
    """Raises one `ValueError` with all reasons, if there are any; the first few of many alike."""
    if reasons:
        more = f"; and {len(reasons) - 4} more" if len(reasons) > 4 else ""
        raise ValueError("; ".join(reasons[:4]) + more)


def members_of(module: nn.Module) -> set[str]:
    """The names of a module's sub-modules and parameters."""
    parameters = {name for name, _ in module.named_parameters(recurse=False)}
    return parameters | {name for name, _ in module.named_children()}


def loading_reasons(path: str, module: nn.Module) -> Iterator[str]:
    """Why a module cannot compute yet: the first of its weights that was not loaded."""
    for name, parameter in module.named_parameters():
        if parameter.is_meta:
            yield f"{path}.{name}: got weights on the meta device, wanted loaded weights"
            return


def structure_reasons(
    path: str, module: Any, class_names: set[str], members: set[str]
) -> Iterator[str]:
    """Why a module is not of one of these classes with exactly these sub-modules and parameters.

    A module that was extended (an adapter, a gate) computes something else than its class, and must
    not be replaced.
    """
    name = type(module).__name__
    if name not in class_names:
        yield f"{path}: got a {name}, wanted {' or '.join(sorted(class_names))}"
        return
    found = members_of(module)
    if found != members:
        yield f"{path}: got members {sorted(found)}, wanted {sorted(members)}"
