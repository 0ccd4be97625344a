"""Makes `lm_eval --model mdmrl` find the study's policies.

What follows lm-eval 0.4.13 asks the entry points `lm_eval.models` of installed packages; 0.4.13
itself knows the models of its own source alone. There `register` runs by PyTorch's entry points
`torch.backends`, which are called at the end of `import torch`: the harness passes there before it
looks a model up. Any other program goes on at once, and nothing heavy is imported.
"""

import contextlib
import sys


def register() -> None:
    """Tell the harness, if it is what runs, where `mdmrl` is; it is imported when asked for."""
    if "lm_eval" not in sys.modules:
        return
    with contextlib.suppress(ImportError):  # a harness of another age, which is left alone
        from lm_eval.api.registry import model_registry

        if "mdmrl" not in model_registry:
            model_registry.register("mdmrl", target="mdmrl.evaluation.lm_eval:PolicyLM")
