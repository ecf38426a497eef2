"""The training loop. The package itself can be called: `fastsmart.train(config, out="runs/demo")`.

`fastsmart.train` is both this package and the promised function. Importing any module of it binds the package to that
name, so the package has to be the function.
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastsmart.train.loop import Run


class _Train(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> Run:
        """See `fastsmart.train.loop.train`."""
        from fastsmart.train.loop import train

        return train(*args, **kwargs)


sys.modules[__name__].__class__ = _Train
