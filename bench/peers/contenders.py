"""The contenders of bench_models.py: how each is called in tables, and where its loader stands."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Contender:
    """One way to run a model.

    Args:
        label: its name in tables and pictures.
        page: the module of this package with its `load(model, threads, **options)`.
        options: what that gets.
        dtype: what its products are computed in; the measured product peak of that dtype is its ceiling.
        order: how it puts texts into batches; None: as the workload says.
        needs: what prepare.py must have made of the model; empty for contenders that load the model's own folder.
        threads: None: as many as the run.
    """

    label: str
    page: str
    options: tuple = ()
    dtype: str = "float32"
    order: str | None = None
    needs: str = ""
    threads: int | None = None

    @property
    def peer(self):
        """True for contenders that need the packages of the `bench` extra."""
        return bool(self.needs)


CONTENDERS = {
    "stock": Contender("stock", "torch_models", (("how", "stock"),)),
    "stock_sorted": Contender("stock, sorted by token count", "torch_models", (("how", "stock"),), order="tokens"),
    "ours_padded": Contender("ours, padding kept", "torch_models", (("how", "padded"),)),
    "ours": Contender("ours", "torch_models", (("how", "ours"),)),
    "ours_bf16": Contender("ours bf16", "torch_models", (("how", "bfloat16"),), "bfloat16"),
    "ours_1_thread": Contender("ours, 1 thread", "torch_models", (("how", "ours"),), threads=1),
    "ours_bf16_1_thread": Contender(
        "ours bf16, 1 thread", "torch_models", (("how", "bfloat16"),), "bfloat16", threads=1
    ),
    "compile": Contender("torch.compile, frozen", "torch_models", (("how", "compile"),)),
    "onnxruntime": Contender("ONNX Runtime", "runtimes", (("how", "onnxruntime"),), needs="onnx_fused"),
    "openvino": Contender("OpenVINO f32", "runtimes", (("how", "openvino"), ("precision", "f32")), needs="onnx"),
    "openvino_bf16": Contender(
        "OpenVINO bf16", "runtimes", (("how", "openvino"), ("precision", "bf16")), "bfloat16", needs="onnx"
    ),
    "ctranslate2": Contender(
        "CTranslate2 float32", "runtimes", (("how", "ctranslate2"), ("precision", "float32")), needs="ctranslate2"
    ),
    "ctranslate2_int8": Contender(
        "CTranslate2 int8", "runtimes", (("how", "ctranslate2"), ("precision", "int8")), "int8", needs="ctranslate2"
    ),
    "products": Contender("its matrix products alone, f32", "torch_models", (("how", "products"),)),
    "products_bf16": Contender(
        "its matrix products alone, bf16", "torch_models", (("how", "products_bf16"),), "bfloat16"
    ),
}
