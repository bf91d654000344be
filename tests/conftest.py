"""One thread: these networks are tiny, and threads that wait for each other on busy cores take many times as long."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported; processes that tests start inherit it

os.environ.setdefault("RAY_worker_niceness", "0")  # else a busy machine leaves Ray's workers no time
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
