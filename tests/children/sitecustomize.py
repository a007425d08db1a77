"""Python imports this at its start: conftest.py puts this folder on PYTHONPATH for the processes that tests start."""

import auto_watch  # noqa: F401 (its import is what counts)
