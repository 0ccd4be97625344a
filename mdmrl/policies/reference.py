"""The reference of a policy: what a KL is measured against."""

import contextlib
import copy
import threading
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from mdmrl.config import require
from mdmrl.policies.sharding import Sharding, cut, gathered
from mdmrl.runs import kept_random_state

_locks: WeakKeyDictionary = WeakKeyDictionary()  # apart: a policy that has one cannot be copied


class Reference:
    """Holds `self.model` and the reference that belongs to it.

    A frozen copy of the model, made by `sync_reference`; with LoRA a frozen second adapter, and
    before the first sync the model without its adapter. Another model under the policy (`add_lora`,
    `merge_lora`) has no reference yet, whatever the one before it had.
    """

    sharding: Sharding | None = None  # see `share_out`

    @property
    def model(self):
        return self._model

    @model.setter
    def model(self, model) -> None:
        self._model, self._reference, self._name = model, None, (None, 0)
        self.sharding = None

    @property
    def lock(self) -> threading.RLock:
        """Held by the thread that samples or trains: an update puts the reference in the policy's
        place for a while, and another thread would sample from that."""
        return _locks.setdefault(self, threading.RLock())

    @property
    def name(self) -> str | None:
        """What `load_policy` finds these weights by; None once they have changed."""
        name, checksum = self._name
        return name if checksum == self._checksum() else None

    @name.setter
    def name(self, name: str) -> None:
        self._name = name, self._checksum()

    def _checksum(self) -> int:
        """The sum of all weights' bits, the same on every device."""
        words = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
        weights = (weight.detach() for weight in self._model.parameters())
        return sum(int(weight.view(words[weight.element_size()]).sum()) for weight in weights)

    @property
    def uses_lora(self) -> bool:
        return hasattr(self.model, "peft_config")

    def sync_reference(self) -> None:
        if not self.uses_lora:
            if self.sharding is not None:
                self._reference = self.sharding.shared_out(self.model, frozen=True)
            else:
                self._reference = copy.deepcopy(self.model).requires_grad_(False)
            return
        if self._reference is None:
            with kept_random_state(self.device):
                self.model.add_adapter("reference", self.model.peft_config["default"])
            self.model.eval()
            self._reference = "reference"
        weights = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, weight in weights.items():
                if ".default." in name:
                    weights[name.replace(".default.", ".reference.")].copy_(weight)
        self._activate("default")

    @contextlib.contextmanager
    def reference(self):
        """Inside this context the policy is its reference (no gradient)."""
        require(
            self.uses_lora or self._reference is not None,
            "no reference yet: call policy.sync_reference() first",
        )
        with torch.no_grad():
            policy, adapted = self._model, contextlib.nullcontext()
            if not self.uses_lora:
                self._model = self._reference
            elif self._reference is None:
                adapted = policy.disable_adapter()
            else:
                self._activate("reference")
            try:
                with adapted:
                    yield
            finally:
                self._model = policy
                if self.uses_lora:
                    self._activate("default")

    def share_out(self) -> None:
        """Let all processes share out the weights (`mdmrl.policies.sharding`)."""
        self._reference, self.sharding = None, Sharding(self._model)

    @contextlib.contextmanager
    def together(self):
        """Inside, the policy is the shards of it, where processes share them out: all of them have
        to come here, make passes of it or of its reference, and exchange nothing else."""
        if self.sharding is None:
            yield
            return
        whole, self._model = self._model, self.sharding.twin
        try:
            with self.sharding.together(self._reference):
                yield
        finally:
            self._model = whole

    def backward(self, loss: Tensor, parameters: Sequence[Tensor] | None = None) -> None:
        """Add up the gradient of `loss` in the `grad` of trained parameters, or of some alone; of
        what is no function of them it is 0."""
        if self.sharding is not None:
            self.sharding.backward(loss)
        elif loss.requires_grad:
            loss.backward(inputs=parameters)

    def _activate(self, adapter: str) -> None:
        """Switch adapters; peft turns the active one's gradients on, so set them right again."""
        self.model.base_model.set_adapter(adapter)
        for name, weight in self.model.named_parameters():
            weight.requires_grad_("lora_" in name and ".default." in name)

    def reference_state(self) -> dict[str, Tensor]:
        """Weights of the reference that a checkpoint must keep; empty while it is the base. Where
        they are shared out, all processes have to ask, and the first one gets them."""
        if self._reference is None:
            return {}
        if self.uses_lora:
            weights = self.model.named_parameters()
            return {n: w.detach() for n, w in weights if ".reference." in n}
        state = {n: w.detach() for n, w in self._reference.named_parameters()}
        return gathered(state) if self.sharding else state

    def load_reference_state(self, state: dict[str, Tensor]) -> None:
        """Restore what `reference_state` returned."""
        if state:
            self.sync_reference()
            model = self.model if self.uses_lora else self._reference
            weights = dict(model.named_parameters())
            with torch.no_grad():
                for name, value in state.items():
                    weights[name].copy_(cut(value, weights[name]))
