"""Any trainer built on transformers' own, with its steps on a clock."""

from typing import Any

from benchmarks.job import Clock


def timed(trainer: type, clock: Clock) -> type:
    """A subclass of trainer; gradient accumulation must be 1."""

    class Timed(trainer):  # type: ignore[misc, valid-type]
        def training_step(self, model: Any, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            self.seen = real_tokens(inputs["attention_mask"]), int((inputs["labels"][:, 1:] != -100).sum())
            self.positions = inputs["input_ids"].numel()
            self.last = super().training_step(model, inputs, *args, **kwargs)
            return self.last

        def _maybe_log_save_evaluate(self, *args: Any, **kwargs: Any) -> Any:
            if self.state.global_step > len(clock.steps):  # it is called once more at the end
                clock.end(*self.seen, self.positions, float(self.last))
            return super()._maybe_log_save_evaluate(*args, **kwargs)

    return Timed


def real_tokens(mask: Any) -> int:
    """Tokens that are not padding: mask (B, L), or (B, 1, L, L) to add to scores, where a real one sees itself."""
    return int((mask != 0).sum() if mask.dim() == 2 else (mask.diagonal(dim1=-2, dim2=-1) == 0).sum())
