"""``vertebra export``: a model as programs that run without this package, compared with the model."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from vertebra.cli.parsing import Parser

if TYPE_CHECKING:
    from vertebra.domains.exporting import Written


def run(verb: str, args: list[str]) -> int:
    """Export a model, and print how much its programs differ from it."""
    parser = Parser(
        verb,
        "A model as a torch.export archive (.pt2) or an ONNX file (.onnx, needs the extra `onnx`) for any batch and "
        "length. FILE.json beside it says what goes in and comes out, and the tokens and normalisation; files of a "
        "tokenizer are copied there too. What was written is read back and compared with the model.",
    )
    parser.add_argument("model", metavar="MODEL", help="a bundled model's name, a model directory, or hf-hub:ORG/NAME")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="ends in .pt2 or .onnx")
    parser.add_argument("--format", choices=("pt2", "onnx"), help="(default: by the file's ending)")
    parser.add_argument(
        "--step",
        action="store_true",
        help="also FILE.step and what it needs: one step of a causal model with its state",
    )
    parser.add_argument(
        "--max-length", type=int, metavar="N", help="positions that a step remembers (default: the model's)"
    )
    parser.add_argument("--opset", type=int, metavar="N", help="of ONNX (default: what torch recommends)")
    options = parser.parse_args(args)
    from vertebra.backbones.loading.pretrained import model_folder
    from vertebra.domains.exporting import check_extra, description, export_model, file_kind
    from vertebra.domains.saving import load_model
    from vertebra.domains.vocabulary import tokenizer_files

    path = Path(options.output)
    if not path.suffix and options.format:
        path = path.with_suffix(f".{options.format}")
    if file_kind(path, options.format) == "onnx":  # before the model is loaded
        check_extra()
    folder = model_folder(options.model)
    model, beside = load_model(folder), tokenizer_files(folder)
    written = export_model(
        model,
        path,
        name=options.model,
        steps=options.step,
        max_length=options.max_length,
        opset=options.opset,
        files=beside,
        told=_print,
    )
    files = ", ".join(f"{w.path.name} ({w.path.stat().st_size / 1e6:.1f} MB)" for w in written)
    others = [description(path).name, *(file.name for file in beside)]
    print(f"wrote {files} and {', '.join(others)} to {path.parent}")
    return 0


def _print(written: Written) -> None:
    print(f"{written.form:<8} largest difference from the model {written.difference:.2g}, in {written.seconds:.1f} s")
    for sizes, difference in written.sizes:
        print(f"           {', '.join(f'{name} {size}' for name, size in sizes.items()):<40} {difference:.2g}")
