"""timm's SAM image encoder, for comparison: importing timm needs torchvision, of which its encoder uses nothing."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from torch import nn

from tests.sam_modeling import randomise


class _Names(type):
    """Classes that have every attribute: its own name."""

    def __getattr__(cls, name: str) -> str:
        return name


class _Module(ModuleType):
    """A module that has every class."""

    __path__: list[str] = []  # noqa: RUF012

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _Names(name, (), {})


class _Torchvision(MetaPathFinder, Loader):
    """Finds torchvision and all below it, empty."""

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> ModuleSpec | None:
        is_wanted = fullname.partition(".")[0] == "torchvision"
        return ModuleSpec(fullname, self, is_package=True) if is_wanted else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return _Module(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def torchvision_to_import() -> Iterator[None]:
    """Lets `import torchvision` succeed where it is not installed; others see nothing of it afterwards."""
    if importlib.util.find_spec("torchvision"):
        yield
        return
    finder = _Torchvision()
    sys.meta_path.append(finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]


def timm_image_encoder(**sizes: Any) -> nn.Module:
    """timm's `VisionTransformerSAM` with SAM's options, these sizes and random weights; ImportError without timm."""
    with torchvision_to_import():
        from timm.models.vision_transformer_sam import VisionTransformerSAM
    model = VisionTransformerSAM(**sizes, use_rel_pos=True, num_classes=0, global_pool="")
    return randomise(model)
