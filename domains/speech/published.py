"""OWSM-CTC as ESPnet publishes it: sizes, vocabularies' layout, the names of its weights, and folders of ESPnet.

Source: ESPnet's recipes ``owsm_ctc_v3.1`` and ``owsm_ctc_v4`` (https://arxiv.org/abs/2402.12654).
"""

from __future__ import annotations

import base64
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any, ClassVar

import numpy as np
import torch
import yaml
from torch import Tensor

from vertebra.backbones.base import create_backbone
from vertebra.backbones.ebranchformer import EBranchformerConfig
from vertebra.backbones.loading.checkpoints import Checkpoint, open_checkpoint, read_weights
from vertebra.backbones.loading.files import inside
from vertebra.backbones.loading.pretrained import LoadReport, load_state
from vertebra.domains.conversion import Conversion, Converter, loaded, split_left_out
from vertebra.domains.speech.model import PromptConfig, SpeechCTC
from vertebra.domains.speech.spec import BLANK, NO_LANGUAGE, NO_PROMPT, SpeechSpec
from vertebra.errors import ConfigError, LoadError, UnknownNameError


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


def from_espnet(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
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


def read_espnet(model: SpeechCTC, tensors: Mapping[str, Tensor]) -> LoadReport:
    """Load the weights of ESPnet's OWSM-CTC into a model, strictly.

    Returns:
        The report of what was matched.
    """
    return load_state(model, from_espnet(tensors), source="the weights of ESPnet")


def load_espnet(folder: str | Path) -> SpeechCTC:
    """Build a model from a folder that ESPnet published or trained: ``config.yaml``, weights and SentencePiece model.

    Args:
        folder: As ``OWSM.convert`` takes it.

    Raises:
        LoadError: A file is missing or there are several, or the model is no OWSM-CTC.
    """
    model = OWSM().convert(open_checkpoint(folder)).model
    assert isinstance(model, SpeechCTC)
    return model


# ---------------------------------------------------------------- the converter

_ENCODER = "e_branchformer_ctc"
_DEPTH = 4  # folders below the given one in which a config.yaml is looked for
_KEYS = ("encoder.encoders.0.cgmlp.csgu.conv.weight", "encoder.conditioning_layer.weight", "ctc.ctc_lo.weight")
_FILTERBANK = "frontend.logmel.melmat"
_FILTERBANK_ERROR = 1e-5
_LEFT_OUT = {
    r".+\.pe": "sines and cosines of positions, which are computed",
    re.escape(_FILTERBANK): "the filterbank, which is computed; it was compared with ours",
}
_FIXED: tuple[tuple[str, str, object, tuple[object, ...]], ...] = (
    ("", "frontend", "default", ("default",)),
    ("", "token_type", "bpe", ("bpe",)),
    ("", "normalize", "global_mvn", ("global_mvn", None)),
    ("", "promptencoder", "transformer", ("transformer",)),
    ("frontend_conf", "window", "hann", ("hann",)),
    ("frontend_conf", "center", True, (True,)),
    ("frontend_conf", "normalized", False, (False,)),
    ("frontend_conf", "htk", False, (False,)),
    ("frontend_conf", "fmin", None, (None, 0)),
    ("normalize_conf", "norm_means", True, (True,)),
    ("normalize_conf", "norm_vars", True, (True,)),
    ("encoder_conf", "attention_layer_type", "rel_selfattn", ("selfattn",)),
    ("encoder_conf", "pos_enc_layer_type", "rel_pos", ("abs_pos",)),
    ("encoder_conf", "use_linear_after_conv", False, (False,)),
    ("encoder_conf", "gate_activation", "identity", ("identity",)),
    ("encoder_conf", "ffn_activation_type", "swish", ("swish",)),
    ("encoder_conf", "positionwise_layer_type", "linear", ("linear",)),
    ("encoder_conf", "zero_triu", False, (False,)),
    ("promptencoder_conf", "normalize_before", True, (True,)),
    ("promptencoder_conf", "concat_after", False, (False,)),
    ("promptencoder_conf", "positionwise_layer_type", "linear", ("linear",)),
    ("preprocessor_conf", "na_symbol", NO_PROMPT, (NO_PROMPT,)),
)
"""Section and field of ``config.yaml``, its value where it is absent, and what ours can do."""


class OWSM(Converter):
    """OWSM-CTC as ESPnet packs or trains it.

    A source is a downloaded repository, its zip, or an experiment: somewhere in it a ``config.yaml`` with an encoder
    ``e_branchformer_ctc``, one ``.pth`` beside it, one SentencePiece model, and statistics, if the weights have none;
    or that ``.pth`` itself.
    """

    name: ClassVar[str] = "owsm_ctc"
    summary: ClassVar[str] = "OWSM-CTC speech recognisers of ESPnet (folder or .zip)"

    def recognises(self, checkpoint: Checkpoint) -> bool:
        """Tell by a ``config.yaml`` with the encoder, or by names of tensors."""
        if any(_encoder_of(file) == _ENCODER for file in _config_files(checkpoint)):
            return True
        try:
            return set(_KEYS) <= checkpoint.tensors.keys()
        except LoadError:  # a folder of another kind
            return False

    def convert(self, checkpoint: Checkpoint) -> Conversion:
        """Make the model; see ``Converter``."""
        folder = _find(checkpoint)
        tensors = read_weights(folder.weights)
        weights, left_out = split_left_out(tensors, _LEFT_OUT)
        where, pieces = folder.config_file, base64.b64encode(folder.pieces.read_bytes()).decode()
        try:
            _check(folder.config)
            model = _from_espnet_config(folder.config, weights, pieces)
            _check_frontend(model, folder.config.get("frontend_conf") or {})
        except KeyError as error:
            raise LoadError(f"{where}: the key {error} is missing; is it the configuration of a training?") from error
        except LoadError as error:
            raise LoadError(f"{where}: {error}") from error
        except (ConfigError, TypeError, ValueError, AttributeError) as error:
            raise LoadError(f"{where}: no model can be built of it ({error}).") from error
        if _FILTERBANK in tensors:
            _check_filterbank(model, tensors[_FILTERBANK], folder.weights)
        if "normalize.mean" not in weights and "normalize.std" not in weights:
            weights |= _statistics(folder, model.spec.n_mels)
        return loaded(model, from_espnet(weights), checkpoint, left_out=left_out)


@dataclass(frozen=True)
class _Folder:
    """What was found.

    Args:
        config_file: ``config.yaml``.
        weights: The file of weights.
        pieces: The SentencePiece model.
        roots: Folders that paths in the config may be relative to.
        config: What the config says.
    """

    config_file: Path
    weights: Path
    pieces: Path
    roots: tuple[Path, ...]
    config: dict[str, Any] = field(repr=False)

    def named(self, path: object) -> Path | None:
        """Return the file that a path in the config means."""
        return _named(self.roots, path)


def _config_files(checkpoint: Checkpoint) -> list[Path]:
    if checkpoint.path.is_file():  # what lies deeper belongs to other weights
        patterns: tuple[str, ...] = ("config.yaml",)
    else:
        patterns = tuple("*/" * depth + "config.yaml" for depth in range(_DEPTH + 1))
    return sorted(file for pattern in patterns for file in checkpoint.folder.glob(pattern) if file.is_file())


def _encoder_of(file: Path) -> str | None:
    """Return the encoder that a ``config.yaml`` names, without reading its token list."""
    try:
        found = re.search(r"^encoder:[ \t]*(\S+)[ \t]*$", file.read_text(encoding="utf-8"), re.MULTILINE)
    except (OSError, UnicodeDecodeError):
        return None
    return None if found is None else found[1].strip("'\"")


def _find(checkpoint: Checkpoint) -> _Folder:
    top, files = checkpoint.folder, _config_files(checkpoint)
    known = [file for file in files if _encoder_of(file) == _ENCODER]
    others = [file for file in files if _encoder_of(file) is not None]
    if not known and len(others) == 1:
        raise LoadError(f"{others[0]}: encoder must be {_ENCODER}, got {_encoder_of(others[0])!r}.")
    config_file = _the_one(known, top, "config.yaml with an encoder")
    config = _read_yaml(config_file)
    here = config_file.parent
    if checkpoint.path.is_file():
        weights, roots = checkpoint.path, tuple([here, *here.parents][: _DEPTH + 1])
    else:
        roots = tuple(folder for folder in (here, *here.parents) if folder == top or folder.is_relative_to(top))
        weights = _packed(roots) or _the_one(sorted(here.glob("*.pth")), here, ".pth", "; name the file itself")
    pieces = _named(roots, config.get("bpemodel"))
    if pieces is None:
        below = here if checkpoint.path.is_file() else top
        pieces = _the_one(sorted(below.rglob("*.model")), below, ".model of SentencePiece")
    return _Folder(config_file, weights, pieces, roots, config)


def _read_yaml(file: Path) -> dict[str, Any]:
    try:
        text = file.read_text(encoding="utf-8")
        found = yaml.load(
            text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)
        )  # 50,000 tokens take long in Python
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise LoadError(
            f"{file}: not readable as YAML ({str(error).splitlines()[0] if str(error) else error!r})."
        ) from error
    if not isinstance(found, dict):
        raise LoadError(f"{file}: must hold names and values, got a {type(found).__name__}.")
    return found


def _packed(roots: tuple[Path, ...]) -> Path | None:
    """Return the weights that ESPnet's ``meta.yaml`` of a packed model names."""
    for root in roots:
        if (meta := inside(root, "meta.yaml")) is not None:
            names = _read_yaml(meta).get("files")
            found = [_named((root,), name) for name in (names.values() if isinstance(names, dict) else ())]
            files = [file for file in found if file is not None and file.suffix == ".pth"]
            if len(files) == 1:
                return files[0]
    return None


def _named(roots: tuple[Path, ...], name: object) -> Path | None:
    if not isinstance(name, str) or not name or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
        return None
    return next((file for root in roots if (file := inside(root, name)) is not None), None)


def _the_one(files: list[Path], folder: Path, what: str, way_out: str = "") -> Path:
    if len(files) != 1:
        names = ", ".join(f.name for f in files[:3]) or "none"
        raise LoadError(f"{folder}: must hold one {what}, got {names}{way_out}.")
    return files[0]


# ---------------------------------------------------------------- what a config says


def _check(config: Mapping[str, Any]) -> None:
    for section, name, absent, possible in _FIXED:
        values = (config.get(section) or {}) if section else config
        found = values.get(name, absent)
        if found not in possible:
            wanted = " or ".join("null" if value is None else str(value) for value in possible)
            raise LoadError(f"{section}{'.' * bool(section)}{name} must be {wanted}, got {found}.")


class _Sizes:
    """Sizes that the config states, each held against the weights before anything is built of it.

    Args:
        config: All of it.
        tensors: The weights.
    """

    def __init__(self, config: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        self.config, self.tensors = config, tensors

    def __call__(self, section: str, name: str, absent: int, tensor: str, axis: int = 0) -> int:
        """Return a size; ``absent`` where the config does not state it, as in ESPnet."""
        value = self.config[section].get(name, absent)
        shape = self.tensors[tensor].shape if tensor in self.tensors else ()
        return self._agreed(f"{section}.{name}", value, shape[axis] if len(shape) > axis else f"no {tensor}")

    def layers(self, section: str, absent: int, prefix: str) -> int:
        """Return the number of layers."""
        value = self.config[section].get("num_blocks", absent)
        numbers = {name.removeprefix(prefix).partition(".")[0] for name in self.tensors if name.startswith(prefix)}
        return self._agreed(f"{section}.num_blocks", value, len(numbers))

    def _agreed(self, name: str, value: object, found: object) -> int:
        if value != found or not isinstance(value, int):
            raise LoadError(f"{name} is {value}, but the weights have {found}; are config and weights of one model?")
        return value


def _from_espnet_config(config: dict[str, Any], tensors: Mapping[str, Tensor], pieces: str) -> SpeechCTC:
    encoder, model_conf, prompt = config["encoder_conf"], config["model_conf"], config["promptencoder_conf"]
    sizes, layer = _Sizes(config, tensors), "encoder.encoders.0."
    depth = sizes.layers("encoder_conf", 12, "encoder.encoders.")
    used = encoder.get("use_cross_attention", True)
    used = [used] * depth if isinstance(used, bool) else used
    readers = [i for i, reads in enumerate(used) if reads]
    every = readers[0] + 1 if readers else 0
    if not readers or readers != list(range(every - 1, depth, every)):
        raise LoadError(f"the prompt must be read in every so-manieth layer, got layers {readers}.")
    inner = encoder.get("interctc_layer_idx") or []
    if inner and not encoder.get("interctc_use_conditioning", False):
        raise LoadError("encoder_conf.interctc_use_conditioning must be true where there are interctc_layer_idx.")
    transcript = [number for number, only in zip(inner, model_conf["ctc_asr_only"], strict=False) if only]
    heads, input_layer = encoder.get("attention_heads", 4), encoder.get("input_layer", "conv2d8")
    subsampling = {"conv2d": 4, "conv2d1": 1, "conv2d2": 2, "conv2d6": 6, "conv2d8": 8}.get(input_layer)
    if subsampling is None:
        raise LoadError(
            f"encoder_conf.input_layer must be conv2d, conv2d1, conv2d2, conv2d6 or conv2d8, got {input_layer}."
        )
    tokens = config["token_list"]
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise LoadError("token_list must be the list of tokens itself, as in the config.yaml of a training.")
    if len(tokens) != (found := len(tensors.get("ctc.ctc_lo.weight", ()))):
        raise LoadError(f"token_list has {len(tokens)} tokens, but the weights have {found}; are both of one model?")
    frontend = config.get("frontend_conf") or {}
    backbone = EBranchformerConfig(
        dim=sizes("encoder_conf", "output_size", 256, "encoder.after_norm.weight"),
        depth=depth,
        causal=False,
        num_heads=heads,
        hidden_dim=sizes("encoder_conf", "linear_units", 2048, f"{layer}feed_forward.w_1.weight"),
        cgmlp_dim=sizes("encoder_conf", "cgmlp_linear_units", 2048, f"{layer}cgmlp.channel_proj1.0.weight"),
        conv_kernel=sizes("encoder_conf", "cgmlp_conv_kernel", 31, f"{layer}cgmlp.csgu.conv.weight", 2),
        merge_kernel=sizes("encoder_conf", "merge_conv_kernel", 3, f"{layer}depthwise_conv_fusion.weight", 2),
        mask_conv=False,
        dropout=encoder.get("dropout_rate", 0.1),
    )
    first = "prompt_encoder.encoders.0."
    return SpeechCTC(
        backbone.build(),
        owsm_spec(tokens, _mels(frontend), pieces),
        subsampling=subsampling,
        intermediate=inner,
        transcript_layers=transcript,
        prompt=PromptConfig(
            dim=sizes("promptencoder_conf", "output_size", 256, "prompt_encoder.after_norm.weight"),
            depth=sizes.layers("promptencoder_conf", 6, "prompt_encoder.encoders."),
            num_heads=prompt.get("attention_heads", 4),
            hidden_dim=sizes("promptencoder_conf", "linear_units", 2048, f"{first}feed_forward.w_1.weight"),
            every=every,
            cross_heads=heads,
            dropout=prompt.get("dropout_rate", 0.1),
        ),
        padding="espnet",
    )


def _mels(frontend: Mapping[str, Any]) -> int:
    mels, rate = frontend.get("n_mels", 80), str(frontend.get("fs", 16_000))
    if rate not in ("16000", "16k", "16K"):
        raise LoadError(f"frontend_conf.fs must be 16k, got {rate}.")
    if not isinstance(mels, int) or not 1 <= mels <= 1024:
        raise LoadError(f"frontend_conf.n_mels must be a number up to 1024, got {mels}.")
    return mels


def _check_frontend(model: SpeechCTC, frontend: Mapping[str, Any]) -> None:
    logmel, n_fft = model.logmel, frontend.get("n_fft", 512)
    for name, found, ours in (
        ("n_fft", n_fft, logmel.n_fft),
        ("win_length", frontend.get("win_length") or n_fft, logmel.window_length),
        ("hop_length", frontend.get("hop_length", 128), logmel.hop),
        ("fmax", frontend.get("fmax") or model.spec.sample_rate / 2, model.spec.sample_rate / 2),
    ):
        if found != ours:
            raise LoadError(f"frontend_conf.{name} must be {ours:g}, got {found}.")


def _check_filterbank(model: SpeechCTC, bands: Tensor, where: Path) -> None:
    ours = model.logmel.get_buffer("bands")
    if bands.shape != ours.shape or not bool((bands - ours).abs().max() <= _FILTERBANK_ERROR):
        raise LoadError(f"{where}: {_FILTERBANK} is another filterbank than Slaney's of {model.spec.n_mels} mel bands.")


def _statistics(folder: _Folder, n_mels: int) -> dict[str, Tensor]:
    """Return mean and standard deviation of the features, which ESPnet keeps as sums.

    Raises:
        LoadError: There is no such file, or it is none of ESPnet.
    """
    if "normalize" in folder.config and folder.config["normalize"] is None:
        return {"normalize.mean": torch.zeros(n_mels), "normalize.std": torch.ones(n_mels)}
    name = (folder.config.get("normalize_conf") or {}).get("stats_file")
    file = folder.named(name)
    if file is None:
        raise LoadError(
            f"{folder.weights}: has no normalize.mean, and the statistics are missing too: normalize_conf.stats_file "
            f"in config.yaml is {name}; put that file below {folder.roots[-1]}."
        )
    try:
        with np.load(file, allow_pickle=False) as found:
            count, total, squares = (np.asarray(found[key], np.float64) for key in ("count", "sum", "sum_square"))
        with np.errstate(all="ignore"):  # a count of 0 is told below
            mean = total / count
            std = np.sqrt(np.maximum(squares / count - mean**2, 1e-20))
    except (OSError, ValueError, KeyError, EOFError, TypeError, zipfile.BadZipFile) as error:
        raise LoadError(
            f"{file}: no statistics of ESPnet ({error}); it must hold count, sum and sum_square."
        ) from error
    if mean.shape != (n_mels,) or not np.isfinite([mean, std]).all():
        raise LoadError(f"{file}: must hold finite statistics of {n_mels} channels, got {mean.shape}.")
    return {"normalize.mean": torch.from_numpy(mean).float(), "normalize.std": torch.from_numpy(std).float()}


CONVERTERS: tuple[Converter, ...] = (OWSM(),)
