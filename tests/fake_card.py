"""A card without one: `FakeCard` makes torch behave as if tensors could lie on `cuda:1`.

Tensors are ordinary ones, computed by the processor; a mark on their storage says that they lie on
the card. Inside `with FakeCard():`

 * what is made on the card, moved to it or computed from what lies there says so (`x.device`);
 * an operation on tensors of both sides is an error, as on a card (exceptions: numbers without
   dimensions on the processor's side, copies, and indices on the processor's side);
 * so are another card than this one (`cuda` alone is card 0), a generator of the other side,
   `numpy()` of what lies on the card, and `torch.load` that does not say where to;
 * with `float64=False`, which stands for Apple's, so is a tensor of doubles on the card.

Two modes of torch do it: one sees the calls of Python, and so what was asked for; the other the
operations that they, and the backward pass, are made of.
"""

import contextlib
from unittest import mock

import accelerate
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

aten = torch.ops.aten
COPIES = {aten.copy_.default, aten._foreach_copy_.default}
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default}
INDEXED |= {aten._index_put_impl_.default, aten._unsafe_index.Tensor}
JOINED = {aten.cat.default, aten.stack.default}  # here numbers without dimensions don't pass
WHERE = {
    torch.Tensor.device.__get__: lambda x, card: card.device,
    torch.Tensor.is_cuda.__get__: lambda x, card: True,
    torch.Tensor.is_cpu.__get__: lambda x, card: False,
    torch.Tensor.get_device: lambda x, card: card.device.index,
}


class Generator(torch.Generator):
    """A generator of the card; on the processor it is another class."""

    def __new__(cls, card):
        generator = super().__new__(cls, "cpu")
        generator.card = card
        return generator

    @property
    def device(self):
        return self.card.device


class FakeCard(TorchFunctionMode):
    """See the module.

    Args:
        index: of the card that there is to use; cards: how many this torch seems to see.
        float64: whether the card has doubles.
    """

    def __init__(self, index: int = 1, cards: int = 2, float64: bool = True):
        super().__init__()
        self.device, self.cards, self.float64 = torch.device("cuda", index), cards, float64
        self.current, self.used = 0, False  # the card that torch is on, and whether it has begun
        self.making = False  # whether what a call makes out of nothing lies on the card

    def holds(self, x) -> bool:
        """Whether tensor `x` lies on the card."""
        return getattr(x.untyped_storage(), "card", None) is self

    def put(self, x: Tensor, here: bool = True) -> None:
        """Mark `x`, and all that shares its memory."""
        x.untyped_storage().card = self if here else None
        self.used |= here
        if here and not self.float64 and x.dtype in (torch.float64, torch.complex128):
            raise TypeError("Cannot convert a tensor to float64: this card doesn't support it")

    def means(self, device) -> bool:
        """Whether `device` is the card; another card is an error."""
        device = torch.device(*["cuda", device] if isinstance(device, int) else [device])
        if device.type != "cuda":
            return False
        if (device.index or 0) != self.device.index:
            raise RuntimeError(f"{device} was asked for, but all is to lie on {self.device}")
        return True

    def __enter__(self):
        self.stack = contextlib.ExitStack()
        for owner, changes in self._patches():
            for name, value in changes.items():
                self.stack.enter_context(mock.patch.object(owner, name, value))
        self.stack.enter_context(_Operations(self))
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self.stack.close()

    def _patches(self):
        card, cpu_generator, load = self, torch.Generator, torch.load

        def state(device="cuda"):
            card.means(device)
            return torch.get_rng_state()

        def generator(device="cpu"):
            return Generator(card) if card.means(device) else cpu_generator(device)

        def switch(device):
            assert card.means(device), f"set_device({device})"
            card.current = card.device.index

        def load_to(*args, map_location=None, **options):
            if map_location is None:
                raise RuntimeError("torch.load without map_location: onto the card of who saved it")
            if not card.means(map_location):
                return load(*args, map_location=map_location, **options)
            found = load(*args, map_location="cpu", **options)
            for leaf in tree_leaves(found):
                if isinstance(leaf, Tensor):
                    card.put(leaf)
            return found

        begin, reduce = accelerate.Accelerator.__init__, accelerate.Accelerator.reduce

        def begin_on_card(self, cpu=False):
            assert not cpu, "Accelerator(cpu=True) for a policy on a card"
            begin(self, cpu=True)  # processes talk through the processor, whichever card they use

        def reduce_on_card(self, tensor, *how):
            assert self.num_processes == 1 or card.holds(tensor), (
                "NCCL takes what is on cards alone"
            )
            return reduce(self, tensor, *how)

        yield (
            torch.cuda,
            {
                "is_available": lambda: True,
                "device_count": lambda: card.cards,
                "set_device": switch,
                "current_device": lambda: card.current,
                "is_initialized": lambda: card.used,
                "get_device_name": lambda device=None: f"Fake card {torch.device(device).index}",
                "get_rng_state": state,
                "set_rng_state": lambda new, device="cuda": card.means(device),
                "manual_seed_all": lambda seed: None,
            },
        )
        yield torch, {"Generator": generator, "load": load_to}
        yield (
            accelerate.Accelerator,
            {
                "__init__": begin_on_card,
                "reduce": reduce_on_card,
                "device": property(lambda self: card.device),
            },
        )

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if function in WHERE and self.holds(args[0]):
            return WHERE[function](args[0], self)
        if function in (Tensor.to, Tensor.cpu, Tensor.cuda):
            return self._moved(function, args, kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        held = any(map(self.holds, tensors))
        if held and function in (Tensor.numpy, Tensor.__array__):
            raise TypeError(f"can't convert a tensor of {self.device} to numpy: use Tensor.cpu()")
        asked = kwargs.get("device")
        here = held if asked is None else self.means(asked)
        if asked is not None and here:
            kwargs["device"] = "cpu"
        generator = kwargs.get("generator")
        if generator is not None and isinstance(generator, Generator) != here:
            raise RuntimeError(f"{function.__name__}: a generator of {generator.device}")
        before, self.making = self.making, here
        try:
            made = function(*args, **kwargs)
        finally:
            self.making = before
        if asked is not None or function in (Tensor.__deepcopy__, Tensor.new_tensor):
            self.put(made, here)
        return made

    def _moved(self, function, args, kwargs):
        """What `x.to(...)`, `x.cpu()` and `x.cuda()` return."""
        x, *rest = args
        held = here = self.holds(x)
        if function is not Tensor.to:
            here, rest, kwargs = function is Tensor.cuda and self.means("cuda"), [], {}
        for i, asked in enumerate([*rest, kwargs.get("device")]):
            if isinstance(asked, Tensor):
                here, rest[i] = self.holds(asked), asked.dtype
            elif isinstance(asked, str | torch.device):
                here = self.means(asked)
                if i < len(rest):
                    rest[i] = "cpu"
                else:
                    kwargs["device"] = "cpu"
        moved = x.to(*rest, **kwargs) if rest or kwargs else x
        if here == held:
            return moved
        moved = (
            moved.clone() if moved.untyped_storage()._cdata == x.untyped_storage()._cdata else moved
        )
        self.put(moved, here)
        return moved


class _Operations(TorchDispatchMode):
    """What the calls and the backward pass are made of."""

    def __init__(self, card: FakeCard):
        super().__init__()
        self.card = card

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        held = [x for x in given if self.card.holds(x)]
        if held and len(held) < len(given):
            self._refuse_both_sides(operation, args, given)
        made = operation(*args, **kwargs)
        if held or (not given and self.card.making):
            old = {x.untyped_storage()._cdata for x in given}
            for x in tree_leaves(made):
                if isinstance(x, Tensor) and x.untyped_storage()._cdata not in old:
                    self.card.put(x)
        return made

    def _refuse_both_sides(self, operation, args, given) -> None:
        if operation in COPIES:
            return
        if operation in INDEXED and self.card.holds(args[0]):
            given = [x for x in given if not any(x is index for index in args[1])]
        changed = operation._schema.is_mutable and isinstance(args[0], Tensor)
        wrong = [
            x
            for x in given
            if not self.card.holds(x)
            and (x.ndim > 0 or operation in JOINED or (changed and x is args[0]))
        ]
        if wrong:
            raise RuntimeError(
                f"Expected all tensors to be on the same device, {self.card.device}, but "
                f"{operation} was given one on the processor, of shape {tuple(wrong[0].shape)}"
            )
