"""Checkpoints: a folder of safetensors and JSON that is there whole or not at all, named by digests in the
ledger.

    checkpoints/<stage>-<step:06d>.<attempt>/
        model.safetensors      fp32 parameters, a tied one once
        config.json            GPTConfig
        tokenizer.json         if the run has a tokenizer
        optimizer.safetensors  `Optimizers.state_tensors`
        window.safetensors     `Detector.state`: what losses and gradients are compared with
        state.json             stage, step, attempt, update, plan, seed, optimiser groups

Order of a save: temporary folder, fsync, rename, fsync of the parent, *then* the ledger line. Order of a
load: digests of all files against the ledger, then everything else. The bytes that were hashed are the bytes
parsed.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from glasshouse.base.atomic import atomic_dir, disk_errors, sweep_temporaries
from glasshouse.base.canonical import canonical_json
from glasshouse.base.config import Frozen, parse
from glasshouse.base.crash import crash_point
from glasshouse.base.digest import digest_of, sha256_bytes, sha256_file
from glasshouse.base.errors import CheckpointError
from glasshouse.base.plan import DataPlan
from glasshouse.base.run import RunFolder
from glasshouse.model import GPT, GPTConfig
from glasshouse.train.gate import Checkpoint
from glasshouse.train.interventions_config import Block
from glasshouse.train.optim import Optimizers
from glasshouse.train.routing import remove_blocks
from glasshouse.train.stability import Detector

NAME = re.compile(r"^[a-z][a-z0-9_-]*-\d{6,}\.\d+$")


def checkpoint_name(stage: str, step: int, attempt: int) -> str:
    """``<stage>-<step:06d>.<attempt>``."""
    return f"{stage}-{step:06d}.{attempt}"


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and persistent buffers by name, each shared one once, contiguous, detached, on the CPU."""
    stored: dict[str, Tensor] = dict(model.named_parameters())
    persistent = model.state_dict(keep_vars=True)
    stored |= {name: b for name, b in model.named_buffers() if name in persistent}
    return {name: t.detach().cpu().contiguous() for name, t in stored.items()}


def write_checkpoint(
    run: RunFolder,
    name: str,
    model: Any,
    optimizers: Optimizers | None,
    tokenizer_file: Path | None,
    state: Mapping[str, Any],
    detector: Detector | None = None,
    write: Callable[[Any, Path], None] | None = None,
) -> dict[str, str]:
    """Write the folder (not the ledger) and return its artifacts: path within the run -> SHA-256.

    ``write`` stores the model as files in the folder; None: as a GPT.

    Equal states give equal bytes, hence equal digests. Raises DiskError when the disk is full: nothing is
    left behind then, and everything saved before is untouched.
    """
    final = run.checkpoints / name
    with disk_errors(final), atomic_dir(final) as folder:
        (write or write_gpt)(model, folder)
        _write_tensors(folder / "optimizer.safetensors", optimizers.state_tensors() if optimizers else {})
        if detector is not None:
            _write_tensors(folder / "window.safetensors", detector.state())
        if tokenizer_file is not None:
            shutil.copyfile(tokenizer_file, folder / "tokenizer.json")
        groups = optimizers.scalars() if optimizers else []
        (folder / "state.json").write_bytes(
            canonical_json({**state, "optimizer": groups, "format": 1}) + b"\n"
        )
        artifacts = {f"checkpoints/{name}/{p.name}": sha256_file(p) for p in sorted(folder.iterdir())}
        crash_point("checkpoint.before-rename")
    crash_point("checkpoint.after-rename")
    return artifacts


def write_gpt(model: GPT, folder: Path) -> None:
    """A GPT's files in a checkpoint: ``model.safetensors`` and ``config.json``."""
    _write_tensors(folder / "model.safetensors", weights(model))
    write_config(folder / "config.json", model.config)


def write_config(path: Path, config: Frozen) -> None:
    """Write ``config`` as JSON: sorted keys, for people."""
    path.write_text(json.dumps(config.model_dump(mode="json"), indent=2, sort_keys=True) + "\n")


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write ``tensors`` as a safetensors file of a checkpoint; for a `Trainee`."""
    _write_tensors(path, tensors)


def _write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    # Serialised in memory and written by us, so that a full disk shows as OSError and not as a Rust error.
    with open(path, "wb") as file:
        file.write(
            safetensors.torch.save({name: t.detach().cpu().contiguous() for name, t in tensors.items()})
        )


def digest_of_artifacts(artifacts: Mapping[str, str]) -> str:
    """One digest for a checkpoint's exact bytes, independent of the run's and the checkpoint's name."""
    return digest_of({Path(path).name: digest for path, digest in artifacts.items()})


def from_ledger(run: RunFolder, body: Mapping[str, Any]) -> Checkpoint:
    """The `Checkpoint` that a ledger entry of kind "checkpoint" describes."""
    name = body["checkpoint"]
    return Checkpoint(
        name=name,
        path=run.checkpoints / name,
        stage=body["stage"],
        stage_index=body["stage_index"],
        step=body["step"],
        attempt=body["attempt"],
        update=body["update"],
        plan=parse(DataPlan, dict(body["plan"]), f"ledger, checkpoint {name}, plan"),
        digest=digest_of_artifacts(body["artifacts"]),
        artifacts={Path(path).name: digest for path, digest in body["artifacts"].items()},
    )


def read_checked(checkpoint: Checkpoint) -> dict[str, bytes]:
    """Read every file of the checkpoint, after checking *all* of them against the ledgered digests.

    Raises CheckpointError naming the file, what was expected and found, and the remedy.
    """
    contents: dict[str, bytes] = {}
    for name, expected in sorted(checkpoint.artifacts.items()):
        path = checkpoint.path / name
        try:
            contents[name] = path.read_bytes()
        except OSError as error:
            raise CheckpointError(
                f"{path} cannot be read ({error.strerror}), but the ledger lists it: "
                "restore it from a backup, or start a new run"
            ) from error
        found = sha256_bytes(contents[name])
        if found != expected:
            raise CheckpointError(
                f"{path} was changed or truncated after it was saved: expected SHA-256 {expected[:16]}..., "
                f"found {found[:16]}... ({len(contents[name])} bytes). Restore it from a backup, "
                "or start a new run; nothing was loaded"
            )
    return contents


def load_weights(checkpoint: Checkpoint, model: GPT | None = None, *, whole: bool = False) -> GPT:
    """Read a checkpoint's model, digests checked first, into ``model`` or into a new one.

    Blocks that training routes marked data into are removed, unless ``whole``: what is judged, exported and
    served is the model without them. Raises CheckpointError when bytes, names, shapes or dtypes differ, or a
    weight is not finite.
    """
    contents = read_checked(checkpoint)
    loaded = gpt_into(checkpoint, contents, model)
    routed = json.loads(contents["state.json"]).get("routed", []) if "state.json" in contents else []
    if routed and not whole:
        remove_blocks(loaded, [parse(Block, row, f"{checkpoint.path}/state.json, routed") for row in routed])
    return loaded


def load_checkpoint(
    checkpoint: Checkpoint,
    model: Any,
    optimizers: Optimizers | None,
    detector: Detector | None = None,
    read: Callable[[Checkpoint, Mapping[str, bytes], Any], Any] | None = None,
) -> dict[str, Any]:
    """Restore weights, and optimisers and detector if given, in place; return state.json. Raises
    CheckpointError. ``read`` brings the model back from the files' contents; None: a GPT.
    """
    contents = read_checked(checkpoint)
    (read or gpt_into)(checkpoint, contents, model)
    state: dict[str, Any] = json.loads(contents["state.json"])
    if optimizers is not None:
        where = str(checkpoint.path / "optimizer.safetensors")
        if state["optimizer"] != json.loads(canonical_json(optimizers.scalars())):
            raise CheckpointError(
                f"{checkpoint.path / 'state.json'}: written with other optimiser groups; "
                "resume with the recipe that wrote it"
            )
        optimizers.load(read_tensors(contents["optimizer.safetensors"], where), where)
    if detector is not None:
        where = str(checkpoint.path / "window.safetensors")
        detector.load(read_tensors(contents["window.safetensors"], where), where)
    return state


def gpt_into(checkpoint: Checkpoint, contents: Mapping[str, bytes], model: GPT | None) -> GPT:
    """What `write_gpt` stored, into ``model`` or a new one; raises as `load_weights` does."""
    where = checkpoint.path / "model.safetensors"
    config = parse(GPTConfig, json.loads(contents["config.json"]), str(checkpoint.path / "config.json"))
    if model is None:
        model = GPT(config)
    elif model.config != config:
        raise CheckpointError(
            f"{checkpoint.path / 'config.json'}: another model than the recipe's; resume with that recipe"
        )
    weights_into(model, contents["model.safetensors"], str(where))
    return model


def weights_into(model: nn.Module, data: bytes, where: str) -> None:
    """Copy a safetensors file's `weights` into ``model``. CheckpointError when names, shapes or dtypes differ
    or a value is not finite.
    """
    found, expected = read_tensors(data, where), weights(model)
    for name in sorted(expected.keys() | found.keys()):
        if name not in found or name not in expected:
            raise CheckpointError(
                f"{where}: weight '{name}' is {'missing' if name in expected else 'unknown'}"
            )
        want, got = expected[name], found[name]
        if want.shape != got.shape or want.dtype != got.dtype:
            raise CheckpointError(
                f"{where}: weight '{name}' is {got.dtype} {list(got.shape)}, "
                f"expected {want.dtype} {list(want.shape)}"
            )
        if got.is_floating_point() and not torch.isfinite(got).all():
            raise CheckpointError(f"{where}: weight '{name}' has values that are not finite")
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name in found:
                tensor.copy_(found[name])


def read_tensors(data: bytes, where: str) -> dict[str, Tensor]:
    """Parse a safetensors file. Raises CheckpointError if it is none."""
    try:
        return safetensors.torch.load(data)
    except safetensors.SafetensorError as error:
        raise CheckpointError(f"{where} is not a safetensors file: {error}") from error


def sweep(run: RunFolder, ledgered: Mapping[str, Any]) -> list[str]:
    """Remove what a killed process left in ``checkpoints/``: temporaries, and whole folders that never
    reached the ledger (only those named as the loop names them). Return the names.
    """
    swept = [path.name for path in sweep_temporaries(run.checkpoints)]
    for path in sorted(run.checkpoints.glob("*")):
        if path.is_dir() and NAME.match(path.name) and path.name not in ledgered:
            shutil.rmtree(path)
            swept.append(path.name)
    return swept
