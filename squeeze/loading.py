"""Models and tokenizers from disk or the hub, with errors that say what is wrong with them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError

from squeeze.errors import CheckpointError
from squeeze.model_info import load_config, locate
from squeeze.tensor_parallel import processes_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


def load_model(
    source: str | Path,
    *,
    device: str = "cpu",
    dtype: Any = None,
    trust_remote_code: bool = False,
    tp_plan: Any = None,
) -> PreTrainedModel:
    """Load a causal language model, dense or squeezed, in its checkpoint's own dtype.

    With ``tp_plan``, ``"auto"`` or a mapping as transformers takes it, all processes that torchrun
    started load it together, each its part, and ``device`` is theirs to choose.

    Raises:
        CheckpointError: missing, truncated or damaged files; the message names them.
    """
    from transformers import AutoModelForCausalLM
    from transformers.distributed import DistributedConfig

    load_config(source, trust_remote_code)
    path = locate(source)
    options: dict[str, Any] = {}
    if tp_plan is not None:
        options["distributed_config"] = DistributedConfig(tp_plan=tp_plan)
    try:
        model = AutoModelForCausalLM.from_pretrained(
            path, dtype=dtype or "auto", trust_remote_code=trust_remote_code, **options
        )
    except (SafetensorError, OSError, EOFError) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"model {str(source)!r}",
            f"its weights cannot be read ({first_line})",
            "complete safetensors files beside config.json",
            "Copy or download the model again",
        ) from error
    moved: Any = model.eval()
    if processes_of(model) is not None:
        return moved  # type: ignore[no-any-return]
    return moved.to(device)  # type: ignore[no-any-return]


def load_tokenizer(source: str | Path, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load a model's tokenizer.

    Raises:
        CheckpointError: the model comes without one.
    """
    from transformers import AutoTokenizer

    path = locate(source)
    remedy = "Save one there with tokenizer.save_pretrained, or choose another model"
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        first_line = str(error).strip().split("\n", 1)[0]
        raise CheckpointError(
            f"model {str(source)!r}",
            f"has no tokenizer that can be read ({first_line})",
            "tokenizer.json, or another form that AutoTokenizer reads",
            remedy,
        ) from error
    # Without any file transformers may answer with an empty one.
    if len(tokenizer) == 0 or tokenizer("the")["input_ids"] == []:
        raise CheckpointError(
            f"model {str(source)!r}",
            "has no tokenizer",
            "tokenizer.json or its like beside config.json",
            remedy,
        )
    return tokenizer  # type: ignore[no-any-return]
