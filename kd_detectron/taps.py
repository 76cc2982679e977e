"""Reads tensors out of a model's own forward pass, so that no layer runs twice."""

from collections.abc import Callable
from contextlib import ExitStack

from torch import nn


class Taps(ExitStack):
    """Hooks and wrappers on a model, removed when the ``with`` block ends, also when it fails."""

    def after(self, module: nn.Module, record: Callable) -> None:
        """Calls ``record`` with what the module returns."""
        hook = module.register_forward_hook(lambda module, args, output: record(output))
        self.callback(hook.remove)

    def before(self, module: nn.Module, record: Callable) -> None:
        """Calls ``record`` with the module's positional arguments."""
        hook = module.register_forward_pre_hook(lambda module, args: record(*args))
        self.callback(hook.remove)

    def wrap(self, owner: nn.Module, name: str, record: Callable) -> None:
        """Calls ``record`` with what a method of the module returns, which hooks do not see."""
        method, own = getattr(owner, name), name in vars(owner)

        def wrapped(*args, **kwargs):
            result = method(*args, **kwargs)
            record(result)
            return result

        setattr(owner, name, wrapped)
        restore = (setattr, owner, name, method) if own else (delattr, owner, name)
        self.callback(*restore)
