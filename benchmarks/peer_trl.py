"""TRL's SFTTrainer as a peer; setting `grouped`: examples of like length together, its fastest here."""

import tempfile
from typing import Any

from datasets import Dataset
from torch.utils.data import SequentialSampler
from trl import SFTConfig, SFTTrainer

from benchmarks.job import BATCH, LENGTH, RATE, Clock, Job, Step, serve
from benchmarks.plain import load
from benchmarks.timed import timed


class InOrder(SFTTrainer):  # type: ignore[misc]
    """The file's order, which TRL has no setting for."""

    def _get_train_sampler(self, *_: Any) -> Any:
        return SequentialSampler(self.train_dataset)


def run(job: Job) -> list[Step]:
    """Its defaults but for what all peers share."""
    grouped = job.setting == "grouped"
    model, adapter, tokenizer = load(job)
    clock = Clock()
    data = [
        {"prompt": [{"role": "user", "content": row["question"]}],
         "completion": [{"role": "assistant", "content": row["answer"]}]}
        for row in job.read()[:256]
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config = SFTConfig(
            output_dir=folder, per_device_train_batch_size=BATCH, max_steps=job.steps, learning_rate=RATE,
            bf16=job.precision == "bf16", lr_scheduler_type="constant", weight_decay=0.0, save_strategy="no",
            report_to=[], use_cpu=True, gradient_checkpointing=False, max_length=LENGTH, dataloader_pin_memory=False,
            logging_strategy="no", **({"train_sampling_strategy": "group_by_length"} if grouped else {}),
        )  # fmt: skip
        trainer = timed(SFTTrainer if grouped else InOrder, clock)(
            model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, peft_config=adapter
        )
        trainer.train()
    return clock.steps


if __name__ == "__main__":
    serve(run)
