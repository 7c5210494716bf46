"""The trainers we compare with, each as a function that makes one training step of a GPT-2 shape.

nanoGPT and llm.c come from folders that the user names; nothing of them is shipped. llm.c is a program of its
own: it is stopped while others take their turn.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, TracebackType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from glasshouse.train.objective import autocast

Step = Callable[[], Any]


def nanogpt(
    source: Path, shape: dict[str, int], tokens: Tensor, dtype: str, *, compiled: bool = False
) -> Step:
    """nanoGPT's model and its own optimiser configuration, on the device of ``tokens`` [rows, pos + 1].

    As shipped it trains in fp32 without compiling on a CPU, and compiled in bf16 on a GPU.
    """
    module = _import(source / "model.py", "nanogpt_model")
    config = module.GPTConfig(
        block_size=tokens.shape[1] - 1,
        vocab_size=shape["vocab_size"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        n_embd=shape["d_model"],
        dropout=0.0,
        bias=False,
    )
    model = module.GPT(config).to(tokens.device)
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.95), tokens.device.type)
    if compiled:
        model = torch.compile(model)
    x, y = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def step() -> None:
        with autocast(dtype, tokens.device):
            _, loss = model(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def huggingface(shape: dict[str, int], tokens: Tensor, dtype: str) -> Step:
    """transformers' GPT-2 with torch's fused AdamW."""
    import transformers

    config = transformers.GPT2Config(
        vocab_size=shape["vocab_size"],
        n_positions=tokens.shape[1] - 1,
        n_embd=shape["d_model"],
        n_layer=shape["n_layer"],
        n_head=shape["n_head"],
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
    )
    model = transformers.GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True
    )
    x = tokens[:, :-1].contiguous()

    def step() -> None:
        with autocast(dtype):
            loss = model(x, labels=x).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


class LlmC:
    """llm.c's CPU trainer (B 4, T 64, GPT-2 124M), one step a call; it sleeps in between.

    It is built with its own Makefile in a temporary copy, and given random weights and tokens in its formats.
    """

    def __init__(self, source: Path, threads: int):
        self._temporary = tempfile.TemporaryDirectory(prefix="llmc-")
        folder = Path(self._temporary.name)
        for name in ("train_gpt2.c", "Makefile"):
            (folder / name).write_bytes((source / name).read_bytes())
        (folder / "llmc").symlink_to((source / "llmc").resolve())
        made = subprocess.run(["make", "train_gpt2"], cwd=folder, capture_output=True, text=True, check=False)
        if made.returncode != 0:
            raise SystemExit(f"llm.c does not build: {made.stderr[-1000:]}")
        _llmc_weights(folder / "gpt2_124M.bin")
        data = folder / "dev" / "data" / "tinyshakespeare"
        data.mkdir(parents=True)
        for part in ("train", "val"):
            _llmc_tokens(data / f"tiny_shakespeare_{part}.bin")
        self._process = subprocess.Popen(
            ["stdbuf", "-oL", "./train_gpt2"],
            cwd=folder,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )
        self._until_step()  # start-up, the first validation and the first step

    def _until_step(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith("step "):
                self._process.send_signal(signal.SIGSTOP)
                return line
        raise SystemExit("llm.c ended early")

    def __call__(self) -> float:
        began = time.perf_counter()
        self._process.send_signal(signal.SIGCONT)
        self._until_step()
        return time.perf_counter() - began

    def __enter__(self) -> LlmC:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        self._temporary.cleanup()


def _llmc_weights(path: Path) -> None:
    """A GPT-2 124M in llm.c's checkpoint format, version 3: random, which costs the same time."""
    T, V, L, H, D, padded = 1024, 50257, 12, 12, 768, 50304
    header = np.zeros(256, dtype=np.int32)
    header[:8] = [20240326, 3, T, V, L, H, D, padded]
    matrices = padded * D + T * D + L * (3 * D * D + D * D + 8 * D * D)
    vectors = L * (2 * D + 2 * D + 3 * D + D + 4 * D + D) + 2 * D
    values = np.random.default_rng(0).standard_normal(matrices + vectors, dtype=np.float32) * 0.02
    with path.open("wb") as file:
        file.write(header.tobytes())
        values.tofile(file)


def _llmc_tokens(path: Path, n: int = 20_000) -> None:
    header = np.zeros(256, dtype=np.int32)
    header[:3] = [20240520, 1, n]
    ids = np.random.default_rng(1).integers(0, 50257, n).astype(np.uint16)
    path.write_bytes(header.tobytes() + ids.tobytes())


def _import(path: Path, name: str) -> ModuleType:
    if not path.is_file():
        raise SystemExit(f"{path} is not there: name a folder with the peer's source")
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module
