"""Say what you want segmented in a video; get its masks, frame by frame, online."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"

_LAZY = {
    "EVFSAM": "refsam.model",
    "RefSAM": "refsam.model",
    "load_model": "refsam.model",
    "RefSAMConfig": "refsam.config",
    "VideoSession": "refsam.session",
    "FrameResult": "refsam.session",
    "segment_video": "refsam.session",
    "segment_videos": "refsam.session",
}

__all__ = [
    "EVFSAM",
    "FrameResult",
    "RefSAM",
    "RefSAMConfig",
    "VideoSession",
    "__version__",
    "load_model",
    "segment_video",
    "segment_videos",
]


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import refsam` itself costs nothing."""
    if name not in _LAZY:
        raise AttributeError(f"module 'refsam' has no attribute {name!r}")
    import_module("refsam.runtime.threads").wait_passively()  # before torch is imported
    value = getattr(import_module(_LAZY[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
