"""A page in the browser: a clip and some expressions in, overlay and masks out (``refsam ui``)."""

from refsam.ui.server import serve
from refsam.ui.uploads import Limits

__all__ = ["Limits", "serve"]
