"""The page's visitors: each one's clip, files and job."""

import secrets
import shutil
import threading
from dataclasses import dataclass
from pathlib import Path

from refsam.errors import UserError
from refsam.ui.jobs import Engine, Job
from refsam.ui.sample import CLIP
from refsam.ui.uploads import Limits, open_upload, read_expressions


@dataclass
class Visitor:
    """One open page.

    Attributes:
        folder: of the visitor's results; its name cannot be guessed.
        clip: the one chosen last; None before that, or if it cannot be used.
        job: the one started last.
    """

    folder: Path
    clip: Path | None = None
    job: Job | None = None


class Visitors:
    """All open pages, the folder with all their files, and the model once it is loaded.

    Args:
        folder: for uploads, results and previews.
        limits: on uploads.
    """

    def __init__(self, folder: Path, limits: Limits) -> None:
        self.folder = folder
        self.limits = limits
        self._visitors: dict[str, Visitor] = {}
        self._engine: Engine | None = None
        self._loaded = threading.Event()
        self._turn = threading.Lock()
        self._sample = threading.Lock()

    def set_engine(self, engine: Engine) -> None:
        """Set the model; visitors may be waiting for it."""
        self._engine = engine
        self._loaded.set()

    def wait_for_engine(self) -> Engine:
        """The model; waits until it is loaded. Raises UserError: the server is closing."""
        self._loaded.wait()
        if self._engine is None:
            raise UserError("the server is closing")
        return self._engine

    @property
    def ready(self) -> bool:
        """Whether the model is loaded."""
        return self._loaded.is_set()

    def of(self, key: str | None) -> Visitor:
        """The visitor of that session; a new session gets a new one."""
        name = key or ""
        if name not in self._visitors:
            self._visitors[name] = Visitor(self.folder / f"visitor-{secrets.token_urlsafe(16)}")
        return self._visitors[name]

    def begin(self, key: str | None, text: str) -> Job:
        """Start a job on the visitor's clip; it replaces an earlier one.

        Raises UserError: no clip was chosen, it cannot be used, or the expressions cannot.
        """
        visitor = self.of(key)
        expressions = read_expressions(text, self.limits)
        if visitor.clip is None:
            raise UserError("Choose a clip first: upload one, record one, or take the sample")
        open_upload(visitor.clip, self.folder, self.limits).close()
        if visitor.job is not None:
            visitor.job.discard()
        folder = visitor.folder / secrets.token_hex(4)
        engine = self.wait_for_engine()
        job = Job(engine, self._turn, visitor.clip, self.folder, folder, expressions, self.limits)
        visitor.job = job
        job.start()
        return job

    def sample(self) -> Path:
        """A copy of the sample clip inside the folder, made once."""
        clip = self.folder / "sample" / CLIP.name
        with self._sample:
            if not clip.exists():
                clip.parent.mkdir(exist_ok=True)
                shutil.copyfile(CLIP, clip)
        return clip

    def leave(self, key: str | None) -> None:
        """Forget a visitor who has closed the page, with all files."""
        visitor = self._visitors.pop(key or "", None)
        if visitor is None:
            return
        if visitor.job is not None:
            visitor.job.discard()
        shutil.rmtree(visitor.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove all visitors, and end every wait for the model."""
        self._engine = None
        self._loaded.set()
        for key in list(self._visitors):
            self.leave(key)
