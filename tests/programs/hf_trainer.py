"""A tiny GPT-2 trained with the Trainer of Hugging Face, as its documentation shows it; nothing is downloaded.

torchrun --nproc-per-node 2 hf_trainer.py
"""

import argparse
import tempfile

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments


class CountingDataset(torch.utils.data.Dataset):
    def __len__(self):
        return 256

    def __getitem__(self, index):
        ids = (torch.arange(16) + index) % 32
        return {"input_ids": ids, "labels": ids}


class Report(TrainerCallback):
    def __init__(self, fail_at, fail_on):
        self.fail_at, self.fail_on = fail_at, fail_on

    def on_step_end(self, args, state, control, **kwargs):
        if state.global_step == self.fail_at and args.process_index == self.fail_on:
            raise ValueError(f"planted fault on rank {args.process_index}")
        if state.is_world_process_zero and state.global_step % 10 == 1:
            print(f"step {state.global_step - 1}", flush=True)


def main(args):
    config = GPT2Config(
        vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, bos_token_id=None, eos_token_id=None
    )
    with tempfile.TemporaryDirectory() as output_dir:
        training_args = TrainingArguments(
            output_dir=output_dir,
            use_cpu=True,
            max_steps=10**9 if args.wait else args.steps,
            per_device_train_batch_size=8,
            learning_rate=0.01,
            lr_scheduler_type="constant",
            logging_steps=5,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
        )
        trainer = Trainer(
            model=GPT2LMHeadModel(config),
            args=training_args,
            train_dataset=CountingDataset(),
            callbacks=[Report(args.steps // 2, args.fail_on)],
        )
        trainer.train()

    losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
    assert losses[-1] < losses[0], losses
    weights = torch.cat([parameter.detach().flatten() for parameter in trainer.model.parameters()])
    everyone = trainer.accelerator.gather(weights.unsqueeze(0))
    size = training_args.world_size
    assert everyone.shape[0] == size and (everyone == weights).all(), "ranks have different weights"
    if trainer.is_world_process_zero():
        print(f"done: {size} ranks, loss {losses[0]:.3f} to {losses[-1]:.3f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--fail-on", type=int, metavar="RANK", help="raise on this rank, halfway")
    parser.add_argument("--wait", action="store_true", help="train until stopped")
    main(parser.parse_args())
