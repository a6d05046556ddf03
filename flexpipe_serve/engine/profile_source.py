"""Where the planner gets the model's profile from: the cache, or a measurement in the background."""

from __future__ import annotations

import logging
import threading
from concurrent.futures import Future
from pathlib import Path

from flexpipe_serve.errors import ConfigError, EngineUnavailableError
from flexpipe_serve.model.profile_cache import load_profile, start_profiling
from flexpipe_serve.planner.profile import ModelProfile

logger = logging.getLogger(__name__)


class ProfileSource:
    """The profile of one model on one kind of device; measured the first time that somebody asks and there is none.

    Args: as of load_profile.
    """

    def __init__(self, path: Path, *, dtype: str, device: str, num_threads: int) -> None:
        self._path = path
        self._dtype = dtype
        self._device = device
        self._num_threads = num_threads
        self._lock = threading.Lock()
        self._measured: Future[ModelProfile] | None = None
        self._profile: ModelProfile | None = None

    def get(self) -> ModelProfile:
        """The profile.

        Raises:
            EngineUnavailableError: it is being measured, or that failed; with the reason.
        """
        with self._lock:
            if self._profile is None:
                self._profile = self._find()
            return self._profile

    def _find(self) -> ModelProfile:
        if self._measured is None:
            found = load_profile(self._path, dtype=self._dtype, device=self._device, num_threads=self._num_threads)
            if found is not None:
                return found
            logger.info("measuring a profile of %s in the background", self._path.name)
            self._measured = start_profiling(
                self._path, dtype=self._dtype, device=self._device, num_threads=self._num_threads
            )
        if not self._measured.done():
            raise EngineUnavailableError(
                "There is no profile of this model on this device yet; it is being measured in the background (about a"
                " minute, longer under load). `flexpipe profile` measures one beforehand."
            )
        measured, self._measured = self._measured, None  # a failure is told once, then it is tried again
        try:
            return measured.result()
        except ConfigError as error:
            raise EngineUnavailableError(f"The profile could not be measured: {error}") from error
