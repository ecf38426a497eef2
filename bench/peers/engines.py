"""Audiobox's encoder in the engines that people run networks with on a CPU: ONNX Runtime, OpenVINO, torchao.

All are made from one plain module of torch that has our weights. What is in their favour:
* windows are whole, nothing is masked, and shapes are fixed; the relative position bias is a constant
* the weight norm is multiplied out; queries, keys, values and gates have a linear layer each, and a range each in 8 bit
* windows go one by one, as ours do on a CPU: the activations of one stay in the cache
* the mean over time of every layer is taken inside, the heads behind it are ours, in float32

Each package is imported when its engine is asked for. Shape letters: B windows, S samples, F frames, C channels,
D width, H heads, L layers.
"""

from __future__ import annotations

import copy
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastsmart.errors import UserError
from fastsmart.machine.hardware import library_limits
from fastsmart.reward.audiobox.architecture import KERNELS, NORM_EPS, STRIDES, WINDOW
from fastsmart.reward.audiobox.encoder import EncoderWeights, LayerWeights

ENGINES = ("onnxruntime", "onnxruntime-int8", "openvino", "openvino-bfloat16", "openvino-int8", "torchao-int8")
Encode = Callable[[np.ndarray], np.ndarray]  # a window, float32 [1, S] -> mean over time of every layer [1, L + 1, D]
M = TypeVar("M", bound=nn.Module)


class PlainEncoder(nn.Module):
    """The encoder in torch's own layers, for whole windows [B, S]: mean over time of every layer [B, L + 1, D]."""

    def __init__(self, weights: EncoderWeights) -> None:
        super().__init__()
        channels = weights.size.channels
        filters = [weights.first.t()[:, None]]
        filters += [w.view(channels, -1, channels).transpose(1, 2) for w in weights.convolutions]
        self.convolutions = nn.ModuleList(
            _filled(nn.Conv1d(w.shape[1], channels, kernel, stride, bias=False, device="meta"), w)
            for w, kernel, stride in zip(filters, KERNELS, STRIDES, strict=True)
        )
        self.first_norm = _filled(nn.GroupNorm(channels, channels, NORM_EPS, device="meta"), *weights.first_norm)
        self.feature_norm, self.norm = _norm(*weights.feature_norm), _norm(*weights.norm)
        self.project = _linear(*weights.project)
        width, inner, taps = weights.pos[0].shape
        pos = nn.Conv1d(width, width, taps, padding=taps // 2, groups=width // inner, device="meta")
        self.pos = _filled(pos, *weights.pos)
        self.bias = nn.Buffer(weights.bias.contiguous())  # [H, F, F]
        self.layers = nn.ModuleList(_Layer(layer) for layer in weights.layers)

    def forward(self, windows: Tensor) -> Tensor:
        x = windows[:, None]
        for i, convolution in enumerate(self.convolutions):
            x = convolution(x)
            x = F.gelu(x if i else self.first_norm(x))
        x = self.project(self.feature_norm(x.transpose(1, 2)))
        frames = x.shape[1]
        x = self.norm(x + F.gelu(self.pos(x.transpose(1, 2))[..., :frames]).transpose(1, 2))
        means = [x.mean(1)]
        for layer in self.layers:
            x = layer(x, self.bias)
            means.append(x.mean(1))
        return torch.stack(means, 1)


class _Layer(nn.Module):
    def __init__(self, weights: LayerWeights) -> None:
        super().__init__()
        self.heads = len(weights.gate)
        self.gate = nn.Buffer(weights.gate.contiguous())  # [H]
        width = len(weights.out[1])
        parts = [tensor.split([width] * 3 + [2 * self.heads]) for tensor in weights.qkvg]
        self.q, self.k, self.v, self.gates = (_linear(*part) for part in zip(*parts, strict=True))
        self.out = _linear(*weights.out)
        self.fc1, self.fc2 = _linear(*weights.fc1), _linear(*weights.fc2)
        self.attention_norm, self.final_norm = _norm(*weights.attention_norm), _norm(*weights.final_norm)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (part(x).unflatten(2, (self.heads, -1)).transpose(1, 2) for part in (self.q, self.k, self.v))
        a, b = self.gates(x).sigmoid().unflatten(2, (self.heads, 2)).unbind(3)
        share = (a * (b * self.gate - 1.0) + 2.0).transpose(1, 2)[..., None]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=share * bias)
        x = self.attention_norm(x + self.out(mixed.transpose(1, 2).flatten(2)))
        return self.final_norm(x + self.fc2(F.gelu(self.fc1(x))))


def _filled(module: M, weight: Tensor, bias: Tensor | None = None) -> M:
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=False)
    if bias is not None:
        module.bias = nn.Parameter(bias.contiguous(), requires_grad=False)
    return module


def _linear(weight: Tensor, bias: Tensor) -> nn.Linear:
    return _filled(nn.Linear(weight.shape[1], weight.shape[0], device="meta"), weight, bias)


def _norm(weight: Tensor, bias: Tensor) -> nn.LayerNorm:
    return _filled(nn.LayerNorm(len(weight), NORM_EPS, device="meta"), weight, bias)


class Engines:
    """Makes the encoder in each of ENGINES.

    folder  : for what is exported, some 900 MB at the published size; has to stay as long as an engine is used
    threads : of each
    heard   : windows float32 [S] that OpenVINO's 8-bit ranges are taken from

    `encoder` raises ImportError where a package is missing and UserError where the processor lacks the arithmetic.
    """

    def __init__(self, weights: EncoderWeights, folder: Path, threads: int, heard: Sequence[np.ndarray]) -> None:
        self.plain = PlainEncoder(weights).eval()
        self.folder, self.threads, self.heard = folder, threads, heard

    def encoder(self, name: str) -> Encode:
        engine, _, dtype = name.partition("-")
        make = {"onnxruntime": self._onnxruntime, "openvino": self._openvino, "torchao": self._torchao}[engine]
        with _quiet(), torch.no_grad():
            return make(dtype)

    def _onnxruntime(self, dtype: str) -> Encode:
        """8 bit: linear layers only, quantised as they run. Convolutions, for which ONNX Runtime has no fast 8-bit
        products, stay in float32."""
        import onnxruntime

        path = self._onnx_int8 if dtype else self._onnx
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.inter_op_num_threads = self.threads, 1
        options.add_session_config_entry("session.force_spinning_stop", "1")  # others have their turn then
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        return lambda window: session.run(None, {"windows": window})[0]

    def _openvino(self, dtype: str) -> Encode:
        """8 bit: NNCF's post-training quantisation of weights and activations, its way for transformers; what it leaves
        is in bfloat16 where the processor has it."""
        openvino = _import_openvino()
        core = openvino.Core()
        held_back = sorted({"ONEDNN_MAX_CPU_ISA", "DNNL_MAX_CPU_ISA"} & library_limits().keys())
        if held_back:  # OpenVINO asks the processor, its oneDNN obeys: 2026.4 then raises, or dies without a word
            raise UserError(f"OpenVINO cannot be held back by {held_back[0]}; unset it, or leave OpenVINO out")
        half = "BF16" in core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if dtype == "bfloat16" and not half:
            raise UserError("OpenVINO in bfloat16 needs a CPU with AVX-512 BF16 or AMX")
        path = self._openvino_int8 if dtype == "int8" else self._openvino_float32
        hint = "bf16" if dtype and half else "f32"
        settings = {
            "INFERENCE_PRECISION_HINT": hint,
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": 1,
            "INFERENCE_NUM_THREADS": self.threads,
            "ENABLE_CPU_PINNING": False,  # nobody else is pinned
        }
        compiled = core.compile_model(path, "CPU", settings)
        return lambda window: compiled(window)[0]

    def _torchao(self, dtype: str) -> Encode:
        """8-bit weights with a scale for each output, activations quantised row by row as they run."""
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        plain = copy.deepcopy(self.plain)
        quantize_(plain, Int8DynamicActivationInt8WeightConfig())
        return torch.no_grad()(lambda window: plain(torch.from_numpy(window)).numpy())

    @property
    def _example(self) -> Tensor:
        return torch.zeros(1, WINDOW)

    @cached_property
    def _onnx(self) -> Path:
        import onnxscript  # noqa: F401  # what torch exports with

        path, names = self.folder / "encoder.onnx", {"input_names": ["windows"], "output_names": ["means"]}
        torch.onnx.export(self.plain, (self._example,), path, dynamo=True, external_data=True, verbose=False, **names)
        return path

    @cached_property
    def _onnx_int8(self) -> Path:
        from onnxruntime.quantization import QuantType, quantize_dynamic

        path, chosen = self.folder / "encoder-int8.onnx", {"op_types_to_quantize": ["MatMul"], "per_channel": True}
        quantize_dynamic(self._onnx, path, weight_type=QuantType.QInt8, **chosen)
        return path

    @cached_property
    def _openvino_float32(self) -> Path:
        openvino = _import_openvino()
        path, shape = self.folder / "encoder.xml", list(self._example.shape)
        model = openvino.convert_model(self.plain, example_input=self._example, input=shape)
        openvino.save_model(model, path, compress_to_fp16=False)
        return path

    @cached_property
    def _openvino_int8(self) -> Path:
        openvino = _import_openvino()
        import nncf

        model, path = openvino.Core().read_model(self._openvino_float32), self.folder / "encoder-int8.xml"
        heard = nncf.Dataset([window[None] for window in self.heard])
        model = nncf.quantize(model, heard, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(self.heard))
        openvino.save_model(model, path, compress_to_fp16=False)
        return path


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters say about their own insides, and bars of progress."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def _import_openvino() -> Any:
    """OpenVINO without its telemetry, which would report to its makers: where that package is missing, it does not."""
    sys.modules.setdefault("openvino_telemetry", None)  # type: ignore[arg-type]
    import openvino

    return openvino
