"""Saving and loading the checkpoints of a run: Detectron2's checkpointer, with better errors.

A run's checkpoint holds the student under the names that stock Detectron2 gives it, the distillers'
own parameters under ``distillers.``, and the trainer's state; never the teacher. What differs from
``DetectionCheckpointer``, each with a test in ``tests/checkpoint/test_checkpointer.py``:

- a file is complete or not there (:mod:`kd_detectron.atomic_files`), and a resumed run whose
  last checkpoint cannot be read continues from the one before it, with a warning;
- weights that are not finite are never written, so that a run can be resumed from its last one;
- ``.pth`` files are read as tensors only (``weights_only``), never as arbitrary Python objects;
  ``.pkl``, the format of Detectron2's model zoo, is read as Detectron2 does;
- what cannot be loaded is one sentence with the config key, the path and the fix;
- a model without distillers ignores the ``distillers.*`` of a distilled run's checkpoint, and a
  distilled model does not ask for them in an ordinary Detectron2 checkpoint;
- torchvision's networks load by name or file (:mod:`kd_detectron.checkpoint.torchvision_weights`).
"""

import logging
import os
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any
from urllib.parse import urlparse

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from fvcore.common.checkpoint import _filter_reused_missing_keys, _IncompatibleKeys
from torch import nn

from kd_detectron.atomic_files import AtomicPathManager, remove_unfinished_files
from kd_detectron.checkpoint.torchvision_weights import (
    TorchvisionHandler,
    convert_torchvision_state,
    is_torchvision_state,
    torchvision_url,
)
from kd_detectron.errors import ConfigError, NonFiniteLossError, did_you_mean
from kd_detectron.finite import non_finite_key

_logger = logging.getLogger(__name__)
_DISTILLERS = "distillers."
# Tensors that normalisation layers fill in by themselves when a file does not have them.
_FILLED_IN = ("running_mean", "running_var", "num_batches_tracked")


class UnreadableCheckpointError(ConfigError):
    """A checkpoint file is missing, truncated, or no checkpoint at all."""


class DistillationCheckpointer(DetectionCheckpointer):
    """Detectron2's checkpointer with atomic saves, safe loads and errors in one sentence.

    Attributes:
        incompatible: what the last load could not match: a named tuple of ``missing_keys``,
            ``unexpected_keys`` and ``incorrect_shapes`` (key, shape in file, shape in model); None
            before a load and after one of an empty path.
        saved_weights: a context in which the model has the weights to write; by default those that
            it has.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        weights_key: str = "MODEL.WEIGHTS",
        **options: Any,
    ):
        """
        Args:
            model: the model, or its DistributedDataParallel wrapper.
            save_dir: where checkpoints are written and looked for.
            weights_key: the config key that names the file, for error messages.
            options: as for Detectron2's: ``save_to_disk``, and objects that are saved along.
        """
        super().__init__(model, save_dir, **options)
        self.path_manager = AtomicPathManager(self.path_manager)
        self.weights_key = weights_key
        self.incompatible: _IncompatibleKeys | None = None
        self.saved_weights: Callable[[], AbstractContextManager] = nullcontext
        self.before_save: Callable[[], None] = lambda: None  # an error in it prevents the writing
        self._source = weights_key
        # One process writes a run's folder, so unfinished files are those of a killed one.
        if save_dir and self.save_to_disk and self.checkpointables:
            remove_unfinished_files(save_dir)

    def save(self, name: str, **kwargs: Any) -> None:
        """Writes a checkpoint, as Detectron2's does.

        Raises:
            NonFiniteLossError: a weight or buffer is NaN or infinite; nothing is written.
            CheckpointWriteError: the file could not be written.
        """
        if not (self.save_dir and self.save_to_disk):
            return
        if key := non_finite_key(self.model.state_dict()):
            raise NonFiniteLossError(
                f"'{key}' is not finite, so checkpoint '{name}' was not written; the last "
                "checkpoint is intact: lower SOLVER.BASE_LR, and --resume"
            )
        self.before_save()
        with self.saved_weights():
            super().save(name, **kwargs)

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        """Makes a file the one to resume from; the best checkpoint never is."""
        if last_filename_basename != "model_best.pth":
            super().tag_last_checkpoint(last_filename_basename)

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict[str, Any]:
        """Loads a file, a URL, or a name such as ``torchvision://resnet18``, as Detectron2's does.

        Raises:
            ConfigError: the file cannot be downloaded or read, or nothing in it fits the model.
        """
        return self._load_as(f"{self.weights_key} '{path}'", path, checkpointables)

    def resume_or_load(self, path: str, *, resume: bool = True) -> dict[str, Any]:
        """Continues from the last readable checkpoint of ``save_dir``, or else loads ``path``.

        Raises:
            ConfigError: there are checkpoints to resume from and none of them can be read.
        """
        if not (resume and self.has_checkpoint()):
            return self.load(path, checkpointables=[])
        failures = []
        for candidate in self._resume_candidates():
            if failures:
                _logger.warning("%s: resuming from the one before, %s", failures[-1], candidate)
            try:
                return self._load_as(f"the checkpoint '{candidate}' of this run", candidate, None)
            except UnreadableCheckpointError as error:
                failures.append(str(error))
        raise ConfigError(
            f"no checkpoint in OUTPUT_DIR '{self.save_dir}' can be read ({failures[0]}): start"
            " without --resume or with another OUTPUT_DIR"
        )

    def _resume_candidates(self) -> list[str]:
        """The tagged checkpoint, then the earlier ones by falling iteration number."""
        last = self.get_checkpoint_file()
        iterations = {
            file: int(match[1])
            for file in self.get_all_checkpoint_files()
            if (match := re.fullmatch(r"model_(\d+)\.pth", os.path.basename(file)))
        }
        newest = iterations.get(last, float("inf"))
        earlier = [file for file, iteration in iterations.items() if iteration < newest]
        return [last] + sorted(earlier, key=iterations.get, reverse=True)

    def _load_as(self, source: str, path: str, checkpointables: list[str] | None) -> dict[str, Any]:
        """Loads ``path``, naming it ``source`` in errors."""
        self.incompatible = None
        self._source = source
        try:
            if path:
                self._check_available(path)
            rest = super().load(path, checkpointables=[])
        finally:
            self._parsed_url_during_load = None  # Detectron2 forgets to after a failed load
        for name in self.checkpointables if checkpointables is None else checkpointables:
            if name not in rest:
                continue
            try:
                self.checkpointables[name].load_state_dict(rest.pop(name))
            except ConfigError:
                raise
            except (ValueError, KeyError) as error:
                raise ConfigError(
                    f"{source} holds a state of the {name} that does not fit this run ({error}):"
                    " resume with the student and the KD.DISTILLERS it was saved with, or start"
                    f" anew with {self.weights_key} set to this file"
                ) from error
        return rest

    def _check_available(self, path: str) -> None:
        """Finds or downloads the file, so that its absence is one clear sentence."""
        path = urlparse(path)._replace(query="").geturl()
        try:
            local = self.path_manager.get_local_path(path)
        except ConfigError as error:
            raise ConfigError(f"{self.weights_key}: {error}") from None
        except Exception as error:
            url = path
            if path.startswith(TorchvisionHandler.PREFIX):
                url = torchvision_url(path[len(TorchvisionHandler.PREFIX) :])
            raise UnreadableCheckpointError(
                f"{self._source} could not be downloaded from {url} ({error}): download it by hand"
                f" and set {self.weights_key} to the file's path, or a student's to '' to train"
                " from scratch"
            ) from error
        if not os.path.isfile(local):
            folder, name = os.path.split(local)
            files = os.listdir(folder or ".") if os.path.isdir(folder or ".") else []
            files = [file for file in files if file.endswith((".pth", ".pkl", ".pyth"))]
            raise UnreadableCheckpointError(
                f"{self._source} does not exist or is a folder: set {self.weights_key} to a"
                f" checkpoint{did_you_mean(name, files)}"
            )

    def _load_file(self, filename: str) -> dict[str, Any]:
        try:
            if filename.endswith(".pyth"):  # pycls; Detectron2 would read it without weights_only
                state = self._torch_load(filename)["model_state"]
                loaded = {"model": state, "__author__": "pycls", "matching_heuristics": True}
            else:
                loaded = super()._load_file(filename)
        except Exception as error:  # a damaged file can fail in any way
            # The first sentence: PyTorch's go on with guesses at the cause.
            reason = str(error).strip().split("\n")[0].split(". ")[0] or type(error).__name__
            raise UnreadableCheckpointError(
                f"{self._source} cannot be read: {filename} is truncated, no checkpoint, or holds"
                f" other objects than tensors ({reason}); get the file anew, or save the model's"
                " state dict with torch.save"
            ) from error
        state = loaded["model"]
        named = isinstance(state, Mapping) and len(state) > 0
        if not named or not all(isinstance(x, torch.Tensor | np.ndarray) for x in state.values()):
            keys = ", ".join(list(map(str, loaded))[:5])
            raise UnreadableCheckpointError(
                f"{self._source} is no checkpoint: {filename} should hold a dictionary of named"
                f" tensors, alone or as 'model', and holds ({keys})"
            )
        return loaded

    def _torch_load(self, f: str) -> Any:
        loaded = torch.load(f, map_location="cpu", weights_only=True)
        if not isinstance(loaded, dict):
            raise TypeError(f"it holds a {type(loaded).__name__}")
        return loaded

    def _load_model(self, checkpoint: dict[str, Any]) -> _IncompatibleKeys:
        state = checkpoint["model"]
        own_names = list(self.model.state_dict())
        if is_torchvision_state(state, self.model):
            state = convert_torchvision_state(state, self.model, source=self._source)
            checkpoint["model"] = state
        file_has_distillers = any(name.startswith(_DISTILLERS) for name in state)
        if not any(name.startswith(_DISTILLERS) for name in own_names):
            for name in [name for name in state if name.startswith(_DISTILLERS)]:
                del state[name]  # in place: the dictionary carries the layers' version numbers
        incompatible = super()._load_model(checkpoint)
        missing = set(_filter_reused_missing_keys(self.model, incompatible.missing_keys))
        unmatched = {name for name, _, _ in incompatible.incorrect_shapes}
        loaded = set(own_names) - unmatched - set(incompatible.missing_keys)
        if all(name.endswith(_FILLED_IN) for name in loaded):
            raise ConfigError(
                f"{self._source} has nothing in common with the model: none of the model's"
                f" {len(own_names)} tensors (such as '{own_names[0]}') is in the file; set"
                f" {self.weights_key} to a checkpoint of this model or of its backbone"
            )
        _logger.info("loaded %d of %d tensors from %s", len(loaded), len(own_names), self._source)
        self.incompatible = incompatible._replace(
            missing_keys=[
                name
                for name in incompatible.missing_keys
                if name in missing and (file_has_distillers or not name.startswith(_DISTILLERS))
            ],
            # Buffers that Detectron2 once saved and now takes from the config.
            unexpected_keys=[
                name
                for name in incompatible.unexpected_keys
                if name not in ("pixel_mean", "pixel_std")
            ],
        )
        return self.incompatible


def refuse_misfit(incompatible: _IncompatibleKeys, problem: str, fix: str) -> None:
    """Raises ConfigError unless a checkpoint and its model have the same tensors.

    Args:
        incompatible: what ``DistillationCheckpointer.load`` could not match.
        problem: the sentence's beginning, naming the checkpoint and what it does not fit.
        fix: the sentence's end.
    """
    reshaped = {name for name, *_ in incompatible.incorrect_shapes}
    differences = []
    for what, names in (
        ("missing", set(incompatible.missing_keys) - reshaped),
        ("unexpected", set(incompatible.unexpected_keys)),
        ("of another shape", reshaped),
    ):
        if names:
            shown = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
            differences.append(f"{len(names)} keys {what} ({shown})")
    if differences:
        raise ConfigError(f"{problem}: {'; '.join(differences)}; {fix}")
