"""Our quantization method as transformers sees it: ``quant_method: squeeze`` in a config."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from transformers.quantizers import (
    HfQuantizer,
    register_quantization_config,
    register_quantizer,
)
from transformers.quantizers.auto import AUTO_QUANTIZER_MAPPING
from transformers.utils.quantization_config import QuantizationConfigMixin

from squeeze.errors import UnsupportedError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

METHOD = "squeeze"


class SqueezeConfig(QuantizationConfigMixin):
    """The part of ``config.json`` that rebuilds a squeezed model's modules.

    Args:
        plan: ``Plan.to_dict()``.
        tables: Buffer name to ``{"shape": [...], "dtype": "float32"}``.
        format_version: Of the checkpoint.
    """

    def __init__(
        self,
        plan: dict[str, Any] | None = None,
        tables: dict[str, Any] | None = None,
        format_version: int = 1,
        **kwargs: Any,
    ) -> None:
        self.quant_method = METHOD  # type: ignore[assignment]
        self.plan = plan or {}
        self.tables = tables or {}
        self.format_version = format_version


class SqueezeQuantizer(HfQuantizer):
    """Rebuild the modules before the weights are read, and choose implementations after."""

    requires_calibration = True
    splits = False  # this process holds a part of what was loaded

    def _process_model_before_weight_loading(
        self, model: PreTrainedModel, checkpoint_files: Any = None, **kwargs: Any
    ) -> PreTrainedModel:
        from squeeze import export

        folder = Path(checkpoint_files[0]).parent if checkpoint_files else None
        # A squeezed model saved again by transformers alone has no manifest to check against.
        if folder is not None and (folder / export.MANIFEST).is_file():
            export.verify(folder)
        export.rebuild(model, self.quantization_config)  # type: ignore[arg-type]
        return model

    def _process_model_after_weight_loading(
        self, model: PreTrainedModel, **kwargs: Any
    ) -> PreTrainedModel:
        from squeeze import export

        self.splits = export.spread(model, self.quantization_config)  # type: ignore[arg-type]
        export.choose_implementations(model)
        export.note_folds(model)
        return model

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """Say that ``save_pretrained`` may write the model.

        Raises:
            UnsupportedError: this process has a part of the model.
        """
        if self.splits:
            raise UnsupportedError(
                "save_pretrained",
                "the model is split over processes by tensor parallelism",
                "a whole model",
                "Copy the checkpoint that it was loaded from",
            )
        return True

    @property
    def is_trainable(self) -> bool:
        """Say that the packed weights take no gradient."""
        return False

    def _dequantize(self, model: PreTrainedModel, dtype: Any = None) -> PreTrainedModel:
        from squeeze import export

        return export.dequantize(model, dtype)


def register() -> None:
    """Register config and quantizer with transformers, once per process."""
    if METHOD not in AUTO_QUANTIZER_MAPPING:
        register_quantization_config(METHOD)(SqueezeConfig)
        register_quantizer(METHOD)(SqueezeQuantizer)
