"""The peer: nanoGPT's own train.py and model.py, run as they ship from the folder that the user names.

A temporary copy is made for every run, because train.py fixes its seed in the source: that number is the only
change. Settings are those of the README's CPU recipe. Its own log tells the time of every step.
"""

from __future__ import annotations

import importlib.util
import os
import pickle
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from loss_tasks import Task, score

README_RECIPE = {
    "device": "cpu",
    "compile": False,
    "eval_iters": 20,
    "log_interval": 1,
    "block_size": 64,
    "batch_size": 12,
    "n_layer": 4,
    "n_head": 4,
    "n_embd": 128,
    "dropout": 0.0,
}
SEED = "torch.manual_seed(1337 + seed_offset)"


def train_peer(
    source: Path, task: Task, seed: int, iters: int = 2000, threads: int | None = None
) -> dict[str, Any]:
    """Run train.py for ``iters`` updates and score the checkpoint it saves.

    ``seconds`` is the sum of the step times that train.py prints. The first step's would include its
    evaluation, so the median stands in for it. Importing, building and saving are not counted.
    """
    with tempfile.TemporaryDirectory(prefix="nanogpt-") as name:
        folder = Path(name)
        prepare(source, folder, task, seed)
        settings = README_RECIPE | {
            "dataset": task.name,
            "out_dir": "out",
            "max_iters": iters,
            "lr_decay_iters": iters,
            "eval_interval": iters,
        }
        arguments = [f"--{key}={value}" for key, value in settings.items()]
        env = dict(os.environ)
        for variable in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY"):
            env.pop(variable, None)
        if threads is not None:
            env |= {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "train.py", "config/train_shakespeare_char.py", *arguments],
            cwd=folder, env=env, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise SystemExit(f"nanoGPT's train.py failed:\n{done.stderr[-2000:]}")
        found = re.findall(r"^iter (\d+): loss .*, time ([\d.]+)ms", done.stdout, flags=re.MULTILINE)
        took = {int(step): float(ms) / 1000 for step, ms in found}
        steps = [took[i] for i in range(1, iters)]
        scored, parameters = evaluate_peer(folder, task)
    return {
        "contestant": "nanoGPT",
        "task": task.name,
        "seed": seed,
        "seconds": round(sum(steps) + statistics.median(steps), 3),
        "seconds_per_step": round(statistics.median(steps), 5),
        "steps": iters,
        "tokens": iters * README_RECIPE["batch_size"] * README_RECIPE["block_size"],
        "parameters": parameters,
        "dtype": "fp32",
        **scored,
    }


def prepare(source: Path, folder: Path, task: Task, seed: int) -> None:
    """Copy what a run needs; write the data as nanoGPT's prepare.py would (checked: the same bytes)."""
    for name in ("train.py", "model.py", "configurator.py", "config"):
        if not (source / name).exists():
            raise SystemExit(f"{source} is no nanoGPT folder: it has no {name}")
        copy = shutil.copytree if (source / name).is_dir() else shutil.copy
        copy(source / name, folder / name)
    script = folder / "train.py"
    text = script.read_text("utf-8")
    if text.count(SEED) != 1:
        raise SystemExit(f"{source}/train.py does not set its seed as expected: {SEED!r} not found once")
    script.write_text(text.replace(SEED, f"torch.manual_seed({1337 + seed} + seed_offset)"), "utf-8")
    data = folder / "data" / task.name
    data.mkdir(parents=True)
    task.ids[: task.cut].tofile(data / "train.bin")
    task.ids[task.cut :].tofile(data / "val.bin")
    (data / "meta.pkl").write_bytes(pickle.dumps({"vocab_size": len(task.symbols)}))


def evaluate_peer(folder: Path, task: Task) -> tuple[dict[str, float], int]:
    """Score the saved checkpoint with nanoGPT's own model on the windows that ours is scored on."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", folder / "model.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    saved = torch.load(folder / "out" / "ckpt.pt", map_location="cpu", weights_only=True)
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    nats, targets, n_bytes = 0.0, 0, 0
    with torch.no_grad():
        for batch in task.held_out():
            _, loss = model(torch.from_numpy(batch.tokens), torch.from_numpy(batch.targets))
            nats, targets = nats + float(loss) * batch.targets.size, targets + batch.targets.size
            n_bytes += batch.n_bytes
    return score(nats / targets, n_bytes, targets), sum(p.numel() for p in model.parameters())
