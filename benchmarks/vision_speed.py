"""iLLaMA-T beside timm's ViT-T: images a second in training and inference, and memory, side by side in one run.

    python benchmarks/vision_speed.py            # eager and torch.compile, about 8 minutes on two cores

Both read 224 x 224 pixels in patches of 16 for 1,000 classes. Rounds alternate between the models; a ratio is that of
the medians. Memory is what a training step keeps for the backward pass (saved tensors, parameters not counted).
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vertebra.backbones.base import create_backbone
from vertebra.domains.vision.model import ImageClassifier
from vertebra.domains.vision.spec import VisionSpec

SOFT, CAUSAL, VIT = "illama_tiny, soft mask", "illama_tiny, causal", "timm vit_tiny_patch16_224"


def models() -> dict[str, nn.Module]:
    """Make the models with the same seed."""
    spec = VisionSpec(
        task="classification", channels=3, height=224, width=224, classes=tuple(str(i) for i in range(1000))
    )
    torch.manual_seed(0)
    return {
        VIT: timm.create_model("vit_tiny_patch16_224"),
        SOFT: ImageClassifier(create_backbone("illama_tiny,causal=false,soft_mask=true"), spec),
        CAUSAL: ImageClassifier(create_backbone("illama_tiny"), spec),
    }


def saved_bytes(model: nn.Module, images: Tensor, labels: Tensor) -> int:
    """Bytes that autograd keeps of one forward pass, parameters not counted."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = F.cross_entropy(model.train()(images), labels)
    assert loss.requires_grad
    return sum(kept.values())


def compare(actions: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Median seconds of each action, taken in turn."""
    times: dict[str, list[float]] = {name: [] for name in actions}
    for action in actions.values():
        action()
    for _ in range(rounds):
        for name, action in actions.items():
            start = time.perf_counter()
            action()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    """Print the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--eager-only", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    images, labels = torch.randn(args.batch, 3, 224, 224), torch.arange(args.batch)
    print(f"torch {torch.__version__}, timm {timm.__version__}, {args.threads} threads, batch {args.batch}")
    print("\n| mode | model | inference img/s | ratio | training img/s | ratio | kept for backward (MB) |")
    print("| --- | --- | ---: | ---: | ---: | ---: | ---: |")
    for compiled in (False,) if args.eager_only else (False, True):
        built = models()
        memory = {} if compiled else {name: saved_bytes(m, images, labels) / 1e6 for name, m in built.items()}
        ready = {name: torch.compile(m) if compiled else m for name, m in built.items()}
        optimizers = {name: torch.optim.AdamW(m.parameters(), lr=1e-4) for name, m in built.items()}

        def infer(model: Callable[[Tensor], Tensor]) -> None:
            with torch.no_grad():
                model(images)

        def train(model: Callable[[Tensor], Tensor], optimizer: torch.optim.Optimizer) -> None:
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()

        for model in built.values():
            model.eval()
        inference = compare({n: lambda m=m: infer(m) for n, m in ready.items()}, args.rounds)
        for model in built.values():
            model.train()
        training = compare({n: lambda m=m, o=optimizers[n]: train(m, o) for n, m in ready.items()}, args.rounds)
        for name in ready:
            kept = f"{memory[name]:.0f}" if memory else ""
            print(
                f"| {'compiled' if compiled else 'eager'} | {name} | {args.batch / inference[name]:.1f} | "
                f"{inference[VIT] / inference[name]:.2f} | {args.batch / training[name]:.1f} | "
                f"{training[VIT] / training[name]:.2f} | {kept} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
