"""The command ``python -m fusionpasses doctor``: what is here, who would run each op, and what to do about the rest.

It exits with 1 if a GPU is here and an op would be left to the reference, or if the provider that was asked for
(``--provider``) can run nothing; else with 0.
"""

from __future__ import annotations

import argparse
import json
import platform
from collections.abc import Callable
from typing import Any

import torch

import fusionpasses
from fusionpasses import _aiter_files, _aiter_numerics, probes, providers
from fusionpasses.errors import ProviderUnavailable
from fusionpasses.kernels import arch
from fusionpasses.ops import OPS
from fusionpasses.probes import Verdict

#: For ``--help``.
EXIT = "Exits with 1 if a GPU is here and an op would be left to the reference, or if NAME can run nothing."


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--provider", metavar="NAME", help=f"ask for one: {', '.join(_names())}")


def main(args: argparse.Namespace) -> int:
    found = examine(None if args.provider == "auto" else args.provider)
    print(json.dumps(found, indent=2) if args.json else text(found))
    return 1 if found["problems"] else 0


def examine(requested: str | None = None) -> dict[str, Any]:
    """Everything the command prints, as plain dicts, lists and strings."""
    gpu = probes.probe_gpu()
    device_type = "cuda" if gpu else "cpu"
    devices = _devices() if gpu else []
    ops = {op: _op(op, device_type, requested) for op in sorted({*OPS, *providers.summary(device_type)})}
    wrong = probes.probe_wrong_aiter()
    return {
        "versions": {
            "fusionpasses": fusionpasses.__version__,
            "torch": torch.__version__,
            "triton": probes.triton_version() if probes.probe_triton() else None,
            "amd-aiter": probes.distribution_version("amd-aiter"),
            "python": platform.python_version(),
        },
        "device_type": device_type,
        "devices": devices,
        "probes": {name: {"ok": answer.ok, "why": answer.why} for name, answer in _answers(devices).items()},
        "requested": requested,
        "ops": ops,
        "problems": _problems(ops, device_type, requested),
        "advice": [f"wrong package: {wrong.why}"] if wrong else [],
    }


def _devices() -> list[dict[str, Any]]:
    """The GPUs; one that cannot be asked is listed with the error."""
    devices: list[dict[str, Any]] = []
    for index in range(torch.cuda.device_count()):
        try:
            device = torch.device("cuda", index)
            known = arch.of(device)
            devices.append(
                {
                    "index": index,
                    "name": torch.cuda.get_device_name(device),
                    "arch": known.name,
                    "processors": known.processors,
                }
            )
        except Exception as error:  # a driver too old, a device that is gone: what doctor is there to tell
            devices.append({"index": index, "name": None, "arch": None, "error": f"{type(error).__name__}: {error}"})
    return devices


def _answers(devices: list[dict[str, Any]]) -> dict[str, Verdict]:
    """Every probe with its answer."""
    simple: dict[str, Callable[[], Verdict]] = {
        "torch": probes.probe_torch,
        "triton": probes.probe_triton_version,
        "gpu": probes.probe_gpu,
        "hip": probes.probe_hip,
        "hip architecture": probes.probe_hip_architecture,
        "aiter": probes.probe_aiter,
    }
    answers = {name: probe() for name, probe in simple.items()}
    for name in sorted({device["arch"] for device in devices if device["arch"]}):
        answers[f"fp4 arithmetic, {name}"] = probes.probe_fp4_arithmetic(name)
        answers[f"tl.dot_scaled, {name}"] = probes.probe_dot_scaled(name)
    for function in _aiter_files.CAPABILITIES:
        answers[f"aiter.{function}"] = probes.probe_aiter_kernel(function)
    public = (
        probes.has_dynamic_mxfp4_quant,
        probes.has_fused_rmsnorm_mxfp4_quant,
        probes.has_fused_rope_mla_kv_cache,
        probes.has_mxfp4_gemm,
    )
    return {**answers, **{f"{probe.__name__}()": probe() for probe in public}}


def _names() -> tuple[str, ...]:
    """Every provider, those that are taken only by name last."""
    return (*providers.PREFERENCE, *providers.BY_NAME)


def _op(op: str, device_type: str, requested: str | None) -> dict[str, Any]:
    """Who can run an op, who is chosen, and why not when nobody is."""
    try:
        choice, error = providers.select(op, device_type, requested or "auto"), None
    except ProviderUnavailable as refusal:
        choice, error = None, str(refusal)
    verdicts = {name: providers.usable(name, op, device_type) for name in _names()}
    return {
        "choice": choice,
        "auto": providers.select(op, device_type),
        "error": error,
        "providers": {name: {"ok": answer.ok, "why": answer.why} for name, answer in verdicts.items()},
        "aiter": [
            {
                "function": each.function or None,
                "release": each.release,
                "ruled_out": list(each.ruled_out),
                "by_call": list(each.by_call),
                "switch": each.switch,
                "why": str(each),
            }
            for each in _aiter_numerics.standings(op)
        ],
    }


def _problems(ops: dict[str, dict[str, Any]], device_type: str, requested: str | None) -> list[str]:
    """What makes the exit code 1."""
    problems = []
    left = [op for op, row in ops.items() if row["auto"] == "reference"]
    if device_type == "cuda" and left:
        # Without ROCm, AITER is no news beside what keeps Triton from it.
        asked = [name for name in providers.PREFERENCE if name != "aiter" or probes.probe_hip()]
        answers = [ops[op]["providers"][name] for op in left for name in asked]
        why = sorted({answer["why"] for answer in answers if not answer["ok"]})
        problems.append(
            f"a GPU is here and the reference (plain torch, slow) would run {', '.join(left)}: {'; '.join(why)}"
        )
    if requested is not None and requested not in _names():
        problems.append(f"provider {requested!r} is none that this release knows: allowed {', '.join(_names())}")
    elif requested is not None and not any(row["choice"] for row in ops.values()):
        why = sorted({row["providers"][requested]["why"] for row in ops.values()})
        # What numerics rule out would be so with any installation.
        why = [each for each in why if all(each not in _whys(row) for row in ops.values())] or why
        if providers.is_rule(requested):
            why += [each.why for each in (probes.probe_hip_architecture(), probes.probe_aiter()) if not each]
            why = list(dict.fromkeys(why))
        problems.append(f"provider {requested!r} was asked for and can run nothing here: {'; '.join(why)}")
    return problems


def text(found: dict[str, Any]) -> str:
    """What the command prints."""
    versions = ", ".join(f"{name} {version or 'not installed'}" for name, version in found["versions"].items())
    lines = [versions, ""]
    for device in found["devices"]:
        known = device.get("error") or f"{device['name']}, {device['arch']}, {device['processors']} multiprocessors"
        lines.append(f"device cuda:{device['index']}: {known}")
    if not found["devices"]:
        lines.append("device: cpu; no GPU is in use, so plain torch (the reference) runs every op")
    answers = found["probes"]
    width = max(map(len, answers))
    lines += ["", "probes:"]
    lines += [f"  {name:{width}}  {'yes' if row['ok'] else 'no ':3}  {row['why']}" for name, row in answers.items()]
    lines += ["", f"who runs each op on device type {found['device_type']!r} (* the choice, yes: could, -: cannot):"]
    lines += _table(found["ops"]) + _reasons(found["ops"])
    if answers["aiter"]["ok"] or answers["hip"]["ok"] or str(found["requested"]).startswith("aiter"):
        lines += ["", "AITER's kernels beside our ops: what keeps each from calls, and the setting that admits it:"]
        lines += _standings(found["ops"])
    else:
        lines += ["", "AITER and ROCm are not here; --provider aiter lists what keeps AITER's kernels from calls"]
    lines += ["", *(f"problem: {problem}" for problem in found["problems"])]
    lines += [f"advice: {advice}" for advice in found["advice"]]
    if not found["problems"]:
        lines.append("no problems found")
    return "\n".join(lines)


def _table(ops: dict[str, dict[str, Any]]) -> list[str]:
    width = max(map(len, ops))
    lines = ["  ".join([f"  {'op':{width}}", *(f"{name:^9}" for name in _names())]).rstrip()]
    for op, row in ops.items():
        marks = ["*" if name == row["choice"] else "yes" if at["ok"] else "-" for name, at in row["providers"].items()]
        lines.append(
            "  ".join(
                [f"  {op:{width}}", *(f"{m:^{max(9, len(name))}}" for m, name in zip(marks, row["providers"]))]
            ).rstrip()
        )
    return lines


def _reasons(ops: dict[str, dict[str, Any]]) -> list[str]:
    """Why a provider cannot: each reason once, with the ops it is given for."""
    groups: dict[tuple[str, str], list[str]] = {}
    for op, row in ops.items():
        for name, answer in row["providers"].items():
            # What numerics rule out is said of each kernel, below.
            if not answer["ok"] and answer["why"] not in _whys(row):
                # Reasons that name the op are the same one for each op.
                groups.setdefault((name, answer["why"].replace(op, "this op")), []).append(op)
    return [
        f"  {name} cannot: {why} ({'all ops' if len(which) == len(ops) else ', '.join(which)})"
        for (name, why), which in groups.items()
    ]


def _standings(ops: dict[str, dict[str, Any]]) -> list[str]:
    """What numerics rule out of AITER, and the setting that admits it: each sentence once, with kernels and ops."""
    groups: dict[tuple[str, str], tuple[dict[str, None], list[str]]] = {}
    for op, row in ops.items():
        for each in row["aiter"]:
            why = f"{'; '.join(each['ruled_out']) or 'exact, for the calls that its rules accept'}; {each['switch']}"
            if each["by_call"]:
                why += f"; each call is asked for its {'; '.join(each['by_call'])}"
            functions, served = groups.setdefault((each["release"], why), ({}, []))
            functions[each["function"] or "no kernel"] = None
            served.append(op)
    lines = []
    for (release, why), (functions, served) in groups.items():
        of = "" if release == "any" else f" of {release} releases"
        lines += [f"  {', '.join(functions)}{of}, for {', '.join(dict.fromkeys(served))}:", f"    {why}"]
    return lines


def _whys(row: dict[str, Any]) -> set[str]:
    return {each["why"] for each in row["aiter"]} | {why for each in row["aiter"] for why in each["ruled_out"]}
