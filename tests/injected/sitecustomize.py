"""Read by every Python process whose PYTHONPATH names this folder: prepares it as a test asks in its environment.

The test is heard when the search is imported, so that processes that have nothing to do with it import nothing more.
"""

from __future__ import annotations

import importlib
import importlib.util
import json
import os
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TRIGGER = "tmpq_exp.search.objective"


class Preparing(MetaPathFinder):
    """Finds one module as all others do, and calls a function of the tests once it is there.

    Args:
        module, function: Name of the function.
        arguments: What it is called with.
    """

    def __init__(self, module: str, function: str, arguments: Sequence[object]) -> None:
        self._module, self._function, self._arguments = module, function, arguments

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """See ``MetaPathFinder``."""
        if fullname != TRIGGER:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        assert spec is not None
        assert spec.loader is not None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            getattr(importlib.import_module(self._module), self._function)(*self._arguments)

        spec.loader.exec_module = exec_module  # type: ignore[method-assign]
        return spec


if "TMPQ_EXP_TEST_PREPARE" in os.environ:
    sys.meta_path.insert(0, Preparing(*json.loads(os.environ["TMPQ_EXP_TEST_PREPARE"])))
