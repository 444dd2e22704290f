"""What a scoring actor exports: counters and gauges on the metrics port of its Ray node."""

from __future__ import annotations

from ray.util.metrics import Counter, Gauge

from diffitm.store.run_summary import Done

TAGS = ("model",)
COUNTERS = {
    "pairs": "Pairs done, those that failed too",
    "forwards": "Forwards of the model done",
    "failures": "Pairs that could not be scored",
}


class Metrics:
    """Those of an actor for one model; Ray adds ray_ before the names, and the worker to the tags."""

    def __init__(self, model: str) -> None:
        self.counters = {k: Counter(f"diffitm_{k}", text, TAGS) for k, text in COUNTERS.items()}
        self.memory = Gauge("diffitm_gpu_memory_bytes", "Most GPU memory that was allocated", TAGS)
        self.batch = Gauge("diffitm_batch_size", "Forwards of the model in one batch", TAGS)
        tag = model.encode("ascii", "backslashreplace").decode()  # Ray takes no other letters
        for metric in (*self.counters.values(), self.memory, self.batch):
            metric.set_default_tags({"model": tag})

    def add(self, done: Done) -> None:
        """Count a block."""
        for name, counter in self.counters.items():
            if value := getattr(done, name):  # Ray takes no increment of 0
                counter.inc(value)
        self.memory.set(done.memory)
        if done.batch_size:
            self.batch.set(done.batch_size)


def gpu_memory(device: str) -> int:
    """The most bytes that this process had allocated on its GPU, 0 on the CPU."""
    if device != "cuda":
        return 0
    import torch

    return torch.cuda.max_memory_allocated()
