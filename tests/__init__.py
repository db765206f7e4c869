"""The tests mirror the packages: `core/jobs/queue.py` is tested by `tests/jobs/test_queue.py`."""
