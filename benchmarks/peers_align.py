"""TRL's trainers as they are used, one step at a time: `bench_align_step` runs this with the peer's python.

    python peers_align.py KIND FOLDER THREADS

KIND is sft, dpo, reward or grpo; FOLDER holds the model, a tokenizer of whole words and `data.json`. The
trainer is built and `train()` called; at every step's end its seconds go to standard output, and the next
step begins when a line comes in on standard input. Needs trl, transformers and datasets alone.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["HF_HUB_OFFLINE"] = "1"


class Turns:
    """Answers each finished step and waits for the next to be asked for."""

    def __init__(self, out: Any):
        self.out, self.began = out, 0.0

    def wait(self) -> None:
        if not sys.stdin.readline():
            os._exit(0)
        self.began = time.perf_counter()

    def done(self) -> None:
        self.out.write(f"{time.perf_counter() - self.began}\n")
        self.out.flush()
        self.wait()


def settings(told: dict[str, Any], folder: Path) -> dict[str, Any]:
    """What all trainers share: AdamW in fp32 on this CPU, no checkpoints, no logs, nothing recomputed."""
    return {
        "output_dir": str(folder / "out"), "per_device_train_batch_size": told["batch"], "max_steps": 10_000,
        "learning_rate": 1e-3, "weight_decay": 0.0, "max_grad_norm": 1.0, "adam_beta1": 0.9,
        "adam_beta2": 0.95, "lr_scheduler_type": "constant", "warmup_steps": 0, "optim": "adamw_torch_fused",
        "bf16": False, "use_cpu": True, "gradient_checkpointing": False, "save_strategy": "no",
        "logging_strategy": "no", "report_to": "none", "dataloader_num_workers": 0, "disable_tqdm": True,
        "seed": 0,
    }  # fmt: skip


def trainer(kind: str, folder: Path, turns: Turns) -> Any:
    """The peer's trainer of that kind on the folder's model and data."""
    import datasets
    import trl
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        PreTrainedTokenizerFast,
        TrainerCallback,
    )

    told = json.loads((folder / "data.json").read_text())
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(folder / "tokenizer.json"), eos_token="</s>", pad_token="<pad>", unk_token="<unk>"
    )
    rows = datasets.Dataset.from_list(told["rows"][kind])
    common = settings(told, folder)
    more: dict[str, Any] = {"processing_class": tokenizer, "train_dataset": rows}
    if kind == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype="float32")
        model.config.pad_token_id = tokenizer.pad_token_id
        made = trl.RewardTrainer(model, args=trl.RewardConfig(**common, max_length=None), **more)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
        match kind:
            case "sft":
                config = trl.SFTConfig(**common, max_length=None, packing=False)
                made = trl.SFTTrainer(model, args=config, **more)
            case "dpo":
                config = trl.DPOConfig(**common, max_length=None, beta=0.1)
                made = trl.DPOTrainer(model, args=config, **more)
            case _:
                config = trl.GRPOConfig(
                    **common, num_generations=told["group"], max_completion_length=told["new"], beta=0.05,
                    temperature=1.0, num_iterations=1, steps_per_generation=1,
                )  # fmt: skip

                def wanted(completions: list[str], **_: Any) -> list[float]:
                    return [float(len(set(text.split()))) for text in completions]

                made = trl.GRPOTrainer(model, args=config, reward_funcs=wanted, **more)

    class OnStep(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turns.wait()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turns.done()

    made.add_callback(OnStep())
    return made


def main() -> None:
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what packages print is no answer
    import torch

    kind, folder, threads = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
    torch.set_num_threads(threads)
    trainer(kind, folder, Turns(out)).train()


if __name__ == "__main__":
    main()
