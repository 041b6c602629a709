"""Methods of single modules replaced in place, after checks that they are the methods that one knows."""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from refsam_kernels.packed_linear import PackedCopy, is_plain_linear, is_unhooked
from refsam_kernels.rel_pos_attention.op import rel_pos_attention

# Tokens that an MLP computes at a time on a CPU, so that intermediate results stay in the cache.
ROWS = 1024
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
            substitute = partial(item.function, item.module)
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


def encoder_of(model: Any, attribute: str, class_name: str) -> tuple[str, Any]:
    """The image encoder, the model itself or this attribute of it, after the path to it.

    Raises `ValueError` where it is of another class, and of no sub-class of it.
    """
    path = "model"
    if not _is_a(model, class_name):
        path, model = f"model.{attribute}", getattr(model, attribute, None)
    if not _is_a(model, class_name):
        refuse([f"{path}: got a {type(model).__name__}, wanted {class_name}"])
    return path, model


def _is_a(instance: object, class_name: str) -> bool:
    return class_name in (parent.__name__ for parent in type(instance).__mro__)


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
    found = {name for name, _ in module.named_children()} | {
        name for name, _ in module.named_parameters(recurse=False)
    }
    if found != members:
        yield f"{path}: got members {sorted(found)}, wanted {sorted(members)}"


def attention_reasons(path: str, attention: Any, class_names: set[str]) -> Iterator[str]:
    """Why `Attend` cannot stand for the attention of a SAM image encoder."""
    if not getattr(attention, "use_rel_pos", True):
        yield f"{path}.use_rel_pos: got False, wanted True"
        return
    reasons = list(
        structure_reasons(path, attention, class_names, {"qkv", "proj", "rel_pos_h", "rel_pos_w"})
    )
    yield from reasons or qkv_reasons(path, attention)


def qkv_reasons(path: str, attention: Any) -> Iterator[str]:
    """Padding tokens have qkv(0), which is the bias of a plain linear layer only."""
    if type(attention.qkv) is not nn.Linear:
        kind = type(attention.qkv)
        yield f"{path}.qkv: got {kind.__module__}.{kind.__name__}, wanted torch.nn.Linear"


class Attend:
    """SAM's attention on a grid of tokens, in the place of an attention module; no windows are copied.

    `window_size` 0 attends globally. `qkv` and `proj` are called as modules, unless packed copies may
    stand for them. Follows segment-anything `modeling/image_encoder.py`, `Block` and `Attention`.
    """

    def __init__(self, *, num_heads: int, window_size: int) -> None:
        self.num_heads, self.window_size = num_heads, window_size
        self.qkv, self.proj = PackedCopy(), PackedCopy()

    def __call__(self, attention: Any, tokens: Tensor) -> Tensor:
        """Tokens (B, h, w, D) float to the same shape."""
        height, width = tokens.shape[1:3]
        pads_itself = is_plain_linear(attention.qkv)
        if not pads_itself:
            tokens = self._padded(tokens)
        attended = rel_pos_attention(
            _linear(self.qkv, attention.qkv, tokens),
            attention.rel_pos_h,
            attention.rel_pos_w,
            num_heads=self.num_heads,
            window_size=self.window_size,
            qkv_bias=attention.qkv.bias if self.window_size and pads_itself else None,
        )
        return _linear(self.proj, attention.proj, attended[:, :height, :width])

    def _padded(self, tokens: Tensor) -> Tensor:
        """With the zeros that fill the last windows: a wrapped layer makes of them more than its bias."""
        if not self.window_size:
            return tokens
        bottom, right = (-side % self.window_size for side in tokens.shape[1:3])
        return nn.functional.pad(tokens, (0, 0, 0, right, 0, bottom))


def _linear(copy: PackedCopy, module: Any, x: Tensor) -> Tensor:
    return copy(module, x) if copy.is_supported(module, x) else module(x)


class Perceptron:
    """SAM's `lin2(gelu(lin1(x)))`, in the place of an MLP module.

    The modules are called as they are, unless packed copies may stand for all three.
    """

    def __init__(self) -> None:
        self.lin1, self.lin2 = PackedCopy(gelu=True), PackedCopy()

    def __call__(self, mlp: Any, x: Tensor) -> Tensor:
        """(..., D) float to the same shape."""
        served = self.lin1.is_supported(mlp.lin1, x) and self.lin2.is_supported(mlp.lin2, x)
        if not (served and is_unhooked(mlp.act)):
            return mlp.lin2(mlp.act(mlp.lin1(x)))
        rows = x.flatten(0, -2)
        result = torch.empty_like(rows)
        for part, target in zip(rows.split(ROWS), result.split(ROWS), strict=True):
            target.copy_(self.lin2(mlp.lin2, self.lin1(mlp.lin1, part)))
        return result.view(x.shape)


def perceptron_replacement(path: str, mlp: Any) -> Iterator[Replacement]:
    """The replacement of an MLP; none for one that is another inside, which goes on as it is."""
    members = {name for name, _ in mlp.named_children()} | set(mlp._parameters)
    if members == {"lin1", "act", "lin2"} and _is_exact_gelu(mlp.act):
        yield Replacement(path, mlp, Perceptron())


def _is_exact_gelu(activation: Any) -> bool:
    if type(activation) is nn.GELU:
        return activation.approximate == "none"
    # transformers' own module, which holds the function that it calls.
    is_theirs = type(activation).__name__ == "GELUActivation"
    return is_theirs and getattr(activation, "act", None) is nn.functional.gelu
