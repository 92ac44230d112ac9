"""``vertebra doctor``: versions, devices, and what missing extras would enable."""

from __future__ import annotations

import os
import platform
import re
import sys
from importlib import metadata

from vertebra import __version__
from vertebra.cli.parsing import Parser

CORE = [
    "torch", "torchvision", "torchaudio", "lightning", "jsonargparse", "timm", "biopython", "trimesh", "scipy", "numpy",
    "soundfile", "pyarrow", "matplotlib", "rich", "safetensors", "huggingface_hub", "torchmetrics",
]  # fmt: skip
_ENABLES = {
    "gpu": "fused kernels for Mamba-2 layers on NVIDIA GPUs",
    "speech": "subword vocabularies, and beam search with a lexicon and n-gram models",
    "mesh": "reducing meshes to fewer faces",
    "action": "the tokenizer FAST",
    "hdf5": "demonstrations of robomimic and LIBERO",
    "video": "the cameras of LeRobot sets",
    "sim": "robots in MuJoCo: demonstrations of experts, and policies in closed loop",
    "onnx": "models written as ONNX, and checked",
    "lora": "fine-tuning by low-rank adapters",
    "bench": "comparisons with transformers and scikit-learn in benchmarks/ and in the tests",
    "dev": "the test suite, the linter and the type checker",
}


def run(verb: str, args: list[str]) -> int:
    """Print the state of the installation; 2 when a core package is missing."""
    parser = Parser(verb, "Versions, devices, and what missing extras would enable.")
    parser.add_argument("--short", action="store_true", help="versions and extras alone; does not import torch")
    short = parser.parse_args(args).short
    print(f"vertebra {__version__}   python {platform.python_version()}   {platform.platform()}   {sys.executable}")
    missing = [name for name in CORE if _version(name) is None]
    print("packages  " + "  ".join(f"{name} {_version(name) or 'MISSING'}" for name in CORE))
    for extra, needs in extras().items():
        absent = [name for name in needs if _version(name) is None]
        enables = _ENABLES.get(extra, "")
        if absent:
            would = f"it would enable {enables}" if enables else "unused"
            print(f"extra {extra:<6} missing {', '.join(absent)}; {would}: pip install 'vertebra[{extra}]'")
        else:
            print(f"extra {extra:<6} complete: {enables}")
    if not short and "torch" not in missing:
        _devices()
    if missing:
        print(f"missing: {', '.join(missing)}; repair with: pip install --upgrade vertebra", file=sys.stderr)
        return 2
    return 0


def extras() -> dict[str, list[str]]:
    """Optional packages by extra, as the installed metadata of ``vertebra`` names them."""
    try:
        lines = metadata.requires("vertebra") or []
    except metadata.PackageNotFoundError:
        return {}
    found: dict[str, list[str]] = {}
    for line in lines:
        if extra := re.search(r"extra == ['\"]([\w-]+)['\"]", line):
            name = re.match(r"[\w.-]+", line)
            found.setdefault(extra[1], []).append(name[0] if name else line)
    return found


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _devices() -> None:
    import torch

    print(f"cpu       {os.cpu_count()} cores, {torch.get_num_threads()} threads used by torch")
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            p = torch.cuda.get_device_properties(i)
            print(f"cuda:{i}    {p.name}, {p.total_memory / 2**30:.0f} GiB, bfloat16 {torch.cuda.is_bf16_supported()}")
    else:
        why = "this torch has no CUDA" if torch.version.cuda is None else "no usable NVIDIA GPU"
        print(f"cuda      none ({why})")
    if torch.backends.mps.is_available():
        print("mps       available")
