"""OWSM-CTC as ESPnet publishes it: sizes, vocabularies' layout, and the names of its weights.

Source: ESPnet's recipes ``owsm_ctc_v3.1`` and ``owsm_ctc_v4`` (https://arxiv.org/abs/2402.12654).
"""

from __future__ import annotations

import base64
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from torch import Tensor

from vertebra.backbones.base import create_backbone
from vertebra.backbones.ebranchformer import EBranchformerConfig
from vertebra.domains.conversion import Converter
from vertebra.domains.speech.model import PromptConfig, SpeechCTC
from vertebra.domains.speech.spec import BLANK, NO_LANGUAGE, NO_PROMPT, SpeechSpec
from vertebra.errors import LoadError, UnknownNameError


@dataclass(frozen=True)
class Published:
    """One published model.

    Args:
        n_mels: Log-mel channels.
        params: Number of parameters.
        source: Its repository.
    """

    n_mels: int
    params: int
    source: str


PUBLISHED = {
    "owsm_ctc_v3.1": Published(80, 1_005_050_706, "hf-hub:espnet/owsm_ctc_v3.1_1B"),
    "owsm_ctc_v4": Published(128, 1_011_342_162, "hf-hub:espnet/owsm_ctc_v4_1B"),
}
VOCABULARY_SIZE = 50_002
INTERMEDIATE, TRANSCRIPT = (6, 12, 15, 21), (6, 12, 15)


_LAYER = r"encoder\.encoders\.(\d+)\."
_ENDING = r"(weight|bias)"
_NAMES: tuple[tuple[str, str], ...] = tuple(
    (f"^{pattern}$", replacement)
    for pattern, replacement in (
        (rf"encoder\.embed\.conv\.(\d)\.{_ENDING}", r"subsample.conv.\1.\2"),
        (rf"encoder\.embed\.out\.(?:0\.)?{_ENDING}", r"subsample.out.\1"),
        (rf"{_LAYER}attn\.linear_([qkv])\.{_ENDING}", r"backbone.layers.\1.attention.qkv.\3#\2"),
        (rf"{_LAYER}attn\.linear_out\.{_ENDING}", r"backbone.layers.\1.attention.proj.\2"),
        (rf"{_LAYER}cgmlp\.channel_proj1\.0\.{_ENDING}", r"backbone.layers.\1.local.fc1.\2"),
        (rf"{_LAYER}cgmlp\.csgu\.(norm|conv)\.{_ENDING}", r"backbone.layers.\1.local.\2.\3"),
        (rf"{_LAYER}cgmlp\.channel_proj2\.{_ENDING}", r"backbone.layers.\1.local.fc2.\2"),
        (rf"{_LAYER}feed_forward_macaron\.w_(\d)\.{_ENDING}", r"backbone.layers.\1.macaron.fc\2.\3"),
        (rf"{_LAYER}feed_forward\.w_(\d)\.{_ENDING}", r"backbone.layers.\1.mlp.fc\2.\3"),
        (rf"{_LAYER}norm_ff_macaron\.{_ENDING}", r"backbone.layers.\1.norm_macaron.\2"),
        (rf"{_LAYER}norm_mha\.{_ENDING}", r"backbone.layers.\1.norm_attention.\2"),
        (rf"{_LAYER}norm_mlp\.{_ENDING}", r"backbone.layers.\1.norm_local.\2"),
        (rf"{_LAYER}norm_ff\.{_ENDING}", r"backbone.layers.\1.norm_mlp.\2"),
        (rf"{_LAYER}norm_final\.{_ENDING}", r"backbone.layers.\1.norm.\2"),
        (rf"{_LAYER}depthwise_conv_fusion\.{_ENDING}", r"backbone.layers.\1.merge_conv.\2"),
        (rf"{_LAYER}merge_proj\.{_ENDING}", r"backbone.layers.\1.merge.\2"),
        (rf"{_LAYER}norm_cross_attn\.{_ENDING}", r"readers.\1.norm.\2"),
        (rf"{_LAYER}cross_attn\.linear_q\.{_ENDING}", r"readers.\1.q.\2"),
        (rf"{_LAYER}cross_attn\.linear_([kv])\.{_ENDING}", r"readers.\1.kv.\3#\2"),
        (rf"{_LAYER}cross_attn\.linear_out\.{_ENDING}", r"readers.\1.proj.\2"),
        (rf"encoder\.after_norm\.{_ENDING}", r"backbone.norm.\1"),
        (rf"encoder\.conditioning_layer\.{_ENDING}", r"condition.\1"),
        (
            rf"prompt_encoder\.encoders\.(\d+)\.self_attn\.linear_([qkv])\.{_ENDING}",
            r"prompt_encoder.layers.\1.mixer.qkv.\3#\2",
        ),
        (
            rf"prompt_encoder\.encoders\.(\d+)\.self_attn\.linear_out\.{_ENDING}",
            r"prompt_encoder.layers.\1.mixer.proj.\2",
        ),
        (rf"prompt_encoder\.encoders\.(\d+)\.feed_forward\.w_(\d)\.{_ENDING}", r"prompt_encoder.layers.\1.mlp.fc\2.\3"),
        (rf"prompt_encoder\.encoders\.(\d+)\.norm(\d)\.{_ENDING}", r"prompt_encoder.layers.\1.norm\2.\3"),
        (rf"prompt_encoder\.after_norm\.{_ENDING}", r"prompt_encoder.norm.\1"),
        (r"embed\.weight", r"embed.weight"),
        (rf"(embed_proj|prompt_proj)\.{_ENDING}", r"\1.\2"),
        (rf"ctc\.ctc_lo\.{_ENDING}", r"head.\1"),
        (r"normalize\.(mean|std)", r"normalise.\1"),
    )
)
"""Names of ESPnet, and ours; what follows # says which part of a joined matrix it is."""


def owsm_ctc(name: str, spec: SpeechSpec | None = None) -> SpeechCTC:
    """Build a published model with fresh weights.

    Args:
        name: ``owsm_ctc_v3.1`` or ``owsm_ctc_v4``.
        spec: Its vocabulary, of ``owsm_spec``; None for one of placeholders, to count parameters.

    Raises:
        UnknownNameError: No such model.
    """
    if name not in PUBLISHED:
        raise UnknownNameError("published speech model", name, PUBLISHED)
    if spec is None:
        placeholders = [f"<{i}>" for i in range(VOCABULARY_SIZE - 6)]
        spec = owsm_spec(
            [BLANK, *placeholders, NO_PROMPT, NO_LANGUAGE, "<abk>", "<asr>", "<sos>"], PUBLISHED[name].n_mels
        )
    return SpeechCTC(
        create_backbone("ebranchformer_1b", causal=False, mask_conv=False, dropout=0.1),
        spec,
        subsampling=8,
        intermediate=INTERMEDIATE,
        transcript_layers=TRANSCRIPT,
        prompt=PromptConfig(),
        padding="espnet",
    )


def owsm_spec(tokens: list[str], n_mels: int, pieces: str = "") -> SpeechSpec:
    """Return the spec of a published vocabulary: languages stand between <nolang> and <asr>, then come the tasks.

    Args:
        tokens: ESPnet's token list.
        n_mels: Log-mel channels.
        pieces: The SentencePiece model, base64.

    Raises:
        LoadError: The list lacks a special token.
    """
    for needed in (BLANK, NO_PROMPT, NO_LANGUAGE, "<asr>"):
        if needed not in tokens:
            raise LoadError(f"the token list must hold {needed}; is it one of OWSM-CTC?")
    first, last = tokens.index(NO_LANGUAGE) + 1, tokens.index("<asr>")
    tasks = [token[1:-1] for token in tokens[last:] if re.fullmatch(r"<(asr|st_\w+)>", token)]
    return SpeechSpec(
        n_mels=n_mels,
        tokens=tuple(tokens),
        vocabulary="sentencepiece",
        pieces=pieces,
        normalisation="raw",
        languages=tuple(token[1:-1] for token in tokens[first:last]),
        tasks=tuple(tasks),
    )


def from_espnet(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the weights of ESPnet's OWSM-CTC to those of ``SpeechCTC``.

    Queries, keys and values become one matrix; computed tensors (``*.pe``, the filterbank) are left out.

    Raises:
        LoadError: A name that OWSM-CTC does not have.
    """
    joined: dict[str, dict[str, Tensor]] = {}
    out: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name.endswith(".pe") or name.startswith("frontend."):
            continue
        for pattern, replacement in _NAMES:
            renamed, count = re.subn(pattern, replacement, name)
            if count:
                break
        else:
            raise LoadError(f"{name!r} is no weight of ESPnet's OWSM-CTC; is the checkpoint of another model?")
        whole, slot, part = renamed.partition("#")  # "....qkv.weight#q"
        if slot:
            joined.setdefault(whole, {})[part] = tensor
        else:
            out[renamed] = tensor
    for whole, parts in joined.items():
        order = "qkv" if "qkv" in whole else "kv"
        if set(parts) != set(order):
            raise LoadError(f"{whole}: ESPnet's {', '.join(sorted(set(order) - set(parts)))} is missing.")
        out[whole] = torch.cat([parts[letter] for letter in order])
    return out


def read_espnet(model: SpeechCTC, tensors: dict[str, Tensor]) -> Any:
    """Load the weights of ESPnet's OWSM-CTC into a model, strictly.

    Returns:
        The report of what was matched.
    """
    from vertebra.backbones.pretrained import load_state

    return load_state(model, from_espnet(tensors), source="the weights of ESPnet")


def load_espnet(folder: str | Path) -> SpeechCTC:
    """Build a model from a folder that ESPnet published or trained: ``config.yaml``, weights and SentencePiece model.

    Args:
        folder: A downloaded repository, or an experiment: somewhere in it a ``config.yaml`` with an encoder
            ``e_branchformer_ctc``, one ``.pth`` beside it, and one ``.model``.

    Raises:
        LoadError: A file is missing or there are several, or the model is no OWSM-CTC.
    """
    folder = Path(folder)
    configs = [f for f in sorted(folder.rglob("config.yaml")) if "encoder_conf" in f.read_text(encoding="utf-8")]
    config_file = _the_one(configs, folder, "config.yaml with an encoder")
    config = yaml.safe_load(config_file.read_text(encoding="utf-8"))
    if config.get("encoder") != "e_branchformer_ctc":
        raise LoadError(f"{config_file}: encoder must be e_branchformer_ctc, got {config.get('encoder')!r}.")
    weights = _the_one(sorted(config_file.parent.glob("*.pth")), config_file.parent, ".pth")
    pieces = _the_one(sorted(folder.rglob("*.model")), folder, ".model of SentencePiece").read_bytes()
    try:
        found: Any = torch.load(weights, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises many kinds: pickle, zip, runtime and end-of-file errors
        raise LoadError(f"{weights}: cannot be read as weights ({str(e).splitlines()[0] if str(e) else e!r}).") from e
    try:
        model = _from_espnet_config(config, base64.b64encode(pieces).decode())
    except KeyError as e:
        raise LoadError(f"{config_file}: the key {e} is missing; is it the configuration of a training?") from e
    read_espnet(model, found)
    return model.eval()


def _from_espnet_config(config: dict[str, Any], pieces: str) -> SpeechCTC:
    encoder, model_conf, prompt = config["encoder_conf"], config["model_conf"], config["promptencoder_conf"]
    readers = [i for i, used in enumerate(encoder["use_cross_attention"]) if used]
    every = readers[0] + 1 if readers else 0
    if not readers or readers != list(range(every - 1, encoder["num_blocks"], every)):
        raise LoadError(f"the prompt must be read in every so-manieth layer, got layers {readers}.")
    inner = encoder["interctc_layer_idx"]
    transcript = [layer for layer, only in zip(inner, model_conf["ctc_asr_only"], strict=False) if only]
    backbone = EBranchformerConfig(
        dim=encoder["output_size"],
        depth=encoder["num_blocks"],
        causal=False,
        num_heads=encoder["attention_heads"],
        hidden_dim=encoder["linear_units"],
        cgmlp_dim=encoder["cgmlp_linear_units"],
        conv_kernel=encoder["cgmlp_conv_kernel"],
        merge_kernel=encoder["merge_conv_kernel"],
        mask_conv=False,
        dropout=encoder.get("dropout_rate", 0.1),
    )
    return SpeechCTC(
        backbone.build(),
        owsm_spec(list(config["token_list"]), config.get("frontend_conf", {}).get("n_mels", 80), pieces),
        subsampling=int(encoder["input_layer"].removeprefix("conv2d") or 4),
        intermediate=inner,
        transcript_layers=transcript,
        prompt=PromptConfig(
            dim=prompt["output_size"],
            depth=prompt["num_blocks"],
            num_heads=prompt["attention_heads"],
            hidden_dim=prompt["linear_units"],
            every=every,
            cross_heads=encoder["attention_heads"],
            dropout=prompt.get("dropout_rate", 0.1),
        ),
        padding="espnet",
    )


def _the_one(files: list[Path], folder: Path, what: str) -> Path:
    if len(files) != 1:
        names = ", ".join(f.name for f in files[:3]) or "none"
        raise LoadError(f"{folder}: must hold one {what}, got {names}.")
    return files[0]


CONVERTERS: tuple[Converter, ...] = ()
